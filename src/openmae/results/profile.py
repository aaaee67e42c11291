"""The profile of a training run: where the time goes, what limits the speed, and which config keys would help."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from openmae.results import style
from openmae.results.style import BLUE, RUST
from openmae.storage.atomic import write_atomically
from openmae.storage.printable import counted

_MAX_WORKERS = 64


@dataclass(frozen=True)
class Phase:
    """Total seconds of a phase, and milliseconds per step; None for phases between steps."""

    seconds: float
    mean_ms: float | None = None
    median_ms: float | None = None
    p95_ms: float | None = None


@dataclass(frozen=True)
class Breakdown:
    """The measured times of a run.

    Attributes:
        phases: phases of a step in order, then validation and checkpoints, which are between steps.
        steps: number of measured steps.
        warmup: number of steps before them that were not measured.
        device: description such as ``1 x NVIDIA H100, bf16``.
        on_gpu: whether the device is a GPU.
        processes: number of processes of the run; only the first one is measured.
        per_node: number of processes on this machine.
        cores: number of CPU cores on this machine, for all its processes.
        gpus: number of GPUs on this machine.
        keys: values of the config keys that the advice is about.
        operations: operations of a step on this process: matrix products, convolutions and attention, forward and
            backward.
        product_rate: operations per second in large matrix products in the run's precision; 0: not measured.
    """

    phases: Mapping[str, Phase]
    steps: int
    warmup: int
    device: str
    on_gpu: bool
    processes: int
    per_node: int
    cores: int
    gpus: int
    keys: Mapping[str, Any]
    operations: float = 0.0
    product_rate: float = 0.0

    @property
    def total(self) -> float:
        """Total seconds of all phases."""
        return sum(phase.seconds for phase in self.phases.values())

    def share(self, *names: str) -> float:
        """Return the share of the named phases in the total time, in [0, 1]."""
        return sum(self.phases[name].seconds for name in names) / max(self.total, 1e-9)

    def mean_ms(self, *names: str) -> float:
        """Return the mean milliseconds per step of the named phases."""
        return sum(self.phases[name].mean_ms or 0.0 for name in names)

    @property
    def step_ms(self) -> float:
        """Mean milliseconds of a step."""
        return self.mean_ms(*self.phases)

    @property
    def images(self) -> int:
        """Images per step of the measured process."""
        return int(self.keys["dataset.batch_size"] * self.keys["train.accum_grad_batches"])

    @property
    def rate(self) -> float:
        """Operations per second in the forward and backward passes."""
        return 1e3 * self.operations / max(self.mean_ms("forward", "backward"), 1e-9)

    @property
    def use(self) -> str:
        """How much of the device is used, in words; empty if it was not measured."""
        if not self.product_rate or not self.operations:
            return ""
        share, precision = self.rate / self.product_rate, self.keys["train.precision"]
        return (
            f"Forward and backward do {_in_flops(self.rate)}, {share:.0%} of the {_in_flops(self.product_rate)} that "
            f"large matrix products reach here in {precision}."
        )

    @property
    def summary(self) -> str:
        """A description of the measurement."""
        where = f", process 0 of {self.processes}" if self.processes > 1 else ""
        steps = f"{self.steps:,} steps after {self.warmup} of warm-up"
        return f"{steps} · {self.images} images a step · {self.device}{where}"


def _in_flops(rate: float) -> str:
    return f"{rate / 1e12:.3g} TFLOP/s" if rate >= 1e12 else f"{rate / 1e9:.3g} GFLOP/s"


def advice(measured: Breakdown) -> list[str]:
    """Return sentences on what limits the speed, then on what would help, the most important first."""
    shares = {name: measured.share(name) for name in _PHASES} | {"compute": measured.share("forward", "backward")}
    limit = max(shares, key=lambda name: shares[name])
    subject = "Computation (forward and backward)" if limit == "compute" else _PHASES[limit][0]
    lines = [f"{subject} limits the speed of this run: {shares[limit]:.0%} of its time."]
    found = {name: rule(measured) for name, (_, notable, rule) in _PHASES.items() if shares[name] > notable}
    if limit == "compute":
        found["compute"] = " ".join(filter(None, (_compute(measured), measured.use)))
    lines += [found[name] for name in sorted(found, key=lambda name: -shares[name])]
    if limit != "compute" and measured.use:
        lines.append(measured.use)
    if measured.processes > 1:
        lines.append("These are the times of process 0; waiting for other processes counts as backward.")
    return lines


def _wait(measured: Breakdown) -> str:
    workers, step = measured.keys["dataset.num_workers_per_gpu"], measured.step_ms
    wait = measured.mean_ms("data wait")
    text = f"A step waits {wait:.1f} of its {step:.1f} ms for images, with dataset.num_workers_per_gpu={workers}."
    # Steps wait for the workers, so a worker takes `workers * step` to load a batch; without workers, it takes `wait`.
    loading, rest = (workers * step if workers else wait), max(step - wait, 1e-9)
    needed = max(workers + 1, math.ceil(min(loading / rest, _MAX_WORKERS)))
    cores = measured.cores // measured.per_node
    smaller = (
        "store smaller images, not much larger than dataset.augmentation.input_size, and pack them (`mae dataset "
        "pack`) if they are on a network disk or in a remote store"
    )
    if needed > cores:
        has = counted(cores, "core")
        return f"{text} The process has {has}, too few for the {needed} workers that it would need: {smaller}."
    shared = "" if measured.on_gpu else " (on a CPU, workers take cores from the step)"
    return f"{text} Raise it to about {needed}{shared}; or {smaller}."


def _copy(measured: Breakdown) -> str:
    return (
        f"Copying a batch to the device takes {measured.mean_ms('host to device'):.1f} of {measured.step_ms:.1f} ms. "
        "Batches are already uint8 in pinned memory: check whether other jobs use the bus. A smaller "
        "dataset.augmentation.input_size copies less."
    )


def _optimizer(measured: Breakdown) -> str:
    keys, update = measured.keys, measured.mean_ms("optimizer")
    average = ", including the average of train.ema_decay" if keys["train.ema_decay"] else ""
    return (
        f"The optimizer takes {update:.1f} of {measured.step_ms:.1f} ms{average}, once every {measured.images} images. "
        f"Raise dataset.batch_size ({keys['dataset.batch_size']}), or train.accum_grad_batches "
        f"({keys['train.accum_grad_batches']}) if memory is full. With train.optim.base_lr the learning rate follows."
    )


def _validation(measured: Breakdown) -> str:
    interval, share = measured.keys["train.validation_interval"], measured.share("validation")
    return f"Validation takes {share:.0%} of the time: raise train.validation_interval ({interval})."


def _checkpoints(measured: Breakdown) -> str:
    keys, share = measured.keys, measured.share("checkpoints")
    interval = f"{keys['train.checkpoint_interval']}, in {keys['train.checkpoint_interval_unit']}s"
    text = f"Checkpoints take {share:.0%} of the time: raise train.checkpoint_interval ({interval})"
    monitor = keys["train.optim.monitor_name"]
    if monitor == "train_loss":
        return f"{text}."
    validation = keys["train.validation_interval"]
    return f"{text}, and train.validation_interval ({validation}): each better {monitor} writes a checkpoint too."


def _loop(measured: Breakdown) -> str:
    mean, median = measured.mean_ms("other"), measured.phases["other"].median_ms or 0.0
    if median < 0.5 * mean:  # a few steps take most of the time
        return (
            f"The training loop itself takes {mean:.1f} of {measured.step_ms:.1f} ms on average, but {median:.1f} in "
            "the median: it is the work at the end of each epoch. A larger dataset.batch_size would not reduce it; "
            "longer epochs would."
        )
    return (
        f"The training loop itself (logging, progress display) takes {mean:.1f} of {measured.step_ms:.1f} ms: with "
        f"such short steps, raise dataset.batch_size ({measured.keys['dataset.batch_size']})."
    )


def _compute(measured: Breakdown) -> str:
    keys = measured.keys
    compute = measured.mean_ms("forward", "backward")
    text = f"{compute:.1f} of {measured.step_ms:.1f} ms of a step are forward and backward, which is normal."
    decoder = ["model.decoder_attention=cross"] if keys.get("model.decoder_attention") == "self" else []
    decoder += ["a lower model.decoder_targets"] if keys.get("model.decoder_targets") == 1 else []
    less = f" A lighter decoder is faster, but learns from less: {' or '.join(decoder)}." if decoder else ""
    # fsdp ignores train.precision
    fp32 = keys["train.precision"] == "fp32" and keys["train.distributed_strategy"] != "fsdp"
    if not measured.on_gpu:
        half = ", and so does train.precision=bf16 if the processor has AVX512-BF16 or AMX" if fp32 else ""
        return (
            f"{text} On a CPU, a smaller dataset.augmentation.input_size or model.arch shortens them{half}; a GPU is "
            f"far faster.{less}"
        )
    helps = ["train.precision=bf16"] if fp32 else []
    helps += [] if keys["train.compile"] else ["train.compile=true"]
    helps.append(f"a higher train.{'num_gpus' if measured.per_node < measured.gpus else 'num_nodes'}")
    return f"{text} What would help: {', '.join(helps)}.{less}"


#: Phase -> its name in a sentence, the share of the time above which advice is given, and the advice.
_PHASES = {
    "data wait": ("Waiting for data", 0.1, _wait),
    "host to device": ("Copying to the device", 0.1, _copy),
    "optimizer": ("The optimizer", 0.15, _optimizer),
    "validation": ("Validation", 0.2, _validation),
    "checkpoints": ("Writing checkpoints", 0.1, _checkpoints),
    "other": ("The training loop itself", 0.1, _loop),
}


def write_breakdown(measured: Breakdown, path: Path) -> Path:
    """Write the times and the advice as JSON and return ``path``."""
    content = {
        "device": measured.device,
        "processes": measured.processes,
        "process": 0,
        "cores": measured.cores,
        "steps": measured.steps,
        "warmup_steps": measured.warmup,
        "images_per_step": measured.images,
        "operations_per_second": round(measured.rate),
        "product_operations_per_second": round(measured.product_rate),
        "seconds": measured.total,
        "phases": {name: {**asdict(phase), "share": measured.share(name)} for name, phase in measured.phases.items()},
        "keys": dict(measured.keys),
        "advice": advice(measured),
    }
    return write_atomically(path, json.dumps(content, indent=2) + "\n")


def save_breakdown(measured: Breakdown, path: Path) -> Path:
    """Draw a bar per phase to a PNG and return ``path``."""
    bars = []
    for name, phase in measured.phases.items():
        share = measured.share(name)
        text = f"{share:.1%}" + ("" if phase.mean_ms is None else f"   {phase.mean_ms:,.1f} ms a step")
        bars.append((name, share, text, BLUE if name in ("forward", "backward", "optimizer") else RUST))
    return style.save_bars(path, "Where the time goes", measured.summary, bars)
