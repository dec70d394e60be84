"""``privtuner top``: what a server has done and is doing, in a table that is redrawn."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, NamedTuple

from privtuner.commands.line import add_line, connection
from privtuner.errors import InputError
from privtuner.foreign import foreign_text

if TYPE_CHECKING:
    from rich.console import RenderableType

    from privtuner.commands.stop import Stop
    from privtuner.service.counts import LayerCounts, ServerCounts, View

__all__ = ["add", "run"]


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description = (
        "Show what a server has answered, by layer, until Ctrl-C: what it counted for you, or with --metrics what it "
        "counted for everybody, which is for its operator. A caller without a token or certificate is nobody that the "
        "server knows again, and sees the calls of its own connection alone: none, here."
    )
    parser.add_argument("server", nargs="?", metavar="HOST:PORT", help="the server, asked as one of its clients")
    parser.add_argument("--metrics", metavar="HOST:PORT", help="what 'privtuner serve --metrics' listens on, instead")
    parser.add_argument("--interval", type=float, default=2.0, metavar="S", help="seconds between looks (default 2)")
    parser.add_argument("--once", action="store_true", help="print one table, without rates, and end")
    add_line(parser)


_TOTAL = ("total", "")
_NUMBERS = ("requests", "tokens", "MB in", "MB out", "mean ms", "95% ms <=", "refreshes")
_WIDTH = 160  # where there is no terminal
_RATES = ("requests/s", "tokens/s", "MB/s")


class _Look(NamedTuple):
    """What was seen at a time."""

    seconds: float
    counts: ServerCounts
    view: View | None
    name: str


def run(arguments: argparse.Namespace) -> int:
    """Look again and again until a signal comes, or once."""
    from rich.console import Console
    from rich.live import Live

    if (arguments.server is None) == (arguments.metrics is None):
        raise InputError("name a server, or --metrics HOST:PORT of one, and not both")
    if not 0.1 <= arguments.interval <= 3600:
        raise InputError(f"--interval is {arguments.interval:g} s; give 0.1 to 3600")
    stop: Stop = arguments.stop
    with ExitStack() as stack:
        look = _looking(arguments, stack)
        console, before = Console(), look()
        if not console.is_terminal:
            console.width = _WIDTH
        if arguments.once:
            console.print(_drawn(before, None, None))
            return 0
        height = console.height - 12 if console.is_terminal else None
        live = stack.enter_context(Live(_drawn(before, None, height), console=console, auto_refresh=False))
        while True:
            time.sleep(arguments.interval)
            stop.check()
            now = look()
            live.update(_drawn(now, before, height), refresh=True)
            before = now


def _looking(arguments: argparse.Namespace, stack: ExitStack) -> Callable[[], _Look]:
    """Return what looks once; connections stay open until ``stack`` is left."""
    if arguments.metrics is not None:
        from privtuner.service.metrics import fetch_view

        def look_as_operator() -> _Look:
            view = fetch_view(arguments.metrics)
            name = f"{view.model}, {view.scheme}, privtuner {view.version}, at {arguments.metrics}"
            return _Look(time.monotonic(), view.counts, view, name)

        return look_as_operator
    transport = stack.enter_context(connection(arguments, arguments.server, arguments.stop))
    hello = transport.hello()

    def look() -> _Look:
        counts = transport.counts()
        name = f"{hello['model']}, {hello['scheme']}, at {arguments.server}, as {counts.tenant}"
        return _Look(time.monotonic(), counts, None, name)

    return look


def _drawn(now: _Look, before: _Look | None, most: int | None) -> RenderableType:
    """Return the tables: of layers, the ``most`` busiest, and what an operator sees besides."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from privtuner.service.counts import LayerCounts

    rows = sorted(now.counts.layers.items(), key=lambda row: -row[1].seconds)
    shown = [*rows[:most], (_TOTAL, now.counts.total())]
    table = Table(box=None, pad_edge=False)
    for title in ("layer", "direction"):
        table.add_column(title)
    for title in (*_NUMBERS, *(_RATES if before else ())):
        table.add_column(title, justify="right", no_wrap=True)
    for key, counts in shown:
        cells = _numbers(counts)
        if before is not None:
            earlier = before.counts.total() if key == _TOTAL else before.counts.layers.get(key, LayerCounts())
            cells += _rates(counts, earlier, now.seconds - before.seconds)
        table.add_row(*(Text(foreign_text(name)) for name in key), *cells)
    parts: list[RenderableType] = [Text(foreign_text(now.name)), table]
    if len(shown) <= len(rows):
        parts.append(Text(f"and {len(rows) + 1 - len(shown)} more layers"))
    refusals = (
        ", ".join(f"{foreign_text(why)} {count:,}" for why, count in sorted(now.counts.refusals.items())) or "none"
    )
    parts.append(Text(f"bundles sent: {now.counts.bundles:,}; ended with an error: {refusals}"))
    if now.view is not None:
        parts += _operators(now.view)
    return Group(*parts)


def _operators(view: View) -> list[RenderableType]:
    from rich.table import Table
    from rich.text import Text

    load = view.load
    limit = f" of {load.held_bytes_limit / 1e6:,.0f}" if load.held_bytes_limit else ""
    lines = [
        f"calls in progress: {_listed(load.running)}; waiting for their turn: {load.waiting}",
        f"memory: {view.memory_bytes / 1e6:,.0f} MB; messages held: {load.held_bytes / 1e6:,.1f}{limit} MB",
    ]
    lines += [f"{foreign_text(device)} holds {held / 1e6:,.0f} MB of layers" for device, held in view.placement.items()]
    table = Table(box=None, pad_edge=False)
    table.add_column("tenant")
    for title in ("requests", "tokens", "MB in", "MB out", "refused"):
        table.add_column(title, justify="right", no_wrap=True)
    for tenant, counts in sorted(view.tenants.items()):
        table.add_row(Text(foreign_text(tenant)), *_numbers(counts.total())[:4], f"{counts.refused:,}")
    return [Text("\n".join(lines)), table]


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{foreign_text(name)} {count:,}" for name, count in sorted(counts.items()) if count) or "none"


def _numbers(counts: LayerCounts) -> tuple[str, ...]:
    mean = 1e3 * counts.seconds / counts.requests if counts.requests else 0.0
    return (
        f"{counts.requests:,}",
        f"{counts.tokens:,}",
        f"{counts.bytes_in / 1e6:,.1f}",
        f"{counts.bytes_out / 1e6:,.1f}",
        f"{mean:,.1f}",
        f"{1e3 * counts.quantile(0.95):,.0f}",
        f"{counts.refreshes:,}",
    )


def _rates(now: LayerCounts, before: LayerCounts, seconds: float) -> tuple[str, ...]:
    moved = now.bytes_in + now.bytes_out - before.bytes_in - before.bytes_out
    return (
        f"{(now.requests - before.requests) / seconds:,.1f}",
        f"{(now.tokens - before.tokens) / seconds:,.0f}",
        f"{moved / seconds / 1e6:,.2f}",
    )
