"""Scripts without ``if __name__ == "__main__":``: a process that multiprocessing spawns imports the script again.

Such a script calls OpenMAE a second time, in the new process. That process ends at once and leaves a mark in a file, so
that its parent can explain what happened:

    parent: watch_for_reruns() -> OPENMAE_RERUN=FILE -> starts a process
    child:  imports the script -> openmae.train() -> end_if_rerun() -> writes to FILE, exits
    parent: the process is gone -> FILE is not empty -> SpecError
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from openmae.errors import SpecError

_VARIABLE = "OPENMAE_RERUN"
_FIX = (
    "Put the call below a guard, so that only the script itself runs it:\n"
    '    if __name__ == "__main__":\n'
    "        openmae.train(...)"
)


def end_if_rerun() -> None:
    """End this process if it was spawned, and imports the user's script again instead of running its own work."""
    if not getattr(multiprocessing.current_process(), "_inheriting", False):
        return
    mark = os.environ.get(_VARIABLE)
    if mark:
        with suppress(OSError):  # the parent knows already, and has removed the folder
            Path(mark).write_text("rerun", encoding="utf-8")
    else:  # a parent that was not OpenMAE, or a fork server that is older than the call
        print(_rerun("A process"), file=sys.stderr, flush=True)
    os._exit(1)


@contextmanager
def watch_for_reruns(what: str) -> Iterator[None]:
    """While entered, explain the failure of processes that are started and import the user's script again.

    Args:
        what: needs the processes, for messages: ``train.num_gpus=2``.

    Raises:
        SpecError: the script calls OpenMAE when it is imported, or cannot be imported.
    """
    _check_importable(what)
    with tempfile.TemporaryDirectory(prefix="openmae-") as folder:
        mark = Path(folder, "rerun")
        before = os.environ.get(_VARIABLE)
        os.environ[_VARIABLE] = str(mark)
        try:
            yield
        except Exception:
            if mark.exists():
                raise _rerun(what) from None
            raise
        finally:
            if before is None:
                del os.environ[_VARIABLE]
            else:
                os.environ[_VARIABLE] = before


def _check_importable(what: str) -> None:
    main = sys.modules.get("__main__")
    script = getattr(main, "__file__", None)
    if script is not None and getattr(main, "__spec__", None) is None and not os.path.exists(script):
        raise SpecError(
            f"{what} starts processes that import the main script, and there is no file {script}.",
            "Save the script as a file and run that; a script that is read from standard input cannot be imported.",
        )


def _rerun(what: str) -> SpecError:
    script = getattr(sys.modules.get("__main__"), "__file__", None)
    return SpecError(
        f"{what} starts processes that import the main script{f' ({script})' if script else ''}, "
        'and it calls OpenMAE outside `if __name__ == "__main__":`.',
        _FIX,
    )
