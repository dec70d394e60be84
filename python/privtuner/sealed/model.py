"""The sealed model at the server: weights, domains and plan, and the passes on ciphertexts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Generic

import numpy as np

from privtuner.ckks import Parameters, Timings
from privtuner.ckks.protocol import EvaluatorProtocol, Tensor
from privtuner.errors import InputError
from privtuner.sealed.adapters import EncryptedAdapters, take_step
from privtuner.sealed.block import Saved, Stages
from privtuner.sealed.clear_adapters import ClearAdapters
from privtuner.sealed.clipping import clip
from privtuner.sealed.domains import Domains
from privtuner.sealed.encoder import Encoder
from privtuner.sealed.plan import Plan, holds, make_plan, reveal
from privtuner.sealed.public import Public
from privtuner.sealed.schedule import Schedule
from privtuner.sealed.weights import Weights

__all__ = ["EncryptedAdapters", "Kept", "SealedModel", "model_digest"]

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Kept(Generic[Tensor]):
    """What a forward pass keeps for the backward one: one `Saved` a block."""

    blocks: list[Saved[Tensor]]


class SealedModel:
    """An encoder that is evaluated and trained on ciphertexts.

    ::

        domains = Domains.measure(weights, embeddings, lengths)
        model = SealedModel(weights, domains)
        print(model.plan)
        pooled, kept = model.forward(evaluator, x, mask, adapters, keep=True)
        gradients = model.backward(evaluator, kept, gradient, adapters)
        adapters = model.step(evaluator, adapters, gradients, rate=0.05, momentum=0.9)

    Args:
        weights: of the encoder.
        domains: measured with these weights.
        parameters: of the encryption; default N = 2^15, depth 12, 128 bits.
        timings: of this machine, for the plan.
        price: seconds a byte of traffic, for the plan.
        progress: told while it plans, which takes seconds where layers are wide; as of `make_plan`.
        plan: one that was made before for these weights and domains; made anew if the circuits are others now.

    Attributes:
        shape: of the encoder.
        plan: levels, refreshes, keys, bytes and seconds.
        public: what the data owner must know.
        secret: 32 bytes that only who has the weights can make.

    Raises:
        InputError: domains of other layers, a period that does not divide the slots, a scale below 2^40, or a ring
            above 2^15.
        CkksError: parameters that are not deep enough.
    """

    def __init__(
        self,
        weights: Weights,
        domains: Domains,
        parameters: Parameters | None = None,
        *,
        timings: Timings | None = None,
        price: float | None = None,
        progress: Callable[[int, int, str], object] | None = None,
        plan: Plan | None = None,
    ) -> None:
        self.shape = weights.shape
        self.parameters = Parameters.secure(12, ring_dimension=1 << 15) if parameters is None else parameters
        if self.parameters.scale_bits < 40 or self.parameters.ring_dimension > 1 << 15:
            raise InputError(
                f"{self.parameters.name}: the errors that are promised, and must drown in what is revealed, are "
                "known for a scale of 2^40 or more and rings up to 2^15; choose such parameters"
            )
        if self.parameters.slots % self.shape.period:
            raise InputError(f"period {self.shape.period} does not divide the {self.parameters.slots} slots")
        self.encoder = Encoder(weights, domains)
        if plan is None or not holds(plan, self.encoder, self.parameters):
            plan = make_plan(self.encoder, self.parameters, timings, price, progress)
        self.plan: Plan = plan
        content = model_digest(weights, domains)
        self.secret = hashlib.sha256(b"privtuner sealed secret" + content).digest()
        self.public = self._public(content)

    def _public(self, content: bytes) -> Public:
        plan, pooled = self.plan, self.plan.pooled
        backward = plan.backward
        public = Public(
            bytes(16),
            self.parameters,
            self.shape,
            self.encoder.input_bound,
            self.encoder.gradient_bound,
            plan.forward.start,
            backward.start if backward else 2,
            pooled.level,
            pooled.bound,
            float(pooled.noise.max()),
            plan.keys,
            plan.forward.refreshes,
            backward.refreshes if backward else (),
        )
        identity = hashlib.sha256(b"privtuner sealed id" + content + public.to_bytes()).digest()
        return replace(public, id=identity[:16])

    def forward(
        self,
        ev: EvaluatorProtocol[Tensor],
        x: Tensor,
        mask: Tensor,
        adapters: EncryptedAdapters[Tensor] | ClearAdapters | None,
        keep: bool = False,
        progress: Progress | None = None,
    ) -> tuple[Tensor, Kept[Tensor] | None]:
        """Return the pooled vectors, ready to be decrypted by the owner, and with ``keep`` what `backward` takes.

        Args:
            ev: computes, with the keys of `Public.keys` and a refresher.
            x: embeddings, as `Public.inputs`.
            mask: as `Public.mask`.
            adapters: as `Public.adapters`, or in the clear where the shape says so; None if the rank is 0.
            keep: whether a backward pass follows.
            progress: is called with the name of every point.

        Raises:
            InputError: tensors of other shapes or levels.
            CkksError: as the evaluator's operations.
        """
        for name, tensor, planned in (("x", x, self.public.inputs), ("mask", mask, self.public.mask)):
            _check(name, tensor, planned.shape, planned.level)
        if keep and adapters is None:
            raise InputError("nothing is kept for a backward pass of a model without adapters")
        if self.shape.rank and adapters is None:
            raise InputError("this model takes adapters: pass them")
        encoder, values = self._adapted(adapters)
        stages = Stages(ev, self.plan.forward.levels, progress)
        pooled, saved = encoder.forward(ev, x, mask, values, stages, self.plan.kept if keep else None)
        return reveal(ev, pooled), Kept(saved) if keep else None

    def backward(
        self,
        ev: EvaluatorProtocol[Tensor],
        kept: Kept[Tensor],
        gradient: Tensor,
        adapters: EncryptedAdapters[Tensor] | ClearAdapters,
        progress: Progress | None = None,
    ) -> Tensor:
        """Return the gradients by the numbers of all adapters, packed like them.

        Args:
            ev: as for `forward`.
            kept: of `forward`.
            gradient: as `Public.gradient`.
            adapters: those of the forward pass.
            progress: as for `forward`.

        Raises:
            InputError, CkksError: as `forward`.
        """
        plan = self._backward_plan()
        _check("gradient", gradient, self.public.gradient.shape, self.public.gradient.level)
        stages = Stages(ev, plan.levels, progress)
        encoder, values = self._adapted(adapters)
        return encoder.backward(ev, kept.blocks, gradient, values, stages)

    def clip(self, ev: EvaluatorProtocol[Tensor], gradients: Tensor, limit: float) -> tuple[Tensor, Tensor]:
        """Return gradients as `privtuner.sealed.clipping.clip` does, where adapters are in the clear at the server.

        Raises:
            InputError: the adapters are the owner's, and no gradient is opened; or a norm that is not positive.
        """
        if not self.shape.clear:
            raise InputError("the adapters of this model are encrypted under the owner's key: no gradient is opened")
        return clip(ev, gradients, limit)

    def step(
        self,
        ev: EvaluatorProtocol[Tensor],
        adapters: EncryptedAdapters[Tensor],
        gradients: Tensor,
        rate: float,
        momentum: float,
    ) -> EncryptedAdapters[Tensor]:
        """Take a step of gradient descent with momentum: v' = momentum v + g, values' = values - rate v'.

        Args:
            ev: as for `forward`.
            adapters: before the step.
            gradients: of `backward`.
            rate: of learning, divided by what the owner multiplied the gradient by.
            momentum: from 0 to below 1.

        Raises:
            InputError: a rate or a momentum out of range, or gradients of another shape.
        """
        self._backward_plan()
        return take_step(ev, self.shape, adapters, gradients, rate, momentum, self.parameters.depth)

    def _backward_plan(self) -> Schedule:
        if self.plan.backward is None:
            raise InputError("this model has no adapters: there is nothing to train")
        return self.plan.backward

    def _adapted(self, adapters: EncryptedAdapters[Tensor] | ClearAdapters | None) -> tuple[Encoder, Tensor | None]:
        """The circuits to run, and the encrypted numbers of the adapters if there are some."""
        if adapters is None:
            return self.encoder, None
        if isinstance(adapters, ClearAdapters) != self.shape.clear:
            raise InputError(f"the adapters of this model are {self.shape.placement}: pass others")
        if isinstance(adapters, ClearAdapters):
            return self.encoder.with_adapters(adapters), None
        return self.encoder, self._values(adapters)

    def _values(self, adapters: EncryptedAdapters[Tensor]) -> Tensor:
        for name, tensor in (("values", adapters.values), ("velocity", adapters.velocity)):
            _check(name, tensor, (self.parameters.slots, self.shape.adapter_ciphertexts), self.parameters.depth)
        return adapters.values

    def __repr__(self) -> str:
        return f"SealedModel({self.shape.layers} layers, width {self.shape.width}, {self.parameters.name})"


def model_digest(weights: Weights, domains: Domains) -> bytes:
    """32 bytes that stand for weights, shape and domains; they never leave the model owner."""
    content = hashlib.sha256()
    for array in weights.arrays():
        content.update(np.ascontiguousarray(array).tobytes())
    content.update(repr((weights.shape, domains)).encode())
    return content.digest()


def _check(name: str, tensor: Tensor, shape: tuple[int, int], level: int) -> None:
    if tensor.shape != shape or tensor.level != level:
        raise InputError(f"{name} of shape {tensor.shape} at level {tensor.level}: expected {shape} at level {level}")
