"""Classifiers with either pool, in the clear and encrypted: what the head reads, what is sent, what is loaded again."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoTokenizer,
    GPT2Config,
    GPT2Model,
    T5Config,
    T5EncoderModel,
    T5Model,
)

from nn_cases import CountingTransport, probing, weight_in_force
from privtuner.errors import InputError
from privtuner.nn import Session, split_pretrained, traffic_of
from privtuner.train import load_classifier
from privtuner.train.classifier import POOLS, clear_classifier, owner_classifier
from privtuner.train.dataset import ShuffledBatches, TextTable, encode
from privtuner.train.mean_head import MeanForSequenceClassification
from privtuner.train.report import save_adapter
from privtuner.train.training import TrainConfig, evaluate, iterate_steps, prepare_model
from text_cases import rows, tiny_model_directory, tiny_tokenizer

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]

LABELS = ("fruit", "river", "tool")
IDS = torch.tensor([[2, 5, 15, 7, 3], [2, 16, 3, 0, 0], [2, 20, 21, 3, 0]])
MASK = (IDS != 0).long()


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tiny_model_directory(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def parts(directory):
    return split_pretrained(directory, "linear-w16")  # whose bounds are tight


@pytest.fixture(scope="module")
def data(directory):
    table = TextTable("", *map(tuple, zip(*rows(0, 24), strict=True)))
    return encode(table, AutoTokenizer.from_pretrained(directory), LABELS)


def logits(model, ids=IDS, mask=MASK):
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask).logits


def randomised(model):
    """Every trained value away from where it starts, so that each of them shows in the outputs."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3, generator=generator)
    return model


def test_head_reads_the_mean_of_each_text_alone(directory):
    model = randomised(prepare_model(clear_classifier(directory, LABELS, "mean"), TrainConfig(lora_r=0, seed=1)))
    encoder = AutoModel.from_pretrained(directory).eval()
    head = model.get_base_model().classifier
    for row, length in enumerate(MASK.sum(1).tolist()):
        with torch.no_grad():
            states = encoder(input_ids=IDS[row : row + 1, :length]).last_hidden_state
            expected = head(states.mean(1))
        assert torch.allclose(logits(model)[row], expected[0], atol=1e-5)
        alone = logits(model, IDS[row : row + 1, :length], None)
        assert torch.allclose(alone, expected, atol=1e-5)


def test_first_is_the_model_s_own_classifier(directory):
    assert type(clear_classifier(directory, LABELS, "first")).__name__ == "BertForSequenceClassification"


@pytest.mark.parametrize("pool", POOLS)
def test_encrypted_head_reads_the_same(directory, parts, pool):
    """The clear model with the weights in force agrees to within the error bounds of all products."""
    config = TrainConfig(lora_r=2, seed=1)
    twin = randomised(prepare_model(clear_classifier(directory, LABELS, pool), config)).double()
    transport = CountingTransport(parts.server)
    encrypted = randomised(prepare_model(owner_classifier(parts.bundle, Session(transport), LABELS, pool), config))
    served = 0
    for wire, spec in parts.bundle.groups.items():
        weight = torch.from_numpy(weight_in_force(parts.server[wire]))
        for name, part in zip(spec.members, weight.split(list(spec.members.values())), strict=True):
            if pool == "first" or not name.startswith("pooler"):
                layer = twin.get_base_model().base_model.get_submodule(name)
                getattr(layer, "base_layer", layer).weight.data = part
                served += 1
    assert served == 12 + (pool == "first")
    along = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    with probing(twin, parts) as probe:
        expected = (twin(input_ids=IDS, attention_mask=MASK).logits * along).sum()
        bound = probe.bound(expected)
    got = (logits(encrypted).double() * along).sum()
    unmasked = (logits(twin, mask=torch.ones_like(MASK)) * along).sum()
    assert abs(got - expected) < bound < abs(unmasked - expected) / 10


def test_no_padding_is_sent_and_no_pooler(parts, data):
    transport = CountingTransport(parts.server)
    model = prepare_model(
        owner_classifier(parts.bundle, Session(transport, verify_every=0), LABELS, "mean"),
        TrainConfig(lora_r=2, seed=1),
    )
    batch = next(ShuffledBatches(data, 8, 0))
    assert not batch.attention_mask.all()
    model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.targets).loss.backward()
    counts = traffic_of(model).snapshot()
    assert {layer for layer, _ in counts} == {layer for layer in parts.server if "pooler" not in layer}
    assert {entry.tokens for entry in counts.values()} == {batch.tokens}


@pytest.mark.parametrize("pool", POOLS)
def test_head_alone(parts, data, tmp_path, pool):
    """No gradient goes to the server, no adapter is made, and what is saved is the head."""
    config = TrainConfig(steps=4, batch_size=8, lora_r=0, seed=1, head_lr=0.05)
    transport = CountingTransport(parts.server)
    model = prepare_model(owner_classifier(parts.bundle, Session(transport, verify_every=0), LABELS, pool), config)
    trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    assert {name.rpartition("classifier")[1] for name in trained} == {"classifier"}
    steps = list(iterate_steps(model, data, config, progress=False))
    assert steps[-1].loss < steps[0].loss
    assert all(not torch.equal(dict(model.named_parameters())[name], value) for name, value in trained.items())
    assert {direction for _, direction in traffic_of(model).snapshot()} == {"forward"}
    save_adapter(model, LABELS, tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {tuple(value.shape) for value in saved.values()} == {(3, 32), (3,)}


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("rank", [0, 3])
def test_what_is_trained_encrypted_is_loaded_on_the_clear_model(directory, parts, data, tmp_path, pool, rank):
    config = TrainConfig(steps=2, batch_size=8, lora_r=rank, seed=1)
    owner = owner_classifier(parts.bundle, Session(CountingTransport(parts.server), verify_every=0), LABELS, pool)
    model = randomised(prepare_model(owner, config))
    save_adapter(model, LABELS, tmp_path)
    loaded = load_classifier(directory, tmp_path)
    assert not loaded.training
    assert loaded.config.id2label == dict(enumerate(LABELS))
    expected = randomised(prepare_model(clear_classifier(directory, LABELS, pool), config))
    # A float32 weight that is another one differs by 2**-24 of itself; double precision rounds a million times finer.
    assert torch.allclose(logits(loaded.double()), logits(expected.double()), rtol=0, atol=2.0**-40)
    assert evaluate(loaded, data).texts == len(data)


def test_no_gradient_goes_below_the_first_adapter(parts, data):
    config = TrainConfig(steps=1, batch_size=4, lora_r=2, seed=1, targets=("layer.1.attention.self.query",))
    model = prepare_model(
        owner_classifier(parts.bundle, Session(CountingTransport(parts.server), verify_every=0), LABELS), config
    )
    list(iterate_steps(model, data, config, progress=False))
    asked = {layer for layer, direction in traffic_of(model).snapshot() if direction == "backward"}
    assert asked == {f"encoder.layer.1.{name}.dense" for name in ("attention.output", "intermediate", "output")}


def test_decoders_have_a_mean_as_well(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        GPT2Model(GPT2Config(vocab_size=30, n_positions=16, n_embd=16, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    model = clear_classifier(tmp_path, LABELS, "mean")
    full = logits(model, IDS[1:2, :3], None)
    assert torch.allclose(logits(model)[1:2], full, atol=1e-5)


def test_last_token_is_the_last_before_the_tokenizer_s_padding(tmp_path):
    """The configuration names another padding token, or none; padded or not, a text has one answer."""
    config = GPT2Config(vocab_size=30, n_positions=16, n_embd=16, n_layer=1, n_head=2, pad_token_id=7)
    GPT2Model(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)  # pads with 0
    model = prepare_model(clear_classifier(tmp_path, LABELS, "first"), TrainConfig(lora_r=0, seed=1))
    save_adapter(randomised(model), LABELS, tmp_path / "adapter")
    loaded = load_classifier(tmp_path, tmp_path / "adapter")
    for row, length in enumerate(MASK.sum(1).tolist()):
        alone = logits(loaded, IDS[row : row + 1, :length], None)
        assert torch.allclose(logits(loaded)[row], alone[0], atol=1e-5)


def test_pool_that_does_not_suit_the_model(directory, parts):
    config = T5Config(vocab_size=30, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8)
    with pytest.raises(InputError, match="a t5 has a decoder"):
        MeanForSequenceClassification(T5Model(config))
    assert MeanForSequenceClassification(T5EncoderModel(config)).classifier.in_features == 16
    for make in (
        lambda: clear_classifier(directory, LABELS, "last"),
        lambda: owner_classifier(
            parts.bundle, Session(CountingTransport(parts.server), verify_every=0), LABELS, "last"
        ),
    ):
        with pytest.raises(InputError, match="pool is 'last'; give one of mean, first"):
            make()


def test_pooler_that_would_be_made_up(directory, tmp_path):
    """It would be frozen at random numbers, and at others where the adapter is loaded."""
    AutoModelForMaskedLM.from_pretrained(directory).save_pretrained(tmp_path)  # without a pooler
    parts = split_pretrained(tmp_path)
    transport = CountingTransport(parts.server)
    for make in (
        lambda pool: clear_classifier(tmp_path, LABELS, pool),
        lambda pool: owner_classifier(parts.bundle, Session(transport), LABELS, pool),
    ):
        with pytest.raises(InputError, match=r"the weights lack 'pooler\.dense', .* use the pool mean"):
            make("first")
        make("mean")


@pytest.fixture
def saved(directory, tmp_path):
    model = prepare_model(clear_classifier(directory, LABELS, "mean"), TrainConfig(lora_r=2, seed=1))
    save_adapter(model, LABELS, tmp_path / "adapter")
    return tmp_path / "adapter"


def test_adapter_of_another_model(saved, tmp_path):
    wider = tiny_model_directory(tmp_path / "wider", hidden_size=48)
    with pytest.raises(InputError, match="does not fit .* size mismatch for [^\\n]*$"):
        load_classifier(wider, saved)
    deeper = tiny_model_directory(tmp_path / "deeper", num_hidden_layers=3)
    with pytest.raises(InputError, match="does not fit .*missing adapter keys"):
        load_classifier(deeper, saved)
    shallower = tiny_model_directory(tmp_path / "shallower", num_hidden_layers=1)
    with pytest.raises(InputError, match=r"does not fit .*no place for '.*layer\.1\.attention"):
        load_classifier(shallower, saved)


def test_adapter_that_is_none(directory, saved, tmp_path):
    with pytest.raises(InputError, match=r"cannot read .*labels\.json"):
        load_classifier(directory, tmp_path)
    (saved / "adapter_model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(InputError, match="cannot load an adapter from"):
        load_classifier(directory, saved)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (saved / name).unlink()
        with pytest.raises(InputError, match=f"no adapter in .*: it has no {name}"):
            load_classifier(directory, saved)


def test_model_that_is_none(saved, tmp_path):
    with pytest.raises(InputError, match=r"no model in .*: config\.json is missing"):
        load_classifier(tmp_path, saved)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(InputError, match="no weights in"):
        load_classifier(broken, saved)
