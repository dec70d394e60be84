"""Jobs of a sealed model: what owner and server do together, over both transports."""

from __future__ import annotations

import hashlib
import os
import threading
import time

import numpy as np
import pytest

from connections import Connection
from privtuner.ckks import Refresher
from privtuner.errors import CkksError, InputError, LostError, MessageError, SecretError, ServiceError
from privtuner.retries import Retries
from privtuner.sealed.owner import SealedOwner
from privtuner.sealed.server import SealedService
from privtuner.sealed.state import digest_of, forget_states
from privtuner.service import RemoteTransport
from sealed_cases import (
    PAIRS,
    SEQUENCES,
    SLOTS,
    TOLERANCE,
    WIDTH,
    Between,
    G,
    TinyModel,
    Twin,
    batch,
    served,
    train,
    type_of,
)


def test_steps_are_those_of_the_clear_model(pair):
    told, recorded = [], []
    owner, running = pair(owner={"progress": told.append})
    if hasattr(running, "counts"):
        running._counter._record = recorded.append
    train(owner, Twin(TinyModel()), steps=2)
    assert owner.step == 2
    assert owner.spent.tasks == 5
    assert owner.spent.refreshes == 3 * PAIRS + 2 * 3
    assert 0 < owner.spent.wait_seconds < owner.spent.seconds
    assert [p.done for p in told[:4]] == [2, 1, 2, 3]
    assert {(p.task, p.stage, p.total) for p in told} == {
        ("forward", "product", 2),
        ("backward", "gradient", 3),
        ("backward", "velocity", 3),
        ("backward", "adapters", 3),
        ("embed", "product", 2),
    }
    if hasattr(running, "counts"):
        counts = running.counts().layers
        assert {key: (c.requests, c.tokens, c.refreshes) for key, c in counts.items()} == {
            ("sealed", "forward"): (2, 2 * SLOTS, 4),
            ("sealed", "backward"): (2, 2 * SLOTS, 6),
            ("sealed", "embed"): (1, SLOTS, 2),
        }
        assert 0 < sum(c.bytes_in for c in counts.values()) < owner.spent.bytes_up
        assert {len(event.key) for event in recorded} == {32}
        assert len({event.key for event in recorded}) == 1
        states = [event.state for event in recorded if event.direction == "backward"]
        assert states[0] != states[1] == digest_of(owner._kept)
        assert {event.state for event in recorded if event.direction != "backward"} == {b""}


def test_large_gradients_are_scaled_down_and_the_rate_is_theirs(pair):
    owner, _ = pair()
    twin, (x, lengths) = Twin(TinyModel()), batch()
    owner.forward(x, lengths)
    owner.backward(64 * G, 8.0, 0.5)
    scaled = 64 * G / np.maximum(1, np.abs(64 * G).max(axis=1, keepdims=True) * SEQUENCES)
    twin.step(x, scaled, 8.0, 0.5)
    assert np.abs(owner.embed(x, lengths) - twin.model.pooled(x, twin.a)).max() < TOLERANCE


def test_an_owner_that_was_closed_goes_on(pair):
    owner, _ = pair(service={"patience": 5.0})
    twin = Twin(TinyModel())
    train(owner, twin)
    owner.close()
    train(owner, twin)
    assert owner.step == 2


def test_a_dropped_stream_in_mid_step_is_repeated(pair):
    """Whatever message of the step is the last that passes, and with fresh encryptions."""
    for last in (1, 3, 6, 11):
        owner, _ = pair(owner={"retries": Retries(attempts=1, first=0.0)}, service={"patience": 5.0})
        twin, (x, lengths), left = Twin(TinyModel()), batch(), [None]

        def cut(message, left=left):
            if left[0] is not None:
                left[0] -= 1
                if left[0] == 0:
                    left[0] = None
                    raise LostError("the line was cut")
            return [message]

        owner._transport = between = Between(owner._transport, cut, cut)
        owner.forward(x, lengths)
        left[0] = last
        owner.backward(G, 8.0, 0.5)
        assert left[0] is None
        twin.step(x, G, 8.0, 0.5)
        assert np.abs(owner.embed(x, lengths) - twin.model.pooled(x, twin.a)).max() < TOLERANCE
        assert owner.step == 1
        encrypted = [m for m in between.seen if type_of_pair(m)[1] in ("INPUTS", "MASK", "GRADIENT", "REFRESHED")]
        assert len(set(encrypted)) == len(encrypted)
        owner.close()


def test_without_retries_the_error_is_clear_and_the_step_can_be_repeated(pair):
    owner, _ = pair(service={"patience": 5.0})
    twin, (x, lengths) = Twin(TinyModel()), batch()

    def cut(message):
        if between.armed and len(between.seen) > between.armed:
            between.armed = 0
            raise LostError("the line was cut")
        return [message]

    owner._transport = between = Between(owner._transport, cut)
    between.armed = 0
    owner.forward(x, lengths)
    between.armed = len(between.seen) + 3
    with pytest.raises(ServiceError, match="cut|lost during the job"):
        owner.backward(G, 8.0, 0.5)
    assert owner.step == 0
    train(owner, twin)


def test_a_refusal_is_not_repeated():
    calls = []

    class Refusing:
        closed = False

        def job(self, messages):
            calls.append(messages)
            raise ServiceError("the server refused the job")

    owner = SealedOwner(TinyModel().public, Refusing(), allow_insecure=True, retries=Retries())
    with pytest.raises(ServiceError, match="refused"):
        owner.embed(*batch())
    assert len(calls) == 1


def test_an_owner_that_gives_up_cancels_its_call():
    """So that the server need not compute to the end of the task to notice."""
    model, free, jobs = TinyModel(), threading.Event(), []
    model.before_backward = lambda: free.wait(20)
    with served("grpc", model) as (transport, _):
        whole = transport.job
        transport.job = lambda messages: jobs.append(whole(messages)) or jobs[-1]
        owner = SealedOwner(model.public, transport, allow_insecure=True, patience=1.0)
        owner.forward(*batch())
        with pytest.raises(LostError, match="sent nothing for 1 s"):
            owner.backward(G, 8.0)
        assert jobs[0]._call.cancelled()
        free.set()


def test_what_is_trained_beside_the_adapters_is_saved_with_them(pair, tmp_path):
    """It is of the same step as they are, whatever moment a process ends at."""
    file = tmp_path / "run"
    owner, _ = pair(owner={"state": file})

    def saved():
        return SealedOwner(owner.public, None, state=file, allow_insecure=True)

    assert saved().companion == b""
    owner.attach(0, b"at the start")
    owner.attach(1, b"after a step")
    assert (saved().step, saved().companion) == (0, b"at the start")
    owner.forward(*batch())
    assert saved().companion == b"at the start"
    owner.backward(G, 8.0)
    assert (saved().step, saved().companion) == (1, b"after a step")
    for step, companion in ((0, b""), (3, b""), (1, bytes((32 << 20) + 1))):
        with pytest.raises(InputError, match=f"of step {step}, at step 1: at most|for step {step}, after step 1"):
            owner.attach(step, companion)
    owner.close()


def test_a_killed_server_that_is_started_again():
    """The locked state of the owner is all that the new one needs."""
    model = TinyModel()
    with served("grpc", model) as (_, first), Connection(first.address) as line:
        owner = SealedOwner(model.public, RemoteTransport(line.address), allow_insecure=True, retries=Retries())
        twin, (x, lengths) = Twin(model), batch()
        train(owner, twin)
        owner.forward(x, lengths)
        with served("grpc", TinyModel()) as (_, second):
            line.cut(second.address)
            owner.backward(G, 8.0, 0.5)
            twin.step(x, G, 8.0, 0.5)
            assert np.abs(owner.embed(x, lengths) - twin.model.pooled(x, twin.a)).max() < TOLERANCE
            assert owner.step == 2
        owner.close()


def test_a_transport_that_was_closed_is_not_tried_again():
    model = TinyModel()
    with served("grpc", model) as (transport, _):
        owner = SealedOwner(model.public, transport, allow_insecure=True, retries=Retries())
        owner.embed(*batch())
        transport.close()
        with pytest.raises(ServiceError, match="was closed"):
            owner.embed(*batch())


def test_a_server_with_other_weights_is_noticed(pair):
    owner, _ = pair()
    train(owner, Twin(TinyModel()))
    owner.close()
    other, _ = pair(TinyModel(seed=7))
    owner._transport = other._transport
    with pytest.raises((MessageError, ServiceError), match="other weights"):
        owner.embed(*batch())


def test_the_state_of_another_branch_is_not_taken_for_this_one(tmp_path):
    """A server that saved as many steps of the same run, but others, is sent the owner's."""
    model = TinyModel()
    x, lengths = batch()
    with served("local", model, state=tmp_path / "server") as (transport, _):
        mine, other = tmp_path / "mine", tmp_path / "other"
        owner = SealedOwner(model.public, transport, state=mine, allow_insecure=True)
        other.write_bytes(mine.read_bytes())
        train(owner, Twin(model))
        before = owner.embed(x, lengths)
        owner.close()
        branch = SealedOwner(model.public, transport, state=other, allow_insecure=True)
        branch.forward(x, lengths)
        branch.backward(-G, 8.0, 0.5)
        branch.close()
        assert branch.step == owner.step
        again = SealedOwner(model.public, between := Between(transport), state=mine, allow_insecure=True)
        assert np.abs(again.embed(x, lengths) - before).max() < TOLERANCE
        again.close()
    assert ("up", "RESUME") in set(map(type_of_pair, between.seen))


def test_an_embedding_beyond_the_bound_leaves_the_connection_alone():
    """The server, which named the bound, sees nothing of it: no stream ends and no key is made anew."""
    model = TinyModel()
    x, lengths = batch()
    with served("local", model) as (transport, _):
        owner = SealedOwner(model.public, between := Between(transport), allow_insecure=True)
        owner.embed(x, lengths)
        sent = len(between.seen)
        with pytest.raises(InputError, match="beyond"):
            owner.embed(x * 1e6, lengths)
        assert len(between.seen) == sent
        owner.embed(x, lengths)
        owner.close()
    assert list(map(type_of_pair, between.seen)).count(("up", "OPEN")) == 1


def test_gradients_that_are_scaled_down_are_counted():
    model = TinyModel()
    with served("local", model) as (transport, _):
        owner = SealedOwner(model.public, transport, allow_insecure=True)
        for factor, scaled in ((1e-9, 0), (1e9, len(G))):
            owner.forward(*batch())
            owner.backward(G * factor, 8.0)
            assert owner.scaled_down == scaled
        owner.close()


def test_a_server_that_saved_the_state_is_not_sent_it(tmp_path, caplog):
    model = TinyModel()
    twin = Twin(model)
    with served("local", model, state=tmp_path) as (transport, _):
        owner = SealedOwner(model.public, between := Between(transport), allow_insecure=True)
        train(owner, twin)
        owner.close()
    (file,) = tmp_path.iterdir()
    assert file.stat().st_mode & 0o77 == 0
    with served("local", model, state=tmp_path) as (transport, _):
        owner._transport = between = Between(transport)
        train(owner, twin)
        owner.close()
    seen = set(map(type_of_pair, between.seen))
    assert ("up", "STORED") in seen
    assert ("up", "RESUME") not in seen
    file.write_bytes(file.read_bytes()[:-1])
    with served("local", model, state=tmp_path) as (transport, _):
        owner._transport = between = Between(transport)
        train(owner, twin)
        owner.close()
    assert ("up", "RESUME") in set(map(type_of_pair, between.seen))
    assert "truncated" in caplog.text


def type_of_pair(pair):
    return pair[0], type_of(pair[1]).name


def test_an_owner_that_was_killed_goes_on_in_another_process(pair, tmp_path):
    """All that the new one has is the file."""
    file, twin = tmp_path / "run", Twin(TinyModel())
    for steps in (1, 2):
        owner, _ = pair(owner={"state": file})
        train(owner, twin)
        assert owner.step == steps
        owner.close()
    assert file.stat().st_mode & 0o77 == 0
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_files_of_an_owner_that_are_refused(tmp_path):
    model, file = TinyModel(), tmp_path / "run"

    def owner(model=model, path=file):
        return SealedOwner(model.public, None, state=path, allow_insecure=True)

    run = owner()._run
    assert owner()._run == run
    with pytest.raises(InputError, match="another model"):
        owner(TinyModel(seed=7))
    with pytest.raises(InputError, match="cannot be written"):
        owner(path=tmp_path / "nowhere" / "run")
    with pytest.raises(InputError, match="cannot be read"):
        owner(path=tmp_path)
    whole = file.read_bytes()
    for content, match in (
        (whole[:-1], "truncated"),
        (whole[:2], "truncated"),
        (whole[:60] + bytes([whole[60] ^ 1]) + whole[61:], "damaged"),
        (b"", "truncated"),
        (hashlib.sha256(b"").digest(), "holds no state"),
        (bytes(64 << 20), "at most"),
    ):
        file.write_bytes(content)
        with pytest.raises(MessageError, match=match):
            owner()


def test_saved_runs_give_way_to_younger_ones(tmp_path):
    for number in range(4):
        (tmp_path / f"{number}.state").touch()
        os.utime(tmp_path / f"{number}.state", (1e9 + number, 1e9 + number))
    (tmp_path / "another").touch()
    for runs, seconds, left in ((3, 1e10, {"1", "2", "3"}), (9, time.time() - 1e9 - 2.5, {"3"}), (9, 1.0, set())):
        forget_states(tmp_path, runs, seconds)
        assert {path.stem for path in tmp_path.glob("*.state")} == left
    assert (tmp_path / "another").exists()


def test_runs_are_saved_for_their_tenants(tmp_path):
    """Whatever these are called, and no more than each may have."""
    model = TinyModel()
    service = SealedService(model, state=tmp_path)

    class Of:
        closed = False

        def __init__(self, runs):
            self.runs = runs

        def job(self, messages):
            return service.job(messages, None, "../a", self.runs)

    for runs in (1, 0):
        with SealedOwner(model.public, Of(runs), allow_insecure=True) as owner:
            owner.forward(*batch())
            owner.backward(G, 8.0)
        if runs:
            saved = tmp_path / "tenant-..%2Fa" / f"{owner._run.hex()}.state"
        assert [path for path in tmp_path.rglob("*") if path.is_file()] == [saved]


def test_a_server_that_cannot_save_goes_on(tmp_path, caplog):
    model, folder = TinyModel(), tmp_path / "state"
    with served("local", model, state=folder) as (transport, _):
        owner = SealedOwner(model.public, transport, allow_insecure=True)
        owner.forward(*batch())
        folder.rmdir()
        folder.write_bytes(b"")
        owner.backward(G, 8.0)
        assert owner.step == 1
        assert "the data owner alone has it" in caplog.text
        owner.close()


def test_a_key_that_served_enough_is_refused(pair):
    owner, _ = pair()
    owner._refreshed = Refresher.LIMIT - PAIRS
    owner.embed(*batch())
    with pytest.raises(CkksError, match="begin a new run"):
        owner.embed(*batch())


def test_adapters_are_released_where_the_server_says_so(pair):
    owner, _ = pair(service={"release": True})
    twin = Twin(TinyModel())
    train(owner, twin)
    assert np.abs(owner.release()[:, 0] - twin.a).max() < TOLERANCE
    keeping, _ = pair()
    with pytest.raises((MessageError, ServiceError), match="keeps adapters to itself"):
        keeping.release()


def test_sessions_are_bounded(pair):
    model, begun, free = TinyModel(), threading.Event(), threading.Event()
    model.before_backward = lambda: begun.set() or free.wait(20)
    owner, running = pair(model)
    service = running._host.sealed if hasattr(running, "_host") else running
    owner.forward(*batch())
    working = threading.Thread(target=owner.backward, args=(G, 8.0))
    working.start()
    assert begun.wait(20)
    second = SealedOwner(owner.public, owner._transport, allow_insecure=True)
    service.patience = 0.05
    with pytest.raises(ServiceError, match="busy with 1 other"):
        second.embed(*batch())
    service.patience = 20.0
    free.set()
    working.join(20)


def test_an_idle_session_gives_way(pair):
    """The first owner comes back later, with its adapters."""
    owner, _ = pair(service={"patience": 1.5}, owner={"retries": Retries()})
    twin = Twin(TinyModel())
    train(owner, twin)
    with SealedOwner(owner.public, owner._transport, allow_insecure=True) as second:
        second.embed(*batch())
    train(owner, twin)


def test_one_that_waits_for_its_owner_lets_others_compute(pair):
    """An owner that takes its time for a refresh stops nobody else."""
    owner, _ = pair(service={"sessions": 2, "patience": 20.0})
    asked, free, refresh = threading.Event(), threading.Event(), owner._secret.refresh

    def late(*arguments):
        asked.set()
        assert free.wait(20)
        return refresh(*arguments)

    owner._secret.refresh = late
    working = threading.Thread(target=owner.embed, args=batch())
    working.start()
    assert asked.wait(20)
    with SealedOwner(owner.public, owner._transport, allow_insecure=True) as second:
        train(second, Twin(TinyModel()))
    free.set()
    working.join(20)
    assert owner.spent.tasks == 1


def test_a_server_that_stalls_meets_the_owners_deadline(pair):
    model, free = TinyModel(), threading.Event()
    model.before_backward = lambda: free.wait(20)
    owner, _ = pair(model, owner={"patience": 0.3})
    owner.forward(*batch())
    with pytest.raises(ServiceError, match=r"the server sent nothing for 0\.3 s"):
        owner.backward(G, 8.0)
    free.set()


def test_an_owner_that_stalls_meets_the_servers_deadline(pair):
    owner, _ = pair(service={"patience": 0.3})
    owner.forward(*batch())
    waiting, refresh = threading.Event(), owner._secret.refresh

    def late(*arguments):
        waiting.wait(1.0)
        return refresh(*arguments)

    owner._secret.refresh = late
    with pytest.raises(ServiceError, match=r"the data owner sent nothing for 0\.3 s"):
        owner.backward(G, 8.0)


def test_an_idle_session_ends(pair):
    owner, _ = pair(service={"idle": 0.2}, owner={"retries": Retries(attempts=1, first=0.0)})
    twin = Twin(TinyModel())
    train(owner, twin)
    threading.Event().wait(0.4)
    train(owner, twin)


class Spoilt(TinyModel):
    """Reveals what ``spoil`` makes of the pooled vectors."""

    def __init__(self, spoil):
        super().__init__()
        self.last = spoil


@pytest.mark.parametrize(
    "spoil",
    [lambda ev, x: ev.add(x, 1e-3), lambda ev, x: ev.add(x, 300.0)],
    ids=["zeroed slots hold something", "beyond the bound"],
)
def test_results_that_are_none_are_noticed_and_the_server_is_not_told(spoil):
    model = Spoilt(spoil)
    with served("local", model) as (transport, _):
        owner = SealedOwner(model.public, between := Between(transport), allow_insecure=True)
        with pytest.raises(CkksError, match="left the domain"):
            owner.embed(*batch())
        passed = len(between.seen)
        with pytest.raises(CkksError, match="left the domain"):
            owner.embed(*batch())
        honest = TinyModel()
        with served("local", honest) as (other, _):
            fine = SealedOwner(honest.public, Between(other), allow_insecure=True)
            fine.embed(*batch())
            fine.embed(*batch())
        assert type_of_pair(between.seen[passed - 1]) == ("down", "POOLED")
        assert len(between.seen) == len(fine._transport.seen)
        owner.close()
        fine.close()


@pytest.mark.parametrize(
    ("x", "lengths", "hint"),
    [
        (np.zeros((3, 5, WIDTH)), [1, 1, 1], "truncate them"),
        (np.zeros((SEQUENCES + 1, 4, WIDTH)), [1] * (SEQUENCES + 1), "1 to 128 sequences"),
        (np.zeros((0, 4, WIDTH)), [], "1 to 128 sequences"),
        (np.zeros((3, 4, WIDTH + 1)), [1, 1, 1], r"pass \(n, length, 4\)"),
        (np.full((3, 4, WIDTH), np.nan), [1, 1, 1], "NaN"),
        (np.zeros((3, 4, WIDTH)), [0, 1, 1], "whole numbers from 1 to 4"),
        (np.zeros((3, 4, WIDTH)), [1, 5, 1], "whole numbers from 1 to 4"),
        (np.zeros((3, 4, WIDTH)), [1.0, 1.0, 1.0], "whole numbers"),
        (np.zeros((3, 4, WIDTH)), [1, 1], "pass 3 whole numbers"),
    ],
)
def test_batches_that_are_refused_before_anything_is_sent(x, lengths, hint):
    model = TinyModel()
    owner = SealedOwner(model.public, None, allow_insecure=True)
    with pytest.raises(InputError, match=hint):
        owner.forward(x, np.array(lengths))


def test_arguments_that_are_refused():
    model = TinyModel()
    with pytest.raises(InputError, match="protects nothing"):
        SealedOwner(model.public, None)
    for options, hint in (({"gradient_bound": 0.3}, "power of two"), ({"patience": 0}, "more than 0")):
        with pytest.raises(InputError, match=hint):
            SealedOwner(model.public, None, allow_insecure=True, **options)
    owner = SealedOwner(model.public, None, allow_insecure=True)
    with pytest.raises(InputError, match="there is none"):
        owner.backward(G, 1.0)
    with pytest.raises(SecretError):
        __import__("pickle").dumps(owner)


def test_gradients_that_are_refused(pair):
    owner, _ = pair()
    owner.forward(*batch())
    for g, rate, momentum in ((G[:2], 1, 0.5), (G * np.inf, 1, 0.5), (G, -1, 0.5), (G, 1, 1.0), (G, np.nan, 0.5)):
        with pytest.raises(InputError):
            owner.backward(g, rate, momentum)
    owner.backward(G, 1.0)
    with pytest.raises(InputError, match="there is none"):
        owner.backward(G, 1.0)
