"""Cost of each architecture at 224 px: parameters, operations and memory, and the machine that this suits.

The numbers are counted, not measured; ``tests/models/test_costs.py`` counts them again. Throughput is measured, and
depends on the machine: see docs/benchmarks.md.
"""

from __future__ import annotations

from dataclasses import dataclass

STATE_BYTES = 16  # per parameter in fp32: weight, gradient and the two moments of AdamW
CPU_GFLOP = 10  # largest step for a CPU: two cores that compute 100 GFLOP/s then train on 10 images/s
BATCH = 64  # images that must fit into the memory of a GPU
GPU_SIZES = (8, 12, 16, 24, 40, 80)  # GiB
USABLE = 0.9  # share of a GPU's memory; the rest is for CUDA, temporary tensors and fragmentation


@dataclass(frozen=True)
class GPU:
    """Peak rates that a vendor states for dense matrix products, in operations per second.

    Attributes:
        half: in bf16 and fp16, on tensor cores.
        full: in fp32, without TF32, as torch computes by default.
    """

    half: float
    full: float

    def peak(self, precision: str) -> float:
        """Return the peak rate in fp32, bf16 or fp16."""
        return self.full if precision == "fp32" else self.half


GPUS = {"L4": GPU(121e12, 30e12), "A100": GPU(312e12, 19.5e12), "H100": GPU(989e12, 67e12)}
#: The share of a GPU's peak that a training step is assumed to reach. It was not measured.
REACHED = {"vit": 0.35, "hiera": 0.25, "convnextv2": 0.15}


@dataclass(frozen=True)
class Cost:
    """Cost of an architecture for images of 224 px, with the paper's mask ratio and decoder in pretraining.

    A multiplication and an addition count as two operations.

    Attributes:
        parameters_m: millions of parameters of the backbone, without a classifier.
        forward_gflop: operations of the backbone for an image that is not masked, as in fine-tuning, in 1e9.
        step_gflop: operations per image of a pretraining step, in 1e9: three times a forward pass of encoder and
            decoder, since the backward pass takes about two.
        trained_m: millions of parameters of encoder and decoder.
        image_mib: MiB per image that a pretraining step in fp32 keeps for the backward pass on a GPU, with fused
            attention.
    """

    parameters_m: float
    forward_gflop: float
    step_gflop: float
    trained_m: float
    image_mib: float

    @property
    def state_gib(self) -> float:
        """GiB of weights, gradients and moments in pretraining, in addition to the images of a batch."""
        return self.trained_m * 1e6 * STATE_BYTES / 2**30

    @property
    def machine(self) -> str:
        """Smallest machine for pretraining: a CPU, or a GPU with memory for a batch of 64 images in fp32."""
        if self.step_gflop <= CPU_GFLOP:
            return "CPU"
        needed = self.state_gib + BATCH * self.image_mib / 2**10
        return f"GPU, {next(size for size in GPU_SIZES if needed <= USABLE * size)} GB"


COSTS = {
    "convnextv2_atto": Cost(3.4, 1.1, 2.1, 7.3, 24),
    "convnextv2_femto": Cost(4.8, 1.6, 2.7, 8.8, 28),
    "convnextv2_pico": Cost(8.6, 2.7, 4.1, 12.5, 36),
    "convnextv2_nano": Cost(15.0, 4.9, 6.6, 19.0, 48),
    "convnextv2_tiny": Cost(27.9, 8.9, 11.3, 32.0, 77),
    "convnextv2_base": Cost(87.7, 30.7, 37.1, 91.9, 159),
    "convnextv2_large": Cost(196.4, 68.7, 81.6, 200.9, 237),
    "convnextv2_huge": Cost(657.5, 229.8, 269.7, 662.6, 433),
    "hiera_tiny_224": Cost(27.1, 9.8, 47.2, 55.0, 92),
    "hiera_small_224": Cost(34.2, 12.8, 50.6, 62.1, 99),
    "hiera_base_224": Cost(50.8, 18.7, 59.7, 78.6, 123),
    "hiera_base_plus_224": Cost(69.0, 25.3, 70.0, 97.6, 136),
    "hiera_large_224": Cost(212.6, 80.5, 145.0, 242.9, 239),
    "hiera_huge_224": Cost(670.7, 249.5, 388.3, 710.1, 386),
    "vit_tiny_patch16": Cost(5.5, 2.5, 33.1, 31.3, 57),
    "vit_small_patch16": Cost(21.7, 9.2, 38.0, 47.6, 65),
    "vit_base_patch16": Cost(85.8, 35.1, 57.4, 111.9, 79),
    "vit_large_patch16": Cost(303.3, 123.1, 123.1, 329.5, 126),
    "vit_huge_patch14": Cost(630.8, 334.6, 289.6, 657.1, 229),
}
