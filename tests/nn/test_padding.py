"""Hidden positions are left out where nothing reads them, and nobody notices: outputs, losses, gradients."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from family_cases import tiny_model
from loops import each
from nn_cases import RecordingTransport, clear_twin, probing, tiny_bert, tiny_gpt2, tiny_llama, tokens
from privtuner.errors import InputError
from privtuner.nn import Session, Split, build, split, visible_only
from privtuner.nn.families import PADDING_SAFE

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

MASKS = {
    "right": [[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0]],
    "left": [[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]],
    "holes": [[1, 0, 1, 1, 0, 1], [1, 1, 0, 0, 1, 1], [1, 1, 1, 1, 1, 0]],
    "gone": [[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0]],
    "none": [[1] * 6] * 3,
}
TINY = {"bert": tiny_bert, "gpt2": tiny_gpt2, "llama": tiny_llama}
# What may be left out of a step: (family, what is learnt) -> masks.
SAVED = {
    ("bert", "class"): {"right", "holes"},
    ("gpt2", "class"): {"right", "left", "holes"},
    ("llama", "class"): {"right", "left", "holes"},
    ("bert", "labels"): {"right", "left", "holes", "gone"},
    ("gpt2", "labels"): {"right", "gone"},  # the label of a row's first token is read one position before it
    ("llama", "labels"): {"right", "gone"},
    **{(family, "masked mean"): {"right", "left", "holes", "gone"} for family in TINY},
}
CHECKPOINTS = (None, {"use_reentrant": False}, {"use_reentrant": True})
LEARNT = ("class", "labels", "labels on padding", "masked mean", "mean")


@pytest.fixture(scope="module")
def parts() -> dict[str, Split]:
    return {family: split(make()) for family, make in TINY.items()}


def batch_of(kind: str) -> dict[str, torch.Tensor]:
    mask = torch.tensor(MASKS[kind])
    return {"input_ids": tokens(3, 6) * mask, "attention_mask": mask}


def built(parts: Split, learnt: str, *, causal: bool = False, **options: Any) -> tuple[PreTrainedModel, Any]:
    """An owner's model in training mode, and its transport."""
    transport = RecordingTransport(parts.server)
    task = {"class": "sequence-classification", "labels": "causal-lm" if causal else "token-classification"}
    task |= {"labels on padding": task["labels"]}
    torch.manual_seed(0)
    model = build(
        parts.bundle,
        Session(transport, verify_every=0),
        task=task.get(learnt, "feature-extraction"),
        num_labels=3,
        pad_token_id=0,
        **options,
    )
    for head in (m for m in model.modules() if type(m) is torch.nn.Linear):
        torch.nn.init.normal_(head.weight, std=0.3)
    model.get_input_embeddings().requires_grad_(True)
    return model.train(), transport


def loss_of(model: PreTrainedModel, learnt: str, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    ids, mask = batch["input_ids"], batch["attention_mask"]
    if learnt == "class":
        return model(**batch, labels=torch.tensor([0, 2, 1])).loss
    if learnt.startswith("labels"):
        labels = ids % model.config.num_labels if "ForToken" in type(model).__name__ else ids
        return model(**batch, labels=labels.masked_fill(mask == 0, -100) if learnt == "labels" else labels).loss
    if learnt == "mean":
        return model(**batch).last_hidden_state.mean(1).square().sum()
    with visible_only():
        states = model(**batch).last_hidden_state
    pooled = (states * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
    return pooled.square().sum()


def assert_clear(model: PreTrainedModel, parts: Split, learnt: str, batch: dict[str, torch.Tensor]) -> None:
    """Loss and gradient of ``model`` are those of the clear model with the server's int8 weights."""
    # In double precision eager attention of some families overflows to NaN in rows that are masked whole.
    twin = clear_twin(model, parts, attention="sdpa")
    loss = loss_of(model, learnt, batch)
    loss.backward()
    parameters = [(name, twin.get_parameter(name)) for name, p in model.named_parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(9)
    along = [torch.randn(p.shape, dtype=torch.float64, generator=generator) for _, p in parameters]
    got = loss.detach().item() + sum(
        float((model.get_parameter(name).grad.double() * a).sum())
        for (name, _), a in zip(parameters, along, strict=True)
    )
    with probing(twin, parts) as probe, sdpa_kernel(SDPBackend.MATH):
        clear = loss_of(twin, learnt, batch)
        grads = torch.autograd.grad(probe.step(clear), [p for _, p in parameters], create_graph=True)
        want = clear + sum((g * a).sum() for g, a in zip(grads, along, strict=True))
        bound = probe.bound(want)
    # Along a random direction a gradient is as large as its norm, and noise of 2^-14 a product is far below that.
    norm = float(torch.cat([g.detach().flatten() for g in grads]).norm())
    assert abs(got - want.detach().item()) <= min(bound, norm / 128)


def sent(transport: RecordingTransport) -> set[tuple[str, int]]:
    """Direction and tokens of the requests of layers that take whole sequences."""
    return {(way, count) for layer, way, count in transport.seen if layer != "pooler.dense"}


@pytest.mark.parametrize("family", TINY)
@each(kind=MASKS, learnt=LEARNT)
def test_steps_are_those_of_the_clear_model(parts: dict[str, Split], family: str, learnt: str, kind: str) -> None:
    """With every kind of checkpointing in turn."""
    model, transport = built(parts[family], learnt, causal=family != "bert")
    place = list(TINY).index(family) + LEARNT.index(learnt) + list(MASKS).index(kind)
    if CHECKPOINTS[place % 3] is not None:
        model._set_gradient_checkpointing(
            True, lambda *args, **kwargs: checkpoint(*args, **kwargs, **CHECKPOINTS[place % 3])
        )
    batch = batch_of(kind)
    assert_clear(model, parts[family], learnt, batch)
    visible = int(batch["attention_mask"].sum())
    count = visible if kind in SAVED.get((family, learnt), ()) else 18
    assert sent(transport) == {("forward", count), ("backward", count)}


@each(kind=["right", "left"], model_type=sorted(set(PADDING_SAFE) - set(TINY)))
def test_classifiers_of_other_families(model_type: str, kind: str) -> None:
    # ALBERT calls one layer again and again, and the bounds follow one call of each.
    parts = split(tiny_model(model_type, num_hidden_layers=1))
    model, transport = built(parts, "class")
    batch = batch_of(kind)
    assert_clear(model, parts, "class", batch)
    saved = kind == "right" or PADDING_SAFE[model_type] == "last"
    counts = {count for layer, _, count in transport.seen if "classifier" not in layer and "pooler" not in layer}
    assert counts == {int(batch["attention_mask"].sum()) if saved else 18}


def tainted(model: PreTrainedModel, mask: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The visible outputs of a clear model whose linear layers give nonsense at hidden positions."""
    generator = torch.Generator().manual_seed(5)

    def taint(_module: torch.nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor:
        if output.shape[:2] != mask.shape:
            return output
        return torch.where(mask[:, :, None] == 0, torch.randn(output.shape, generator=generator), output)

    hooks = [m.register_forward_hook(taint) for m in model.modules() if isinstance(m, (torch.nn.Linear, Conv1D))]
    with torch.no_grad():
        states = model(**batch).last_hidden_state
    for hook in hooks:
        hook.remove()
    return states[mask != 0]


@each(attention=["eager", "sdpa"], model_type=PADDING_SAFE)
def test_hidden_positions_never_reach_visible_ones(model_type: str, attention: str) -> None:
    model = tiny_model(model_type)
    model.set_attn_implementation(attention)
    for kind in ("right", "left", "holes", "gone"):
        batch = batch_of(kind)
        mask = batch["attention_mask"]
        with torch.no_grad():
            clean = model(**batch).last_hidden_state
        assert torch.equal(tainted(model, mask, batch), clean[mask != 0])


def test_models_that_mix_otherwise_would_be_found_out() -> None:
    model = tiny_model("fnet")
    ids, mask = batch_of("right").values()
    with torch.no_grad():
        clean = model(input_ids=ids).last_hidden_state
    assert not torch.equal(tainted(model, mask, {"input_ids": ids}), clean[mask != 0])
    assert "fnet" not in PADDING_SAFE


def forward_tokens(model: PreTrainedModel, transport: RecordingTransport, *args: Any, **arguments: Any) -> int:
    """Tokens that a layer of whole sequences was asked for in one forward pass."""
    transport.seen = []
    model(*args, **arguments)
    (count,) = {count for layer, _, count in transport.seen if layer != "pooler.dense"}
    return count


def test_masks_of_other_kinds_and_places(parts: dict[str, Split]) -> None:
    model, transport = built(parts["bert"], "class")
    ids, mask = batch_of("right").values()
    for given, count in ((mask, 10), (mask.bool(), 10), (mask.float(), 10), (None, 18)):
        assert forward_tokens(model, transport, ids, given) == count
    four = torch.zeros(3, 1, 6, 6).masked_fill(mask[:, None, None, :] == 0, -1e9)
    assert forward_tokens(model, transport, ids, attention_mask=four) == 18


@pytest.mark.parametrize(
    "arguments",
    [
        {"output_hidden_states": True},
        {"output_attentions": True},
        {"use_cache": True},
        {"past_key_values": None, "use_cache": False, "return_dict": False},
    ],
)
def test_nothing_is_left_out_of_what_the_caller_asks_for(parts: dict[str, Split], arguments: dict[str, Any]) -> None:
    model, transport = built(parts["llama"], "class")
    plain = "return_dict" in arguments
    assert forward_tokens(model, transport, **batch_of("right"), **arguments) == (10 if plain else 18)


def test_what_is_not_known_sends_everything(parts: dict[str, Split], monkeypatch: pytest.MonkeyPatch) -> None:
    batch = batch_of("right")
    model, transport = built(parts["gpt2"], "class")
    assert forward_tokens(model, transport, **batch) == 10
    assert model(**batch).past_key_values is None, "a cache would hold what was not computed"
    embeds = model.get_input_embeddings()(batch["input_ids"])
    mask = batch["attention_mask"]
    assert forward_tokens(model, transport, inputs_embeds=embeds, attention_mask=mask) == 18, "the last is pooled"
    model.config.output_hidden_states = True
    assert forward_tokens(model, transport, **batch) == 18
    model.config.output_hidden_states = False
    model.config.pad_token_id = 7
    assert forward_tokens(model, transport, **batch) == 18, "a hidden position is pooled"
    model.config.pad_token_id = 0
    model.loss_function = lambda **_: torch.zeros(())
    assert forward_tokens(model, transport, **batch) == 18
    del model._loss_function
    monkeypatch.setattr(model.config, "_attn_implementation_internal", "somebody's")
    monkeypatch.setitem(
        __import__("transformers").modeling_utils.ALL_ATTENTION_FUNCTIONS,
        "somebody's",
        __import__("transformers.models.gpt2.modeling_gpt2", fromlist=["x"]).eager_attention_forward,
    )
    assert forward_tokens(model, transport, **batch) == 18
    monkeypatch.undo()
    monkeypatch.setattr("privtuner.nn.padding.PADDING_SAFE", {})
    assert forward_tokens(model, transport, **batch) == 18


def test_base_models_give_hidden_states_to_the_caller(parts: dict[str, Split]) -> None:
    batch = batch_of("right")
    for model in (built(parts["bert"], "mean"), built(parts["bert"], "class")):
        assert forward_tokens(model[0].base_model, model[1], **batch) == 18
        with visible_only():
            assert forward_tokens(model[0].base_model, model[1], **batch) == 10
    off, transport = built(parts["bert"], "mean", skip_padding=False)
    with visible_only():
        assert forward_tokens(off, transport, **batch) == 18
    on, transport = built(parts["bert"], "mean", skip_padding=True)
    assert forward_tokens(on, transport, **batch) == 10
    assert forward_tokens(on, transport, **batch, output_hidden_states=True) == 10, "on the caller's word"


def test_logits_of_a_training_step_are_withheld(parts: dict[str, Split]) -> None:
    model, transport = built(parts["llama"], "labels", causal=True)
    batch = batch_of("right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    output = model(**batch, labels=labels)
    assert (output.logits.shape, output.logits.dtype) == ((3, 6, 50), torch.float32)
    assert output.logits.float().detach().to("cpu") is output.logits
    for use in (lambda x: x.argmax(-1), lambda x: x[:, :3], lambda x: x * 2, lambda x: x.tolist()):
        with pytest.raises(InputError, match=r"logits were not computed .* skip_padding=False"):
            use(output.logits)
    loss, logits = model(**batch, labels=labels, return_dict=False)
    assert loss.requires_grad
    with pytest.raises(InputError, match="logits were not computed"):
        logits.sum()
    with torch.no_grad():
        assert torch.isfinite(model(**batch, labels=labels).logits).all()
    assert {count for _, _, count in transport.seen} == {10, 18}, "without gradients everything is computed"
    assert torch.isfinite(model.eval()(**batch, labels=labels).logits).all()


def test_a_loss_of_ones_own_gets_all_logits(parts: dict[str, Split]) -> None:
    model, _ = built(parts["llama"], "labels", causal=True)
    model.loss_function = lambda logits, labels, **_: logits.square().mean()
    batch = batch_of("right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    assert torch.isfinite(model(**batch, labels=labels).logits).all()


def test_gradients_at_rows_left_out_are_refused(parts: dict[str, Split]) -> None:
    """The word was not true: the loss reads hidden positions."""
    batch = batch_of("right")
    model, _ = built(parts["bert"], "mean", skip_padding=True)
    loss = model(**batch).last_hidden_state.mean(1).square().sum()
    with pytest.raises(InputError, match=r"layer 'encoder.*loss depends on positions that attention_mask hides"):
        loss.backward()
    model, _ = built(parts["bert"], "mean")
    with visible_only():
        states = model(**batch).last_hidden_state
    with pytest.raises(InputError, match="loss depends on positions"):
        states.mean(1).square().sum().backward()


def test_an_overflow_at_rows_left_out_is_one(parts: dict[str, Split]) -> None:
    model, _ = built(parts["bert"], "mean", skip_padding=True)
    batch = batch_of("right")
    layer = model.encoder.layer[1].output.dense
    seen = []

    def call(_module: Any, args: Any, _output: Any) -> None:
        x = torch.randn(3, 6, 48, requires_grad=True)
        gradient = torch.ones(3, 6, 32)
        gradient[batch["attention_mask"] == 0] = torch.nan
        seen.extend(torch.autograd.grad(layer(x), x, gradient))

    model.pooler.register_forward_hook(call)
    model(**batch)
    assert seen[0].isnan().all()


def own_checkpoint(model: PreTrainedModel, reentrant: bool) -> None:
    """Checkpoint a part of a BERT with the caller's own means."""
    layer = model.base_model.encoder.layer[0].output
    forward = layer.forward
    layer.forward = lambda *args: checkpoint(forward, *args, use_reentrant=reentrant)


@each(reentrant=[False, True])
def test_checkpoints_of_the_callers_own(parts: dict[str, Split], reentrant: bool) -> None:
    """Right where nothing hidden is read; refused where only the caller's word says so."""
    batch = batch_of("right")
    model, transport = built(parts["bert"], "class")
    own_checkpoint(model, reentrant)
    grads = []
    for active in (model, built(parts["bert"], "class")[0]):
        loss_of(active, "class", batch).backward()
        grads.append(active.get_input_embeddings().weight.grad)
    # Noise of 2^-14 a product against gradients of this size.
    assert float((grads[0] - grads[1]).norm()) < float(grads[1].norm()) / 256
    assert {count for _, _, count in transport.seen} == {3, 10, 18}
    model, _ = built(parts["bert"], "mean", skip_padding=True)
    own_checkpoint(model, reentrant)
    loss = (model(**batch).last_hidden_state * batch["attention_mask"][:, :, None]).square().sum()
    with pytest.raises(InputError, match="checkpoint recomputes without knowing"):
        loss.backward()


def test_a_checkpoint_around_the_model(parts: dict[str, Split]) -> None:
    batch = batch_of("right")
    model, transport = built(parts["bert"], "class")
    embeds = model.get_input_embeddings()(batch["input_ids"])
    logits = checkpoint(
        lambda x: model(inputs_embeds=x, attention_mask=batch["attention_mask"]).logits, embeds, use_reentrant=False
    )
    logits.square().sum().backward()
    assert {count for layer, _, count in transport.seen if layer != "pooler.dense"} == {10}
    model, _ = built(parts["bert"], "mean")
    embeds = model.get_input_embeddings()(batch["input_ids"])
    with visible_only():
        states = checkpoint(
            lambda x: model(inputs_embeds=x, attention_mask=batch["attention_mask"])[0], embeds, use_reentrant=False
        )
    with pytest.raises(InputError, match="checkpoint recomputes without knowing"):
        states.mean(1).square().sum().backward()


def test_adapters_and_copies(parts: dict[str, Split]) -> None:
    """PEFT calls ``forward`` itself, past the hooks of modules."""
    batch = batch_of("right")
    for learnt in ("class", "masked mean"):
        model, transport = built(parts["bert"], learnt)
        for active in (copy.deepcopy(model), get_peft_model(model, LoraConfig(target_modules=["query"]))):
            transport.seen = []
            loss_of(active, learnt, batch)
            assert sent(transport) == {("forward", 10)}


def test_state_ends_with_the_forward_pass(parts: dict[str, Split]) -> None:
    model, transport = built(parts["bert"], "class")
    passes = model.bert.encoder.layer[0].output.dense.group.session.passes
    ids, mask = batch_of("right").values()
    rows = []
    model.bert.pooler.register_forward_hook(lambda *_: rows.append(passes.admit("x", torch.Size([3, 6]))))
    model(ids, attention_mask=mask)
    assert torch.equal(rows[0].visible, mask.reshape(-1).nonzero().squeeze(1))
    assert torch.equal(rows[0].hidden, (mask.reshape(-1) == 0).nonzero().squeeze(1))
    assert passes.admit("x", torch.Size([3, 6])) is None
    with pytest.raises(IndexError):
        model(ids + 1000, attention_mask=mask)
    assert passes.admit("x", torch.Size([3, 6])) is None
    with pytest.raises(TypeError, match="multiple values"):
        model(ids, input_ids=ids)
    assert forward_tokens(model, transport, ids, attention_mask=mask) == 10


def test_a_batch_of_nothing_but_padding_asks_for_nothing() -> None:
    kept = split(tiny_bert(), keep=("pooler",))
    transport = RecordingTransport(kept.server)
    model = build(kept.bundle, Session(transport, verify_every=0), task="feature-extraction", skip_padding=True)
    output = model(tokens(2, 4), attention_mask=torch.zeros(2, 4, dtype=torch.long))
    assert transport.seen == []
    assert output.last_hidden_state.shape == (2, 4, 32)


def test_every_mask_of_a_short_row(parts: dict[str, Split]) -> None:
    """A classifier's logits under all masks of four positions: those of the model that sends everything."""
    model, transport = built(parts["bert"], "class")
    whole, _ = built(parts["bert"], "class", skip_padding=False)
    mask = torch.tensor(list(itertools.product((0, 1), repeat=4)))
    ids = tokens(16, 4)
    with torch.no_grad():
        for rows in (mask[:, 0] == 1, mask[:, 0] == 0):
            got, want = (m.eval()(ids[rows], mask[rows]).logits for m in (model, whole))
            # Noise of 2^-14 a product, over a dozen of them, on logits of order one.
            assert torch.allclose(got, want, atol=2**-8)
    assert {count for layer, _, count in transport.seen if layer != "pooler.dense"} == {20, 32}
