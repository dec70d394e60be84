"""Stand-ins for tensors whose values are not here: weights that stay with the server, outputs that were left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch

from privtuner.errors import InputError, PrivtunerError, WeightWithheldError

__all__ = ["WithheldOutput", "WithheldWeight", "mark_withheld", "refuse_tracing", "without_mark"]

_Kind = TypeVar("_Kind", bound="_Withheld")
_T: Any = torch.Tensor
# Attributes that code which wraps a layer reads of its weight, none of which needs a value.
_METADATA: frozenset[Any] = frozenset(
    getter.__get__
    for getter in (
        _T.device,
        _T.dtype,
        _T.shape,
        _T.ndim,
        _T.requires_grad,
        _T.is_meta,
        _T.is_cuda,
        _T.is_cpu,
        _T.is_leaf,
        _T.is_quantized,
        _T.is_sparse,
        _T.itemsize,
        _T.grad,
        _T.layout,
    )
) | {_T.size, _T.dim, _T.numel, _T.is_floating_point, _T.is_complex, _T.element_size}
# Methods that code which freezes a layer calls on its weight.
_FREEZING: frozenset[Any] = frozenset({_T.requires_grad.__set__, _T.requires_grad_})


class _Withheld(torch.Tensor):
    """Device, dtype and shape of a tensor without its values; any use of a value raises."""

    _error: ClassVar[type[PrivtunerError]]
    _reason: ClassVar[str]
    _kept_by: ClassVar[frozenset[Any]] = frozenset()

    @classmethod
    def of(cls: type[_Kind], shape: Sequence[int], like: torch.Tensor) -> _Kind:
        """Return a stand-in of ``shape`` with the dtype and device of ``like``, holding a single element."""
        one = torch.zeros(1, dtype=like.dtype, device=like.device)
        return one.expand(*shape).as_subclass(cls)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        if func in cls._kept_by:
            return args[0]
        raise cls._error(cls._reason)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"{type(self).__name__}(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self


class WithheldWeight(_Withheld):
    """A weight whose values stay with the server.

    Libraries such as PEFT look at a layer's ``weight`` to place and cast what they add to it. Adding an adapter works
    with this, and so does freezing the weight, which is frozen anyway; merging an adapter, or initialising it from the
    weight (DoRA, PiSSA, OLoRA, ...), is refused with the reason.
    """

    _error = WeightWithheldError
    _reason = (
        "the values of a frozen weight stay with the server, so it cannot be merged with an adapter, read, written "
        "or used to initialise one; keep the adapter separate (save_pretrained) and merge it where the clear "
        "model is"
    )

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func not in _FREEZING:
            return super().__torch_function__(func, types, args, kwargs)
        said = (*args[1:], *(kwargs or {}).values())
        if said and not any(said):
            return args[0]
        raise WeightWithheldError(
            "the weight is frozen and stays with the server, so it cannot be trained; give the layer an adapter, or "
            "split the model with keep naming it"
        )


class WithheldOutput(_Withheld):
    """Logits of a training pass that left out what ``attention_mask`` hides: its loss does not read them there.

    Trainers that use the loss alone never notice; those that cast outputs keep the stand-in.
    """

    _error = InputError
    _reason = (
        "these logits were not computed where attention_mask hides a position, which the loss of this training pass "
        "does not read; build the model with skip_padding=False to use them"
    )
    _kept_by = frozenset({_T.detach, _T.float, _T.to})


def mark_withheld(tensors: dict[str, torch.Tensor], path: str) -> None:
    """Put a ``weight`` of one zero for a module into ``tensors``: a clear model finds it of the wrong shape."""
    # Not an empty one: accelerate takes all empty tensors for one that is shared, and drops them.
    tensors[f"{path}.weight"] = torch.zeros(1)


def without_mark(state: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Return ``state`` without what `mark_withheld` put there."""
    mark = f"{prefix}weight"
    return {name: tensor for name, tensor in state.items() if name != mark or tensor.shape != (1,)}


def refuse_tracing() -> None:
    """Refuse to run under ``torch.jit.trace`` (and what exports by it), which would record a reply as a constant.

    Raises:
        privtuner.errors.InputError: it runs.
    """
    if torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
        raise InputError("a model with encrypted layers cannot be traced or exported: its products are the server's")
