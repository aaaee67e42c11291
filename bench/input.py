"""Images/s from JPEG files to normalised batches: one core, and the whole loader."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_images
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from openmae.data.image_dataset import Batch, ImageDataset
from openmae.data.index import ImageIndex
from openmae.data.loaders import LoaderSettings, TrainingLoader
from openmae.data.scaled_copies import ScaledCopies, least_size
from openmae.data.shards.indexing import index_shards
from openmae.data.shards.packing import PackOptions, pack
from openmae.data.transforms import FinetuneTransform, PretrainTransform, Transform, _fix_posterize
from openmae.models.normalise import Normaliser

from .measure import Comparison, compare
from .pretrain import told
from .report import Report

OPENMAE, TORCHVISION, TIMM = "OpenMAE", "torchvision on PIL", "timm on PIL"
SIZES = {(500, 375): 2.0, (1920, 1080): 4.5}  # width x height: how many times as fast, from copies
SIDE = 224
PACKED = 512  # pixels of the shorter side: the smallest crops of it still have the input's
WORKERS = 2
FROM_COPIES, LOADED_FROM_COPIES = "pretraining, 1 core, from copies", f"pretraining, {WORKERS} workers, from copies"
TUNED_FROM_COPIES = "fine-tuning, 1 core, from copies"
ONLY_OURS_PACKED = "pretraining, 1 core, OpenMAE's packed before"
BOTH_PACKED = "pretraining, 1 core, both's packed before"
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_SCALE = (0.2, 1.0)
_POLICY, _ERASING = "rand-m9-mstd0.5-inc1", 0.25
_FILES = 32  # different ones
_BATCH = 32

Loaded = Dataset[Tensor]


class _Files(Loaded):
    """Files opened by PIL, as torchvision's ImageFolder does."""

    def __init__(self, paths: Sequence[Path], transform: Callable[[Image.Image], Tensor]) -> None:
        self.paths = paths
        self.transform = transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> Tensor:
        with self.paths[number].open("rb") as stream:
            return self.transform(Image.open(stream).convert("RGB"))


def run(quick: bool) -> Report:
    """Compare transforms on one core, and loaders with two workers."""
    rows, data = [], []
    for size, target in SIZES.items():
        print(f"{size[0]}x{size[1]} ...", file=sys.stderr, flush=True)
        with TemporaryDirectory() as folder:
            paths = write_photographs(Path(folder), size, 4 if quick else _FILES)
            with _one_thread():
                copies = ScaledCopies(least_size((SIDE, SIDE), _SCALE[0]), 3, Path(folder) / "copies", 1 << 40)
                (Path(folder) / "copies").mkdir()
                found = {
                    "pretraining, 1 core": _race(TORCHVISION, _pretraining(paths, quick), _batch(quick), quick),
                    FROM_COPIES: _race(TORCHVISION, _pretraining(paths, quick, None, copies), _batch(quick), quick),
                    "fine-tuning, 1 core": _race(TIMM, _finetuning(paths, quick), _batch(quick), quick),
                    TUNED_FROM_COPIES: _race(TIMM, _finetuning(paths, quick, copies), _batch(quick), quick),
                }
                if min(size) > PACKED:
                    index = _packed(paths)
                    packed = _pretraining(paths, quick, index)
                    found[f"{ONLY_OURS_PACKED} to {PACKED} px"] = _race(TORCHVISION, packed, _batch(quick), quick)
                    packed = _pretraining(_as_files(index, Path(folder) / "small"), quick, index)
                    found[f"{BOTH_PACKED} to {PACKED} px"] = _race(TORCHVISION, packed, _batch(quick), quick)
            epoch = (2 if quick else 5) * _batch(quick)
            contestants = _loaders(Path(folder), [paths[n % len(paths)] for n in range(epoch)], _batch(quick))
            found[f"pretraining, {WORKERS} workers"] = _race(TORCHVISION, contestants, epoch, quick)
            contestants = _loaders(Path(folder), [paths[n % len(paths)] for n in range(epoch)], _batch(quick), copies)
            found[LOADED_FROM_COPIES] = _race(TORCHVISION, contestants, epoch, quick)
        for what, comparison in found.items():
            wanted = (
                {FROM_COPIES: target, TUNED_FROM_COPIES: 1.5, LOADED_FROM_COPIES: 2.0}.get(what) if not quick else None
            )
            ratio = comparison.ratio(OPENMAE)
            verdict = {"ratio": ratio, "target": wanted, "met": None if wanted is None else ratio >= wanted}
            rows.append(_row(size, what, comparison, verdict))
            data.append({"size": list(size), "what": what, **verdict, **comparison.to_dict()})
    columns = ("JPEG", "what", "reference", "reference [images/s]", "OpenMAE [images/s]", "ratio", "target")
    return Report("Input pipeline", columns, rows, data, _notes(data))


def write_photographs(folder: Path, size: tuple[int, int], count: int) -> list[Path]:
    """Write JPEG files of ``size`` (width, height) with the detail of real photos, each a different image.

    They are crops of scikit-learn's two photos (640x427), reduced for small sizes and extended by reflection for large
    ones: enlarged photos would be smoother than real ones, and faster to decode.
    """
    rng = np.random.default_rng(0)
    paths = []
    for number in range(count):
        photograph = load_sample_images().images[number % 2]
        if number // 2 % 2:
            photograph = photograph[:, ::-1]
        height, width = photograph.shape[:2]
        if size[0] > width or size[1] > height:
            pad = [(0, max(0, 3 * length)) for length in (height, width)]
            photograph = np.pad(photograph, [*pad, (0, 0)], mode="symmetric")
            top, left = rng.integers(photograph.shape[0] - size[1]), rng.integers(photograph.shape[1] - size[0])
            picture = Image.fromarray(photograph[top : top + size[1], left : left + size[0]])
        else:
            centre = tuple(rng.uniform(0.3, 0.7, 2))
            picture = ImageOps.fit(Image.fromarray(photograph), size, centering=centre)
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=90)
        paths.append(folder / f"{number:03}.jpg")
        paths[-1].write_bytes(buffer.getvalue())
    return paths


def normalised(batch: Batch) -> Tensor:
    """OpenMAE's last step, which its loop does on the device."""
    return Normaliser(_MEAN, _STD)(batch.images)


def our_transform(finetuning: bool) -> Transform:
    """OpenMAE's, bilinear as all contestants; fine-tuning with the papers' augmentation."""
    crop = PretrainTransform((SIDE, SIDE), scale=_SCALE, interpolation="bilinear")
    return FinetuneTransform(crop, _MEAN, _STD, auto_aug=_POLICY, re_prob=_ERASING) if finetuning else crop


def torchvision_transform() -> Callable[[Image.Image], Tensor]:
    """MAE's published pretraining transform, but bilinear."""
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(SIDE, scale=_SCALE),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(_MEAN, _STD),
        ]
    )


def timm_transform() -> Callable[[Image.Image], Tensor]:
    """MAE's published fine-tuning transform, with the crop of ``our_transform``."""
    composed = create_transform(
        SIDE,
        is_training=True,
        scale=_SCALE,
        auto_augment=_POLICY,
        interpolation="bilinear",
        re_prob=_ERASING,
        mean=_MEAN,
        std=_STD,
    )
    for transform in composed.transforms:
        _fix_posterize(transform)  # or Pillow 13 refuses what timm asks for now and then
    return composed


Contestants = dict[str, Callable[[], object]]


def _pretraining(
    paths: list[Path], quick: bool, index: ImageIndex | None = None, copies: ScaledCopies | None = None
) -> Contestants:
    ours = our_transform(finetuning=False)
    return _transforms(TORCHVISION, torchvision_transform(), ours, paths, quick, index, copies)


def _packed(paths: Sequence[Path]) -> ImageIndex:
    """The same images as ``mae dataset pack --size`` writes them."""
    folder = paths[0].parent
    shards = pack(_index(paths), folder / "packed", PackOptions(PACKED)).shards
    return index_shards([str(path) for path in shards], False, "packed")


def _as_files(index: ImageIndex, folder: Path) -> list[Path]:
    """The images of shards, each as a file again."""
    folder.mkdir()
    paths = [folder / f"{number:03}.jpg" for number in range(len(index))]
    for number, path in enumerate(paths):
        path.write_bytes(index.read(number))
    return paths


def _index(paths: Sequence[Path]) -> ImageIndex:
    return ImageIndex(paths[0].parent, tuple(path.name for path in paths))


def _finetuning(paths: list[Path], quick: bool, copies: ScaledCopies | None = None) -> Contestants:
    return _transforms(TIMM, timm_transform(), our_transform(finetuning=True), paths, quick, None, copies)


def _transforms(
    name: str,
    theirs: Callable[[Image.Image], Tensor],
    transform: Transform,
    paths: list[Path],
    quick: bool,
    index: ImageIndex | None = None,
    copies: ScaledCopies | None = None,
) -> Contestants:
    """Compare batches made in this process; each call takes the next one, with other random numbers.

    Args:
        name: of the reference.
        theirs, transform: the transforms of the reference and of OpenMAE.
        paths: of the images.
        quick: small batches.
        index: the same images for OpenMAE, if they are stored elsewhere.
        copies: scaled copies for OpenMAE; the warm-up makes them.
    """
    dataset = ImageDataset(index or _index(paths), transform, copies=copies)
    files = _Files(paths, theirs)
    wanted = [number % len(paths) for number in range(_batch(quick))]
    epoch = 0

    def reference() -> Tensor:
        return torch.stack([files[number] for number in wanted])

    def openmae() -> Tensor:
        nonlocal epoch
        epoch += 1
        return normalised(dataset.collate([dataset[epoch, number] for number in wanted]))

    return {name: reference, OPENMAE: openmae}


def _loaders(folder: Path, paths: list[Path], batch: int, copies: ScaledCopies | None = None) -> Contestants:
    """An epoch each; the workers stay for the next one."""
    theirs = DataLoader(
        _Files(paths, torchvision_transform()),
        batch_size=batch,
        shuffle=True,
        drop_last=True,
        num_workers=WORKERS,
        persistent_workers=True,
    )
    settings = LoaderSettings(batch, folder, max_corrupt_fraction=0.0, num_workers=WORKERS)
    loader = TrainingLoader(_index(paths), our_transform(finetuning=False), settings, seed=0, copies=copies)
    epoch = 0

    def openmae() -> int:
        nonlocal epoch
        epoch += 1
        return sum(len(normalised(batch)) for batch in loader.from_position(epoch, 0))

    return {TORCHVISION: lambda: sum(map(len, theirs)), OPENMAE: openmae}


def _race(reference: str, contestants: Contestants, items: int, quick: bool) -> Comparison:
    assert next(iter(contestants)) == reference
    if quick:
        return compare(contestants, items=items, turns=2, warm_up=1, turn_seconds=0)
    return compare(contestants, items=items, turns=5, warm_up=1)


def _batch(quick: bool) -> int:
    return 4 if quick else _BATCH


@contextmanager
def _one_thread() -> Iterator[None]:
    """Use one thread, as a worker of a loader does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _row(size: tuple[int, int], what: str, found: Comparison, verdict: dict[str, Any]) -> tuple[str, ...]:
    target = verdict["target"]
    return (
        f"{size[0]}x{size[1]}",
        what,
        found.reference,
        told(found.timings[found.reference]),
        told(found.timings[OPENMAE]),
        f"{verdict['ratio']:.2f}",
        "" if target is None else f"{target:g}x: {'met' if verdict['met'] else 'MISSED'}",
    )


def _notes(data: list[dict[str, Any]]) -> list[str]:
    return [
        f"JPEG files of quality 90, crops of photos, read from memory, to normalized float32 batches of {SIDE} px; "
        f"random crops of {_SCALE[0]:g} to {_SCALE[1]:g} of the area, bilinear. Contestants take turns in one process.",
        f"'{TORCHVISION}': RandomResizedCrop, RandomHorizontalFlip, ToTensor, Normalize. '{TIMM}': the same by timm's "
        f"create_transform, with {_POLICY} and erasing; OpenMAE's fine-tuning has both too. 1 core: one process with "
        f"one thread; loader: {WORKERS} workers on {os.cpu_count()} cores, an epoch of "
        f"{data[-1]['contestants'][OPENMAE]['items']} images, workers started before.",
        "From copies: dataset.cache=on, from the second epoch on; the warm-up has made the copies.",
        f"Packed: mae dataset pack --size {PACKED} has scaled the images down once, to JPEG of quality 95; that time "
        "is not included. Crops then come from fewer pixels, and none is enlarged for it.",
        f"Load before the first call: {data[0]['load']}; above 1 others were at work, and the figures are noisy.",
    ]
