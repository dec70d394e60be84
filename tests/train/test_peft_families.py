"""Adapters on the other families: GPT-2's transposed layers, and causal language models with padding."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import GPT2LMHeadModel, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from nn_cases import CountingTransport, clear_twin, probing, tiny_gpt2, tiny_llama, tokens
from privtuner.errors import WeightWithheldError
from privtuner.nn import LocalTransport, Session, build, split
from privtuner.train import add_lora

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

IDS = tokens(3, 6)
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]])


def randomised(model: PeftModel) -> PeftModel:
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def test_conv1d_stays_a_conv1d() -> None:
    parts = split(tiny_gpt2())
    model = build(parts.bundle, Session(LocalTransport(parts.server)))
    layer = model.transformer.h[0].attn.c_attn
    assert isinstance(layer, Conv1D)
    assert (layer.in_features, layer.out_features, layer.nx, layer.nf) == (32, 96, 32, 96)
    assert layer.weight.shape == (32, 96)
    assert "EncryptedConv1D(in_features=32, out_features=96" in repr(model)


@pytest.mark.parametrize("given", [True, False])
def test_gpt2_adapter_loads_on_stock_gpt2(given: bool, tmp_path: Path) -> None:
    parts = split(tiny_gpt2())
    model = build(parts.bundle, Session(LocalTransport(parts.server)))
    config = LoraConfig(r=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=given, task_type="CAUSAL_LM")
    if given:
        adapted = get_peft_model(model, config)
    else:
        # PEFT says so of the clear GPT-2 as well.
        with pytest.warns(UserWarning, match="target module is `Conv1D`. Setting fan_in_fan_out to True"):
            adapted = get_peft_model(model, config)
    randomised(adapted).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    twin = clear_twin(build(parts.bundle, Session(LocalTransport(parts.server))), parts)
    assert isinstance(twin, GPT2LMHeadModel)
    stock = PeftModel.from_pretrained(twin, str(tmp_path)).double().eval()  # a warning would be an error here
    with torch.no_grad():
        got = adapted.eval()(input_ids=IDS).logits.double()
    along = torch.randn(got.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    with probing(stock, parts) as probe:
        want = stock(input_ids=IDS).logits
        bound = probe.bound((want * along).sum())
    assert abs(((got - want.detach()) * along).sum().item()) <= bound
    with torch.no_grad():
        merged = stock.merge_and_unload()(input_ids=IDS).logits
    assert torch.allclose(merged, want.detach(), atol=1e-9), "the update has the orientation of stock Conv1D"
    with pytest.raises(WeightWithheldError, match="stay with the server"):
        adapted.merge_and_unload()


@pytest.mark.parametrize(("clear", "targets"), [(tiny_gpt2(), ["c_attn"]), (tiny_llama(), ["q_proj", "down_proj"])])
def test_gradients_of_causal_models(clear: PreTrainedModel, targets: list[str]) -> None:
    """Labels on real tokens, padding skipped: the gradients of the clear model that computes padding too."""
    parts = split(clear)
    transport = CountingTransport(parts.server)
    config = {"r": 4, "target_modules": targets, "fan_in_fan_out": targets == ["c_attn"]}
    model = build(parts.bundle, Session(transport, verify_every=0))
    twin = randomised(get_peft_model(clear_twin(model, parts), LoraConfig(**config))).double()
    adapted = randomised(get_peft_model(model, LoraConfig(**config)))
    labels = IDS.masked_fill(MASK == 0, -100)
    batch = {"input_ids": IDS, "attention_mask": MASK, "labels": labels}
    loss = adapted(**batch).loss
    forward = len(transport.calls)
    assert forward == len(parts.server)
    loss.backward()
    parameters = {name: p for name, p in twin.named_parameters() if p.requires_grad}
    generator = torch.Generator().manual_seed(9)
    along = [torch.randn(p.shape, dtype=torch.float64, generator=generator) for p in parameters.values()]
    got = sum((adapted.get_parameter(n).grad.double() * a).sum() for n, a in zip(parameters, along, strict=True))
    with probing(twin, parts) as probe:
        grads = torch.autograd.grad(probe.step(twin(**batch).loss), list(parameters.values()), create_graph=True)
        want = sum((g * a).sum() for g, a in zip(grads, along, strict=True))
        bound = probe.bound(want)
    assert abs(got.item() - want.item()) <= bound
    assert abs(got.item() - want.item()) < abs(want.item()) / 100


def test_add_lora_on_gpt2_saves_the_stock_orientation(tmp_path: Path) -> None:
    parts = split(tiny_gpt2())
    adapted = add_lora(build(parts.bundle, Session(LocalTransport(parts.server))), targets=["c_attn"])
    adapted.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (saved["fan_in_fan_out"], saved["task_type"]) == (True, "CAUSAL_LM")
