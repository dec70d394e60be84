"""Replies are checked by secret combinations: wrong ones are refused by the layer's name, honest ones never."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from backends import backend_of
from evaluators import NEEDS_OPENFHE
from linear_cases import DIRECTIONS, PRESETS, batch, features_in
from nn_cases import RecordingTransport
from privtuner import _core, linear, wire
from privtuner.errors import InputError, IntegrityError
from privtuner.nn import LocalTransport, Session, verification
from privtuner.nn.verification import COMBINATIONS, Verifier

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS = 40
SHAPES = [(48, 20), (20, 48)]

Lie = Callable[[linear.QuantisedWeight, bytes], bytes]


def prepared_layer(shape: tuple[int, int], preset: str, seed: int = 0) -> linear.QuantisedWeight:
    return linear.prepare(np.random.default_rng(seed).normal(size=shape), preset)


def with_weights(prepared: linear.QuantisedWeight, change: Callable[[np.ndarray], np.ndarray]) -> Lie:
    """A server that multiplies by other integers under the layer's name."""
    integers = change(prepared.quantised())
    spec = prepared.spec
    other = linear.QuantisedWeight(_core.QuantisedWeight(spec.preset, spec.id, integers, spec.scale))
    return lambda _, request: linear.apply(other, request)


def slightly_scaled(integers: np.ndarray) -> np.ndarray:
    """Two per cent less, where that is a whole number of steps."""
    return (integers - np.sign(integers) * (np.abs(integers) * 0.02).astype(integers.dtype)).astype(integers.dtype)


def one_weight(integers: np.ndarray) -> np.ndarray:
    changed = integers.copy()
    changed[3, 5] = -changed[3, 5] if abs(int(changed[3, 5])) > 20 else 100
    return changed


def with_flipped_bit(prepared: linear.QuantisedWeight, request: bytes) -> bytes:
    """The high bit of one output of one token, in the sealed reply of one block."""
    head, body = wire.open("reply", linear.apply(prepared, request))
    changed = bytearray(body)
    # The first row begins after 16 bytes: u16 [tokens] of high bits and u8 [tokens] of low ones, or u32 [tokens].
    high = 1 if _core.preset_info(prepared.spec.preset)["reply_bytes"] == 3 else 3
    changed[16 + high] ^= 0x40
    return wire.seal("reply", [bytes(changed)], **head_of(head))


def with_zeros(prepared: linear.QuantisedWeight, request: bytes) -> bytes:
    head, body = wire.open("reply", linear.apply(prepared, request))
    return wire.seal("reply", [bytes(body[:16]), bytes(len(body) - 16)], **head_of(head))


def head_of(head: wire.Head) -> dict[str, Any]:
    return {
        name: getattr(head, name) for name in ("direction", "parameters", "subject", "request", "tokens", "features")
    }


def ask(
    times: int, session: Session, prepared: linear.QuantisedWeight, x: np.ndarray, direction: linear.Direction
) -> None:
    for number in range(times):
        session.product("block.fc", prepared.spec, x + np.float32(number), direction)


class Replay:
    """Answers with the first reply of that size, under the name of the request."""

    def __init__(self) -> None:
        self.first: dict[Any, bytes] = {}

    def __call__(self, prepared: linear.QuantisedWeight, request: bytes) -> bytes:
        head, body = wire.open("reply", linear.apply(prepared, request))
        old = self.first.setdefault((head.direction, head.tokens), bytes(body))
        return wire.seal("reply", [old], **head_of(head))


class LyingTransport(LocalTransport):
    """Answers requests of many tokens by ``lie`` from the ``honest`` first ones on; those of a few always honestly."""

    def __init__(self, layers: dict[str, linear.QuantisedWeight], lie: Lie, honest: int = 0) -> None:
        super().__init__(layers)
        self.lie, self.honest = lie, honest

    def apply(self, layer: str, request: Any) -> Iterator[Any]:
        if wire.peek(request).tokens == COMBINATIONS:
            return super().apply(layer, request)
        self.honest -= 1
        if self.honest >= 0:
            return super().apply(layer, request)
        return iter([self.lie(self.layers[layer], bytes(request))])


@st.composite
def layers(draw: Any) -> tuple[linear.QuantisedWeight, np.random.Generator]:
    """A layer of any shape, with rows of very different sizes, some of them zero."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = draw(st.tuples(st.integers(1, 90), st.integers(1, 90)))
    spread = draw(st.sampled_from([0, 3, 30, 44]))
    weight = rng.normal(size=shape) * 10.0 ** rng.uniform(-spread, min(spread, 35), (shape[0], 1))
    weight *= rng.random((shape[0], 1)) < draw(st.sampled_from([1.0, 0.7]))
    return linear.prepare(weight, draw(st.sampled_from(PRESETS))), rng


@settings(max_examples=25)
@given(layers(), st.sampled_from(DIRECTIONS), st.integers(1, 5), st.sampled_from([0, 2, 20, 44]))
def test_honest_replies_are_never_refused(case, direction, tokens, spread):
    prepared, rng = case
    session = Session(LocalTransport({"fc": prepared}), verify_every=1, mask_cache_bytes=0)
    for _ in range(2):
        x = rng.normal(size=(tokens, features_in(prepared, direction))) * 10.0 ** rng.uniform(-spread, 0, (tokens, 1))
        x[rng.random(tokens) < 0.2] = 0
        session.product("fc", prepared.spec, x.astype(np.float32), direction)
    assert session.verifier.checked == 2


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", ["cpu", pytest.param("openfhe", marks=NEEDS_OPENFHE)])
def test_honest_replies_of_every_scheme_are_never_refused(name, direction):
    prepared = prepared_layer((70, 33), "linear-w8")
    client, server = backend_of(name).client(), backend_of(name).server()

    def answer(layer: str, spec: linear.LayerSpec, x: Any, towards: linear.Direction) -> Any:
        request, secret = client.encrypt(x, spec, towards)
        return client.decrypt(server.answer(prepared, request), secret)

    verifier = Verifier(client, answer, 1)
    for tokens in (1, 5, 300):
        x = batch(tokens, features_in(prepared, direction))
        y = answer("fc", prepared.spec, x, direction)
        verifier.check("fc", prepared.spec, x, y, direction)
    wrong = np.array(y)
    wrong[7, 11] += 0.1 * np.abs(wrong).max()
    with pytest.raises(IntegrityError, match="layer 'fc'"):
        verifier.check("fc", prepared.spec, x, wrong, direction)


def test_the_bound_is_what_is_derived_and_no_more():
    """The noise that was met lies between a twentieth of the bound and the bound."""
    prepared = prepared_layer((96, 64), "linear-w8")
    session = Session(LocalTransport({"fc": prepared}), verify_every=1)
    for direction in DIRECTIONS:
        x = batch(2000, features_in(prepared, direction))
        y = session.product("fc", prepared.spec, x, direction)
        probe, _ = session.verifier._probes["fc", direction]
        shrunk = [part / 20 for part in (probe.each, probe.always)]
        tight = probe._replace(each=shrunk[0], always=shrunk[1])
        parts = torch.from_numpy(x), torch.from_numpy(y)
        assert verification._compare(probe, *parts).all()
        assert not verification._compare(tight, *parts).all()


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(
    "lie",
    [
        lambda p: with_weights(p, np.negative),
        lambda p: with_weights(p, lambda w: np.roll(w, 1, axis=0)),
        lambda p: with_weights(p, lambda w: prepared_layer(w.shape, p.spec.preset, seed=5).quantised()),
        lambda p: with_weights(p, slightly_scaled),
        lambda p: with_weights(p, one_weight),
        lambda _: with_flipped_bit,
        lambda _: with_zeros,
        lambda _: Replay(),
    ],
    ids=["negated", "rows moved", "another layer", "slightly scaled", "one weight", "flipped bit", "zeros", "replay"],
)
@pytest.mark.parametrize("shape", SHAPES)
def test_wrong_replies_are_refused_by_the_layers_name(lie, preset, direction, shape):
    prepared = prepared_layer(shape, preset)
    session = Session(
        LyingTransport({"block.fc": prepared}, lie(prepared), honest=1), mask_cache_bytes=0, verify_every=1
    )
    x = batch(TOKENS, features_in(prepared, direction))
    ask(1, session, prepared, x, direction)
    with pytest.raises(IntegrityError, match=f"layer 'block.fc': the server's reply to a {direction} request"):
        ask(2, session, prepared, x, direction)  # the first reply that is replayed is honest itself


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_first_reply_is_checked_whatever_the_share(direction):
    prepared = prepared_layer((48, 20), "linear-w8")
    session = Session(LyingTransport({"fc": prepared}, with_zeros), verify_every=10**9, mask_cache_bytes=0)
    with pytest.raises(IntegrityError, match="layer 'fc'"):
        session.product("fc", prepared.spec, batch(TOKENS, features_in(prepared, direction)), direction)


def test_one_lie_in_two_replies_is_found_soon():
    prepared = prepared_layer((48, 20), "linear-w8")
    transport = LyingTransport({"block.fc": prepared}, with_zeros, honest=1)
    session = Session(transport, verify_every=2, mask_cache_bytes=0)
    x = batch(TOKENS, 20)
    with pytest.raises(IntegrityError):
        ask(80, session, prepared, x, "forward")  # chance of passing: 2^-79
    assert 0 > transport.honest >= -79


def test_replies_are_checked_in_their_share():
    prepared = prepared_layer((12, 9), "linear-w8")
    session = Session(LocalTransport({"fc": prepared}), verify_every=3)
    for _ in range(150):
        session.product("fc", prepared.spec, batch(1, 9), "forward")
    # 1 + binomial(149, 1/3) of mean 50.7 and deviation 5.75: eight of them.
    assert 4 < session.verifier.checked < 97


def test_without_checks_nothing_is_asked():
    prepared = prepared_layer((48, 20), "linear-w8")
    transport = RecordingTransport({"fc": prepared})
    session = Session(transport, verify_every=0)
    session.product("fc", prepared.spec, batch(3, 20), "forward")
    assert transport.seen == [("fc", "forward", 3)]
    assert session.verifier.checked == 0


def test_vectors_are_drawn_again_now_and_then(monkeypatch):
    monkeypatch.setattr(verification, "LIFETIME", 3)
    prepared = prepared_layer((48, 20), "linear-w8")
    transport = RecordingTransport({"fc": prepared})
    session = Session(transport, verify_every=1)
    drawn = []
    for _ in range(7):
        session.product("fc", prepared.spec, batch(2, 20), "forward")
        drawn.append(session.verifier._probes["fc", "forward"][0].v)
    probe = ("fc", "backward", COMBINATIONS)
    assert [seen == probe for seen in transport.seen] == [0, 1, 0, 0, 0, 1, 0, 0, 0, 1]
    assert len({v.numpy().tobytes() for v in drawn}) == 3
    assert drawn[0].abs().max() > 0.5
    assert len(torch.unique(drawn[0])) > 150, "no vector repeats another"


def test_a_server_that_always_answers_by_other_weights_is_not_noticed():
    """What the check does not show: where the one matrix of all replies comes from."""
    prepared = prepared_layer((48, 20), "linear-w8")
    lie = with_weights(prepared, np.negative)

    class Consistent(LocalTransport):
        def apply(self, layer: str, request: Any) -> Iterator[Any]:
            return iter([lie(self.layers[layer], bytes(request))])

    session = Session(Consistent({"fc": prepared}), verify_every=1)
    for direction in DIRECTIONS:
        session.product("fc", prepared.spec, batch(5, features_in(prepared, direction)), direction)


def test_scales_made_up_by_a_server_do_not_switch_the_check_off():
    """Rows whose scale is next to nothing take neither the bound nor the sums beyond float64."""
    prepared = prepared_layer((48, 20), "linear-w8")
    spec = prepared.spec
    scale = spec.scale.copy()
    scale[::2] = 1e-300
    made_up = linear.QuantisedWeight(_core.QuantisedWeight(spec.preset, spec.id, prepared.quantised(), scale))
    for direction in DIRECTIONS:
        x = batch(TOKENS, features_in(made_up, direction))
        session = Session(LocalTransport({"fc": made_up}), verify_every=1)
        session.product("fc", made_up.spec, x, direction)
        lying = LyingTransport({"fc": made_up}, with_weights(made_up, np.negative))
        with pytest.raises(IntegrityError):
            Session(lying, verify_every=1).product("fc", made_up.spec, x, direction)


def test_an_output_beyond_float32_is_left_to_what_reads_it():
    prepared = linear.prepare(np.full((6, 9), 3e38, np.float32))
    session = Session(LocalTransport({"fc": prepared}), verify_every=1)
    x = np.ones((2, 9), np.float32)
    x[1] = 1e-3
    y = session.product("fc", prepared.spec, x, "forward")
    assert np.isinf(y[0]).all()
    assert np.isfinite(y[1]).all()


def test_batches_are_left_as_they_are():
    prepared = prepared_layer((48, 20), "linear-w8")
    x = batch(5, 20).astype(np.float64)
    before = x.copy()
    Session(LocalTransport({"fc": prepared}), verify_every=1).product("fc", prepared.spec, x, "forward")
    assert (x == before).all()


def test_a_share_below_zero_is_refused():
    prepared = prepared_layer((6, 9), "linear-w8")
    with pytest.raises(InputError, match="verify_every is -1; give 1 to check each reply"):
        Session(LocalTransport({"fc": prepared}), verify_every=-1)


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1), st.sampled_from(PRESETS), st.sampled_from(DIRECTIONS))
def test_noise_of_the_linear_scheme_by_hand(seed, preset, direction):
    """Its parts make up the guaranteed error."""
    prepared = prepared_layer((7, 5), preset, seed)
    noise = linear.noise(prepared.spec, direction)
    assert (noise.largest, noise.rounding, noise.added) == (21, 0.5, 0)
    assert noise.deviation**2 == pytest.approx(10.5)
    inputs = prepared.spec.features(direction)[0]
    norm = prepared.spec.norm(direction)
    worst = 21.5 * np.sqrt(inputs) * norm + noise.dropped
    assert worst == pytest.approx(_core.noise_bound(preset, inputs, norm))
    q = linear.ring(preset)[1]
    assert noise.room == pytest.approx((q / 2 - worst) / norm)
