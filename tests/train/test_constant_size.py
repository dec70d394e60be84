"""What the sizes of a run's requests tell of its texts, with and without a constant size."""

import pytest
import torch

from nn_cases import RecordingTransport
from privtuner.errors import InputError
from privtuner.nn import Session, split_pretrained
from privtuner.train import clear_classifier, owner_classifier
from privtuner.train.dataset import encode, ordered_batches
from privtuner.train.fine_tuning import prepare
from privtuner.train.table import TextTable, label_names
from privtuner.train.training import TrainConfig, prepare_model, train_classifier
from text_cases import rows, telling_tokenizer, tiny_tokenizer

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]

CONFIG = TrainConfig(steps=2, batch_size=4, lora_r=2, seed=0, max_length=12)


def table(start, change=lambda text: text):
    texts, labels = zip(*rows(start, 10), strict=True)
    return TextTable("", tuple(map(change, texts)), labels)


def seen(parts, train, test, tokenizer, constant_size):
    """Layer, direction and tokens of every request of a run, evaluations and all."""
    transport, labels = RecordingTransport(parts.server), label_names(train, test)
    config = TrainConfig(**{**vars(CONFIG), "constant_size": constant_size})
    model = owner_classifier(parts.bundle, Session(transport, verify_every=0), labels)
    train_classifier(*prepare(model, tokenizer, train, test, labels, config), config, progress=False)
    return transport.seen


@pytest.fixture(scope="module")
def parts(model):
    return split_pretrained(model)


def test_texts_of_other_lengths_give_the_same_requests(parts):
    short, long = (table(0), table(10)), (table(0, lambda text: f"{text} and now and now"), table(10))
    cases = [(tables, tiny_tokenizer()) for tables in (short, long)]
    telling = [seen(parts, *tables, tokenizer, False) for tables, tokenizer in cases]
    assert telling[0] != telling[1]
    constant = [seen(parts, *tables, tokenizer, True) for tables, tokenizer in cases]
    assert constant[0] == constant[1]
    assert {tokens for _, _, tokens in constant[0]} == {4 * 12}


def test_a_tokenizer_that_spells_a_word_out_reads_it_from_sizes_and_from_none_of_constant_size(parts):
    """The server chooses the tokenizer; two data sets differ in a word, and not in its length."""
    changes = [lambda text, word=word: text.replace("apple", word) for word in ("apple", "melon")]
    tables = [(table(0, change), table(10, change)) for change in changes]
    for constant_size in (False, True):
        honest, telling = (
            [seen(parts, *both, tokenizer, constant_size) for both in tables]
            for tokenizer in (tiny_tokenizer(), telling_tokenizer("apple"))
        )
        assert honest[0] == honest[1]
        assert (telling[0] == telling[1]) == constant_size


def test_batches_of_a_constant_number_of_texts():
    tokenizer, data = tiny_tokenizer(), table(0)
    encoded = encode(data, tokenizer, label_names(data), 12)
    batches = list(ordered_batches(encoded, 4))
    assert [len(batch.targets) for batch in batches] == [4, 4, 2]
    assert torch.equal(torch.cat([batch.targets for batch in batches]), encoded.targets)


def test_nothing_is_filled_up_in_the_clear(model):
    with pytest.raises(InputError, match="has no encrypted layer"):
        prepare_model(clear_classifier(model, ["a", "b"]), TrainConfig(constant_size=True))
