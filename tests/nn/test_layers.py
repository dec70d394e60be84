"""One encrypted layer: exact to the error bound in both directions, and a well-behaved PyTorch module."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loops import each
from nn_cases import CountingTransport, weight_in_force
from privtuner import linear
from privtuner.errors import InputError, WeightWithheldError
from privtuner.nn import EncryptedGroup, EncryptedLinear, LocalTransport, Session, traffic_of

# Unit roundoff, and half the smallest subnormal, of the dtypes that layers return.
ROUNDING = {
    torch.float32: (2.0**-24, 2.0**-150),
    torch.bfloat16: (2.0**-8, 2.0**-134),
    torch.float16: (2.0**-11, 2.0**-25),
}


def make_layer(
    d_out: int = 6, d_in: int = 9, *, bias: bool = True, preset: str = "linear-w8", seed: int = 0
) -> tuple[EncryptedLinear, linear.QuantisedWeight, CountingTransport]:
    rng = np.random.default_rng(seed)
    prepared = linear.prepare(rng.normal(size=(d_out, d_in)), preset)
    transport = CountingTransport({"fc": prepared})
    offset = torch.from_numpy(rng.normal(size=d_out).astype(np.float32)) if bias else None
    return (
        EncryptedLinear.single("fc", prepared.spec, Session(transport, verify_every=0), bias=offset),
        prepared,
        transport,
    )


def random_input(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_forward(layer: EncryptedLinear, prepared: linear.QuantisedWeight, x: torch.Tensor, y: torch.Tensor) -> None:
    """Hold ``y`` to the clear layer of the quantised weight: encryption error, then product, bias and sum rounded."""
    rows = x.detach().float().reshape(-1, layer.in_features).double().numpy()
    product = rows @ weight_in_force(prepared).T
    bias = np.zeros(layer.out_features) if layer.bias is None else layer.bias.detach().double().numpy()
    error = linear.error_bound(prepared.spec, rows)
    unit, tiny = ROUNDING[x.dtype]
    rounding = unit * (1 + unit) * 2 * (np.abs(product) + error + np.abs(bias)) + 3 * tiny
    got = y.detach().double().reshape(-1, layer.out_features).numpy()
    assert np.all(np.abs(got - product - bias) <= error + rounding)


def assert_backward(prepared: linear.QuantisedWeight, g: torch.Tensor, grad: torch.Tensor) -> None:
    rows = g.float().reshape(-1, prepared.spec.d_out).double().numpy()
    product = rows @ weight_in_force(prepared)
    error = linear.error_bound(prepared.spec, rows, "backward")
    unit, tiny = ROUNDING[g.dtype]
    got = grad.double().reshape(product.shape).numpy()
    assert np.all(np.abs(got - product) <= error + unit * (np.abs(product) + error) + tiny)


@each(
    preset=linear.PRESETS,
    dtype=[torch.float32, torch.bfloat16, torch.float16],
    leading=[(), (1,), (5,), (2, 3), (2, 1, 4)],
)
def test_forward_and_backward_keep_the_bound(preset: str, dtype: torch.dtype, leading: tuple[int, ...]) -> None:
    layer, prepared, transport = make_layer(preset=preset)
    x = random_input(*leading, 9, dtype=dtype).requires_grad_()
    y = layer(x)
    assert y.shape == (*leading, 6)
    assert y.dtype is dtype
    assert_forward(layer, prepared, x, y)
    g = random_input(*leading, 6, dtype=dtype, seed=2)
    y.backward(g)
    assert x.grad is not None
    assert x.grad.dtype is dtype
    assert_backward(prepared, g, x.grad)
    assert transport.calls == ["fc", "fc"]


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(1, 40),
    d_in=st.integers(1, 40),
    d_out=st.integers(1, 40),
    scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e4, 1e30]),
    seed=st.integers(0, 2**16),
)
def test_bound_holds_at_any_shape_and_scale(tokens: int, d_in: int, d_out: int, scale: float, seed: int) -> None:
    layer, prepared, _ = make_layer(d_out, d_in, bias=False, seed=seed)
    x = (random_input(tokens, d_in, seed=seed) * scale).requires_grad_()
    y = layer(x)
    assert_forward(layer, prepared, x, y)
    g = random_input(tokens, d_out, seed=seed + 1)
    y.backward(g)
    assert x.grad is not None
    assert_backward(prepared, g, x.grad)


def test_parameters_and_state_hold_the_bias_and_no_weight() -> None:
    layer, _, _ = make_layer()
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    assert {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()} == {"bias": (6,)}
    assert not layer.bias.requires_grad
    assert isinstance(layer, torch.nn.Linear)
    assert (layer.in_features, layer.out_features) == (9, 6)
    bare, _, _ = make_layer(bias=False)
    assert bare.bias is None
    assert not list(bare.parameters())
    assert "in_features=9, out_features=6, bias=False, group='fc'" in repr(bare)


def test_state_dict_round_trip() -> None:
    layer, _, _ = make_layer(seed=0)
    other, _, _ = make_layer(seed=5)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.bias, layer.bias)
    with pytest.raises(RuntimeError, match='Unexpected key.*"weight"'):
        other.load_state_dict(torch.nn.Linear(9, 6).state_dict())
    with pytest.raises(RuntimeError, match='Missing key.*"weight"'):
        torch.nn.Linear(9, 6).load_state_dict(layer.state_dict())


def test_no_request_without_a_gradient_to_compute() -> None:
    layer, _, transport = make_layer()
    x = random_input(4, 9)
    y = layer(x)
    assert not y.requires_grad
    with torch.no_grad():
        layer(x.clone().requires_grad_())
    with torch.inference_mode():
        layer.eval()(x.clone())
    assert transport.calls == ["fc"] * 3


def test_bias_trains_when_asked_to() -> None:
    layer, _, transport = make_layer()
    layer.bias.requires_grad_(True)
    layer(random_input(4, 9)).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((6,), 4.0))
    assert transport.calls == ["fc"], "the gradient of the bias needs no request"


@each(leading=[(0,), (0, 5), (3, 0)])
def test_no_tokens_no_request(leading: tuple[int, ...]) -> None:
    layer, _, transport = make_layer()
    x = torch.zeros(*leading, 9, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == (*leading, 6)
    assert x.grad is not None
    assert x.grad.shape == x.shape
    assert transport.calls == []


def test_output_may_be_written_in_place() -> None:
    layer, prepared, _ = make_layer(bias=False)
    x = random_input(4, 9).requires_grad_()
    layer(x).mul_(2.0).sum().backward()
    assert x.grad is not None
    assert_backward(prepared, torch.full((4, 6), 2.0), x.grad)


def test_input_may_be_a_view_or_not_contiguous() -> None:
    layer, prepared, _ = make_layer()
    x = random_input(9, 2, 4).permute(1, 2, 0)
    assert_forward(layer, prepared, x, layer(x))


def test_backward_twice_and_accumulation() -> None:
    layer, prepared, transport = make_layer()
    x = random_input(3, 9).requires_grad_()
    y = layer(x)
    g = random_input(3, 6, seed=7)
    y.backward(g, retain_graph=True)
    first = x.grad
    assert first is not None
    x.grad = None
    y.backward(g)
    assert x.grad is not None
    assert_backward(prepared, g, first)
    assert_backward(prepared, g, x.grad)
    assert len(transport.calls) == 3


def test_second_derivatives_are_refused() -> None:
    layer, _, _ = make_layer()
    x = random_input(3, 9).requires_grad_()
    (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@each(dtype=[torch.float64, torch.int64, torch.bool])
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    layer, _, _ = make_layer()
    with pytest.raises(InputError, match=rf"layer 'fc': input has dtype {dtype}; cast it to float32"):
        layer(torch.zeros(2, 9, dtype=dtype))


@each(shape=[(), (8,), (2, 10), (9, 2)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    layer, _, _ = make_layer()
    with pytest.raises(InputError, match=r"layer 'fc': input has shape .*; its last dimension must be 9"):
        layer(torch.zeros(shape))


def test_weight_answers_for_its_metadata_alone() -> None:
    layer, _, _ = make_layer()
    weight = layer.weight
    assert weight.shape == (6, 9)
    assert (weight.device, weight.dtype) == (torch.device("cpu"), torch.float32)
    assert weight.numel() == 54
    assert weight.is_floating_point()
    assert not weight.requires_grad
    assert repr(weight) == "WithheldWeight(shape=(6, 9), dtype=torch.float32, device=cpu)"
    assert weight.grad is None
    assert layer.to(torch.bfloat16).weight.dtype is torch.bfloat16


def test_freezing_the_weight_is_nothing_new_and_training_it_is_refused() -> None:
    layer, _, _ = make_layer()
    layer.weight.requires_grad = False
    assert layer.weight.requires_grad_(False).shape == (6, 9)
    assert layer.weight.requires_grad_(requires_grad=False).shape == (6, 9)
    for train in (
        lambda: setattr(layer.weight, "requires_grad", True),
        lambda: layer.weight.requires_grad_(),
        lambda: layer.weight.requires_grad_(True),
        lambda: layer.weight.requires_grad_(requires_grad=True),
    ):
        with pytest.raises(WeightWithheldError, match="frozen and stays with the server.*give the layer an adapter"):
            train()


@each(
    use=[
        lambda layer: layer.weight.data,
        lambda layer: layer.weight + 1.0,
        lambda layer: layer.weight.clone(),
        lambda layer: torch.nn.functional.linear(torch.zeros(2, 9), layer.weight),
        lambda layer: layer.weight.numpy(),
        lambda layer: layer.weight.tolist(),
        lambda layer: torch.nn.init.zeros_(layer.weight),
        lambda layer: layer.weight.data.add_(torch.zeros(6, 9)),
        lambda layer: layer.register_parameter("weight", torch.nn.Parameter(torch.zeros(6, 9))),
        lambda layer: setattr(layer, "weight", torch.nn.Parameter(torch.zeros(6, 9))),
        lambda layer: layer.reset_parameters(),
    ],
)
def test_values_of_the_weight_are_withheld(use: object) -> None:
    layer, _, _ = make_layer()
    with pytest.raises(WeightWithheldError, match="with the server"):
        use(layer)  # type: ignore[operator]


def test_copies_share_the_server_and_nothing_is_pickled() -> None:
    layer, prepared, transport = make_layer()
    twin = copy.deepcopy(torch.nn.Sequential(layer))[0]
    assert twin.bias is not layer.bias
    assert twin.group is not layer.group
    x = random_input(2, 9)
    assert_forward(twin, prepared, x, twin(x))
    assert transport.calls == ["fc"]
    with pytest.raises(InputError, match="cannot be pickled"):
        pickle.dumps(layer)
    with pytest.raises(InputError, match="cannot be pickled"):
        torch.save(torch.nn.Sequential(layer), io.BytesIO())


def test_members_bias_and_stack_are_checked() -> None:
    layer, prepared, transport = make_layer()
    session = Session(transport, verify_every=0)
    with pytest.raises(InputError, match="no member 1"):
        EncryptedLinear(layer.group, 1)
    with pytest.raises(InputError, match="no member -1"):
        EncryptedLinear(layer.group, -1)
    with pytest.raises(InputError, match=r"bias has shape \(5,\); it must be \(6,\)"):
        EncryptedLinear(layer.group, bias=torch.zeros(5))
    for sizes in ([], [5], [7, -1], [3, 4]):
        with pytest.raises(InputError, match="do not stack to the 6 rows"):
            EncryptedGroup("fc", prepared.spec, sizes, session)


def test_transport_and_cache_size_are_checked() -> None:
    _, prepared, transport = make_layer()
    with pytest.raises(InputError, match="transport is a dict without an apply"):
        EncryptedLinear.single("fc", prepared.spec, Session({"fc": prepared}))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="mask_cache_bytes = -1"):
        EncryptedLinear.single("fc", prepared.spec, Session(transport, mask_cache_bytes=-1))


@each(cache=[None, 0, 1 << 20])
def test_mask_products_are_asked_for_once(cache: int | None) -> None:
    rng = np.random.default_rng(3)
    prepared = linear.prepare(rng.normal(size=(6, 9)))
    layer = EncryptedLinear.single(
        "fc", prepared.spec, Session(LocalTransport({"fc": prepared}), mask_cache_bytes=cache, verify_every=0)
    )
    meter = traffic_of(layer)
    down = []
    for seed in range(3):
        x = random_input(5, 9, seed=seed)
        before = meter.total()
        assert_forward(layer, prepared, x, layer(x))
        down.append((meter.total() - before).bytes_down)
    mask_product = 6 * 2048 * 4
    if cache == 0:
        assert down[0] == down[1] == down[2] >= mask_product
    else:
        assert down[0] - down[1] >= mask_product * 3 // 4
        assert down[1] == down[2] < mask_product


def test_traffic_counts_what_crossed() -> None:
    layer, _, _ = make_layer()
    meter = traffic_of(torch.nn.Sequential(layer))
    x = random_input(4, 9).requires_grad_()
    y = layer(x)
    forward = meter.snapshot()
    assert list(forward) == [("fc", "forward")]
    assert forward["fc", "forward"].tokens == 4
    assert forward["fc", "forward"].bytes_up >= 4 * 9 * 4
    y.sum().backward()
    total = meter.total()
    assert total.requests == 2
    assert total.tokens == 8
    assert total.bytes_down > forward["fc", "forward"].bytes_down > 0
    assert total.seconds >= total.wait_seconds > 0.0
    meter.reset()
    assert meter.total().requests == 0
    with pytest.raises(InputError, match="has no encrypted layer"):
        traffic_of(torch.nn.Linear(2, 2))
