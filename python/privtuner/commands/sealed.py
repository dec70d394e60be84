"""What the commands of a sealed model's data owner share: the way to its server, progress, and training."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from privtuner.commands.common import Progress, say
from privtuner.commands.line import connection, fetch
from privtuner.commands.privacy import account, agreed, privacy_of, within_budget
from privtuner.commands.stop import Stop
from privtuner.errors import InputError, PrivtunerError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from privtuner.nn import OwnerBundle, SealedEncoder
    from privtuner.sealed.owner import Progress as JobProgress
    from privtuner.sealed.privacy import Privacy
    from privtuner.service import RemoteTransport
    from privtuner.train.dataset import TextTable
    from privtuner.train.training import TrainConfig, TrainResult

__all__ = ["connected", "sealed_encoder", "train"]

LR = 0.05
"""Default of the adapters' rate: of SGD with momentum, on the mean loss of a batch."""
MOMENTUM = 0.9
STATE_FILE = "run.state"
"""In the folder of the results: secret key, locked adapters, head, optimiser and order of a sealed run."""


@contextmanager
def connected(arguments: argparse.Namespace, stop: Stop) -> Iterator[RemoteTransport]:
    """Connect to the server until the block ends or the user asks to stop.

    Raises:
        InputError: the server's model is not sealed.
    """
    with connection(arguments, arguments.server, stop) as transport:
        if not transport.hello()["sealed"]:
            raise InputError(
                f"the server at {transport.address} serves layers one by one, not a sealed model; start it with "
                "'privtuner serve --seal model', or train without --seal"
            )
        yield transport


def sealed_encoder(
    transport: RemoteTransport,
    arguments: argparse.Namespace,
    *,
    rate: float = LR,
    momentum: float = MOMENTUM,
    state: str | None = None,
    privacy: Privacy | None = None,
) -> tuple[SealedEncoder, OwnerBundle, PreTrainedTokenizerBase]:
    """Fetch what the owner needs, and return the encoder, whose jobs tell how far they are.

    ``arguments`` say what of the bundle is trusted (`privtuner.commands.line.add_bundle`), ``state`` is the file of key
    and locked adapters, and ``privacy`` of adapters in the clear at the server, see
    `privtuner.sealed.owner.SealedOwner`.

    Raises:
        PrivtunerError: the connection failed, or what came is of another version, or not secure.
    """
    from privtuner.nn import SealedEncoder, build_embeddings
    from privtuner.retries import Retries
    from privtuner.sealed.owner import SealedOwner, usual_gradient_bound

    say(f"fetching what the owner needs of {transport.hello()['model']}")
    bundle, tokenizer = fetch(transport, arguments)
    if bundle.sealed is None:
        raise InputError(
            f"the bundle of the server at {transport.address} is not of a sealed model; restart the server"
        )
    shape = bundle.sealed.shape
    say(
        f"{shape.layers} blocks of {shape.width} features are sealed; a pass takes {bundle.sealed.batch} texts of "
        f"{shape.period} tokens, however few there are"
    )
    owner = SealedOwner(
        bundle.sealed,
        transport,
        gradient_bound=usual_gradient_bound(bundle.sealed) if privacy is None else None,
        progress=_JobLines(),
        retries=Retries(),
        say=say,
        state=state,
        privacy=privacy,
    )
    if owner.step:
        say(f"going on after step {owner.step}, from {state}")
    return SealedEncoder(build_embeddings(bundle), owner, rate=rate, momentum=momentum), bundle, tokenizer


class _JobLines:
    """Tells how far a job is: what of its refreshes is done, the stage, and bytes."""

    def __init__(self) -> None:
        self._task, self._done, self._lines = "", math.inf, Progress("")

    def __call__(self, job: JobProgress) -> None:
        if job.task != self._task or job.done < self._done:
            self._task, self._lines = job.task, Progress(job.task, "refreshes")
            self._lines(0, job.total)
        self._done = job.done
        moved = f"{job.bytes_up / 1e6:,.0f} MB up, {job.bytes_down / 1e6:,.0f} MB down"
        self._lines(job.done, job.total, f"{job.stage}, {moved}")


def train(
    transport: RemoteTransport,
    tables: tuple[TextTable, TextTable | None],
    labels: tuple[str, ...],
    config: TrainConfig,
    out: Path,
    arguments: argparse.Namespace,
) -> tuple[TrainResult, dict[str, Any], list[Path]]:
    """Train head and encrypted adapters, save what is the owner's, and return result, numbers and files written.

    The head is saved after every step.

    Raises:
        PrivtunerError: as `privtuner.train.sealed.train_sealed`.
    """
    from privtuner.train import limits
    from privtuner.train.dataset import encode
    from privtuner.train.fine_tuning import describe_run
    from privtuner.train.report import HEAD_FILE, LABELS_FILE, save_head
    from privtuner.train.sealed import SealedClassifier, train_sealed

    momentum = MOMENTUM if arguments.momentum is None else arguments.momentum
    stop: Stop = arguments.stop
    if not arguments.release and (out / "adapter_config.json").exists():
        raise InputError(
            f"{out} holds the adapter of another run, which would pass for this head's: choose another --out"
        )
    privacy = privacy_of(arguments)
    state = _state_file(out, arguments)
    encoder, bundle, tokenizer = sealed_encoder(
        transport, arguments, rate=config.lr, momentum=momentum, state=str(state), privacy=privacy
    )
    shape = encoder.owner.public.shape
    agreed(shape, privacy)
    say(f"{state} holds the key of this run: whoever has it can decrypt all that the run sends. Its mode is 0600")
    if arguments.pool not in (None, shape.pool):
        raise InputError(
            f"--pool {arguments.pool}: this server's model reveals the pool {shape.pool}; leave --pool out"
        )
    config = _fitted(config, encoder, arguments, len(tables[0].texts))
    asked, config = config, replace(config, steps=within_budget(encoder.owner, config.steps))
    model = SealedClassifier(encoder, len(labels), config.seed)
    encoded = limits.fit(model, [encode(table, tokenizer, labels, config.max_length) for table in tables if table])
    test = encoded[1] if len(encoded) > 1 else None
    run = describe_run(asked, encoded[0], test, labels, {"pool": shape.pool, "model": transport.hello()["bundle"]})
    run["momentum of the adapters"] = momentum
    run["noise, clip, delta"] = privacy and [privacy.noise_multiplier, privacy.clip, privacy.delta]

    def after_step(result: TrainResult) -> None:
        save_head(model.classifier, labels, shape.pool, out)
        step, done = result.steps[-1], len(result.steps)
        moved = f"{step.bytes_up / 1e6:,.0f} MB up, {step.bytes_down / 1e6:,.0f} MB down"
        say(f"step {done} of {config.steps}: loss {step.loss:.3f}, {step.seconds:.0f} s, {moved}")
        if scaled := encoder.owner.scaled_down:
            say(
                f"warning: the gradients of {scaled} of {config.batch_size} texts were scaled down to their bound: "
                "the adapters learn less of these. Take a larger --batch-size"
            )
        stop.check()

    with encoder.owner:
        result = train_sealed(model, encoded[0], test, config, after_step=after_step, run=run)
        written = [out / HEAD_FILE, out / LABELS_FILE]
        if arguments.release:
            written += _release(model, bundle, out)
    spent, parameters = encoder.owner.spent, encoder.owner.public.parameters
    numbers = {
        **result.to_dict(),
        "seal": "model",
        "pool": shape.pool,
        "momentum": momentum,
        "parameters": parameters.name,
        "ring_dimension": parameters.ring_dimension,
        "log2_modulus": parameters.log_qp,
        "sequences": encoder.sequences,
        "key_bytes": encoder.owner.public.key_bytes,
        "spent": asdict(spent),
        "privacy": account(encoder.owner),
        "jobs": {task: asdict(traffic) for (_, task), traffic in encoder.meter.snapshot().items()},
    }
    return result, numbers, written


def _state_file(out: Path, arguments: argparse.Namespace) -> Path:
    """Return the file of key, locked adapters and training state, once it is settled whether the run goes on."""
    file = out / STATE_FILE
    if arguments.overwrite:
        file.unlink(missing_ok=True)
    elif arguments.resume and not file.exists():
        raise InputError(f"--resume: there is no {file}; leave it out to begin")
    return file


def _fitted(config: TrainConfig, encoder: SealedEncoder, arguments: argparse.Namespace, texts: int) -> TrainConfig:
    """Return the training options with what follows from the server's model."""
    longest = encoder.period if arguments.max_length is None else min(arguments.max_length, encoder.period)
    if arguments.max_length is not None and longest < arguments.max_length:
        say(f"texts are cut at the {longest} tokens that the server's model takes, not at {arguments.max_length}")
    shape = encoder.owner.public.shape
    return replace(
        config,
        warmup=0.0,
        max_length=longest,
        lora_r=shape.rank,
        targets=shape.targets,
        batch_size=min(encoder.sequences, texts) if arguments.batch_size is None else config.batch_size,
    )


def _release(model: Any, bundle: OwnerBundle, out: Path) -> list[Path]:
    """Ask the server for the adapters, and save them if it gives them away."""
    from privtuner.train.peft_adapter import save_released

    public = model.encoder.owner.public
    inside = _place_in_the_clear(public.shape, bundle)
    if inside is None:
        say(
            "warning: no adapter is saved: the clear classifier of this model reads other features than the sealed "
            "one; with the pool mean, or a BERT with its pooler, it reads the same"
        )
        return []
    try:
        matrices = public.adapter_matrices(model.encoder.owner.release())
    except PrivtunerError as error:
        say(f"warning: no adapter is saved: {error}")
        return []
    save_released(out, matrices, model.classifier, alpha=public.shape.alpha, inside=inside)
    return [out / "adapter_config.json", out / "adapter_model.safetensors"]


def _place_in_the_clear(shape: Any, bundle: OwnerBundle) -> str | None:
    """Return the name of the encoder in the clear classifier with the same head; None where there is none."""
    if shape.pool == "mean":
        return "encoder"
    return "bert" if shape.pooler and bundle.config.get("model_type") == "bert" else None
