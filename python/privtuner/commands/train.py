"""``privtuner train``: fine-tunes a text classifier through a server, or in the clear."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from privtuner.commands.common import (
    Progress,
    add_engine,
    add_threads,
    quiet_transformers,
    report_sealed,
    say,
    set_threads,
)
from privtuner.commands.stop import Stop
from privtuner.errors import EngineError, InputError, PrivtunerError
from privtuner.paths import ensure_writable, ensure_writable_file

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from privtuner.service import RemoteTransport
    from privtuner.train.classifier import MeanForSequenceClassification
    from privtuner.train.dataset import Encoded, TextTable
    from privtuner.train.report import AdapterKeeper
    from privtuner.train.training import TrainConfig, TrainResult

__all__ = ["add"]


def add(commands: Any) -> None:
    """Declare the command."""
    train = commands.add_parser(
        "train",
        help="fine-tune a text classifier through a server, or in the clear",
        description="Fine-tune a text classifier with LoRA through a server that sees neither texts nor labels, or in "
        "the clear for comparison. Writes an adapter that PEFT loads onto the clear model.",
    )
    where = train.add_mutually_exclusive_group(required=True)
    where.add_argument("--server", metavar="HOST:PORT", help="a running 'privtuner serve'")
    where.add_argument("--plain", action="store_true", help="train in the clear, for comparison; needs --model")
    train.add_argument("--model", metavar="DIR", help="model directory, with --plain only")
    train.add_argument(
        "--data", required=True, metavar="CSV", help="training texts: a header, a column of texts and one of labels"
    )
    train.add_argument(
        "--eval", metavar="CSV", help="test texts, of the same form; without them no accuracy is measured"
    )
    train.add_argument("--text-column", default="text", metavar="NAME", help="of the texts (default %(default)s)")
    train.add_argument("--label-column", default="label", metavar="NAME", help="of the labels (default %(default)s)")
    train.add_argument(
        "--delimiter", default=",", metavar="C", help="of fields: a character, tab or semicolon (default ,)"
    )
    train.add_argument("--encoding", metavar="NAME", help="of the texts (default: as a byte-order mark says, or utf-8)")
    train.add_argument("--out", required=True, metavar="DIR", help="where the adapter, numbers and loss curve go")
    train.add_argument("--json", metavar="FILE", help="write the run's numbers to this file too")
    train.add_argument("--steps", type=int, default=150, metavar="N", help="optimiser steps (default %(default)s)")
    train.add_argument("--batch-size", type=int, default=64, metavar="N", help="texts a step (default %(default)s)")
    train.add_argument(
        "--lr", type=float, default=5e-3, metavar="X", help="peak learning rate, adapters (default %(default)s)"
    )
    train.add_argument(
        "--head-lr", type=float, default=3e-2, metavar="X", help="peak learning rate, head (default %(default)s)"
    )
    train.add_argument(
        "--lora-r", type=int, default=8, metavar="R", help="rank of the adapters (default %(default)s); 0: head alone"
    )
    train.add_argument(
        "--targets",
        default="query,value",
        metavar="A,B",
        help="layers that get adapters, by the ends of their names (default %(default)s)",
    )
    train.add_argument(
        "--max-length", type=int, default=64, metavar="N", help="tokens at which texts are cut (default %(default)s)"
    )
    train.add_argument(
        "--pool",
        choices=["mean", "first"],
        default="mean",
        help="what the head reads: the mean of a text's last hidden states (default), or the first token or the last, "
        "as the model's own classifier",
    )
    train.add_argument(
        "--seed",
        type=int,
        metavar="N",
        help="make batches, adapters and head repeatable; a server that guesses N learns the length of every text "
        "(default: drawn from the operating system)",
    )
    add_engine(train, "what encrypts: native (default), or openfhe with keys of this run; as the server's")
    train.add_argument(
        "--device", default="cpu", metavar="D", help="what trains and encrypts: cpu (default), cuda, or cuda:1"
    )
    train.add_argument("--seal", choices=["mlp"], help="refuse a server that does not seal its feed-forward blocks")
    add_threads(train)
    train.set_defaults(run=run)


@dataclass(frozen=True)
class _Task:
    """What is to be done, checked as far as it can be without a model."""

    config: TrainConfig
    device: str
    train: TextTable
    test: TextTable | None
    labels: tuple[str, ...]
    out: Path


def run(arguments: argparse.Namespace) -> int:
    """Train, and write the adapter, the numbers and the loss curve."""
    _check_options(arguments)
    task = _task(arguments)
    stop: Stop = arguments.stop
    # From here on there is something to lose, and a connection that no exception may come into.
    with stop.deferred(), _connection(arguments.server, stop) as transport:
        adapted, encoded, encoded_test = _prepared(task, transport, arguments)
        adapted.register_forward_pre_hook(lambda *_: stop.check())
        keeper, result, failure = _train(adapted, encoded, encoded_test, task)
        sizes = {"labels": len(task.labels), "training_texts": len(task.train.texts)}
        numbers = {**result.to_dict(), **sizes, "pool": arguments.pool}
        if transport:
            numbers["engine"] = arguments.engine
            numbers["server"] = None if failure else _server_counts(transport)
        written, failed = _write(result, numbers, task.out, arguments.json)
        _print_result(result, task, keeper.place, written)
        # In the order in which things went wrong.
        for error in (failure, keeper.failure, failed):
            if error is not None:
                raise error
    return 0


def _check_options(arguments: argparse.Namespace) -> None:
    if arguments.plain and not arguments.model:
        raise InputError("--plain needs --model DIR: the weights to train with in the clear")
    if arguments.server and arguments.model:
        raise InputError("--model goes with --plain only; with --server the model is the server's")
    if arguments.plain and arguments.seal:
        raise InputError("--seal goes with --server only: nothing is sealed in the clear")
    if arguments.plain and arguments.engine != "native":
        raise InputError("--engine goes with --server only: nothing is encrypted in the clear")


def _task(arguments: argparse.Namespace) -> _Task:
    """Check all that needs neither a model nor a server, the quickest first."""
    if arguments.server:
        from privtuner.service.protocol import parse_address

        parse_address(arguments.server)
        # Read when PyTorch or OpenFHE loads: idle threads would spin on cores that encryption and server could use.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    device = _training_device(arguments.device)
    if arguments.engine == "openfhe":
        from privtuner.openfhe.library import library

        library()  # an engine that is missing should show before anything else is done
    out = ensure_writable(arguments.out)
    if arguments.json:
        ensure_writable_file(arguments.json)
    set_threads(arguments.threads)
    if arguments.threads and arguments.engine == "openfhe":
        from privtuner import openfhe

        openfhe.set_num_threads(arguments.threads)

    import matplotlib  # noqa: F401 - draws at the very end: what is missing should show now

    from privtuner.train import dataset
    from privtuner.train.training import TrainConfig

    quiet_transformers()
    config = TrainConfig(
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        lr=arguments.lr,
        head_lr=arguments.head_lr,
        lora_r=arguments.lora_r,
        targets=tuple(target.strip() for target in arguments.targets.split(",")),
        seed=arguments.seed,
        max_length=arguments.max_length,
    )
    columns = (arguments.text_column, arguments.label_column)
    form = {"delimiter": arguments.delimiter, "encoding": arguments.encoding}
    train = dataset.read_csv(arguments.data, *columns, **form)
    test = dataset.read_csv(arguments.eval, *columns, **form) if arguments.eval else None
    return _Task(config, device, train, test, dataset.label_names(train, test), out)


def _prepared(
    task: _Task, transport: RemoteTransport | None, arguments: argparse.Namespace
) -> tuple[PeftModel, Encoded, Encoded | None]:
    """Return the model with adapters, and the texts as it takes them. What could fail after hours has been tried then.

    Raises:
        privtuner.errors.InputError: the model cannot take the texts or the adapters, or an adapter cannot be saved.
    """
    from privtuner.train import dataset, limits, report
    from privtuner.train.training import EVAL_TOKENS, prepare_model

    model, tokenizer = (
        _encrypted_model(transport, task.labels, arguments) if transport else _plain_model(task.labels, arguments)
    )
    longest = task.config.max_length
    if (positions := limits.positions(model)) is not None and positions < longest:
        say(f"texts are cut at the {positions} tokens that the model has positions for, not at {longest}")
        longest = positions
    tables = [dataset.encode(table, tokenizer, task.labels, longest) for table in (task.train, task.test) if table]
    train, *test = limits.fitted(model, tables)
    model.config.pad_token_id = train.pad_id
    if transport and (sealed := transport.hello()["sealed"]):
        tested = sum(1 for table in test for _ in dataset.length_batches(table, EVAL_TOKENS))
        report_sealed(2 * sealed * (task.config.steps + tested))  # forward and backward; before and after
    adapted = prepare_model(model, task.config).to(task.device)
    report.check_folder(adapted, task.labels, task.out)
    return adapted, train, test[0] if test else None


def _train(
    adapted: PeftModel, train: Encoded, test: Encoded | None, task: _Task
) -> tuple[AdapterKeeper, TrainResult, BaseException | None]:
    """Return where the adapter is, what training did, and what went wrong after its last step.

    What ends it before is raised. The adapter is on disk either way.
    """
    from privtuner.train.report import AdapterKeeper
    from privtuner.train.training import train_classifier

    keeper = AdapterKeeper(adapted, task.labels, task.out, say)
    try:
        return keeper, train_classifier(adapted, train, test, task.config, after_step=keeper), None
    except BaseException as error:
        if keeper.place is None:
            _rescue(keeper)
        if keeper.complete and keeper.result:
            return keeper, keeper.result, error
        raise


def _rescue(keeper: AdapterKeeper) -> None:
    with suppress(OSError):  # the terminal may be gone
        try:
            place = keeper.rescue()
        except Exception as failure:
            say(f"the adapter as it stood could not be saved: {failure}")
        else:
            say(f"the adapter as it stood is in {place}")


def _server_counts(transport: RemoteTransport) -> dict[str, Any] | None:
    try:
        return transport.counts().to_dict()
    except PrivtunerError as error:
        say(f"warning: what the server counted is left out: {error}")
        return None


def _write(
    result: TrainResult, numbers: dict[str, Any], out: Path, copy: str | None
) -> tuple[list[Path], PrivtunerError | None]:
    """Write the numbers and the curve; return what was written, and the first failure."""
    from privtuner.train import report

    curve = {result.mode: [step.loss for step in result.steps]}
    title = f"{result.mode} fine-tuning, {result.config.steps} steps of {result.config.batch_size} texts"
    work: dict[Path, Callable[[Path], None]] = {
        out / "metrics.json": lambda path: report.save_json(numbers, path),
        out / "loss.png": lambda path: report.save_loss_curve(curve, path, title),
    }
    if copy:
        work[Path(copy)] = work[out / "metrics.json"]
    written: list[Path] = []
    failure: PrivtunerError | None = None
    for path, write in work.items():
        try:
            write(path)
            written.append(path)
        except PrivtunerError as error:
            failure = failure or error
    return written, failure


def _training_device(name: str) -> str:
    """The device as PyTorch calls it, once it is known that PyTorch and CuPy can use it.

    Raises:
        InputError: no such name. EngineError: PyTorch, CuPy, the driver or the GPU is missing.
    """
    if name == "cpu":
        return name
    from privtuner import cuda

    if "," in name:
        raise InputError(f"--device {name}: training takes one GPU, cuda or cuda:1")
    device = cuda.devices("cuda:0" if name == "cuda" else name)[0].name
    import torch

    if not torch.cuda.is_available():
        raise EngineError(
            f"PyTorch {torch.__version__} cannot use a GPU: install its CUDA build (https://pytorch.org/get-started)"
        )
    return device


@contextmanager
def _connection(address: str | None, stop: Stop) -> Iterator[RemoteTransport | None]:
    """Connect, where there is an address, until the block ends or the user asks to stop."""
    if address is None:
        yield None
        return
    from privtuner.service import RemoteTransport
    from privtuner.service.protocol import is_loopback, parse_address

    with RemoteTransport(address) as transport, stop.on_stop(transport.close):
        if not is_loopback(parse_address(address)[0]):
            say(
                f"warning: {address} is another machine and the connection has no TLS: activations are encrypted, "
                "but somebody in between could exchange the model you fetch"
            )
        yield transport


def _encrypted_model(
    transport: RemoteTransport, labels: Sequence[str], arguments: argparse.Namespace
) -> tuple[PreTrainedModel | MeanForSequenceClassification, PreTrainedTokenizerBase]:
    from privtuner.train.classifier import owner_classifier

    hello = transport.hello()
    sealed, engine = hello["sealed"], hello.get("engine", "native")
    if arguments.seal and not sealed:
        raise InputError(
            f"the server at {transport.address} does not seal its feed-forward blocks; start it with "
            f"'privtuner serve --seal {arguments.seal}', or train without --seal"
        )
    if engine != arguments.engine:
        raise InputError(
            f"the server at {transport.address} answers requests of the engine {engine}: train with --engine {engine}, "
            f"or start it with 'privtuner serve --engine {arguments.engine}'"
        )
    say(f"fetching what the owner needs of {hello['model']}, preset {hello['preset']}")
    if sealed:
        say(f"{sealed} feed-forward blocks are sealed, which is slow; each is reported")
    with Progress("fetching", "MB", scale=1e6) as progress:
        bundle = transport.fetch_bundle(progress)
    # The GPU is PyTorch's and CuPy's: what one computes the other reads where it lies.
    model = owner_classifier(bundle, transport, labels, arguments.pool, engine=engine, device=arguments.device)
    return model, bundle.tokenizer()


def _plain_model(
    labels: Sequence[str], arguments: argparse.Namespace
) -> tuple[PreTrainedModel | MeanForSequenceClassification, PreTrainedTokenizerBase]:
    from privtuner.nn.pretrained import load_tokenizer
    from privtuner.train.classifier import clear_classifier

    return clear_classifier(arguments.model, labels, arguments.pool), load_tokenizer(arguments.model)


def _print_result(result: TrainResult, task: _Task, adapter: Path | None, written: Sequence[Path]) -> None:
    config = result.config
    trained = f"LoRA r = {config.lora_r} on {','.join(config.targets)}" if config.lora_r else "the head alone"
    lines = [
        ("mode", result.mode),
        ("data", f"{len(task.train.texts)} training texts, {len(task.labels)} labels"),
        ("steps", f"{config.steps} of {config.batch_size} texts, {trained}"),
        ("loss", f"{result.steps[0].loss:.3f} at the first step, {result.steps[-1].loss:.3f} at the last"),
    ]
    if result.before and result.after:
        accuracy = f"{result.before.accuracy:.1%} before, {result.after.accuracy:.1%} after"
        lines.append(("accuracy", f"{accuracy}, on {result.after.texts} test texts"))
    lines.append(("time", f"{result.seconds_per_step:.3f} s a step (median)"))
    if result.mode == "encrypted":
        up, down = result.bytes_up_per_token, result.bytes_down_per_token
        lines.append(("traffic", f"{up:,.0f} bytes a token to the server, {down:,.0f} back, forward and backward"))
    files = [adapter / "adapter", adapter / "labels.json", *written] if adapter else written
    folders = {path.parent: [file.name for file in files if file.parent == path.parent] for path in files}
    lines.append(("written", "; ".join(f"{folder}: {', '.join(names)}" for folder, names in folders.items())))
    for name, text in lines:
        print(f"{name:10}{text}")
