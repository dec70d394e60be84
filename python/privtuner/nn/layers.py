"""Frozen linear layers whose products a server computes on encrypted activations."""

from __future__ import annotations

from typing import Any

import torch

from privtuner import linear
from privtuner.errors import InputError, WeightWithheldError
from privtuner.nn.groups import EncryptedGroup
from privtuner.nn.session import Session
from privtuner.nn.traffic import TrafficMeter
from privtuner.nn.withheld import WithheldWeight, refuse_tracing, without_mark

__all__ = ["EncryptedLayer", "EncryptedLinear", "session_of", "traffic_of"]


class EncryptedLayer(torch.nn.Module):
    """Base of the encrypted layers of every kind.

    There is no weight parameter: ``parameters()`` and ``state_dict()`` hold the bias alone, which is frozen.
    ``weight`` answers for device, dtype and shape, and raises `privtuner.errors.WeightWithheldError` when its
    values are used. Copies made with `copy.deepcopy` use the same server; pickling is refused.

    Args:
        group: the prepared layer this one shares.
        member: which of the group's members this is.
        bias: (out_features,), copied, or None.
        dtype: dtype reported by ``weight``, that of the surrounding model.

    Raises:
        privtuner.errors.InputError: ``member`` is not in the group, or ``bias`` has the wrong shape.
    """

    in_features: int
    out_features: int
    bias: Any  # a frozen Parameter, or None

    def __init__(
        self,
        group: EncryptedGroup,
        member: int = 0,
        *,
        bias: torch.Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        torch.nn.Module.__init__(self)
        if not 0 <= member < len(group.out_features):
            raise InputError(
                f"group '{group.name}' has members 0 to {len(group.out_features) - 1}; there is no member {member}"
            )
        self.group = group
        self.member = member
        self.in_features = group.in_features
        self.out_features = group.out_features[member]
        # Follows .to(), so that the reported device and dtype stay those of the model.
        self.register_buffer("_like", torch.empty(0, dtype=dtype), persistent=False)
        if bias is None:
            self.register_parameter("bias", None)
        else:
            if tuple(bias.shape) != (self.out_features,):
                raise InputError(
                    f"layer '{group.name}': bias has shape {tuple(bias.shape)}; it must be ({self.out_features},)"
                )
            self.bias = torch.nn.Parameter(bias.detach().clone(), requires_grad=False)

    @property
    def _weight_shape(self) -> tuple[int, int]:
        return (self.out_features, self.in_features)

    @property
    def weight(self) -> torch.Tensor:
        """Device, dtype and shape of the weight; its values are with the server."""
        like: torch.Tensor = self._buffers["_like"]  # type: ignore[assignment]
        return WithheldWeight.of(self._weight_shape, like)

    def register_parameter(self, name: str, param: torch.nn.Parameter | None) -> None:
        """Register ``param``, unless it would replace the weight."""
        if name == "weight":
            raise WeightWithheldError(
                f"layer '{self.group.name}': its weight stays with the server and cannot be replaced"
            )
        super().register_parameter(name, param)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *arguments: Any) -> None:
        super()._load_from_state_dict(without_mark(state_dict, prefix), prefix, *arguments)

    def reset_parameters(self) -> None:
        """Refused: the weight is the server's."""
        raise WeightWithheldError(f"layer '{self.group.name}': its weight stays with the server and cannot be reset")

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return ``input @ W.T + bias``, the product computed by the server on encrypted rows.

        Args:
            input: (..., in_features), float32, bfloat16 or float16. Products are computed in float32.

        Returns:
            (..., out_features) in the dtype of ``input``.

        Raises:
            privtuner.errors.InputError: wrong dtype or shape, or a NaN or infinity; or the model is being traced.
            privtuner.errors.PrivtunerError: the transport failed, or the reply does not fit the request.
        """
        refuse_tracing()
        product = self.group.take(self.member, input)
        return product if self.bias is None else product + self.bias.to(product.dtype)

    def extra_repr(self) -> str:
        """Return what ``print(model)`` shows of this layer."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, group='{self.group.name}'"
        )


class EncryptedLinear(EncryptedLayer, torch.nn.Linear):  # type: ignore[override]
    """A frozen `torch.nn.Linear` without its weight; see `EncryptedLayer`.

    PEFT's LoRA takes it as a base layer. For one layer on its own::

        prepared = privtuner.linear.prepare(weight)                      # at the server
        session = Session(LocalTransport({"fc": prepared}))
        layer = EncryptedLinear.single("fc", prepared.spec, session, bias=bias)
    """

    @classmethod
    def single(
        cls,
        name: str,
        spec: linear.LayerSpec,
        session: Session,
        *,
        bias: torch.Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> EncryptedLinear:
        """Return a layer that shares its input with no other.

        Args:
            name: wire name of the prepared layer.
            spec: its description, of shape (out_features, in_features).
            session: what encrypts, and the way to the server.
            bias: (out_features,) or None.
            dtype: dtype that ``weight`` reports.

        Raises:
            privtuner.errors.InputError: ``bias`` has the wrong shape.
        """
        return cls(EncryptedGroup(name, spec, [spec.d_out], session), bias=bias, dtype=dtype)


def session_of(model: torch.nn.Module) -> Session:
    """Return what all layers of a model built from a bundle share, with or without adapters around it.

    Raises:
        privtuner.errors.InputError: ``model`` has no encrypted layer.
    """
    for module in model.modules():
        if isinstance(module, EncryptedLayer):
            return module.group.session
    raise InputError(f"this {type(model).__name__} has no encrypted layer; build it with nn.build")


def traffic_of(model: torch.nn.Module) -> TrafficMeter:
    """Return the counters of a model built from a bundle, with or without adapters around it.

    Raises:
        privtuner.errors.InputError: ``model`` has no encrypted layer.
    """
    return session_of(model).meter
