"""Arithmetic on encrypted tensors on a GPU, bit for bit what the native evaluator computes.

The native evaluator goes through every operation on planned tensors: it decides levels, scales, bounds and predicted
errors, refuses what cannot be done, and records the word operations it would have carried out. Those are then carried
out on the device. Both evaluators thus take the same steps, and their tensors serialise to the same bytes.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NoReturn

from privtuner import _core
from privtuner._core import steps
from privtuner.ckks.evaluator import Matrix, Operations, call_core, refresh_with, reveal_with
from privtuner.ckks.keys import EvaluationKeys
from privtuner.ckks.parameters import Parameters
from privtuner.ckks.refresher import Refresher
from privtuner.ckks.tensor import EncryptedTensor, Tensor
from privtuner.copies import Stays
from privtuner.cuda.device import Device
from privtuner.cuda.gemm import Weights
from privtuner.cuda.words import Words
from privtuner.errors import CkksError, EngineError, InputError

__all__ = ["CudaEvaluator", "DeviceTensor"]


class DeviceTensor(Tensor, Stays):
    """An encrypted array of shape (tokens, features) on a device; made by `CudaEvaluator.upload`. Immutable.

    Attributes:
        device: where its words are. Tensors made by ``select`` and ``assume`` share them with their source.
    """

    planned = False
    stays = "a tensor on a GPU cannot be pickled: download it, pickle that, and upload it in the other process"

    def __init__(self, core: _core.CkksTensor, parameters: Parameters, device: Device, storage: Any) -> None:
        super().__init__(core, parameters)  # planned: everything but the words
        self._storage = storage  # (features, 2, limbs, N) of all that share it
        self.device = device

    @property
    def words(self) -> Any:
        """The device array (features, 2, limbs, N) of uint64, NTT domain; not to be changed."""
        ref = self._core.ref
        return self._storage[ref.first : ref.first + ref.features]

    def _place(self) -> str:
        return self.device.name


class CudaEvaluator(Operations[DeviceTensor], Stays):
    """The `privtuner.ckks.protocol.EvaluatorProtocol` on a GPU.

    Operations raise what those of the native evaluator raise. They return before the device is done; only `download`
    waits. A `Matrix` stays on the device as long as it exists, and clear values are encoded on the host. Work is
    launched on the thread's current stream, which should be the same one throughout. Safe to use from several threads:
    operations with one device and parameter set take turns.

    Args:
        device: from `privtuner.cuda.devices`.
        parameters: the set in force.
        keys: what products and rotations need; None for operations without keys. A key is uploaded when it is first
            used and stays as long as the evaluator.
        refresher: the way to the owner of the key, for `refresh` and `reveal`. The processor masks and unmasks: of a
            refresh the tensor of the lowest level comes down and the fresh one goes up, and pairs are split here.
        work_bytes: device memory for the work space of one operation; None: 256 MiB, or a quarter of what is free if
            that is less.

    Raises:
        privtuner.errors.EngineError: the device has not enough memory; says how much is missing for what.
        privtuner.errors.CkksError: keys of other parameters.
    """

    name = "cuda"
    stays = "an evaluator on a GPU cannot be pickled: make one of the same parameters and keys in the other process"

    def __init__(
        self,
        device: Device,
        parameters: Parameters,
        keys: EvaluationKeys | None = None,
        refresher: Refresher | None = None,
        *,
        work_bytes: int | None = None,
    ) -> None:
        self.device = device
        self.refresher = refresher
        with device.active():
            self._words: Words = _words(device, parameters, work_bytes)
        super().__init__(parameters, keys, record=True, batch=self._words.batch)
        self._keys: dict[int | None, Any] = {}

    @property
    def key_bytes(self) -> int:
        """Device memory of the keys that were used so far."""
        return sum(key.nbytes for key in self._keys.values())

    def upload(self, x: EncryptedTensor) -> DeviceTensor:
        """A copy of ``x`` on the device.

        Raises:
            CkksError: the tensor is a planned one, or of other parameters. EngineError: not enough memory.
        """
        if x.parameters != self.parameters:
            raise CkksError(f"a tensor of {x.parameters.name} does not fit an evaluator of {self.parameters.name}")
        words = x._core.words()
        with self.device.active():
            storage = self.device.upload(words, f"a tensor of {x.shape[1]} features")
        return DeviceTensor(x._core.as_planned(), self.parameters, self.device, storage)

    def download(self, x: DeviceTensor) -> EncryptedTensor:
        """The tensor that can be serialised and decrypted. Waits for what it is computed from."""
        core = self._core_of(x)
        with self.device.active():
            words = self.device.download(x.words)
        return EncryptedTensor(core.with_words(words), x.parameters)

    def _refreshed(self, x: DeviceTensor, level: int, packed: bool) -> DeviceTensor:
        return self.upload(refresh_with(self.refresher, self._core, self.download(x), level, packed))

    def _revealed(self, x: DeviceTensor, flood_bits: int, error: float, packed: bool) -> DeviceTensor:
        return self.upload(reveal_with(self.refresher, self._core, self.download(x), flood_bits, error, packed))

    def __repr__(self) -> str:
        return f"<CKKS evaluator of {self.parameters.name} on {self.device.name}, keys: {self.keys!r}>"

    def _core_of(self, x: object) -> _core.CkksTensor:
        if not isinstance(x, DeviceTensor):
            raise InputError(f"expected a tensor on {self.device.name}, got {type(x).__name__}; upload it first")
        if x.device is not self.device:
            raise InputError(
                f"a tensor on {x.device.name} cannot be used on {self.device.name}: download it there and upload "
                "it here"
            )
        return x._core

    def _run(
        self, inputs: Sequence[DeviceTensor], operation: Callable[..., Any], *arguments: Any
    ) -> list[DeviceTensor]:
        cores = self._cores(inputs)
        matrices = [argument for argument in arguments if isinstance(argument, Matrix)]
        with self._words.lock, self.device.active():
            try:
                results = call_core(operation, cores, arguments)
            finally:
                recorded = self._core.take_steps()  # of a failed operation: to be forgotten
            used = [{ref.storage for ref in _refs(step)} for step in recorded]
            last_use = {storage: i for i, some in enumerate(used) for storage in some}
            kept = {core.ref.storage for core in results}
            storages = {core.ref.storage: x._storage for core, x in zip(cores, inputs, strict=True)}
            for i, step in enumerate(recorded):
                self._replay(step, storages, matrices)
                for storage in used[i] - kept:
                    if last_use[storage] == i:
                        del storages[storage]
            return [DeviceTensor(core, self.parameters, self.device, storages[core.ref.storage]) for core in results]

    def _replay(self, step: steps._Step, storages: dict[int, Any], matrices: Sequence[Matrix]) -> None:
        """Carry out one recorded step; ``storages`` gets what it makes."""
        words = self._words

        def operand(ref: steps.TensorRef) -> Any:
            return storages[ref.storage][ref.first : ref.first + ref.features]

        def allocate(ref: steps.TensorRef) -> Any:
            storages[ref.storage] = words.empty(ref.features, ref.level + 1)
            return storages[ref.storage]

        match step:
            case steps.Combine():
                terms = [operand(ref) for ref in step.terms]
                words.combine(allocate(step.out), terms, step.weights, step.constants, step.rescaled)
            case steps.Add():
                words.add(allocate(step.out), operand(step.x), operand(step.y), step.minus)
            case steps.Sum():
                words.sum(allocate(step.out), operand(step.x))
            case steps.Copy():
                words.copy(allocate(step.out), [operand(ref) for ref in step.parts])
            case steps.Plain():
                words.plain(allocate(step.out), operand(step.x), step.coefficients)
            case steps.Product():
                words.product(
                    allocate(step.out),
                    operand(step.x),
                    operand(step.y),
                    self._key(None),
                    summed=step.summed,
                    multipliers=step.multipliers,
                    terms=[operand(ref) for ref in step.terms],
                    weights=step.weights,
                    constants=step.constants,
                )
            case steps.Matrix():
                (matrix,) = matrices
                words.matrix(allocate(step.out), operand(step.x), _upload_once(matrix, self.device), step.transpose)
            case steps.Galois():
                keys = {element: self._key(element) for element in step.elements if element != 1}
                words.galois([allocate(ref) for ref in step.outs], operand(step.x), step.elements, keys)
            case steps.Monomial():
                words.monomial(allocate(step.out), operand(step.x), step.power)
            case _:
                _refuse(step)

    def _key(self, element: int | None) -> Any:
        """The key of an automorphism, or for None of relinearisation, on the device."""
        if element not in self._keys and self.keys is not None:  # without keys nothing was recorded
            words = self.keys._core.words(element)
            self._keys[element] = self.device.upload(words, "an evaluation key")
        return self._keys[element]


def _refs(step: steps._Step) -> list[steps.TensorRef]:
    """Return references to all tensors that a step reads or makes."""
    match step:
        case steps.Combine():
            return [step.out, *step.terms]
        case steps.Add():
            return [step.out, step.x, step.y]
        case steps.Copy():
            return [step.out, *step.parts]
        case steps.Product():
            return [step.out, step.x, step.y, *step.terms]
        case steps.Galois():
            return [step.x, *step.outs]
        case _:
            return [step.out, step.x]


def _refuse(step: NoReturn) -> NoReturn:
    raise EngineError(f"the recorded step {type(step).__name__} cannot be carried out; this is a bug in privtuner")


def _make_words(device: Device, parameters: Parameters, work_bytes: int | None) -> Words:
    return Words(device, parameters._core, work_bytes)


_words: Any = lru_cache(maxsize=4)(_make_words)
"""Tables are large and slow to make: evaluators share those of the sets that were used last."""


_matrices: weakref.WeakKeyDictionary[Matrix, dict[Device, Weights]] = weakref.WeakKeyDictionary()
_matrices_lock = threading.Lock()


def _upload_once(matrix: Matrix, device: Device) -> Weights:
    with _matrices_lock:
        on_devices = _matrices.setdefault(matrix, {})
        if device not in on_devices:
            on_devices[device] = Weights(device, matrix.integers)
        return on_devices[device]
