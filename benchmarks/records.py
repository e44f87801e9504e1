"""What every benchmark stores beside its numbers: machine and versions."""

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("openmm", "torch", "lightning", "acellera-openmmtorch-cpu", "acellera-openmmtorch-cu12", "acellera-openmmtorch-cu13", "openmmml")


def machine():
    """Processor, cores that may be used, GPU if torch sees one, kind of operating system."""
    import torch

    try:
        names = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    except OSError:
        names = []
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": names[0] if names else platform.machine(), "cores": cores, "gpu": gpu, "system": f"{platform.system()} {platform.machine()}"}


def versions():
    """Versions of what decides the numbers, as far as installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def save(path, **content):
    """Write a record: machine and versions, then `content`."""
    Path(path).write_text(json.dumps({"machine": machine(), "versions": versions(), **content}, indent=1) + "\n")


def settings_of(arguments):
    """Options of a benchmark as plain data; of paths the last part, since the rest is of one machine only."""
    kept = {name: value for name, value in vars(arguments).items() if name not in ("output", "plot", "directory")}
    return {name: [_plain(v) for v in value] if isinstance(value, list) else _plain(value) for name, value in kept.items()}


def _plain(value):
    if isinstance(value, str):
        return value.rpartition("=/")[0] or value  # a peer without its interpreter
    return value.name if isinstance(value, Path) else value
