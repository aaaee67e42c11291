"""A watchdog for runs of several processes: it reports the process that keeps the others waiting, and ends the run.

The timeout of the process group does not report which process is late, and that of NCCL ends a process without an
error. ``monitored_barrier`` works only with gloo, and does not detect a process whose main thread hangs while its other
threads run. So each process publishes the number of synchronization points that it has reached:

    main thread      arrive(), arrive(), ...                          only counts
    exchange thread  own count -> store of process 0 -> all counts    hangs if process 0 hangs
    judge thread     reports a process whose count falls behind, or is not updated, for OPENMAE_ANSWER_SECONDS
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

import torch
from torch.distributed import Store  # type: ignore[attr-defined]

from openmae.distributed.topology import World
from openmae.errors import RunError, SpecError
from openmae.results.status import StatusLog
from openmae.storage.printable import listed

ANSWER_VARIABLE = "OPENMAE_ANSWER_SECONDS"
_ANSWER_SECONDS = 1800.0
_JOIN_SECONDS = 2.0  # for a call of the store that is in progress
_MOST_NAMED = 4  # processes listed in a message


def seconds_of(variable: str, default: float) -> float:
    """Return the number of seconds in an environment variable.

    Raises:
        SpecError: the value is not a number above 0.
    """
    text = os.environ.get(variable, "") or str(default)
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise SpecError(
            f"{variable} must be a number of seconds above 0, got {text!r}.",
            f"Set it, for example {variable}={default:g}.",
        )
    return seconds


def answer_seconds() -> float:
    """Return the number of seconds that one process may keep the others waiting."""
    return seconds_of(ANSWER_VARIABLE, _ANSWER_SECONDS)


class _Report(NamedTuple):
    """The state that a process publishes; ``beats`` grows as long as its exchange thread runs."""

    beats: int = 0
    arrived: int = 0
    stopping: bool = False


class Watchdog:
    """Ends this process when another one keeps it waiting too long. Has no effect until ``start`` is called.

    Attributes:
        stopping: True if this process was asked to stop.
        someone_stopping: True if any process was asked to stop; updated about once a second.
        report: called with the error before the process exits.
        status: status log to which the default ``report`` writes the failure, or None.
    """

    def __init__(self, world: World | None = None) -> None:
        self.stopping = self.someone_stopping = False
        self.report: Callable[[RunError], object] = self._report_here
        self.status: StatusLog | None = None
        self._world = world or World()
        self._arrived = 0
        self._reports = [_Report()] * self._world.size
        self._ended = threading.Event()
        self._threads: list[threading.Thread] = []

    def arrive(self) -> None:
        """Count a point at which this process may wait for others; all processes must pass the same points."""
        self._arrived += 1

    def start(self, open_store: Callable[[], Store]) -> None:
        """Start the exchange and judge threads.

        ``open_store`` must open a new client of the store, since a call that hangs blocks all users of its client.
        """
        self._limit = answer_seconds()
        self._interval = min(max(1.0, self._world.size / 64), self._limit / 20)  # longer if many processes read
        self._exchanged = time.monotonic()
        for target in (lambda: self._exchange(open_store), self._judge):
            self._threads.append(threading.Thread(target=target, name="openmae-watchdog", daemon=True))
            self._threads[-1].start()

    def end(self) -> None:
        """Stop watching: this process no longer needs the others.

        A thread that is inside a call of the store when the interpreter exits would abort the process.
        """
        self._ended.set()
        for thread in self._threads:
            thread.join(_JOIN_SECONDS)

    def _exchange(self, open_store: Callable[[], Store]) -> None:
        prefix = f"openmae/watchdog/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        keys = [f"{prefix}/{rank}" for rank in range(self._world.size)]
        with suppress(torch.distributed.DistError):  # process 0 has ended, which `_judge` reports
            store, known = open_store(), list[str]()
            for beats in itertools.count(1):
                store.set(keys[self._world.rank], json.dumps(_Report(beats, self._arrived, self.stopping)))
                if len(known) < len(keys):
                    known = [key for key in keys if store.check([key])]
                found = dict(zip(known, store.multi_get(known), strict=True))
                self._reports = [_Report(*json.loads(found.get(key, "[]"))) for key in keys]
                self.someone_stopping = self.stopping or any(report.stopping for report in self._reports)
                self._exchanged = time.monotonic()
                if self._ended.wait(self._interval):
                    return

    def _judge(self) -> None:
        progressed = [(_Report(), time.monotonic())] * self._world.size  # last report with progress, and its time
        late: list[int] = []
        while not late:
            if self._ended.wait(self._interval):
                return
            now, reports = time.monotonic(), self._reports
            furthest = max(report.arrived for report in reports)
            for rank, report in enumerate(reports):
                last, _ = progressed[rank]
                if report.beats != last.beats and (report.arrived == furthest or report.arrived > last.arrived):
                    progressed[rank] = report, now
            late = [rank for rank, (_, at) in enumerate(progressed) if now - at >= self._limit]
            if now - self._exchanged >= self._limit:
                late = [0]  # process 0 runs the store
        slowest = min(reports[rank].arrived for rank in late)  # the other late processes may be waiting for these
        error = self._error([rank for rank in late if reports[rank].arrived == slowest])
        self.report(error)
        os._exit(error.exit_code)  # the main thread may be blocked in a call that an exception cannot interrupt

    def _report_here(self, error: RunError) -> None:
        if self.status is not None:
            with suppress(OSError):
                self.status.write("FAILURE", f"RunError: {error}", verbosity="ERROR")
        print(error, file=sys.stderr, flush=True)

    def _error(self, late: list[int]) -> RunError:
        names = listed([f"{rank} (node {rank // self._world.per_node})" for rank in late], _MOST_NAMED)
        who = f"Process {names} has" if len(late) == 1 else f"Processes {names} have"
        return RunError(
            f"{who} not responded for {self._limit:g} s.",
            "Look for what blocks it: a process that was stopped, a disk or object store that does not respond, a GPU, "
            f"the network. The same command resumes from the newest checkpoint. {ANSWER_VARIABLE} is how long one "
            "process may keep the others waiting.",
        )
