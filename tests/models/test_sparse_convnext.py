"""Tests of sparse blocks beyond the encoder's parity tests: plain formulation, frozen weights, other modes."""

from __future__ import annotations

import pytest
import torch
from timm.layers.grn import GlobalResponseNorm
from torch import Tensor, nn

from openmae.models import sparse_convnext
from openmae.models.cpu_autograd import use_manual_backward
from openmae.models.memory import LiveMemory
from openmae.models.sparse_convnext import Sites

GRID, CHANNELS = (2, 3), 5


@pytest.fixture(params=[8, 4, 2, 1, None])
def laid_out(request, draw_mask) -> tuple[Sites, Tensor]:
    """Sites of 3 samples with 4 visible units, by side of a unit (None: all sites), and their values."""
    side = request.param
    if side is None:
        return Sites((3, *GRID)), torch.randn(3, *GRID, CHANNELS, dtype=torch.float64)
    visible = draw_mask(3, 6, 4).visible_BV
    return Sites.of(visible, GRID, side), torch.randn(12, side, side, CHANNELS, dtype=torch.float64)


def depthwise() -> nn.Conv2d:
    return nn.Conv2d(CHANNELS, CHANNELS, 7, padding=3, groups=CHANNELS).double()


def gradients(output: Tensor, wanted: list[Tensor]) -> tuple[Tensor, ...]:
    weight = torch.randn(output.shape, dtype=output.dtype, generator=torch.Generator().manual_seed(1))
    return torch.autograd.grad(output, wanted, weight)


def plainly(monkeypatch, call, *args) -> Tensor:
    with monkeypatch.context() as patch:
        patch.setattr(sparse_convnext, "use_manual_backward", lambda x: False)
        return call(*args)


def test_gradients_of_the_convolution_equal_autograd(laid_out, monkeypatch, assert_near) -> None:
    where, x = laid_out
    conv, wanted = depthwise(), [x.requires_grad_(True)]
    wanted += [conv.weight, conv.bias]
    actual, expected = where.convolve(x, conv), plainly(monkeypatch, where.convolve, x, conv)
    assert type(actual.grad_fn) is not type(expected.grad_fn), "both used the same formulation"
    assert_near(actual, expected, 1e-12)
    for one, other in zip(gradients(actual, wanted), gradients(expected, wanted), strict=True):
        assert_near(one, other, 1e-12)


def test_weight_gradient_of_many_images_is_summed_in_chunks(monkeypatch, assert_near) -> None:
    where, conv = Sites((35, *GRID)), depthwise()  # three chunks, the last one shorter
    x = torch.randn(35, *GRID, CHANNELS, dtype=torch.float64)
    actual = gradients(where.convolve(x, conv), [conv.weight])
    assert_near(actual[0], gradients(plainly(monkeypatch, where.convolve, x, conv), [conv.weight])[0], 1e-12)


@pytest.mark.parametrize("frozen", ["x", "weight", "bias"])
def test_frozen_inputs_get_no_gradient_and_change_no_other(frozen, laid_out) -> None:
    where, x = laid_out
    conv = depthwise()
    leaves = {"x": x.requires_grad_(True), "weight": conv.weight, "bias": conv.bias}
    every = dict(zip(leaves, gradients(where.convolve(x, conv), list(leaves.values())), strict=True))
    leaves.pop(frozen).requires_grad_(False)
    for name, gradient in zip(leaves, gradients(where.convolve(x, conv), list(leaves.values())), strict=True):
        assert torch.equal(gradient, every[name]), name


def test_manual_backward_is_used_only_where_it_is_faster() -> None:
    x = torch.zeros(1)
    assert use_manual_backward(x)
    assert use_manual_backward(x.double())
    assert not use_manual_backward(x.bfloat16())
    assert not use_manual_backward(x.to("meta"))
    with torch.no_grad():
        assert not use_manual_backward(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert use_manual_backward(x)
        assert use_manual_backward(x.bfloat16())


def test_only_products_are_in_half_precision_under_autocast(laid_out, randomise) -> None:
    """Convolution and GRN compute in float32."""
    where, x = laid_out
    conv, grn, layer = depthwise().float(), GlobalResponseNorm(CHANNELS), nn.Linear(CHANNELS, 4)
    randomise(grn)
    x = x.float().requires_grad_(True)
    wanted = [x, conv.weight, conv.bias, grn.weight, grn.bias, layer.weight, layer.bias]

    def convolved() -> Tensor:
        return where.convolve(x, conv).flatten(0, -2)[None]

    with torch.autocast("cpu", torch.bfloat16):
        actual = sparse_convnext.response_linear(convolved(), grn, layer)
    halves = layer.weight.bfloat16(), layer.bias.bfloat16()
    expected = nn.functional.linear(sparse_convnext.global_response_norm(convolved(), grn).bfloat16(), *halves)
    assert torch.equal(actual, expected)
    for one, other in zip(gradients(actual, wanted), gradients(expected, wanted), strict=True):
        assert one.dtype == torch.float32
        assert (one - other).norm() <= 0.01 * other.norm()


def test_second_derivative_is_refused(laid_out) -> None:
    where, x = laid_out
    x.requires_grad_(True)
    first = torch.autograd.grad(where.convolve(x, depthwise()).square().sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_grn_sums_half_precision_in_float32() -> None:
    grn = GlobalResponseNorm(4)
    nn.init.ones_(grn.weight)
    x = torch.full((1, 5000, 4), 100.0)
    expected = grn(x.view(1, 50, 100, 4)).view_as(x)
    actual = sparse_convnext.global_response_norm(x.half(), grn)  # the sum of squares, 5e7, is beyond fp16
    torch.testing.assert_close(actual.float(), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("rows", [None, torch.tensor([[4, 1], [0, 3]])], ids=["all", "some"])
def test_gradients_of_grn_and_a_linear_layer_equal_autograd(rows, randomise, monkeypatch, assert_near) -> None:
    grn, layer = GlobalResponseNorm(6).double(), nn.Linear(6, 4).double()
    randomise(grn)
    x = torch.randn(2, 5, 6).double()
    x[1, :, 2] = 0  # a channel without energy
    wanted = [x.requires_grad_(True), grn.weight, grn.bias, layer.weight, layer.bias]
    actual = sparse_convnext.response_linear(x, grn, layer, rows)
    expected = plainly(monkeypatch, sparse_convnext.response_linear, x, grn, layer, rows)
    assert type(actual.grad_fn) is not type(expected.grad_fn), "both used the same formulation"
    assert_near(actual, expected, 1e-12)
    for one, other in zip(gradients(actual, wanted), gradients(expected, wanted), strict=True):
        assert_near(one, other, 1e-12)


def test_the_result_of_grn_is_not_kept() -> None:
    grn, layer = GlobalResponseNorm(64), nn.Linear(64, 16)
    x = torch.randn(2, 100, 64, requires_grad=True)
    with LiveMemory([x, *grn.parameters(), *layer.parameters()]) as memory:
        before = memory.bytes
        out = sparse_convnext.response_linear(x, grn, layer)
        assert memory.bytes - before < out.nbytes + x.nbytes / 4


def test_compiler_traces_the_plain_formulation_as_one_graph(laid_out) -> None:
    where, x = laid_out
    conv, targets = depthwise(), []

    def backend(module: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        targets.extend(str(node.target) for node in module.graph.nodes)
        return module

    compiled = torch.compile(where.convolve, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(x, conv), where.convolve(x, conv))
    assert any("conv2d" in target for target in targets)
