"""Which layers are asked, in which order and for how many tokens: what shapes say, and nothing of the texts."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, SwitchTransformersConfig, SwitchTransformersEncoderModel
from transformers.models.auto import modeling_auto

from family_cases import tiny_model
from loops import each
from nn_cases import RecordingTransport, tiny_bert, tiny_llama, tokens
from privtuner.errors import InputError
from privtuner.nn import EncryptedGroup, LocalTransport, Session, Split, build, split
from privtuner.nn.families import PADDING_SAFE, REGULAR

# Constants of these families that are neither embeddings nor linear.
CONSTANTS = ("final_logits_bias", "embed_positions", "attn.bias")


def task_of(model_type: str) -> str:
    if model_type in ("camembert", "mobilebert", "xlm-roberta"):
        # Their heads for masked words read weights, or are tied in ways that a bundle does not hold.
        return "AutoModel"
    for auto, mapping in (
        ("AutoModelForSeq2SeqLM", modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
        ("AutoModelForMaskedLM", modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
        ("AutoModelForCausalLM", modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    ):
        if model_type in mapping:
            return auto
    return "AutoModel"


def step(model: PreTrainedModel, ids: torch.Tensor, **arguments: Any) -> None:
    """A forward and a backward pass through every layer."""
    output = model(input_ids=ids, **arguments)
    loss = output.loss if "labels" in arguments else output[0].square().mean()
    loss.backward()


@each(model_type=sorted(REGULAR))
def test_two_texts_of_one_length_ask_for_the_same(model_type: str) -> None:
    task = task_of(model_type)
    sizes = {"embedding_size": 16} if model_type == "mobilebert" else {}
    parts = split(tiny_model(model_type, task, **sizes), keep=CONSTANTS)
    transport = RecordingTransport(parts.server)
    model = build(parts.bundle, Session(transport, verify_every=0)).train()
    model.get_input_embeddings().requires_grad_(True)
    seen = []
    for seed in range(2):
        ids = tokens(2, 6, seed=seed)
        arguments = {}
        if task != "AutoModel":
            # As many labels as the text says.
            arguments["labels"] = ids.masked_fill(
                torch.rand(2, 6, generator=torch.Generator().manual_seed(seed)) < 0.5, -100
            )
        step(model, ids, **arguments)
        seen.append(transport.seen)
        transport.seen = []
    assert seen[0] == seen[1]
    assert {direction for _, direction, _ in seen[0]} == {"forward", "backward"}


def test_families_known_to_honour_masks_are_regular() -> None:
    assert set(PADDING_SAFE) <= REGULAR


def experts() -> PreTrainedModel:
    config = SwitchTransformersConfig(
        vocab_size=50,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_sparse_encoder_layers=1,
        num_heads=4,
        num_experts=4,
    )
    torch.manual_seed(0)
    return SwitchTransformersEncoderModel(config).eval()


def test_a_mixture_of_experts_needs_the_word_of_both_parties() -> None:
    with pytest.raises(InputError, match=r"SwitchTransformers.* is not known .* allow_data_dependent_requests"):
        split(experts())
    parts = split(experts(), allow_data_dependent_requests=True)
    transport = RecordingTransport(parts.server)
    with pytest.raises(InputError, match=r"a model of type switch_transformers is not known"):
        build(parts.bundle, Session(transport, verify_every=0))
    model = build(parts.bundle, Session(transport, verify_every=0), allow_data_dependent_requests=True)
    seen = []
    for seed in range(2):
        model(input_ids=tokens(1, 8, seed=seed))
        seen.append(transport.seen)
        transport.seen = []
    assert seen[0] != seen[1], "what is refused does tell texts apart"


def test_countthat_a_router_chose_are_refused_whatever_the_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("privtuner.nn.families.REGULAR", REGULAR | {"switch_transformers"})
    parts = split(experts())
    model = build(parts.bundle, Session(LocalTransport(parts.server)))
    with pytest.raises(InputError, match=r"layer '.*expert_\d.*' is asked for tokens that the model chose"):
        model(input_ids=tokens(1, 8))


def test_a_bundle_cannot_pass_one_architecture_off_as_another() -> None:
    bundle = split(experts(), allow_data_dependent_requests=True).bundle
    forged = dataclasses.replace(bundle, config={**bundle.config, "model_type": "t5"})
    with pytest.raises(InputError, match="no model 'SwitchTransformersEncoderModel' of type t5"):
        build(forged, Session(LocalTransport({})))


def test_predicting_labelled_countalone_is_refused() -> None:
    with pytest.raises(InputError, match="sparse_prediction of this ModernBertForMaskedLM sends labelled tokens alone"):
        split(tiny_model("modernbert", "AutoModelForMaskedLM", sparse_prediction=True))
    parts = split(tiny_model("modernbert", "AutoModelForMaskedLM"))
    with pytest.raises(InputError, match="sparse_prediction"):
        build(parts.bundle, Session(LocalTransport(parts.server)), sparse_prediction=True)
    model = build(parts.bundle, Session(LocalTransport(parts.server)))
    model.sparse_prediction = True
    labels = tokens(2, 6).masked_fill(torch.arange(12).view(2, 6) > 4, -100)
    with pytest.raises(InputError, match="is asked for tokens that the model chose"):
        model(input_ids=tokens(2, 6), labels=labels)


@pytest.fixture(scope="module")
def llama() -> Split:
    return split(tiny_llama())


@pytest.mark.parametrize(("kept", "sent"), [(0, 12), (2, 4), (torch.tensor([1, 3, 5]), 6)])
def test_positions_whose_logits_were_asked_for(llama: Split, kept: Any, sent: int) -> None:
    transport = RecordingTransport(llama.server)
    build(llama.bundle, Session(transport, verify_every=0))(tokens(2, 6), logits_to_keep=kept)
    assert transport.seen[-1] == ("lm_head", "forward", sent)


def test_generation_with_a_cache(llama: Split) -> None:
    transport = RecordingTransport(llama.server)
    model = build(llama.bundle, Session(transport, verify_every=0))
    model.generate(tokens(2, 6), max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0)
    assert [count for layer, _, count in transport.seen if layer == "lm_head"] == [2, 2, 2]


def test_generation_with_an_encoder() -> None:
    parts = split(tiny_model("t5", "AutoModelForSeq2SeqLM"))
    model = build(parts.bundle, Session(LocalTransport(parts.server)))
    assert model.generate(tokens(2, 6), max_new_tokens=2, min_new_tokens=2).shape == (2, 3)


def test_relative_positions_are_no_tokens() -> None:
    for model_type, changes in (
        ("deberta", {"max_relative_positions": 4}),
        ("deberta", {"max_relative_positions": -1}),
        ("deberta-v2", {"position_buckets": -1}),
        ("deberta-v2", {"position_buckets": 4, "share_att_key": True}),
    ):
        given = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], **changes}
        parts = split(tiny_model(model_type, **given))
        build(parts.bundle, Session(LocalTransport(parts.server)))(tokens(2, 6))


def test_several_choices_of_one_question() -> None:
    parts = split(tiny_model("bert", "AutoModelForMultipleChoice"))
    model = build(parts.bundle, Session(LocalTransport(parts.server)))
    assert model(tokens(6, 5).view(2, 3, 5)).logits.shape == (2, 3)


def test_a_layer_in_a_pass_takes_the_sizes_of_the_pass() -> None:
    parts = split(tiny_bert())
    model = build(parts.bundle, Session(LocalTransport(parts.server)))
    layer = model.encoder.layer[0].output.dense
    sizes = {(2, 6): True, (12,): True, (2,): True, (5,): False, (1, 6): False, (2, 5): False, (): False}
    refused = []

    def call(*_: Any) -> None:
        for size in sizes:
            try:
                layer(torch.randn(*size, 48))
            except InputError:
                refused.append(size)

    model.pooler.register_forward_hook(call)
    model(tokens(2, 6))
    assert refused == [size for size, fits in sizes.items() if not fits]
    assert layer(torch.randn(5, 48)).shape == (5, 32), "outside of a pass it is the caller who calls"


def test_what_one_model_of_a_session_may_send_no_other_may() -> None:
    parts = split(tiny_bert())
    session = Session(LocalTransport(parts.server))
    strict = build(parts.bundle, session)
    build(parts.bundle, session, allow_data_dependent_requests=True)
    layer = strict.encoder.layer[0].attention.self.query
    strict.encoder.register_forward_pre_hook(lambda *_: layer(torch.zeros(3, 1, layer.in_features)))
    with pytest.raises(InputError, match="asked for tokens that the model chose by their values"):
        strict(tokens(2, 6))


def passes(parts: Split, pad_tokens_to: int | None, texts: list[tuple[torch.Tensor, torch.Tensor]]) -> list[Any]:
    """What the server sees of a training pass over each batch, and the gradients of each."""
    transport = RecordingTransport(parts.server)
    torch.manual_seed(0)
    model = build(parts.bundle, Session(transport, pad_tokens_to=pad_tokens_to, verify_every=0), num_labels=2)
    model.get_input_embeddings().requires_grad_(True)
    found = []
    for ids, mask in texts:
        model.zero_grad()
        model(input_ids=ids, attention_mask=mask, labels=torch.zeros(len(ids), dtype=torch.int64)).loss.backward()
        found.append((transport.seen, model.get_input_embeddings().weight.grad.clone()))
        transport.seen = []
    return found


def test_texts_of_other_lengths_ask_for_the_same_where_requests_are_filled_up() -> None:
    parts = split(tiny_bert())
    short, long, hidden = torch.ones(3, 4), torch.ones(3, 9), torch.ones(3, 9)
    short[1, 2:], hidden[0, 3:], hidden[2, 1:] = 0, 0, 0
    texts = [(tokens(3, mask.shape[1], seed=seed), mask) for seed, mask in enumerate((short, long, hidden))]
    plain, filled = passes(parts, None, texts), passes(parts, 3 * 9, texts)
    assert len({tuple(seen) for seen, _ in plain}) == 3
    assert len({tuple(seen) for seen, _ in filled}) == 1
    assert {count for _, _, count in filled[0][0]} == {27}
    for (_, wanted), (_, found) in zip(plain, filled, strict=True):
        # The encryption's error: two runs of one batch differ by about 1e-5 of the largest.
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize(("count", "held"), [(0, 8), (1, 8), (8, 8), (9, 16), (17, 24)])
def test_requests_are_filled_up_to_multiples(count: int, held: int) -> None:
    parts = split(tiny_bert())
    transport = RecordingTransport(parts.server)
    name, spec = next(iter(parts.bundle.specs.items()))
    group = EncryptedGroup(name, spec, [spec.d_out], Session(transport, pad_tokens_to=8, verify_every=0))
    x = torch.randn(count, spec.d_in)
    assert group.take(0, x).shape == (count, spec.d_out)
    assert transport.seen == [(name, "forward", held)]


@pytest.mark.parametrize("count", [0, -1, (1 << 24) + 1])
def test_numbers_that_no_request_can_be_filled_up_to(count: int) -> None:
    parts = split(tiny_bert())
    with pytest.raises(InputError, match=f"pad_tokens_to is {count}"):
        Session(LocalTransport(parts.server), pad_tokens_to=count)
