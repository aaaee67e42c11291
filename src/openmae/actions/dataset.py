"""What ``mae dataset pack`` and ``mae dataset check`` do and print."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table as RichTable

from openmae.data.check import Survey, survey
from openmae.data.decode import MAX_MEGAPIXELS
from openmae.data.folder import CORRUPT_LIST, counted, describe_skipped, first_names, join_first
from openmae.data.index import unread_table
from openmae.data.open import open_index
from openmae.data.shards.packing import Packed, Packing, pack
from openmae.errors import UserError
from openmae.results.dataset_report import save_dataset_picture
from openmae.results.report import Cell, Figure, Numbers, Section, Table, write_report
from openmae.storage.atomic import make_folder, write_atomically
from openmae.storage.printable import printable_name
from openmae.storage.urls import is_remote

DUPLICATES_LIST = "duplicate_files.txt"
REMARKS_LIST = "remarks.txt"
_LISTED = 100  # rows of a table in the report; the lists beside it have all

log = logging.getLogger("openmae")


def pack_source(
    source: str,
    out: Path,
    size: int | None = None,
    *,
    shard_mb: int = 256,
    quality: int = 95,
    overwrite: bool = False,
    max_megapixels: int = MAX_MEGAPIXELS,
) -> Packed:
    """Pack a source into shards and print how to name them; see ``packing.pack``.

    Raises:
        UserError: the source cannot be used, or ``out`` is not a local folder that shards can be written to.
        RunError: the disk is full.
    """
    if is_remote(str(out)) or ":/" in str(out):
        raise UserError(f"OUT must be a local folder, not {out}.", "Pack into a local folder and copy that.")
    index = replace(open_index(source, None), max_pixels=max_megapixels * 1_000_000)
    with _progress("Packing", len(index)) as advance:
        packed = pack(index, out, Packing(size, shard_mb * 1_000_000, quality), overwrite=overwrite, advance=advance)
    total = sum(shard.stat().st_size for shard in packed.shards)
    labels = f"{len(index.class_names)} classes" if index.labels is not None else "no labels"
    print(f"{packed.images:,} images ({labels}) in {counted(len(packed.shards), 'shard')}, {total / 1e6:,.1f} MB:")
    print(f"  dataset.train_data_sources={shlex.quote(printable_name(packed.pattern))}")
    if packed.corrupt:
        log.warning("Left out %s, listed in %s", counted(len(packed.corrupt), "corrupt file"), out / CORRUPT_LIST)
    return packed


def check_source(source: str, folder: Path, max_megapixels: int = MAX_MEGAPIXELS) -> Survey:
    """Look at every image of a source; print a table, write a picture and ``report.html`` to ``folder``.

    Raises:
        UserError: the source cannot be used, or nothing can be written to ``folder``.
    """
    index = replace(open_index(source, None), max_pixels=max_megapixels * 1_000_000)
    make_folder(folder)
    with _progress("Checking", len(index)) as advance:
        found = survey(index, advance)
    for name, lines in (
        (CORRUPT_LIST, [f"{path}\t{reason}" for path, reason in found.corrupt]),
        (DUPLICATES_LIST, ["\t".join(group) for group in found.duplicates]),
        (REMARKS_LIST, ["\t".join(row) for row in _remark_rows(found)]),
    ):
        (folder / name).unlink(missing_ok=True)
        if lines:
            write_atomically(folder / name, "".join(f"{line}\n" for line in lines))
    rows = summary(found)
    table = RichTable("", "", title=found.place, title_justify="left", show_header=False)
    for row in rows:
        table.add_row(*row)
    Console(markup=False, emoji=False, highlight=False).print(table)
    picture = save_dataset_picture(
        folder / "dataset.png",
        name=found.place,
        summary=headline(found),
        class_counts=found.class_counts,
        sizes=np.stack([found.widths, found.heights], axis=1),
        file_sizes=found.file_sizes,
    )
    write_report(folder, "Data set", _sections(found, rows, picture, unread_table([index])), subtitle=found.place)
    log.info("Results are in %s; open report.html there.", folder)
    return found


def headline(found: Survey) -> str:
    """What matters most, in a line."""
    parts = [f"{found.images:,} images"]
    if found.class_counts:
        parts.append(f"{len(found.class_counts):,} classes")
    parts.append(f"{len(found.corrupt):,} corrupt" if found.corrupt else "none corrupt")
    parts.append(f"{found.redundant:,} duplicate" if found.duplicates else "no duplicates")
    return " · ".join(parts)


def summary(found: Survey) -> list[tuple[str, str]]:
    """The table that is printed: what, and how much of it."""
    rows = [("images", f"{found.images:,}")]
    if found.shard_counts:
        rows.append(("shards", f"{len(found.shard_counts):,}, of {_spread(list(found.shard_counts.values()))} images"))
    if found.skipped:
        count = sum(kind.count for kind in found.skipped)
        rows.append(("skipped", f"{count:,}, which are not read: {describe_skipped(found.skipped)}"))
    if found.results:
        rows.append(("results of OpenMAE", f"not read: {first_names(found.results)}"))
    if found.class_counts:
        counts = list(found.class_counts.values())
        by = f"; taken from {found.labelled_by}"
        if found.labelled_by == "folders":
            by = f"; taken from the folders {join_first(list(found.class_counts))}"
        rows.append(("classes", f"{len(counts):,}, of {_spread(counts)} images{by}"))
        if found.unlabelled:
            rows.append(("without a label", f"{found.unlabelled:,}"))
    else:
        rows.append(("classes", "no labels"))
    if len(found.widths):
        rows += [
            ("width", f"{_spread(found.widths)} pixels"),
            ("height", f"{_spread(found.heights)} pixels"),
            ("file size", f"{_spread(found.file_sizes / 1e3)} kB, {found.file_sizes.sum() / 1e9:,.3f} GB together"),
            ("format", ", ".join(f"{kind} {count:,}" for kind, count in found.formats.most_common(4))),
        ]
    rows.append(("corrupt", f"{len(found.corrupt):,} ({len(found.corrupt) / found.images:.2%})"))
    for kind, title in (("pages", "several pages"), ("warning", "warned of by Pillow")):
        if several := [f"{remark.path} ({remark.text})" for remark in found.remarks if remark.kind == kind]:
            only = ", of which only the first is read" if kind == "pages" else ""
            rows.append((title, f"{len(several):,}{only}, such as {several[0]}"))
    rows.append(("duplicate", f"{found.redundant:,} ({counted(len(found.duplicates), 'group')} of the same content)"))
    if found.contradictions:
        how = "lie in several class folders" if found.labelled_by == "folders" else "have several labels"
        rows.append(("contradictory", f"{counted(found.contradictions, 'group')} of duplicates {how}"))
    return rows


def _spread(values: Sequence[float] | np.ndarray) -> str:
    least, middle, most = (f"{value:,.0f}" for value in np.percentile(values, [0, 50, 100]))
    return least if least == most else f"{least} to {most} (median {middle})"


def _sections(
    found: Survey, rows: Sequence[tuple[str, str]], picture: Path, unread: Sequence[Section]
) -> list[Section]:
    numbers = {
        "images": f"{found.images:,}",
        **({"classes": f"{len(found.class_counts):,}"} if found.class_counts else {}),
        "corrupt": f"{len(found.corrupt):,}",
        "duplicate": f"{found.redundant:,}",
    }
    sections: list[Section] = [
        Numbers("", numbers),
        Figure("Overview", picture, "Images per class, image sizes and file sizes."),
        Table("Figures", ("", ""), rows),
    ]
    if found.class_counts:
        classes: list[list[Cell]] = [[*item] for item in sorted(found.class_counts.items(), key=lambda item: -item[1])]
        caption = f"The {_LISTED} largest and the {_LISTED} smallest of {len(classes):,} classes."
        if len(classes) <= 2 * _LISTED:
            caption = ""
        else:
            classes = classes[:_LISTED] + classes[-_LISTED:]
        sections.append(Table("Classes", ("class", "images"), classes, caption))
    sections += unread
    for title, columns, cells, name in (
        ("Corrupt files", ("file", "reason"), [list(row) for row in found.corrupt], CORRUPT_LIST),
        ("Duplicates", ("kept", "the same"), [[g[0], ", ".join(g[1:4])] for g in found.duplicates], DUPLICATES_LIST),
        ("Remarks", ("file", "remark"), _remark_rows(found), REMARKS_LIST),
    ):
        if cells:
            sections.append(Table(title, columns, cells[:_LISTED], f"{len(cells):,} in all; {name} lists them."))
    return sections


def _remark_rows(found: Survey) -> list[list[str]]:
    said = {"pages": "{}, of which only the first is read", "warning": "Pillow warns: {}"}
    return [[remark.path, said[remark.kind].format(remark.text)] for remark in found.remarks]


@contextmanager
def _progress(verb: str, total: int) -> Iterator[Callable[[], object]]:
    """A bar on a terminal; gives what is to be called after each image."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(verb, total=total)
        yield lambda: progress.advance(task)
