"""Memory that training frees stays with the process: counted in page faults, in a process of its own."""

import ctypes
import subprocess
import sys

import pytest

from training.allocator import keep_freed_memory

FAULTS = """
import resource, sys
import torch
from training.allocator import keep_freed_memory
if not keep_freed_memory(sys.argv[1] == "keep"):
    raise SystemExit("no mallopt")
def large():
    torch.ones(10 * 1024 * 1024).add_(1)  # 40 MB, touched
for _ in range(12):  # the heap grows until a free block holds the next one with its alignment
    large()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    large()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how):
    found = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True)
    if "no mallopt" in found.stderr:
        pytest.skip("the C library is not glibc and has no such parameters")
    assert found.returncode == 0, found.stderr
    return int(found.stdout)


def test_large_blocks_are_handed_out_again_without_the_system():
    default, kept = faults("default"), faults("keep")
    assert kept < 500 < 5 * 640 <= default  # with pages of 4 kB it is 10,240 for each block; with those of 64 kB, 640


@pytest.mark.parametrize("variable", ["GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_"])
def test_what_a_user_has_set_stays(variable, monkeypatch):
    monkeypatch.setenv(variable, "131072")
    monkeypatch.setattr(ctypes, "CDLL", lambda _: 1 / 0)
    assert keep_freed_memory() is False


@pytest.mark.parametrize("name", ["musl", "windows"])
def test_other_c_libraries_are_left_alone(name, monkeypatch):
    def cdll(path):
        if name == "windows":
            raise TypeError("expected a path")
        return object()

    monkeypatch.setattr(ctypes, "CDLL", cdll)
    assert keep_freed_memory() is False
