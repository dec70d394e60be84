"""A sealed model that is ready to be served: calibrated on text that the model owner names, and saved in a folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from privtuner.ckks import Parameters
from privtuner.errors import InputError
from privtuner.nn.bundle import OwnerBundle
from privtuner.nn.model import build_embeddings
from privtuner.nn.split import Split
from privtuner.sealed.domains import Domains, LayerDomains
from privtuner.sealed.model import SealedModel, model_digest
from privtuner.sealed.plan_file import read_plan, write_plan
from privtuner.sealed.weights import Weights

__all__ = ["Prepared"]

_OWNER, _WEIGHTS, _DOMAINS, _PLAN = "owner", "weights.safetensors", "domains.json", "plan.json"
_FORMAT = 1
_BATCH = 64  # texts that are embedded at a time


@dataclass(frozen=True, eq=False, repr=False)
class Prepared:
    """A sealed model and what goes to its data owners.

    Attributes:
        model: for `privtuner.sealed.server.SealedService`.
        weights, domains: what it is made of; never leave the model owner.
        bundle: for the data owner.
    """

    model: SealedModel
    weights: Weights
    domains: Domains
    bundle: OwnerBundle

    @property
    def split(self) -> Split:
        """What a `privtuner.service.Server` takes beside the service."""
        return Split({}, self.bundle)

    @classmethod
    def calibrate(
        cls,
        parts: Split,
        texts: Sequence[str],
        *,
        room: float = 1.25,
        parameters: Parameters | None = None,
        progress: Callable[[int, int], object] | None = None,
        planning: Callable[[int, int, str], object] | None = None,
    ) -> Prepared:
        """Measure how large every value gets on ``texts``, and plan the circuits for that.

        Args:
            parts: of `privtuner.nn.split` with ``seal``, tokenizer included.
            texts: like those that data owners will have. What goes beyond them and ``room`` gives no results.
            room: by which all domains are widened, at least 1.
            parameters: of the encryption; the default is secure at N = 2^15.
            progress: called with the texts that were embedded, and all.
            planning: told while the circuits are planned, as `privtuner.sealed.plan.make_plan` does.

        Raises:
            privtuner.errors.InputError: ``parts`` is of no sealed model, has no tokenizer, or no text is given.
        """
        if parts.weights is None:
            raise InputError("these parts are of a model that is not sealed; split it with seal='model'")
        if not texts:
            raise InputError("no texts to calibrate on; give some that are like the data owners'")
        x, lengths = _embed(parts.bundle, texts, parts.weights.shape.period, progress or (lambda *_: None))
        domains = Domains.measure(parts.weights, x, lengths, room)
        model = SealedModel(parts.weights, domains, parameters=parameters, progress=planning)
        return cls(model, parts.weights, domains, replace(parts.bundle, sealed=model.public))

    def save(self, directory: str | Path) -> None:
        """Write the model to ``directory``, which is made if it does not exist: the weights too, so keep it."""
        from safetensors.numpy import save_file

        folder = Path(directory)
        self.bundle.save(folder / _OWNER)
        save_file(dict(self.weights.to_state()), folder / _WEIGHTS)
        write_plan(folder / _PLAN, self.model.plan, model_digest(self.weights, self.domains))
        content = {"format": _FORMAT, "domains": self.domains.to_dict()}
        (folder / _DOMAINS).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, directory: str | Path, *, planning: Callable[[int, int, str], object] | None = None) -> Prepared:
        """Return the model saved in ``directory``; ``planning`` as for `calibrate`, where its plan is missing or wrong.

        Raises:
            privtuner.errors.InputError: there is none, it is damaged, or it was prepared by another version.
            privtuner.errors.MessageError: its bundle is malformed.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        folder = Path(directory)
        if not cls.is_saved(folder):
            raise InputError(f"no prepared model in {folder}: {_DOMAINS} is missing; make one with 'privtuner prepare'")
        bundle = OwnerBundle.load(folder / _OWNER)
        public = bundle.sealed
        try:
            content = json.loads((folder / _DOMAINS).read_text(encoding="utf-8"))
            state = load_file(folder / _WEIGHTS)
        except (OSError, ValueError, SafetensorError) as error:
            raise InputError(f"the prepared model in {folder} is damaged ({error}); prepare it again") from error
        if not isinstance(content, dict) or content.get("format") != _FORMAT or public is None:
            raise InputError(f"the model in {folder} was prepared by another version; prepare it again")
        weights, domains = Weights.of_state(state, public.shape), Domains.of_dict(content["domains"])
        plan = read_plan(folder / _PLAN, model_digest(weights, domains), public.parameters)
        model = SealedModel(weights, domains, parameters=public.parameters, progress=planning, plan=plan)
        if model.public.id != public.id:
            raise InputError(f"the model in {folder} was prepared by another version, or changed; prepare it again")
        return cls(model, weights, domains, bundle)

    @staticmethod
    def is_saved(directory: str | Path) -> bool:
        """Return whether a prepared model is in ``directory``."""
        return (Path(directory) / _DOMAINS).is_file()

    def table(self) -> str:
        """The measured domains, a column for each block: bounds of absolute values, or low .. high."""
        layers = self.domains.layers
        rows = [("domain", [f"block {index}" for index in range(len(layers))])]
        rows += [
            (field.name, [_show(getattr(layer, field.name)) for layer in layers]) for field in fields(LayerDomains)
        ]
        lines = [f"{name:16}" + "".join(f"{text:>18}" for text in texts) for name, texts in rows]
        ends = f"inputs up to {_show(self.domains.inputs)}, what is revealed up to {_show(self.domains.pooled)}"
        return "\n".join([*lines, ends])


def _show(value: Any) -> str:
    return " .. ".join(f"{number:.3g}" for number in value) if isinstance(value, tuple) else f"{value:.3g}"


@torch.no_grad()
def _embed(
    bundle: OwnerBundle, texts: Sequence[str], period: int, progress: Callable[[int, int], object]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Return the embeddings (n, most tokens, width) of texts, cut at ``period`` tokens, and their lengths (n,)."""
    tokenizer, embeddings = bundle.tokenizer(), build_embeddings(bundle).float()
    rows = tokenizer(list(texts), truncation=True, max_length=period)["input_ids"]
    lengths = np.array([len(row) for row in rows], np.int64)
    if not lengths.all():
        raise InputError("a text has no tokens; leave it out")
    parts = []
    for start in range(0, len(rows), _BATCH):
        progress(start, len(rows))
        some = rows[start : start + _BATCH]
        ids = torch.zeros(len(some), int(lengths.max()), dtype=torch.int64)
        for place, row in enumerate(some):
            ids[place, : len(row)] = torch.tensor(row)
        parts.append(embeddings(input_ids=ids).numpy())
    progress(len(rows), len(rows))
    return np.concatenate(parts), lengths
