"""The data owner's end of the wire: one encrypted product, counted."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from privtuner import linear, schemes
from privtuner.errors import InputError
from privtuner.nn.live import LiveResource
from privtuner.nn.passes import PassTracker
from privtuner.nn.traffic import Traffic, TrafficMeter
from privtuner.nn.verification import VERIFY_EVERY, Verifier
from privtuner.parties import LinearClient, Transport

if TYPE_CHECKING:
    from privtuner.cuda import Device

__all__ = ["Session"]

_DIVERGED = (
    "the activations that reach it are not finite (NaN or infinity): the run has diverged (lower the learning rate or "
    "clip gradients), or float16 has overflowed (compute in bfloat16 or float32)"
)


_MOST_TOKENS = 1 << 24  # what a message holds


class _TimedBlocks:
    """Passes blocks on, counting their bytes and the time spent waiting for them."""

    def __init__(self, blocks: Iterable[linear.BytesLike]) -> None:
        self._blocks = blocks
        self.bytes = 0
        self.wait_seconds = 0.0

    def __iter__(self) -> Iterator[linear.BytesLike]:
        start = time.perf_counter()
        for block in self._blocks:
            self.wait_seconds += time.perf_counter() - start
            self.bytes += len(block)
            yield block
            start = time.perf_counter()
        self.wait_seconds += time.perf_counter() - start


class Session(LiveResource):
    """What all encrypted layers of one model share: transport, keys, mask products, traffic counts, passes.

    Args:
        transport: carries requests to the server.
        scheme: how linear layers are encrypted, one of `privtuner.schemes.SCHEMES`: "linear", or "openfhe" for
            ciphertexts of OpenFHE, with keys made here. What the server was started with.
        device: where linear layers are encrypted and decrypted: "cpu", or with the scheme linear "cuda", "cuda:1".
            Tensors on that GPU are then read and made there, without a copy through the processor's memory.
        mask_cache_bytes: memory for the products of the public masks with the weights, which are then asked for once a
            layer and direction instead of in every request; see `privtuner.linear.MaskCache`. A layer takes
            8 KB an output feature forward and 8 KB an input feature backward with ``linear-w8``, twice that with
            ``linear-w16``. None sets no limit, 0 keeps none. OpenFHE's ciphertexts have no masks to keep.
        pad_tokens_to: rows of zeros fill up every request to a multiple of so many tokens, up to 2^24, and the server
            sees that number alone. As many as a batch can have at most make all requests of a layer equally long,
            whatever the tokenizer, the texts and the padding: give batches of one shape, too. None sends the tokens.
        verify_every: replies are checked with probability one in so many, see `privtuner.nn.verification`; 0 checks
            none. A layer costs a request of four tokens more in each direction for that, now and then.

    Raises:
        privtuner.errors.InputError: ``transport`` lacks ``apply``, ``mask_cache_bytes`` or ``verify_every`` is
            negative, ``pad_tokens_to`` is out of range, or there is no such scheme or device.
        privtuner.errors.EngineError: OpenFHE, or what a GPU needs, is missing on this machine.
    """

    def __init__(
        self,
        transport: Transport,
        scheme: str = "linear",
        device: str | Device = "cpu",
        *,
        mask_cache_bytes: int | None = None,
        pad_tokens_to: int | None = None,
        verify_every: int = VERIFY_EVERY,
    ) -> None:
        if not isinstance(transport, Transport):
            raise InputError(
                f"transport is a {type(transport).__name__} without an apply(layer, request) method; "
                "give privtuner.nn.LocalTransport(...) or a remote transport"
            )
        self.transport = transport
        self.pad_tokens_to = pad_tokens_to
        self.meter = TrafficMeter()
        self.passes = PassTracker()
        self._client: LinearClient = schemes.scheme(scheme).client(device, mask_cache_bytes)
        self.verifier = Verifier(self._client, self._ask, verify_every)

    @property
    def on_device(self) -> bool:
        """Whether `product` takes and returns arrays of a GPU, see `privtuner.parties.LinearClient`."""
        return self._client.on_device

    @property
    def pad_tokens_to(self) -> int | None:
        """Requests are filled up to a multiple of so many tokens; may be set between two of them."""
        return self._pad_tokens_to

    @pad_tokens_to.setter
    def pad_tokens_to(self, tokens: int | None) -> None:
        if tokens is not None and not 1 <= tokens <= _MOST_TOKENS:
            raise InputError(f"pad_tokens_to is {tokens}; give a number of tokens from 1 to {_MOST_TOKENS}")
        self._pad_tokens_to = tokens

    def padded(self, tokens: int) -> int:
        """Return how many tokens a request of ``tokens`` tokens holds."""
        step = self._pad_tokens_to
        return tokens if step is None else step * max(1, -(-tokens // step))

    def product(self, layer: str, spec: linear.LayerSpec, x: Any, direction: linear.Direction) -> Any:
        """Return ``x @ W.T`` (forward) or ``x @ W`` (backward), computed by the server on encrypted rows, and checked.

        Args:
            layer: wire name.
            spec: the layer's description.
            x: float32 (tokens, d_in) forward, (tokens, d_out) backward; at least one token. A NumPy array, or if
                ``on_device`` anything with ``__dlpack__``, such as a CUDA tensor.
            direction: "forward" or "backward".

        Returns:
            float32 (tokens, d_out) forward, (tokens, d_in) backward, with ``__dlpack__``.

        Raises:
            privtuner.errors.InputError: ``x`` holds a NaN or an infinity, or has the wrong shape.
            privtuner.errors.IntegrityError: the server computed something else.
            privtuner.errors.PrivtunerError: the transport failed or the reply does not fit the request.
        """
        y = self._ask(layer, spec, x, direction)
        self.verifier.check(layer, spec, x, y, direction)
        return y

    def _ask(self, layer: str, spec: linear.LayerSpec, x: Any, direction: linear.Direction) -> Any:
        """Return what the server answers, unchecked; see `product`."""
        start = time.perf_counter()
        try:
            request, secret = self._client.encrypt(x, spec, direction)
        except InputError as error:
            if direction == "forward" and not bool(torch.as_tensor(x).isfinite().all()):
                raise InputError(f"layer '{layer}': {_DIVERGED}") from None
            what = "input" if direction == "forward" else "output gradient"
            raise InputError(f"layer '{layer}', {what}: {error}") from error
        sent = time.perf_counter()
        blocks = _TimedBlocks(self.transport.apply(layer, request))
        opened = time.perf_counter()
        y = self._client.decrypt(blocks, secret)
        traffic = Traffic(
            requests=1,
            tokens=x.shape[0],
            bytes_up=len(request),
            bytes_down=blocks.bytes,
            seconds=time.perf_counter() - start,
            wait_seconds=opened - sent + blocks.wait_seconds,
        )
        self.meter.add(layer, direction, traffic)
        return y
