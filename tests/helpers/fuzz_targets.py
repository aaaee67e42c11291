"""Fuzz targets: readers of untrusted bytes, which must only raise documented errors."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
from PIL import Image

from openmae.checkpoints.format import read_checkpoint, read_training_state, write_checkpoint
from openmae.data.archives import resolve_source
from openmae.data.decode import CorruptImage, ImageFile
from openmae.data.formats import READ_FORMATS
from openmae.data.index import index_folder
from openmae.data.shards.indexing import index_shards
from openmae.errors import UserError
from openmae.spec.load import load_spec
from openmae.storage.encryption import Key, created, unlocked

KEY = Key(b"k")
WAS_RUN = Path(tempfile.gettempdir()) / "openmae-was-run"


class Target(NamedTuple):
    """A reader and valid contents for it."""

    read: Callable[[bytes], None]
    seeds: tuple[bytes, ...]


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """Yield a folder that also holds the cache, and check that nothing is written beside it."""
    outside = Path(tempfile.mkdtemp())
    folder = outside / "inside"
    folder.mkdir()
    try:
        with mock.patch.dict(os.environ, OPENMAE_CACHE=str(folder / "cache")):
            yield folder
        assert os.listdir(outside) == ["inside"], "something was written outside the folder"
    finally:
        shutil.rmtree(outside)


def read_spec(content: bytes) -> None:
    with scratch() as folder:
        (folder / "spec.yaml").write_bytes(content)
        with contextlib.suppress(UserError):
            load_spec(folder / "spec.yaml", [], action="train")


def extract(content: bytes, name: str) -> None:
    with scratch() as folder:
        (folder / name).write_bytes(content)
        with contextlib.suppress(UserError):
            resolve_source(folder / name)
        assert set(os.listdir(folder)) <= {name, "cache"}


def read_shard(content: bytes) -> None:
    with scratch() as folder:
        (folder / "a.tar").write_bytes(content)
        with contextlib.suppress(UserError):
            index_shards([str(folder / "a.tar")], None, "a.tar")


def read_table(content: bytes) -> None:
    with scratch() as folder:
        for name in ("1.png", "a/2.png"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).touch()
        (folder / "labels.csv").write_bytes(content)
        with contextlib.suppress(UserError):
            assert index_folder(folder, True).labels


def read_image(content: bytes) -> None:
    with scratch() as folder:
        (folder / "a.png").write_bytes(content)
        found: list[bytes | str] = []
        for file in (None, io.BytesIO(content)):
            try:
                with ImageFile(folder / "a.png", file) as image_file:
                    found.append(image_file.pixels(3).tobytes())
                    assert isinstance(image_file.further_images, str)
            except CorruptImage as error:
                found.append(error.reason)
        assert not any(isinstance(said, str) and " at 0x" in said for said in found), "it names an object in memory"
        assert found[0] == found[1], "a file and an upload of the same bytes differ"


def read_weights(content: bytes) -> None:
    with scratch() as folder:
        for name in ("a.pth", "a.safetensors"):
            (folder / name).write_bytes(content)
            with contextlib.suppress(UserError):
                read_checkpoint(folder / name)
        with contextlib.suppress(UserError):
            read_training_state(folder / "a.pth", lazily=True)
    assert not WAS_RUN.exists(), "a checkpoint's code was executed"


def read_encrypted(content: bytes) -> None:
    with scratch() as folder:
        (folder / "a.pth").write_bytes(content)
        with contextlib.suppress(UserError):
            file = unlocked(folder / "a.pth", KEY)
            assert file is None or file.read() == SECRET, "another content was taken for the written one"
            if file is not None:
                file.close()


# --- contents that are read


def png(size: int = 9) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.arange(size * size * 3, dtype=np.uint8).reshape(size, size, 3)).save(stream, "PNG")
    return stream.getvalue()


def tarred(kind: str) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=f"w:{kind}", format=tarfile.PAX_FORMAT) as bundle:
        for name in ("cat/1.png", "dog/2.png"):
            member = tarfile.TarInfo(name)
            member.size = len(png())
            bundle.addfile(member, io.BytesIO(png()))
    return stream.getvalue()


def zipped() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as bundle:
        for name in ("cat/1.png", "dog/2.png"):
            bundle.writestr(name, png())
    return stream.getvalue()


def encoded(kind: str) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.arange(20 * 24 * 3, dtype=np.uint8).reshape(20, 24, 3)).save(stream, kind)
    return stream.getvalue()


def _written(write: Callable[[Path], object]) -> bytes:
    with scratch() as folder:
        write(folder / "f")
        return (folder / "f").read_bytes()


def _seal(path: Path) -> None:
    with created(path, KEY) as file:
        file.write(SECRET)


_PAYLOAD = {"openmae": {"format": 1}, "progress": {"epoch": 1}, "optimizer": {}, "state_dict": {"w": torch.ones(3)}}
SECRET = b"secret" * 20
SPEC = b"train: {num_epochs: 3, optim: &a {lr: 1e-3}}\nmodel: {<<: *a, arch: vit_tiny_patch16}\n"
ARCHIVES = {"a.zip": zipped(), "a.tar": tarred(""), "a.tgz": tarred("gz")}
IMAGES = {kind: encoded(kind) for kind in READ_FORMATS if kind != "HEIF"}
CHECKPOINT = _written(lambda path: write_checkpoint(_PAYLOAD, path))
ENCRYPTED = _written(_seal)

TABLE = b'path,label\n1.png,cat\n"a/2.png",dog\n'

TARGETS = {
    **{name[2:]: Target(partial(extract, name=name), (content,)) for name, content in ARCHIVES.items()},
    "spec": Target(read_spec, (SPEC, b"train: {gpu_ids: [0, 1]}\nresults_dir: ${oc.env:HOME}/x\n")),
    "shard": Target(read_shard, (ARCHIVES["a.tar"], 2 * ARCHIVES["a.tar"])),
    "table": Target(read_table, (TABLE, TABLE.decode().replace(",", ";").encode("utf-16"))),
    "image": Target(read_image, tuple(IMAGES.values())),
    "checkpoint": Target(read_weights, (CHECKPOINT,)),
    "encrypted": Target(read_encrypted, (ENCRYPTED,)),
}
