from __future__ import annotations

import hashlib
import logging
import mmap
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections import Counter
from collections.abc import Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from s3fs import S3FileSystem

from openmae.errors import DataError
from openmae.storage import cache, transfer
from openmae.storage.download import fetch, local_copy
from openmae.storage.listing import look, unsafe_name

pytestmark = pytest.mark.integration

RANDOM = os.urandom(3 << 20)


@pytest.fixture
def small_pieces(monkeypatch) -> int:
    monkeypatch.setattr(transfer, "PIECE", 256 << 10)
    return 256 << 10


def files_below(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_files_and_folders_are_downloaded_once_per_version(store, bucket, caplog):
    caplog.set_level(logging.INFO, "openmae")
    files = {"a/one.txt": b"one", "a/b/two words.txt": b"two", "a/empty": b"", "ab/three.txt": b"three"}
    store.put(bucket, files)
    store.put(bucket, {"a/": b"", "a/b/": b""})  # what a console leaves of an empty folder
    path = fetch(f"s3://{bucket}/a/one.txt")
    assert (path.name, path.read_bytes()) == ("one.txt", b"one")
    folder = fetch(f"s3://{bucket}/a")
    assert files_below(folder) == {"one.txt": b"one", "b/two words.txt": b"two", "empty": b""}
    assert fetch(f"s3://{bucket}/a/") == folder
    assert fetch(f"s3://{bucket}/a/one.txt") == path
    assert len(files_below(fetch(f"s3://{bucket}"))) == 4, "a whole bucket"
    assert sum("Downloading" in line for line in caplog.messages) == 3, "each version is downloaded once"


def test_a_large_file_is_fetched_in_pieces(store, bucket, small_pieces):
    store.put(bucket, {"big.bin": RANDOM})
    assert fetch(f"s3://{bucket}/big.bin").read_bytes() == RANDOM


def test_a_new_version_is_downloaded(store, bucket):
    url = f"s3://{bucket}/m.pth"
    store.put(bucket, {"m.pth": b"one"})
    first = fetch(url)
    store.put(bucket, {"m.pth": b"two"})
    second = fetch(url)
    assert (first.read_bytes(), second.read_bytes()) == (b"one", b"two")


@pytest.mark.parametrize("tags", [True, False])
def test_a_file_that_changes_during_the_download_is_fetched_again(web, small_pieces, tags, caplog):
    caplog.set_level(logging.INFO, "openmae")
    web.tags = tags
    web.files["/m.bin"] = RANDOM
    old, new = RANDOM, RANDOM[::-1]
    modified = [1]

    def change(number: int) -> None:
        if number == 4:
            web.files["/m.bin"] = new
            modified[0] = 2

    web.on_request = change
    real = type(web)._send

    def dated(self, request, status, body, headers):
        real(self, request, status, body, {**headers, "Last-Modified": f"Mon, 0{modified[0]} Jan 2024 00:00:00 GMT"})

    web._send = dated.__get__(web)
    assert fetch(f"{web.url}/m.bin").read_bytes() == new != old
    assert "m.bin was changed while it was downloaded. Starting over." in "\n".join(caplog.messages)


def test_a_file_that_keeps_changing_is_an_error(web, small_pieces):
    web.on_request = lambda number: web.files.update({"/m.bin": bytes([number]) * (1 << 20)})
    with pytest.raises(DataError, match=r"m\.bin was changed while it was downloaded") as caught:
        fetch(f"{web.url}/m.bin")
    assert "Wait until it is no longer written" in caught.value.fix


def test_companion_files_are_fetched_too(web):
    web.files |= {"/m.engine": b"engine", "/m.engine.json": b"{}", "/n.engine": b"engine"}
    path = fetch(f"{web.url}/m.engine", (".json",))
    assert path.with_name("m.engine.json").read_bytes() == b"{}"
    assert not fetch(f"{web.url}/n.engine", (".json",)).with_name("n.engine.json").exists()
    web.files["/m.engine.json"] = b"[]"
    assert fetch(f"{web.url}/m.engine", (".json",)).with_name("m.engine.json").read_bytes() == b"[]"


def test_folder_of_a_web_server(web):
    web.files |= {"/set/a/1.png": b"1", "/set/b c/2.png": b"22", "/other/3.png": b"3"}
    web.files = {name.replace(" ", "%20"): content for name, content in web.files.items()}
    assert files_below(fetch(f"{web.url}/set/")) == {"a/1.png": b"1", "b c/2.png": b"22"}


def test_web_server_without_range_requests(web, small_pieces):
    web.ranges, web.cuts = False, 0
    web.files["/m.bin"] = RANDOM

    def cut(number: int) -> None:
        web.cuts = 1 if number == 2 else 0

    web.on_request = cut
    assert fetch(f"{web.url}/m.bin").read_bytes() == RANDOM
    assert len(web.requests) == 3, "a look, an answer that was cut off, a whole one"


@pytest.mark.parametrize("size", [100_000, len(RANDOM)])
def test_pieces_whose_connection_breaks_are_fetched_again(web, size, small_pieces):
    web.files["/m.bin"] = RANDOM[:size]
    web.on_request = lambda number: setattr(web, "cuts", 3) if number == 2 else None
    assert fetch(f"{web.url}/m.bin").read_bytes() == RANDOM[:size]
    assert not web.cuts, "no connection was broken"


def test_store_that_breaks_connections(wire, store, bucket, small_pieces):
    store.put(bucket, {"big.bin": RANDOM, **{f"small/{number}": b"x" * 5000 for number in range(20)}})
    wire.cuts, wire.after = 6, 100_000
    assert fetch(f"s3://{bucket}/big.bin").read_bytes() == RANDOM
    assert wire.cuts < 6, "the test has to cut something"
    found = look(f"s3://{bucket}/small")
    wire.cuts, wire.after = 5, 2_000
    assert files_below(local_copy(found)) == {str(number): b"x" * 5000 for number in range(20)}
    assert wire.cuts < 5


def test_slow_responses(web, small_pieces):
    web.files["/m.bin"] = RANDOM[:600_000]
    web.delay = 0.7
    assert fetch(f"{web.url}/m.bin").read_bytes() == RANDOM[:600_000]


def test_store_that_stops_responding(wire, store, bucket, monkeypatch, small_pieces):
    monkeypatch.setattr(transfer, "STALL", 0.5)
    monkeypatch.setattr(transfer, "PATIENCE", 1.0)
    store.put(bucket, {"big.bin": RANDOM})
    found = look(f"s3://{bucket}/big.bin")
    wire.stalled = True
    with pytest.raises(DataError, match="did not answer in time"):
        transfer.Transfer(found.url, found.files, cache.root().parent, lambda count: None).run()


def test_an_interrupted_download_keeps_its_complete_files(web, small_pieces, monkeypatch):
    web.files = {f"/set/{number}.bin": RANDOM[: 400_000 + number] for number in range(8)}
    monkeypatch.setattr(transfer, "STREAMS", 2)
    looks = 1 + len(web.files) + 1  # the page of links, twice, and each file

    def interrupt(number: int) -> None:
        if number == looks + 9:
            os.kill(os.getpid(), signal.SIGINT)
        web.delay = 0.1 if number >= looks + 9 else 0

    web.on_request = interrupt
    with pytest.raises(KeyboardInterrupt):
        fetch(f"{web.url}/set/")
    (unfinished,) = cache.entries()
    assert not unfinished.complete
    kept = {name.rpartition("/")[2] for name in files_below(unfinished.path) if name.endswith(".bin")}
    assert 0 < len(kept) < len(web.files)
    web.on_request, web.delay = lambda number: None, 0
    web.requests.clear()
    assert files_below(fetch(f"{web.url}/set/")) == {path[5:]: content for path, content in web.files.items()}
    fetched = {path[5:] for path, span in web.requests if path.endswith(".bin") and span != "bytes=0-0"}
    assert fetched == {path[5:] for path in web.files} - kept, "a complete file was fetched again"


@pytest.fixture
def flipped(monkeypatch):
    """Flip a bit of the last byte of all that is read from a store."""
    real = transfer.reading

    @asynccontextmanager
    async def opened(*arguments):
        async with real(*arguments) as answer:
            read = answer.read

            async def damaged(count: int) -> bytes:
                chunk = await read(count)
                return chunk[:-1] + bytes([chunk[-1] ^ 1]) if chunk else chunk

            yield replace(answer, read=damaged)

    monkeypatch.setattr(transfer, "reading", opened)


def test_damage_in_transit_is_detected(store, bucket, flipped, small_pieces):
    store.put(bucket, {"big.bin": RANDOM, "small.bin": RANDOM[:1000]})
    for name in ("big.bin", "small.bin"):
        found = look(f"s3://{bucket}/{name}")
        assert found.files[0].md5 == hashlib.md5(store.get(bucket, name)).hexdigest()
        with pytest.raises(DataError, match=rf"{name} arrived damaged, twice: its MD5 is [0-9a-f]+, not") as caught:
            fetch(f"s3://{bucket}/{name}")
        assert "Check the network" in caught.value.fix


def put_in_parts(store, bucket: str, key: str, sizes: Sequence[int]) -> bytes:
    """Upload an object in parts of these sizes, and return its content."""
    name = {"Bucket": bucket, "Key": key}
    upload = store.client.create_multipart_upload(**name)["UploadId"]
    parts, content = [], os.urandom(sum(sizes))
    for number, size in enumerate(sizes, start=1):
        start = sum(sizes[: number - 1])
        body = content[start : start + size]
        reply = store.client.upload_part(**name, UploadId=upload, PartNumber=number, Body=body)
        parts.append({"PartNumber": number, "ETag": reply["ETag"]})
    store.client.complete_multipart_upload(**name, UploadId=upload, MultipartUpload={"Parts": parts})
    return content


MIB = 1 << 20
PARTS = [[5 * MIB, 5 * MIB, 1], [5 * MIB, 6 * MIB, 1], [1000]]


@pytest.mark.parametrize("sizes", PARTS, ids=["alike", "different", "one"])
def test_multipart_object_is_verified(store, bucket, sizes):
    content = put_in_parts(store, bucket, "m.bin", sizes)
    assert look(f"s3://{bucket}/m.bin").files[0].md5 == "", "its ETag is not its MD5"
    assert fetch(f"s3://{bucket}/m.bin").read_bytes() == content


@pytest.mark.parametrize("sizes", PARTS, ids=["alike", "different", "one"])
def test_damage_to_a_multipart_object_is_detected(store, bucket, flipped, sizes):
    put_in_parts(store, bucket, "m.bin", sizes)
    with pytest.raises(DataError, match=r"m\.bin arrived damaged, twice: it does not match the store's checksum\."):
        fetch(f"s3://{bucket}/m.bin")
    assert not list(cache.root().rglob("m.bin"))


@pytest.mark.parametrize("content", [b"<html>Log in</html>", b"\n<!DOCTYPE HTML><p>"])
def test_web_page_in_place_of_a_file_is_an_error(web, content):
    web.tags = False
    web.files |= {"/m.pth": content, "/page.html": content}
    with pytest.raises(DataError, match=r"the server sent a web page \(\d+ bytes\) instead of m\.pth\.") as caught:
        fetch(f"{web.url}/m.pth")
    assert "login" in caught.value.fix
    assert fetch(f"{web.url}/page.html").read_bytes() == content


def test_answer_that_is_no_object_is_an_error(web, monkeypatch):
    web.tags = False
    web.files["/bucket/m.pth"] = b"<html>Log in</html>"
    monkeypatch.setenv("AWS_ENDPOINT_URL", web.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test-secret")
    match = r"s3://bucket/m\.pth: the response is not from an object store: 19 bytes of .*, without an ETag\."
    with pytest.raises(DataError, match=match) as caught:
        fetch("s3://bucket/m.pth")
    assert "AWS_ENDPOINT_URL" in caught.value.fix


def test_another_size_is_another_version(web):
    web.tags = False
    web.files["/m.pth"] = b"one"
    found = look(f"{web.url}/m.pth")
    web.files["/m.pth"] = b"one more"
    with pytest.raises(DataError, match="was changed while it was downloaded"):
        local_copy(found)


def test_unsafe_names_are_refused(store, bucket):
    store.put(bucket, {"a/../../evil": b"x"})
    with pytest.raises(DataError, match=r"holds '\.\./\.\./evil', which is not a safe file name"):
        fetch(f"s3://{bucket}/a")
    store.put(bucket, {"b/back\\slash": b"x"})
    with pytest.raises(DataError, match="which is not a safe file name"):
        fetch(f"s3://{bucket}/b")
    assert all(map(unsafe_name, ("/etc/x", "a//b", "a/./b", "..", "", "new\nline", "nul\0", "bell\x7f")))
    assert not any(map(unsafe_name, ("a/b.png", "..a", "b/...", "wörter und mehr.png")))
    store.put(bucket, {"c/x": b"x", "c/x/y": b"x"})
    with pytest.raises(DataError, match="'x' is both a file and a folder"):
        fetch(f"s3://{bucket}/c")


def test_unsafe_name_in_a_url_is_refused(web):
    web.files["/..%2F..%2Fevil"] = b"x"
    with pytest.raises(DataError, match="is not a safe file name"):
        fetch(f"{web.url}/..%2F..%2Fevil")


FETCH = "import sys; from openmae.storage.download import fetch; print(fetch(sys.argv[1]))"


def test_two_processes_download_once(web):
    web.files["/m.bin"] = RANDOM
    web.delay = 0.3
    runs = [
        subprocess.Popen([sys.executable, "-c", FETCH, f"{web.url}/m.bin"], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    paths = {run.communicate(timeout=60)[0].strip() for run in runs}
    assert len(paths) == 1
    assert Path(paths.pop()).read_bytes() == RANDOM
    whole = [span for path, span in web.requests if span != "bytes=0-0"]
    assert len(whole) == 1, "one process downloads, the other waits"


def test_threads_of_a_process_download_once(web):
    web.files["/m.bin"] = RANDOM
    paths: list[Path] = []
    threads = [threading.Thread(target=lambda: paths.append(fetch(f"{web.url}/m.bin"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(paths) == 4
    assert sum(span != "bytes=0-0" for _, span in web.requests) == 1


# not ru_maxrss, which a process takes over from the one that started it
MEASURE = textwrap.dedent("""
    import sys
    from pathlib import Path
    from openmae.storage.download import fetch
    def peak(): return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
    fetch(sys.argv[1])  # connections, libraries
    before = peak()
    path = fetch(sys.argv[2])
    print(path.stat().st_size, peak() - before, peak())
""")
needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")


def measured(big: str, small: str, megabytes: int) -> tuple[int, int]:
    """MiB that the download of a file added to a process's memory, and the process's peak."""
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, small, big], capture_output=True, text=True, timeout=500, check=False
    )
    assert run.returncode == 0, run.stderr
    size, added, peak = map(int, run.stdout.split())
    assert size == megabytes << 20
    return added >> 10, peak >> 10


@needs_proc
@pytest.mark.slow  # 96 MiB through a server in Python, in a process of its own
def test_memory_stays_bounded(store, bucket):
    megabytes = 96
    block = os.urandom(8 << 20)
    upload = store.client.create_multipart_upload(Bucket=bucket, Key="big.bin")["UploadId"]
    part = {"Bucket": bucket, "Key": "big.bin", "UploadId": upload}
    parts = [
        {"PartNumber": number, "ETag": store.client.upload_part(**part, PartNumber=number, Body=block)["ETag"]}
        for number in range(1, megabytes // 8 + 1)
    ]
    store.client.complete_multipart_upload(**part, MultipartUpload={"Parts": parts})
    store.put(bucket, {"small": b"x"})
    added, peak = measured(f"s3://{bucket}/big.bin", f"s3://{bucket}/small", megabytes)
    assert added < 48, f"96 MiB took {added} MiB of memory, {peak} in all"


@needs_proc
@pytest.mark.slow  # half a minute: a gigabyte through a server in Python
def test_a_gigabyte_within_300_mb(web, monkeypatch, tmp_path):
    with (tmp_path / "big.bin").open("w+b") as file:
        file.truncate(1 << 30)
        web.files = {"/bucket/big.bin": mmap.mmap(file.fileno(), 0), "/bucket/small": b"x"}
    monkeypatch.setenv("AWS_ENDPOINT_URL", web.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test-secret")
    _, peak = measured("s3://bucket/big.bin", "s3://bucket/small", 1024)
    assert peak < 286, f"the process took {peak} MiB"


@pytest.mark.parametrize("count", [300, pytest.param(3000, marks=pytest.mark.slow)])
def test_many_small_files(store, bucket, count, monkeypatch):
    """One request per file and one per thousand listed, so that the time is the store's."""
    store.put(bucket, {f"set/{number % 10}/{number}.png": str(number).encode() for number in range(count)})
    asked = Counter()
    real = S3FileSystem._call_s3

    async def counting(self, method, *arguments, **options):
        asked[getattr(method, "__name__", method)] += 1
        return await real(self, method, *arguments, **options)

    monkeypatch.setattr(S3FileSystem, "_call_s3", counting)
    folder = fetch(f"s3://{bucket}/set")
    assert len(files_below(folder)) == count
    assert asked["get_object"] == count + 1, f"{asked}: one look, and each file once"
    assert sum(asked.values()) - asked["get_object"] <= 2 + count // 1000, f"{asked}: and a listing"
    asked.clear()
    assert fetch(f"s3://{bucket}/set") == folder
    assert asked["get_object"] == 1, "nothing is fetched again"
