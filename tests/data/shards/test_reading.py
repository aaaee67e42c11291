"""Shards give the same samples as the same images in a folder."""

from __future__ import annotations

import json
import logging
import os
import pickle
import tarfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.helpers.shards import png, sharded, write_tar

from openmae.data.decode import CorruptImage
from openmae.data.folder_listing import SkippedFiles
from openmae.data.image_dataset import AddressedSampler, Batch
from openmae.data.index import ImageIndex, index_folder
from openmae.data.loaders import EvaluationLoader, LoaderSettings, TrainingLoader
from openmae.data.open import open_index
from openmae.data.shards import reading as shards_module
from openmae.data.shards.reading import WINDOW, windowed_order
from openmae.data.transforms import EvalTransform, FinetuneTransform, PretrainTransform
from openmae.errors import DataError

AUGMENT = FinetuneTransform(PretrainTransform((32, 32)), (0.5,) * 3, (0.2,) * 3, auto_aug="rand-m9-mstd0.5-inc1")


def loader(index: ImageIndex, folder: Path, **options: Any) -> TrainingLoader:
    settings = {"batch_size": 4, "results": folder, "max_corrupt_fraction": 1.0, **options}
    return TrainingLoader(index, AUGMENT, LoaderSettings(**settings), seed=3)


def plain(batches: Any) -> list[tuple[Any, ...]]:
    def of(batch: Batch) -> tuple[Any, ...]:
        return batch.images.numpy().tobytes(), batch.labels.tolist(), batch.indices.tolist(), batch.epoch

    return [of(batch) for batch in batches]


# --------------------------------------------------------------------------- the same as loose files


@pytest.mark.parametrize("with_index", [True, False])
def test_shards_equal_the_folder(index: ImageIndex, tmp_path: Path, with_index: bool) -> None:
    pattern = sharded(index, tmp_path / "out")
    if not with_index:
        for path in (tmp_path / "out").glob("*.json"):
            path.unlink()
    found = open_index(pattern, True)
    assert len({path.partition("!")[0] for path in found.paths}) == 5
    assert found.paths[:2] == ("out-000000.tar!cat/0.png", "out-000000.tar!cat/1.png")
    assert found.labels == index.labels
    assert found.class_names == (index.class_names if with_index else ("0", "1"))
    for epoch in (0, 1):
        packed, loose = (loader(i, tmp_path).from_position(epoch, 0) for i in (found, index))
        assert plain(packed) == plain(loose), "batches from shards differ from those of loose files"


def test_workers_and_resuming_change_nothing(index: ImageIndex, tmp_path: Path) -> None:
    found = open_index(sharded(index, tmp_path / "out"), True)
    epoch = plain(loader(found, tmp_path).from_position(1, 0))
    with closing(loader(found, tmp_path, num_workers=2)) as helped:
        assert plain(helped.from_position(1, 0)) == epoch, "0 workers differ from 2"
        for done in range(4):
            assert plain(helped.from_position(1, done)) == epoch[done:], f"resuming after batch {done} differs"
    assert pickle.loads(pickle.dumps(found)).read(3) == found.read(3)


def test_ranks_see_every_image_once(index: ImageIndex, tmp_path: Path) -> None:
    found = open_index(sharded(index, tmp_path / "out"), True)
    sizes = np.bincount(found.shard_of)  # type: ignore[attr-defined]
    assert len(set(sizes.tolist())) > 1, "this test needs uneven shards"
    train, val = [], []
    for rank in range(2):
        options: dict[str, Any] = {"rank": rank, "world_size": 2}
        batches = loader(found, tmp_path, batch_size=7, **options).from_position(0, 0)
        train += [i for batch in batches for i in batch.indices.tolist()]
        settings = LoaderSettings(3, tmp_path, 1.0, **options)
        val += [i for b in EvaluationLoader(found, EvalTransform((32, 32)), settings) for i in b.indices.tolist()]
    assert sorted(train) == sorted(val) == list(range(14))


def test_a_corrupt_image_is_named_by_shard_and_key(index: ImageIndex, tmp_path: Path) -> None:
    members = {f"{i}.png": png(i) for i in range(5)} | {"2.png": b"broken"}
    write_tar(tmp_path / "a-0.tar", members)
    write_tar(tmp_path / "b-0.tar", members)
    found, other = (open_index(str(tmp_path / f"{name}-{{0..0}}.tar"), None) for name in "ab")
    batches = list(loader(found, tmp_path, batch_size=5).from_position(0, 0))
    assert sorted(batches[0].indices.tolist()) == [0, 1, 3, 3, 4]
    assert batches[0].corrupt[0][0] == 2
    assert (
        (tmp_path / "corrupt_files.txt")
        .read_text()
        .startswith(f"{tmp_path}/a-0.tar!2.png\tits content is not an image")
    )
    with pytest.raises(DataError, match=rf"1 of 5 images in {tmp_path}/b-\{{0..0\}}.tar are corrupt \(20.00%\)"):
        list(loader(other, tmp_path, batch_size=5, max_corrupt_fraction=0.1).from_position(0, 0))


def test_shard_that_changes_during_a_run_is_noticed(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a-0.tar", {"1.png": png(1), "2.png": png(2)})
    found = open_index(str(tmp_path / "a-{0..0}.tar"), None)
    write_tar(path, {"0.txt": b"x", "1.png": png(1)})
    with pytest.raises(CorruptImage, match=r"a-0.tar has changed since it was indexed"):
        found.read(0)
    assert open_index(str(tmp_path / "a-{0..0}.tar"), None).paths == ("a-0.tar!1.png",)


def test_wrong_index_is_ignored(index: ImageIndex, tmp_path: Path) -> None:
    pattern = sharded(index, tmp_path / "out")
    right = open_index(pattern, True)
    for content in ("{", "null", '{"format":"openmae-shard-1"}', '{"format":"other"}'):
        (tmp_path / "out" / "out-000001.tar.index.json").write_text(content)
        assert open_index(pattern, False).paths == right.paths
    file = tmp_path / "out" / "out-000000.tar.index.json"
    facts = json.loads(file.read_text())
    facts["offsets"] = [offset + 512 for offset in facts["offsets"]]
    file.write_text(json.dumps(facts))
    assert open_index(pattern, False).read(0) == right.read(0)


# --------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize(
    ("members", "classes", "labels"),
    [
        ({"1.png": "", "1.cls": "9", "2.png": "", "2.cls": "10\n"}, ("9", "10"), (0, 1)),
        ({"1.cls": "dog", "1.png": "", "2.png": "", "2.cls": "cat"}, ("cat", "dog"), (1, 0)),
        ({"1.png": "", "1.json": '{"label": "dog"}', "2.png": "", "2.json": '{"label": 3}'}, ("3", "dog"), (1, 0)),
        ({"1.png": "", "1.json": '{"label": 1}', "1.cls": "2"}, ("2",), (0,)),
        ({"a.b/1.v2.png": "", "a.b/1.v2.cls": "x", "a.b/1.v3.png": "", "a.b/1.cls": "y"}, ("x", "y"), (0, 1)),
        ({"./cat/1.png": "", "./dog/2.png": ""}, ("cat", "dog"), (0, 1)),
        ({"set/cat/1.png": "", "set/dog/in/2.png": ""}, ("cat", "dog"), (0, 1)),
    ],
    ids=["integers", "text", "json", "cls before json", "dots", "folders", "wrapped folders"],
)
def test_labels(tmp_path: Path, members: dict[str, str], classes: tuple[str, ...], labels: tuple[int, ...]) -> None:
    content = {name: png() if name.endswith("png") else text.encode() for name, text in members.items()}
    write_tar(tmp_path / "s-0.tar", content)
    found = open_index(str(tmp_path / "s-{0..0}.tar"), True)
    assert (found.class_names, found.labels) == (classes, labels)
    assert open_index(str(tmp_path / "s-{0..0}.tar"), False).labels is None


def test_classes_are_numbered_over_all_shards(tmp_path: Path) -> None:
    write_tar(tmp_path / "s-0.tar", {"1.png": png(), "1.cls": b"dog"})
    write_tar(tmp_path / "s-1.tar", {"1.png": png(), "1.cls": b"cat", "2.png": png(), "2.cls": b"dog", "x.npy": b"."})
    found = open_index(str(tmp_path / "s-{0..1}.tar"), None)
    assert (found.class_names, found.labels) == (("cat", "dog"), (1, 0, 1))
    assert found.skipped == (SkippedFiles(".npy", 1, "s-1.tar!x.npy"),)


def test_no_labels(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_tar(tmp_path / "s-0.tar", {"1.png": png(), "1.json": b'{"caption": "a dog"}', "2.png": png()})
    pattern = str(tmp_path / "s-{0..0}.tar")
    assert open_index(pattern, None).labels is None
    with pytest.raises(DataError, match=r"have no labels: 2 of 2 images are outside .* no .cls or .json") as caught:
        open_index(pattern, True)
    assert caught.value.fix.startswith("Give every image a .cls or .json")
    write_tar(tmp_path / "s-0.tar", {"1.png": png(), "2.png": png(), "2.cls": b"7"})
    with pytest.raises(DataError, match=r"1 of 2 images in .* have no label, such as 1.png"):
        open_index(pattern, True)
    with caplog.at_level(logging.WARNING, logger="openmae"):
        assert open_index(pattern, None).labels == (-1, 0)
    assert "1 of 2 images in" in caplog.text
    assert "have no label, such as 1.png. kNN and probe accuracy ignore them." in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("1.cls", b"", "'1.cls' is not a label"),
        ("1.cls", b"a\nb", "'1.cls' is not a label"),
        ("1.cls", b"\xff", "'1.cls' is not a label"),
        ("1.json", b"{", "'1.json' is not a JSON object with an integer or a text"),
        ("1.json", b"[" * 100_000, "'1.json' is not a JSON object with an integer or a text"),
        ("1.json", b'{"caption": "cut', "'1.json' is not a JSON object with an integer or a text"),
        (
            "1.json",
            b'{"label": ["a", "b"]}',
            "'1.json' has a list of 2 as its \"label\", and an image is trained on one",
        ),
        ("1.json", b'{"label": true}', "'1.json' is not a JSON object with an integer or a text"),
    ],
)
def test_unreadable_label_is_an_error_only_if_labels_are_needed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, content: bytes, text: str
) -> None:
    write_tar(tmp_path / "s-0.tar", {"1.png": png(), name: content, "2.png": png(), "2.cls": b"7"})
    pattern = str(tmp_path / "s-{0..0}.tar")
    assert open_index(pattern, False).labels is None
    assert caplog.text.count("WARNING") == 0
    found = open_index(pattern, None)
    assert (found.class_names, found.labels) == (("7",), (-1, 0))
    assert f"1 of 2 images in {pattern} have a label that cannot be read: in s-0.tar, member {text}" in caplog.text
    with pytest.raises(DataError) as caught:
        open_index(pattern, True)
    assert f"in s-0.tar, member {text}" in caught.value.problem
    assert caught.value.fix == "Write these labels again, one for each image, as .cls."


def test_a_broken_json_beside_a_label_does_not_matter(tmp_path: Path) -> None:
    write_tar(tmp_path / "s-0.tar", {"1.png": png(), "1.json": b"{", "1.cls": b"7"})
    assert open_index(str(tmp_path / "s-{0..0}.tar"), True).class_names == ("7",)


def test_images_of_one_sample(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    members = {"1.input.png": png(1), "1.target.png": png(2), "1.cls": b"a", "2.0.png": png(3), "2.0.cls": b"b"}
    write_tar(tmp_path / "s-0.tar", members)
    assert open_index(str(tmp_path / "s-{0..0}.tar"), True).labels == (0, 0, 1)
    assert "2 images share a sample with another one" in caplog.text


def test_labels_far_from_their_images(tmp_path: Path) -> None:
    images = {f"{number}.png": png(number) for number in range(3)}
    write_tar(tmp_path / "s-0.tar", images | {f"{number}.cls": b"%d" % (number % 2) for number in range(3)})
    assert open_index(str(tmp_path / "s-{0..0}.tar"), True).labels == (0, 1, 0)


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    names = [os.fsdecode(b"caf\xe9.png"), "new\nline.png"]
    write_tar(tmp_path / os.fsdecode(b"s\xe9-0.tar"), {names[0]: png(1), names[1]: png(2)})
    found = open_index(f"{tmp_path}/s\udce9-{{0..0}}.tar", None)
    assert [found.read(number) for number in range(2)] == [png(1), png(2)]
    assert [found.key(number) for number in range(2)] == names
    assert found.full_name(0) == f"{tmp_path}/s\\xe9-0.tar!caf\\xe9.png"
    assert found.holds(found.full_name(0))
    packed = open_index(sharded(found, tmp_path / "out"), None)
    assert [packed.read(number) for number in range(2)] == [png(1), png(2)]
    assert [packed.key(number) for number in range(2)] == names


def test_separators_in_names_of_folders_and_shards(index: ImageIndex, tmp_path: Path) -> None:
    (tmp_path / "what?").mkdir()
    write_tar(tmp_path / "what?" / "a!b-0.tar", {"1.png": png(1)})
    found = open_index(f"{tmp_path}/what?/a!b-{{0..0}}.tar", None)
    assert found.full_name(0) == f"{tmp_path}/what?/a!b-0.tar!1.png"
    assert found.key(0) == "1.png"
    sharded(index, tmp_path / "out?")
    assert open_index(str(tmp_path / "out?"), True).class_names == ("cat", "dog"), (
        "an index next to a shard is not read"
    )


# --------------------------------------------------------------------------------------- bad shards


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def link(path: Path) -> None:
    with tarfile.open(path, "w") as tar:
        member = tarfile.TarInfo("1.png")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(member)


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda path: path.unlink(), r"names 3 shards, but 1 of them do not exist: .*s-1.tar"),
        (lambda path: path.write_bytes(b""), r"The shard .*s-1.tar is empty \(0 bytes\)"),
        (lambda path: cut(path, 1000), r"The shard .*s-1.tar is damaged or truncated"),
        (lambda path: cut(path, 3000), r"The shard .*s-1.tar is damaged or truncated"),
        (lambda path: write_tar(path, {}), r"The shard .*s-1.tar holds no images \(0 other files\)"),
        (lambda path: write_tar(path, {"1.txt": b""}), r"The shard .*s-1.tar holds no images \(1 other files\)"),
        (lambda path: path.write_bytes(b"\x1f\x8b\x08\0" * 200), r"The shard .*s-1.tar is compressed"),
        (lambda path: path.write_bytes(b"no tar" * 200), r"The shard .*s-1.tar is damaged or truncated"),
        (link, r"s-1.tar: member '1.png' is a link"),
    ],
    ids=["missing", "empty", "cut early", "cut late", "no members", "no images", "compressed", "no tar", "link"],
)
def test_bad_shard_is_named(tmp_path: Path, spoil: Callable[[Path], object], text: str) -> None:
    for number in range(3):
        write_tar(tmp_path / f"s-{number}.tar", {"1.png": png(number), "2.png": png(9)})
    spoil(tmp_path / "s-1.tar")
    with pytest.raises(DataError, match=text) as caught:
        open_index(str(tmp_path / "s-{0..2}.tar"), None)
    assert caught.value.fix


@pytest.mark.parametrize(
    ("pattern", "text"),
    [("s-{0..1}.zip", "but a shard is a plain .tar file"), ("{s-0,s-0}.tar", r"names .*s-0.tar twice")],
)
def test_refused_patterns(tmp_path: Path, pattern: str, text: str) -> None:
    with pytest.raises(DataError, match=text):
        open_index(f"{tmp_path}/{pattern}", None)
    with pytest.raises(DataError, match="ftp:// is not supported"):
        open_index("ftp://host/s-{0..1}.tar", None)


def test_concatenated_shards(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    parts = [write_tar(tmp_path / f"{name}.tar", {f"{name}/1.png": png(ord(name))}) for name in "abc"]
    joined = tmp_path / "set" / "s-0.tar"
    joined.parent.mkdir()
    joined.write_bytes(b"".join(part.read_bytes() for part in parts))
    found = open_index(str(joined.parent), None)
    assert found.class_names == ("a", "b", "c")
    assert [found.read(number) for number in range(3)] == [png(ord(name)) for name in "abc"]
    assert "is not read" not in caplog.text
    joined.write_bytes(joined.read_bytes() + b"garbage")
    assert len(open_index(str(joined.parent), None)) == 3
    assert f"{joined}: the data after the end of the tar file is not read." in caplog.text
    cut = joined.read_bytes()[: parts[0].stat().st_size + 700]
    joined.write_bytes(cut)
    with pytest.raises(DataError, match="is damaged or truncated"):
        open_index(str(joined.parent), None)


def test_unwritable_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    write_tar(tmp_path / "s-0.tar", {"1.png": png(), "1.cls": b"x"})
    monkeypatch.setenv("OPENMAE_CACHE", "/proc/openmae")
    found = open_index(str(tmp_path / "s-{0..0}.tar"), True)
    assert (found.class_names, found.read(0)) == (("x",), png())
    assert "cannot be written to /proc/openmae (No such file or directory), so the next run" in caplog.text
    assert "Set OPENMAE_CACHE to a writable folder" in caplog.text


def test_an_index_is_made_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_tar(tmp_path / "s-0.tar", {"1.png": png()})
    with caplog.at_level(logging.INFO, logger="openmae"):
        paths = [open_index(str(tmp_path / "s-{0..0}.tar"), None).paths for _ in range(2)]
    assert paths[0] == paths[1] == ("s-0.tar!1.png",)
    assert caplog.text.count("this is done once") == 1


# --------------------------------------------------------------------------- the order of remote shards


def test_windowed_order_needs_few_shards_at_a_time() -> None:
    rng = np.random.default_rng(0)
    sizes = rng.integers(50, 150, 40)
    shard_of = np.repeat(np.arange(40, dtype=np.int32), sizes)
    order = windowed_order(shard_of, 40, rng)
    assert sorted(order.tolist()) == list(range(len(shard_of)))
    place = np.empty(len(order), int)
    place[order] = np.arange(len(order))
    under_way = np.zeros(len(order), int)
    for shard in range(40):
        places = place[shard_of == shard]
        under_way[places.min() : places.max() + 1] += 1
    assert WINDOW / 2 < np.median(under_way) <= under_way.max() <= 2 * WINDOW
    neighbours = shard_of[order][:-1] == shard_of[order][1:]
    assert neighbours.mean() < 0.3, "images of a shard are not mixed with others"


def test_next_shards_are_prefetched(index: ImageIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = open_index(sharded(index, tmp_path / "out"), True)
    asked: list[tuple[list[str], list[str]]] = []
    ahead = shards_module.ShardPrefetcher()
    monkeypatch.setattr(ahead, "fetch", lambda now, soon: asked.append(([s.name for s in now], [s.name for s in soon])))
    object.__setattr__(found, "prefetcher", ahead)
    shard_of = found.shard_of  # type: ignore[attr-defined]
    batches = list(AddressedSampler(found, 2, 0))
    for batch, (now, soon) in zip(batches, asked, strict=True):
        assert set(now) == {f"out-{shard_of[i]:06d}.tar" for _, i in batch}
        assert soon or batch == batches[-1]


def test_failed_download_is_raised_when_the_shard_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    from openmae.data.shards.tar_index import Shard

    shards = [Shard(name, f"s3://b/{name}", "", 1, False) for name in "abc"]
    fetched = []

    def fetch(self: Shard) -> None:
        fetched.append(self.name)
        if self.name == "b":
            raise DataError("gone")

    monkeypatch.setattr(Shard, "fetch", fetch)
    ahead = shards_module.ShardPrefetcher()
    ahead.fetch(shards[:1], shards[1:])
    with pytest.raises(DataError, match="gone"):
        ahead.fetch(shards[1:2], [])
    ahead.fetch(shards[:1], [])
    assert sorted(fetched) == ["a", "a", "b", "c"], "what was left behind is asked for again, the rest once"


def test_packing_keeps_the_order_of_index_images(tmp_path: Path, make_images: Any) -> None:
    names = ["b/1.png", "a/x.y.png", "a/x.jpg", "a/x.png"]
    found = index_folder(make_images(tmp_path / "set", names), True)
    opened = open_index(sharded(found, tmp_path / "out"), True)
    keys = [opened.key(number) for number in range(4)]
    assert keys == ["a/x.jpg", "a/x_2.png", "a/x_y.png", "b/1.png"]
    assert [opened.read(n) for n in range(4)] == [found.read(n) for n in range(4)]


def test_shard_that_is_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a-0.tar")
    for source in (str(tmp_path / "a-{0..0}.tar"), str(tmp_path)):
        with pytest.raises(DataError, match=r"The shard .*a-0\.tar is a named pipe \(FIFO\), not a tar file"):
            open_index(source, None)
