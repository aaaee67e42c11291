"""Run one action without a container: read a YAML spec, write status.json, and return the exit code.

    python run_action.py ACTION SPEC.yaml

Works with any Python that has openmae installed. On SIGTERM and SIGINT, training writes a checkpoint before it ends.
Exit codes: 0 done, 1 the run failed, 2 invalid input, 130 interrupted, 75 preempted. If invalid input prevents the
action from starting, this script writes the printed message to status.json as a FAILURE.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

UNSET = (None, "", "???")
USAGE = "usage: run_action.py ACTION SPEC.yaml"


class Tail:
    """A wrapper of standard error that keeps the end of the printed text."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.text = stream, ""

    def write(self, text: str) -> Any:
        """Print a text and keep it."""
        self.text = (self.text + text)[-2000:]
        return self.stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def results_folder(action: str, spec: str) -> Path | None:
    """Return the folder where the action writes; None if the spec cannot be read or the folder is not local."""
    import yaml

    try:
        tree = yaml.safe_load(Path(spec).read_text(encoding="utf-8"))
        own, all_results = ((tree.get(action) or {}).get("results_dir"), tree.get("results_dir"))
    except (OSError, ValueError, AttributeError, yaml.YAMLError):
        return None
    folder = str(own) if own not in UNSET else f"{'results' if all_results in UNSET else all_results}/{action}"
    return None if "://" in folder or "${" in folder else Path(folder).expanduser()


def entries(folder: Path | None) -> list[dict[str, Any]]:
    """Return the entries of status.json."""
    from openmae.results.status import read_status
    from openmae.storage.layout import STATUS

    path = folder / STATUS if folder else None
    return read_status(path) if path and path.is_file() else []


def main(arguments: list[str]) -> int:
    """Run an action and return its exit code."""
    if len(arguments) != 2:
        print(USAGE, file=sys.stderr)
        return 2
    action, spec = arguments
    from openmae.cli.main import main as mae
    from openmae.errors import OpenMAEError
    from openmae.results.status import StatusLog

    signal.signal(signal.SIGTERM, lambda number, frame: os.kill(os.getpid(), signal.SIGINT))
    folder = results_folder(action, spec)
    before = len(entries(folder))
    sys.stderr = tail = Tail(sys.stderr)
    code = mae([action, "-e", spec])
    sys.stderr = tail.stream
    if code and folder and not any(entry.get("status") == "FAILURE" for entry in entries(folder)[before:]):
        message = tail.text.strip() or f"mae {action} exited with {code}"
        try:
            StatusLog(folder, append=True).write("FAILURE", message, verbosity="ERROR")
        except (OSError, OpenMAEError) as error:  # the exit code must not change
            print(f"status.json could not be written: {error}", file=sys.stderr)
    return code


if __name__ == "__main__":  # every process of a distributed run imports this file
    sys.exit(main(sys.argv[1:]))
