"""Records of jobs that were never run."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import Any

from openmae.jobs.job import Record, State, Transition, now


def make_record(job_id: str = "f" * 32, states: Sequence[State] = ("PENDING",), **changes: Any) -> Record:
    """Return the record of a local training run that went through ``states`` just now."""
    values: dict[str, Any] = {
        "id": job_id,
        "action": "train",
        "name": "train",
        "platform": "local",
        "created_at": now(),
        "results_dir": "r",
        "results_folder": "r/train",
        "parent_job_id": None,
        "exit_code": None,
        "notices": [],
        "transitions": [Transition(now(), state, "message") for state in states],
        "host": socket.gethostname(),
    }
    return Record(**(values | changes))
