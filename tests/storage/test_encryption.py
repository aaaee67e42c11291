"""The format as its docstring tells it, and what does not open."""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import os
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from openmae.errors import CheckpointError, SpecError
from openmae.storage import encryption, memory_folder
from openmae.storage.encryption import (
    Key,
    created,
    is_encrypted,
    read_bytes,
    resolve_key,
    temporaries_in_memory,
    unlocked,
)

MIB, HEADER, TAG = 2**20, 52, 16
SECRET = b"correct horse battery staple"
#: What version 1 wrote for SECRET; it must open for ever.
VECTOR = (
    "894f70656e4d41452d63727970740d0a0104080159fc08a41b99d301428788595ccc820f9d522944beaace066e25c1a53ff8"
    "e26323b56aff6e7d3ddf0a021e438ac82f06516c3088fdeb13"
)


@pytest.fixture(autouse=True)
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader goes by the header, so all but the cost of a guess stays as it is."""
    monkeypatch.setattr(encryption, "_LOG_N", 4)


def encrypt(path: Path, content: bytes, key: Key | None = None) -> Path:
    with created(path, key or Key(SECRET)) as file:
        file.write(content)
    return path


def decrypt_independently(data: bytes, secret: bytes) -> bytes:
    """By the docstring's words alone, with the standard library's scrypt and HMAC."""
    header, rest = data[:HEADER], data[HEADER:]
    assert header[:16] == b"\x89OpenMAE-crypt\r\n"
    version, log_n, r, p = header[16:20]
    assert (version, r, p) == (1, 8, 1)
    master = hashlib.scrypt(secret, salt=header[20:36], n=2**log_n, r=r, p=p, maxmem=2**28, dklen=32)
    extracted = hmac.digest(header[36:52], master, "sha256")
    first = hmac.digest(extracted, b"OpenMAE file\x01", "sha256")
    second = hmac.digest(extracted, first + b"OpenMAE file\x02", "sha256")
    cipher, prefix = AESGCM(first), second[:7]
    chunks = [rest[start : start + MIB + TAG] for start in range(0, len(rest), MIB + TAG)]
    plain = b""
    for number, chunk in enumerate(chunks):
        nonce = prefix + number.to_bytes(4, "big") + (b"\x01" if number == len(chunks) - 1 else b"\x00")
        plain += cipher.decrypt(nonce, chunk, header)
    return plain


@pytest.mark.parametrize("size", [0, 1, MIB - 1, MIB, MIB + 1, 2 * MIB, 2 * MIB + MIB // 2])
def test_an_independent_reader_opens_what_is_written(tmp_path, size):
    content = torch.randint(0, 256, (size,), dtype=torch.uint8).numpy().tobytes()
    with created(tmp_path / "f", Key(SECRET)) as file:
        for start in range(0, size, 300_001):  # in pieces that do not fit the chunks
            file.write(content[start : start + 300_001])
    data = (tmp_path / "f").read_bytes()
    assert decrypt_independently(data, SECRET) == content
    assert len(data) == HEADER + size + TAG * max(1, -(-size // MIB)), "the chunks are as the docstring says"
    assert read_bytes(tmp_path / "f", Key(SECRET)) == content


def test_one_large_write_is_cut_into_chunks(tmp_path):
    content = os.urandom(3 * MIB + 5)
    assert decrypt_independently(encrypt(tmp_path / "f", content).read_bytes(), SECRET) == content


def test_a_file_of_version_1_opens(tmp_path):
    (tmp_path / "f").write_bytes(bytes.fromhex(VECTOR))
    assert read_bytes(tmp_path / "f", Key(SECRET)) == b"weights"
    assert decrypt_independently(bytes.fromhex(VECTOR), SECRET) == b"weights"


def test_key_derivation_is_expensive(monkeypatch):
    monkeypatch.undo()
    assert Key(SECRET).new_header()[16:20] == bytes((1, 15, 8, 1))


def test_random_access(tmp_path):
    content = os.urandom(2 * MIB + 100)
    with unlocked(encrypt(tmp_path / "f", content), Key(SECRET)) as file:
        for place, count in [(2 * MIB - 3, 10), (5, 3), (MIB - 1, MIB + 2), (2 * MIB + 90, 50), (3 * MIB, 1), (0, 0)]:
            file.seek(place)
            assert file.read(count) == content[place : place + count], f"{count} bytes at {place}"
        assert file.seek(-5, os.SEEK_END) == len(content) - 5
        assert file.read() == content[-5:]
        assert file.seek(0) == 0
        assert file.read() == content


def test_torch_saves_and_loads_through_it(tmp_path):
    payload = {"a": torch.randn(700, 900), "b": [torch.arange(3)], "c": {"x": 1.5, "name": "vit"}}
    with created(tmp_path / "f.pth", Key(SECRET)) as file:
        torch.save(payload, file)
    found = torch.load(unlocked(tmp_path / "f.pth", Key(SECRET)), weights_only=True)
    assert torch.equal(found["a"], payload["a"])
    assert torch.equal(found["b"][0], payload["b"][0])
    assert found["c"] == payload["c"]


def test_two_files_of_a_key_have_different_ciphers(tmp_path):
    """One derivation serves all that a process writes: only the salt of scrypt may be the same."""
    key = Key(SECRET)
    one, other = (encrypt(tmp_path / name, b"same", key).read_bytes() for name in "ab")
    assert one[:36] == other[:36]
    assert one[36:52] != other[36:52]
    assert key.open_header(one[:HEADER])[1] != key.open_header(other[:HEADER])[1]
    assert one[HEADER:] != other[HEADER:]


UNREADABLE = (
    "cannot be decrypted: encryption_key is not the key that it was written with, or the file is damaged or truncated"
)


def refuse(path: Path, data: bytes, key: Key) -> None:
    path.write_bytes(data)
    assert is_encrypted(path), "a damaged file is not taken for a plain one"
    with pytest.raises(CheckpointError) as caught:
        unlocked(path, key)
    assert f"{path} {UNREADABLE}" in caught.value.problem
    assert "Check the key" in caught.value.fix


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, Key]:
    """A place, an encrypted file of three chunks, and its key, which derives every salt once."""
    folder, key = tmp_path_factory.mktemp("sealed"), Key(SECRET)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encryption, "_LOG_N", 4)
        return folder / "damaged", encrypt(folder / "f", os.urandom(2 * MIB + 1000), key).read_bytes(), key


fast = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@fast
@given(data=st.data())
def test_a_flipped_bit_is_detected(sealed, data):
    path, content, key = sealed
    anywhere = st.one_of(st.integers(0, HEADER - 1), st.integers(0, len(content) - 1))
    place, bit = data.draw(anywhere), data.draw(st.integers(0, 7))
    damaged = bytearray(content)
    damaged[place] ^= 1 << bit
    refuse(path, bytes(damaged), key)


@fast
@given(data=st.data())
def test_a_truncated_file_is_detected(sealed, data):
    path, content, key = sealed
    borders = [HEADER + number * (MIB + TAG) + shift for number in range(3) for shift in (-1, 0, 1, TAG)]
    length = data.draw(st.one_of(st.integers(1, len(content) - 1), st.sampled_from(borders)))
    refuse(path, content[:length], key)


def chunks_of(data: bytes) -> tuple[bytes, list[bytes]]:
    return data[:HEADER], [data[place : place + MIB + TAG] for place in range(HEADER, len(data), MIB + TAG)]


@pytest.mark.parametrize(
    "order", [(1, 0, 2), (0, 2), (1, 2), (0, 0, 1, 2), (0, 1), (0,), (2,), (0, 1, 2, 2), (0, 1, 2, 0)]
)
def test_reordered_chunks_are_detected(sealed, order):
    path, content, key = sealed
    header, chunks = chunks_of(content)
    refuse(path, header + b"".join(chunks[number] for number in order), key)


def test_foreign_chunks_and_appended_bytes_are_detected(sealed, tmp_path):
    path, content, key = sealed
    header, chunks = chunks_of(content)
    _, others = chunks_of(encrypt(tmp_path / "other", os.urandom(2 * MIB + 1000), key).read_bytes())
    for damaged in (
        [others[0], *chunks[1:]],
        [*chunks[:2], others[2]],
        [*chunks, b"\0"],
        [*chunks, b"\0" * (MIB + 50)],
    ):
        refuse(path, header + b"".join(damaged), key)


def test_another_key(sealed):
    path, content, _ = sealed
    refuse(path, content, Key(SECRET + b" "))


def test_a_header_cannot_ask_for_much_memory(sealed):
    path, content, key = sealed
    for place, value in ((17, 19), (17, 0), (18, 255), (19, 200), (16, 2)):
        refuse(path, content[:place] + bytes((value,)) + content[place + 1 :], key)


def test_a_change_after_authentication_is_detected(sealed):
    path, content, key = sealed
    path.write_bytes(content)
    file = unlocked(path, key)
    path.write_bytes(content[: MIB // 2] + b"\0" + content[MIB // 2 + 1 :])
    with pytest.raises(CheckpointError, match="cannot be decrypted"):
        file.read()


def test_no_key(tmp_path):
    with pytest.raises(CheckpointError) as caught:
        unlocked(encrypt(tmp_path / "f", b"x"), None)
    assert caught.value.problem == f"{tmp_path / 'f'} is encrypted, but encryption_key is not set."
    assert caught.value.fix.startswith("Set encryption_key to the key that it was written with: env:NAME, file:PATH")


def test_a_plain_file_is_reported_once(tmp_path, caplog):
    (tmp_path / "f").write_bytes(b"PK\x03\x04 and what follows")
    key = Key(SECRET)
    with caplog.at_level(logging.WARNING, "openmae"):
        assert read_bytes(tmp_path / "f", None) == b"PK\x03\x04 and what follows"
        assert not caplog.messages
        assert unlocked(tmp_path / "f", key) is None
        assert read_bytes(tmp_path / "f", key) == b"PK\x03\x04 and what follows"
    assert caplog.messages == [f"{tmp_path / 'f'} is not encrypted: encryption_key is not used to read it."]


@pytest.mark.parametrize("content", [b"", b"P", b"\x80\x02", b"safetensors?", bytes(range(100, 200))])
def test_other_files_are_not_mistaken_for_encrypted_ones(tmp_path, content):
    (tmp_path / "f").write_bytes(content)
    assert not is_encrypted(tmp_path / "f")


def test_an_unfinished_file_cannot_be_opened_and_holds_no_plain_content(tmp_path):
    content = b"weights!" * (MIB // 4)
    unfinished = created(tmp_path / "f", Key(SECRET))
    unfinished.__enter__().write(content)
    with pytest.raises(KeyboardInterrupt):
        unfinished.gen.throw(KeyboardInterrupt)
    left = (tmp_path / "f").read_bytes()
    assert len(left) > MIB
    assert b"weights!" not in left
    refuse(tmp_path / "f", left, Key(SECRET))


@pytest.mark.integration
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
def test_memory_is_bounded(tmp_path):
    """By a process of its own, in which nothing else has been large; ru_maxrss would be that of this one, too."""
    import subprocess
    import sys

    script = """
import sys
from pathlib import Path
from openmae.storage.encryption import Key, created, unlocked
def peak(): return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
path, block = Path(sys.argv[1]), bytes(2**20)
with created(path, Key(b"x")) as file: file.write(b"")
before = peak()
with created(path, Key(b"x")) as file:
    for _ in range(150): file.write(block)
with unlocked(path, Key(b"x")) as file:
    assert sum(len(part) for part in iter(lambda: file.read(2**16), b"")) == 150 * 2**20
assert "torch" not in sys.modules
print((peak() - before) // 1024)
"""
    found = subprocess.run([sys.executable, "-c", script, tmp_path / "f"], capture_output=True, text=True, check=True)
    assert int(found.stdout) < 48, f"{found.stdout.strip()} MiB for a file of 150 MiB"


def test_sources_of_keys(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", SECRET.decode())
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "key").write_bytes(SECRET + b"\r\n")
    encrypt(tmp_path / "f", b"x")
    for text in ("env:MY_KEY", f"file:{tmp_path / 'key'}", "file:~/key", SECRET.decode()):
        assert read_bytes(tmp_path / "f", resolve_key(text)) == b"x", text
    assert resolve_key("") is resolve_key(None) is None
    key = Key(SECRET)
    assert resolve_key(key) is key


def _missing(folder: Path) -> str:
    return f"file:{folder / 'no'}"


def _empty(folder: Path) -> str:
    (folder / "empty").write_bytes(b"\n")
    return f"file:{folder / 'empty'}"


def _large(folder: Path) -> str:
    (folder / "large").write_bytes(b"k" * 70_000)
    return f"file:{folder / 'large'}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (lambda _: "env:NO_SUCH_KEY", "encryption_key: the environment variable 'NO_SUCH_KEY' is not set."),
        (lambda _: "env:EMPTY_KEY", "encryption_key: the environment variable 'EMPTY_KEY' is empty."),
        (lambda _: "env:", "encryption_key: the environment variable '' is not set."),
        (_missing, "no' cannot be read (No such file or directory)."),
        (lambda folder: f"file:{folder}", "cannot be read (Is a directory)."),
        (_empty, "empty' is empty."),
        (_large, "large' is not a key: it is larger than 64 KiB."),
    ],
)
def test_a_missing_key_is_an_error(tmp_path, monkeypatch, text: Callable[[Path], str], message):
    monkeypatch.setenv("EMPTY_KEY", "")
    with pytest.raises(SpecError) as caught:
        resolve_key(text(tmp_path))
    assert message in caught.value.problem
    assert caught.value.problem.startswith("encryption_key: the ")


def test_a_key_can_be_pickled_and_is_not_shown(tmp_path):
    key = Key(SECRET)
    assert repr(key) == str(key) == f"{key!r}" == "Key(***)"
    assert read_bytes(encrypt(tmp_path / "f", b"x", key), pickle.loads(pickle.dumps(key))) == b"x"
    with pytest.raises(TypeError):
        json.dumps(key)


def test_temporary_files_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(memory_folder, "MEMORY", tmp_path)  # stands for /dev/shm
    with temporaries_in_memory(None):
        assert tempfile.gettempdir() == str(tmp_path)
    with temporaries_in_memory(Key(SECRET)):
        inside = Path(tempfile.gettempdir())
        assert inside.parent == tmp_path
        assert inside.stat().st_mode & 0o077 == 0, "others may look into it"
    assert tempfile.gettempdir() == str(tmp_path)
    assert not inside.exists()
    monkeypatch.setattr(memory_folder, "MEMORY", tmp_path / "no")
    with pytest.raises(SpecError, match=r"int8 needs temporary files in memory, and there is no .*/no"):
        temporaries_in_memory(Key(SECRET)).__enter__()
