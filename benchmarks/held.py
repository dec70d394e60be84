"""Held adapters in two processes: a server steps LoRA matrices by gradients that it computes on ciphertexts.

    python benchmarks/held.py --model DIR --data CSV [--label-column NAME] [--labels N] [--steps N] [--batch-size N]

This process embeds texts with the sentence model in DIR and computes losses; the other holds one linear layer from
embeddings to labels. The same steps follow in the clear, for comparison.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from typing import Any

import numpy as np

from privtuner.errors import ServiceError
from privtuner.held.layer import HeldClient, HeldLora
from privtuner.held.serve import HELD_LAYER, held_server
from privtuner.held.train import ClearDevice, embed_texts, train_held
from privtuner.service import RemoteTransport


def _layer(d_out: int, d_in: int) -> HeldLora:
    weight = np.random.default_rng(1).standard_normal((d_out, d_in)) * 0.02
    return HeldLora(weight, r=4, alpha=8.0, lr=0.02)


def _serve(d_out: int, d_in: int) -> int:
    with held_server(_layer(d_out, d_in)) as server:
        print(server.address, flush=True)
        sys.stdin.read()  # until the device closes it
    return 0


def _encrypted(address: str, x: Any, labels: Any, options: dict[str, Any]) -> tuple[list[float], float]:
    with RemoteTransport(address) as transport:
        client = HeldClient(lambda request: transport.apply(HELD_LAYER, request))
        start = time.monotonic()
        losses = train_held(client, x, labels, **options)
        return losses, time.monotonic() - start


def main() -> int:
    """Run the comparison and print both loss curves."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="directory of a sentence model such as MiniLM")
    parser.add_argument("--data", help="texts and labels")
    parser.add_argument("--label-column", default="category")
    parser.add_argument("--labels", type=int, default=8, help="how many labels of the data (default %(default)s)")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--serve", type=int, nargs=2, metavar=("D_OUT", "D_IN"), help="be the server of such a layer")
    arguments = parser.parse_args()
    if arguments.serve:
        return _serve(*arguments.serve)
    if not (arguments.model and arguments.data):
        parser.error("--model and --data are needed")
    x, labels = embed_texts(arguments.model, arguments.data, arguments.label_column, arguments.labels)
    shape = (int(labels.max()) + 1, x.shape[1])
    options = {"steps": arguments.steps, "batch_size": arguments.batch_size, "seed": 0}
    command = [sys.executable, __file__, "--serve", *map(str, shape)]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        address = server.stdout.readline().strip() if server.stdout else ""
        if not address:
            raise ServiceError("the server did not start; what it said stands above")
        encrypted, seconds = _encrypted(address, x, labels, options)
    finally:
        server.terminate()
        server.wait()
    clear = train_held(ClearDevice(_layer(*shape)), x, labels, **options)
    for number, pair in enumerate(zip(encrypted, clear, strict=True), 1):
        print("step {:3}   loss {:.4f} encrypted   {:.4f} in the clear".format(number, *pair))
    print(
        f"{seconds / arguments.steps:.1f} s a step of {arguments.batch_size} rows, layer {shape[0]} x {shape[1]}, r = 4"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
