"""Arithmetic on encrypted tensors on a GPU, bit for bit what the native evaluator computes.

The native evaluator goes through every operation on planned tensors: it decides levels, scales, bounds and predicted
errors, refuses what cannot be done, and records the word operations it would have carried out. Those are then carried
out on the device. Both engines thus take the same steps, and their tensors serialise to the same bytes.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from .. import _core
from ..ckks.evaluator import Matrix, as_numbers
from ..ckks.keys import EvaluationKeys, as_values
from ..ckks.parameters import Parameters
from ..ckks.polynomial import Polynomial
from ..ckks.tensor import Budget, EncryptedTensor
from ..copies import Stays
from ..errors import CkksError, EngineError, InputError
from .device import Device
from .gemm import Weights
from .words import Words

__all__ = ["CudaEvaluator", "DeviceTensor"]

_Ref = tuple[int, int, int, int]
"""Storage, first feature, features, level."""


class DeviceTensor(Stays):
    """An encrypted array of shape (tokens, features) on a device; made by :meth:`CudaEvaluator.upload`. Immutable.

    Attributes:
        shape: (tokens, features).
        level: multiplications left.
        bound: |value| <= bound in every slot, as declared on encryption, derived, or promised by ``assume``.
        nbytes: of its words on the device. Tensors made by ``select`` and ``assume`` share them with their source.
    """

    planned = False
    stays = "a tensor on a GPU cannot be pickled: download it, pickle that, and upload it in the other process"

    def __init__(self, core: _core.CkksTensor, parameters: Parameters, device: Device, storage: Any) -> None:
        self._core = core  # planned: everything but the words
        self._storage = storage  # (features, 2, limbs, N) of all that share it
        self.parameters = parameters
        self.device = device
        self.shape: tuple[int, int] = (core.tokens, core.features)
        self.level: int = core.level
        self.bound: float = core.bound
        self.nbytes: int = core.nbytes

    @property
    def scale(self) -> npt.NDArray[np.float64]:
        """float64 (features,): value = slot / scale."""
        return self._core.scale

    @property
    def words(self) -> Any:
        """The device array (features, 2, limbs, N) of uint64, NTT domain; not to be changed."""
        _, first, features, _ = self._core.ref
        return self._storage[first : first + features]

    def budget(self) -> Budget:
        """Level, scale and predicted error."""
        return EncryptedTensor(self._core, self.parameters).budget()

    def __repr__(self) -> str:
        return repr(EncryptedTensor(self._core, self.parameters)).replace("planned", self.device.name, 1)


class CudaEvaluator(Stays):
    """The `privtuner.ckks.protocol.EvaluatorProtocol` on a GPU: `privtuner.ckks.Evaluator` for `DeviceTensor`.

    Operations raise what those of the native evaluator raise. They return before the device is done; only `download`
    waits. Work is launched on the thread's current stream, which should be the same one throughout. Safe to use from
    several threads: operations with one device and parameter set take turns.

    Args:
        device: from :func:`privtuner.cuda.devices`.
        parameters: the set in force.
        keys: what products and rotations need; None for operations without keys. A key is uploaded when it is first
            used and stays as long as the evaluator.
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
        *,
        work_bytes: int | None = None,
    ) -> None:
        self.device = device
        self.parameters = parameters
        self.keys = keys
        self.slots = parameters.slots
        with device.active():
            self._words: Words = _words(device, parameters, work_bytes)
        keys_core = None if keys is None else keys._core
        self._core = _core.CkksEvaluator(parameters._core, keys_core, record=True, batch=self._words.batch)
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
            return self._wrap(x._core.as_planned(), self.device.upload(words, f"a tensor of {x.shape[1]} features"))

    def download(self, x: DeviceTensor) -> EncryptedTensor:
        """The tensor that can be serialised and decrypted. Waits for what it is computed from."""
        self._check([x])
        with self.device.active():
            words = self.device.download(x.words)
        return EncryptedTensor(x._core.with_words(words), x.parameters)

    def add(self, x: DeviceTensor, y: DeviceTensor | npt.ArrayLike) -> DeviceTensor:
        """See :meth:`privtuner.ckks.Evaluator.add`."""
        if isinstance(y, (DeviceTensor, EncryptedTensor)):
            return self._one((x, y), self._core.add, x._core, y._core)
        return self._one((x,), self._core.add_constant, x._core, as_numbers(y))

    def subtract(self, x: DeviceTensor, y: DeviceTensor | npt.ArrayLike) -> DeviceTensor:
        """See :meth:`privtuner.ckks.Evaluator.subtract`."""
        if isinstance(y, (DeviceTensor, EncryptedTensor)):
            return self._one((x, y), self._core.subtract, x._core, y._core)
        return self._one((x,), self._core.add_constant, x._core, -as_numbers(y))

    def negate(self, x: DeviceTensor) -> DeviceTensor:
        """See :meth:`privtuner.ckks.Evaluator.negate`."""
        return self._one((x,), self._core.negate, x._core)

    def multiply(self, x: DeviceTensor, y: DeviceTensor | npt.ArrayLike) -> DeviceTensor:
        """See :meth:`privtuner.ckks.Evaluator.multiply`."""
        if isinstance(y, (DeviceTensor, EncryptedTensor)):
            return self._one((x, y), self._core.multiply, x._core, y._core)
        return self._one((x,), self._core.multiply_constant, x._core, as_numbers(y))

    def square(self, x: DeviceTensor) -> DeviceTensor:
        """See :meth:`privtuner.ckks.Evaluator.square`."""
        return self.multiply(x, x)

    def multiply_plain(self, x: DeviceTensor, values: npt.ArrayLike) -> DeviceTensor:
        """See :meth:`privtuner.ckks.Evaluator.multiply_plain`. The values are encoded on the host."""
        re, im = as_values(values)
        return self._one((x,), self._core.multiply_plain, x._core, re, im)

    def dot(self, x: DeviceTensor, y: DeviceTensor) -> DeviceTensor:
        """See :meth:`privtuner.ckks.Evaluator.dot`."""
        return self._one((x, y), self._core.dot, x._core, y._core)

    def sum_features(self, x: DeviceTensor) -> DeviceTensor:
        """See :meth:`privtuner.ckks.Evaluator.sum_features`."""
        return self._one((x,), self._core.sum_features, x._core)

    def concatenate(self, tensors: Sequence[DeviceTensor]) -> DeviceTensor:
        """See :meth:`privtuner.ckks.Evaluator.concatenate`."""
        return self._one(tensors, self._core.concatenate, [x._core for x in tensors])

    def select(self, x: DeviceTensor, features: slice) -> DeviceTensor:
        """See :meth:`privtuner.ckks.Evaluator.select`."""
        begin, end, step = features.indices(x.shape[1])
        if step != 1:
            raise InputError(f"features {features}: choose neighbouring ones, step 1")
        return self._one((x,), self._core.select, x._core, begin, end)

    def linear(self, x: DeviceTensor, weights: Matrix | npt.ArrayLike, *, transpose: bool = False) -> DeviceTensor:
        """See :meth:`privtuner.ckks.Evaluator.linear`. A `Matrix` stays on the device as long as it exists."""
        matrix = weights if isinstance(weights, Matrix) else Matrix(weights)
        return self._one((x,), self._core.linear, x._core, matrix._core, transpose, matrix=matrix)

    def linear_combination(
        self, tensors: Sequence[DeviceTensor], weights: npt.ArrayLike, constant: npt.ArrayLike = 0.0
    ) -> DeviceTensor:
        """See :meth:`privtuner.ckks.Evaluator.linear_combination`."""
        rows = np.asarray(weights, np.float64)
        if rows.ndim == 1:
            rows = rows[:, None]
        if rows.ndim != 2 or len(rows) != len(tensors):
            raise InputError(f"weights of shape {rows.shape} for {len(tensors)} tensors; pass (t,) or (t, features)")
        constants = np.atleast_1d(as_numbers(constant)).tolist()
        cores = [x._core for x in tensors]
        return self._one(tensors, self._core.linear_combination, cores, rows.tolist(), constants)

    def polynomial(self, x: DeviceTensor, polynomial: Polynomial) -> DeviceTensor:
        """See :meth:`privtuner.ckks.Evaluator.polynomial`."""
        low, high = polynomial.domain
        coefficients = np.asarray(polynomial.coefficients, np.float64)
        return self._one((x,), self._core.polynomial, x._core, polynomial.basis, coefficients, low, high)

    def rescale(self, x: DeviceTensor) -> DeviceTensor:
        """See :meth:`privtuner.ckks.Evaluator.rescale`."""
        return self._one((x,), self._core.rescale, x._core)

    def drop_to(self, x: DeviceTensor, level: int) -> DeviceTensor:
        """See :meth:`privtuner.ckks.Evaluator.drop_to`."""
        return self._one((x,), self._core.drop, x._core, level)

    @overload
    def rotate(self, x: DeviceTensor, steps: int) -> DeviceTensor: ...
    @overload
    def rotate(self, x: DeviceTensor, steps: Sequence[int]) -> list[DeviceTensor]: ...
    def rotate(self, x: DeviceTensor, steps: Sequence[int] | int) -> DeviceTensor | list[DeviceTensor]:
        """See :meth:`privtuner.ckks.Evaluator.rotate`."""
        if isinstance(steps, (int, np.integer)):
            return self._run((x,), self._core.rotate, x._core, [int(steps)])[0]
        return self._run((x,), self._core.rotate, x._core, [int(step) for step in steps])

    def conjugate(self, x: DeviceTensor) -> DeviceTensor:
        """See :meth:`privtuner.ckks.Evaluator.conjugate`."""
        return self._one((x,), self._core.conjugate, x._core)

    def sum_slots(self, x: DeviceTensor) -> DeviceTensor:
        """See :meth:`privtuner.ckks.Evaluator.sum_slots`."""
        return self._one((x,), self._core.sum_slots, x._core)

    def pack_slot_sums(self, x: DeviceTensor) -> DeviceTensor:
        """See :meth:`privtuner.ckks.Evaluator.pack_slot_sums`."""
        return self._one((x,), self._core.pack_slot_sums, x._core)

    def assume(self, x: DeviceTensor, bound: float) -> DeviceTensor:
        """See :meth:`privtuner.ckks.Evaluator.assume`."""
        return self._one((x,), self._core.assume, x._core, bound)

    def __repr__(self) -> str:
        return f"<CKKS evaluator of {self.parameters.name} on {self.device.name}, keys: {self.keys!r}>"

    def _wrap(self, core: _core.CkksTensor, storage: Any) -> DeviceTensor:
        return DeviceTensor(core, self.parameters, self.device, storage)

    def _check(self, inputs: Iterable[Any]) -> None:
        for x in inputs:
            if not isinstance(x, DeviceTensor):
                raise InputError(f"expected a tensor on {self.device.name}, got {type(x).__name__}; upload it first")
            if x.device is not self.device:
                raise InputError(
                    f"a tensor on {x.device.name} cannot be used on {self.device.name}: download it there and upload "
                    "it here"
                )

    def _one(
        self, inputs: Sequence[Any], operation: Callable[..., _core.CkksTensor], *arguments: Any, matrix: Any = None
    ) -> DeviceTensor:
        return self._run(inputs, lambda *given: [operation(*given)], *arguments, matrix=matrix)[0]

    def _run(
        self,
        inputs: Sequence[Any],
        operation: Callable[..., list[_core.CkksTensor]],
        *arguments: Any,
        matrix: Matrix | None = None,
    ) -> list[DeviceTensor]:
        """What ``operation`` of the native evaluator gives for ``arguments``, which hold the cores of ``inputs``."""
        self._check(inputs)
        with self._words.lock, self.device.active():
            try:
                results = operation(*arguments)
            finally:
                steps = self._core.take_steps()  # of a failed operation: to be forgotten
            kept = {core.ref[0] for core in results}
            last_use = {ref[0]: i for i, step in enumerate(steps) for ref in _refs(step)}
            storages = {x._core.ref[0]: x._storage for x in inputs}
            for i, step in enumerate(steps):
                self._replay(step, storages, matrix)
                for storage in {ref[0] for ref in _refs(step)} - kept:
                    if last_use[storage] == i:
                        del storages[storage]
            return [self._wrap(core, storages[core.ref[0]]) for core in results]

    def _replay(self, step: dict[str, Any], storages: dict[int, Any], matrix: Matrix | None) -> None:
        """Carry out one recorded step; ``storages`` gets what it makes."""
        words, kind = self._words, step["kind"]

        def operand(ref: _Ref) -> Any:
            storage, first, features, _ = ref
            return storages[storage][first : first + features]

        def made(ref: _Ref) -> Any:
            storage, _, features, level = ref
            storages[storage] = words.empty(features, level + 1)
            return storages[storage]

        terms = [operand(ref) for ref in step.get("terms", ())]
        if kind == "galois":
            keys = {element: self._key(element) for element in step["elements"] if element != 1}
            words.galois([made(ref) for ref in step["outs"]], operand(step["x"]), step["elements"], keys)
            return
        out = made(step["out"])
        if kind == "combine":
            words.combine(out, terms, step["weights"], step["constants"], step["rescaled"])
        elif kind == "add":
            words.add(out, operand(step["x"]), operand(step["y"]), step["minus"])
        elif kind == "sum":
            words.sum(out, operand(step["x"]))
        elif kind == "copy":
            words.copy(out, [operand(ref) for ref in step["parts"]])
        elif kind == "plain":
            words.plain(out, operand(step["x"]), step["coefficients"])
        elif kind == "product":
            words.product(
                out,
                operand(step["x"]),
                operand(step["y"]),
                self._key(None),
                summed=step["summed"],
                multipliers=step["multipliers"],
                terms=terms,
                weights=step.get("weights"),
                constants=step.get("constants"),
            )
        elif kind == "matrix" and matrix is not None:
            words.matrix(out, operand(step["x"]), _resident(matrix, self.device), step["transpose"])
        elif kind == "monomial":
            words.monomial(out, operand(step["x"]), step["power"])
        else:
            raise EngineError(f"the recorded step '{kind}' cannot be carried out; this is a bug in privtuner")

    def _key(self, element: int | None) -> Any:
        """The key of an automorphism, or for None of relinearisation, on the device."""
        if element not in self._keys and self.keys is not None:  # without keys nothing was recorded
            words = self.keys._core.words(element)
            self._keys[element] = self.device.upload(words, "an evaluation key")
        return self._keys[element]


def _refs(step: dict[str, Any]) -> list[_Ref]:
    """Everything a step reads or makes."""
    listed = [ref for name in ("terms", "parts", "outs") for ref in step.get(name) or ()]
    return listed + [step[name] for name in ("out", "x", "y") if step.get(name) is not None]


def _make_words(device: Device, parameters: Parameters, work_bytes: int | None) -> Words:
    return Words(device, parameters._core, work_bytes)


_words: Any = lru_cache(maxsize=4)(_make_words)
"""Tables are large and slow to make: evaluators share those of the sets that were used last."""


_matrices: weakref.WeakKeyDictionary[Matrix, dict[Device, Weights]] = weakref.WeakKeyDictionary()
_matrices_lock = threading.Lock()


def _resident(matrix: Matrix, device: Device) -> Weights:
    with _matrices_lock:
        on_devices = _matrices.setdefault(matrix, {})
        if device not in on_devices:
            on_devices[device] = Weights(device, matrix.integers)
        return on_devices[device]
