"""Freed memory stays in the process until the run ends; this applies only to glibc."""

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.integration

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")

PROGRAM = """
import resource, sys
import torch
from openmae.distributed.allocator import kept_memory, keep_freed_memory

def faults_of_a_step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    kept = [torch.ones(12 * 2**20) for _ in range(4)]  # 48 MiB each: more than glibc ever keeps by itself
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() // 2**20

faults_of_a_step()
own = faults_of_a_step()
with kept_memory(torch.device("cpu")):
    for _ in range(5):  # until the blocks have found their places
        faults_of_a_step()
    kept, held = faults_of_a_step(), resident()
print(own, kept, held - resident(), faults_of_a_step(), keep_freed_memory())
"""


def _measured(**variables: str) -> list[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    environment = clean | {"OMP_NUM_THREADS": "1"} | variables
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    return done.stdout.split()


@glibc
def test_memory_is_kept_during_a_run_and_returned_at_its_end():
    own, kept, returned, afterwards, acts = _measured()
    assert acts == "True"
    assert int(own) > 1000, "glibc no longer gives large blocks back: keep_freed_memory is of no use"
    assert int(kept) < int(own) / 10, f"{kept} pages were asked for in a step that has all it needs"
    assert int(returned) >= 180, f"{returned} MiB of 192 were given back at the end"
    assert int(afterwards) > 1000


@glibc
@pytest.mark.parametrize(
    "variable", [{"MALLOC_ARENA_MAX": "2"}, {"GLIBC_TUNABLES": "glibc.malloc.mmap_max=65536"}], ids=str
)
def test_allocator_settings_of_the_user_win(variable):
    own, kept, _, _, acts = _measured(**variable)
    assert acts == "False"
    assert int(kept) > int(own) / 2
