"""Results of a benchmark as a table and as JSON, with the machine that they hold for."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from openmae.storage.atomic import write_atomically

RESULTS = Path("results/bench")
_PACKAGES = ("openmae", "torch", "timm", "onnxruntime", "numpy")
_FLAGS = frozenset(  # that decide how fast products of matrices are
    {"avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "avx_vnni", "avx512_vnni", "amx_int8"}
    | {"asimddp", "i8mm", "bf16"}
)
_INT8_FLAGS = frozenset({"avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm"})


@dataclass(frozen=True)
class Machine:
    """Hardware and software that the figures depend on.

    Attributes:
        cpu: model of the processor.
        cores: that this process may use.
        flags: instruction sets that matter here; None where the system does not list them.
        system: operating system and architecture.
        python: version.
        versions: of packages.
    """

    cpu: str
    cores: int
    flags: tuple[str, ...] | None
    system: str
    python: str
    versions: dict[str, str]

    @property
    def int8(self) -> bool | None:
        """Return whether the processor multiplies int8 faster than float32 (VNNI and similar); None if unknown."""
        return None if self.flags is None else bool(_INT8_FLAGS.intersection(self.flags))


@cache
def this_machine() -> Machine:
    """Return this machine, without its name."""
    info = Path("/proc/cpuinfo")
    listed: dict[str, str] = {}
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            listed.setdefault(key.strip(), value.strip())
    flags = listed.get("flags", listed.get("Features"))  # x86, Arm
    return Machine(
        cpu=listed.get("model name") or platform.processor() or platform.machine(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        flags=None if flags is None else tuple(sorted(_FLAGS.intersection(flags.split()))),
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        versions={name: version(name) for name in _PACKAGES},
    )


@dataclass(frozen=True)
class Report:
    """Results of a benchmark.

    Attributes:
        title: of the table.
        columns, rows: of the table; all cells are text.
        notes: sentences under the table.
        data: the figures behind it, as plain values for JSON.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    data: Any
    notes: Sequence[str] = field(default=())

    def write(self, folder: Path, name: str, quick: bool = False) -> str:
        """Write ``name.json`` and ``name.md`` into ``folder`` (``name-quick`` for a quick run); return the Markdown."""
        machine, date = this_machine(), datetime.now(UTC).isoformat(timespec="seconds")
        stem = f"{name}-quick" if quick else name  # it must not pass for a measurement, nor replace one
        values = {"benchmark": name, "quick": quick, "date": date, "machine": asdict(machine), "results": self.data}
        text = self._markdown(machine, date, quick)
        write_atomically(folder / f"{stem}.json", json.dumps(values, indent=1, allow_nan=False) + "\n")
        write_atomically(folder / f"{stem}.md", text)
        return text

    def _markdown(self, machine: Machine, date: str, quick: bool) -> str:
        widths = [max(map(len, column)) for column in zip(self.columns, *self.rows, strict=True)]
        lines = [_row(cells, widths) for cells in (self.columns, ["-" * width for width in widths], *self.rows)]
        flags = "unknown instruction sets" if machine.flags is None else ", ".join(machine.flags) or "no vector units"
        versions = ", ".join(f"{name} {number}" for name, number in machine.versions.items())
        where = f"{machine.cpu}, {machine.cores} cores ({flags}); {machine.system}; Python {machine.python}, {versions}"
        warning = ["A quick run: it shows that the benchmark works, not how fast anything is."] if quick else []
        notes = "\n".join(f"- {note}" for note in (*warning, *self.notes, f"{where}; {date}."))
        return "\n".join([f"## {self.title}", "", *lines, "", notes, ""])


def _row(cells: Sequence[str], widths: Sequence[int]) -> str:
    return f"| {' | '.join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True))} |"
