"""Values that are not finite: refused forward, passed on backward, and never told to the server."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from nn_cases import clear_twin, tiny_bert, tokens, weight_in_force
from privtuner import linear
from privtuner.errors import InputError
from privtuner.nn import EncryptedLinear, LocalTransport, Session, build, split

pytestmark = pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning")

NOT_FINITE = [float("nan"), float("inf"), float("-inf")]


class SizeTransport(LocalTransport):
    """Remembers what a server sees: the layer and the bytes of every request, in order."""

    def __init__(self, layers: object) -> None:
        super().__init__(layers)  # type: ignore[arg-type]
        self.seen: list[tuple[str, int]] = []

    def apply(self, layer: str, request: bytes) -> Iterator[bytes]:
        self.seen.append((layer, len(request)))
        return super().apply(layer, request)


@pytest.mark.parametrize("value", NOT_FINITE)
def test_forward_says_what_to_do_and_no_value(value: float) -> None:
    prepared = linear.prepare(np.random.default_rng(0).normal(size=(6, 9)))
    layer = EncryptedLinear.single(
        "fc", prepared.spec, Session(transport := SizeTransport({"fc": prepared}), verify_every=0)
    )
    x = torch.ones(3, 9)
    x[1, 2] = value
    with pytest.raises(InputError, match=r"layer 'fc': .* not finite .*lower the learning rate.*float16") as caught:
        layer(x)
    assert "[1, 2]" not in str(caught.value)
    assert transport.seen == [], "nothing was sent"


@pytest.mark.parametrize("value", NOT_FINITE)
def test_backward_passes_them_on_by_rows_and_sends_the_same(value: float) -> None:
    prepared = linear.prepare(np.random.default_rng(0).normal(size=(6, 9)))
    layer = EncryptedLinear.single(
        "fc", prepared.spec, Session(transport := SizeTransport({"fc": prepared}), verify_every=0)
    )
    gradient = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    spoilt = gradient.clone()
    spoilt[1, 2] = value
    spoilt[4] = value
    kept = spoilt.clone()
    seen, grads = [], []
    for g in (gradient, gradient, spoilt):
        transport.seen.clear()
        x = torch.ones(5, 9, requires_grad=True)
        layer(x).backward(g)
        seen.append(list(transport.seen))
        grads.append(x.grad)
    # The first round also fetched mask products; requests are of the same size all the same.
    assert seen[0] == seen[1] == seen[2]
    lost = torch.tensor([False, True, False, False, True])
    assert grads[2][lost].isnan().all()
    assert torch.equal(spoilt.nan_to_num(7.0), kept.nan_to_num(7.0)), "the caller's gradient is not written to"
    clear = spoilt.double() @ torch.from_numpy(weight_in_force(prepared))
    assert torch.equal(~clear.isfinite().all(1), lost), "as in the clear"
    bound = torch.from_numpy(linear.error_bound(prepared.spec, gradient.numpy(), "backward"))
    assert ((grads[2].double() - clear).abs() <= bound)[~lost].all()


def test_what_is_encrypted_for_them_is_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = linear.prepare(np.random.default_rng(0).normal(size=(6, 9)))
    layer = EncryptedLinear.single("fc", prepared.spec, Session(LocalTransport({"fc": prepared}), verify_every=0))
    batches: list[np.ndarray] = []
    owner = layer.group.session._client
    encrypt = owner.encrypt
    monkeypatch.setattr(owner, "encrypt", lambda x, *rest: (batches.append(x.copy()), encrypt(x, *rest))[1])
    g = torch.ones(3, 6)
    g[1, 0] = torch.nan
    layer(torch.ones(3, 9, requires_grad=True)).backward(g)
    assert batches[-1].tolist() == [[1.0] * 6, [0.0] * 6, [1.0] * 6]


def test_gradient_scaler_skips_as_in_the_clear() -> None:
    """float16 autocast from far too large a scale: steps are skipped until it fits, and the server cannot tell."""
    parts = split(tiny_bert())
    transport = SizeTransport(parts.server)
    runs = []
    for clear in (False, True):
        torch.manual_seed(1)
        model = build(parts.bundle, Session(transport, verify_every=0), num_labels=2)
        torch.nn.init.normal_(model.classifier.weight, std=1.0)
        if clear:
            model = clear_twin(model, parts, dtype=torch.float32)
        model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"]))
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimiser = torch.optim.SGD(trained, lr=1e-3)
        scaler = torch.amp.GradScaler("cpu", 2.0**32, backoff_factor=2.0**-4)
        skipped, requests = [], []
        for step in range(12):
            transport.seen.clear()
            with torch.autocast("cpu", dtype=torch.float16):
                loss = model(input_ids=tokens(2, 5, seed=step), labels=torch.tensor([0, 1])).loss
            before = scaler.get_scale()
            scaler.scale(loss).backward()
            scaler.step(optimiser)
            scaler.update()
            optimiser.zero_grad()
            skipped.append(scaler.get_scale() < before)
            requests.append(list(transport.seen))
        runs.append((skipped, requests))
        assert all(parameter.isfinite().all() for parameter in trained)
    for skipped, _ in runs:
        # 65504 is float16's largest number. In between it depends on where each model computes in float16.
        assert skipped[:3] == [True] * 3
        assert skipped[-4:] == [False] * 4
    requests = runs[0][1]
    assert all(request == requests[0] for request in requests)
