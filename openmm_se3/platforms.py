"""Where a simulation computes: platforms of this OpenMM, threads of torch."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import openmm

from openmm_se3.errors import SimulationError

#: Atoms up to which handing work to a second thread costs more than it brings.
ONE_THREAD_UP_TO = 200


def platform_names() -> list[str]:
    """Names of the platforms whose libraries could be loaded."""
    return [openmm.Platform.getPlatform(i).getName() for i in range(openmm.Platform.getNumPlatforms())]


def has_gpu() -> bool:
    """Whether torch sees a GPU and OpenMM has its platform for it."""
    import torch  # here, since `openmm_se3.doctor` looks at platforms where torch may be broken

    return torch.cuda.is_available() and "CUDA" in platform_names()


def choose_platform(name: str) -> openmm.Platform:
    """Platform by name.

    Parameters
    ----------
    name : str
        As OpenMM calls it; ``auto`` takes CUDA if OpenMM has it and torch sees the GPU, else Reference, whose overhead is the smallest on a CPU.

    Returns
    -------
    openmm.Platform
        Of that name.

    Raises
    ------
    SimulationError
        If there is no such platform; the message lists those there are.
    """
    names = platform_names()
    if name == "auto":
        name = "CUDA" if has_gpu() else "Reference"
    if name not in names:
        raise SimulationError(f"OpenMM has no platform {name!r} here; it has {', '.join(names)}")
    return openmm.Platform.getPlatformByName(name)


@contextmanager
def torch_threads(n_atoms: int) -> Iterator[None]:
    """Let torch use the number of threads that suits a system of so many atoms on a CPU, and restore what was set.

    One up to `ONE_THREAD_UP_TO` atoms, above it what torch takes by itself, the number of cores. The environment variable
    ``OMP_NUM_THREADS`` is obeyed, whatever the size.
    """
    import torch

    before = torch.get_num_threads()
    if n_atoms <= ONE_THREAD_UP_TO and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
