"""``privtuner serve``: holds the weights and computes on encrypted activations."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import suppress
from pathlib import Path

from privtuner.commands.common import Progress, add_scheme, add_threads, quiet_transformers, say, set_threads
from privtuner.commands.stop import Stop, Stopped
from privtuner.errors import InputError
from privtuner.linear import PRESETS

__all__ = ["add", "run"]


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description = (
        "Hold a model's frozen weights and compute on encrypted activations, until Ctrl-C. Runs where the "
        "weights are; 'privtuner train --server' runs where the data is."
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="model directory, as save_pretrained writes it")
    parser.add_argument(
        "--port", type=int, default=50051, metavar="N", help="TCP port, 0 for a free one (default %(default)s)"
    )
    parser.add_argument(
        "--host", default="127.0.0.1", metavar="ADDRESS", help="address to listen on (default %(default)s)"
    )
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        default="linear-w8",
        metavar="P",
        help="linear-w8 (default) or linear-w16: weights of 8 bits, or 16",
    )
    parser.add_argument(
        "--allow-plaintext",
        action="store_true",
        help="listen on an address that other machines can reach, without TLS or authentication",
    )
    add_scheme(parser, "what requests carry")
    parser.add_argument(
        "--device",
        default="cpu",
        metavar="D",
        help="what computes: cpu (default), cuda for every GPU, cuda:1, or cuda:0,cuda:1; owners need not know",
    )
    parser.add_argument(
        "--device-memory", type=float, metavar="GIB", help="most memory to take on each GPU (default: all that is free)"
    )
    parser.add_argument(
        "--ready-json",
        action="store_true",
        help="for programs: once the server is ready, print a line of JSON (address, model, layers, scheme, preset) in "
        "place of the sentence",
    )
    add_threads(parser)


def run(arguments: argparse.Namespace) -> int:
    """Serve until a signal ends it."""
    import logging

    from privtuner.schemes import scheme
    from privtuner.service import Server
    from privtuner.service.server import ensure_free

    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")
    # What needs no model should show before one is loaded: address, GPU.
    ensure_free(arguments.host, arguments.port, arguments.allow_plaintext)
    set_threads(arguments.threads)
    answering = scheme(arguments.scheme).server(arguments.device, _memory_bytes(arguments))

    from privtuner.nn import split_pretrained

    quiet_transformers()
    say(f"preparing {arguments.model}")
    name = Path(arguments.model).resolve().name
    with Progress("preparing", "million weights", scale=1e6) as progress:
        split = split_pretrained(arguments.model, arguments.preset, progress=progress)
    server = Server(
        split,
        host=arguments.host,
        port=arguments.port,
        name=name,
        server=answering,
        allow_plaintext=arguments.allow_plaintext,
    )
    stop: Stop = arguments.stop
    with suppress(Stopped), stop.defer(), server:
        layers = server.hello["layers"]
        for device, held in server.placement.items():
            say(f"{device} holds {held / 1e6:,.0f} MB of layers")
        if arguments.ready_json:
            told = {key: server.hello[key] for key in ("model", "layers", "scheme", "preset")}
            print(json.dumps({"address": server.address, **told}), flush=True)
        else:
            print(f"privtuner: serving {name}, {layers} layers, at {server.address}; Ctrl-C stops", flush=True)
        stop.wait()
    total = server.counts().total()
    print(f"privtuner: stopped after {total.requests} requests", flush=True)
    return 0


def _memory_bytes(arguments: argparse.Namespace) -> int | None:
    if arguments.device_memory is None:
        return None
    if arguments.device == "cpu":
        raise InputError("--device-memory goes with --device cuda: the processor's memory is not limited")
    if not 0 < arguments.device_memory < 1 << 20:
        raise InputError(f"--device-memory is {arguments.device_memory:g} GiB; give a number above 0")
    return int(arguments.device_memory * (1 << 30))
