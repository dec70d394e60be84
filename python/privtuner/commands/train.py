"""``privtuner train``: fine-tunes a text classifier through a server, or in the clear."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from privtuner.commands.common import Progress, add_engine, add_threads, quiet_transformers, report_sealed, set_threads
from privtuner.errors import EngineError, InputError, ServiceError
from privtuner.paths import ensure_writable, ensure_writable_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from privtuner.lora.training import TrainConfig, TrainResult
    from privtuner.service import RemoteTransport

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
    train.add_argument("--lora-r", type=int, default=8, metavar="R", help="rank of the adapters (default %(default)s)")
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
        "--seed", type=int, default=0, metavar="N", help="of batches, adapters and head (default %(default)s)"
    )
    add_engine(train, "what encrypts: native (default), or openfhe with keys of this run; as the server's")
    train.add_argument(
        "--device", default="cpu", metavar="D", help="what trains and encrypts: cpu (default), cuda, or cuda:1"
    )
    train.add_argument("--seal", choices=["mlp"], help="refuse a server that does not seal its feed-forward blocks")
    add_threads(train)
    train.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Train, and write the adapter, the numbers and the loss curve."""
    if arguments.plain and not arguments.model:
        raise InputError("--plain needs --model DIR: the weights to train with in the clear")
    if arguments.server and arguments.model:
        raise InputError("--model goes with --plain only; with --server the model is the server's")
    if arguments.plain and arguments.seal:
        raise InputError("--seal goes with --server only: nothing is sealed in the clear")
    if arguments.plain and arguments.engine != "native":
        raise InputError("--engine goes with --server only: nothing is encrypted in the clear")
    if arguments.server:
        # Read when PyTorch or OpenFHE loads: idle threads would spin on cores that encryption and server could use.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    device = _training_device(arguments.device)
    if arguments.engine == "openfhe":
        from privtuner.openfhe.library import library

        library()  # an engine that is missing should show before anything else is done
    from privtuner.lora import dataset, report
    from privtuner.lora.training import EVAL_TOKENS, TrainConfig, prepare_model, train_classifier

    quiet_transformers()
    set_threads(arguments.threads)
    if arguments.threads and arguments.engine == "openfhe":
        from privtuner import openfhe

        openfhe.set_num_threads(arguments.threads)
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
    train = dataset.read_csv(arguments.data, *columns)
    test = dataset.read_csv(arguments.eval, *columns) if arguments.eval else None
    labels = dataset.label_names(train, test)
    out = ensure_writable(arguments.out)
    if arguments.json:
        ensure_writable_file(arguments.json)

    transport = _connect(arguments.server) if arguments.server else None
    try:
        model, tokenizer = (
            _encrypted_model(transport, labels, arguments) if transport else _plain_model(arguments.model, labels)
        )
        encoded = dataset.encode(train, tokenizer, labels, config.max_length)
        encoded_test = dataset.encode(test, tokenizer, labels, config.max_length) if test else None
        model.config.pad_token_id = encoded.pad_id
        adapted = prepare_model(model, config).to(device)
        if transport and (sealed := transport.hello()["sealed"]):
            tested = list(dataset.length_batches(encoded_test, EVAL_TOKENS)) if encoded_test else []
            report_sealed(2 * sealed * (config.steps + len(tested)))  # forward and backward; before and after
        try:
            result = train_classifier(adapted, encoded, encoded_test, config)
        except (ServiceError, KeyboardInterrupt):
            report.save_adapter(adapted, labels, out / "interrupted")
            print(f"\nprivtuner: the adapter as it stood is in {out / 'interrupted'}", file=sys.stderr)
            raise
        numbers = {**result.to_dict(), "labels": len(labels), "training_texts": len(train.texts)}
        if transport:
            numbers["engine"] = arguments.engine
            numbers["server"] = transport.counts().to_dict()
    finally:
        if transport:
            transport.close()
    report.save_adapter(adapted, labels, out)
    report.save_json(numbers, out / "metrics.json")
    if arguments.json:
        report.save_json(numbers, Path(arguments.json))
    title = f"{result.mode} fine-tuning, {config.steps} steps of {config.batch_size} texts"
    report.save_loss_curve({result.mode: [step.loss for step in result.steps]}, out / "loss.png", title)
    _print_result(result, config, len(train.texts), len(labels), out)
    return 0


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


def _connect(address: str) -> RemoteTransport:
    from privtuner.service import RemoteTransport
    from privtuner.service.protocol import is_loopback, parse_address

    transport = RemoteTransport(address)
    if not is_loopback(parse_address(address)[0]):
        print(
            f"privtuner: warning: {address} is another machine and the connection has no TLS: activations are "
            "encrypted, but somebody in between could exchange the model you fetch",
            file=sys.stderr,
        )
    return transport


def _label_maps(labels: Sequence[str]) -> dict[str, Any]:
    return {"id2label": dict(enumerate(labels)), "label2id": {label: place for place, label in enumerate(labels)}}


def _encrypted_model(
    transport: RemoteTransport, labels: Sequence[str], arguments: argparse.Namespace
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    hello = transport.hello()
    sealed, engine = hello.get("sealed", 0), hello.get("engine", "native")
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
    print(f"privtuner: fetching what the owner needs of {hello['model']}, preset {hello['preset']}", file=sys.stderr)
    if sealed:
        print(f"privtuner: {sealed} feed-forward blocks are sealed, which is slow; each is reported", file=sys.stderr)
    with Progress("fetching", "MB", scale=1e6) as progress:
        bundle = transport.fetch_bundle(progress)
    names = _label_maps(labels)
    # The GPU is PyTorch's and CuPy's: what one computes the other reads where it lies.
    model = bundle.build(transport, engine=engine, device=arguments.device, num_labels=len(labels), **names)
    return model, bundle.tokenizer()


def _plain_model(directory: str, labels: Sequence[str]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    options = {"local_files_only": True, "trust_remote_code": False}
    if not (Path(directory) / "config.json").is_file():
        raise InputError(f"{directory} is no model directory: it has no config.json")
    try:
        model = AutoModelForSequenceClassification.from_pretrained(
            directory,
            num_labels=len(labels),
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            **_label_maps(labels),
            **options,
        )
        return model.eval(), AutoTokenizer.from_pretrained(directory, **options)
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"cannot load a model from {directory}: {error}") from error


def _print_result(result: TrainResult, config: TrainConfig, texts: int, labels: int, out: Path) -> None:
    lines = [
        ("mode", result.mode),
        ("data", f"{texts} training texts, {labels} labels"),
        (
            "steps",
            f"{config.steps} of {config.batch_size} texts, LoRA r = {config.lora_r} on {','.join(config.targets)}",
        ),
        ("loss", f"{result.steps[0].loss:.3f} at the first step, {result.steps[-1].loss:.3f} at the last"),
    ]
    if result.before and result.after:
        accuracy = f"{result.before.accuracy:.1%} before, {result.after.accuracy:.1%} after"
        lines.append(("accuracy", f"{accuracy}, on {result.after.texts} test texts"))
    lines.append(("time", f"{result.seconds_per_step:.3f} s a step (median)"))
    if result.mode == "encrypted":
        up, down = result.bytes_up_per_token, result.bytes_down_per_token
        lines.append(("traffic", f"{up:,.0f} bytes a token to the server, {down:,.0f} back, forward and backward"))
    lines.append(("written", f"{out}: adapter, labels.json, metrics.json, loss.png"))
    for name, text in lines:
        print(f"{name:10}{text}")
