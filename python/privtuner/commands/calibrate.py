"""``privtuner calibrate``: measures what the parameter sets cost on this machine."""

from __future__ import annotations

import argparse
from pathlib import Path

from privtuner.commands.common import Progress
from privtuner.paths import ensure_writable_file

__all__ = ["add", "run"]


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description = (
        "Measure what encryption costs on this machine with each parameter set, some minutes long, for "
        "'privtuner allocate --tiers FILE'. A sample is a text that goes through the frozen layers and back."
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="table of tiers to write, .toml or .json")
    parser.add_argument("--frequency", type=float, metavar="HZ", help="the processor's (default: what the system says)")
    parser.add_argument("--width", type=int, default=384, metavar="N", help="features of a layer (default %(default)s)")
    parser.add_argument(
        "--layers", type=int, default=1, metavar="N", help="frozen layers of a sample (default %(default)s)"
    )
    parser.add_argument("--tokens", type=int, default=16, metavar="N", help="tokens of a sample (default %(default)s)")
    parser.add_argument("--batch", type=int, default=128, metavar="N", help="samples a request (default %(default)s)")
    parser.add_argument(
        "--runs", type=int, default=3, metavar="N", help="runs of which the median counts (default %(default)s)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Measure and write the table."""
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
    with Progress("measuring", "%") as progress:
        tiers = calibration.measure(workload, frequency=frequency, progress=progress)
    head = calibration.describe(workload, frequency)
    save_tiers(arguments.out, tiers, head)
    print(head)
    for tier in tiers:
        megabytes = f"{tier.upload_bits / 8e6:.3g} MB up, {tier.download_bits / 8e6:.3g} MB down"
        cycles = f"{tier.encrypt_cycles / 1e6:.3g} M cycles owner, {tier.evaluate_cycles / 1e6:.3g} M server"
        print(f"{tier.name:12}{tier.security:.0f} bits, {cycles}, {megabytes} a sample")
    print(f"written to {arguments.out}")
    return 0
