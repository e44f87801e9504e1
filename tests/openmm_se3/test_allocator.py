"""Memory that one step frees stays for the next: counted in page faults, in processes of their own."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from openmm_se3 import allocator

FAULTS = """
import ctypes, resource, sys
from openmm_se3.allocator import keep_freed_memory
print(keep_freed_memory() if sys.argv[1] == "keep" else None)
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes, libc.memset.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
def step():
    blocks = [libc.malloc(2**22) for _ in range(30)]  # 120 MB in blocks of 4, touched
    for block in blocks:
        libc.memset(block, 1, 2**22)
    for block in blocks:
        libc.free(block)
for _ in range(8):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how, **variables):
    """Whether it was set, and page faults of five steps."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))} | variables
    found = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, env=environment)
    assert found.returncode == 0, found.stderr
    kept, count = found.stdout.split()
    return kept, int(count)


def test_steps_do_not_ask_the_system_again():
    kept, count = faults("keep")
    if kept == "False":
        pytest.skip("the C library is not glibc and has no such parameters")
    _, default = faults("default")
    assert count < 500 < 5 * 1800 < default  # with pages of 64 kB 120 MB are 1,920


def test_variables_of_the_user_are_obeyed():
    assert faults("keep", MALLOC_TRIM_THRESHOLD_="131072")[0] == "False"


def test_forces_in_openmm_and_ase_have_it(monkeypatch):
    from openmm_se3 import SE3Calculator, SE3Potential

    calls = []
    monkeypatch.setattr("openmm_se3.potential.keep_freed_memory", lambda: calls.append(1))
    SE3Potential("se3-ani1x")
    SE3Calculator("se3-ani1x")
    assert len(calls) == 2


@pytest.fixture
def no_variables(monkeypatch):
    """As where no user has chosen."""
    for variable in allocator._VARIABLES:
        monkeypatch.delenv(variable, raising=False)


@pytest.mark.usefixtures("no_variables")
def test_other_c_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr("ctypes.CDLL", lambda path: object())
    assert allocator.keep_freed_memory() is False


@pytest.mark.usefixtures("no_variables")
def test_a_refused_size_of_large_blocks_leaves_everything_as_it_was(monkeypatch):
    """As where addresses have 32 bits: with the other parameter alone each block of 128 kB would come from the system."""
    calls = []
    monkeypatch.setattr("ctypes.CDLL", lambda path: SimpleNamespace(mallopt=lambda *arguments: calls.append(arguments) or 0))
    assert allocator.keep_freed_memory() is False
    assert calls == [(allocator._MMAP_THRESHOLD, allocator.LARGE)]
