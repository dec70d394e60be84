"""Checks that a server's replies are products with one matrix, by secret combinations of outputs (Freivalds).

The owner draws a secret vector v over the outputs of a layer and asks the server once for ``p = W^T v``, which is what
the layer computes in the other direction. Since then every token x and its reply y must satisfy ``v . y = p . x`` up to
the noise of the encryption: a dot product a token instead of the product (Freivalds, "Probabilistic Machines Can Use
Less Running Time", IFIP 1977). v is encrypted like any token, and p never leaves the owner.

**Honest replies.** Let M be the integers that are applied, s and t the scales of their columns and rows, f and g their
numbers, ``c = v o t``, ``q = M^T c``, and ``y' = y / t``. With the terms of `privtuner.linear.Noise` (room r, deviation
d, rounding h, dropped b, added a; those of the probe's direction primed),

- a token of scaled length l has errors ``l / r (M (e + h) + b + a)`` in y', and so ``v . y - q . (s o x)`` is at most
  ``l / r (z d |q|_2 + h |q|_1 + b |c|_1 + z a |c|_2)``;
- p was a reply too, to the token v of scaled length |c|_2. Its errors, times s o x, are at most
  ``|c|_2 / r' ((z d' + h' sqrt(g)) |y'|_2 + (b' sqrt(f) + z a') l)``, for ``M (s o x)`` is y' without its error;
- float32 rounds y and p, by a part of them or the smallest subnormal number.

A sum of independent sub-Gaussian terms exceeds z times its parameter with probability 2 exp(-z^2 / 2) at most. There
are four: a token of an honest server fails one combination with probability below `REFUSAL`.

**Other replies.** Let y be off by D, and T be the sum of the bounds above. v o t is uniform in a box, so that ``v . D``
is within T of any given number with probability at most ``T / max |D / t|`` (the largest scale being 1; up to 2^-23 for
the grid that v is drawn from). All `COMBINATIONS` must hold, and are drawn independently. Whoever wants to pass with
more than a nearly right reply has to know v. Rows whose scale is below 2^-60 of the largest one, or 2^-120, add next to
nothing to a model and are left out.

It shows that all checked replies are products with the matrix that the probe was answered by, and nothing of where that
matrix comes from: see SECURITY.md.
"""

from __future__ import annotations

import math
import secrets
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.utils.dlpack

from privtuner.errors import InputError, IntegrityError
from privtuner.linear import Direction, LayerSpec, Noise
from privtuner.parties import LinearClient

__all__ = ["COMBINATIONS", "REFUSAL", "VERIFY_EVERY", "Verifier"]

VERIFY_EVERY = 4
"""By default one reply in so many is checked, for a few per cent of the owner's work."""

COMBINATIONS = 4
"""Independent vectors v for each layer and direction: what a reply's error must be orthogonal to."""

REFUSAL = 2.0**-64
"""Bound on the probability that a token of an honest reply fails one combination."""

LIFETIME = 256
"""Replies that are checked with the same vectors."""

_Z = math.sqrt(2 * math.log(2 * 4 / REFUSAL))  # four sums, two tails each
_ROUNDING = 2.0**-23  # twice the relative rounding of float32: the other half covers that of the check in float64
_TINY = float(np.finfo(np.float32).smallest_subnormal)
_TOKENS = 128  # that are checked at a time, so that they stay in the cache

Array = npt.NDArray[np.float64]
Ask = Callable[[str, LayerSpec, Any, Direction], Any]


class _Probe(NamedTuple):
    """What the owner knows of a layer in one direction. Tensors are float64, on the device of the batches.

    Attributes:
        v: (combinations, outputs).
        p: (combinations, inputs).
        columns: (inputs, 2), the square of s of the module's text, and 1.
        rows: (outputs,), the square of 1 / t, or 0 for rows that are left out.
        each: (combinations, 3), bound on a token's difference for each unit of l, of |x|_2 and of |y'|_2.
        always: (combinations, 1), bound on the rest.
    """

    v: torch.Tensor
    p: torch.Tensor
    columns: torch.Tensor
    rows: torch.Tensor
    each: torch.Tensor
    always: torch.Tensor


class Verifier:
    """Checks replies, each with probability ``1 / every``, and the first one of each layer and direction for certain.

    Which replies are checked is drawn from the operating system's randomness, so that the server cannot know. Safe to
    use from several threads.

    Args:
        client: what encrypted the requests.
        ask: computes a product at the server: of (layer, its description, the batch, direction).
        every: see above; 0 checks none.

    Raises:
        privtuner.errors.InputError: ``every`` is negative.
    """

    def __init__(self, client: LinearClient, ask: Ask, every: int = VERIFY_EVERY) -> None:
        if every < 0:
            raise InputError(f"verify_every is {every}; give 1 to check each reply, N for one in N, or 0 for none")
        self._client, self._ask, self._every = client, ask, every
        self._lock = threading.Lock()
        self._probes: dict[tuple[str, Direction], tuple[_Probe, int]] = {}
        self.checked = 0
        """Replies that were checked."""

    @torch.no_grad()
    def check(self, layer: str, spec: LayerSpec, x: Any, y: Any, direction: Direction) -> None:
        """Check the reply to a request, if it is its turn. Tokens whose outputs are beyond float32 are left out.

        Args:
            layer: wire name.
            spec: the layer's description.
            x: float32 (tokens, inputs), what was sent: a NumPy array, or a tensor on a device.
            y: float32 (tokens, outputs), what came back, with ``__dlpack__``.
            direction: of the product.

        Raises:
            IntegrityError: it is no product with the matrix that earlier replies are products with.
            PrivtunerError: the layer had to be probed, and that failed.
        """
        if self._every == 0:
            return
        with self._lock:
            probe, left = self._probes.get((layer, direction), (None, 0))
        if probe is not None and secrets.randbelow(self._every):
            return
        given, returned = torch.as_tensor(x), torch.utils.dlpack.from_dlpack(y)
        if probe is None or left == 0:
            probe, left = self._probe(layer, spec, direction, given.device), LIFETIME
        with self._lock:
            self._probes[layer, direction] = probe, left - 1
            self.checked += 1
        fits = [_compare(probe, *part) for part in zip(given.split(_TOKENS), returned.split(_TOKENS), strict=True)]
        if not bool(torch.cat(fits).all()):
            raise IntegrityError(
                f"layer '{layer}': the server's reply to a {direction} request is not the product with the weights "
                "that it answered by before. What was trained since cannot be trusted: go back to what was saved "
                "before, and ask who runs the server"
            )

    def _probe(self, layer: str, spec: LayerSpec, direction: Direction, device: torch.device) -> _Probe:
        v = _draw(spec, direction)
        other = _other(direction)
        answer = self._ask(layer, spec, torch.from_numpy(v).to(device) if self._client.on_device else v, other)
        p = torch.utils.dlpack.from_dlpack(answer).double().cpu().numpy()
        noises = self._client.noise(spec, direction), self._client.noise(spec, other)
        columns, rows = _scales(spec, direction)
        parts = (
            v.astype(np.float64),
            p,
            np.stack([columns**2, np.ones_like(columns)], axis=1),
            _inverse(rows) ** 2,
            *_bounds(spec, direction, v.astype(np.float64), p, noises),
        )
        return _Probe(*(torch.tensor(part, device=device) for part in parts))


def _compare(probe: _Probe, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return which of a few tokens fit all combinations, bool (tokens,)."""
    x, y = (part.to(torch.float64, copy=True) for part in (x, y))
    # This order is several times faster than the transposed one, for so few combinations.
    difference = (probe.v @ y.T - probe.p @ x.T).abs()
    sizes = torch.cat([x.square_() @ probe.columns, (y.square_() @ probe.rows)[:, None]], dim=1).sqrt_()
    return (difference <= probe.each @ sizes.T + probe.always).all(0) | ~sizes[:, 2].isfinite()


def _other(direction: Direction) -> Direction:
    return "backward" if direction == "forward" else "forward"


def _scales(spec: LayerSpec, direction: Direction) -> tuple[Array, Array]:
    """The scales s of the columns and t of the rows of what is applied."""
    ones = np.ones(spec.d_in)
    return (ones, spec.scale) if direction == "forward" else (spec.scale, ones)


def _inverse(rows: Array) -> Array:
    """Return 1 / t, or 0 for rows that are left out."""
    kept = rows >= max(rows.max() * 2.0**-60, 2.0**-120)
    return np.divide(1, rows, out=np.zeros_like(rows), where=kept)


def _draw(spec: LayerSpec, direction: Direction) -> npt.NDArray[np.float32]:
    """Return v (combinations, outputs): v o t is uniform in [-1, 1) times the largest of the scales t, or less."""
    columns, rows = _scales(spec, direction)
    words = np.frombuffer(secrets.token_bytes(4 * COMBINATIONS * len(rows)), "<i4").reshape(COMBINATIONS, -1)
    largest = float(columns.max() * rows.max()) * math.sqrt(len(rows)) * spec.norm(_other(direction))
    weights: Array = rows.max() * _inverse(rows) * min(1.0, 2.0**100 / max(largest, 1.0))  # so that p is in float32
    return (words * 2.0**-31 * weights).astype(np.float32)


def _bounds(
    spec: LayerSpec, direction: Direction, v: Array, p: Array, noises: tuple[Noise, Noise]
) -> tuple[Array, Array]:
    """``each`` and ``always`` of `_Probe`, by the module's text; ``noises`` of the direction and of the probe's."""
    inputs, outputs = spec.features(direction)
    columns, rows = _scales(spec, direction)
    norm, other_norm = spec.norm(direction), spec.norm(_other(direction))
    here, there = noises
    inverse = _inverse(rows)
    c1, c2 = np.abs(v * rows).sum(1), np.linalg.norm(v * rows, axis=1)
    unit = c2 / there.room
    # q from p, which is off by the probe's error and by rounding; never beyond Cauchy and Schwarz.
    with np.errstate(divide="ignore", over="ignore"):
        q = (
            np.where(columns > 0, (np.abs(p) + _TINY) / columns, 0)
            + (unit * _worst(there, outputs, other_norm))[:, None]
        )
    q = np.minimum(q, c2[:, None] * other_norm)
    q1, q2 = q.sum(1), np.linalg.norm(q, axis=1)
    each_size = unit * (_Z * there.deviation + there.rounding * math.sqrt(outputs)) + _ROUNDING * c2
    # |y'|_2 without its error, and with the rows that are left out.
    error = math.sqrt(outputs) * _worst(here, inputs, norm) / here.room
    hidden = math.sqrt(np.count_nonzero((rows > 0) & (inverse == 0))) * norm
    each_length = (
        (_Z * here.deviation * q2 + here.rounding * q1 + here.dropped * c1 + _Z * here.added * c2) / here.room
        + unit * (there.dropped * math.sqrt(inputs) + _Z * there.added)
        + _ROUNDING * q2
        + each_size * (error + hidden)
    )
    each = np.stack([each_length, np.full_like(c2, _TINY * math.sqrt(inputs)), each_size], axis=1)
    always = _TINY * (np.abs(v).sum(1) + each_size * np.linalg.norm(inverse))
    slack = 1 + 2.0**-20  # for rounding in these sums and in the scaling of tokens
    return each * slack, always[:, None] * slack


def _worst(noise: Noise, inputs: int, norm: float) -> float:
    """Bound on the error of an output whose row has a norm up to ``norm``, by Cauchy-Schwarz."""
    return (noise.largest + noise.rounding) * math.sqrt(inputs) * norm + noise.dropped + _Z * noise.added
