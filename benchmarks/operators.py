"""Operators of one evaluation by force mode: calls into ATen on a CPU, kernels launched on a GPU.

    python -m benchmarks operators --output operators.json

The modules are frozen and warmed up as TorchForce does it. An operator that another one calls is not counted again. Views, which move no data, are
told apart, since they cost the interpreter's time but launch nothing; so are conversions and reshapings that find nothing to do.
"""

import argparse
import os
import tempfile
from collections import Counter
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # before torch is imported: the profiler reports its own starting and stopping

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.evaluation import evaluations, force_modes
from benchmarks.records import save, settings_of
from benchmarks.systems import NAMES, write_structure

WARM_UP = 25  # calls after which TorchScript has specialised on the shapes
VIEWS = {"view", "_unsafe_view", "unsqueeze", "squeeze", "transpose", "permute", "t", "expand", "expand_as", "select", "slice", "narrow"}
VIEWS |= {"split", "split_with_sizes", "unbind", "detach", "alias", "as_strided", "diagonal", "view_as", "lift_fresh", "_reshape_alias", "chunk"}
COPIES_AT_NEED = {"to", "contiguous", "reshape", "flatten"}  # mostly they have nothing to do


def _moves_no_data(event):
    name = event.name.removeprefix("aten::")
    return name in VIEWS or (name in COPIES_AT_NEED and not any(_copies(child) for child in event.cpu_children))


def _copies(event):
    return event.name in ("aten::copy_", "aten::clone", "aten::_to_copy") or any(_copies(child) for child in event.cpu_children)


def count(function, device):
    """Operators, views among them, GPU kernels and the commonest operators of one call."""
    for _ in range(WARM_UP):
        function()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    with profile(activities=activities, acc_events=True) as trace:
        function()
        if device == "cuda":
            torch.cuda.synchronize()
    events = trace.events()
    names = Counter()
    views = 0
    for event in events:
        parent = event.cpu_parent
        while parent is not None and not parent.name.startswith("aten::"):
            parent = parent.cpu_parent
        if event.name.startswith("aten::") and parent is None:
            names[event.name.removeprefix("aten::")] += 1
            views += _moves_no_data(event)
    kernels = sum(e.device_type == DeviceType.CUDA and not e.name.startswith(("Memcpy", "Memset")) for e in events)
    return {
        "operators": sum(names.values()),
        "views": views,
        "cuda_kernels": kernels if device == "cuda" else None,
        "commonest": dict(names.most_common(8)),
    }


def main():
    """Count, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="se3-ani1x", help="name or path")
    parser.add_argument("--modes", help="with commas; by default all that the model has")
    parser.add_argument("--systems", default="alanine-dipeptide,water216", help=NAMES)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="JSON")
    arguments = parser.parse_args()
    arguments.modes = arguments.modes or ",".join(force_modes(arguments.model))
    results = {}
    with tempfile.TemporaryDirectory() as directory:
        for name in arguments.systems.split(","):
            structure, n_atoms = write_structure(name, directory)
            for term, function in evaluations(arguments.model, structure, arguments.modes.split(","), arguments.device).items():
                record = results.setdefault(name, {})[term] = {"n_atoms": n_atoms, **count(function, arguments.device)}
                kernels = "" if record["cuda_kernels"] is None else f"  {record['cuda_kernels']:6d} CUDA kernels"
                common = ", ".join(f"{k} {v}" for k, v in list(record["commonest"].items())[:4])
                working = record["operators"] - record["views"]
                print(
                    f"{name:18s} {n_atoms:6d} atoms  {term:28s} {working:6d} operators + {record['views']:5d} views{kernels}  ({common})", flush=True
                )
    if arguments.output:
        save(arguments.output, model=arguments.model, settings=settings_of(arguments), results=results)


if __name__ == "__main__":
    main()
