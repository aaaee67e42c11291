"""Speed and memory of training on a GPU, by family and precision, and whether it computes what a CPU computes.

One command of less than eight minutes for a machine with a GPU. Without one, and with ``--quick``, it measures small
models, and shows only that it runs.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from openmae.actions import train
from openmae.data.index import index_folder
from openmae.data.loaders import LoaderSettings, TrainingLoader
from openmae.data.scaled_copies import ScaledCopies, least_size
from openmae.data.transforms import PretrainTransform
from openmae.models.build import build_autoencoder
from openmae.models.gpu_memory import step_memory
from openmae.models.operations import product_rate, step_operations
from openmae.results.metrics_csv import read_metrics
from openmae.spec.architectures import get_architecture
from openmae.spec.costs import GPUS
from openmae.spec.load import load_spec
from openmae.storage import layout

from . import steps
from .input import write_photographs
from .measure import compare
from .report import Report
from .steps import paper_config

SIDE = 224
ARCHS = {"vit_base_patch16": 256, "hiera_base_224": 128, "convnextv2_tiny": 256}  # images per batch
QUICK_ARCHS = {"vit_tiny_patch16": 2, "hiera_tiny_224": 2, "convnextv2_atto": 2}
_MATRIX, _QUICK_MATRIX = 8192, 256
_TOLERANCE = {"loss": 1e-3, "gradient": 2e-2}  # relative differences between a CPU and a GPU in fp32, TF32 included
_FEW_IMAGES = 4  # of the comparison with the CPU


@dataclass(frozen=True)
class Kind:
    """How a step is computed."""

    precision: str
    compiled: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """Return the type of autocast; float32 switches it off."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def __str__(self) -> str:
        return f"{self.precision}, compiled" if self.compiled else self.precision


KINDS = (Kind("fp32"), Kind("bf16"), Kind("bf16", compiled=True))


def run(quick: bool) -> Report:
    """Measure steps, runs on one and on several GPUs, and loading; compare with the CPU."""
    quick = quick or not torch.cuda.is_available()
    archs = QUICK_ARCHS if quick else ARCHS
    rows: list[tuple[str, ...]] = []
    data: list[dict[str, Any]] = []
    for name, measured in (
        *((arch, _steps(arch, batch, quick)) for arch, batch in archs.items()),
        ("as on a CPU", _parity(archs)),
        ("runs", _runs(quick)),
        ("loading", _loading(quick)),
    ):
        print(f"{name} ...", file=sys.stderr, flush=True)
        for row, values in measured:
            rows.append(row)
            data.append(values)
    columns = ("what", "how", "images/s", "TFLOP/s", "of the measured rate", "of the peak", "memory", "counted memory")
    return Report("Training on a GPU", columns, rows, data, _notes())


Measured = Iterator[tuple[tuple[str, ...], dict[str, Any]]]


def _steps(arch: str, batch: int, quick: bool) -> Measured:
    """Measure an update of the weights in each precision."""
    side = 64 if quick else SIDE
    mask_ratio, images = get_architecture(arch).mask_ratio, steps.random_images(batch, side)
    config = paper_config(arch, side)
    operations = step_operations(config)
    for kind in KINDS[:2] if quick else KINDS:
        rate = product_rate(kind.dtype, steps.device(), _QUICK_MATRIX if quick else _MATRIX)
        model: Any = steps.build(arch, side, mask_ratio)
        trained = torch.compile(model) if kind.compiled else model
        update = steps.openmae_step(trained, images, mask_ratio, bf16=kind.precision == "bf16")
        with _peak_memory() as memory:
            turns, warm_up = (2, 1) if quick else (5, 5)
            timing = compare({"step": update}, items=batch, turns=turns, warm_up=warm_up).timings["step"]
        counted = step_memory(config, kind.dtype).needed(batch)
        reached = timing.rate * operations
        values = {
            "arch": arch, "precision": kind.precision, "compiled": kind.compiled, "batch": batch, "side": side,
            "images_per_s": timing.rate, "slowest": timing.slowest, "fastest": timing.fastest,
            "operations_per_s": reached, "product_rate": rate, "memory": memory.bytes, "counted_memory": counted,
        }  # fmt: skip
        share = f"{reached / peak:.0%}" if (peak := _peak_of(kind.precision)) else "-"
        speed = f"{timing.rate:,.0f} ({timing.slowest:,.0f} to {timing.fastest:,.0f})"
        sizes = (f"{memory.bytes / 2**30:.1f} GiB" if memory.bytes else "-", f"{counted / 2**30:.1f} GiB")
        row = (arch, f"{kind}, batch {batch}", speed, f"{reached / 1e12:.2f}", f"{reached / rate:.0%}", share, *sizes)
        yield row, values
        del model, trained, update


def _parity(archs: dict[str, int]) -> Measured:
    """Compare loss and gradients of a small batch in fp32 with those on a CPU."""
    for arch in archs:
        torch.manual_seed(0)
        model = build_autoencoder(paper_config(arch, 64))
        images = torch.randint(0, 256, (_FEW_IMAGES, 3, 64, 64), dtype=torch.uint8)
        expected, gradients = _loss_and_gradients(model, images)
        found, others = _loss_and_gradients(model.to(steps.device()), images.to(steps.device()))
        loss = abs(found - expected) / abs(expected)
        pairs = zip(gradients, others, strict=True)
        gradient = max(((b.cpu() - a).norm() / a.norm().clamp(min=1e-6)).item() for a, b in pairs)
        differences = {"loss": loss, "gradient": gradient}
        equal = all(differences[name] <= _TOLERANCE[name] for name in differences)
        verdict = f"{'equal' if equal else 'DIFFERENT'}: loss {loss:.1e}, gradients {gradient:.1e}"
        yield (arch, f"fp32, compared with a CPU: {verdict}", *["-"] * 6), {"arch": arch, "equal": equal, **differences}


def _loss_and_gradients(model: nn.Module, images: Tensor) -> tuple[float, list[Tensor]]:
    model.zero_grad()
    loss = steps.our_loss(model, images, 0.5)(0)
    loss.backward()
    return loss.item(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


def _runs(quick: bool) -> Measured:
    """Measure ``mae train`` on made images: on one GPU, and with ddp and fsdp on all."""
    gpus = torch.cuda.device_count()
    arch, batch = next(iter((QUICK_ARCHS if quick else ARCHS).items()))
    with TemporaryDirectory() as folder:
        images = Path(folder) / "images"
        images.mkdir()
        side, count = (64, 2 * batch) if quick else (256, 6 * batch * max(gpus, 1))
        write_photographs(images, (side, side), count)
        wanted = [("ddp", 1)] if quick else dict.fromkeys(itertools.product(("ddp", "fsdp"), (1, max(gpus, 1))))
        for strategy, processes in wanted:
            results = Path(folder) / f"{strategy}-{processes}"
            options = {
                "train.recipe": "tao", "model.arch": arch, "dataset.train_data_sources": images,
                "dataset.batch_size": batch, "dataset.augmentation.input_size": 64 if quick else SIDE,
                "dataset.num_workers_per_gpu": 0 if quick else 8, "train.num_gpus": processes, "train.num_epochs": 2,
                "train.distributed_strategy": strategy, "train.precision": "fp32" if quick else "bf16",
                "results_dir": results, "wandb.enable": False,
            }  # fmt: skip
            began = time.perf_counter()
            train.run(load_spec(None, [f"{key}={value}" for key, value in options.items()], action="train"))
            took = time.perf_counter() - began
            rows = read_metrics(results / "train" / layout.METRICS)
            speeds = [row["images_per_s"] for row in rows if "images_per_s" in row]
            values = {"strategy": strategy, "gpus": processes, "images_per_s": speeds[-1], "seconds": took}
            yield (f"mae train, {arch}", f"{strategy} on {processes}", f"{speeds[-1]:,.0f}", *["-"] * 5), values


def _loading(quick: bool) -> Measured:
    """Measure the loader: from JPEG files, and from scaled copies in its second epoch."""
    size, count, workers = (64, 8, 0) if quick else (1080, 256, 8)
    with TemporaryDirectory() as folder:
        images, kept = Path(folder) / "images", Path(folder) / "copies"
        images.mkdir()
        kept.mkdir()
        write_photographs(images, (size, size), count)
        index, side = index_folder(images, False), 32 if quick else SIDE
        copies = ScaledCopies(least_size((side, side), 0.2), 3, kept, room=1 << 40)
        for name, source in (("JPEG", None), ("copies", copies)):
            settings = LoaderSettings(4 if quick else 64, Path(folder), 0.0, num_workers=workers)
            loader = TrainingLoader(index, PretrainTransform((side, side)), settings, 0, source)
            try:
                speed = max(_epoch(loader, epoch) for epoch in range(3))
            finally:
                loader.close()
            values = {"source": name, "workers": workers, "side": size, "images_per_s": speed}
            yield (f"loading images of {size} px", f"{name}, {workers} workers", f"{speed:,.0f}", *["-"] * 5), values


def _epoch(loader: TrainingLoader, epoch: int) -> float:
    began, images = time.perf_counter(), sum(len(batch.images) for batch in loader.from_position(epoch, 0))
    return images / (time.perf_counter() - began)


@dataclass
class _Memory:
    bytes: int = 0


@contextmanager
def _peak_memory() -> Iterator[_Memory]:
    """Yield the most memory that torch has allocated on the GPU in the block; 0 without one."""
    found = _Memory()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    yield found
    if torch.cuda.is_available():
        found.bytes = torch.cuda.max_memory_allocated()


def _peak_of(precision: str) -> float | None:
    """Return the vendor's peak for this GPU, if it is known."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((gpu.peak(precision) for kind, gpu in GPUS.items() if kind in name.split()), None)


def _notes() -> list[str]:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU: only shows that it runs"
    return [
        f"{device}. Pretraining steps at {SIDE} px with the papers' decoders and mask ratios; median, slowest and "
        "fastest turn.",
        "TFLOP/s: counted operations of a step (three forward passes) x images/s; as a share of what products of "
        f"matrices of {_MATRIX} x {_MATRIX} reach in the same precision on this device, and of the vendor's peak.",
        "memory: the most that torch allocated; counted memory: what `mae train --plan` would announce.",
        f"Compared with a CPU: relative differences; equal up to {_TOLERANCE['loss']:g} (loss) and "
        f"{_TOLERANCE['gradient']:g} (the largest of all gradients).",
    ]
