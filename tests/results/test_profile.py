"""The profile of a run: what limits its speed, and which key would help."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from openmae.results.profile import Breakdown, Phase, advice, save_breakdown, write_breakdown

KEYS = {
    "dataset.batch_size": 8,
    "dataset.num_workers_per_gpu": 2,
    "train.accum_grad_batches": 2,
    "train.precision": "fp32",
    "train.compile": False,
    "train.num_gpus": 1,
    "train.num_nodes": 1,
    "train.ema_decay": 0.0,
    "train.distributed_strategy": "ddp",
    "train.optim.monitor_name": "train_loss",
    "train.validation_interval": 3,
    "train.checkpoint_interval": 5,
    "train.checkpoint_interval_unit": "step",
}


def breakdown(
    milliseconds: dict[str, float],
    *,
    gpu: bool = True,
    processes: int = 1,
    nodes: int = 1,
    cores: int = 16,
    **keys: Any,
) -> Breakdown:
    """Return the times of 100 steps; times of validation and checkpoints are per step, too."""
    base = {"data wait": 0.0, "host to device": 0.0, "forward": 0.0, "backward": 0.0, "optimizer": 0.0, "other": 0.0}
    phases = {name: Phase(ms / 10, ms, ms, ms) for name, ms in (base | milliseconds).items() if name in base}
    phases |= {name: Phase(milliseconds.get(name, 0.0) / 10) for name in ("validation", "checkpoints")}
    typed = {key: keys.pop(key.rpartition(".")[2], value) for key, value in KEYS.items()}
    assert not keys
    per_node, gpus = processes // nodes, 8 if gpu else 0
    return Breakdown(phases, 100, 3, "1 x FAKE", gpu, processes, per_node, cores, gpus, typed)


def test_the_share_of_the_device_that_is_used():
    measured = breakdown({"forward": 40.0, "backward": 60.0})
    assert measured.use == ""
    measured = replace(measured, operations=2e10, product_rate=8e11)
    assert measured.rate == pytest.approx(2e11)
    said = "Forward and backward do 200 GFLOP/s, 25% of the 800 GFLOP/s that large matrix products reach here in fp32."
    assert measured.use == said
    assert said in advice(measured)[1]
    waiting = replace(breakdown({"data wait": 900.0, "forward": 100.0}), operations=2e10, product_rate=8e11)
    assert advice(waiting)[-1] == waiting.use
    fast = replace(measured, operations=2e13, product_rate=8e14)
    assert "do 200 TFLOP/s, 25% of the 800 TFLOP/s" in fast.use


def test_advice_for_data_loading():
    lines = advice(breakdown({"data wait": 60.0, "forward": 20.0, "backward": 20.0}))
    assert lines[0] == "Waiting for data limits the speed of this run: 60% of its time."
    assert lines[1].startswith(
        "A step waits 60.0 of its 100.0 ms for images, with dataset.num_workers_per_gpu=2. Raise it to about 5; or "
        "store smaller images, not much larger than dataset.augmentation.input_size, and pack them (`mae dataset pack`)"
    )
    assert len(lines) == 2
    (_, alone) = advice(breakdown({"data wait": 60.0, "forward": 40.0}, num_workers_per_gpu=0, gpu=False))
    assert "Raise it to about 2 (on a CPU, workers take cores from the step);" in alone
    (_, small) = advice(breakdown({"data wait": 60.0, "forward": 40.0}, cores=4))
    assert "The process has 4 cores, too few for the 5 workers that it would need: store smaller images" in small
    (_, shared, _) = advice(breakdown({"data wait": 60.0, "forward": 40.0}, cores=8, processes=2))
    assert "The process has 4 cores" in shared
    (_, apart, _) = advice(breakdown({"data wait": 60.0, "forward": 40.0}, cores=8, processes=2, nodes=2))
    assert "Raise it to about 5" in apart, "each node has its own cores"
    (_, never) = advice(breakdown({"data wait": 100.0}))
    assert "too few for the 64 workers" in never


def test_advice_for_computation():
    keys = "forward and backward, which is normal. What would help:"
    lines = advice(breakdown({"forward": 40.0, "backward": 50.0, "data wait": 9.0, "optimizer": 1.0}))
    assert lines[0] == "Computation (forward and backward) limits the speed of this run: 90% of its time."
    assert lines[1:] == [
        f"90.0 of 100.0 ms of a step are {keys} train.precision=bf16, train.compile=true, a higher train.num_gpus."
    ]
    (_, line) = advice(breakdown({"forward": 100.0}, precision="bf16", compile=True))
    assert line.endswith("What would help: a higher train.num_gpus.")
    (_, line) = advice(breakdown({"forward": 100.0}, gpu=False))
    assert "On a CPU, a smaller dataset.augmentation.input_size or model.arch" in line
    assert "train.precision=bf16 if the processor has AVX512-BF16 or AMX" in line
    (_, line) = advice(breakdown({"forward": 100.0}, precision="bf16", gpu=False))
    assert "bf16" not in line
    assert "decoder" not in line, "a classifier and ConvNeXt V2 gain little by it"


@pytest.mark.parametrize("gpu", [True, False])
def test_no_precision_is_advised_for_fsdp(gpu):
    (_, line) = advice(breakdown({"forward": 100.0}, gpu=gpu, distributed_strategy="fsdp"))
    assert "train.precision" not in line


def test_more_nodes_are_advised_if_all_gpus_are_used():
    for processes, nodes, key in ((7, 1, "num_gpus"), (8, 1, "num_nodes"), (8, 2, "num_gpus"), (16, 2, "num_nodes")):
        (_, line, _) = advice(breakdown({"forward": 100.0}, processes=processes, nodes=nodes))
        assert line.endswith(f"a higher train.{key}."), f"{processes} processes on {nodes} nodes of 8 GPUs"


def test_advice_for_checkpoints_names_the_validation_interval():
    times = {"checkpoints": 50.0, "forward": 50.0}
    (_, line) = advice(breakdown(times, monitor_name="val_loss"))
    assert line.endswith(
        "raise train.checkpoint_interval (5, in steps), and train.validation_interval (3): each better val_loss "
        "writes a checkpoint too."
    )
    (_, line) = advice(breakdown(times))
    assert line.endswith("raise train.checkpoint_interval (5, in steps).")


def test_no_larger_batch_is_advised_for_work_at_the_end_of_epochs():
    measured = breakdown({"other": 50.0, "forward": 50.0})
    phases = {**measured.phases, "other": Phase(5.0, 50.0, 2.0, 40.0)}
    (_, line) = advice(replace(measured, phases=phases))
    assert line == (
        "The training loop itself takes 50.0 of 100.0 ms on average, but 2.0 in the median: it is the work at the end "
        "of each epoch. A larger dataset.batch_size would not reduce it; longer epochs would."
    )


@pytest.mark.parametrize("gpu", [True, False])
def test_advice_for_a_lighter_decoder(gpu):
    measured = breakdown({"forward": 100.0}, gpu=gpu)
    said = "A lighter decoder is faster, but learns from less: "
    for attention, targets, advised in (
        ("self", 1.0, "model.decoder_attention=cross or a lower model.decoder_targets."),
        ("cross", 1.0, "a lower model.decoder_targets."),
        ("self", 0.5, "model.decoder_attention=cross."),
        ("cross", 0.5, None),
    ):
        keys = {**measured.keys, "model.decoder_attention": attention, "model.decoder_targets": targets}
        (_, line) = advice(replace(measured, keys=keys))
        assert line.endswith(said + advised) if advised else said not in line


@pytest.mark.parametrize(
    ("phase", "bound", "words"),
    [
        ("host to device", "Copying to the device", "Copying a batch to the device takes 50.0 of 100.0 ms."),
        (
            "optimizer",
            "The optimizer",
            "once every 16 images. Raise dataset.batch_size (8), or train.accum_grad_batches (2)",
        ),
        (
            "other",
            "The training loop itself",
            "takes 50.0 of 100.0 ms: with such short steps, raise dataset.batch_size (8)",
        ),
        ("validation", "Validation", "Validation takes 50% of the time: raise train.validation_interval (3)."),
        ("checkpoints", "Writing checkpoints", "raise train.checkpoint_interval (5, in steps)."),
    ],
)
def test_each_limit_has_its_advice(phase, bound, words):
    lines = advice(breakdown({phase: 50.0, "forward": 25.0, "backward": 24.0, "data wait": 1.0}))
    assert lines[0] == f"{bound} limits the speed of this run: 50% of its time."
    assert words in lines[1]
    assert len(lines) == 2


def test_advice_is_ordered_by_share():
    (_, *lines) = advice(
        breakdown({"forward": 40.0, "backward": 5.0, "optimizer": 25.0, "data wait": 30.0}, ema_decay=0.9)
    )
    assert [line.split()[0] for line in lines] == ["45.0", "A", "The"]
    assert "25.0 of 100.0 ms, including the average of train.ema_decay, once every" in lines[2]


def test_measured_process_is_named(tmp_path):
    measured = breakdown({"forward": 100.0}, processes=4)
    assert advice(measured)[-1] == "These are the times of process 0; waiting for other processes counts as backward."
    assert measured.summary == "100 steps after 3 of warm-up · 16 images a step · 1 x FAKE, process 0 of 4"


def test_json(tmp_path: Path):
    measured = breakdown({"forward": 60.0, "backward": 20.0, "validation": 20.0})
    content = json.loads(write_breakdown(measured, tmp_path / "profile.json").read_text())
    assert content["phases"]["forward"] == {
        **{"seconds": 6.0, "share": pytest.approx(0.6), "mean_ms": 60.0, "median_ms": 60.0, "p95_ms": 60.0}
    }
    assert content["phases"]["validation"]["mean_ms"] is None
    assert sum(phase["share"] for phase in content["phases"].values()) == pytest.approx(1)
    assert (content["steps"], content["warmup_steps"], content["images_per_step"]) == (100, 3, 16)
    assert content["advice"] == advice(measured)
    assert content["keys"] == KEYS


def test_bars_are_as_long_as_the_shares(tmp_path: Path):
    def blue(milliseconds: dict[str, float]) -> int:
        with Image.open(save_breakdown(breakdown(milliseconds), tmp_path / "p.png")) as picture:
            return int((np.asarray(picture.convert("RGB")) == (0x21, 0x60, 0xA6)).all(axis=-1).sum())

    whole, half = blue({"forward": 50.0, "data wait": 50.0}), blue({"forward": 25.0, "data wait": 50.0})
    assert half == pytest.approx(whole / 2, rel=0.02)
    assert blue({"data wait": 50.0}) == 0
