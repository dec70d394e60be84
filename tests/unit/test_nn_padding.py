"""Padding is left out of requests, and no real token notices."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nn_cases import CountingTransport, clear_twin, probing, tiny_bert, tiny_gpt2, tokens
from privtuner.nn import split, traffic_of

MASKS = {
    "right": [[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0]],
    "left": [[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]],
    "none": [[1] * 6] * 3,
}


@pytest.mark.parametrize("kind", list(MASKS))
@pytest.mark.parametrize("make", [tiny_bert, tiny_gpt2])
def test_real_tokens_keep_their_values_and_padding_is_not_sent(make: object, kind: str) -> None:
    parts = split(make())  # type: ignore[operator]
    mask = torch.tensor(MASKS[kind])
    ids = tokens(3, 6)
    transport = CountingTransport(parts.server)
    model = parts.bundle.build(transport, task="feature-extraction")
    twin = clear_twin(model, parts)
    with torch.no_grad():
        got = model(ids, attention_mask=mask).last_hidden_state
    assert torch.isfinite(got).all()
    real = mask.bool()
    direction = torch.randn(32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    with probing(twin, parts) as probe:
        want = (twin(ids, attention_mask=mask).last_hidden_state[real] @ direction).sum()
        bound = probe.bound(want)
    assert abs((got[real].double() @ direction).sum().item() - want.item()) <= bound
    counts = traffic_of(model).snapshot()
    whole_sequences = [t for (layer, _), t in counts.items() if layer != "pooler.dense"]
    assert {count.tokens for count in whole_sequences} == {int(mask.sum())}


def test_switched_off_every_token_is_sent() -> None:
    parts = split(tiny_bert())
    model = parts.bundle.build(CountingTransport(parts.server), num_labels=2, skip_padding=False)
    model(tokens(3, 6), attention_mask=torch.tensor(MASKS["right"]))
    counts = traffic_of(model).snapshot()
    assert counts["encoder.layer.0.output.dense", "forward"].tokens == 18


def test_gradients_of_padding_are_zero_and_those_of_tokens_exact() -> None:
    parts = split(tiny_bert())
    mask = torch.tensor(MASKS["right"])
    embedded = torch.randn(3, 6, 32, generator=torch.Generator().manual_seed(1))
    grads = []
    for skip in (True, False):
        model = parts.bundle.build(CountingTransport(parts.server), task="feature-extraction", skip_padding=skip)
        x = embedded.clone().requires_grad_()
        model(inputs_embeds=x, attention_mask=mask).pooler_output.square().sum().backward()
        assert x.grad is not None
        grads.append(x.grad)
        backward = [t.tokens for (_, way), t in traffic_of(model).snapshot().items() if way == "backward"]
        assert set(backward) == ({3, 10} if skip else {3, 18})
    assert torch.equal(grads[0][mask == 0], torch.zeros(8, 32))
    assert torch.equal(grads[1][mask == 0], torch.zeros(8, 32)), "in the clear they vanish as well"
    twin = clear_twin(model, parts)
    with probing(twin, parts) as probe:
        x64 = embedded.double().requires_grad_()
        loss = probe.step(twin(inputs_embeds=x64, attention_mask=mask).pooler_output.square().sum())
        (want,) = torch.autograd.grad(loss, x64, create_graph=True)
        along = torch.randn(3, 6, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        along *= mask[:, :, None]
        bound = probe.bound((want * along).sum())
    for grad in grads:
        assert abs(((grad.double() - want.detach()) * along).sum().item()) <= bound


def test_mask_as_positional_argument_and_of_other_kinds() -> None:
    parts = split(tiny_bert())
    model = parts.bundle.build(CountingTransport(parts.server), task="feature-extraction")
    meter = traffic_of(model)
    layer = "encoder.layer.0.output.dense"
    mask = torch.tensor(MASKS["right"])
    ids = tokens(3, 6)
    masks: list[tuple[torch.Tensor | None, int]] = [(mask, 10), (mask.bool(), 10), (mask.float(), 10), (None, 18)]
    for given, sent in masks:
        meter.reset()
        model(ids, given)
        assert meter.snapshot()[layer, "forward"].tokens == sent
    meter.reset()
    four = torch.zeros(3, 1, 6, 6).masked_fill(mask[:, None, None, :] == 0, -1e9)
    model(ids, attention_mask=four)
    assert meter.snapshot()[layer, "forward"].tokens == 18


def test_state_ends_with_the_forward_pass() -> None:
    parts = split(tiny_bert())
    model = parts.bundle.build(CountingTransport(parts.server), task="feature-extraction")
    padding = model.encoder.layer[0].output.dense.group.session.padding
    model(tokens(3, 6), attention_mask=torch.tensor(MASKS["right"]))
    assert padding.rows(torch.Size([3, 6])) is None
    with pytest.raises(IndexError):
        model(tokens(3, 6) + 1000, attention_mask=torch.tensor(MASKS["right"]))
    assert padding.rows(torch.Size([3, 6])) is None


def test_a_batch_of_nothing_but_padding_asks_for_nothing() -> None:
    parts = split(tiny_bert(), keep=("pooler",))
    transport = CountingTransport(parts.server)
    model = parts.bundle.build(transport, task="feature-extraction")
    output = model(tokens(2, 4), attention_mask=torch.zeros(2, 4, dtype=torch.long))
    assert transport.calls == []
    assert output.last_hidden_state.shape == (2, 4, 32)


def test_unknown_model_types_send_all_tokens_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("privtuner.nn.build.PADDING_SAFE", frozenset())
    parts = split(tiny_bert())
    mask = torch.tensor(MASKS["right"])
    for option, sent in ((None, 18), (True, 10)):
        model = parts.bundle.build(CountingTransport(parts.server), task="feature-extraction", skip_padding=option)
        model(tokens(3, 6), attention_mask=mask)
        assert traffic_of(model).snapshot()["encoder.layer.0.output.dense", "forward"].tokens == sent


def test_rows_match_the_mask() -> None:
    parts = split(tiny_bert())
    model = parts.bundle.build(CountingTransport(parts.server), task="feature-extraction")
    padding = model.encoder.layer[0].output.dense.group.session.padding
    mask = torch.tensor(MASKS["left"])
    seen = []
    model.encoder.register_forward_hook(lambda *_: seen.append(padding.rows(torch.Size([3, 6]))))
    model(tokens(3, 6), attention_mask=mask)
    assert np.array_equal(seen[0].numpy(), np.flatnonzero(mask.numpy()))
