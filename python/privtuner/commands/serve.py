"""``privtuner serve``: holds the weights and computes on encrypted activations."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from privtuner.commands.common import Progress, add_scheme, add_threads, quiet_transformers, say, set_threads
from privtuner.commands.line import add_server_line, server_line
from privtuner.commands.sealing import add_sealing, given_sealing, option, prepared_model
from privtuner.commands.stop import Stop, Stopped
from privtuner.commands.watching import add_watching, auditing, check_watching, logging_to, telling_metrics
from privtuner.errors import InputError
from privtuner.linear import PRESETS

if TYPE_CHECKING:
    from privtuner.nn import Split
    from privtuner.schemes import LinearServer
    from privtuner.sealed.adapters import Matrices
    from privtuner.sealed.server import SealedService
    from privtuner.service.audit import AuditLog

__all__ = ["add", "run"]


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description = (
        "Hold a model's frozen weights and compute on encrypted activations, until Ctrl-C. Runs where the "
        "weights are; 'privtuner train --server' runs where the data is."
    )
    parser.add_argument(
        "--model",
        required=True,
        metavar="DIR",
        help="model directory, as save_pretrained writes it, or with --seal a prepared one",
    )
    parser.add_argument(
        "--port", type=int, default=50051, metavar="N", help="TCP port, 0 for a free one (default %(default)s)"
    )
    parser.add_argument(
        "--host", default="127.0.0.1", metavar="ADDRESS", help="address to listen on (default %(default)s)"
    )
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        metavar="P",
        help="linear-w8 (default) or linear-w16: weights of 8 bits, or 16",
    )
    add_scheme(parser, "what requests carry")
    parser.add_argument(
        "--device",
        default="cpu",
        metavar="D",
        help="what computes: cpu (default), cuda for every GPU, cuda:1, or cuda:0,cuda:1; owners need not know",
    )
    parser.add_argument(
        "--request-memory",
        type=float,
        metavar="GIB",
        help="memory for all requests in progress together (default: a quarter of this machine's)",
    )
    parser.add_argument(
        "--device-memory", type=float, metavar="GIB", help="most memory to take on each GPU (default: all that is free)"
    )
    parser.add_argument(
        "--ready-json",
        action="store_true",
        help="for programs: once the server is ready, print a line of JSON (address, model, layers, sealed, scheme, "
        "preset, bundle, metrics) in place of the sentences",
    )
    parser.add_argument(
        "--seal",
        choices=["model"],
        help="evaluate the whole encoder on ciphertexts: owners see pooled vectors alone, and no weight. Takes a "
        "directory of 'privtuner prepare', or prepares the model first as the options below say",
    )
    parser.add_argument("--sessions", type=int, metavar="N", help="owners of a sealed model at a time (default 1)")
    parser.add_argument(
        "--state",
        metavar="DIR",
        help="where a sealed model's adapters are saved after each step, locked; those in the clear for PEFT too",
    )
    parser.add_argument(
        "--release",
        action="store_true",
        help="give owners the adapters of a sealed model when they ask: these tell of the activations they were "
        "trained on",
    )
    parser.add_argument(
        "--drain",
        type=float,
        default=30.0,
        metavar="S",
        help="seconds that calls in progress may take once a signal has told the server to end; new ones are refused "
        "meanwhile, which owners wait out (default 30; sealed: a task may take minutes)",
    )
    add_watching(parser)
    add_threads(parser)
    add_server_line(parser)
    add_sealing(parser, required=False)


def run(arguments: argparse.Namespace) -> int:
    """Serve until a signal ends it."""
    _check_options(arguments)
    check_watching(arguments)
    with logging_to(arguments), auditing(arguments) as audit:
        return _serve(arguments, audit)


def _serve(arguments: argparse.Namespace, audit: AuditLog | None) -> int:
    from privtuner.service import Server
    from privtuner.service.server import ensure_free

    # What needs no model should show before one is loaded: address, GPU.
    protection = server_line(arguments)
    ensure_free(arguments.host, arguments.port, **protection)
    set_threads(arguments.threads)
    name = Path(arguments.model).resolve().name
    split, answering, sealed = _sealed(arguments) if arguments.seal else _layers(arguments)
    server = Server(
        split,
        memory_bytes=_gibibytes(arguments.request_memory, "--request-memory"),
        host=arguments.host,
        port=arguments.port,
        name=name,
        server=answering,
        sealed=sealed,
        audit=audit,
        **protection,
    )
    stop: Stop = arguments.stop
    with suppress(Stopped), stop.defer(), server, telling_metrics(arguments, server) as metrics:
        layers = server.hello["layers"]
        for device, held in server.placement.items():
            say(f"{device} holds {held / 1e6:,.0f} MB of layers")
        if arguments.ready_json:
            told = {key: server.hello[key] for key in ("model", "layers", "sealed", "scheme", "preset", "bundle")}
            told |= {} if metrics is None else {"metrics": metrics.address}
            print(json.dumps({"address": server.address, **told}), flush=True)
        else:
            if metrics is not None:
                say(f"metrics at http://{metrics.address}/metrics")
            what = "sealed" if sealed is not None else f"{layers} layers"
            print(f"privtuner: serving {name}, {what}, at {server.address}; Ctrl-C stops", flush=True)
            print(f"privtuner: bundle {server.hello['bundle']}; data owners pin it with --expect", flush=True)
        stop.wait()
        say(f"ending: calls in progress have up to {arguments.drain:g} s")
        if left := server.stop(arguments.drain):
            say(f"{left} calls were cut off; their owners send them again to the next server at this address")
    total = server.counts().total()
    print(f"privtuner: stopped after {total.requests} {'jobs' if sealed is not None else 'requests'}", flush=True)
    return 0


def _check_options(arguments: argparse.Namespace) -> None:
    """Refuse options that have no meaning where they stand."""
    from privtuner.schemes import SCHEMES

    if not 0 <= arguments.drain <= 1e6:
        raise InputError(f"--drain is {arguments.drain:g} s; give 0 to 1e6")
    if not arguments.seal:
        given = [*given_sealing(arguments), *["release"] * arguments.release]
        given += [name for name in ("sessions", "state") if getattr(arguments, name) is not None]
        if given:
            raise InputError(f"{option(given[0])} goes with --seal model only")
        return
    if arguments.preset is not None or arguments.scheme != next(iter(SCHEMES)):
        raise InputError("--preset and --scheme are of layers that are served one by one: leave them out with --seal")
    if "," in arguments.device:
        raise InputError(f"--device {arguments.device}: a sealed model takes one GPU, cuda or cuda:1")
    if arguments.sessions is not None and arguments.sessions < 1:
        raise InputError(f"--sessions is {arguments.sessions}; give at least 1")


def _layers(arguments: argparse.Namespace) -> tuple[Split, LinearServer, None]:
    """Prepare every layer of the model, and what answers for it."""
    from privtuner.schemes import scheme

    answering = scheme(arguments.scheme).server(arguments.device, _memory_bytes(arguments))

    from privtuner.nn import split_pretrained

    quiet_transformers()
    say(f"preparing {arguments.model}")
    with Progress("preparing", "million weights", scale=1e6) as progress:
        split = split_pretrained(arguments.model, arguments.preset or "linear-w8", progress=progress)
    return split, answering, None


def _sealed(arguments: argparse.Namespace) -> tuple[Split, None, SealedService]:
    """Read or prepare the sealed model, and what serves it."""
    from privtuner.sealed.server import SealedService

    make = _evaluator(arguments)
    quiet_transformers()
    prepared = prepared_model(arguments.model, arguments)
    say(f"the plan\n{prepared.model.plan}")
    clear = prepared.model.shape.clear
    if clear:
        say(
            "the adapters are in the clear here: a clipped, noisy gradient of every step is read. Data owners trust "
            "this server to have nothing else opened"
        )
    service = SealedService(
        prepared.model,
        **make,
        state=arguments.state,
        sessions=arguments.sessions or 1,
        release=arguments.release,
        keep=_adapter_writer(Path(arguments.state), prepared.model.shape.alpha) if clear and arguments.state else None,
    )
    return prepared.split, None, service


def _adapter_writer(folder: Path, alpha: float) -> Callable[[str, Matrices], None]:
    """Return what saves the adapter of each run in a folder of its own, for PEFT to load onto the encoder."""
    from privtuner.train.peft_adapter import save_encoder_adapter

    def write(run: str, matrices: Matrices) -> None:
        save_encoder_adapter(folder / run, matrices, alpha=alpha)

    return write


def _evaluator(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what makes the evaluators of a sealed model; nothing where the processor computes."""
    memory = _memory_bytes(arguments)
    if arguments.device == "cpu":
        return {}
    from privtuner import cuda

    device = cuda.devices("cuda:0" if arguments.device == "cuda" else arguments.device, memory)[0]
    return {"evaluator": partial(cuda.CudaEvaluator, device)}


def _memory_bytes(arguments: argparse.Namespace) -> int | None:
    if arguments.device_memory is None:
        return None
    if arguments.device == "cpu":
        raise InputError("--device-memory goes with --device cuda: the processor's memory is not limited")
    return _gibibytes(arguments.device_memory, "--device-memory")


def _gibibytes(size: float | None, name: str) -> int | None:
    if size is None:
        return None
    if not 0 < size < 1 << 20:
        raise InputError(f"{name} is {size:g} GiB; give a number above 0")
    return int(size * (1 << 30))
