"""A sealed encoder in PyTorch: embeddings here, everything between them and the pooled vector at the server.

::

    encoder = SealedEncoder(embeddings, SealedOwner(public, transport), rate=0.05)
    head = torch.nn.Linear(encoder.width, classes)
    loss = torch.nn.functional.cross_entropy(head(encoder(input_ids, attention_mask)), labels)
    loss.backward()                  # the server steps its adapters; head.weight.grad is there as ever
    optimiser.step()                 # of the head
    encoder.eval()                   # from here on: pooled vectors alone, nothing is kept at the server
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.autograd.function import once_differentiable

from privtuner.errors import InputError
from privtuner.nn.traffic import Traffic, TrafficMeter
from privtuner.nn.withheld import refuse_tracing
from privtuner.sealed.owner import SealedOwner, Spent

__all__ = ["SealedEncoder"]


class SealedEncoder(torch.nn.Module):
    """Pooled vectors of texts, computed by the server of a sealed model on ciphertexts, with its encrypted adapters.

    In training mode ``backward`` sends the gradient by the pooled vectors, and the server steps its adapters *then*, by
    SGD with momentum at ``rate``: no optimiser here has them, and no ``zero_grad`` undoes a step. Each forward pass
    takes one backward pass, before the next forward pass. In eval mode, or without gradients, nothing is kept.

    Args:
        embeddings: public and frozen: called with ``input_ids`` (and ``token_type_ids``, if given), returns (n, length,
            width) after its norm.
        owner: keys and the way to the server.
        rate: learning rate of the adapters; may be set between steps. The server learns it.
        momentum: of the adapters, in [0, 1), for the whole run. The server learns it.

    Attributes:
        width: features of a pooled vector.
        sequences: most texts a batch. period: most tokens a text.
        meter: traffic by task; tokens are those of the texts, which the server does not learn.
    """

    def __init__(self, embeddings: torch.nn.Module, owner: SealedOwner, *, rate: float, momentum: float = 0.9) -> None:
        super().__init__()
        if not 0 <= momentum < 1:
            raise InputError(f"momentum is {momentum:g}; give a number in [0, 1)")
        self.embeddings = embeddings.requires_grad_(False)
        self.owner, self.rate, self.momentum = owner, rate, momentum
        public = owner.public
        self.width, self.period, self.sequences = public.width, public.period, public.batch
        self.meter = TrafficMeter()
        self._passes = 0

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the pooled vectors of a batch of texts.

        Args:
            input_ids: integers (n, length), at most ``sequences`` texts.
            attention_mask: (n, length), 1 at tokens and 0 at the padding behind them; None for no padding.
            token_type_ids: integers (n, length).

        Returns:
            (n, width), of the embeddings' dtype: the mean over a text's tokens, or what follows the first one.

        Raises:
            privtuner.errors.InputError: a text without tokens, with padding before or between them, or longer than
                ``period``; too many texts; embeddings that are not finite.
            privtuner.errors.CkksError: an input left the domain that the server calibrated.
            privtuner.errors.MessageError, privtuner.errors.ServiceError: see `privtuner.sealed.owner.SealedOwner`.
        """
        refuse_tracing()
        lengths = self._lengths(input_ids, attention_mask)
        most = int(lengths.max())
        others = {} if token_type_ids is None else {"token_type_ids": token_type_ids[:, :most]}
        with torch.no_grad():
            x = self.embeddings(input_ids=input_ids[:, :most], **others)
        if self.training and torch.is_grad_enabled():
            # The adapters are no tensors of this process; the graph needs one that asks for a gradient.
            trigger = torch.zeros((), requires_grad=True)
            pooled: torch.Tensor = _Pooled.apply(trigger, x, lengths, self)  # type: ignore[no-untyped-call]
        else:
            pooled = self.run("embed", x, lengths)
        public = self.owner.public
        if public.pooling == "mean":
            pooled = pooled / lengths.to(pooled).unsqueeze(1)
        return pooled.tanh() if public.shape.pooler else pooled  # it can be undone, so it would hide nothing

    def run(self, task: str, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Run the task "embed" or "forward" of the owner, and count its traffic."""
        before = self.owner.spent
        batch = x.detach().to("cpu", torch.float64).numpy(), lengths.cpu().numpy()
        pooled = self.owner.forward(*batch) if task == "forward" else self.owner.embed(*batch)
        self._count(task, before, int(lengths.sum()))
        return torch.from_numpy(np.ascontiguousarray(pooled)).to(x)

    def step(self, gradient: torch.Tensor, tokens: int) -> None:
        """Have the server step its adapters by the gradient of the batch of the last pass, and count the traffic."""
        before = self.owner.spent
        self.owner.backward(gradient.detach().to("cpu", torch.float64).numpy(), self.rate, self.momentum)
        self._count("backward", before, tokens)

    def extra_repr(self) -> str:
        """Return what ``print(model)`` shows of this module."""
        return f"width={self.width}, period={self.period}, sequences={self.sequences}, rate={self.rate:g}"

    def _lengths(self, input_ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Return the tokens of each text, integers (n,)."""
        if input_ids.ndim != 2 or 0 in input_ids.shape:
            raise InputError(f"input_ids of shape {tuple(input_ids.shape)}; pass (n, length)")
        shown = torch.ones_like(input_ids) if mask is None else mask
        if shown.shape != input_ids.shape:
            raise InputError(f"attention_mask of shape {tuple(shown.shape)}; pass {tuple(input_ids.shape)}")
        shown = shown != 0
        lengths = shown.sum(dim=1)
        if not (shown == (torch.arange(shown.shape[1], device=shown.device) < lengths.unsqueeze(1))).all():
            raise InputError("padding stands before or between tokens; tokenize with padding_side='right'")
        if int(lengths.min()) == 0:
            raise InputError("a text has no tokens; leave it out, or let the tokenizer add its special tokens")
        if int(lengths.max()) > self.period:
            raise InputError(
                f"a text has {int(lengths.max())} tokens, and this server's model takes {self.period}: tokenize with "
                f"truncation=True, max_length={self.period}, or ask for a server with a longer period"
            )
        return lengths

    def _count(self, task: str, before: Spent, tokens: int) -> None:
        after = self.owner.spent
        traffic = Traffic(
            requests=after.tasks - before.tasks,
            tokens=tokens,
            bytes_up=after.bytes_up - before.bytes_up,
            bytes_down=after.bytes_down - before.bytes_down,
            seconds=after.seconds - before.seconds,
            wait_seconds=after.wait_seconds - before.wait_seconds,
        )
        self.meter.add("sealed", task, traffic)


class _Pooled(torch.autograd.Function):
    """A forward pass of the server as one node of PyTorch's graph; its backward pass is a step of the adapters."""

    @staticmethod
    def forward(
        ctx: Any, _trigger: torch.Tensor, x: torch.Tensor, lengths: torch.Tensor, encoder: SealedEncoder
    ) -> torch.Tensor:
        encoder._passes += 1
        ctx.encoder, ctx.number, ctx.tokens = encoder, encoder._passes, int(lengths.sum())
        return encoder.run("forward", x, lengths)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, None, None, None]:
        if ctx.number != ctx.encoder._passes:
            raise InputError(
                "backward is of an older batch than the last forward pass, and the server keeps one: call backward "
                "before the next batch goes forward"
            )
        ctx.encoder.step(gradient, ctx.tokens)
        return None, None, None, None
