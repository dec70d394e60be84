"""Shares, turns and quotas: what one tenant takes leaves enough for the others."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest

from privtuner import linear
from privtuner.errors import InputError, ServiceError
from privtuner.nn import GroupSpec, OwnerBundle, Split
from privtuner.retries import Retries
from privtuner.service import RemoteTransport, Server
from privtuner.service.quotas import Ledger, Quota
from privtuner.service.refusal import Refusal
from privtuner.service.room import Room
from privtuner.service.tenants import Tenant, Tenants, _host_of
from privtuner.turns import Turns

LAYER = linear.prepare(np.random.default_rng(5).standard_normal((300, 40)))
REQUEST, _ = linear.encrypt(np.ones((9, 40), np.float32), LAYER.spec)
REPLY = sum(map(len, linear.apply_blocks(LAYER, REQUEST, 256)))


def hold(room, tenant, units, seconds=0.0, most=None):
    held = room.hold(tenant, units, seconds, most)
    held.__enter__()
    return lambda: held.__exit__(None, None, None)


def test_whoever_comes_next_finds_as_much_room_as_each_of_the_others_took():
    room, held = Room(60, "things"), []
    for tenant, share in (("a", 30), ("b", 15), ("c", 7), ("d", 4), ("e", 2), ("f", 1)):
        held += [hold(room, tenant, 1) for _ in range(share)]
        with pytest.raises(Refusal, match="no room for more things") as caught:
            hold(room, tenant, 1)
        assert caught.value.code == grpc.StatusCode.RESOURCE_EXHAUSTED
    for release in held:
        release()
    assert room.held == 0


def test_room_that_is_given_back_is_given_to_those_who_wait():
    room, order = Room(8, "things"), []
    release = hold(room, "a", 4)

    def wait(tenant, units):
        give = hold(room, tenant, units, 20.0)
        order.append(tenant)
        give()

    threads = []
    for number, (tenant, units) in enumerate((("a", 1), ("b", 4), ("c", 1))):
        threads.append(threading.Thread(target=wait, args=(tenant, units)))
        threads[-1].start()
        while len(room._waiting) + len(order) <= number:
            threading.Event().wait(0.001)
    assert order == []  # c would fit, and does not overtake b, who holds nothing
    release()
    for thread in threads:
        thread.join(20)
    assert sorted(order) == ["a", "b", "c"]
    assert room.held == 0


def test_a_tenant_has_no_more_than_its_limit():
    room = Room(100, "things")
    with room.hold("a", 2, most=2):
        with pytest.raises(Refusal):
            hold(room, "a", 1, most=2)
        hold(room, "b", 1, most=2)()


def test_turns_go_to_whoever_computed_least():
    """One that asks ten times at once gets no more of the time than one that asks once."""
    turns, order, start = Turns(), [], threading.Event()

    def work(tenant):
        start.wait(20)
        for _ in range(4):
            with turns.turn(tenant):
                order.append(tenant)
                threading.Event().wait(0.004)

    with ThreadPoolExecutor(12) as pool, turns.turn("nobody"):
        done = [pool.submit(work, tenant) for tenant in ["flood"] * 10 + ["honest"]]
        start.set()
        while len(turns._waiting) < 11:
            threading.Event().wait(0.001)
    for one in done:
        one.result()
    assert len(order) == 44
    assert max(place for place, tenant in enumerate(order) if tenant == "honest") < 20


def test_names_of_strangers_do_not_pile_up(monkeypatch):
    monkeypatch.setattr("privtuner.turns._NAMES", 10)
    turns = Turns()
    for number in range(100):
        with turns.turn(f"stranger {number}"):
            threading.Event().wait(1e-4)
        assert len(turns._clocks) <= 10


def test_a_turn_is_given_up_in_a_pause_and_when_its_holder_fails():
    turns = Turns()
    with turns.turn("a") as turn:
        with turn.pause(), turns.turn("b"):
            pass
        assert turns.waiting == 0
    with pytest.raises(ZeroDivisionError), turns.turn("a"):
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), turns.turn("a") as turn, turn.pause():
        raise ZeroDivisionError
    with turns.turn("b"):
        pass


def test_whoever_is_gone_waits_no_longer():
    turns = Turns()

    def gone():
        raise ServiceError("the client is gone")

    with turns.turn("a"), pytest.raises(ServiceError, match="is gone"), turns.turn("b", gone):
        pass
    assert turns.waiting == 0
    with turns.turn("c"):
        pass


def test_a_day_has_its_quota():
    now = [1000 * 86400.0 + 6 * 3600]
    ledger, quota = Ledger(lambda: now[0]), Quota(requests=2, tokens=10)
    ledger.charge("a", quota, requests=1, tokens=4)
    with pytest.raises(Refusal, match=r"quota of 10 tokens a day is used up.*begins in 18\.0 h") as caught:
        ledger.charge("a", quota, requests=1, tokens=7)
    assert caught.value.code == grpc.StatusCode.FAILED_PRECONDITION
    ledger.charge("a", quota, requests=1, tokens=6)  # what was refused is not counted
    with pytest.raises(Refusal, match="2 requests a day"):
        ledger.charge("a", quota, requests=1)
    ledger.charge("b", quota, requests=1)
    ledger.spent("b", tokens=11)
    with pytest.raises(Refusal, match="10 tokens"):
        ledger.charge("b", quota, tokens=0, requests=1)
    now[0] += 86400
    ledger.charge("a", quota, requests=2)
    assert set(ledger._days) <= {"a", "b"}
    ledger.charge("c", Quota(), requests=1 << 40)
    assert set(ledger._days) == {"a", "c"}


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ({"tokns": 1}, "'tokns' is none; known: requests"),
        ({"tokens": -1}, "tokens = -1"),
        ({"tokens": True}, "True"),
        ([], "a list in place"),
    ],
)
def test_limits_that_are_none(entries, reason):
    with pytest.raises(InputError, match=reason):
        Quota.parse(entries)


def test_limits_are_read():
    assert Quota.parse({"tokens": 5, "calls": 2}) == Quota(tokens=5, calls=2)


@pytest.mark.parametrize(
    ("peer", "host"),
    [
        ("ipv4:10.0.0.7:4711", "10.0.0.7"),
        ("ipv6:%5B::1%5D:4711", "::/64"),
        ("ipv6:%5B2001:db8:1:2:3:4:5:6%5D:1", "2001:db8:1:2::/64"),
        ("ipv6:[::ffff:10.0.0.7]:1", "10.0.0.7"),
        ("ipv6:[fe80::1%25eth0]:1", "fe80::/64"),
    ],
)
def test_strangers_are_told_apart_by_their_hosts(peer, host):
    assert host in _host_of(peer)


class One(Tenants):
    """Everybody is one tenant, with these limits."""

    def __init__(self, **limits):
        super().__init__()
        self.quota = Quota(**limits)

    def of(self, context):
        return Tenant("one", quota=self.quota)


@pytest.mark.parametrize(
    ("limits", "served", "reason"),
    [
        ({"requests": 2}, 2, "quota of 2 requests a day"),
        ({"tokens": 20}, 2, "quota of 20 tokens a day"),
        ({"bytes": 2 * len(REQUEST) + REPLY}, 2, "bytes a day"),
        ({"memory": len(REQUEST) - 1}, 0, "longer than this tenant's limit"),
        ({"calls": 0}, 0, "no room for more calls"),
    ],
)
def test_a_server_keeps_to_a_tenants_limits(limits, served, reason):
    groups, specs = {"fc": GroupSpec("linear", {"fc": 300})}, {"fc": LAYER.spec}
    split = Split({"fc": LAYER}, OwnerBundle({"model_type": "bert"}, "BertModel", "float32", groups, specs, {}))
    with (
        Server(split, tenants=One(**limits)) as server,
        RemoteTransport(server.address, retries=Retries(0)) as transport,
    ):
        if "calls" not in limits:
            for _ in range(served):
                list(transport.apply("fc", REQUEST))
            call = lambda: list(transport.apply("fc", REQUEST))  # noqa: E731
        else:
            call = transport.hello
        with pytest.raises(ServiceError, match=reason):
            call()
