"""Settings for all tests, and the tier of each test."""

from __future__ import annotations

import os
import signal

import pytest

if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # a shell starts background processes like this; tests send SIGINT
    signal.signal(signal.SIGINT, signal.default_int_handler)
# The suite runs in as many processes as there are cores. Set before torch is imported, here and in started processes.
os.environ.setdefault("OMP_NUM_THREADS", "1")
