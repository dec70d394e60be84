"""LoRA by PEFT on encrypted layers: the gradients, the training and the saved adapter of the clear quantised model."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from transformers import BertForSequenceClassification, PreTrainedModel

from nn_cases import CountingTransport, clear_twin, probing, tiny_bert, tiny_llama, tokens
from privtuner.errors import InputError, WeightWithheldError
from privtuner.nn import LocalTransport, Session, Split, build, split, traffic_of
from privtuner.train import add_lora, check_lora_config, trainable_heads

pytestmark = pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing(_enable)?` is deprecated:FutureWarning")

LABELS = 3


@pytest.fixture(scope="module")
def parts() -> Split:
    return split(tiny_bert())


def classifier(parts: Split, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    model = build(parts.bundle, Session(CountingTransport(parts.server), verify_every=0), num_labels=LABELS)
    # A head of the size of trained ones: gradients of fresh heads (std 0.02) are too small to show anything.
    torch.nn.init.normal_(model.classifier.weight, std=0.3)
    return model


def configuration(**changes: object) -> LoraConfig:
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["query", "value"], "modules_to_save": ["classifier"]}
    return LoraConfig(**{**options, **changes})


def randomise(model: torch.nn.Module, seed: int = 3) -> None:
    """Give every adapter values, since a fresh LoRA B is zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def with_lora_twin(parts: Split, **changes: object) -> tuple[PeftModel, PeftModel]:
    """The owner's model with an adapter, and the clear float64 model of the same quantised weights and adapter."""
    model = classifier(parts)
    twin = get_peft_model(clear_twin(model, parts), configuration(**changes)).double()
    adapted = get_peft_model(model, configuration(**changes))
    randomise(adapted)
    trained = {name: p.detach().double() for name, p in adapted.named_parameters() if p.requires_grad}
    assert set(trained) == {name for name, p in twin.named_parameters() if p.requires_grad}
    twin.load_state_dict(trained, strict=False)
    return adapted, twin


def trainable(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def directions(parameters: dict[str, torch.nn.Parameter]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(8)
    return {n: torch.randn(p.shape, generator=generator, dtype=torch.float64) for n, p in parameters.items()}


def quantisation_effect(parts: Split, adapted: PeftModel, compute: Callable[[torch.nn.Module], torch.Tensor]) -> float:
    """How much ``compute`` changes, in norm, from the quantised to the unquantised clear weights."""
    results = []
    for unquantised in (False, True):
        twin = clear_twin(classifier(parts), parts)
        if unquantised:
            twin.bert.load_state_dict(tiny_bert().double().state_dict())
        twin = get_peft_model(twin, configuration()).double()
        twin.load_state_dict({n: p.detach().double() for n, p in trainable(adapted).items()}, strict=False)
        results.append(compute(twin))
    return float((results[0] - results[1]).norm())


IDS = tokens(4, 6)
TARGETS = torch.tensor([0, 1, 2, 1])


def loss_gradients(model: torch.nn.Module) -> torch.Tensor:
    loss = model(input_ids=IDS, labels=TARGETS).loss
    grads = torch.autograd.grad(loss, list(trainable(model).values()))
    return torch.cat([grad.double().flatten() for grad in grads])


def test_gradients_of_every_parameter(parts: Split) -> None:
    adapted, twin = with_lora_twin(parts)
    adapted(input_ids=IDS, labels=TARGETS).loss.backward()
    parameters = trainable(twin)
    along = directions(parameters)
    with probing(twin, parts) as probe:
        loss = probe.step(twin(input_ids=IDS, labels=TARGETS).loss)
        want = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
        for (name, parameter), expected in zip(trainable(adapted).items(), want, strict=True):
            assert parameter.grad is not None
            difference = ((parameter.grad.double() - expected.detach()) * along[name]).sum().item()
            assert abs(difference) <= probe.bound((expected * along[name]).sum()), name
    error = loss_gradients(adapted) - torch.cat([g.detach().flatten() for g in want])
    # Noise is about 2^-14 of a product where int8 rounding is 2^-8, so a 64th of its effect.
    assert float(error.norm()) <= quantisation_effect(parts, adapted, loss_gradients) / 64


def test_training_follows_the_clear_quantised_model(parts: Split) -> None:
    """Three steps of gradient descent; the bound is carried through all of them."""
    adapted, twin = with_lora_twin(parts)
    rate = 0.5
    optimiser = torch.optim.SGD(trainable(adapted).values(), lr=rate)
    adapted.train()
    for step in range(3):
        optimiser.zero_grad()
        adapted(input_ids=IDS[:, : 4 + step], labels=TARGETS).loss.backward()
        optimiser.step()
    adapted.eval()
    with torch.no_grad():
        reached = adapted(input_ids=IDS, labels=TARGETS).loss.item()

    current = {name: p.detach().requires_grad_() for name, p in trainable(twin).items()}
    with probing(twin, parts) as probe:
        losses = []
        for step in range(3):
            batch = {"input_ids": IDS[:, : 4 + step], "labels": TARGETS}
            loss = torch.func.functional_call(twin, current, kwargs=batch).loss
            losses.append(loss.item())
            grads = torch.autograd.grad(probe.step(loss), list(current.values()), create_graph=True)
            current = {name: p - rate * g for (name, p), g in zip(current.items(), grads, strict=True)}
        final = torch.func.functional_call(twin, current, kwargs={"input_ids": IDS, "labels": TARGETS}).loss
        bound = probe.bound(final)
    assert abs(reached - final.item()) <= bound
    assert final.item() < losses[0] - 100 * abs(reached - final.item()), "it learns, and far more than the noise"


def test_one_request_a_group_and_none_below_the_lowest_adapter(parts: Split) -> None:
    adapted, _ = with_lora_twin(parts, layers_to_transform=[1])
    transport = adapted.base_model.model.bert.pooler.dense.group.session.transport
    loss = adapted(input_ids=IDS, labels=TARGETS).loss
    assert sorted(transport.calls) == sorted(parts.server)
    transport.calls.clear()
    loss.backward()
    assert transport.calls == [
        "pooler.dense",
        "encoder.layer.1.output.dense",
        "encoder.layer.1.intermediate.dense",
        "encoder.layer.1.attention.output.dense",
    ]


def test_adapters_on_every_layer_ask_once_a_group(parts: Split) -> None:
    adapted, _ = with_lora_twin(parts)
    adapted(input_ids=IDS, labels=TARGETS).loss.backward()
    requests = {key: traffic.requests for key, traffic in traffic_of(adapted).snapshot().items()}
    lowest = "encoder.layer.0.attention.self.query+key+value"
    assert requests == {
        **{(wire, "forward"): 1 for wire in parts.server},
        **{(wire, "backward"): 1 for wire in parts.server if wire != lowest},
    }


def test_gradient_accumulation(parts: Split) -> None:
    adapted, twin = with_lora_twin(parts)
    for half in (slice(0, 2), slice(2, 4)):
        (adapted(input_ids=IDS[half], labels=TARGETS[half]).loss / 2).backward()
    along = directions(trainable(twin))
    with probing(twin, parts) as probe:
        total: list[torch.Tensor] = []
        for half in (slice(0, 2), slice(2, 4)):
            loss = probe.step(twin(input_ids=IDS[half], labels=TARGETS[half]).loss / 2)
            total += torch.autograd.grad(loss, list(trainable(twin).values()), create_graph=True)
        count = len(total) // 2
        want = sum(((total[k] + total[k + count]) * a).sum() for k, a in enumerate(along.values()))
        bound = probe.bound(want)
    got = sum((p.grad.double() * along[name]).sum() for name, p in trainable(adapted).items())
    assert abs(got.item() - want.item()) <= bound
    whole = (loss_gradients(twin) * torch.cat([a.flatten() for a in along.values()])).sum().item()
    assert abs(want.item() - whole) <= 1e-12 * abs(whole) + 1e-12, "two halves are one batch, in float64"


def test_gradient_checkpointing_changes_nothing(parts: Split) -> None:
    adapted, twin = with_lora_twin(parts)
    model = adapted.base_model.model
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    adapted.train()
    got = loss_gradients(adapted)
    want = loss_gradients(twin.train())
    assert float((got - want).norm()) <= quantisation_effect(parts, adapted, loss_gradients) / 64
    counts = traffic_of(adapted).snapshot()
    assert counts["encoder.layer.1.output.dense", "forward"].requests == 2, "once more when recomputed"


def test_dropout_of_the_adapter(parts: Split) -> None:
    adapted, twin = with_lora_twin(parts, lora_dropout=0.5)
    adapted.train()
    first, second = loss_gradients(adapted), loss_gradients(adapted)
    assert not torch.allclose(first, second, rtol=0.05)
    adapted.eval()
    with torch.no_grad():
        got, want = adapted(input_ids=IDS).logits.double(), twin.eval()(input_ids=IDS).logits
    assert torch.allclose(got, want, atol=2**-10)


def test_adapters_switch_on_and_off(parts: Split) -> None:
    adapted, _ = with_lora_twin(parts)
    bare = classifier(parts)
    session = adapted.base_model.model.bert.pooler.dense.group.session
    with torch.no_grad():
        on = adapted(input_ids=IDS).logits
        with adapted.disable_adapter():
            off = adapted(input_ids=IDS).logits
        plain = bare(input_ids=IDS).logits
        adapted.add_adapter("second", configuration(modules_to_save=None, r=2))
        adapted.set_adapter("second")
        fresh = adapted(input_ids=IDS).logits
        adapted.set_adapter("default")
        again = adapted(input_ids=IDS).logits
    # Runs differ by fresh noise alone, below 2^-12 here; the adapter moves the logits by more than 2^-4.
    assert torch.allclose(off, plain, atol=2**-12)
    assert torch.allclose(fresh, plain, atol=2**-12)
    assert torch.allclose(again, on, atol=2**-12)
    assert float((on - off).abs().max()) > 2**-4
    assert session.meter.total().requests == 4 * len(parts.server)


def test_saved_adapter_fits_the_clear_model(parts: Split, tmp_path: Path) -> None:
    adapted, twin = with_lora_twin(parts)
    adapted.save_pretrained(tmp_path)
    assert not any("base_layer" in name or name.endswith("query.weight") for name in _saved(tmp_path))
    stock = PeftModel.from_pretrained(clear_twin(classifier(parts), parts), str(tmp_path)).double().eval()
    for name, parameter in trainable(twin).items():
        assert torch.equal(stock.get_parameter(name), parameter), name
    along = torch.randn(4, LABELS, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        got = adapted.eval()(input_ids=IDS).logits.double()
    with probing(stock, parts) as probe:
        want = stock(input_ids=IDS).logits
        bound = probe.bound((want * along).sum())
    want = want.detach()
    assert abs(((got - want) * along).sum().item()) <= bound
    # On the clear float model the only difference is the int8 rounding of its weights.
    clear = BertForSequenceClassification(stock.config)
    clear.bert.load_state_dict(tiny_bert().state_dict())
    on_float = PeftModel.from_pretrained(clear.eval(), str(tmp_path)).eval()
    with torch.no_grad():
        logits = on_float(input_ids=IDS).logits.double()
    effect = float((logits - want).abs().max())
    assert effect < 0.1 * float(want.abs().max())
    assert float((got - want).abs().max()) < effect / 64
    # Both are within that of `want`, where the best label leads by far more than twice as much.
    best, second = want.topk(2).values.T
    assert (best - second > 4 * effect).all()
    assert torch.equal(logits.argmax(-1), got.argmax(-1))
    merged = on_float.merge_and_unload()
    with torch.no_grad():
        assert torch.allclose(merged(input_ids=IDS).logits.double(), logits, atol=2**-16)


def _saved(folder: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        return list(file.keys())


def test_adapters_trained_in_the_clear_load_on_the_owners_model(parts: Split, tmp_path: Path) -> None:
    adapted, twin = with_lora_twin(parts)
    twin.float().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(classifier(parts), str(tmp_path), is_trainable=True)
    for name, parameter in trainable(adapted).items():
        assert torch.equal(loaded.get_parameter(name), parameter)
        assert loaded.get_parameter(name).requires_grad
    loaded(input_ids=IDS, labels=TARGETS).loss.backward()


@pytest.mark.parametrize(
    "merge",
    [
        lambda model: model.merge_and_unload(),
        lambda model: model.merge_and_unload(safe_merge=True),
        lambda model: model.merge_adapter(),
        lambda model: model.merge_adapter(safe_merge=True),
    ],
)
def test_merging_is_refused_with_the_reason_and_harms_nothing(
    parts: Split, merge: Callable[[PeftModel], object]
) -> None:
    adapted, _ = with_lora_twin(parts)
    with torch.no_grad():
        before = adapted(input_ids=IDS).logits
        with pytest.raises(
            WeightWithheldError, match=r"stay with the server, so it cannot be merged .*save_pretrained"
        ):
            merge(adapted)
        assert torch.allclose(adapted(input_ids=IDS).logits, before, atol=2**-12)


def test_unloading_without_merging_gives_the_model_back(parts: Split) -> None:
    adapted, _ = with_lora_twin(parts, modules_to_save=None)
    bare = adapted.unload()
    with torch.no_grad():
        assert torch.allclose(bare(input_ids=IDS).logits, classifier(parts)(input_ids=IDS).logits, atol=2**-12)


@pytest.mark.parametrize(
    "options", [{"use_dora": True}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}]
)
def test_variants_that_read_the_weight_are_refused(parts: Split, options: dict[str, object]) -> None:
    with pytest.raises(WeightWithheldError, match="stay with the server"):
        get_peft_model(classifier(parts), configuration(**options))
    with pytest.raises(WeightWithheldError, match=r"use plain LoRA|use one of True, False, 'gaussian'"):
        add_lora(classifier(parts), targets=["query"], **options)


def test_adalora_follows_the_clear_quantised_model(parts: Split) -> None:
    """It freezes the base layer's weight by hand, which needs no value."""
    options = {"target_modules": ["query", "value"], "task_type": "SEQ_CLS", "init_r": 4, "target_r": 2}
    config = AdaLoraConfig(**options, total_step=4, tinit=1, tfinal=1, deltaT=1)
    adapted = get_peft_model(classifier(parts), config)
    twin = get_peft_model(clear_twin(classifier(parts), parts, dtype=torch.float32), copy.deepcopy(config))
    logits = []
    for model in (adapted, twin):
        randomise(model)
        model.eval()
        loss = model(input_ids=IDS, labels=TARGETS).loss
        loss.backward()
        model.base_model.update_and_allocate(2)
        with torch.no_grad():
            logits.append(model(input_ids=IDS).logits)
    # Runs differ by fresh noise, below 2^-12 here; the adapter moves logits by more than 2^-6.
    assert torch.allclose(*logits, atol=2**-11)
    with torch.no_grad(), adapted.disable_adapter():
        assert float((adapted(input_ids=IDS).logits - logits[0]).abs().max()) > 2**-6


def test_all_linear_targets(parts: Split) -> None:
    adapted = get_peft_model(classifier(parts), configuration(target_modules="all-linear"))
    targeted = {name for name, module in adapted.named_modules() if hasattr(module, "lora_A")}
    assert len(targeted) == 2 * 6 + 1
    adapted(input_ids=IDS, labels=TARGETS).loss.backward()


def test_half_precision(parts: Split) -> None:
    half = split(tiny_bert().to(torch.bfloat16))
    model = build(half.bundle, Session(LocalTransport(half.server)), num_labels=LABELS)
    adapted = get_peft_model(model, configuration())
    assert {p.dtype for name, p in trainable(adapted).items() if "lora_" in name} == {torch.float32}
    output = adapted(input_ids=IDS, labels=TARGETS)
    output.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in trainable(adapted).values() if p.grad is not None)


def test_copies_and_pickles(parts: Split) -> None:
    adapted, _ = with_lora_twin(parts)
    twin = copy.deepcopy(adapted)
    with torch.no_grad():
        for parameter in trainable(twin).values():
            parameter.zero_()
        assert not torch.allclose(twin(input_ids=IDS).logits, adapted(input_ids=IDS).logits, atol=2**-4)
    with pytest.raises(InputError, match="cannot be pickled"):
        pickle.dumps(adapted)


def test_add_lora_chooses_head_and_task(parts: Split, tmp_path: Path) -> None:
    adapted = add_lora(classifier(parts), r=4, targets=["query", "value"], dropout=0.1)
    adapted.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["task_type"] == "SEQ_CLS"
    assert "classifier" in saved["modules_to_save"]
    assert (saved["r"], saved["lora_alpha"], saved["lora_dropout"]) == (4, 8, 0.1)
    assert any("classifier" in name for name in _saved(tmp_path))
    causal = split(tiny_llama())
    model = build(causal.bundle, Session(LocalTransport(causal.server)))
    assert trainable_heads(model) == []
    adapted = add_lora(model)
    config = adapted.peft_config["default"]
    assert (config.task_type, set(config.target_modules)) == ("CAUSAL_LM", {"q_proj", "v_proj"})
    adapted(input_ids=IDS, labels=IDS).loss.backward()


def test_trainable_heads_are_the_outermost() -> None:
    kept = split(tiny_bert(), keep=("pooler",))
    model = build(kept.bundle, Session(LocalTransport(kept.server)), num_labels=2)
    assert trainable_heads(model) == ["bert.pooler", "classifier"]
    model.requires_grad_(False)
    assert trainable_heads(model) == []
    clear = BertForSequenceClassification(model.config)
    assert trainable_heads(clear) == ["classifier"], "nothing is frozen yet"
    assert trainable_heads(clear.bert) == []


def test_add_lora_refuses_what_cannot_work(parts: Split) -> None:
    model = classifier(parts)
    for options, message in [
        ({"r": -1}, "r is -1; give a rank"),
        ({"dropout": 1.0}, "dropout is 1.0; give a probability"),
        ({"r": 2.5}, "r is 2.5; give a rank"),
        (
            {"targets": ["query", "quarry"]},
            "target 'quarry' matches no module; the layers .* are dense, key, position_",
        ),
        ({"targets": ".*quarry"}, r"target '.\*quarry' matches no module"),
        ({"targets": "("}, r"target '\(' is no regular expression: missing \)"),
        ({"targets": []}, "no targets; name layers that get adapters, of dense, key"),
        ({"targets": ""}, "no targets; name layers that get adapters"),
        ({"targets": ["query", "all-linear"]}, "target 'all-linear' matches no module"),
        ({"targets": ["query", "LayerNorm"]}, "target 'LayerNorm': 'bert.embeddings.LayerNorm' is a LayerNorm, which"),
        ({"targets": ["encoder"]}, "target 'encoder': 'bert.encoder' is a BertEncoder, which takes no adapter; name"),
        ({"targets": ["query", "classifier"]}, "target 'classifier': 'classifier' is trained in full.*leave it out"),
        (
            {"targets": ["query"], "modules_to_save": ["clasifier"]},
            "'clasifier' matches no module; .* bert, dropout, cla",
        ),
        ({"targets": ["query"], "lora_droput": 0.1}, "no options of a LoRA adapter: .*'lora_droput'"),
        (
            {"targets": ["query"], "layers_to_transform": [7]},
            "PEFT cannot adapt this BertFor.*: No modules were targeted",
        ),
        ({"targets": ["query"], "modules_to_save": ["pooler"]}, "'bert.pooler' cannot be trained in full"),
        ({"targets": ["query"], "modules_to_save": ["pooler.dense"]}, "'bert.pooler.dense' cannot be trained in full"),
    ]:
        with pytest.raises(InputError, match=message):
            add_lora(model, **options)
    with pytest.raises(WeightWithheldError, match="'query.weight' is with the server; name its layer in targets"):
        add_lora(model, targets=["key"], target_parameters=["query.weight"])
    check_lora_config(model, configuration(target_modules="all-linear"))
    assert trainable_heads(model) == ["classifier"], "nothing was changed"
    assert not any(hasattr(module, "base_layer") for module in model.modules())
    adapted = add_lora(model, targets=["all-linear"])
    assert sum(hasattr(module, "lora_A") for module in adapted.modules()) == 2 * 6 + 1
    with pytest.raises(InputError, match="has adapters already"):
        add_lora(adapted, targets=["query"])
