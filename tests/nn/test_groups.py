"""Layers fed by one tensor: one request each way, and never another tensor's product."""

from __future__ import annotations

import copy
import gc
import weakref

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from nn_cases import CountingTransport, weight_in_force
from privtuner import linear
from privtuner.errors import ServiceError
from privtuner.nn import EncryptedGroup, EncryptedLinear, Session
from privtuner.nn.families import group_siblings, wire_name

SIZES = (4, 3, 5)
D_IN = 7


class Attention(torch.nn.Module):
    """Three layers of one group, to be called in any order."""

    def __init__(self) -> None:
        super().__init__()
        rng = np.random.default_rng(11)
        self.prepared = linear.prepare(rng.normal(size=(sum(SIZES), D_IN)))
        self.transport = CountingTransport({"q+k+v": self.prepared})
        group = EncryptedGroup("q+k+v", self.prepared.spec, SIZES, Session(self.transport, verify_every=0))
        self.members = torch.nn.ModuleList(EncryptedLinear(group, member) for member in range(3))

    def weights(self) -> list[torch.Tensor]:
        return list(torch.from_numpy(weight_in_force(self.prepared)).split(SIZES))

    def forward(self, x: torch.Tensor, order: tuple[int, ...] = (0, 1, 2)) -> list[torch.Tensor]:
        return [self.members[member](x) for member in order]


@pytest.fixture
def attention() -> Attention:
    return Attention()


def some_input(*, seed: int = 0, grad: bool = True, rows: int = 6) -> torch.Tensor:
    x = torch.randn(2, rows, D_IN, generator=torch.Generator().manual_seed(seed))
    return x.requires_grad_(grad)


def assert_product(attention: Attention, member: int, x: torch.Tensor, y: torch.Tensor) -> None:
    rows = x.detach().reshape(-1, D_IN).double()
    bound = linear.error_bound(attention.prepared.spec, rows.numpy())
    columns = np.split(bound, np.cumsum(SIZES)[:-1], axis=1)[member]
    want = rows @ attention.weights()[member].T
    assert np.all(np.abs(y.detach().reshape(want.shape).double().numpy() - want.numpy()) <= columns)


def assert_gradient(attention: Attention, grads: dict[int, torch.Tensor], got: torch.Tensor) -> None:
    stacked = torch.cat([grads.get(k, torch.zeros(2, 6, size)) for k, size in enumerate(SIZES)], dim=-1)
    rows = stacked.reshape(-1, sum(SIZES)).double()
    want = rows @ torch.cat(attention.weights())
    bound = linear.error_bound(attention.prepared.spec, rows.numpy(), "backward")
    assert np.all(np.abs(got.reshape(want.shape).double().numpy() - want.numpy()) <= bound)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_one_request_forward_and_one_backward(attention: Attention, order: tuple[int, ...]) -> None:
    x = some_input()
    outputs = attention(x, order)
    assert attention.transport.calls == ["q+k+v"]
    grads = {member: torch.randn_like(y) for member, y in zip(order, outputs, strict=True)}
    torch.autograd.backward(outputs, [grads[member] for member in order])
    assert attention.transport.calls == ["q+k+v"] * 2
    for member, y in zip(order, outputs, strict=True):
        assert_product(attention, member, x, y)
    assert x.grad is not None
    assert_gradient(attention, grads, x.grad)


@pytest.mark.parametrize("used", [(0,), (2,), (0, 2), (1, 2)])
def test_members_without_a_gradient_count_as_zeros(attention: Attention, used: tuple[int, ...]) -> None:
    x = some_input()
    outputs = attention(x)
    grads = {member: torch.randn_like(outputs[member]) for member in used}
    torch.autograd.backward([outputs[member] for member in used], list(grads.values()))
    assert x.grad is not None
    assert_gradient(attention, grads, x.grad)
    assert len(attention.transport.calls) == 2


def test_a_second_round_with_the_same_tensor_runs_anew(attention: Attention) -> None:
    x = some_input()
    first, second = attention(x), attention(x)
    assert len(attention.transport.calls) == 2
    (first[0].sum() + second[1].sum()).backward()
    assert len(attention.transport.calls) == 4
    assert x.grad is not None
    grads = {0: torch.ones(2, 6, SIZES[0]), 1: torch.ones(2, 6, SIZES[1])}
    separate = linear.error_bound(
        attention.prepared.spec, np.ones((12, sum(SIZES))), "backward"
    )  # each request's rows are shorter than this
    want = sum(grads[k].double() @ attention.weights()[k] for k in grads)
    assert np.all(np.abs((x.grad.double() - want).reshape(12, D_IN).numpy()) <= 2 * separate + 2**-20)


def test_another_tensor_of_equal_values_is_another_input(attention: Attention) -> None:
    x = some_input()
    attention.members[0](x)
    attention.members[1](x.clone())
    assert len(attention.transport.calls) == 2


def test_an_input_written_to_in_between_is_seen(attention: Attention) -> None:
    x = some_input(grad=False)
    attention.members[0](x)
    x.add_(1.0)
    assert_product(attention, 1, x, attention.members[1](x))
    assert len(attention.transport.calls) == 2


def test_an_inference_tensor_written_to_in_between_is_seen(attention: Attention) -> None:
    with torch.inference_mode():
        x = some_input(grad=False).clone()
        attention.members[0](x)
        assert_product(attention, 1, x, attention.members[1](x))
        assert len(attention.transport.calls) == 1
        x.add_(1.0)
        assert_product(attention, 2, x, attention.members[2](x))
    assert len(attention.transport.calls) == 2


def test_gradient_modes_do_not_mix(attention: Attention) -> None:
    x = some_input()
    with torch.no_grad():
        attention.members[0](x)
    y = attention.members[1](x)
    assert y.requires_grad
    plain = some_input(grad=False)
    attention.members[0](plain)
    assert attention.members[1](plain.requires_grad_()).requires_grad
    assert len(attention.transport.calls) == 4


def test_shared_products_are_dropped_with_their_input(attention: Attention) -> None:
    x = some_input() * 1.0
    y = attention.members[0](x)
    waiting = attention.members[0].group._shared
    assert waiting is not None
    product = weakref.ref(waiting.outputs[1])
    del waiting, y, x
    gc.collect()
    assert attention.members[0].group._shared is None
    assert product() is None


def test_nothing_is_held_once_all_members_are_served(attention: Attention) -> None:
    x = some_input()
    outputs = attention(x)
    assert attention.members[0].group._shared is None
    assert len(outputs) == 3


def test_interleaved_shapes(attention: Attention) -> None:
    small, large = some_input(rows=2), some_input(rows=9)
    first = attention.members[0](small)
    second = attention.members[0](large)
    assert_product(attention, 1, small, attention.members[1](small))
    assert_product(attention, 1, large, attention.members[1](large))
    assert (first.shape, second.shape) == ((2, 2, SIZES[0]), (2, 9, SIZES[0]))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(attention: Attention, reentrant: bool) -> None:
    x = some_input()

    def segment(z: torch.Tensor) -> torch.Tensor:
        q, k, v = attention(z * 2.0)
        return (q.sum(-1) * k.sum(-1)).tanh() + v.sum(-1)

    with torch.no_grad():
        clear = x.double().clone()
    clear.requires_grad_()
    q, k, v = (2.0 * clear @ w.T for w in attention.weights())
    ((q.sum(-1) * k.sum(-1)).tanh() + v.sum(-1)).sum().backward()
    checkpoint(segment, x, use_reentrant=reentrant).sum().backward()
    assert attention.transport.calls == ["q+k+v"] * 3, "forward, recomputation, backward"
    assert x.grad is not None
    assert clear.grad is not None
    # |x| <= 5, |W row sums| <= 20: 2^-9 is 40 times the first-order effect of the error bound 2^-20 an output.
    assert torch.allclose(x.grad.double(), clear.grad, atol=2**-9)


def test_copies_keep_their_members_together(attention: Attention) -> None:
    twin = copy.deepcopy(attention.members)
    assert twin[0].group is twin[1].group is twin[2].group
    assert twin[0].group is not attention.members[0].group
    x = some_input()
    for member in twin:
        member(x)
    assert attention.transport.calls == ["q+k+v"]


def test_a_failed_request_leaves_nothing_behind(attention: Attention) -> None:
    x = some_input()
    working = attention.members[0].group.session.transport

    class Broken:
        def apply(self, layer: str, request: bytes) -> list[bytes]:
            raise ServiceError("the line is cut")

    attention.members[0].group.session.transport = Broken()
    with pytest.raises(ServiceError, match="the line is cut"):
        attention.members[0](x)
    attention.members[0].group.session.transport = working
    assert_product(attention, 0, x, attention.members[0](x))


def test_siblings_are_grouped_by_parent() -> None:
    names = ["a.query", "a.key", "a.dense", "a.value", "b.key", "b.query", "c.up_proj", "c.gate_proj", "c.down_proj"]
    assert group_siblings(names) == [
        ("a.query", "a.key", "a.value"),
        ("a.dense",),
        ("b.query", "b.key"),
        ("c.gate_proj", "c.up_proj"),
        ("c.down_proj",),
    ]


def test_cross_attention_has_two_inputs() -> None:
    names = [f"layer.0.crossattention.self.{leaf}" for leaf in ("query", "key", "value")]
    assert group_siblings(names) == [(names[0],), (names[1], names[2])]


def test_wire_names() -> None:
    assert wire_name(("a.b.q", "a.b.k", "a.b.v")) == "a.b.q+k+v"
    assert wire_name(("q", "k")) == "q+k"
    assert wire_name(("a.dense",)) == "a.dense"
