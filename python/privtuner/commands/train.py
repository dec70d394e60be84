"""``privtuner train``: fine-tunes a text classifier through a server, or in the clear."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from privtuner.commands import sealed
from privtuner.commands.common import (
    add_scheme,
    add_threads,
    quiet_transformers,
    say,
    set_threads,
)
from privtuner.commands.line import add_bundle, add_line, check_line, connection, fetch, given_line
from privtuner.commands.privacy import add_privacy, given_privacy, privacy_of
from privtuner.commands.stop import Stop
from privtuner.errors import EngineError, InputError, PrivtunerError
from privtuner.paths import ensure_writable, ensure_writable_file
from privtuner.schemes import SCHEMES, scheme

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from privtuner.service import RemoteTransport
    from privtuner.train.checkpoints import Checkpoints
    from privtuner.train.dataset import Encoded, TextTable
    from privtuner.train.mean_head import MeanForSequenceClassification
    from privtuner.train.training import TrainConfig, TrainResult

__all__ = ["add", "run"]

_LR, _LORA_R, _TARGETS, _MAX_LENGTH = 5e-3, 8, "query,value", 64
_BATCH = 64


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description = (
        "Fine-tune a text classifier with LoRA through a server that sees neither texts nor labels, or in "
        "the clear for comparison. Writes an adapter that PEFT loads onto the clear model."
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--server", metavar="HOST:PORT", help="a running 'privtuner serve'")
    where.add_argument("--plain", action="store_true", help="train in the clear, for comparison; needs --model")
    parser.add_argument("--model", metavar="DIR", help="model directory, with --plain only")
    parser.add_argument(
        "--data", required=True, metavar="CSV", help="training texts: a header, a column of texts and one of labels"
    )
    parser.add_argument(
        "--eval", metavar="CSV", help="test texts, of the same form; without them no accuracy is measured"
    )
    parser.add_argument("--text-column", default="text", metavar="NAME", help="of the texts (default %(default)s)")
    parser.add_argument("--label-column", default="label", metavar="NAME", help="of the labels (default %(default)s)")
    parser.add_argument(
        "--delimiter", default=",", metavar="C", help="of fields: a character, tab or semicolon (default ,)"
    )
    parser.add_argument(
        "--encoding", metavar="NAME", help="of the texts (default: as a byte-order mark says, or utf-8)"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="where the adapter, numbers and loss curve go")
    parser.add_argument("--json", metavar="FILE", help="write the run's numbers to this file too")
    parser.add_argument("--steps", type=int, default=150, metavar="N", help="optimiser steps (default %(default)s)")
    parser.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        help="texts a step (default 64; sealed: as many as a pass takes, which costs the same)",
    )
    parser.add_argument(
        "--lr",
        type=float,
        metavar="X",
        help=f"peak learning rate, adapters (default {_LR}; sealed: {sealed.LR}, of SGD with momentum)",
    )
    parser.add_argument(
        "--head-lr", type=float, default=3e-2, metavar="X", help="peak learning rate, head (default %(default)s)"
    )
    parser.add_argument(
        "--head-first",
        type=int,
        default=0,
        metavar="N",
        help="steps of the head alone on the first batch, before the adapters take any (default 0); sealed: they take "
        "no pass at the server",
    )
    parser.add_argument(
        "--lora-r", type=int, metavar="R", help=f"rank of the adapters (default {_LORA_R}); 0: head alone"
    )
    parser.add_argument(
        "--targets",
        metavar="A,B",
        help=f"layers that get adapters, by the ends of their names (default {_TARGETS})",
    )
    parser.add_argument(
        "--max-length",
        type=int,
        metavar="N",
        help=f"tokens at which texts are cut (default {_MAX_LENGTH}; sealed: what the server's model takes)",
    )
    parser.add_argument(
        "--constant-size",
        action="store_true",
        help="fill up every request to as many tokens as --batch-size texts of --max-length have, so that sizes tell "
        "nothing of the texts; costs what these tokens cost",
    )
    parser.add_argument(
        "--verify-every",
        type=int,
        metavar="K",
        help="check one in K of the server's replies, drawn at random, by secret combinations (default 4; 1: all, 0: "
        "none)",
    )
    parser.add_argument(
        "--pool",
        choices=["mean", "first"],
        help="what the head reads: the mean of a text's last hidden states (default), or the first token or the last, "
        "as the model's own classifier; sealed: the server's choice",
    )
    parser.add_argument(
        "--seed",
        type=int,
        metavar="N",
        help="make batches, adapters and head repeatable; a server that guesses N learns the length of every text "
        "(default: drawn from the operating system)",
    )
    add_scheme(parser, "what requests carry, as the server was started with")
    parser.add_argument(
        "--device", default="cpu", metavar="D", help="what trains and encrypts: cpu (default), cuda, or cuda:1"
    )
    parser.add_argument(
        "--seal",
        choices=["model"],
        help="the server's model is sealed: its adapters are trained there as ciphertexts, the head here; rank and "
        "targets are the server's",
    )
    parser.add_argument(
        "--momentum",
        type=float,
        metavar="X",
        help=f"of the adapters of a sealed model (default {sealed.MOMENTUM}); with --plain: train them as a sealed "
        "model's are, by SGD with this momentum, without warm-up",
    )
    parser.add_argument(
        "--release", action="store_true", help="ask the server of a sealed model for the adapters at the end"
    )
    checkpoints = parser.add_mutually_exclusive_group()
    checkpoints.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run whose checkpoint is in --out, and fail if there is none (default: go on if there is "
        "one, else begin)",
    )
    checkpoints.add_argument(
        "--overwrite", action="store_true", help="begin anew, whatever run's checkpoint is in --out"
    )
    parser.add_argument(
        "--save-every", type=int, default=1, metavar="N", help="steps from one checkpoint to the next (default 1)"
    )
    add_privacy(parser)
    add_threads(parser)
    add_line(parser)
    add_bundle(parser)


@dataclass(frozen=True)
class _Task:
    """The arguments of a run, checked as far as possible without a model."""

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
    if arguments.seal:
        return _run_sealed(task, arguments)
    from privtuner.train.fine_tuning import end_well, fine_tune, write_results
    from privtuner.train.report import AdapterKeeper

    stop: Stop = arguments.stop
    # From here on there is something to lose, and a connection that no exception may come into.
    with stop.defer(), _connection(arguments, stop) as transport:
        adapted, encoded, encoded_test = _prepare(task, transport, arguments)
        adapted.register_forward_pre_hook(lambda *_: stop.check())
        keeper = AdapterKeeper(adapted, task.labels, task.out, say)
        with _checkpoints(task, adapted, (encoded, encoded_test), transport, arguments) as checkpoints:
            result, failure = fine_tune(adapted, encoded, encoded_test, task.config, keeper, say, checkpoints)
            sizes = {"labels": len(task.labels), "training_texts": len(task.train.texts)}
            numbers = {**result.to_dict(), **sizes, "pool": _pool(arguments)}
            if transport:
                numbers["scheme"] = arguments.scheme
                numbers["server"] = None if failure else _server_counts(transport)
            written, failed = write_results(result, numbers, task.out, arguments.json)
            _print_result(result, task, keeper.place, written)
            # In the order in which things went wrong.
            for error in (failure, keeper.failure, failed):
                if error is not None:
                    raise error
            end_well(checkpoints, task.out)
    return 0


def _checkpoints(
    task: _Task,
    model: PeftModel,
    data: tuple[Encoded, Encoded | None],
    transport: RemoteTransport | None,
    arguments: argparse.Namespace,
) -> Checkpoints:
    """Return the checkpoints of the run, and say where it goes on."""
    from privtuner.train.checkpoints import FOLDER, Checkpoints
    from privtuner.train.fine_tuning import describe_run, digest_of_frozen

    others = {"pool": _pool(arguments), "scheme": arguments.scheme if transport else None}
    others["model"] = transport.hello()["bundle"] if transport else digest_of_frozen(model)
    run = describe_run(task.config, *data, task.labels, others)
    checkpoints = Checkpoints(task.out / FOLDER, run, say, arguments.save_every)
    if arguments.overwrite:
        checkpoints.clear()
    elif arguments.resume and not checkpoints.there:
        checkpoints.close()
        raise InputError(f"--resume: there is no checkpoint in {checkpoints.directory}; leave it out to begin")
    return checkpoints


def _run_sealed(task: _Task, arguments: argparse.Namespace) -> int:
    """Train on a sealed model; the same files and lines as else."""
    from privtuner.train.fine_tuning import write_results

    stop: Stop = arguments.stop
    with stop.defer(), sealed.connected(arguments, stop) as transport:
        result, numbers, files = sealed.train(
            transport, (task.train, task.test), task.labels, task.config, task.out, arguments
        )
        sizes = {"labels": len(task.labels), "training_texts": len(task.train.texts)}
        numbers = {**numbers, **sizes, "server": _server_counts(transport)}
        written, failed = write_results(result, numbers, task.out, arguments.json)
        _print_result(result, task, None, [*files, *written])
        if failed is not None:
            raise failed
    return 0


def _pool(arguments: argparse.Namespace) -> str:
    return arguments.pool or "mean"


def _check_options(arguments: argparse.Namespace) -> None:
    if arguments.plain and not arguments.model:
        raise InputError("--plain needs --model DIR: the weights to train with in the clear")
    if arguments.server and arguments.model:
        raise InputError("--model goes with --plain only; with --server the model is the server's")
    if arguments.seal:
        _check_sealed_options(arguments)
    elif arguments.release:
        raise InputError("--release goes with --seal model only")
    elif given := given_privacy(arguments):
        raise InputError(f"{given} goes with --seal model only")
    elif arguments.momentum is not None and not arguments.plain:
        raise InputError("--momentum goes with --seal model or --plain only")
    if arguments.plain and (given := given_line(arguments)):
        raise InputError(f"{given} goes with --server only: nothing is sent in the clear")
    if arguments.plain and arguments.scheme != next(iter(SCHEMES)):
        raise InputError("--scheme goes with --server only: nothing is encrypted in the clear")
    if arguments.verify_every is not None and (arguments.plain or arguments.seal):
        other = "ciphertexts of a sealed model cannot be checked" if arguments.seal else "nothing is computed elsewhere"
        raise InputError(f"--verify-every has no meaning here: {other}; leave it out")
    if arguments.constant_size and (arguments.plain or arguments.seal):
        other = "requests of a sealed model have constant sizes" if arguments.seal else "nothing is sent in the clear"
        raise InputError(f"--constant-size has no meaning here: {other}; leave it out")


def _check_sealed_options(arguments: argparse.Namespace) -> None:
    privacy_of(arguments)
    if arguments.plain:
        raise InputError("--seal goes with --server only: nothing is sealed in the clear")
    if arguments.scheme != next(iter(SCHEMES)) or arguments.device != "cpu":
        raise InputError("--scheme and --device have no meaning with --seal: its encryption is CKKS, on the processor")
    for name, value in (("lora-r", arguments.lora_r), ("targets", arguments.targets)):
        if value is not None:
            raise InputError(f"--{name}: the server of a sealed model has settled that; leave it out")
    if arguments.save_every != 1:
        raise InputError("--save-every goes without --seal: a sealed run is saved after every step")
    if arguments.momentum is not None and not 0 <= arguments.momentum < 1:
        raise InputError(f"--momentum is {arguments.momentum:g}; give a number in [0, 1)")


def _task(arguments: argparse.Namespace) -> _Task:
    """Check all that needs neither a model nor a server, the quickest first."""
    if arguments.server:
        check_line(arguments, arguments.server)
        # Read when PyTorch or OpenFHE loads: idle threads would spin on cores that encryption and server could use.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        # What is missing should show before anything else is done.
        if not arguments.seal:
            scheme(arguments.scheme).prepare(arguments.device, arguments.threads)
    device = _training_device(arguments.device)
    out = ensure_writable(arguments.out)
    if arguments.json:
        ensure_writable_file(arguments.json)
    set_threads(arguments.threads)

    import matplotlib  # noqa: F401 - draws at the very end: what is missing should show now

    from privtuner.train import dataset
    from privtuner.train.training import TrainConfig

    quiet_transformers()
    config = TrainConfig(
        steps=arguments.steps,
        batch_size=_BATCH if arguments.batch_size is None else arguments.batch_size,
        lr=(sealed.LR if arguments.seal else _LR) if arguments.lr is None else arguments.lr,
        head_lr=arguments.head_lr,
        head_first=arguments.head_first,
        lora_r=_LORA_R if arguments.lora_r is None else arguments.lora_r,
        targets=tuple(target.strip() for target in (arguments.targets or _TARGETS).split(",")),
        **(
            {"warmup": 0.0, "momentum": arguments.momentum}
            if arguments.plain and arguments.momentum is not None
            else {}
        ),
        seed=arguments.seed,
        max_length=_MAX_LENGTH if arguments.max_length is None else arguments.max_length,
        constant_size=arguments.constant_size,
    )
    columns = (arguments.text_column, arguments.label_column)
    form = {"delimiter": arguments.delimiter, "encoding": arguments.encoding}
    train = dataset.read_csv(arguments.data, *columns, **form)
    test = dataset.read_csv(arguments.eval, *columns, **form) if arguments.eval else None
    return _Task(config, device, train, test, dataset.label_names(train, test), out)


def _prepare(
    task: _Task, transport: RemoteTransport | None, arguments: argparse.Namespace
) -> tuple[PeftModel, Encoded, Encoded | None]:
    """Return the model with adapters, and the texts as it takes them; try what could otherwise fail after hours.

    Raises:
        InputError: the model cannot take the texts or the adapters, or an adapter cannot be saved.
    """
    from privtuner.train import report
    from privtuner.train.fine_tuning import prepare

    model, tokenizer = (
        _encrypted_model(transport, task.labels, arguments) if transport else _plain_model(task.labels, arguments)
    )
    adapted, train, test = prepare(model, tokenizer, task.train, task.test, task.labels, task.config, say)
    adapted = adapted.to(task.device)
    report.check_folder(adapted, task.labels, task.out)
    return adapted, train, test


def _server_counts(transport: RemoteTransport) -> dict[str, Any] | None:
    try:
        return transport.counts().to_dict()
    except PrivtunerError as error:
        say(f"warning: what the server counted is left out: {error}")
        return None


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
def _connection(arguments: argparse.Namespace, stop: Stop) -> Iterator[RemoteTransport | None]:
    """Connect, where there is a server, until the block ends or the user asks to stop."""
    if arguments.server is None:
        yield None
        return
    with connection(arguments, arguments.server, stop) as transport:
        yield transport


def _encrypted_model(
    transport: RemoteTransport, labels: Sequence[str], arguments: argparse.Namespace
) -> tuple[PreTrainedModel | MeanForSequenceClassification, PreTrainedTokenizerBase]:
    from privtuner.nn import Session
    from privtuner.train.classifier import owner_classifier

    hello = transport.hello()
    if hello["sealed"]:
        raise InputError(f"the model of the server at {transport.address} is sealed: train with --seal model")
    spoken = hello["scheme"]
    if spoken != arguments.scheme:
        raise InputError(
            f"the server at {transport.address} answers requests of the scheme {spoken}: train with --scheme {spoken}, "
            f"or start it with 'privtuner serve --scheme {arguments.scheme}'"
        )
    say(f"fetching what the owner needs of {hello['model']}, preset {hello['preset']}")
    bundle, tokenizer = fetch(transport, arguments)
    # The GPU is PyTorch's and CuPy's: what one computes the other reads where it lies.
    checks = {} if arguments.verify_every is None else {"verify_every": arguments.verify_every}
    session = Session(transport, spoken, arguments.device, **checks)
    return owner_classifier(bundle, session, labels, _pool(arguments)), tokenizer


def _plain_model(
    labels: Sequence[str], arguments: argparse.Namespace
) -> tuple[PreTrainedModel | MeanForSequenceClassification, PreTrainedTokenizerBase]:
    from privtuner.nn.pretrained import load_tokenizer
    from privtuner.train.classifier import clear_classifier

    return clear_classifier(arguments.model, labels, _pool(arguments)), load_tokenizer(arguments.model)


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
    if result.mode != "plain":
        up, down = result.bytes_up_per_token, result.bytes_down_per_token
        lines.append(("traffic", f"{up:,.0f} bytes a token to the server, {down:,.0f} back, forward and backward"))
    files = [adapter / "adapter", adapter / "labels.json", *written] if adapter else written
    folders = {path.parent: [file.name for file in files if file.parent == path.parent] for path in files}
    lines.append(("written", "; ".join(f"{folder}: {', '.join(names)}" for folder, names in folders.items())))
    for name, text in lines:
        print(f"{name:10}{text}")
