"""Detection of scripts without ``if __name__ == "__main__":``.

A process that multiprocessing spawns imports the script again. Without the guard, the import calls OpenMAE a second
time. The new process then exits and leaves a marker file, so that its parent can explain the failure:

    parent: watch_for_reruns() -> OPENMAE_RERUN=FILE -> starts a process
    child:  imports the script -> openmae.train() -> end_if_rerun() -> writes FILE, exits
    parent: the process has exited -> FILE exists -> SpecError
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


def end_if_rerun() -> None:
    """Exit if this is a spawned process that is still importing the user's script."""
    if not getattr(multiprocessing.current_process(), "_inheriting", False):
        return
    mark = os.environ.get(_VARIABLE)
    if mark:
        with suppress(OSError):  # the parent has already failed and removed the folder
            Path(mark).write_text("rerun", encoding="utf-8")
    else:  # the parent is not OpenMAE, or a fork server that was started before the call
        print(_no_guard("A process"), file=sys.stderr, flush=True)
    os._exit(1)


@contextmanager
def watch_for_reruns(cause: str) -> Iterator[None]:
    """Raise a clear error if a process started in the block fails because the user's script has no guard.

    ``cause`` is the setting that needs the processes, such as ``train.num_gpus=2``, for the message.

    Raises:
        SpecError: the script calls OpenMAE when it is imported, or there is no script file to import.
    """
    main = sys.modules.get("__main__")
    script = getattr(main, "__file__", None)
    if script is not None and getattr(main, "__spec__", None) is None and not os.path.exists(script):
        raise SpecError(
            f"{cause} starts processes that import the main script, but there is no file {script}.",
            "Save the script as a file and run that; a script read from standard input cannot be imported.",
        )
    with tempfile.TemporaryDirectory(prefix="openmae-") as folder:
        mark = Path(folder, "rerun")
        before = os.environ.get(_VARIABLE)
        os.environ[_VARIABLE] = str(mark)
        try:
            yield
        except Exception:
            if mark.exists():
                raise _no_guard(cause) from None
            raise
        finally:
            if before is None:
                del os.environ[_VARIABLE]
            else:
                os.environ[_VARIABLE] = before


def _no_guard(cause: str) -> SpecError:
    script = getattr(sys.modules.get("__main__"), "__file__", None)
    return SpecError(
        f"{cause} starts processes that import the main script{f' ({script})' if script else ''}, "
        'and it calls OpenMAE outside `if __name__ == "__main__":`.',
        "Put the call below a guard, so that only the script itself runs it:\n"
        '    if __name__ == "__main__":\n'
        "        openmae.train(...)",
    )
