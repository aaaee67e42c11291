from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from openmae.cli.main import main
from openmae.errors import DataError
from openmae.storage import cache

pytestmark = pytest.mark.usefixtures("clean_environment")


def writing(size: int) -> Callable[[Path], None]:
    return lambda part: (part / "data").write_bytes(b"x" * size) and None


def made(name: str, size: int = 400_000, *, age: float = 0) -> Path:
    """An entry that nothing holds, used ``age`` seconds ago."""
    with cache.holding():
        entry = cache.obtain(cache.root() / cache.REMOTE / name, f"s3://b/{name}", writing(size), size=size)
    used = (entry / cache.MARKER).stat().st_mtime - age
    os.utime(entry / cache.MARKER, (used, used))
    return entry


def names() -> set[str]:
    return {entry.path.name for entry in cache.entries()}


def test_an_entry_is_built_once():
    calls: list[Path] = []

    def build(part: Path) -> None:
        calls.append(part)
        writing(5)(part)

    entry = cache.root() / cache.SOURCES / "a"
    assert cache.obtain(entry, "photos.tar", build) == cache.obtain(entry, "photos.tar", build) == entry
    assert len(calls) == 1
    (found,) = cache.entries()
    assert (found.kind, found.origin, found.complete, found.in_use) == ("sources", "photos.tar", True, True)


def test_a_failed_build_leaves_nothing_unless_it_can_be_resumed():
    def fail(part: Path) -> None:
        writing(5)(part)
        raise RuntimeError("no")

    for resumes in (False, True):
        with pytest.raises(RuntimeError):
            cache.obtain(cache.root() / cache.REMOTE / "a", "s3://b/a", fail, resumes=resumes)
        assert names() == ({"a.part"} if resumes else set())
    seen = []
    build = lambda part: seen.append((part / "data").exists())  # noqa: E731
    cache.obtain(cache.root() / cache.REMOTE / "a", "s3://b/a", build, resumes=True)
    assert seen == [True]
    assert names() == {"a"}


def test_a_full_cache_deletes_the_least_recently_used_entries(monkeypatch):
    for age, name in enumerate(("new", "middle", "old")):
        made(name, age=100 * (age + 1))
    monkeypatch.setenv("OPENMAE_CACHE_GB", "0.0014")
    made("newest")
    assert names() == {"newest", "new", "middle"}
    with cache.holding():
        assert cache.use(cache.root() / cache.REMOTE / "middle")
    made("another")
    assert names() == {"another", "newest", "middle"}, "what is used now is no longer the oldest"


def test_entries_in_use_are_kept_and_reported(monkeypatch):
    made("free", age=1)
    monkeypatch.setenv("OPENMAE_CACHE_GB", "0.001")
    with cache.holding():
        assert cache.use(made("held", age=500))
        with pytest.raises(DataError) as caught:
            made("large", 800_000)
        assert names() == {"held"}
        assert "s3://b/large needs 0.8 MB in the cache, whose limit is 1.0 MB, of which 0.4 MB are in use" in str(
            caught.value
        )
        assert "Set OPENMAE_CACHE_GB to a larger number of gigabytes." in caught.value.fix
        assert [entry.path.name for entry in cache.clear()[1]] == ["held"]
    made("large", 800_000)
    assert names() == {"large"}


@pytest.mark.integration
def test_entries_of_another_process_are_kept(monkeypatch):
    entry = made("held", age=500)
    script = (
        "import sys, pathlib; from openmae.storage import cache\n"
        "assert cache.use(pathlib.Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    )
    run = subprocess.Popen(
        [sys.executable, "-c", script, str(entry)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert run.stdout is not None
    assert run.stdout.readline() == "held\n"
    monkeypatch.setenv("OPENMAE_CACHE_GB", "0.0006")
    with pytest.raises(DataError, match="in use"):
        made("other")
    run.kill()  # a lock ends with its process, however that ends
    run.wait()
    made("other")
    assert names() == {"other"}


@pytest.mark.parametrize("marker", [b"", b"{", b"\xff\xfe", b"[1]", b'{"size": "x", "origin": 5}', b'{"size": null}'])
def test_an_entry_with_a_damaged_marker_is_complete(marker):
    entry = made("a")
    (entry / cache.MARKER).write_bytes(marker)
    (found,) = cache.entries()
    assert (found.path, found.complete) == (entry, True)
    assert found.size >= 400_000, "it is measured anew"
    assert cache.clear() == (found.size, [])


def test_other_files_are_left_alone(tmp_path):
    made("a")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "1.png").touch()
    (cache.root() / cache.REMOTE / "link").symlink_to(tmp_path / "photos")
    (cache.root() / cache.REMOTE / "file").touch()
    assert names() == {"a"}
    cache.clear()
    assert names() == set()
    assert (tmp_path / "photos" / "1.png").exists()


@pytest.mark.parametrize("command", ["list", "clear"])
def test_a_cache_that_is_a_file_is_an_error(monkeypatch, tmp_path, capsys, command):
    (tmp_path / "file").touch()
    monkeypatch.setenv("OPENMAE_CACHE", str(tmp_path / "file"))
    assert main(["cache", command]) == 2
    err = capsys.readouterr().err
    assert f"The cache {tmp_path / 'file'} cannot be read: Not a directory." in err
    assert "set OPENMAE_CACHE to another folder" in err


def test_a_full_disk_is_an_error(monkeypatch):
    monkeypatch.setenv("OPENMAE_CACHE_GB", "1e9")
    with pytest.raises(DataError, match=r"s3://b/x needs 100000.00 GB, but the disk of .* has .* left") as caught:
        cache.make_room(10**14, "s3://b/x")
    assert "set OPENMAE_CACHE to a folder on another disk" in caught.value.fix


@pytest.mark.parametrize("text", ["lots", "-1", "0", "nan", "inf"])
def test_an_invalid_limit_is_an_error(monkeypatch, text):
    monkeypatch.setenv("OPENMAE_CACHE_GB", text)
    with pytest.raises(DataError, match=f"OPENMAE_CACHE_GB must be a number of gigabytes above 0, got '{text}'"):
        cache.limit()


def test_results_that_are_not_uploaded_are_kept(monkeypatch, capsys):
    entry = cache.root() / cache.RESULTS / "run"
    with cache.workspace(entry, "s3://b/run"):
        assert (entry / cache.MARKER).exists(), "there is nothing in it yet"
        with pytest.raises(DataError, match="another process on this machine writes its results there"):
            cache.workspace(entry, "s3://b/run").__enter__()
        cache.mark_pending(entry, "s3://b/run")
        (entry / "model.pth").write_bytes(b"x" * 400_000)
    assert main(["cache", "clear"]) == 0
    assert (
        f"Kept {entry} (s3://b/run): its results are not uploaded yet; delete the folder to discard them."
        in capsys.readouterr().out
    )
    cache.mark_complete(entry, "s3://b/run")
    cache.clear()
    assert not entry.exists()


def test_the_cache_command(capsys):
    assert main(["cache", "path"]) == 0
    assert capsys.readouterr().out.strip() == str(cache.root())
    made("model.pth", 2_000_000)
    (cache.root() / cache.REMOTE / "half.part").mkdir()
    (cache.root() / cache.REMOTE / ".trash-1-x").mkdir()
    assert main(["cache", "list"]) == 0
    out = capsys.readouterr().out
    assert "s3://b/model.pth" in out
    assert "complete" in out
    assert "unfinished" in out
    assert f"2 entries, 2.0 MB of 50.00 GB (OPENMAE_CACHE_GB), in {cache.root()}" in out
    assert main(["cache", "clear"]) == 0
    assert "Freed 2.0 MB" in capsys.readouterr().out
    assert names() == set()
    assert not (cache.root() / cache.REMOTE / ".trash-1-x").exists()
