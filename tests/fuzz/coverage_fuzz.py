"""python -m tests.fuzz.coverage_fuzz TARGET [-max_total_time=60]: the targets of test_fuzz.py, led by coverage.

Needs atheris (`pip install -e '.[dev,fuzz]'`). What comes after the target goes to libFuzzer: a folder keeps
what was new, a file is read once. A content that breaks something is left as crash-* or timeout-*: it becomes a test.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["openmae", "yaml", "omegaconf", "tarfile", "zipfile", "PIL"]):
    from tests.helpers.fuzz_targets import TARGETS


def main() -> None:
    """Run until an input fails or the time is over."""
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        sys.exit(f"{__doc__}\nTARGET is one of: {', '.join(TARGETS)}")
    target = TARGETS[sys.argv[1]]
    with tempfile.TemporaryDirectory() as seeds:
        for number, content in enumerate(target.seeds):
            (Path(seeds) / str(number)).write_bytes(content)
        folders = [given for given in sys.argv[2:] if not given.startswith("-")]
        if not any(Path(given).is_file() for given in folders):  # files are read once each, and nothing is looked for
            folders.append(seeds)
        rest = [given for given in sys.argv[2:] if given.startswith("-")]
        limits = ["-timeout=20", "-rss_limit_mb=4096", "-max_len=65536"]
        atheris.Setup([sys.argv[0], *limits, *rest, *folders], target.read)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
