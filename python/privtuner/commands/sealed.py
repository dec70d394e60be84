"""What the commands of a sealed model's data owner share: the way to its server, progress, and training."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from privtuner.commands.common import Progress, say
from privtuner.commands.stop import Stop
from privtuner.errors import InputError, PrivtunerError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from privtuner.nn import OwnerBundle, SealedEncoder
    from privtuner.sealed.owner import Progress as JobProgress
    from privtuner.service import RemoteTransport
    from privtuner.train.dataset import TextTable
    from privtuner.train.training import TrainConfig, TrainResult

__all__ = ["connected", "sealed_encoder", "train"]

LR = 0.05
"""Default of the adapters' rate: of SGD with momentum, on the mean loss of a batch."""
MOMENTUM = 0.9


@contextmanager
def connected(address: str, stop: Stop) -> Iterator[RemoteTransport]:
    """Connect to a server until the block ends or the user asks to stop.

    Raises:
        InputError: the server's model is not sealed.
    """
    from privtuner.service import RemoteTransport
    from privtuner.service.protocol import is_loopback, parse_address

    with RemoteTransport(address) as transport, stop.on_stop(transport.close):
        if not transport.hello()["sealed"]:
            raise InputError(
                f"the server at {address} serves layers one by one, not a sealed model; start it with 'privtuner serve "
                "--seal model', or leave out --seal"
            )
        if not is_loopback(parse_address(address)[0]):
            say(
                f"warning: {address} is another machine and the connection has no TLS: what you send is encrypted, but "
                "somebody in between could exchange the embeddings you fetch"
            )
        yield transport


def sealed_encoder(
    transport: RemoteTransport, *, rate: float = LR, momentum: float = MOMENTUM
) -> tuple[SealedEncoder, OwnerBundle]:
    """Fetch what the owner needs, and return the encoder, whose jobs tell how far they are.

    Raises:
        PrivtunerError: the connection failed, or what came is of another version, or not secure.
    """
    from privtuner.nn import SealedEncoder, build_embeddings
    from privtuner.sealed.owner import SealedOwner

    say(f"fetching what the owner needs of {transport.hello()['model']}")
    with Progress("fetching", "MB", scale=1e6) as progress:
        bundle = transport.fetch_bundle(progress)
    if bundle.sealed is None:
        raise InputError(
            f"the bundle of the server at {transport.address} is not of a sealed model; restart the server"
        )
    shape = bundle.sealed.shape
    say(
        f"{shape.layers} blocks of {shape.width} features are sealed; a pass takes {bundle.sealed.batch} texts of "
        f"{shape.period} tokens, however few there are"
    )
    owner = SealedOwner(bundle.sealed, transport, progress=_JobLines(), retries=3)
    return SealedEncoder(build_embeddings(bundle), owner, rate=rate, momentum=momentum), bundle


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

    Whatever ends it after a step, the head as it stood is saved.

    Raises:
        PrivtunerError: as `privtuner.train.sealed.train_sealed`.
    """
    from privtuner.train import limits
    from privtuner.train.dataset import encode
    from privtuner.train.report import save_head
    from privtuner.train.sealed import SealedClassifier, train_sealed

    momentum = MOMENTUM if arguments.momentum is None else arguments.momentum
    stop: Stop = arguments.stop
    encoder, bundle = sealed_encoder(transport, rate=config.lr, momentum=momentum)
    shape = encoder.owner.public.shape
    if arguments.pool not in (None, shape.pool):
        raise InputError(
            f"--pool {arguments.pool}: this server's model reveals the pool {shape.pool}; leave --pool out"
        )
    config = _fitted(config, encoder, arguments, len(tables[0].texts))
    model = SealedClassifier(encoder, len(labels), config.seed)
    tokenizer = bundle.tokenizer()
    encoded = limits.fit(model, [encode(table, tokenizer, labels, config.max_length) for table in tables if table])

    done = 0

    def after_step(result: TrainResult) -> None:
        nonlocal done
        step, done = result.steps[-1], len(result.steps)
        moved = f"{step.bytes_up / 1e6:,.0f} MB up, {step.bytes_down / 1e6:,.0f} MB down"
        say(f"step {done} of {config.steps}: loss {step.loss:.3f}, {step.seconds:.0f} s, {moved}")
        stop.check()

    with encoder.owner:
        try:
            result = train_sealed(
                model, encoded[0], encoded[1] if len(encoded) > 1 else None, config, after_step=after_step
            )
        finally:
            if done:
                save_head(model.classifier, labels, shape.pool, out)
        written = [out / "head.safetensors", out / "labels.json"]
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
        "jobs": {task: asdict(traffic) for (_, task), traffic in encoder.meter.snapshot().items()},
    }
    return result, numbers, written


def _fitted(config: TrainConfig, encoder: SealedEncoder, arguments: argparse.Namespace, texts: int) -> TrainConfig:
    """Return the training options with what follows from the server's model."""
    from dataclasses import replace

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
        say("warning: no adapter is saved: the clear classifier of this model reads other features than the sealed one")
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
    if shape.rank == 0:
        return None
    if shape.pool == "mean":
        return "encoder"
    return "bert" if shape.pooler and bundle.config.get("model_type") == "bert" else None


def tokens_of(tokenizer: PreTrainedTokenizerBase, texts: list[str], period: int) -> list[list[int]]:
    """Return the tokens of texts, cut at ``period``."""
    rows: list[list[int]] = tokenizer(texts, truncation=True, max_length=period)["input_ids"]
    return rows
