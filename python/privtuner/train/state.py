"""What a step of training changes besides the tensors it trains: optimisers, order of the batches, generators."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from privtuner.errors import InputError
from privtuner.train.checkpoints import Checkpoint
from privtuner.train.dataset import ShuffledBatches

__all__ = ["TrainingState"]

_PARAMETER, _OPTIMIZER, _WAITING = "parameter", "optimizer", "order.waiting"


class TrainingState:
    """All that a step of training changes, and so all that it takes to go on with the next one, bit for bit.

    The generators are those of PyTorch (its GPUs' too, once used), NumPy and Python, all global. Randomness of the
    encryption comes from the operating system and is never kept.

    Args:
        parameters: what is trained, by name.
        optimizers: over these parameters, in an order that is always the same.
        batches: where batches come from.

    Attributes:
        step: whole steps done; whoever trains counts.
    """

    def __init__(
        self,
        parameters: Mapping[str, torch.nn.Parameter],
        optimizers: Sequence[torch.optim.Optimizer],
        batches: ShuffledBatches,
    ) -> None:
        self.parameters, self.optimizers, self.batches = dict(parameters), list(optimizers), batches
        self.step = 0

    def capture(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Return the state as JSON values and tensors, for `privtuner.train.checkpoints.Checkpoint`."""
        tensors = {f"{_PARAMETER}.{name}": _copy(value) for name, value in self.parameters.items()}
        for number, optimizer in enumerate(self.optimizers):
            for index, entries in optimizer.state_dict()["state"].items():
                for name, value in entries.items():
                    if value is not None:  # SGD without momentum
                        tensors[f"{_OPTIMIZER}.{number}.{index}.{name}"] = _copy(value)
        waiting, order = self.batches.place()
        tensors[_WAITING] = torch.tensor(waiting, dtype=torch.int32)
        tensors["generator.torch"] = torch.get_rng_state()
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            for number, state in enumerate(torch.cuda.get_rng_state_all()):
                tensors[f"generator.cuda.{number}"] = state
        kind, words, *rest = np.random.get_state()  # noqa: NPY002 - the global one is what others may use
        facts = {"order": order, "python": random.getstate(), "numpy": [kind, np.asarray(words).tolist(), *rest]}
        return facts, tensors

    @torch.no_grad()
    def restore(self, checkpoint: Checkpoint) -> None:
        """Take the state of ``checkpoint``.

        Raises:
            privtuner.errors.InputError: it is of other parameters or of another order of batches.
        """
        facts, tensors = checkpoint.facts, checkpoint.tensors
        names = {name.removeprefix(f"{_PARAMETER}."): name for name in tensors if name.startswith(f"{_PARAMETER}.")}
        same = names.keys() == self.parameters.keys()
        if not (same and all(tensors[names[n]].shape == value.shape for n, value in self.parameters.items())):
            raise InputError("the checkpoint is of other adapters or of another head; begin anew with --overwrite")
        self.batches.go_to(tensors[_WAITING].tolist(), facts["order"])
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors[names[name]])
        for number, optimizer in enumerate(self.optimizers):
            entries: dict[int, dict[str, torch.Tensor]] = {}
            for name, value in tensors.items():
                if name.startswith(f"{_OPTIMIZER}.{number}."):
                    _, _, index, entry = name.split(".", 3)
                    entries.setdefault(int(index), {})[entry] = value
            optimizer.load_state_dict({"state": entries, "param_groups": optimizer.state_dict()["param_groups"]})
        torch.set_rng_state(tensors["generator.torch"])
        cards = sum(name.startswith("generator.cuda.") for name in tensors)
        if cards and cards == torch.cuda.device_count():
            torch.cuda.set_rng_state_all([tensors[f"generator.cuda.{number}"] for number in range(cards)])
        version, words, gauss = facts["python"]
        random.setstate((version, tuple(words), gauss))
        kind, words, *rest = facts["numpy"]
        np.random.set_state((kind, np.array(words, np.uint32), *rest))  # noqa: NPY002 - as above
        self.step = checkpoint.step


def _copy(value: torch.Tensor) -> torch.Tensor:
    return value.detach().to("cpu", copy=True)
