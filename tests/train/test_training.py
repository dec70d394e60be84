"""The training loop: settings, equal starts in the clear and encrypted, what it learns and what it records."""

import copy
import dataclasses
import itertools
import math
import sys

import numpy as np
import pytest
import torch
import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from loops import each
from privtuner import wire
from privtuner.errors import InputError, IntegrityError, PrivtunerError
from privtuner.nn import LocalTransport, Session, build, split_pretrained, traffic_of
from privtuner.train.checkpoints import Checkpoints
from privtuner.train.dataset import ShuffledBatches, encode
from privtuner.train.fine_tuning import digest_of_frozen
from privtuner.train.learning import STILL_STEPS
from privtuner.train.table import TextTable, label_names
from privtuner.train.training import (
    Step,
    TrainConfig,
    TrainResult,
    evaluate,
    iterate_steps,
    prepare_model,
    rate_at,
    train_classifier,
)
from privtuner.wire import peek
from text_cases import rows, tiny_model_directory

# PEFT asks transformers for a property that transformers renamed.
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tiny_model_directory(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def parts(directory):
    return split_pretrained(directory)


@pytest.fixture(scope="module")
def data(directory):
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tables = [TextTable("", *map(tuple, zip(*rows(*span), strict=True))) for span in ((0, 90), (90, 30))]
    labels = label_names(*tables)
    return tuple(encode(table, tokenizer, labels) for table in tables)


CONFIG = TrainConfig(steps=12, batch_size=16, lr=2e-2, head_lr=5e-2, lora_r=4, seed=3)


def plain_model(directory):
    return AutoModelForSequenceClassification.from_pretrained(directory, num_labels=3)


def encrypted_model(parts):
    return build(parts.bundle, Session(LocalTransport(parts.server)), num_labels=3)


def quantised_model(directory, parts):
    """The clear model with the weights that the server computes with."""
    model = plain_model(directory)
    for group, spec in parts.bundle.groups.items():
        prepared = parts.server[group]
        weight = torch.from_numpy(prepared.spec.scale[:, None] * prepared.quantised()).float()
        for name, rows_ in zip(spec.members, weight.split(list(spec.members.values())), strict=True):
            model.base_model.get_submodule(name).weight.data = rows_
    return model


def trained(model):
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


@each(
    ("field", "value"),
    [
        ("steps", 0),
        ("steps", 10**9 + 1),
        ("batch_size", (1 << 20) + 1),
        ("lora_r", (1 << 16) + 1),
        ("lora_alpha", (1 << 20) + 1),
        ("max_length", (1 << 20) + 1),
        ("lr", 1e31),
        ("batch_size", 0),
        ("lora_r", -1),
        ("lora_alpha", 0),
        ("max_length", 2),
        ("lr", 0.0),
        ("lr", math.nan),
        ("head_lr", -1.0),
        ("head_lr", math.inf),
        ("clip", 0.0),
        ("warmup", 1.0),
        ("warmup", -0.1),
        ("momentum", 1.0),
        ("momentum", -0.1),
        ("momentum", math.nan),
        ("head_first", -1),
        ("head_first", (1 << 20) + 1),
        ("seed", -1),
        ("seed", 1 << 63),
        ("targets", ()),
        ("targets", ("query", "")),
    ],
)
def test_setting_out_of_range(field, value):
    with pytest.raises(InputError, match=field):
        TrainConfig(**{field: value})


def test_rate_rises_and_falls():
    config = TrainConfig(steps=10, warmup=0.2)
    assert [round(rate_at(step, config), 6) for step in range(10)] == [
        0.5,
        1.0,
        *(round(left / 9, 6) for left in range(8, 0, -1)),
    ]
    assert rate_at(10, config) == 0.0


def test_rate_of_a_single_step():
    assert rate_at(0, TrainConfig(steps=1)) == 1.0


def test_plain_and_encrypted_start_alike(directory, parts):
    plain = trained(prepare_model(plain_model(directory), CONFIG))
    torch.rand(17)
    encrypted = trained(prepare_model(encrypted_model(parts), CONFIG))
    assert plain.keys() == encrypted.keys()
    assert any("lora_A" in name for name in plain)
    assert all(torch.equal(plain[name], encrypted[name]) for name in plain)


def test_seed_sets_adapters_and_head(directory):
    one, other = (trained(prepare_model(plain_model(directory), TrainConfig(seed=seed, lora_r=4))) for seed in (0, 1))
    changed = {name for name in one if not torch.equal(one[name], other[name])}
    assert any("lora_A" in name for name in changed)
    assert any("classifier" in name for name in changed)


def test_without_a_seed_adapters_and_head_are_drawn_anew(directory):
    starts = []
    for _ in range(2):
        torch.manual_seed(0)
        starts.append(trained(prepare_model(plain_model(directory), TrainConfig(lora_r=4))))
    same = {name for name in starts[0] if torch.equal(starts[0][name], starts[1][name])}
    assert same == {name for name in starts[0] if "lora_B" in name or name.endswith("bias")}  # which start at zero


def test_preparation_leaves_the_generator_alone(directory):
    model = plain_model(directory)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    prepare_model(model, CONFIG)
    assert torch.equal(torch.rand(3), expected)


def test_only_adapters_and_head_are_trained(directory):
    model = prepare_model(plain_model(directory), CONFIG)
    assert all("lora_" in name or "classifier" in name for name in trained(model))
    assert not model.training


def test_unknown_target(parts):
    with pytest.raises(InputError, match="'nothing' matches no module"):
        prepare_model(encrypted_model(parts), TrainConfig(targets=("nothing",)))


def test_model_without_a_head(parts):
    headless = build(parts.bundle, Session(LocalTransport(parts.server)))
    with pytest.raises(InputError, match="no classification head"):
        prepare_model(headless, CONFIG)


def run(model, data, config=CONFIG):
    adapted = prepare_model(model, config)
    return adapted, train_classifier(adapted, *data, config, progress=False)


def test_training_repeats_with_the_same_seed(directory, data):
    seeds = (CONFIG.seed, CONFIG.seed, CONFIG.seed + 1)
    configs = [dataclasses.replace(CONFIG, seed=seed) for seed in seeds]
    first, second, other = (
        np.array([step.loss for step in run(plain_model(directory), data, config)[1].steps]) for config in configs
    )
    # PyTorch promises no equal bits: what is left is rounding, 2^-24 a step of the arithmetic, and no other draw.
    assert np.abs(first - second).max() < 2**-10 * np.abs(first - other).max()


def test_encrypted_training_follows_the_quantised_model(directory, parts, data):
    config = dataclasses.replace(CONFIG, steps=20)
    _, result = run(encrypted_model(parts), data, config)
    _, expected = run(quantised_model(directory, parts), data, config)
    assert (result.mode, expected.mode) == ("encrypted", "plain")
    assert [step.tokens for step in result.steps] == [step.tokens for step in expected.steps]
    # The first loss comes before any step: only the noise of one forward pass is in it.
    assert result.steps[0].loss == pytest.approx(expected.steps[0].loss, abs=1e-3)
    drift = max(abs(a.loss - b.loss) for a, b in zip(result.steps, expected.steps, strict=True))
    assert drift < 0.1 * (expected.steps[0].loss - expected.steps[-1].loss)
    assert expected.steps[-1].loss < 0.8 * expected.steps[0].loss


def test_training_learns(parts, data):
    _, result = run(encrypted_model(parts), data, dataclasses.replace(CONFIG, steps=20))
    assert result.after.accuracy > result.before.accuracy + 0.3


def test_frozen_part_stays_as_it_is(parts, data):
    model = encrypted_model(parts)
    before = copy.deepcopy(dict(model.base_model.state_dict()))
    adapted, _ = run(model, data)
    after = adapted.get_base_model().base_model.state_dict()
    for name, value in before.items():
        wrapped = name.replace(".query.", ".query.base_layer.").replace(".value.", ".value.base_layer.")
        assert torch.equal(after[wrapped], value)


def test_every_byte_is_recorded(parts, data):
    adapted, result = run(encrypted_model(parts), data)
    total = traffic_of(adapted).total()
    evaluations = (result.before, result.after)
    for field in ("bytes_up", "bytes_down"):
        assert sum(getattr(entry, field) for entry in (*result.steps, *evaluations)) == getattr(total, field) > 0
    tokens = sum(step.tokens for step in result.steps)
    assert result.bytes_up_per_token == sum(step.bytes_up for step in result.steps) / tokens


def test_padding_is_left_out_of_training_and_evaluation(parts, data):
    session = Session(LocalTransport(parts.server), verify_every=0)
    adapted = prepare_model(build(parts.bundle, session, num_labels=3), CONFIG)
    result = train_classifier(adapted, *data, CONFIG, progress=False)
    counts = traffic_of(adapted).snapshot()
    steps, tests = sum(step.tokens for step in result.steps), result.before.tokens + result.after.tokens
    layer = "encoder.layer.1.output.dense"
    assert counts[layer, "forward"].tokens == steps + tests
    assert counts[layer, "backward"].tokens == steps


def test_without_a_test_set_there_is_no_accuracy(directory, data):
    _, result = run(plain_model(directory), (data[0], None), TrainConfig(steps=1, batch_size=4))
    assert result.before is None
    assert result.after is None
    assert result.to_dict()["accuracy_after"] is None
    assert result.to_dict()["before"] is None


def test_loss_that_is_no_number_stops_training(directory, data):
    with pytest.raises(PrivtunerError, match="the loss is nan at step .*lower learning rate"):
        run(plain_model(directory), (data[0], None), TrainConfig(steps=20, batch_size=4, lr=1e30, head_lr=1e30))


def test_run_that_diverges_goes_back_to_what_was_good(directory, data):
    config = TrainConfig(steps=20, batch_size=4, lr=1e30, head_lr=1e30, seed=0)
    adapted, seen = prepare_model(plain_model(directory), config), []
    with pytest.raises(PrivtunerError, match=r"at step \d+ of 20.*the peaks were 1e\+30 for the adapters"):
        train_classifier(
            adapted, data[0], None, config, progress=False, after_step=lambda _: seen.append(trained(adapted))
        )
    # The last step is the one that spoilt it, and the one before gave the last finite loss.
    good = seen[-2] if len(seen) > 1 else trained(prepare_model(plain_model(directory), config))
    assert all(torch.equal(value, good[name]) for name, value in trained(adapted).items())
    assert math.isfinite(evaluate(adapted, data[1]).accuracy)


def test_encrypted_run_that_diverges_says_so(parts, data):
    config = TrainConfig(steps=20, batch_size=4, lr=1e30, head_lr=1e30)
    adapted = prepare_model(encrypted_model(parts), config)
    with pytest.raises(
        PrivtunerError, match=r"at step \d+ of 20.*the run diverged; use a lower learning rate"
    ) as caught:
        train_classifier(adapted, data[0], None, config, progress=False)
    assert not isinstance(caught.value, InputError)
    assert all(value.isfinite().all() for value in trained(adapted).values())


def test_run_that_diverges_in_its_last_step_is_noticed_by_the_evaluation(parts, data):
    config = TrainConfig(steps=1, batch_size=4, lr=1e30, head_lr=1e30)
    adapted = prepare_model(encrypted_model(parts), config)
    with pytest.raises(PrivtunerError, match=r"after step 1, though the steps before went well: the run diverged"):
        train_classifier(adapted, data[0], data[1], config, progress=False)


def test_model_that_is_broken_from_the_start_did_not_diverge(directory, data):
    adapted = prepare_model(plain_model(directory), CONFIG)
    with torch.no_grad():
        adapted.get_input_embeddings().weight.fill_(math.nan)
    with pytest.raises(InputError, match="^the loss is nan before anything was trained"):
        train_classifier(adapted, data[0], None, CONFIG, progress=False)


def test_step_that_breaks_off_is_taken_back(directory, data, monkeypatch):
    adapted = prepare_model(plain_model(directory), CONFIG)
    before, whole = trained(adapted), torch.optim.AdamW.step

    def broken(self, *_, **__):
        whole(self)
        raise MemoryError

    monkeypatch.setattr(torch.optim.AdamW, "step", broken)
    with pytest.raises(MemoryError):
        train_classifier(adapted, data[0], None, CONFIG, progress=False)
    assert all(torch.equal(value, before[name]) for name, value in trained(adapted).items())


def test_gradient_that_is_no_number_does_not_reach_the_weights(directory, data):
    adapted = prepare_model(plain_model(directory), CONFIG)
    before, calls = trained(adapted), []

    def spoil(gradient):
        calls.append(1)
        return gradient * math.nan if len(calls) == 2 else gradient

    next(parameter for parameter in adapted.parameters() if parameter.requires_grad).register_hook(spoil)
    with pytest.raises(PrivtunerError, match="the gradient is nan at step 2 of 12"):
        train_classifier(adapted, data[0], None, CONFIG, progress=False)
    # The first step's weights gave a finite loss but no gradient: back to those before.
    assert all(torch.equal(value, before[name]) for name, value in trained(adapted).items())


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, MemoryError])
def test_whatever_ends_training_whole_steps_are_left(parts, data, error):
    """The error comes in the middle of a backward pass, from below PyTorch's engine."""
    transport = Interrupted(parts.server, error, after=80)
    adapted = prepare_model(build(parts.bundle, Session(transport), num_labels=3), CONFIG)
    runs = []
    with pytest.raises(error):
        train_classifier(
            adapted,
            data[0],
            None,
            CONFIG,
            progress=False,
            after_step=lambda run: runs.append((len(run.steps), trained(adapted))),
        )
    assert [count for count, _ in runs] == list(range(1, len(runs) + 1))
    assert 1 <= len(runs) < CONFIG.steps
    assert all(torch.equal(value, runs[-1][1][name]) for name, value in trained(adapted).items())


@pytest.mark.parametrize(
    ("lr", "cut", "message"),
    [
        (1e-50, False, "although they have gradients: the learning rate is too small"),
        (2e-2, True, "the head learns and no gradient reaches them"),
    ],
)
def test_adapters_that_stay_as_they_are_end_the_run(directory, data, lr, cut, message):
    config = dataclasses.replace(CONFIG, lr=lr, weight_decay=0.0, momentum=0.9)
    model = plain_model(directory)
    if cut:
        model.classifier.register_forward_pre_hook(lambda _, inputs: tuple(x.detach() for x in inputs))
    seen = []
    with pytest.raises(PrivtunerError, match=f"the adapters are the same after {STILL_STEPS} steps.*{message}"):
        train_classifier(prepare_model(model, config), data[0], None, config, progress=False, after_step=seen.append)
    assert len(seen) == STILL_STEPS


def test_a_server_that_begins_to_lie_ends_the_run_with_the_layers_name_and_whole_steps(parts, data):
    class Lying(LocalTransport):
        """From some request on, answers those to one layer with the reply's words in another order."""

        left = 100

        def apply(self, layer, request):
            self.left -= 1
            honest = b"".join(super().apply(layer, request))
            if self.left >= 0 or layer != "encoder.layer.1.intermediate.dense":
                return [honest]
            head, body = wire.open("reply", honest)
            fields = {name: value for name, value in head._asdict().items() if name not in ("kind", "length")}
            return [wire.seal("reply", [body[:16], body[-2:], body[16:-2]], **fields)]

    adapted = prepare_model(build(parts.bundle, Session(Lying(parts.server), verify_every=1), num_labels=3), CONFIG)
    runs = []
    with pytest.raises(IntegrityError, match=r"layer 'encoder\.layer\.1\.intermediate\.dense'"):
        train_classifier(
            adapted, data[0], None, CONFIG, progress=False, after_step=lambda run: runs.append(trained(adapted))
        )
    assert 1 <= len(runs) < CONFIG.steps
    assert all(torch.equal(value, runs[-1][name]) for name, value in trained(adapted).items())


class Interrupted(LocalTransport):
    """Raises ``error`` at the first backward request after so many requests."""

    def __init__(self, layers, error, after):
        super().__init__(layers)
        self.error, self.left = error, after

    def apply(self, layer, request):
        self.left -= 1
        if self.left < 0 and peek(request).direction == "backward":
            raise self.error
        return super().apply(layer, request)


@pytest.mark.parametrize("momentum", [None, 0.9])
def test_run_that_goes_on_is_the_run_that_was_never_cut(directory, data, tmp_path, momentum):
    config = dataclasses.replace(CONFIG, momentum=momentum, head_first=2)
    undisturbed, whole = run(plain_model(directory), data, config)

    def cut(result):
        if len(result.steps) in (3, 4, 9) and len(result.steps) > started:
            raise KeyboardInterrupt

    seen = []
    for started in (0, 3, 4):
        torch.manual_seed(started)
        model = prepare_model(plain_model(directory), dataclasses.replace(config, seed=started) if started else config)
        with Checkpoints(tmp_path, {}, seen.append) as checkpoints, pytest.raises(KeyboardInterrupt):
            train_classifier(model, *data, config, progress=False, after_step=cut, checkpoints=checkpoints)
    with Checkpoints(tmp_path, {}, seen.append) as checkpoints:
        model, runs = prepare_model(plain_model(directory), config), []
        result = train_classifier(
            model,
            *data,
            config,
            progress=False,
            after_step=lambda run: runs.append(len(run.steps)),
            checkpoints=checkpoints,
        )
    assert [line.split(",")[0] for line in seen] == [f"going on after step {step}" for step in (3, 4, 9)]
    assert runs == [9, 10, 11, 12]
    assert [step.loss for step in result.steps] == [step.loss for step in whole.steps]
    assert [step.lr for step in result.steps] == [step.lr for step in whole.steps]
    assert result.before.accuracy == whole.before.accuracy
    assert result.after.accuracy == whole.after.accuracy
    expected = trained(undisturbed)
    assert all(torch.equal(value, expected[name]) for name, value in trained(model).items())


def test_the_frozen_part_is_known_by_its_digest(directory):
    """Whatever the seed of head and adapters, which are drawn anew where there is none."""
    models = [prepare_model(plain_model(directory), TrainConfig(lora_r=4)) for _ in range(2)]
    digests = [digest_of_frozen(model) for model in models]
    assert digests[0] == digests[1]
    with torch.no_grad():
        models[1].get_input_embeddings().weight[0, 0] += 1
    assert digest_of_frozen(models[1]) != digests[0]


def test_evaluation_counts_right_answers(directory, data):
    model = prepare_model(plain_model(directory), CONFIG)
    test = data[1]
    with torch.no_grad():
        answers = [int(model(input_ids=torch.tensor([row])).logits.argmax()) for row in test.tokens]
    expected = sum(answer == target for answer, target in zip(answers, test.targets.tolist(), strict=True))
    found = evaluate(model, test)
    assert found.accuracy == expected / len(test)
    assert (found.texts, found.tokens) == (30, sum(map(len, test.tokens)))
    assert found.bytes_up == found.bytes_down == 0


@pytest.mark.parametrize(("terminal", "fewest", "most"), [(True, 5, 1000), (False, 1, 3)])
def test_a_file_gets_few_drawings_of_the_bar(directory, data, capsys, monkeypatch, terminal, fewest, most):
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda self: terminal)
    clock = itertools.count(0, 0.2)
    monkeypatch.setattr(tqdm.std, "time", lambda: next(clock))
    adapted = prepare_model(plain_model(directory), CONFIG)
    train_classifier(adapted, data[0], None, TrainConfig(steps=12, batch_size=1))
    assert fewest <= capsys.readouterr().err.count("plain: ") <= most


def test_progress_goes_to_standard_error(parts, data, capsys):
    adapted = prepare_model(encrypted_model(parts), CONFIG)
    train_classifier(adapted, data[0], None, TrainConfig(steps=2, batch_size=4))
    out, err = capsys.readouterr()
    assert out == ""
    assert all(part in err for part in ("encrypted", "loss", "s/step", "MB/step"))


def test_result_sums_up():
    steps = [Step(3.0, 0.1, seconds, 10, 500, 700) for seconds in (1.0, 9.0, 2.0)]
    result = TrainResult("encrypted", CONFIG, steps)
    assert result.seconds_per_step == 2.0
    assert (result.bytes_up_per_token, result.bytes_down_per_token) == (50, 70)
    entry = result.to_dict()
    assert entry["final_loss"] == 3.0
    assert entry["config"]["targets"] == ("query", "value")
    assert len(entry["steps"]) == 3


def test_adapters_by_momentum_and_the_head_first(directory, data):
    """Against the same steps written out: SGD without clipping for adapters, AdamW with clipping for the head."""
    config = TrainConfig(
        steps=3, batch_size=30, warmup=0.0, lr=0.5, head_lr=5e-2, lora_r=4, seed=3, momentum=0.9, head_first=4
    )
    model, twin = (prepare_model(plain_model(directory), config) for _ in range(2))
    steps = list(iterate_steps(model, data[0], config, progress=False))
    named = [(name, value) for name, value in twin.named_parameters() if value.requires_grad]
    adapters = [value for name, value in named if ".lora_" in name]
    head = [value for name, value in named if ".lora_" not in name]
    by_sgd = torch.optim.SGD(adapters, momentum=0.9)
    by_adamw = torch.optim.AdamW(head, lr=5e-2, weight_decay=config.weight_decay)
    batches = ShuffledBatches(data[0], 30, 3)
    for number in range(3):
        batch, part = next(batches), 1 - number / 3
        for again in range(5 if number == 0 else 1):
            logits = twin(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
            loss = torch.nn.functional.cross_entropy(logits, batch.targets)
            twin.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(head, config.clip)
            by_adamw.param_groups[0]["lr"], by_sgd.param_groups[0]["lr"] = 5e-2 * part, 0.5 * part
            by_adamw.step()
            if number or again == 4:
                by_sgd.step()
        assert steps[number].loss == pytest.approx(loss.item())
        assert steps[number].lr == pytest.approx(0.5 * part)
    for name, value in named:
        torch.testing.assert_close(dict(model.named_parameters())[name], value)
