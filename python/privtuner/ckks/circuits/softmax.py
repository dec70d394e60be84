"""Softmax of scores by diagonals, under an encrypted mask, and its gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from privtuner.ckks.circuits.common import (
    REFRESH_LEVELS,
    SLACK,
    check_positive,
    heads_of,
    polynomial_depth,
    raised,
    renewed,
    with_levels,
)
from privtuner.ckks.circuits.functions import exponential_start, reciprocal, reciprocal_depth, reciprocal_error
from privtuner.ckks.polynomial import Domain, Polynomial
from privtuner.ckks.protocol import EvaluatorProtocol, Tensor
from privtuner.errors import InputError

_CONDITION = 2.0**14  # largest ratio of the ends of the first sums: what the noise in a sum is multiplied by
_ROUGH = 2.0**-8  # accuracy of divisions that are followed by another
_LARGEST = 2.0**9  # of an exponential: beyond it the room for a refresh gets scarce

Stage = Callable[[str, Tensor], Tensor]
"""Called with a name and a tensor of many features wherever one may be refreshed; returns it, refreshed or not."""


@dataclass(frozen=True)
class SquaringSoftmax:
    """Softmax by normalising and squaring: polynomials and domains for `forward`. Public constants.

    No maximum can be taken on ciphertexts. Scores x with |x| <= bound are divided by ``2**squarings``, the softmax of
    these is computed as exponentials over their sum, and then it is squared and normalised again, ``squarings`` times:
    Cho, Hanrot, Kim, Park and Stehle, "Fast and Accurate Homomorphic Softmax Evaluation", CCS 2024. Sums of squares of
    probabilities of n keys lie in [1 / n, 1]. What a row's division is off by, the next one removes.

    Attributes:
        period: tokens of a sequence, padding included.
        bound: of the scores.
        unit: the scores are given as multiples of it. With ``unit = bound`` they are in [-1, 1] and the exponential
            takes the polynomial's depth; a bound of more than a unit or two takes a level more. It belongs into the
            weights that make the queries.
        exponential: ``exp(x / 2**squarings)`` of x / unit, with the least relative error.
        domains: what the rows' sums are in: those of exponentials, then after each squaring those of the squares of
            probabilities.
        inverses: degree and Goldschmidt steps of the reciprocal of each sum.
        error: largest absolute error of a probability, in exact arithmetic.
        noise: what an operation or a refresh adds to the error of a value at the most; see `noise_error`.
    """

    period: int
    bound: float
    unit: float
    exponential: Polynomial
    domains: tuple[Domain, ...]
    inverses: tuple[tuple[int, int], ...]
    error: float
    noise: float

    @property
    def squarings(self) -> int:
        """Times the probabilities are squared and normalised again."""
        return len(self.domains) - 1

    @property
    def depth(self) -> int:
        """Levels of `forward` if nothing wide is refreshed: the exponential, a division, and two a squaring."""
        return polynomial_depth(self.exponential) + 1 + 2 * self.squarings

    def noise_error(self, turn: int, error: float) -> float:
        """What the shares after a turn are off by at the most, to first order, for scores / unit off by ``error``.

        After i turns the shares are ``y**(2**i)`` over their row's sum, y the exponentials. Relative errors r of y
        change the share s_j by ``2**i s_j (r_j - sum s r)``, at most ``2**(i + 1)`` times the largest ``s r``; what all
        of a row is off by cancels. With u for `noise`, E for the largest exponential and T for the period, ``s r`` is
        at most E u for the exponentials and sqrt(T) E u for their factors, which are 1 / (sqrt(T) E) or more. The
        largest of a row's shares is 1 / T or more, so the division and the squares of a later turn add sqrt(T) u and
        T u, for half of the factor ``2**(i + 1)`` each time. By bounds alone a prediction grows 2 T times a turn.
        """
        largest, root = math.exp(self.bound / 2**self.squarings), math.sqrt(self.period)
        relative = self.unit / 2**self.squarings * error
        absolute = (largest * (1 + root) + 2 * root + self.period) * self.noise
        return math.ldexp(relative + absolute, turn + 1) * self._gain(turn)

    @classmethod
    def choose(
        cls,
        period: int,
        bound: float,
        *,
        unit: float = 1.0,
        accuracy: float = 1e-2,
        squarings: int | None = None,
        first: Domain | None = None,
        squares: Sequence[Domain] | None = None,
        noise: float = 2.0**-17,
    ) -> SquaringSoftmax:
        """Choose the plan of fewest levels, and among equals the one of fewest squarings.

        What sums are measured to be in may be given for a number of squarings, that of a plan chosen before without.

        Args:
            period: tokens of a sequence, 1 to 4096.
            bound: positive, of the scores.
            unit: positive; the scores come divided by it.
            accuracy: largest absolute error of a probability, 1e-9 to 0.1.
            squarings: 0 to 8; default whatever is best.
            first: positive, what ``sum exp(x / 2**squarings)`` of a row's keys is in; default what it may be.
            squares: positive, what the sums of squares of a row's probabilities are in before each squaring; default
                (1 / period, 1) for each.
            noise: positive, of one operation; the default holds for scales of 2^40 and N = 2^15, refreshes included.

        Raises:
            InputError: an argument out of range, or no plan that is accurate enough.
        """
        if not 1 <= period <= 4096:
            raise InputError(f"period = {period}: must be between 1 and 4096")
        for name, value in (("bound", bound), ("unit", unit), ("noise", noise)):
            if not 0 < value < math.inf:
                raise InputError(f"{name} = {value}: must be positive and finite")
        if not 1e-9 <= accuracy <= 0.1:
            raise InputError(f"accuracy = {accuracy}: must be between 1e-9 and 0.1")
        if squarings is not None and not 0 <= squarings <= 8:
            raise InputError(f"squarings = {squarings}: must be between 0 and 8")
        if squarings is None and (first is not None or squares is not None):
            raise InputError("measured sums are those of a number of squarings: give it too")
        if squares is not None and len(squares) != squarings:
            raise InputError(f"squares has {len(squares)} domains: expected {squarings}, one a squaring")
        plans = []
        for count in range(9) if squarings is None else (squarings,):
            narrow = min(bound / 2**count, 99.0)
            sums = (math.exp(-narrow), period * math.exp(narrow)) if first is None else check_positive(first)
            rows = [(1 / period, 1.0)] * count if squares is None else [check_positive(d) for d in squares]
            plan = _plan(int(period), float(bound), float(unit), float(accuracy), (sums, *rows), float(noise))
            if plan is not None:
                plans.append(plan)
        if not plans:
            raise InputError(f"bound = {bound} with accuracy = {accuracy}: no plan; scale the scores down")
        return min(plans, key=lambda plan: (plan.depth, plan.squarings))

    def forward(
        self,
        evaluator: EvaluatorProtocol[Tensor],
        scores: Tensor,
        pairs: Tensor,
        mask: Tensor,
        heads: int = 1,
        stage: Stage[Tensor] | None = None,
    ) -> Tensor:
        """Probabilities of every query's keys; 0 where ``pairs`` is, and in all of a row that ``mask`` hides.

        The reciprocals are of ``heads`` ciphertexts, deep, and refreshed whenever levels run out; the first division
        and the mask are one product, of the exponentials with ``pairs`` over the sum, so that the wide tensors take
        `depth` levels in all, one between neighbouring stages:

        ========================  =======================================================================
        ``softmax.exp``           exponentials, the polynomial's depth after the scores; level 3 or above
        ``softmax.divide0``       their share in their row's sum, one level later
        ``softmax.square<i>``     the squares, one level later; level 2 or above
        ``softmax.divide<i>``     normalised, one level later; the last one is the result
        ========================  =======================================================================

        Shares that are yet to be squared are kept times sqrt(period): what is of noise in their sums is less.

        Products: the exponential's, ``heads (2 period + 1)`` for the first division, ``2 heads * period`` a squaring.

        Args:
            evaluator: computes, with refreshes.
            scores: (slots, heads * period) by diagonals, over `unit`; within the bound in every slot.
            pairs: (slots, period), as of `pair_mask`; one level or more above the exponentials' saves one of theirs.
            mask: (slots, 1), 1 where a token is, else 0; level 3 or above.
            heads: how many.
            stage: called at each of the stages; default none is refreshed.

        Raises:
            InputError: shapes that do not fit.
            CkksError: not enough levels, or no refreshes.
        """
        slots, period = evaluator.slots, self.period
        for name, x, features in (("scores", scores, heads * period), ("pairs", pairs, period), ("mask", mask, 1)):
            if x.shape != (slots, features):
                raise InputError(f"{name} has shape {x.shape}: expected {(slots, features)}")
        at, off = stage or _keep, scores.budget().error
        y = evaluator.polynomial(evaluator.assume(scores, self.bound / self.unit), self.exponential)
        y = at("softmax.exp", evaluator.assume(y, (1 + SLACK) * self.exponential.bound))
        parts = [evaluator.select(y, some) for some in heads_of(y, heads)]
        sums = evaluator.concatenate([evaluator.dot(part, pairs) for part in parts])
        inverse = raised(evaluator, self._inverse(evaluator, sums, mask, 0), y.level + 1)
        if inverse.level > y.level + 1:  # the products with it need no more levels than the exponentials have
            inverse = evaluator.multiply(evaluator.drop_level(inverse, y.level + 2), 1.0)
        shares = [evaluator.multiply(pairs, evaluator.select(inverse, slice(h, h + 1))) for h in range(heads)]
        y = at("softmax.divide0", self._share(evaluator, evaluator.multiply(y, evaluator.concatenate(shares)), 0, off))
        for turn in range(1, self.squarings + 1):
            y = at(f"softmax.square{turn}", evaluator.square(y))
            parts = [evaluator.select(y, some) for some in heads_of(y, heads)]
            sums = evaluator.concatenate([evaluator.sum_features(part) for part in parts])
            inverse = raised(evaluator, self._inverse(evaluator, sums, mask, turn), y.level)
            shares = [
                evaluator.multiply(part, evaluator.select(inverse, slice(h, h + 1))) for h, part in enumerate(parts)
            ]
            y = at(f"softmax.divide{turn}", self._share(evaluator, evaluator.concatenate(shares), turn, off))
        return y

    def _gain(self, turn: int) -> float:
        """What shares are kept times, after the division of a turn."""
        return 1.0 if turn == self.squarings else math.sqrt(self.period)

    def _share(self, evaluator: EvaluatorProtocol[Tensor], y: Tensor, turn: int, off: float) -> Tensor:
        return evaluator.assume(y, (1 + max(SLACK, self.error)) * self._gain(turn), self.noise_error(turn, off))

    def _inverse(self, evaluator: EvaluatorProtocol[Tensor], sums: Tensor, mask: Tensor, turn: int) -> Tensor:
        """The gain over each row's sum, and something moderate in rows that the mask hides."""
        low, high = self.domains[turn]
        before = self._gain(turn - 1) ** 2 if turn else 1.0
        low, high = low * before * (1 - SLACK), high * before * (1 + SLACK)
        domain = (low / high, 1.0)
        filling = math.sqrt(domain[0])
        sums = raised(evaluator, evaluator.assume(sums, high), REFRESH_LEVELS)
        mask = with_levels(evaluator, mask, 1)
        filled = evaluator.linear_combination([sums, mask], [1 / high, -filling], filling)
        degree, steps = self.inverses[turn]
        return reciprocal(evaluator, filled, domain, degree, steps, self._gain(turn) / high, narrow=True)


@lru_cache(maxsize=256)
def _plan(
    period: int, bound: float, unit: float, accuracy: float, domains: tuple[Domain, ...], noise: float
) -> SquaringSoftmax | None:
    """The plan for these domains with the exponential of fewest levels; None if none is accurate enough."""
    squarings = len(domains) - 1
    narrow = bound / 2**squarings
    if domains[0][1] > _CONDITION * domains[0][0] or narrow > math.log(_LARGEST):
        return None
    for degree in (3, 7, 15, 31):
        start, relative = exponential_start(-narrow, narrow, 0.0, 0, degree)
        # The ratio of two probabilities is off by up to r^2, so a probability by (r - 1) / (r + 1) at most.
        ratio = 2**squarings * (math.log1p(relative) - math.log1p(-relative)) if relative < 1 else math.inf
        error = math.tanh(ratio / 4)
        if error <= 0.9 * accuracy:
            break
    else:
        return None
    wider = [(low * (1 - SLACK), high * (1 + SLACK)) for low, high in domains]
    inverses = [_fewest_products(d, _ROUGH) for d in wider[:-1]] + [_fewest_products(wider[-1], accuracy / 10)]
    error += reciprocal_error(wider[-1], *inverses[-1])
    exponential = replace(start, domain=(-bound / unit, bound / unit))
    return SquaringSoftmax(period, bound, unit, exponential, domains, tuple(inverses), error, noise)


def _fewest_products(domain: Domain, accuracy: float) -> tuple[int, int]:
    """Degree, at most 63, and steps of the reciprocal of fewest products, about 2 sqrt(degree + 1) and 2 a step."""
    choices = []
    for bits in range(1, 7):
        for steps in range(12):
            degree = 2**bits - 1
            if reciprocal_error(domain, degree, steps) <= accuracy:
                products = 2 * math.sqrt(degree + 1) + 2 * steps
                choices.append((products, reciprocal_depth(degree, steps), degree, steps))
                break
    _, _, degree, steps = min(choices)
    return degree, steps


def softmax_backward(evaluator: EvaluatorProtocol[Tensor], p: Tensor, dp: Tensor, heads: int = 1) -> Tensor:
    """Gradient of the scores from that of the probabilities: ``p (dp - sum p dp)``, the sum over a row's keys.

    Of the scores themselves, not of multiples of a unit. The sums are refreshed, so that one level is taken in all;
    ``heads * (period + 1)`` products are.

    Args:
        evaluator: computes, with refreshes.
        p: probabilities (slots, heads * period) by diagonals.
        dp: their gradient, the same shape; p and dp at level 3 or above.
        heads: how many.

    Returns:
        Of the shape of p, one level below the lower of the two; 0 where p is.

    Raises:
        InputError: shapes that do not fit.
        CkksError: not enough levels, or no refreshes.
    """
    if p.shape != dp.shape:
        raise InputError(f"p has shape {p.shape}, dp {dp.shape}: they must agree")
    spans = heads_of(p, heads)
    pairs = [(evaluator.select(p, some), evaluator.select(dp, some)) for some in spans]
    means = evaluator.concatenate([evaluator.dot(x, y) for x, y in pairs])
    # Probabilities sum to 1 or, in hidden rows, to 0.
    means = renewed(evaluator, evaluator.assume(means, (1 + SLACK) * dp.bound))
    centred = [evaluator.subtract(y, evaluator.select(means, slice(h, h + 1))) for h, (_, y) in enumerate(pairs)]
    return evaluator.multiply(p, evaluator.concatenate(centred))


def _keep(_name: str, x: Tensor) -> Tensor:
    return x
