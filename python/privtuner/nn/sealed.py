"""Whole feed-forward blocks that the server evaluates on ciphertexts: the sealed mode in PyTorch.

``split(model, seal="mlp")`` keeps weights and biases of every block at the server; in the model that the bundle builds,
`SealedMLP` stands in the place of the first linear layer and nothing in those of activation and second layer.
The activation is a polynomial there; `polynomial_activations` puts the same one into a clear model, to find out
what that costs before any encryption.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch.autograd.function import once_differentiable

from privtuner.ckks import Parameters, Polynomial, approximate
from privtuner.ckks.functions import FUNCTIONS
from privtuner.errors import InputError
from privtuner.nn.families import FEED_FORWARD
from privtuner.nn.groups import DTYPES, spread
from privtuner.nn.kinds import Kind, kind_of, matrix_of
from privtuner.nn.overflow import blank_overflow
from privtuner.nn.padding import Rows
from privtuner.nn.session import Session
from privtuner.nn.withheld import refuse_tracing, without_mark
from privtuner.sealed import blocks

__all__ = [
    "ACTIVATION_DEGREE",
    "ACTIVATION_DOMAIN",
    "INPUT_BOUND",
    "Seal",
    "SealedMLP",
    "SealedSpec",
    "fit_activation",
    "polynomial_activations",
    "prepare_blocks",
]

Seal = Literal["mlp"]
"""What can be sealed: the feed-forward blocks."""

ACTIVATION_DOMAIN = (-20.0, 28.0)
"""Where the activation is approximated. MiniLM-L6 has pre-activations from -17.2 to 24.7 on 2,000 texts of banking77:
one or two of 1536 hidden features in a layer leave (-12, 12), and cutting those off ruins the model."""

INPUT_BOUND = 64.0
"""Largest absolute input: MiniLM-L6's layer norms give up to 30.3 on the same texts."""

ACTIVATION_DEGREE = 63
"""The largest degree of six levels, hence of the ring 2^14: GELU to 0.0019 on the default domain."""

_ACTIVATIONS = {module: name for name, row in FUNCTIONS.items() for module in row.modules}


@dataclass(frozen=True)
class SealedSpec:
    """One sealed block of the server and the modules it stands for.

    Attributes:
        kind: the kind of both linear layers, as in `privtuner.nn.GroupSpec`.
        first, activation, second: their module names.
        public: what the data owner must know of the block.
    """

    kind: Kind
    first: str
    activation: str
    second: str
    public: blocks.SealedPublic


def find_blocks(model: torch.nn.Module) -> dict[str, tuple[str, str, str]]:
    """Return the feed-forward blocks of ``model``: name of the first layer -> names of first, activation, second."""
    modules = dict(model.named_modules())
    found = {}
    for parent in modules:
        for rule in FEED_FORWARD:
            first, activation, second = names = tuple(f"{parent}.{leaf}" if parent else leaf for leaf in rule)
            if not all(name in modules for name in names):
                continue
            kind = kind_of(modules[first])
            if kind is None or kind != kind_of(modules[second]):
                continue
            if matrix_of(modules[first]).shape[0] == matrix_of(modules[second]).shape[1]:
                found[first] = (first, activation, second)
    return found


def fit_activation(module: torch.nn.Module, domain: tuple[float, float], degree: int) -> Polynomial:
    """Return the polynomial in place of an activation module.

    Raises:
        privtuner.errors.InputError: the function of ``module`` is not known, or it cannot be fitted.
    """
    kind = type(module).__name__
    if kind not in _ACTIVATIONS:
        raise InputError(f"no polynomial is known for the activation {kind}; known: {', '.join(sorted(_ACTIVATIONS))}")
    if kind == "GELU" and getattr(module, "approximate", "none") == "tanh":
        return approximate("gelu_tanh", domain, degree)
    return approximate(_ACTIVATIONS[kind], domain, degree)


def prepare_blocks(
    model: torch.nn.Module,
    seal: str | None,
    *,
    domain: tuple[float, float],
    degree: int,
    input_bound: float,
    parameters: Parameters | None,
    begin: Callable[[str, tuple[torch.nn.Module, torch.nn.Module]], None],
) -> dict[tuple[str, str, str], tuple[blocks.SealedMLP, Kind]]:
    """Return the blocks of ``model`` to seal, ready to serve, by their modules' names; none when ``seal`` is None.

    ``begin`` is called before each with the name of its first layer and both layers.

    Raises:
        privtuner.errors.InputError: unknown ``seal``, no block found, an activation without polynomial, weights that
            are not finite, or parameters too small.
    """
    if seal is None:
        return {}
    if seal != "mlp":
        raise InputError(f"unknown seal {seal!r}; choose 'mlp' or None")
    found = find_blocks(model)
    if not found:
        raise InputError(
            f"no feed-forward block of a known form was found in this {type(model).__name__}; those of "
            f"{', '.join(FEED_FORWARD.values())} can be sealed. Split without seal"
        )
    ready = {}
    for names in found.values():
        first, activation, second = (model.get_submodule(name) for name in names)
        begin(names[0], (first, second))
        try:
            block = blocks.SealedMLP(
                *_affine(first),
                *_affine(second),
                fit_activation(activation, domain, degree),
                parameters=parameters,
                input_bound=input_bound,
            )
        except InputError as error:
            raise InputError(f"block '{names[0]}': {error}") from error
        ready[names] = block, kind_of(first) or "linear"
    return ready


class SealedMLP(torch.nn.Module):
    """A frozen feed-forward block that the server evaluates on encrypted rows; stands for its first linear layer.

    Has no parameters, and in ``state_dict()`` a ``weight`` of one zero alone, as encrypted layers have. Gradients flow
    through the server, which evaluates the derivative of its polynomial; the input is encrypted anew for that. Copies
    made with `copy.deepcopy` use the same server; pickling is refused.

    Args:
        name: wire name of the block.
        public: its public part.
        session: transport and counters.
    """

    def __init__(self, name: str, public: blocks.SealedPublic, session: Session) -> None:
        super().__init__()
        self.name, self.public, self.session = name, public, session
        self.in_features, self.out_features = public.d_in, public.d_out

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return ``W2 act(W1 input + b1) + b2``.

        Args:
            input: (..., in_features), float32, bfloat16 or float16.

        Returns:
            (..., out_features) in the dtype of ``input``; zeros for rows that are left out.

        Raises:
            privtuner.errors.InputError: wrong dtype or shape, a NaN or infinity, values above the input bound, or a
                number of tokens that does not follow from the shapes of the model's inputs.
            privtuner.errors.PrivtunerError: the transport failed, the reply does not fit the request, or it is out of
                bounds because an input left the activation's domain.
        """
        if input.dtype not in DTYPES:
            raise InputError(f"block '{self.name}': input has dtype {input.dtype}; cast it to float32")
        if input.ndim == 0 or input.shape[-1] != self.in_features:
            raise InputError(
                f"block '{self.name}': input has shape {tuple(input.shape)}; its last dimension must be "
                f"{self.in_features}"
            )
        refuse_tracing()
        rows = self.session.passes.admit(self.name, input.shape[:-1])
        y: torch.Tensor = _SealedProduct.apply(input, self, rows)  # type: ignore[no-untyped-call]
        return y

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *arguments: Any) -> None:
        super()._load_from_state_dict(without_mark(state_dict, prefix), prefix, *arguments)

    def extra_repr(self) -> str:
        """Return what ``print(model)`` shows of this block."""
        return f"in_features={self.in_features}, out_features={self.out_features}, block='{self.name}'"


class _SealedProduct(torch.autograd.Function):
    """A sealed block as one node of PyTorch's graph."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, block: SealedMLP, rows: Rows | None) -> torch.Tensor:
        ctx.block, ctx.rows = block, rows
        ctx.save_for_backward(x)
        y = block.session.sealed(block.name, block.public, _flatten(x, rows))
        return spread(torch.from_numpy(y), rows, x.shape[:-1], x.dtype, x.device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (x,) = ctx.saved_tensors
        block, rows = ctx.block, ctx.rows
        overflowed = rows is not None and rows.check_hidden(block.name, grad)
        g = _flatten(grad, rows)
        lost = blank_overflow(torch.from_numpy(g))
        gx = block.session.sealed(block.name, block.public, _flatten(x, rows), g)
        gx[lost.numpy()] = np.nan
        gradient = spread(torch.from_numpy(gx), rows, x.shape[:-1], x.dtype, x.device)
        return gradient.fill_(torch.nan) if overflowed else gradient, None, None


def polynomial_activations(
    model: torch.nn.Module,
    activation: Polynomial | None = None,
    *,
    domain: tuple[float, float] = ACTIVATION_DOMAIN,
    degree: int = ACTIVATION_DEGREE,
) -> torch.nn.Module:
    """Replace the activations of a clear model's feed-forward blocks by polynomials, in place.

    The model then computes what a sealed one does, but for rounding and noise: what sealing costs in accuracy.

    Args:
        model: a model of ``transformers`` in the clear.
        activation: the polynomial; fitted to the module's own function when None.
        domain: the domain of the fit.
        degree: the degree of the fit.

    Returns:
        ``model``.

    Raises:
        privtuner.errors.InputError: it has no block of a known form, or an activation without polynomial.
    """
    found = find_blocks(model)
    if not found:
        raise InputError(f"no feed-forward block of a known form was found in this {type(model).__name__}")
    for _, name, _ in found.values():
        polynomial = activation or fit_activation(model.get_submodule(name), domain, degree)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, _PolynomialActivation(polynomial))
    return model


class _PolynomialActivation(torch.nn.Module):
    def __init__(self, polynomial: Polynomial) -> None:
        super().__init__()
        self.polynomial, self.slope = polynomial, polynomial.derivative()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = _Evaluation.apply(input, self.polynomial, self.slope)  # type: ignore[no-untyped-call]
        return y

    def extra_repr(self) -> str:
        return repr(self.polynomial)


class _Evaluation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, polynomial: Polynomial, slope: Polynomial) -> torch.Tensor:
        ctx.slope = slope
        ctx.save_for_backward(x)
        return _evaluate(polynomial, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (x,) = ctx.saved_tensors
        return _evaluate(ctx.slope, x) * grad, None, None


def _evaluate(polynomial: Polynomial, x: torch.Tensor) -> torch.Tensor:
    """Evaluate in double precision, a piece at a time that stays in the caches."""
    values = x.detach().reshape(-1).to(torch.float64).cpu().split(1 << 14)
    pieces = [torch.from_numpy(polynomial(piece.numpy())) for piece in values]
    return torch.cat(pieces).reshape(x.shape).to(x) if pieces else torch.zeros_like(x)


def _flatten(x: torch.Tensor, rows: Rows | None) -> Any:
    """Return the tokens of ``x``, or those of ``rows``, as a float64 array (tokens, features)."""
    flat = x.detach().reshape(-1, x.shape[-1])
    return _double(flat if rows is None else rows.select(flat))


def _affine(layer: torch.nn.Module) -> tuple[Any, Any]:
    bias: torch.Tensor | None = layer.bias  # type: ignore[assignment]
    return _double(matrix_of(layer)), _double(bias)


def _double(tensor: torch.Tensor | None) -> Any:
    return None if tensor is None else tensor.detach().to("cpu", torch.float64).numpy()
