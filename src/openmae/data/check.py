"""Check a data set: read and decode every image once."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from openmae.data.decode import CorruptImage, ImageFile
from openmae.data.index import ImageIndex
from openmae.data.parallel import map_images
from openmae.data.shards.reading import ShardedIndex


@dataclass
class CheckResult:
    """The result of checking a data set.

    Attributes:
        index: the data set.
        sizes: int64 [N, 2], width and height in pixels of the readable images, after EXIF rotation.
        file_sizes: int64 [N], file sizes of the readable images in bytes.
        formats: number of images by format and mode, such as "JPEG RGB".
        corrupt: (name, reason) of images that cannot be decoded.
        further: (name, description) of readable files with several images, of which only the first is read.
        duplicates: names of readable images, grouped by equal content.
        contradictions: number of groups of duplicates with different labels.
    """

    index: ImageIndex
    sizes: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty((0, 2), np.int64))
    file_sizes: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    formats: Counter[str] = field(default_factory=Counter)
    corrupt: list[tuple[str, str]] = field(default_factory=list)
    further: list[tuple[str, str]] = field(default_factory=list)
    duplicates: list[list[str]] = field(default_factory=list)
    contradictions: int = 0

    @property
    def redundant(self) -> int:
        """The number of images to remove to keep one of each group of duplicates."""
        return sum(len(group) - 1 for group in self.duplicates)

    @cached_property
    def class_counts(self) -> dict[str, int]:
        """The number of images by class, in the order of the class numbers; empty without labels."""
        counts = Counter(self.index.labels)
        return {name: counts[number] for number, name in enumerate(self.index.class_names)}

    @cached_property
    def shard_counts(self) -> list[int]:
        """The number of images of each shard; empty for a folder."""
        if not isinstance(self.index, ShardedIndex):
            return []
        return np.bincount(self.index.shard_of, minlength=len(self.index.shards)).tolist()


class _Image(NamedTuple):
    digest: bytes
    length: int
    size: tuple[int, int]  # width, height
    format: str
    further: str


def check_images(index: ImageIndex, advance: Callable[[], object] = lambda: None) -> CheckResult:
    """Read and decode every image of ``index`` with one thread per core; ``advance`` is called after each image."""
    result = CheckResult(index)
    groups: defaultdict[bytes, list[int]] = defaultdict(list)
    readable: list[_Image] = []
    for number, image in enumerate(map_images(index, _check)):
        advance()
        if isinstance(image, CorruptImage):
            result.corrupt.append((index.full_name(number), image.reason))
            continue
        groups[image.digest].append(number)
        readable.append(image)
        result.formats[image.format] += 1
        if image.further:
            result.further.append((index.full_name(number), image.further))
    result.sizes = np.array([image.size for image in readable], np.int64).reshape(-1, 2)
    result.file_sizes = np.array([image.length for image in readable], np.int64)
    same = [group for group in groups.values() if len(group) > 1]
    result.duplicates = [[index.full_name(number) for number in group] for group in same]
    if (labels := index.labels) is not None:
        result.contradictions = sum(len({labels[number] for number in group} - {-1}) > 1 for group in same)
    return result


def _check(image: ImageFile, content: bytes) -> _Image:
    image.pixels(at_least=(1, 1))  # reads all of a JPEG, but decodes it at the lowest resolution
    height, width = image.size
    digest = hashlib.sha256(content).digest()[:16]
    return _Image(digest, len(content), (width, height), f"{image.format} {image.mode}", image.further_images)
