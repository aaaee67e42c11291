"""Random content of untrusted files leads to errors with a message, never to a crash.

OPENMAE_FUZZ=50 looks fifty times as long. What it finds becomes an ``@example``.
"""

from __future__ import annotations

import contextlib
import io
import os
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tests.helpers.fuzz_targets import (
    ARCHIVES,
    CHECKPOINT,
    ENCRYPTED,
    IMAGES,
    SPEC,
    TABLE,
    WAS_RUN,
    extract,
    read_encrypted,
    read_image,
    read_shard,
    read_spec,
    read_table,
    read_weights,
)

from openmae.data.archives import resolve_source
from openmae.errors import DataError, UserError
from openmae.spec.load import load_spec

LONGER = int(os.environ.get("OPENMAE_FUZZ", "1"))


def fuzz(examples: int) -> settings:
    """Return settings with a number of examples, the same in every run by default."""
    return settings(
        max_examples=examples * LONGER,
        deadline=20_000,
        derandomize=LONGER == 1,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


def changed(content: bytes) -> st.SearchStrategy[bytes]:
    """Return the content with a few bytes changed, removed or inserted."""
    places = st.integers(0, len(content))

    def apply(edits: list[tuple[int, int, bytes]]) -> bytes:
        result = bytearray(content)
        for place, removed, added in edits:
            result[place : place + removed] = added
        return bytes(result)

    lengths = st.sampled_from([0, 1, 2, 4, len(content)])
    return st.lists(st.tuples(places, lengths, st.binary(max_size=8)), max_size=4).map(apply)


# --- specs

_KEYS = st.sampled_from(
    [
        "train",
        "model",
        "dataset",
        "num_epochs",
        "optim",
        "lr",
        "arch",
        "augmentation",
        "mean",
        "results_dir",
        "",
        "a.b",
        "<<",
    ]
)
_LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=6),
    st.sampled_from(["${train.num_epochs}", "${a", "${oc.env:HOME}", "1e400", "nan", "0x1f", "~", "${..}", "${${a}}"]),
)
_TREES = st.recursive(
    _LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS, inner, max_size=4), max_leaves=12
)


@fuzz(80)
@given(_TREES)
def test_specs_of_any_tree(tree: object) -> None:
    read_spec(yaml.safe_dump(tree).encode())


@fuzz(80)
@given(
    st.one_of(
        st.text(max_size=60).map(str.encode),
        st.binary(max_size=60),
        changed(SPEC),
    )
)
@example(b"a: &a [*a]")
@example(b"&a {b: *a}")
@example(b"!!python/object/apply:os.system [exit]")
@example(b"[" * 5000)
@example(b"a: " + b"{b: " * 3000)
@example(
    b"a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]\n"
    + b"".join(b"%c: &%c [%s]\n" % (n + 1, n + 1, b", ".join([b"*%c" % n] * 9)) for n in range(97, 109))
)
@example(b"a: &a [1]\n" + b"".join(b"a%d: &a%d [*a%s]\n" % (n, n, b"%d" % (n - 1) if n else b"") for n in range(500)))
@example(b"? [1, 2]\n: 3")
@example(b"train: 2001-01-01")
@example(b"\xff\xfe")
def test_specs_of_any_bytes(content: bytes) -> None:
    read_spec(content)


@fuzz(60)
@given(
    st.lists(
        st.tuples(_KEYS, _KEYS, st.text(max_size=12)).map(lambda p: f"{p[0]}.{p[1]}={p[2]}") | st.text(max_size=20)
    )
)
@example(["train.num_epochs=" + "9" * 5000])
@example(["model.arch=[" + "[" * 3000])
@example(["train.num_epochs=${train.num_epochs}"])
@example([".".join("a" * 3000) + "=1"])
@example(["train.gpu_ids=" + "[" * 40 + "]" * 40])
def test_overrides(overrides: list[str]) -> None:
    with contextlib.suppress(UserError):
        load_spec(None, overrides, action="train")


# --- archives


@pytest.mark.parametrize(("name", "content"), ARCHIVES.items())
def test_archives_of_changed_bytes(name: str, content: bytes) -> None:
    @fuzz(60)
    @given(changed(content))
    def check(data: bytes) -> None:
        extract(data, name)

    check()


@fuzz(60)
@given(
    st.text(min_size=1, max_size=12, alphabet="./\\a:\0~é \n")
    | st.sampled_from(["../x", "/x", "C:\\x", "a/../../x", "x" * 300])
)
@example("é" * 200)
@example(".")
@example("a//b")
@example("a/" * 3000 + "b")
def test_members_of_any_name(name: str) -> None:
    for kind in ("zip", "tar"):
        stream = io.BytesIO()
        try:
            if kind == "zip":
                with zipfile.ZipFile(stream, "w") as bundle:
                    bundle.writestr(name, b"x")
            else:
                with tarfile.open(fileobj=stream, mode="w") as tar:
                    tar.addfile(tarfile.TarInfo(name))
        except (ValueError, IndexError):  # Python does not write such a name
            continue
        extract(stream.getvalue(), f"a.{kind}")


def test_a_zip_member_without_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENMAE_CACHE", str(tmp_path / "cache"))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as bundle:
        bundle.writestr("x", b"x")
    content = bytearray((tmp_path / "a.zip").read_bytes())
    place = content.index(b"PK\1\2") + 28
    content[place : place + 4] = b"\0\0\1\0"  # the name's length, and that of what follows it
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(DataError, match="member '' has no name"):
        resolve_source(tmp_path / "a.zip")


@pytest.mark.parametrize("header", [b"PK\1\2", b"PK\3\4"], ids=["in the directory", "in its own header"])
def test_zip_name_that_is_not_utf8(header: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENMAE_CACHE", str(tmp_path / "cache"))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as bundle:
        bundle.writestr("\u00e9", b"x")
    content = bytearray((tmp_path / "a.zip").read_bytes())
    content[content.index("\u00e9".encode(), content.index(header)) + 1] = 0xE9
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(DataError, match=r"is damaged or truncated after 0 files \(.*invalid continuation byte"):
        resolve_source(tmp_path / "a.zip")


@fuzz(60)
@given(changed(ARCHIVES["a.tar"]) | changed(2 * ARCHIVES["a.tar"]))
def test_shards_of_changed_bytes(content: bytes) -> None:
    read_shard(content)


@fuzz(60)
@given(changed(TABLE))
def test_label_tables_of_changed_bytes(content: bytes) -> None:
    read_table(content)


@fuzz(60)
@given(st.binary(max_size=200))
def test_label_tables_of_any_bytes(content: bytes) -> None:
    read_table(b"path,label\n1.png," + content)


# --- images


@pytest.mark.parametrize("kind", IMAGES)
def test_images_of_changed_bytes(kind: str) -> None:
    @fuzz(50)
    @given(changed(IMAGES[kind]))
    def check(data: bytes) -> None:
        read_image(data)

    check()


# --- checkpoints and encrypted files


def _pickle_that_runs() -> bytes:
    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return os.mkdir, (str(WAS_RUN),)

    stream = io.BytesIO()
    torch.save(Evil(), stream)
    return stream.getvalue()


@fuzz(80)
@given(changed(CHECKPOINT))
@example(_pickle_that_runs())
@example(b"")
def test_checkpoints_of_changed_bytes(content: bytes) -> None:
    read_weights(content)


@fuzz(40)
@given(changed(ENCRYPTED))
def test_encrypted_files_of_changed_bytes(content: bytes) -> None:
    read_encrypted(content)
