"""Starts ``mae`` over and over without importing torch each time: a request is a line of JSON, and so is each answer.

A request has ``argv`` and ``log``, and may have ``patch`` ({"module:name": value}), ``environment``, ``program`` (true:
it ends as the ``mae`` command does), and ``clock``: how many seconds the time goes back at every look. The first answer
is the process's number, the second its exit code (minus a signal's number).
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import traceback
from datetime import datetime, timedelta
from typing import Any

import torch

for module in ("actions.train", "actions.staging", "storage.mirror", "storage.encryption", "cli.main"):
    importlib.import_module(f"openmae.{module}")
torch.set_num_threads(1)


def backwards(seconds: float) -> type[datetime]:
    """A datetime whose ``now`` is earlier each time."""
    looks = 0

    class Backwards(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            nonlocal looks
            looks += 1
            return datetime.now(tz) - timedelta(seconds=seconds * looks)

    return Backwards


def run(request: dict[str, Any]) -> int:
    """In the child."""
    with open(request["log"], "ab") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    os.environ.update(request.get("environment", {}))
    for place, value in request.get("patch", {}).items():
        module, _, name = place.partition(":")
        assert hasattr(importlib.import_module(module), name), place
        setattr(importlib.import_module(module), name, value)
    if request.get("clock"):
        importlib.import_module("openmae.results.status").datetime = backwards(request["clock"])  # type: ignore[attr-defined]
    if not request.get("program"):
        return importlib.import_module("openmae.cli.main").main(request["argv"])
    sys.argv[1:] = request["argv"]
    return importlib.import_module("openmae.cli.main").main()


def main() -> None:
    """Serve until the input ends."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            code = 70
            try:
                os.setpgrp()
                code = run(json.loads(line))
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        print(json.dumps(child), flush=True)
        print(json.dumps(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])), flush=True)


if __name__ == "__main__":
    main()
