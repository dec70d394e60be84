"""The forward pass that a model is in: which sizes its requests may have, and which rows they may leave out."""

from __future__ import annotations

import functools
import inspect
import math
import threading
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from privtuner.errors import InputError
from privtuner.nn.families import constant_sizes
from privtuner.nn.live import LiveResource
from privtuner.nn.padding import Omission, Rows, hidden_positions, omission
from privtuner.nn.withheld import WithheldOutput

__all__ = ["PassTracker"]


@dataclass(frozen=True, eq=False)
class _Pass:
    """A forward pass: the leading dimensions its layers may be called with (None for any), and what it leaves out."""

    sizes: frozenset[torch.Size] | None
    omission: Omission | None

    @property
    def rows(self) -> Rows | None:
        return self.omission.rows if self.omission else None


class PassTracker(LiveResource):
    """Follows the forward passes of the models that share a session, and decides which rows their layers send.

    Inside a pass, a layer may be called with the leading dimensions that follow from the shapes of the pass's
    arguments: (batch, seq), (batch * seq,) or (batch,). Anything else, such as the tokens that a router sends to an
    expert, depends on data, and its size would tell the server. A layer called outside of any pass is called by the
    caller's own code, which decides what it sends.

    Gradient checkpointing of ``transformers`` recomputes its segments under the pass that they belong to. The state is
    kept per thread.
    """

    def __init__(self) -> None:
        self._local = threading.local()
        self._took_word = False

    def watch(self, model: Any, *, skip: bool | None = None, any_size: bool = False) -> None:
        """Follow the forward passes of ``model``, a ``PreTrainedModel``, and of its base model on its own.

        Args:
            model: its ``forward`` is wrapped. PEFT calls that directly, past all hooks.
            skip: whether hidden positions are left out: where it is proven (None), on the caller's word (True), never.
            any_size: accept leading dimensions of every kind, on the caller's word.
        """
        self._follow(model, skip, any_size)
        if model.base_model is not model:
            self._follow(model.base_model, skip, any_size)

    def admit(self, layer: str, leading: torch.Size) -> Rows | None:
        """Return which rows a layer called with ``leading`` dimensions sends; None for all.

        Raises:
            privtuner.errors.InputError: a layer of this size is not part of the running pass, or a gradient checkpoint
                recomputes without the pass that left rows out on the caller's word.
        """
        running = self._running
        if running is None:
            self._refuse_recomputation()
            return None
        if running.sizes is not None and leading not in running.sizes:
            raise InputError(
                f"layer '{layer}' is asked for tokens that the model chose by their values, and their number would "
                "tell the server; take another model, or build it with allow_data_dependent_requests=True"
            )
        return running.rows if running.rows is not None and leading == running.rows.shape else None

    @property
    def _running(self) -> _Pass | None:
        running: _Pass | None = getattr(self._local, "running", None)
        return running

    @contextmanager
    def _inside(self, running: _Pass) -> Iterator[None]:
        before = self._running
        self._local.running = running
        try:
            yield
        finally:
            self._local.running = before

    def _follow(self, model: Any, skip: bool | None, any_size: bool) -> None:
        forward = type(model).forward
        signature = inspect.signature(forward)

        @functools.wraps(forward)
        def followed(model: Any, *args: Any, **kwargs: Any) -> Any:
            if self._running is not None:
                return forward(model, *args, **kwargs)
            bound = signature.bind(model, *args, **kwargs)
            arguments = _by_name(signature, bound)
            left_out = omission(model, arguments, skip)
            if left_out is None:
                if skip is None and hidden_positions(arguments) is not None:
                    self._refuse_recomputation()
            elif left_out.by_word:
                self._took_word = True
            elif "use_cache" in signature.parameters:
                # A cache would hand out keys and values of hidden positions.
                bound.arguments["use_cache"] = False
            running = _Pass(None if any_size else _sizes(model.config, arguments), left_out)
            self._carry_checkpoints(model)
            with self._inside(running):
                output = forward(*bound.args, **bound.kwargs)
            return _withhold_logits(output) if left_out and left_out.withholds else output

        model.forward = types.MethodType(followed, model)

    def _carry_checkpoints(self, model: torch.nn.Module) -> None:
        """Make the gradient checkpoints of ``transformers`` in ``model`` recompute inside the pass they belong to."""
        module: Any
        for module in model.modules():
            if module.__dict__.get("gradient_checkpointing"):
                checkpoint = module._gradient_checkpointing_func
                if not isinstance(checkpoint, _Checkpoint):
                    module._gradient_checkpointing_func = _Checkpoint(checkpoint, self)

    def _refuse_recomputation(self) -> None:
        if self._took_word and torch._C._current_graph_task_id() != -1:
            raise InputError(
                "a gradient checkpoint recomputes without knowing which hidden positions its forward pass left out; "
                "use model.gradient_checkpointing_enable(), or build the model with skip_padding=False"
            )


class _Checkpoint(LiveResource):
    """A checkpointing function whose segments are recomputed inside the pass in which they were first computed."""

    def __init__(self, checkpoint: Callable[..., Any], tracker: PassTracker) -> None:
        self._checkpoint, self._tracker = checkpoint, tracker

    def __call__(self, segment: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        running = self._tracker._running
        if running is None:
            return self._checkpoint(segment, *args, **kwargs)

        def inside(*inputs: Any, **named: Any) -> Any:
            with self._tracker._inside(running):
                return segment(*inputs, **named)

        return self._checkpoint(inside, *args, **kwargs)


def _by_name(signature: inspect.Signature, bound: inspect.BoundArguments) -> dict[str, Any]:
    """Return the arguments of a call without ``self``, those of ``**kwargs`` among them."""
    arguments = dict(list(bound.arguments.items())[1:])
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            arguments.update(arguments.pop(parameter.name, {}))
    return arguments


def _sizes(config: Any, arguments: Mapping[str, Any]) -> frozenset[torch.Size]:
    """Return the leading dimensions that the shapes of ``arguments`` account for."""
    shapes = set(_token_shapes(arguments))
    kept = arguments.get("logits_to_keep")
    if kept is not None:
        for *batch, length in list(shapes):
            count = kept.numel() if isinstance(kept, torch.Tensor) else min(kept or length, length)
            shapes.add((*batch, count))
    sizes: set[torch.Size] = set()
    for *batch, length in shapes:
        rows = math.prod(batch)
        leading = ((*batch, length), tuple(batch), (rows, length), (rows * length,), (rows,))
        sizes.update(torch.Size(size) for size in leading)
    return frozenset(sizes) | constant_sizes(config, [length for *_, length in shapes])


def _token_shapes(value: Any) -> Iterator[tuple[int, ...]]:
    """Yield the shapes (batch, ..., seq) of the token numbers, masks and embedded tokens in ``value``."""
    if isinstance(value, torch.Tensor):
        shape = tuple(value.shape[:-1] if value.is_floating_point() else value.shape)
        if len(shape) > 1:
            yield shape
    elif isinstance(value, (Mapping, tuple, list)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _token_shapes(item)


def _withhold_logits(output: Any) -> Any:
    """Return a model's output with a stand-in for its logits."""
    if isinstance(output, tuple):
        loss, logits, *more = output
        return (loss, WithheldOutput.of(logits.shape, logits), *more)
    output.logits = WithheldOutput.of(output.logits.shape, output.logits)
    return output
