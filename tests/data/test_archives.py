from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import struct
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

from openmae.data import archives
from openmae.data.archives import resolve_source
from openmae.errors import DataError


def tar_of(path: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    with tarfile.open(path, "w:gz" if path.suffix in (".gz", ".tgz") else "w") as tar:
        for member, content in members:
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def special(name: str, kind: bytes, target: str = "") -> tuple[tarfile.TarInfo, bytes]:
    member = tarfile.TarInfo(name)
    member.type = kind
    member.linkname = target
    return member, b""


def regular(name: str, content: bytes = b"pixels") -> tuple[tarfile.TarInfo, bytes]:
    return tarfile.TarInfo(name), content


def zip_of(path: Path, *members: tuple[zipfile.ZipInfo | str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as bundle:
        for member, content in members:
            bundle.writestr(member, content)
    return path


def files_below(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def test_folder_is_returned_unchanged(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    assert resolve_source(str(tmp_path)) == tmp_path


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").touch()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_source("~/pictures") == tmp_path / "pictures"


@pytest.mark.parametrize("name", ["set.tar", "set.tar.gz", "set.tgz", "set.zip"])
def test_archive_is_extracted_once(tmp_path: Path, name: str) -> None:
    if name.endswith(".zip"):
        archive = zip_of(tmp_path / name, ("cat/", b""), ("cat/1.png", b"one"), ("dog/2.png", b"two"))
    else:
        archive = tar_of(
            tmp_path / name,
            special("cat", tarfile.DIRTYPE),
            regular("cat/1.png", b"one"),
            regular("./dog/2.png"),
        )
    folder = resolve_source(str(archive))
    assert files_below(folder) == {"cat/1.png", "dog/2.png", ".openmae-complete"}
    assert (folder / "cat/1.png").read_bytes() == b"one"
    (folder / "cat/1.png").write_bytes(b"seen")
    assert resolve_source(str(archive)) == folder
    assert (folder / "cat/1.png").read_bytes() == b"seen"


def test_changed_archive_is_extracted_again(tmp_path: Path) -> None:
    archive = tar_of(tmp_path / "set.tar", regular("1.png", b"one"))
    first = resolve_source(str(archive))
    tar_of(archive, regular("1.png", b"two"))
    os.utime(archive, ns=(1, 1))
    second = resolve_source(str(archive))
    assert second != first
    assert (second / "1.png").read_bytes() == b"two"


def test_cache_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENMAE_CACHE", str(tmp_path / "mine"))
    folder = resolve_source(str(tar_of(tmp_path / "set.tar", regular("1.png"))))
    assert folder.parent == tmp_path / "mine" / "sources"


def test_incomplete_extraction_is_repeated(tmp_path: Path) -> None:
    archive = tar_of(tmp_path / "set.tar", regular("1.png"), regular("2.png"))
    folder = resolve_source(str(archive))
    (folder / ".openmae-complete").unlink()
    (folder / "2.png").unlink()
    abandoned = Path(f"{folder}.part-killed")
    abandoned.mkdir()
    assert files_below(resolve_source(str(archive))) == {"1.png", "2.png", ".openmae-complete"}
    assert not abandoned.exists()


def test_interrupted_extraction_leaves_no_entry(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = tar_of(tmp_path / "set.tar", regular("1.png"), regular("2.png"))

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(archives._Budget, "take", interrupted)
        with pytest.raises(KeyboardInterrupt):
            resolve_source(str(archive))
    assert not [p for p in (cache / "sources").iterdir() if p.is_dir()]
    assert "2.png" in files_below(resolve_source(str(archive)))


def test_concurrent_extraction_runs_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = tar_of(tmp_path / "set.tar", *(regular(f"{i}.png") for i in range(50)))
    extracted: list[Path] = []
    real = archives._extract
    monkeypatch.setattr(archives, "_extract", lambda *a: extracted.append(a[1]) or real(*a))
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(resolve_source(str(archive)))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6
    assert len(set(found)) == 1
    assert len(extracted) == 1


HOSTILE_TAR = {
    "parent": (regular("a/../../evil"), "would be written outside the folder"),
    "absolute": (regular("/tmp/evil"), "would be written outside the folder"),
    "windows drive": (regular("C:/evil"), "would be written outside the folder"),
    "backslashes": (regular("..\\evil"), "would be written outside the folder"),
    "parent folder": (special("../evil", tarfile.DIRTYPE), "would be written outside the folder"),
    "symlink": (special("evil", tarfile.SYMTYPE, "/etc/passwd"), "is a link to '/etc/passwd'"),
    "hard link": (special("evil", tarfile.LNKTYPE, "ok.png"), "is a link to 'ok.png'"),
    "device": (special("evil", tarfile.CHRTYPE), "is a device or another special file"),
    "fifo": (special("evil", tarfile.FIFOTYPE), "is a device or another special file"),
    "newline": (regular("evil\ncat/1.png"), "has a control character in its name"),
    "escape": (regular("evil\x1b[2J"), "has a control character in its name"),
    "folder with a newline": (special("evil\n", tarfile.DIRTYPE), "has a control character in its name"),
}


@pytest.mark.parametrize(("member", "text"), HOSTILE_TAR.values(), ids=HOSTILE_TAR.keys())
def test_hostile_tar(tmp_path: Path, cache: Path, member: tuple[tarfile.TarInfo, bytes], text: str) -> None:
    archive = tar_of(tmp_path / "set.tar.gz", regular("ok.png"), member)
    with pytest.raises(DataError) as caught:
        resolve_source(str(archive))
    assert f"member {member[0].name!r} {text}; nothing was extracted" in str(caught.value)
    assert not [p for p in (cache / "sources").iterdir() if p.is_dir()]
    assert not list(tmp_path.rglob("evil"))


def zip_link() -> zipfile.ZipInfo:
    info = zipfile.ZipInfo("evil")
    info.external_attr = 0o120777 << 16
    return info


@pytest.mark.parametrize(
    ("member", "text"),
    [
        ("../evil", "would be written outside"),
        ("/evil", "would be written outside"),
        (zip_link(), "is a link"),
        ("evil\nname", "has a control character in its name"),
    ],
    ids=["parent", "absolute", "link", "newline"],
)
def test_hostile_zip(tmp_path: Path, cache: Path, member: zipfile.ZipInfo | str, text: str) -> None:
    archive = zip_of(tmp_path / "set.zip", ("ok.png", b"x"), (member, b"/etc/passwd"))
    with pytest.raises(DataError, match=text):
        resolve_source(str(archive))
    assert not [p for p in (cache / "sources").iterdir() if p.is_dir()]


def test_damaged_archives(tmp_path: Path, cache: Path) -> None:
    whole = tar_of(tmp_path / "set.tar.gz", *(regular(f"{i}.png", os.urandom(9999)) for i in range(5)))
    whole.write_bytes(whole.read_bytes()[:25_000])
    with pytest.raises(DataError, match=r"set.tar.gz is damaged or truncated after 2 files") as caught:
        resolve_source(str(whole))
    assert "Fix: Copy or pack it again." in str(caught.value)
    assert not [p for p in (cache / "sources").iterdir() if p.is_dir()]


@pytest.mark.parametrize("kept", [1024, 1100, 1600], ids=["at a header", "in a header", "in a file"])
def test_truncated_tar(tmp_path: Path, kept: int) -> None:
    archive = tar_of(tmp_path / "set.tar", regular("1.png"), regular("2.png", b"x" * 512), regular("3.png"))
    archive.write_bytes(archive.read_bytes()[:kept])
    with pytest.raises(DataError, match=r"set.tar is damaged or truncated"):
        resolve_source(str(archive))


def test_tar_with_a_broken_header(tmp_path: Path) -> None:
    archive = tar_of(tmp_path / "set.tar", regular("1.png"), regular("2.png"))
    content = bytearray(archive.read_bytes())
    content[1024 + 100] ^= 0xFF
    archive.write_bytes(content)
    with pytest.raises(DataError, match=r"set.tar is damaged or truncated after 1 files"):
        resolve_source(str(archive))


def test_file_that_is_not_an_archive(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(DataError, match=r"notes.txt is a file but not an archive") as caught:
        resolve_source(str(tmp_path / "notes.txt"))
    assert ".tar, .tar.gz, .tgz or .zip" in caught.value.fix


def test_image_is_not_a_source(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "one.png")
    with caplog.at_level("INFO", logger="openmae"), pytest.raises(DataError) as caught:
        resolve_source(str(tmp_path / "one.png"))
    assert caught.value.problem == f"{tmp_path}/one.png is an image, not a folder or an archive."
    assert caught.value.fix == f"Name the folder it is in: {tmp_path}"
    assert "Extracting" not in caplog.text


def test_archive_is_recognised_by_content(tmp_path: Path) -> None:
    inner = zip_of(tmp_path / "inner.zip", ("a.png", b"x")).read_bytes()
    archive = tar_of(tmp_path / "really_a_tar.zip", regular("inner.zip", inner))
    assert "inner.zip" in files_below(resolve_source(str(archive)))


def test_empty_sources(tmp_path: Path) -> None:
    (tmp_path / "void").mkdir()
    with pytest.raises(DataError, match=r"The folder .*void is empty"):
        resolve_source(str(tmp_path / "void"))
    with pytest.raises(DataError, match=r"set.tar holds no files"):
        resolve_source(str(tar_of(tmp_path / "set.tar", special("only", tarfile.DIRTYPE))))
    with pytest.raises(DataError, match="The data source is empty"):
        resolve_source("")


def test_missing_source_suggests_similar_names(tmp_path: Path) -> None:
    (tmp_path / "images_train").mkdir()
    with pytest.raises(DataError, match=r"There is no file or folder .*image_train") as caught:
        resolve_source(str(tmp_path / "image_train"))
    assert caught.value.fix == "Did you mean images_train?"
    with pytest.raises(DataError, match=f"exists as far as {tmp_path}"):
        resolve_source(str(tmp_path / "no" / "where"))


def bomb_tar(path: Path) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        member = tarfile.TarInfo("zeros.png")
        member.size = 50 << 20
        tar.addfile(member, Zeros())
    return path


class Zeros(io.RawIOBase):
    def read(self, size: int = -1, /) -> bytes:
        return bytes(size)


def bomb_zip(path: Path) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bundle:
        bundle.writestr("zeros.png", bytes(50 << 20))
    return path


@pytest.mark.parametrize("make", [bomb_tar, bomb_zip])
def test_decompression_bomb_is_refused(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], Path]
) -> None:
    monkeypatch.setattr(archives, "FREE_BYTES", 1 << 20)
    archive = make(tmp_path / ("set.zip" if make is bomb_zip else "set.tar.gz"))
    with pytest.raises(DataError, match="holds more than 200 times its own size; nothing was extracted") as caught:
        resolve_source(str(archive))
    assert "extract it yourself and name the folder" in caught.value.fix
    assert not [p for p in (cache / "sources").iterdir() if p.is_dir()]


def test_content_larger_than_the_cache_is_refused(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENMAE_CACHE_GB", "0.01")
    with pytest.raises(DataError, match=r"holds more than the 10 MB that the cache may take") as caught:
        resolve_source(str(bomb_tar(tmp_path / "set.tar.gz")))
    assert "Set OPENMAE_CACHE_GB to a larger number" in caught.value.fix
    assert not [p for p in (cache / "sources").iterdir() if p.is_dir()]


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("set.tar.gz", b"pixels", "files"),
        ("set.tar", b"", "files"),
        ("set.tar.gz", b"", "folders"),
        ("set.zip", b"", ""),
    ],
)
def test_too_many_tiny_members_are_refused(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes, kind: str
) -> None:
    monkeypatch.setattr(archives, "FREE_MEMBERS", 1000)
    if name == "set.zip":
        archive = zip_of(tmp_path / name, *((f"{i}.png", content) for i in range(2000)))
    else:
        make = (
            (lambda name: special(name, tarfile.DIRTYPE)) if kind == "folders" else lambda name: regular(name, content)
        )
        archive = tar_of(tmp_path / name, regular("1.png"), *(make(f"{i}") for i in range(2000)))
    with pytest.raises(DataError, match="has more than 1,000 members, too many for its size; nothing was extracted"):
        resolve_source(str(archive))
    assert not [p for p in (cache / "sources").iterdir() if p.is_dir()]


@pytest.mark.slow  # half a minute: most of it to write the archive
def test_archive_with_a_million_members_is_refused(tmp_path: Path, cache: Path) -> None:
    with gzip.open(tmp_path / "set.tar.gz", "wb", compresslevel=1) as out:
        for number in range(1_000_000):
            out.write(tarfile.TarInfo(f"{number % 100}/{number}.png").tobuf(tarfile.USTAR_FORMAT))
        out.write(bytes(1024))
    with pytest.raises(DataError, match="has more than 100,000 members, too many for its size; nothing was extracted"):
        resolve_source(str(tmp_path / "set.tar.gz"))
    assert not [p for p in (cache / "sources").iterdir() if p.is_dir()]


def test_many_small_images_are_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "FREE_MEMBERS", 1000)
    archive = tar_of(tmp_path / "set.tar.gz", *(regular(f"{i}.png", os.urandom(600)) for i in range(1500)))
    assert len(files_below(resolve_source(str(archive)))) == 1501


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
def test_huge_tar_header_is_refused(tmp_path: Path, kind: bytes) -> None:
    with tarfile.open(tmp_path / "set.tar.gz", "w:gz") as tar:
        first, _ = regular("1.png")
        tar.addfile(first, io.BytesIO())
        member = tarfile.TarInfo("x")
        member.type, member.size = kind, 20 << 20
        tar.addfile(member, Zeros())
    with pytest.raises(DataError, match=r"damaged or truncated after 1 files \(a header of 20,971,520 bytes\)"):
        resolve_source(str(tmp_path / "set.tar.gz"))


def test_unsupported_scheme() -> None:
    with pytest.raises(DataError, match=r"ftp://host/set.zip: ftp:// is not supported") as caught:
        resolve_source("ftp://user:hunter2@host/set.zip")
    assert "Use s3://, gs://, http://, https:// or a path." in caught.value.fix
    assert "hunter2" not in str(caught.value)


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, str]]:
    """A folder, and its URL on a web server."""
    folder = tmp_path / "served"
    folder.mkdir()
    monkeypatch.setenv("OPENMAE_CACHE", str(tmp_path / "mine"))
    handler = partial(QuietHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


def test_remote_archive(served: tuple[Path, str], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, url = served
    caplog.set_level("INFO", "openmae")
    tar_of(folder / "set.tar.gz", regular("cat/1.png", b"one"))
    first = resolve_source(f"{url}/set.tar.gz?signature=secret")
    assert files_below(first) == {"cat/1.png", ".openmae-complete"}
    assert resolve_source(f"{url}/set.tar.gz?signature=another") == first, "the same file by another signature"
    assert sum("Downloading" in line for line in caplog.messages) == 1
    assert not list((tmp_path / "mine" / "remote").glob("*/*.gz")), "once it is extracted the archive is dropped"
    tar_of(folder / "set.tar.gz", regular("cat/1.png", b"two"), regular("cat/2.png"))
    assert (resolve_source(f"{url}/set.tar.gz") / "cat/1.png").read_bytes() == b"two"
    assert "secret" not in caplog.text


def test_remote_folder(served: tuple[Path, str]) -> None:
    folder, url = served
    (folder / "set" / "cat").mkdir(parents=True)
    (folder / "set" / "cat" / "1.png").write_bytes(b"one")
    assert (resolve_source(f"{url}/set/") / "cat" / "1.png").read_bytes() == b"one"


def test_hostile_remote_archive(served: tuple[Path, str], tmp_path: Path) -> None:
    folder, url = served
    tar_of(folder / "set.tar", regular("../evil"))
    with pytest.raises(DataError) as caught:
        resolve_source(f"{url}/set.tar")
    assert f"{url}/set.tar: member '../evil' would be written outside the folder" in str(caught.value)
    assert str(tmp_path) not in str(caught.value), "the message names the URL, not a place in the cache"
    assert not list(tmp_path.rglob("evil"))
    (folder / "notes.txt").write_text("hello")
    with pytest.raises(DataError, match=r"/notes.txt is a file but not an archive"):
        resolve_source(f"{url}/notes.txt")


def test_unusable_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("OPENMAE_CACHE", str(tmp_path / "file" / "cache"))
    archive = tar_of(tmp_path / "set.tar", regular("1.png"))
    with pytest.raises(DataError, match="could not be extracted into") as caught:
        resolve_source(str(archive))
    assert "set OPENMAE_CACHE" in caught.value.fix


# ---------------------------------------------------------------------------- archives as other tools write them


def packed(*names: str) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name in names:
            member, content = regular(name, name.encode("utf-8", "surrogateescape"))
            tar.addfile(member, io.BytesIO(content))
    return stream.getvalue()


@pytest.mark.parametrize(
    ("name", "compress"),
    [
        ("a.tar", bytes),
        ("a.tar.gz", gzip.compress),
        ("a.tgz", lambda content: gzip.compress(content[:700]) + gzip.compress(content[700:])),
        ("a.tar.bz2", bz2.compress),
        ("a.tar.xz", lzma.compress),
    ],
)
def test_concatenated_tar_files(
    tmp_path: Path, name: str, compress: Callable[[bytes], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    content = packed("a/1.png", "a/2.png") + packed("b/1.png") + bytes(60 * 512) + packed("c/1.png")
    (tmp_path / name).write_bytes(compress(content))
    folder = resolve_source(tmp_path / name)
    assert files_below(folder) == {"a/1.png", "a/2.png", "b/1.png", "c/1.png", ".openmae-complete"}
    assert "is not read" not in caplog.text


@pytest.mark.parametrize("joined", [True, False])
def test_concatenated_compressed_tar_files(tmp_path: Path, joined: bool) -> None:
    content = gzip.compress(packed("a/1.png")) + (gzip.compress(packed("b/1.png")) if joined else b"")
    (tmp_path / "a.tar.gz").write_bytes(content)
    found = files_below(resolve_source(tmp_path / "a.tar.gz"))
    assert found == {"a/1.png", *(["b/1.png"] if joined else []), ".openmae-complete"}


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_trailing_data_is_reported(
    tmp_path: Path, compress: Callable[[bytes], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(compress(packed("a/1.png")) + b"something else")
    assert files_below(resolve_source(path)) == {"a/1.png", ".openmae-complete"}
    assert f"{path}: the data after the end of the tar file is not read." in caplog.text


@pytest.mark.parametrize("cut", [1, 6, 40])
def test_truncated_concatenated_archive(tmp_path: Path, cut: int) -> None:
    content = gzip.compress(packed("a/1.png")) + gzip.compress(packed("b/1.png"))
    (tmp_path / "a.tar.gz").write_bytes(content[:-cut])
    with pytest.raises(DataError, match=r"damaged or truncated after . files"):
        resolve_source(tmp_path / "a.tar.gz")


def test_link_in_a_concatenated_archive_is_refused(tmp_path: Path) -> None:
    evil = tar_of(tmp_path / "evil.tar", special("x.png", tarfile.SYMTYPE, "/etc/passwd")).read_bytes()
    (tmp_path / "a.tar").write_bytes(packed("a/1.png") + evil)
    with pytest.raises(DataError, match=r"member 'x.png' is a link to '/etc/passwd'; nothing was extracted"):
        resolve_source(tmp_path / "a.tar")


def test_trailing_zeros_count_as_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "FREE_BYTES", 10**5)
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(packed("a/1.png") + bytes(10**6)))
    with pytest.raises(DataError, match="holds more than 200 times its own size"):
        resolve_source(tmp_path / "a.tar.gz")


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", ["a.tar", "a.zip"])
def test_members_with_the_same_name(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    if name == "a.tar":
        tar_of(tmp_path / name, regular("a/1.png", b"old"), regular("a/1.png", b"new"))
    else:
        zip_of(tmp_path / name, ("a/1.png", b"old"), ("a/1.png", b"new"))
    folder = resolve_source(tmp_path / name)
    assert (folder / "a/1.png").read_bytes() == b"new"
    assert f"{tmp_path}/{name} has several members with the same name, such as a/1.png; only the last" in caplog.text


def test_unsupported_zip_compression(tmp_path: Path) -> None:
    path = zip_of(tmp_path / "a.zip", ("cat/0.jpg", b"x" * 100))
    content = bytearray(path.read_bytes())
    content[8:10] = struct.pack("<H", 9)
    central = content.rfind(b"PK\1\2")
    content[central + 10 : central + 12] = struct.pack("<H", 9)
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        resolve_source(path)
    assert f"{path}: member 'cat/0.jpg' is compressed with Deflate64, which is not supported" in caught.value.problem
    assert caught.value.fix == "Extract it with another program (unzip, 7z) and name the folder, or pack it as .tar."


def test_archive_with_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"caf\xe9.tar")
    path.write_bytes(packed("a/1.png", os.fsdecode(b"a/\xe9.png")))
    assert files_below(resolve_source(path)) == {"a/1.png", "a/\udce9.png", ".openmae-complete"}


@pytest.mark.parametrize("source", ["a\0b", "~nobody-of-that-name/x", "x" * 5000])
def test_impossible_file_names(source: str) -> None:
    with pytest.raises(DataError):
        resolve_source(source)


def test_pipes_and_devices_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.tar")
    (tmp_path / "b.zip").symlink_to("/dev/zero")
    for name, kind in (("a.tar", "a named pipe (FIFO)"), ("b.zip", "a device")):
        with pytest.raises(DataError) as caught:
            resolve_source(tmp_path / name)
        assert caught.value.problem.endswith(f" is {kind}.")
        assert "Name a folder of images, or an archive" in caught.value.fix
