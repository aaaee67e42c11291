"""The actions behind ``mae dataset pack`` and ``mae dataset check``."""

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

from openmae.data.check import CheckResult, check_images
from openmae.data.decode import MAX_MEGAPIXELS
from openmae.data.folder_listing import describe_skipped, first_names
from openmae.data.index import skipped_files_table
from openmae.data.open import open_index
from openmae.data.shards.packing import PackOptions, PackResult, pack
from openmae.errors import UserError
from openmae.results.dataset_report import save_dataset_figure
from openmae.results.report import Figure, Numbers, Section, Table, write_report
from openmae.storage import layout
from openmae.storage.atomic import make_folder, write_atomically
from openmae.storage.printable import counted, listed, printable_name
from openmae.storage.urls import is_remote

_LISTED = 100  # rows of a table in the report; the text files have all of them

log = logging.getLogger("openmae")


def pack_source(
    source: str,
    out: Path,
    options: PackOptions,
    *,
    overwrite: bool = False,
    max_megapixels: int = MAX_MEGAPIXELS,
) -> PackResult:
    """Pack a source into shards, and print the option that names them in a spec; see ``packing.pack``.

    Raises:
        UserError: the source cannot be used, or ``out`` is not a writable local folder.
        RunError: the disk is full.
    """
    if is_remote(str(out)) or ":/" in str(out):
        raise UserError(f"OUT must be a local folder, not {out}.", "Pack into a local folder, then copy it.")
    index = replace(open_index(source, None), max_pixels=max_megapixels * 1_000_000)
    with _progress("Packing", len(index)) as advance:
        packed = pack(index, out, options, overwrite=overwrite, advance=advance)
    total = sum(shard.stat().st_size for shard in packed.shards)
    labels = f"{len(index.class_names)} classes" if index.labels is not None else "no labels"
    print(f"{packed.images:,} images ({labels}) in {counted(len(packed.shards), 'shard')}, {total / 1e6:,.1f} MB:")
    print(f"  dataset.train_data_sources={shlex.quote(printable_name(packed.pattern))}")
    if packed.corrupt:
        log.warning(
            "Left out %s, listed in %s", counted(len(packed.corrupt), "corrupt file"), out / layout.CORRUPT_LIST
        )
    return packed


def check_source(source: str, folder: Path, max_megapixels: int = MAX_MEGAPIXELS) -> CheckResult:
    """Check every image of a source; print a table, and write lists, a figure and ``report.html`` to ``folder``.

    Raises:
        UserError: the source cannot be used, or ``folder`` cannot be written.
    """
    index = replace(open_index(source, None), max_pixels=max_megapixels * 1_000_000)
    make_folder(folder)
    with _progress("Checking", len(index)) as advance:
        result = check_images(index, advance)
    for _, _, name, found in _lists(result):
        (folder / name).unlink(missing_ok=True)
        if found:
            write_atomically(folder / name, "".join("\t".join(row) + "\n" for row in found))
    rows = _summary(result)
    table = RichTable("", "", title=index.place, title_justify="left", show_header=False)
    for row in rows:
        table.add_row(*row)
    Console(markup=False, emoji=False, highlight=False).print(table)
    figure = save_dataset_figure(
        folder / layout.DATASET_CHART,
        name=index.place,
        summary=_headline(result),
        class_counts=result.class_counts,
        sizes=result.sizes,
        file_sizes=result.file_sizes,
    )
    write_report(folder, "Data set", _sections(result, rows, figure), subtitle=index.place)
    log.info("Results are in %s; open report.html there.", folder)
    return result


def _headline(result: CheckResult) -> str:
    parts = [f"{len(result.index):,} images"]
    if result.class_counts:
        parts.append(f"{len(result.class_counts):,} classes")
    parts.append(f"{len(result.corrupt):,} corrupt" if result.corrupt else "none corrupt")
    parts.append(f"{result.redundant:,} duplicate" if result.duplicates else "no duplicates")
    return " · ".join(parts)


def _summary(result: CheckResult) -> list[tuple[str, str]]:
    index, classes = result.index, result.class_counts
    by_folder = index.labelled_by == "folders"
    rows = [("images", f"{len(index):,}")]
    if result.shard_counts:
        rows.append(("shards", f"{len(result.shard_counts):,}, of {_range(result.shard_counts)} images"))
    if index.skipped:
        count = sum(kind.count for kind in index.skipped)
        rows.append(("skipped", f"{count:,}, which are not read: {describe_skipped(index.skipped)}"))
    if index.results:
        rows.append(("results of OpenMAE", f"not read: {first_names(index.results)}"))
    if classes:
        origin = f"the folders {listed(list(classes))}" if by_folder else index.labelled_by
        rows.append(("classes", f"{len(classes):,}, of {_range([*classes.values()])} images; taken from {origin}"))
        if index.unlabelled:
            rows.append(("without a label", f"{len(index.unlabelled):,}"))
    else:
        rows.append(("classes", "no labels"))
    if len(result.sizes):
        total = result.file_sizes.sum() / 1e9
        rows += [
            ("width", f"{_range(result.sizes[:, 0])} pixels"),
            ("height", f"{_range(result.sizes[:, 1])} pixels"),
            ("file size", f"{_range(result.file_sizes / 1e3)} kB, {total:,.3f} GB in total"),
            ("format", ", ".join(f"{kind} {count:,}" for kind, count in result.formats.most_common(4))),
        ]
    names = f": {listed([path for path, _ in result.corrupt])}" if result.corrupt else ""
    rows.append(("corrupt", f"{len(result.corrupt):,} ({len(result.corrupt) / len(index):.2%}){names}"))
    if result.further:
        path, text = result.further[0]
        only = "of which only the first is read"
        rows.append(("several pages", f"{len(result.further):,}, {only}, such as {path} ({text})"))
    groups = counted(len(result.duplicates), "group")
    rows.append(("duplicate", f"{result.redundant:,} ({groups} with equal content)"))
    if result.contradictions:
        how = "are in several class folders" if by_folder else "have several labels"
        rows.append(("contradictory", f"{counted(result.contradictions, 'group')} of duplicates {how}"))
    return rows


def _lists(result: CheckResult) -> list[tuple[str, tuple[str, str], str, Sequence[Sequence[str]]]]:
    """Return the title and columns of each list of files in the report, its text file, and its rows."""
    remarks = [(path, f"{text}, of which only the first is read") for path, text in result.further]
    return [
        ("Corrupt files", ("file", "reason"), layout.CORRUPT_LIST, result.corrupt),
        ("Duplicates", ("kept", "the same"), layout.DUPLICATES_LIST, result.duplicates),
        ("Remarks", ("file", "remark"), layout.REMARKS_LIST, remarks),
    ]


def _range(values: Sequence[float] | np.ndarray) -> str:
    least, middle, most = (f"{value:,.0f}" for value in np.percentile(values, [0, 50, 100]))
    return least if least == most else f"{least} to {most} (median {middle})"


def _sections(result: CheckResult, rows: Sequence[tuple[str, str]], figure: Path) -> list[Section]:
    classes = sorted(result.class_counts.items(), key=lambda item: -item[1])
    numbers = {
        "images": f"{len(result.index):,}",
        **({"classes": f"{len(classes):,}"} if classes else {}),
        "corrupt": f"{len(result.corrupt):,}",
        "duplicate": f"{result.redundant:,}",
    }
    sections: list[Section] = [
        Numbers("", numbers),
        Figure("Overview", figure, "Images per class, image sizes and file sizes."),
        Table("Figures", ("", ""), rows),
    ]
    if classes:
        caption = ""
        if len(classes) > 2 * _LISTED:
            caption = f"The {_LISTED} largest and the {_LISTED} smallest of {len(classes):,} classes."
            classes = classes[:_LISTED] + classes[-_LISTED:]
        sections.append(Table("Classes", ("class", "images"), classes, caption))
    sections += skipped_files_table([result.index])
    for title, columns, name, found in _lists(result):
        if found:
            cells = [(file, ", ".join(others[:3])) for file, *others in found[:_LISTED]]
            sections.append(Table(title, columns, cells, f"{len(found):,} in all, listed in {name}."))
    return sections


@contextmanager
def _progress(verb: str, total: int) -> Iterator[Callable[[], object]]:
    """Show a progress bar on a terminal; yield the function to call after each image."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(verb, total=total)
        yield lambda: progress.advance(task)
