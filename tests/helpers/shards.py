"""Small images and tar files for tests of shards."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from openmae.data.index import ImageIndex
from openmae.data.shards.packing import PackOptions, pack


def png(seed: int = 0) -> bytes:
    """Return a small PNG of noise."""
    buffer = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 255, (20, 24, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, members: Mapping[str, bytes]) -> Path:
    """Write a plain tar file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def sharded(index: ImageIndex, out: Path, shard_bytes: int = 20_000) -> str:
    """Pack the images of a folder into several shards, and return their pattern."""
    return pack(index, out, PackOptions(shard_bytes=shard_bytes)).pattern
