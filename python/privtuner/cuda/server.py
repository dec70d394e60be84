"""The linear scheme on GPUs: the same bytes on the wire, so that either side may have one or not."""

from __future__ import annotations

import queue
import threading
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from privtuner.copies import Stays
from privtuner.cuda import linear as kernels
from privtuner.cuda.device import Device
from privtuner.errors import EngineError, InputError
from privtuner.linear import BytesLike, QuantisedWeight
from privtuner.parties import BLOCK_BYTES, LinearServer, rows_of

__all__ = ["CudaServer"]

_BATCH_TOKENS = 16384
"""Most tokens of the waiting requests that are multiplied together."""


@dataclass
class _Ticket:
    """One request on its way through a device's worker."""

    layer: kernels.DeviceLayer
    request: kernels.Opened
    block_rows: int
    blocks: queue.SimpleQueue[memoryview | BaseException | None] = field(default_factory=queue.SimpleQueue)
    dropped: bool = False  # nobody waits for the reply any more

    def answers_with(self, other: _Ticket) -> bool:
        """Whether one product can serve both."""
        mine, theirs = self.request, other.request
        return self.layer is other.layer and mine.direction == theirs.direction and self.block_rows == other.block_rows


_Tickets = queue.SimpleQueue[_Ticket | None]


class _Worker:
    """One device: its layers, and a thread that multiplies what waits for it."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.held = 0  # bytes of layers
        self._tickets: _Tickets = queue.SimpleQueue()  # of the thread; the next thread gets another one
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def submit(self, ticket: _Ticket) -> None:
        with self._lock:
            if self._thread is None:
                self._tickets = queue.SimpleQueue()
                name = f"privtuner-{self.device.name}"
                self._thread = threading.Thread(target=self._run, args=(self._tickets,), name=name, daemon=True)
                self._thread.start()
            self._tickets.put(ticket)

    def close(self) -> None:
        with self._lock:
            thread, self._thread = self._thread, None
            if thread is not None:
                self._tickets.put(None)  # behind every ticket of that thread
        if thread is not None:
            thread.join()

    def _run(self, tickets: _Tickets) -> None:
        following: _Ticket | None = None
        while (first := following or tickets.get()) is not None:
            batch, following = self._batch(first, tickets)
            self._answer(batch)
            del first, batch  # not to be kept until the next one comes

    def _batch(self, first: _Ticket, tickets: _Tickets) -> tuple[list[_Ticket], _Ticket | None]:
        """Collect ``first`` and what waits behind it for the same layer and direction; then one that does not."""
        batch, tokens = [first], first.request.tokens
        while not tickets.empty():
            ticket = tickets.get()
            if ticket is None:
                tickets.put(None)  # the end, once this batch is done
                break
            tokens += ticket.request.tokens
            if not ticket.answers_with(first) or tokens > _BATCH_TOKENS:
                return batch, ticket
            batch.append(ticket)
        return batch, None

    def _answer(self, batch: list[_Ticket]) -> None:
        waiting = [ticket for ticket in batch if not ticket.dropped]
        if waiting and not self._answer_together(waiting):
            for ticket in waiting:
                self._answer_together([ticket])

    def _answer_together(self, waiting: list[_Ticket]) -> bool:
        """Answer them together; False if they do not fit together and may fit one by one.

        Whoever calls then has left what was raised, and with it the memory of the attempt.
        """
        first = waiting[0]
        sent = False
        try:
            with self.device.active():
                for blocks in kernels.answer(first.layer, [ticket.request for ticket in waiting], first.block_rows):
                    for ticket, block in zip(waiting, blocks, strict=True):
                        ticket.blocks.put(block)
                    sent = True
                    if all(ticket.dropped for ticket in waiting):
                        return True
        except BaseException as error:  # whatever it is: somebody waits for an answer
            if isinstance(error, EngineError) and not sent and len(waiting) > 1:
                return False
            traceback.clear_frames(error.__traceback__)  # they hold memory of the device
            for ticket in waiting:
                ticket.blocks.put(error)
            return True
        for ticket in waiting:
            ticket.blocks.put(None)
        return True


class CudaServer(LinearServer, Stays):
    """Answers requests of the linear scheme on one or several GPUs.

    A layer lies on one device, one or two bytes a weight, where it stays. Requests that wait for the same layer are
    multiplied together. Replies are kept in memory until they are taken.

    Args:
        devices: from `privtuner.cuda.devices`.

    Raises:
        privtuner.errors.InputError: no device.
    """

    scheme = "linear"
    stays = "a server on GPUs cannot be pickled: make one of the other process's privtuner.cuda.devices there"

    def __init__(self, devices: Sequence[Device]) -> None:
        if not devices:
            raise InputError("no device was given; privtuner.cuda.devices() lists those of this machine")
        self._workers = [_Worker(device) for device in devices]
        self._placed: dict[bytes, tuple[_Worker, kernels.DeviceLayer]] = {}
        self._lock = threading.Lock()

    def load(self, layers: Iterable[QuantisedWeight]) -> Mapping[str, int]:
        """Put every layer on a device, the largest first, each where the most memory is left.

        Returns:
            Bytes of layers on each device, by its name.

        Raises:
            privtuner.errors.EngineError: they do not fit; the message says how many bytes each device has left.
        """
        for prepared in sorted(layers, key=lambda layer: -layer.spec.d_out * layer.spec.d_in):
            self._place(prepared)
        return {worker.device.name: worker.held for worker in self._workers}

    def gather(self, prepared: QuantisedWeight, parts: Sequence[bytes]) -> BytesLike:
        """Join a request in page-locked memory; see `privtuner.parties.LinearServer`."""
        if len(parts) > 1:
            return kernels.gather(self._place(prepared)[0].device, parts)
        return b"".join(parts)  # of a single part, the part itself

    def answer(
        self, prepared: QuantisedWeight, request: BytesLike, block_bytes: int = BLOCK_BYTES
    ) -> Iterator[BytesLike]:
        """Yield the reply to ``request`` in blocks; see `privtuner.parties.LinearServer`."""
        worker, layer = self._place(prepared)
        opened = kernels.open_request(layer, request)
        ticket = _Ticket(layer, opened, rows_of(block_bytes, 4 * opened.tokens))
        worker.submit(ticket)
        try:
            while (block := ticket.blocks.get()) is not None:
                if isinstance(block, BaseException):
                    raise block
                yield block
        finally:
            ticket.dropped = True

    def close(self) -> None:
        """End the devices' threads; a later request starts them again."""
        for worker in self._workers:
            worker.close()

    def _place(self, prepared: QuantisedWeight) -> tuple[_Worker, kernels.DeviceLayer]:
        with self._lock:
            found = self._placed.get(prepared.spec.id)
            if found is None:
                worker = max(self._workers, key=lambda worker: (worker.device.free_bytes(), -worker.held))
                with worker.device.active():
                    found = (worker, kernels.DeviceLayer(worker.device, prepared))
                worker.held += found[1].nbytes
                self._placed[prepared.spec.id] = found
            return found
