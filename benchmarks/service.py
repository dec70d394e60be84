"""What does the service cost, and what does it stand? A server in a process of its own, owners over TLS on loopback.

    python benchmarks/service.py [--part PART]... [--quick] [--minutes M] [--messages N] [--json F] [--plot F]
        [--threads N]

The parts, all of them by default:

    overhead   the layers of MiniLM's training step through the service, against the four functions in one process
    owners     1, 4, 16 and 64 owners at once: tokens a second of the server, and its memory
    soak       16 owners without a pause for minutes: is memory flat, is there any error?
    strangers  an owner's step beside 64 clients of another tenant that stall, flood and send bombs, and beside
               malformed messages

Server and owners share the processors of one machine. ``--quick`` takes a tiny model and a few seconds: it shows that
everything runs, its figures say nothing.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

import harness
from harness import Record, progress
from privtuner import linear, nn, system

sys.path.append(str(Path(__file__).parents[1] / "tests" / "support"))
from service_load import MINILM, SMALL, Load, Work, model_folder, replays, serving, step_of
from strangers import attack


@dataclasses.dataclass(frozen=True)
class Setting:
    """What the options ask for.

    Attributes:
        quick: a tiny model, and a few seconds.
        minutes: of the soak.
        runs: of which medians are taken.
        messages: malformed ones to send.
        threads: of each side.
        folder: of the model.
        split: the model, split here as well.
    """

    quick: bool
    minutes: float
    runs: int
    messages: int
    threads: int
    folder: Path
    split: nn.Split

    @property
    def seconds(self) -> float:
        """How long owners work at once."""
        return 1.0 if self.quick else 30.0

    def tokens(self, count: int) -> int:
        """So many, or a few."""
        return min(count, 8) if self.quick else count


def overhead_part(setting: Setting) -> Iterator[Record]:
    """A step's products, one after the other: bare functions, the service in the clear, and over TLS."""
    tokens = setting.tokens(1024)
    work = step_of(setting.split, tokens)
    specs = setting.split.bundle.specs

    def bare() -> None:
        for layer, direction, x in work:
            request, secret = linear.encrypt(x, specs[layer], direction=direction)
            linear.decrypt(linear.apply(setting.split.server[layer], request), secret)

    with (
        serving(setting.folder, setting.threads) as secure,
        serving(setting.folder, setting.threads, tls=False) as clear,
        secure.connect() as over_tls,
        clear.connect() as in_clear,
    ):
        candidates = {
            "bare": bare,
            "over TLS": lambda: _through(over_tls, work, specs),
            "in the clear": lambda: _through(in_clear, work, specs),
        }
        computed: dict[str, list[float]] = {name: [] for name in candidates}

        def timed(name: str) -> None:
            start = time.process_time() + secure.processor_seconds() + clear.processor_seconds()
            candidates[name]()
            end = time.process_time() + secure.processor_seconds() + clear.processor_seconds()
            computed[name].append(end - start)

        seconds = harness.paired({name: partial(timed, name) for name in candidates}, setting.runs)
    reference = "the four functions in one process"
    note = f"{len(work)} requests, server and owner take turns; {setting.runs} runs"
    yield _record(setting, "a step's products, bare", 1e3 * _median(seconds["bare"]), "ms", tokens=tokens, note=note)
    for name, target in (("over TLS", 1.15), ("in the clear", None)):
        for kind, values in (("", seconds), (", processors' time", {key: of[1:] for key, of in computed.items()})):
            ratio = harness.median_ratio(values[name], values["bare"])
            what, value = f"the same through the service, {name}{kind}", 1e3 * _median(values[name])
            target_here = None if kind else target
            yield _record(setting, what, value, "ms", reference=reference, ratio=ratio, target=target_here)


def _through(transport: nn.Transport, work: list[Work], specs: dict[str, linear.Spec]) -> None:
    for layer, direction, x in work:
        request, secret = linear.encrypt(x, specs[layer], direction=direction)
        linear.decrypt(transport.apply(layer, request), secret)


def owners_part(setting: Setting) -> Iterator[Record]:
    """Tokens a second with ever more owners, who pause as long as their own part takes."""
    tokens = setting.tokens(256)
    work = step_of(setting.split, tokens)
    requests = replays(setting.split, work)
    pause = sum(replay.owner_seconds for replay in requests)
    names = [f"owner{number}" for number in range(2 if setting.quick else 64)]
    alone: float | None = None
    with serving(setting.folder, setting.threads, names) as served:
        idle = served.memory()
        for count in (1, 2) if setting.quick else (1, 4, 16, 64):
            progress(f"owners: {count}")
            with Load(served, names[:count], requests, pause=True) as load:
                time.sleep(setting.seconds / 3)  # to begin with
                start, rows, peak = time.perf_counter(), load.rows, 0
                while (elapsed := time.perf_counter() - start) < setting.seconds:
                    time.sleep(0.25)
                    peak = max(peak, served.memory())
                rate = (load.rows - rows) / len(requests) / elapsed
            note = f"{tokens} tokens a request; pauses of {pause:.2f} s a step for the owner's part"
            note += f"; {len(load.errors)} errors{': ' + load.errors[0] if load.errors else ''}"
            compared = {"reference": "1 owner", "ratio": rate / alone} if alone else {}
            yield _record(setting, f"{count} owners, tokens of steps", rate, "/s", note=note, **compared)
            note = f"{idle / 1e6:.0f} MB before the first"
            yield _record(setting, f"{count} owners, memory of the server", peak / 1e6, "MB", note=note)
            alone = alone or rate


def soak_part(setting: Setting) -> Iterator[Record]:
    """Memory over minutes of 16 owners without a pause, from a fifth of the time on."""
    names = [f"owner{number}" for number in range(2 if setting.quick else 16)]
    requests = replays(setting.split, step_of(setting.split, setting.tokens(256)), rounds=1)
    seconds = 60 * setting.minutes
    samples = []
    with serving(setting.folder, setting.threads, names) as served, Load(served, names, requests, pause=False) as load:
        start = time.perf_counter()
        while (now := time.perf_counter() - start) < seconds and not load.errors:
            samples.append((now, served.memory()))
            time.sleep(min(1.0, seconds / 50))
    settled = [memory for now, memory in samples if now >= seconds / 5]
    early, late = settled[: len(settled) // 4 + 1], settled[-len(settled) // 4 - 1 :]
    ratio = _median(late) / _median(early)
    note = f"{setting.minutes:g} min, {len(names)} owners, {load.rows:,} rows; most {max(settled) / 1e6:.0f} MB"
    yield _record(
        setting,
        "memory at the end of the soak",
        _median(late) / 1e6,
        "MB",
        reference="after a fifth of the time",
        ratio=ratio,
        target=1.02,
        note=note,
    )
    note = load.errors[0] if load.errors else ""
    yield _record(setting, "errors in the soak", float(len(load.errors)), "", target=0.0, note=note)


def strangers_part(setting: Setting) -> Iterator[Record]:
    """An owner's step alone, beside 64 clients that mean no good, and beside malformed messages."""
    requests = replays(setting.split, step_of(setting.split, setting.tokens(256)), rounds=1)
    first = requests[0]
    with serving(setting.folder, setting.threads, ["owner", "other"], tls=False) as served:

        def steps(seconds: float) -> tuple[list[float], int]:
            times, peak, end = [], 0, time.perf_counter() + seconds
            while not times or time.perf_counter() < end:
                start = time.perf_counter()
                for replay in requests:
                    for _ in transport.apply(replay.layer, replay.request):
                        pass
                times.append(time.perf_counter() - start)
                peak = max(peak, served.memory())
            return times, peak

        arguments = (served.address, first.layer, first.request, served.tokens["other"])
        # Of a process of their own: they share processors with the server and the owner, not the interpreter.
        spawn = multiprocessing.get_context("spawn")
        with served.connect("owner") as transport:
            alone = _median(steps(setting.seconds)[0])
            for what, clients, messages in (
                ("stalls, floods and bombs", 6 if setting.quick else 64, 0),
                ("malformed messages", 4, setting.messages),
            ):
                over, told = spawn.Event(), spawn.Queue()
                process = spawn.Process(target=attack, args=(arguments, clients, messages, over, told))
                process.start()
                start = time.perf_counter()
                time.sleep(setting.seconds / 3)
                times, peak = steps(0 if messages else 2 * setting.seconds)
                while messages and told.empty():
                    more, now = steps(0)
                    times, peak = times + more, max(peak, now)
                seconds = time.perf_counter() - start
                over.set()
                hanging, sent, answers = told.get(timeout=120)
                process.join(60)
                note = f"{clients} clients of one other tenant, {seconds:.0f} s; {sent:,} malformed; {hanging} hang"
                note += f"; memory {peak / 1e6:.0f} MB"
                note += "".join(f"; {name} {count:,}" for name, count in answers.most_common())
                compared = {"reference": "alone", "ratio": _median(times) / alone, "target": 2.0}
                yield _record(setting, f"step beside {what}", _median(times), "s", note=note, **compared)
        assert served.process.poll() is None


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def _record(setting: Setting, name: str, value: float, unit: str, **fields: object) -> Record:
    if setting.quick:
        fields["target"] = None
    return Record(name, value, unit, threads=setting.threads, isa=system.active_isa(), **fields)


PARTS: dict[str, Callable[[Setting], Iterator[Record]]] = {
    "overhead": overhead_part,
    "owners": owners_part,
    "soak": soak_part,
    "strangers": strangers_part,
}


def main() -> None:
    """Run the parts that were asked for; the JSON file holds every record as soon as it is there."""
    parser = harness.parser_of((__doc__ or "").splitlines()[0])
    parser.add_argument("--part", action="append", choices=PARTS, help="only this part; may be given several times")
    parser.add_argument("--minutes", type=float, default=30.0, metavar="M", help="of the soak (default 30)")
    parser.add_argument("--runs", type=int, default=5, metavar="N", help="medians of so many runs (default 5)")
    parser.add_argument(
        "--messages", type=int, default=1_000_000, metavar="N", help="malformed ones of strangers (default a million)"
    )
    options = parser.parse_args()
    if min(options.runs, options.messages) < 1 or not 0.01 <= options.minutes <= 10_000:
        parser.error("--runs and --messages must be at least 1, --minutes from 0.01 to 10000")
    system.set_num_threads(options.threads)
    torch.set_num_threads(options.threads)
    records: list[Record] = []
    with tempfile.TemporaryDirectory() as name:
        folder = model_folder(Path(name), SMALL if options.quick else MINILM)
        split = nn.split_pretrained(folder)
        minutes = min(options.minutes, 0.05) if options.quick else options.minutes
        runs = 1 if options.quick else options.runs
        messages = min(options.messages, 200) if options.quick else options.messages
        setting = Setting(options.quick, minutes, runs, messages, options.threads, folder, split)
        for part in PARTS if options.part is None else dict.fromkeys(options.part):
            for record in PARTS[part](setting):
                records.append(record)
                progress(harness.table([record]).splitlines()[1])
                if options.json:
                    harness.write(records, options.json)
    harness.finish(records, options, "service" + ", quick: these figures say nothing" * options.quick)


if __name__ == "__main__":
    main()
