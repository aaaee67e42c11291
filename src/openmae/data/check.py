"""``mae dataset check``: every image is read and decoded once, and what was found is told."""

from __future__ import annotations

import hashlib
import io
import os
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from openmae.data.decode import CorruptImage, Picture
from openmae.data.folder import Skipped
from openmae.data.image_index import ImageIndex
from openmae.data.remarks import Remark, remarks_on
from openmae.data.shards.reading import ShardedIndex
from openmae.storage.printable import printable_name

_AHEAD = 16  # images that wait to be counted


@dataclass
class Survey:
    """What a data set holds.

    Attributes:
        place: where it is, as the user named it.
        images: how many there are, corrupt ones included.
        class_counts: images by class name, in the order of the class numbers; empty without labels.
        widths, heights: of the readable images, upright, in pixels.
        file_sizes: of the readable images, in bytes.
        formats: images by what they are, such as "JPEG RGB".
        corrupt: (name, reason) of images that cannot be decoded.
        remarks: on readable images, by name.
        duplicates: groups of readable images with the same bytes, by name.
        contradictions: groups of ``duplicates`` with different labels.
        labelled_by: what the labels were taken from, as ``ImageIndex.labelled_by``.
        unlabelled: images without a label where others have one.
        shard_counts: images by shard; empty for a folder.
        skipped: files that are not read, by kind.
        results: folders and pictures that are not read, since OpenMAE has written them.
    """

    place: str
    images: int
    class_counts: dict[str, int] = field(default_factory=dict)
    widths: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    heights: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    file_sizes: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    formats: Counter[str] = field(default_factory=Counter)
    corrupt: list[tuple[str, str]] = field(default_factory=list)
    remarks: list[Remark] = field(default_factory=list)
    duplicates: list[list[str]] = field(default_factory=list)
    contradictions: int = 0
    labelled_by: str = ""
    unlabelled: int = 0
    shard_counts: dict[str, int] = field(default_factory=dict)
    skipped: tuple[Skipped, ...] = ()
    results: tuple[str, ...] = ()

    @property
    def redundant(self) -> int:
        """Images that would go if one of each group of duplicates were kept."""
        return sum(len(group) - 1 for group in self.duplicates)


class _Facts(NamedTuple):
    digest: bytes
    length: int
    size: tuple[int, int]  # height, width
    kind: str
    remarks: list[Remark]


def survey(index: ImageIndex, advance: Callable[[], object] = lambda: None) -> Survey:
    """Read and decode every image of ``index``, in order, in as many threads as there are cores.

    Args:
        index: the data set.
        advance: called after each image.
    """
    found = Survey(index.place, len(index), skipped=index.skipped, results=index.results)
    groups: defaultdict[bytes, list[int]] = defaultdict(list)
    sizes: list[tuple[int, int]] = []
    lengths: list[int] = []
    for number, facts in _all_facts(index):
        advance()
        if isinstance(facts, CorruptImage):
            found.corrupt.append((index.full_name(index.paths[number]), facts.reason))
            continue
        groups[facts.digest].append(number)
        sizes.append(facts.size)
        lengths.append(facts.length)
        found.formats[facts.kind] += 1
        found.remarks += facts.remarks
    found.heights, found.widths = np.array(sizes, np.int64).reshape(-1, 2).T
    found.file_sizes = np.array(lengths, np.int64)
    same = [group for group in groups.values() if len(group) > 1]
    found.duplicates = [[index.full_name(index.paths[number]) for number in group] for group in same]
    if index.labels is not None:
        labels = index.labels
        known = [label for label in labels if label >= 0]
        counts = np.bincount(known, minlength=len(index.class_names))
        found.class_counts = dict(zip(index.class_names, counts.tolist(), strict=True))
        found.contradictions = sum(len({labels[number] for number in group} - {-1}) > 1 for group in same)
        found.labelled_by, found.unlabelled = index.labelled_by, len(labels) - len(known)
    if isinstance(index, ShardedIndex):
        names = [printable_name(shard.name) for shard in index.shards]
        counts = np.bincount(index.shard_of, minlength=len(names))
        found.shard_counts = dict(zip(names, counts.tolist(), strict=True))
    return found


def _all_facts(index: ImageIndex) -> Iterator[tuple[int, _Facts | CorruptImage]]:
    waiting: deque[Future[_Facts | CorruptImage]] = deque()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            for number in range(len(index)):
                waiting.append(pool.submit(_facts, index, number))
                if len(waiting) > _AHEAD:
                    yield number - _AHEAD, waiting.popleft().result()
            for number in range(len(index) - len(waiting), len(index)):
                yield number, waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _facts(index: ImageIndex, number: int) -> _Facts | CorruptImage:
    try:
        content = index.read(number)
        with Picture(index.file(number), io.BytesIO(content), index.max_pixels) as picture:
            picture.pixels(at_least=(1, 1))  # a JPEG is read to its end, but not transformed
            kind = f"{picture.format} {picture.mode}"
            remarks = remarks_on(picture, index.full_name(index.paths[number]))
            return _Facts(hashlib.sha256(content).digest()[:16], len(content), picture.size, kind, remarks)
    except CorruptImage as error:
        return error
