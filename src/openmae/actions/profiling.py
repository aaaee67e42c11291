"""The results of ``train.profile``: a table on the terminal, ``profile.json``, and a section of the report."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch
from lightning_fabric import Fabric

from openmae.actions.run import show_table
from openmae.actions.sources import model_config
from openmae.distributed.launch import DTYPES, acting_precision, describe_device
from openmae.distributed.rendezvous import world_of
from openmae.machine import usable_cores
from openmae.models.operations import product_rate, step_operations
from openmae.results.profile import Breakdown, Phase, advice, write_breakdown
from openmae.spec.schema import ExperimentSpec
from openmae.spec.tree import value_of
from openmae.storage import layout
from openmae.training.profiler import PAUSES, STEP_PHASES, WARMUP_STEPS, Measured

_KEYS = (
    "dataset.batch_size",
    "dataset.num_workers_per_gpu",
    "train.accum_grad_batches",
    "train.precision",
    "train.compile",
    "train.num_gpus",
    "train.num_nodes",
    "train.ema_decay",
    "train.distributed_strategy",
    "train.validation_interval",
    "train.checkpoint_interval",
    "train.checkpoint_interval_unit",
    "train.optim.monitor_name",
)
_SIDES = {True: 8192, False: 2048}  # of the matrices, on a GPU or not: large enough to reach its highest rate
_DECODER = ("model.decoder_attention", "model.decoder_targets")  # they can make a transformer decoder faster

log = logging.getLogger("openmae")


def leave_profile(fabric: Fabric, spec: ExperimentSpec, folder: Path, measured: Measured) -> Breakdown | None:
    """Print and write the measured times. Return None, with a warning, if the run was too short."""
    if not measured.steps:
        log.warning(
            "train.profile: nothing was measured, since the run ended within the %d warmup steps.", WARMUP_STEPS
        )
        return None
    breakdown = _breakdown(fabric, spec, measured)
    write_breakdown(breakdown, folder / layout.PROFILE)
    rows = [("measured", breakdown.summary)]
    for name, phase in breakdown.phases.items():
        per_step = "" if phase.mean_ms is None else f"  {phase.mean_ms:10.2f} ms per step"
        rows.append((name, f"{100 * breakdown.share(name):5.1f} %{per_step}"))
    show_table("Profile", rows)
    for line in advice(breakdown):
        log.info("%s", line)
    return breakdown


def _breakdown(fabric: Fabric, spec: ExperimentSpec, measured: Measured) -> Breakdown:
    finetune, family = spec.train.stage == "finetune", spec.model.architecture.family
    on_gpu = fabric.device.type == "cuda"
    keys = _KEYS if finetune or family == "convnextv2" else (*_KEYS, *_DECODER)
    precision = acting_precision(spec.train.precision, spec.train.distributed_strategy == "fsdp", on_gpu)
    acting = {"train.precision": precision}
    phases = {}
    for name in (*STEP_PHASES, *PAUSES):
        seconds, times = measured.seconds[name], measured.per_step.get(name)
        if times is not None:
            median, slow = (float(value) for value in np.percentile(np.asarray(times), (50, 95)))
            phases[name] = Phase(seconds, 1e3 * seconds / measured.steps, 1e3 * median, 1e3 * slow)
        else:
            phases[name] = Phase(seconds)
    return Breakdown(
        phases=phases,
        steps=measured.steps,
        warmup=WARMUP_STEPS,
        device=describe_device(fabric),
        on_gpu=on_gpu,
        processes=fabric.world_size,
        per_node=world_of(fabric).per_node,
        gpus=torch.cuda.device_count() if on_gpu else 0,
        cores=usable_cores(),
        keys={key: value_of(spec, key) for key in keys} | acting | ({} if finetune else {"train.ema_decay": 0.0}),
        operations=_operations(spec),
        product_rate=_product_rate(precision, fabric.device),
    )


def _operations(spec: ExperimentSpec) -> float:
    """Return the operations of a step; 0 if it leaves out masked units, which are not counted."""
    if spec.train.stage == "pretrain" and spec.model.decoder_targets < 1:
        return 0.0
    return step_operations(model_config(spec)) * spec.dataset.batch_size * spec.train.accum_grad_batches


def _product_rate(precision: str, device: torch.device) -> float:
    """Return the operations per second in large matrix products; 0 if the device's memory is full."""
    try:
        return product_rate(DTYPES[precision], device, _SIDES[device.type == "cuda"])
    except torch.OutOfMemoryError:
        return 0.0
