"""What training on a CPU computes another way than autograd would: the same gradients, to rounding, in less time.

A function here is taken where :func:`by_hand` holds. Everywhere else (half precision, CUDA, compiling, exporting,
nothing to differentiate) the caller's plain formulation runs, which is what the functions are tested against.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from openmae.models.masking import take

_CHUNK = 16  # images whose weight gradient is computed at once: more leave the caches


def by_hand(x: Tensor) -> bool:
    """Whether gradients are wanted where these functions were measured: in full precision on a CPU with oneDNN."""
    return (
        not torch.compiler.is_compiling()  # first: the compiler cannot follow what comes next
        and torch.is_grad_enabled()
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and torch.backends.mkldnn.is_available()
        and not torch.is_autocast_enabled("cpu")
    )


class Places(Protocol):
    """How sites lie in the images that are convolved; shapes as in ``sites.Sites``."""

    @property
    def padding(self) -> int:
        """Of the convolution."""

    def place(self, x: Tensor) -> Tensor:
        """Sites to images, ``[N, C, H, W]``, zero where no site is."""

    def pick(self, y: Tensor) -> Tensor:
        """Convolved images to sites."""

    def spread(self, g: Tensor, placed: Tensor) -> Tensor:
        """The adjoint of ``pick``: ``g`` as the gradient of the convolved images; ``placed`` is ``place(g)``."""


class DepthwiseConv(Function):
    """``pick(conv(place(x)))`` with an odd depthwise kernel, of visible sites that see each other.

    A site i sees a site j by the weight at j - i, so the gradient of x is the same convolution with the kernel
    rotated by 180 degrees: only visible sites are computed, where autograd fills whole windows and adds them up.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, places: Places) -> Tensor:
        """Shapes: ``weight`` [C, 1, k, k], ``bias`` [C]; the result is like ``x``."""
        images = places.place(x)
        ctx.save_for_backward(images, weight)
        ctx.places = places
        return places.pick(F.conv2d(images, weight, bias, padding=places.padding, groups=len(weight)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of ``x``, ``weight`` and ``bias``, where they are needed."""
        images, weight = ctx.saved_tensors
        places: Places = ctx.places
        grad_x = grad_weight = grad_bias = None
        placed = places.place(g)
        if ctx.needs_input_grad[0]:
            kernel = weight.flip(2, 3)
            grad_x = places.pick(F.conv2d(placed, kernel, padding=places.padding, groups=len(weight)))
        if ctx.needs_input_grad[1]:
            grad_weight = depthwise_weight_gradient(images, places.spread(g, placed), places.padding)
        if ctx.needs_input_grad[2]:
            grad_bias = g.flatten(0, -2).sum(0)
        return grad_x, grad_weight, grad_bias, None


def depthwise_weight_gradient(images_NCHW: Tensor, grad_NChw: Tensor, padding: int) -> Tensor:
    """The gradient ``[C, 1, k, k]`` of a depthwise convolution's weight, as a depthwise convolution.

    It is the correlation of input and output gradient, summed over the batch: with the batch folded into the
    channels, the output gradient is the kernel. oneDNN's own weight gradient is several times slower for small maps.
    """
    C, total = images_NCHW.shape[1], None
    for images, grad in zip(images_NCHW.split(_CHUNK), grad_NChw.split(_CHUNK), strict=True):
        n = len(images)
        folded = images.reshape(1, n * C, *images.shape[2:])
        kernels = F.conv2d(folded, grad.reshape(n * C, 1, *grad.shape[2:]), padding=padding, groups=n * C)
        summed = kernels.view(n, C, *kernels.shape[2:]).sum(0)
        total = summed if total is None else total + summed
    assert total is not None  # a batch has images
    return total.unsqueeze(1)


class ResponseNorm(Function):
    """GRN (paper, algorithm 1) with its residual: ``bias + x * gain``, gain = 1 + weight * energy / mean(energy).

    With u the gradient of the gain, summed over the sites, n = energy / mean and w the weight, that of the energy is
    ``(u w - mean(u w n)) / mean``, and an energy passes ``x / energy`` on to x. Only x is kept for it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, rows: Tensor | None) -> Tensor:
        """GRN of ``x`` [B, S, C] pooled over S; only of the sites ``rows`` [B, K] where given."""
        energy = x.square().sum(1, keepdim=True).sqrt_()  # several times as fast as the norm over a strided dimension
        mean = energy.mean(dim=-1, keepdim=True) + eps
        gain = torch.addcmul(torch.ones_like(bias), weight, energy / mean)
        taken = x if rows is None else take(x, rows)
        ctx.save_for_backward(x, taken, rows, weight, energy, mean, gain)
        return torch.addcmul(bias, taken, gain)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of ``x``, ``weight`` and ``bias``."""
        x, taken, rows, weight, energy, mean, gain = ctx.saved_tensors
        product = g * taken
        grad_gain = product.sum(1, keepdim=True)
        share = energy / mean
        grad_share = grad_gain * weight
        grad_energy = (grad_share - (grad_share * share).mean(dim=-1, keepdim=True)) / mean
        slope = torch.where(energy > 0, grad_energy / energy, 0.0)  # as torch's norm at zero
        passed = torch.mul(g, gain, out=product)
        if rows is None:
            grad_x = passed.addcmul_(x, slope)
        else:
            grad_x = (x * slope).scatter_add_(1, rows.unsqueeze(-1).expand_as(passed), passed)
        return grad_x, (grad_gain * share).sum((0, 1)), g.sum((0, 1)), None, None
