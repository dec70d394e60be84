"""The command ``privtuner``: serve, train, allocate, wireless-study, calibrate, info, demo.

Results go to standard output, progress and errors to standard error. Exit status: 0 done, 1 failed, 2 the arguments or
the data cannot be used, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import privtuner
from privtuner.errors import EngineError, InputError, PrivtunerError, ServiceError
from privtuner.paths import ensure_writable, ensure_writable_file, writing

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from privtuner.lora.training import TrainConfig, TrainResult
    from privtuner.service import RemoteTransport

__all__ = ["main"]

_EXTRAS = {
    "grpc": "service",
    "matplotlib": "train",
    "peft": "train",
    "safetensors": "train",
    "scipy": "wireless",
    "tomli": "wireless",
    "torch": "train",
    "tqdm": "train",
    "transformers": "train",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status.

    Args:
        argv: arguments after the command's name; those of the process when None.
    """
    # Nothing is ever downloaded, and gRPC's own log would repeat in riddles what the errors below say.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        arguments = _parser().parse_args(argv)
        status: int = arguments.run(arguments)
        return status
    except InputError as error:
        return _fail(error, 2)
    except PrivtunerError as error:
        return _fail(error, 1)
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        return _fail(f"this command needs {error.name}: pip install 'privtuner[{extra}]'", 1)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)


def _fail(reason: object, status: int) -> int:
    print("privtuner: error:", " ".join(str(reason).split()), file=sys.stderr)
    return status


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as every other error of the command."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"privtuner: error: {message}; see '{self.prog} --help'\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="privtuner", description="Private fine-tuning through encrypted linear layers.")
    parser.add_argument("--version", action="version", version=f"privtuner {privtuner.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)

    serve = commands.add_parser("serve", help="hold a model's frozen weights and compute on encrypted activations")
    serve.add_argument("--model", required=True, metavar="DIR", help="model directory (config.json, model.safetensors)")
    serve.add_argument("--port", type=int, default=50051, help="TCP port, 0 for a free one (default %(default)s)")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default %(default)s)")
    serve.add_argument("--preset", default="linear-w8", help="linear-w8 (default) or linear-w16")
    serve.add_argument(
        "--allow-plaintext",
        action="store_true",
        help="listen on an address that other machines can reach, without TLS or authentication",
    )
    serve.add_argument(
        "--seal",
        choices=["mlp"],
        help="evaluate the feed-forward blocks whole on ciphertexts, biases and activation included: data owners see "
        "none of their linear maps. Slow: minutes a block",
    )
    _add_engine(serve, "which requests to answer: native (default), or openfhe, for which only owners need OpenFHE")
    serve.add_argument(
        "--device",
        default="cpu",
        metavar="D",
        help="what computes: cpu (default), cuda for every GPU, cuda:1, or cuda:0,cuda:1; owners need not know",
    )
    serve.add_argument(
        "--device-memory", type=float, metavar="GIB", help="most memory to take on each GPU (default: all that is free)"
    )
    _add_threads(serve)
    serve.set_defaults(run=_serve)

    train = commands.add_parser("train", help="fine-tune a text classifier through a server, or in the clear")
    where = train.add_mutually_exclusive_group(required=True)
    where.add_argument("--server", metavar="HOST:PORT", help="a running 'privtuner serve'")
    where.add_argument("--plain", action="store_true", help="train in the clear, for comparison; needs --model")
    train.add_argument("--model", metavar="DIR", help="model directory, with --plain only")
    train.add_argument("--data", required=True, metavar="CSV", help="training texts")
    train.add_argument("--eval", metavar="CSV", help="test texts; without it no accuracy is measured")
    train.add_argument("--text-column", default="text", metavar="NAME", help="(default %(default)s)")
    train.add_argument("--label-column", default="label", metavar="NAME", help="(default %(default)s)")
    train.add_argument("--out", required=True, metavar="DIR", help="where the adapter, numbers and loss curve go")
    train.add_argument("--json", metavar="FILE", help="write the run's numbers to this file too")
    train.add_argument("--steps", type=int, default=150, help="optimiser steps (default %(default)s)")
    train.add_argument("--batch-size", type=int, default=64, metavar="N", help="texts a step (default %(default)s)")
    train.add_argument("--lr", type=float, default=5e-3, help="peak learning rate, adapters (default %(default)s)")
    train.add_argument("--head-lr", type=float, default=3e-2, help="peak learning rate, head (default %(default)s)")
    train.add_argument("--lora-r", type=int, default=8, metavar="R", help="rank of the adapters (default %(default)s)")
    train.add_argument(
        "--targets", default="query,value", metavar="A,B", help="layers that get adapters (default %(default)s)"
    )
    train.add_argument("--max-length", type=int, default=64, metavar="N", help="tokens a text (default %(default)s)")
    train.add_argument("--seed", type=int, default=0, help="of batches, adapters and head (default %(default)s)")
    _add_engine(train, "what encrypts: native (default), or openfhe with keys of this run; as the server's")
    train.add_argument(
        "--device", default="cpu", metavar="D", help="what trains and encrypts: cpu (default), cuda, or cuda:1"
    )
    train.add_argument("--seal", choices=["mlp"], help="refuse a server that does not seal its feed-forward blocks")
    _add_threads(train)
    train.set_defaults(run=_train)

    _add_wireless(commands)

    info = commands.add_parser("info", help="version, compiler, instruction sets, engines")
    info.add_argument("--json", action="store_true", help="print JSON")
    info.set_defaults(run=_info)

    demo = commands.add_parser("demo", help="fine-tune MiniLM plain and encrypted, and compare")
    demo.add_argument("--out", default="demo-out", metavar="DIR", help="where results go (default %(default)s)")
    demo.add_argument("--steps", type=int, default=60, help="optimiser steps of each run (default %(default)s)")
    demo.set_defaults(run=_demo)
    return parser


def _add_wireless(commands: Any) -> None:
    allocate = commands.add_parser("allocate", help="share bandwidth, power and processors among devices")
    allocate.add_argument("system", metavar="SYSTEM", help="devices, server and channel, a .toml or .json file")
    allocate.add_argument(
        "--method",
        default="global",
        metavar="M",
        help="global (default), alternating, equal, random, "
        "communication, computation, largest, smallest or brute-force",
    )
    allocate.add_argument("--tiers", metavar="FILE", help="table of parameter sets in place of the system's own")
    allocate.add_argument(
        "--tolerance", type=float, default=1e-6, help="gap to certify, as a part of the energy (default %(default)s)"
    )
    allocate.add_argument("--seed", type=int, default=0, help="of the method random (default %(default)s)")
    allocate.add_argument("--plan", action="store_true", help="print seconds, joules, MB and security of each device")
    allocate.add_argument("--json", metavar="FILE", help="write the allocation to this file")
    allocate.add_argument("--plot", metavar="FILE", help="draw the allocation: .png, .pdf or .svg")
    allocate.set_defaults(run=_allocate)

    study = commands.add_parser("wireless-study", help="compare the methods of allocation along every parameter")
    study.add_argument("--out", required=True, metavar="DIR", help="where the tables and figures go")
    study.add_argument("--tiers", metavar="FILE", help="calibrated table (default: the package's)")
    study.add_argument("--seeds", type=int, default=20, metavar="N", help="random cells (default %(default)s)")
    study.set_defaults(run=_wireless_study)

    calibrate = commands.add_parser("calibrate", help="measure what the parameter sets cost on this machine")
    calibrate.add_argument("--out", required=True, metavar="FILE", help="table of tiers to write, .toml or .json")
    calibrate.add_argument(
        "--frequency", type=float, metavar="HZ", help="of the processor (default: as the system tells)"
    )
    calibrate.add_argument("--width", type=int, default=384, help="features of a layer (default %(default)s)")
    calibrate.add_argument("--layers", type=int, default=1, help="frozen layers of a sample (default %(default)s)")
    calibrate.add_argument("--tokens", type=int, default=16, help="of a sample (default %(default)s)")
    calibrate.add_argument(
        "--batch", type=int, default=128, metavar="N", help="samples a request (default %(default)s)"
    )
    calibrate.add_argument("--runs", type=int, default=3, metavar="N", help="medians of so many (default %(default)s)")
    calibrate.set_defaults(run=_calibrate)


def _add_engine(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("--engine", choices=["native", "openfhe"], default="native", help=text)


def _add_threads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=int, metavar="N", help="threads to compute with (default: all processors)")


def _set_threads(threads: int | None) -> None:
    if threads is not None:
        privtuner.set_num_threads(threads)
        import torch

        torch.set_num_threads(threads)


def _quiet_transformers() -> None:
    import warnings

    import transformers

    # What PEFT and transformers think of each other is nothing a user of this command can act on.
    warnings.simplefilter("ignore", FutureWarning)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _info(arguments: argparse.Namespace) -> int:
    from privtuner import info

    facts = info.collect()
    print(json.dumps(facts, indent=1) if arguments.json else info.render(facts))
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    from privtuner import demo

    # Ends like Ctrl-C, so that the server it started does not outlive it.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    demo.run(Path(arguments.out), arguments.steps)
    return 0


def _memory_bytes(arguments: argparse.Namespace) -> int | None:
    if arguments.device_memory is None:
        return None
    if arguments.device == "cpu":
        raise InputError("--device-memory goes with --device cuda: the processor's memory is not limited")
    if not 0 < arguments.device_memory < 1 << 20:
        raise InputError(f"--device-memory is {arguments.device_memory:g} GiB; give a number above 0")
    return int(arguments.device_memory * (1 << 30))


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


def _serve(arguments: argparse.Namespace) -> int:
    import logging

    from privtuner.engines import engine_of
    from privtuner.nn import split_pretrained
    from privtuner.service import Server

    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")
    _set_threads(arguments.threads)
    _quiet_transformers()
    # A GPU that is missing should show before a model is loaded.
    engine = engine_of(arguments.engine, arguments.device, _memory_bytes(arguments))
    print(f"privtuner: preparing {arguments.model}", file=sys.stderr)
    name = Path(arguments.model).resolve().name
    server = Server(
        split_pretrained(arguments.model, arguments.preset, seal=arguments.seal),
        host=arguments.host,
        port=arguments.port,
        name=name,
        engine=engine,
        allow_plaintext=arguments.allow_plaintext,
    )
    # No threading.Event: its lock may be held by the very thread that a signal interrupts.
    signals: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: signals.append(number))
    with server:
        layers = server.hello["layers"]
        if arguments.seal:
            print(
                f"privtuner: {server.hello['sealed']} feed-forward blocks are sealed; each takes minutes a request, "
                "one at a time",
                file=sys.stderr,
            )
        for device, held in server.placement.items():
            print(f"privtuner: {device} holds {held / 1e6:,.0f} MB of layers", file=sys.stderr)
        print(f"privtuner: serving {name}, {layers} layers, at {server.address}; Ctrl-C stops", flush=True)
        # A signal that another thread takes does not wake the main one, so it looks from time to time.
        while not signals:
            time.sleep(0.2)
    total = server.counts().total()
    print(f"privtuner: stopped after {total.requests} requests", flush=True)
    return 0


def _train(arguments: argparse.Namespace) -> int:
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
    from privtuner.lora.training import TrainConfig, prepare_model, train_classifier

    _quiet_transformers()
    _set_threads(arguments.threads)
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
        import logging

        print(f"privtuner: {sealed} feed-forward blocks are sealed, which is slow; each is reported", file=sys.stderr)
        logging.basicConfig(stream=sys.stderr, format="privtuner: %(message)s")
        logging.getLogger("privtuner.nn.session").setLevel(logging.INFO)
    bundle = transport.fetch_bundle()
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


def _allocate(arguments: argparse.Namespace) -> int:
    from privtuner.wireless import allocate, load_system, load_tiers
    from privtuner.wireless.report import plan, summary, table

    for path in filter(None, (arguments.json, arguments.plot)):
        ensure_writable_file(path)
    system = load_system(arguments.system, tiers=load_tiers(arguments.tiers) if arguments.tiers else None)
    found = allocate(
        system,
        arguments.method,
        tolerance=arguments.tolerance,
        seed=arguments.seed,
        progress=_node_progress if sys.stderr.isatty() else None,
    )
    if arguments.json:
        path = Path(arguments.json)
        with writing(path):
            path.write_text(json.dumps(found.to_dict(), indent=1) + "\n", encoding="utf-8")
    if arguments.plot:
        from privtuner.wireless.figures import draw_allocation

        draw_allocation(found, Path(arguments.plot))
    print(plan(found) if arguments.plan else table(found))
    print()
    print(summary(found))
    return 0


def _node_progress(objective: float, bound: float, nodes: int) -> None:
    end = "\r" if nodes % 10 else "\n"
    print(f"privtuner: {nodes} nodes, objective {objective:.9g} J, bound {bound:.9g} J", end=end, file=sys.stderr)


def _say(line: str) -> None:
    print(f"privtuner: {line}", file=sys.stderr, flush=True)


def _wireless_study(arguments: argparse.Namespace) -> int:
    from privtuner.wireless import load_tiers
    from privtuner.wireless.study import run_study

    tiers = load_tiers(arguments.tiers) if arguments.tiers else None
    for path in run_study(arguments.out, tiers=tiers, seeds=arguments.seeds, progress=_say):
        print(path)
    return 0


def _calibrate(arguments: argparse.Namespace) -> int:
    from privtuner import calibration
    from privtuner.wireless import save_tiers
    from privtuner.wireless.files import suffix_of

    workload = calibration.Workload(
        width=arguments.width,
        layers=arguments.layers,
        tokens=arguments.tokens,
        batch=arguments.batch,
        runs=arguments.runs,
    )
    frequency = arguments.frequency or calibration.processor_frequency()
    suffix_of(Path(arguments.out))
    ensure_writable_file(arguments.out)
    tiers = calibration.measure(workload, frequency=frequency, progress=_say)
    head = calibration.describe(workload, frequency)
    save_tiers(arguments.out, tiers, head)
    print(head)
    for tier in tiers:
        megabytes = f"{tier.upload_bits / 8e6:.3g} MB up, {tier.download_bits / 8e6:.3g} MB down"
        cycles = f"{tier.encrypt_cycles / 1e6:.3g} M cycles owner, {tier.evaluate_cycles / 1e6:.3g} M server"
        print(f"{tier.name:12}{tier.security:.0f} bits, {cycles}, {megabytes} a sample")
    print(f"written to {arguments.out}")
    return 0
