"""Hand-written backward passes for CPU training, which are faster than autograd and equal up to rounding.

They are used if :func:`use_manual_backward` is true. Otherwise (models in half precision, CUDA, compilation, export, no
gradients) the caller runs its plain PyTorch code, which these functions are tested against. With autocast, only linear
layers are computed in bfloat16: oneDNN's convolutions of small maps and sums are not faster in it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.amp import custom_bwd, custom_fwd
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from openmae.models.masking import gather_tokens

if TYPE_CHECKING:
    from openmae.models.sparse_convnext import Sites

_Method = TypeVar("_Method", bound=Callable[..., Any])
_CHUNK = 16  # images whose weight gradient is computed at once; more do not fit into the CPU's caches


def use_manual_backward(x: Tensor) -> bool:
    """Return whether gradients are needed on a CPU with oneDNN, where these functions are faster."""
    return (
        not torch.compiler.is_compiling()  # must be first: the compiler cannot trace the rest
        and torch.is_grad_enabled()
        and x.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and (x.dtype in (torch.float32, torch.float64) or torch.is_autocast_enabled("cpu"))
    )


def _forward_in_float32(method: _Method) -> _Method:
    """Make ``forward`` of a Function cast bfloat16 to float32 under autocast, and compute without autocast."""
    return cast(_Method, custom_fwd(method, device_type="cpu", cast_inputs=torch.float32))


def _backward_in_float32(method: _Method) -> _Method:
    """Make ``backward`` compute without autocast, as ``forward`` did."""
    return cast(_Method, custom_bwd(method, device_type="cpu"))


class DepthwiseConv(Function):
    """``gather(conv(scatter(x)))`` with an odd depthwise kernel.

    Site i reads site j with the weight at j - i, so the gradient of x is the same convolution with the kernel rotated
    by 180 degrees. It is computed for visible sites only, while autograd computes complete windows and sums them.
    """

    @staticmethod
    @_forward_in_float32
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, sites: Sites) -> Tensor:
        """Convolve ``x`` with ``weight`` [C, 1, k, k] and ``bias`` [C]; the result has the shape of ``x``."""
        images = sites.scatter(x)
        ctx.save_for_backward(images, weight)
        ctx.sites = sites
        return sites.gather(F.conv2d(images, weight, bias, padding=sites.padding, groups=len(weight)))

    @staticmethod
    @_backward_in_float32
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of ``x``, ``weight`` and ``bias`` that are needed."""
        images, weight = ctx.saved_tensors
        sites: Sites = ctx.sites
        grad_x = grad_weight = grad_bias = None
        scattered = sites.scatter(g)
        if ctx.needs_input_grad[0]:
            kernel = weight.flip(2, 3)
            grad_x = sites.gather(F.conv2d(scattered, kernel, padding=sites.padding, groups=len(weight)))
        if ctx.needs_input_grad[1]:
            grad_weight = depthwise_weight_gradient(images, sites.gather_backward(g, scattered), sites.padding)
        if ctx.needs_input_grad[2]:
            grad_bias = g.flatten(0, -2).sum(0)
        return grad_x, grad_weight, grad_bias, None


def depthwise_weight_gradient(images_NCHW: Tensor, grad_NChw: Tensor, padding: int) -> Tensor:
    """Return the gradient ``[C, 1, k, k]`` of a depthwise convolution's weight.

    It is the correlation of the input and the output gradient, summed over the batch: a depthwise convolution with the
    batch folded into the channels and the output gradient as kernel. oneDNN's weight gradient is several times slower
    for small maps.
    """
    C, total = images_NCHW.shape[1], None
    for images, grad in zip(images_NCHW.split(_CHUNK), grad_NChw.split(_CHUNK), strict=True):
        n = len(images)
        folded = images.reshape(1, n * C, *images.shape[2:])
        kernels = F.conv2d(folded, grad.reshape(n * C, 1, *grad.shape[2:]), padding=padding, groups=n * C)
        summed = kernels.view(n, C, *kernels.shape[2:]).sum(0)
        total = summed if total is None else total + summed
    assert total is not None  # a batch is never empty
    return total.unsqueeze(1)


class ResponseLinear(Function):
    """GRN (paper, algorithm 1) with its residual, and the linear layer that follows it.

    GRN is ``bias + x * gain`` with gain = 1 + weight * energy / mean(energy). Its result, as large as x, is computed
    again in the backward pass instead of being kept. Let g be its gradient, u that of the gain (summed over the sites),
    n = energy / mean, and w the weight. Then the gradient of the energy is ``(u w - mean(u w n)) / mean``, and that of
    x is ``gain`` times g plus ``x / energy`` times the gradient of the energy.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        rows: Tensor | None,
        matrix: Tensor,
        shift: Tensor,
    ) -> Tensor:
        """Return ``linear(grn(x))`` for ``x`` [B, S, C], pooled over S, only for the sites ``rows`` [B, K] if given.

        ``matrix`` [D, C] and ``shift`` [D] are the parameters of the linear layer. Under autocast its product is
        computed in the type of autocast, and GRN in float32.
        """
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        with torch.autocast("cpu", enabled=False):
            wide = _wide(x)
            energy = wide.square().sum(1, keepdim=True).sqrt_()  # much faster than a norm over a strided dimension
            mean = energy.mean(dim=-1, keepdim=True) + eps
            gain = torch.addcmul(torch.ones_like(bias), weight, energy / mean)
            taken = wide if rows is None else gather_tokens(wide, rows)
            normed = torch.addcmul(bias, taken, gain).to(dtype)
            ctx.save_for_backward(x, rows, weight, bias, energy, mean, gain, matrix)
            return F.linear(normed, matrix.to(dtype), shift.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of ``x``, of GRN's parameters, and of the linear layer's."""
        x, rows, weight, bias, energy, mean, gain, matrix = ctx.saved_tensors
        with torch.autocast("cpu", enabled=False):
            wide = _wide(x)
            taken = wide if rows is None else gather_tokens(wide, rows)
            normed = torch.addcmul(bias, taken, gain).to(g.dtype)
            grad_matrix = (g.flatten(0, 1).T @ normed.flatten(0, 1)).to(matrix.dtype)
            grad_shift = g.sum((0, 1), dtype=matrix.dtype)
            passed = (g @ matrix.to(g.dtype)).to(wide.dtype)
            del normed
            grad_bias, product = passed.sum((0, 1)), passed * taken
            grad_gain = product.sum(1, keepdim=True)
            share = energy / mean
            grad_share = grad_gain * weight
            grad_energy = (grad_share - (grad_share * share).mean(dim=-1, keepdim=True)) / mean
            slope = torch.where(energy > 0, grad_energy / energy, 0.0)  # like torch's norm at zero
            passed = torch.mul(passed, gain, out=product)
            if rows is None:
                grad_x = passed.addcmul_(wide, slope)
            else:
                grad_x = (wide * slope).scatter_add_(1, rows.unsqueeze(-1).expand_as(passed), passed)
            grad_weight = (grad_gain * share).sum((0, 1))
        return grad_x.to(x.dtype), grad_weight, grad_bias, None, None, grad_matrix, grad_shift


def _wide(x: Tensor) -> Tensor:
    """Return bfloat16 values in float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
