"""For all tests: one thread a process, since the suite runs in as many processes as there are cores."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, here and in the processes that tests start
