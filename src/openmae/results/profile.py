"""What the time of a training run went to: a picture, a table, and in words what bounds it and which key would help."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openmae.results import style
from openmae.results.style import BLUE, MUTED, RUST
from openmae.storage.atomic import write_atomically

_NAMES = {
    "data wait": "waiting for data",
    "host to device": "copying to the device",
    "compute": "computation (forward and backward)",
    "optimizer": "the optimizer",
    "validation": "validation",
    "checkpoints": "writing checkpoints",
    "other": "the loop itself",
}
#: Shares of the time from which a phase is worth a word.
_NOTABLE = {
    "data wait": 0.1,
    "host to device": 0.1,
    "optimizer": 0.15,
    "validation": 0.2,
    "checkpoints": 0.1,
    "other": 0.1,
}
_MANY_WORKERS = 64
_FAR_BELOW = 0.5  # of a mean: a median below it means that few steps take most of the time
_ROW, _TOP, _LEFT, _WIDTH, _WORDS = 0.32, 0.8, 1.35, 4.0, 1.9  # of the picture, in inches


@dataclass(frozen=True)
class Phase:
    """Seconds spent on a phase in all and, where every update goes through it, milliseconds of an update."""

    seconds: float
    mean_ms: float | None = None
    median_ms: float | None = None
    slow_ms: float | None = None


@dataclass(frozen=True)
class Breakdown:
    """Where the time went.

    Attributes:
        phases: in the order of a step; validation and checkpoints, which lie between steps, besides.
        steps, warmup: updates measured, and left out before them.
        device: for people, such as ``1 x NVIDIA H100, bf16``.
        on_gpu: whether it is one.
        family: of the architecture: vit, hiera or convnextv2.
        processes: of the run; one of them was measured.
        per_node: processes of this machine.
        cores: that this machine has for all of those.
        gpus: that it has.
        keys: the options that the advice is about, as they act.
    """

    phases: Mapping[str, Phase]
    steps: int
    warmup: int
    device: str
    on_gpu: bool
    family: str
    processes: int
    per_node: int
    cores: int
    gpus: int
    keys: Mapping[str, Any]

    @property
    def total(self) -> float:
        """Seconds of all phases together."""
        return sum(phase.seconds for phase in self.phases.values())

    def share(self, *names: str) -> float:
        """Of the time, in [0, 1]."""
        return sum(self.phases[name].seconds for name in names) / max(self.total, 1e-9)

    @property
    def step_ms(self) -> float:
        """Milliseconds of an update, all its phases."""
        return sum(phase.mean_ms or 0.0 for phase in self.phases.values())

    @property
    def images(self) -> int:
        """Images of an update, of the process that was measured."""
        return int(self.keys["dataset.batch_size"] * self.keys["train.accum_grad_batches"])

    @property
    def summary(self) -> str:
        """What was measured."""
        where = f", process 0 of {self.processes}" if self.processes > 1 else ""
        return (
            f"{self.steps:,} steps after {self.warmup} of warm-up · {self.images} images a step · {self.device}{where}"
        )


def advice(measured: Breakdown) -> list[str]:
    """What bounds the run, and what would help: a sentence or two each, the bound first."""
    shares = {name: measured.share(name) for name in _NOTABLE} | {"compute": measured.share("forward", "backward")}
    bound = max(shares, key=lambda name: shares[name])
    name = _NAMES[bound]
    lines = [f"{name[0].upper()}{name[1:]} bounds this run: {shares[bound]:.0%} of its time."]
    rules = {
        "data wait": _wait,
        "host to device": _copy,
        "optimizer": _optimizer,
        "validation": _validation,
        "checkpoints": _checkpoints,
        "other": _loop,
    }
    found = {name: rule(measured) for name, rule in rules.items() if shares[name] > _NOTABLE[name]}
    if bound == "compute":
        found["compute"] = _compute(measured)
    lines += [found[name] for name in sorted(found, key=lambda name: -shares[name])]
    if measured.processes > 1:
        lines.append("These are the times of process 0; its waits for the others are part of backward.")
    return lines


def _wait(measured: Breakdown) -> str:
    workers, step = measured.keys["dataset.num_workers_per_gpu"], measured.step_ms
    wait = measured.phases["data wait"].mean_ms or 0.0
    text = f"A step waits {wait:.1f} of its {step:.1f} ms for images, with dataset.num_workers_per_gpu={workers}."
    # a worker makes a batch in ``workers * step``, as they are what the step waits for; none: the step makes it itself
    loading, rest = (workers * step if workers else wait), max(step - wait, 1e-9)
    needed = max(workers + 1, math.ceil(min(loading / rest, _MANY_WORKERS)))
    own = measured.cores // measured.per_node
    smaller = (
        "store the images smaller, not far above dataset.augmentation.input_size, and pack them (`mae dataset pack`) "
        "where they lie on a network disk or in a store"
    )
    if needed <= own:
        shared = "" if measured.on_gpu else " (on a CPU, workers take cores from the step)"
        return f"{text} Raise it to about {needed}{shared}; or {smaller}."
    return (
        f"{text} It has {own} core{'s' * (own != 1)} here, too few for the {needed} workers it would take: {smaller}."
    )


def _copy(measured: Breakdown) -> str:
    copy = measured.phases["host to device"].mean_ms or 0.0
    return (
        f"Copying a batch to the device takes {copy:.1f} of {measured.step_ms:.1f} ms. It is bytes in pinned memory "
        "already: look whether other jobs share the bus; a smaller dataset.augmentation.input_size copies less."
    )


def _optimizer(measured: Breakdown) -> str:
    update = measured.phases["optimizer"].mean_ms or 0.0
    batch, accumulated = measured.keys["dataset.batch_size"], measured.keys["train.accum_grad_batches"]
    average = ", the average of train.ema_decay included" if measured.keys["train.ema_decay"] else ""
    return (
        f"The optimizer takes {update:.1f} of {measured.step_ms:.1f} ms{average}, once every {measured.images} images. "
        f"Raise dataset.batch_size ({batch}), or train.accum_grad_batches ({accumulated}) where memory is full; with "
        "train.optim.base_lr the learning rate follows."
    )


def _validation(measured: Breakdown) -> str:
    interval = measured.keys["train.validation_interval"]
    share = measured.share("validation")
    return f"Validation takes {share:.0%} of the time: raise train.validation_interval ({interval})."


def _checkpoints(measured: Breakdown) -> str:
    interval, unit = (measured.keys[f"train.checkpoint_interval{end}"] for end in ("", "_unit"))
    share = measured.share("checkpoints")
    text = f"Checkpoints take {share:.0%} of the time: raise train.checkpoint_interval ({interval}, in {unit}s)"
    monitor, validation = measured.keys["train.optim.monitor_name"], measured.keys["train.validation_interval"]
    if monitor == "train_loss":
        return f"{text}."
    return f"{text}, and train.validation_interval ({validation}): each better {monitor} is written too."


def _loop(measured: Breakdown) -> str:
    phase = measured.phases["other"]
    loop, median = phase.mean_ms or 0.0, phase.median_ms or 0.0
    if median < _FAR_BELOW * loop:
        return (
            f"The loop itself takes {loop:.1f} of {measured.step_ms:.1f} ms in the mean, but {median:.1f} in the "
            "median: it is what happens once an epoch. A larger dataset.batch_size would not shorten it; longer epochs "
            "have less of it."
        )
    return (
        f"The loop itself (logging, drawing) takes {loop:.1f} of {measured.step_ms:.1f} ms: such short steps call for "
        f"a larger dataset.batch_size ({measured.keys['dataset.batch_size']})."
    )


def _compute(measured: Breakdown) -> str:
    compute = sum(measured.phases[name].mean_ms or 0.0 for name in ("forward", "backward"))
    text = f"{compute:.1f} of {measured.step_ms:.1f} ms of a step are forward and backward, as they should be."
    decoder = ["model.decoder_attention=cross"] if measured.keys.get("model.decoder_attention") == "self" else []
    decoder += ["a lower model.decoder_targets"] if measured.keys.get("model.decoder_targets") == 1 else []
    less = f" A decoder that does less is faster and learns from less: {' or '.join(decoder)}." if decoder else ""
    # fsdp has a precision of its own, whatever the key says
    fp32 = measured.keys["train.precision"] == "fp32" and measured.keys["train.distributed_strategy"] != "fsdp"
    if not measured.on_gpu:
        gains = fp32 and measured.family != "convnextv2"
        half = ", and train.precision=bf16 if the processor has AVX512-BF16 or AMX" if gains else ""
        return (
            f"{text} On a CPU a smaller dataset.augmentation.input_size or model.arch makes them shorter{half}; "
            f"a GPU is far faster.{less}"
        )
    helps = []
    if fp32:
        helps.append("train.precision=bf16")
    if not measured.keys["train.compile"]:
        helps.append("train.compile=true")
    helps.append(f"a higher train.{'num_gpus' if measured.per_node < measured.gpus else 'num_nodes'}")
    return f"{text} What would help: {', '.join(helps)}.{less}"


def table_rows(measured: Breakdown) -> Iterator[tuple[str, float | None, float | None, float | None, float]]:
    """Phase; mean, median and 95th percentile in ms of a step (None between steps); per cent of the time."""
    for name, phase in measured.phases.items():
        yield name, phase.mean_ms, phase.median_ms, phase.slow_ms, 100 * measured.share(name)


def write_breakdown(measured: Breakdown, path: Path) -> Path:
    """Write all of it as JSON and return ``path``."""
    content = {
        "device": measured.device,
        "processes": measured.processes,
        "process": 0,
        "cores": measured.cores,
        "steps": measured.steps,
        "warmup_steps": measured.warmup,
        "images_per_step": measured.images,
        "seconds": measured.total,
        "phases": {
            name: {
                "seconds": phase.seconds,
                "share": measured.share(name),
                "mean_ms": phase.mean_ms,
                "median_ms": phase.median_ms,
                "p95_ms": phase.slow_ms,
            }
            for name, phase in measured.phases.items()
        },
        "keys": dict(measured.keys),
        "advice": advice(measured),
    }
    return write_atomically(path, json.dumps(content, indent=2) + "\n")


def save_breakdown(measured: Breakdown, path: Path) -> Path:
    """Draw a bar for each phase and return ``path``, a PNG."""
    names: Sequence[str] = list(measured.phases)
    height = _ROW * len(names)
    with style.drawing():
        left = max(_LEFT, 0.3 + style.text_width(names, 9))
        figure = style.new_figure(left + _WIDTH + _WORDS, _TOP + height + 0.2)
        style.headline(figure, "Where the time goes", measured.summary)
        axes = style.add_axes(figure, left, _TOP, _WIDTH, height)
        shares = [measured.share(name) for name in names]
        colours = [BLUE if name in ("forward", "backward", "optimizer") else RUST for name in names]
        axes.barh(range(len(names)), shares, height=0.62, color=colours)
        for row, (name, share) in enumerate(zip(names, shares, strict=True)):
            mean = measured.phases[name].mean_ms
            words = f"{share:.1%}" + ("" if mean is None else f"   {mean:,.1f} ms a step")
            axes.text(share + 0.012 * max(shares), row, words, va="center_baseline", size=8.5, color=MUTED)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlim(0, max(*shares, 1e-9))
        axes.spines["bottom"].set_visible(False)
        axes.tick_params(axis="both", length=0)
        axes.set_xticks([])
        return style.save_figure(figure, path)
