"""Time of training steps on a CPU with memory kept, as `fit` trains, and with the C library's default.

    python -m benchmarks allocator PACKED CONFIG [CONFIG ...]

For each configuration of `fit`, both in turn in one process: processor time per step, how much of it is the system's, and their ratio.
"""

import argparse
import resource
from pathlib import Path

import numpy as np

from benchmarks.records import save, settings_of
from training.allocator import keep_freed_memory
from training.config import read_config
from training.data.packed import PackedDataset
from training.module import TrainingModule

WARM_UP = 1


def processor_time():
    """Seconds of this process, its own and the system's for it."""
    used = resource.getrusage(resource.RUSAGE_SELF)  # os.times counts in hundredths, more than a small step takes
    return np.array([used.ru_utime, used.ru_stime])


def measure(module, batches):
    """Seconds per step, own and system's, with memory kept and not; each batch once in either way."""
    seconds = {"kept": [], "default": []}
    for k, molecules in enumerate(batches):
        batch = module.collate(molecules)
        for way in seconds:
            if not keep_freed_memory(way == "kept"):
                raise SystemExit("the C library has no mallopt, or an environment variable (GLIBC_TUNABLES, MALLOC_...) sets it; nothing to compare")
            for step in range(2):
                module.network.zero_grad()
                start = processor_time()
                module.differentiate(batch)
                # The first step after a change finds the memory as the other way left it.
                if k >= WARM_UP and step:
                    seconds[way].append((processor_time() - start).tolist())
    return seconds


def main():
    """Compare on the first batches of each configuration."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("packed", type=Path)
    parser.add_argument("configurations", type=Path, nargs="+")
    parser.add_argument("--batches", type=int, default=5)
    parser.add_argument("--output", type=Path, help="JSON")
    arguments = parser.parse_args()
    dataset, found = PackedDataset(arguments.packed), {}
    for path in arguments.configurations:
        config = read_config(path).model_copy(update={"data": str(arguments.packed), "initial_model": None})
        module = TrainingModule(config, dataset)
        stream = module.sampler("train").stream(0)
        found[path.stem] = seconds = measure(module, [next(stream) for _ in range(WARM_UP + arguments.batches)])
        means = {way: np.mean(values, axis=0) for way, values in seconds.items()}
        for way, (own, system) in means.items():
            print(f"{path.stem}, memory {way}: {own + system:.2f} s of processor time per step, {system:.2f} s of it the system's")
        print(f"{path.stem}: ratio {means['kept'].sum() / means['default'].sum():.2f}", flush=True)
    if arguments.output:
        save(arguments.output, settings=settings_of(arguments), cpu_seconds=found)


if __name__ == "__main__":
    main()
