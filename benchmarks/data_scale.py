"""Does the data path keep up with the whole ANI-1x release? Prints rates and memory of each stage, each in its own process.

    python -m benchmarks data-scale --conformations 200000 --output scale.json
    python -m benchmarks data-scale --conformations 5000000        # the size of the release; 6 GB of disk while it runs

A file of the layout of ``ani1x-release.h5`` is made of the molecules of ``tests/data/ani1x_sample.h5``, put side by side in every
combination of one to four (3 to 44 atoms), with displacements, other properties beside the labels, and NaN where a property "was not computed".
Its labels are good for nothing but their number. Then `prepare` packs it; sampler and collator, which are what the
DataLoader runs, batch random molecules; and the first stage of `se3-ani1x` trains on such batches to see how many it consumes.

Rates are given by the clock and by the processor's time, which other programs on the machine do not disturb; loader and training step are
compared by the latter where both run on the CPU. Memory is given as the peak of what a process allocated itself
(anonymous) and of everything that it touched: pages of memory-mapped files are counted in the second though the system takes them back when
it needs them.
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import h5py
import numpy as np

from benchmarks.records import save

ROOT = Path(__file__).parent.parent
SAMPLE = ROOT / "tests" / "data" / "ani1x_sample.h5"
CONFIG = ROOT / "training" / "configs" / "se3-ani1x-1-direct.yaml"


class Stopwatch:
    """Seconds by the clock and of the processor since it was made."""

    def __init__(self):
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def wall(self):
        """Seconds by the clock."""
        return time.perf_counter() - self._wall

    def rates(self, name, count):
        """How many per second, by either."""
        return {f"{name}_per_second": count / self.wall(), f"{name}_per_cpu_second": count / (time.process_time() - self._cpu)}


class MemoryWatch:
    """Peaks of the resident memory of this process, looked at every 10 ms; Linux."""

    def __enter__(self):
        self.peak = {"RssAnon": 0, "VmRSS": 0}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self):
        while not self._stop.wait(0.01):
            self._look()

    def _look(self):
        for line in Path("/proc/self/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in self.peak:
                self.peak[name] = max(self.peak[name], int(value.split()[0]))

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()
        self._look()

    def megabytes(self):
        """Peaks so far."""
        return {"peak_anonymous_mb": self.peak["RssAnon"] / 1024, "peak_resident_mb": self.peak["VmRSS"] / 1024}


def generate(directory, n_conformations):
    """Write ``release.h5``, some thousand conformations at a time."""
    with h5py.File(SAMPLE) as sample:
        molecules = [{k: sample[name][k][()] for k in sample[name]} for name in sample]
    mixtures = [c for k in (1, 2, 3, 4) for c in itertools.combinations_with_replacement(range(len(molecules)), k)]
    rng = np.random.default_rng(0)
    # Large mixtures are rarer, so that a conformation has about as many atoms as in the release: 15 on the average.
    weight = np.array([sum(len(molecules[i]["atomic_numbers"]) for i in c) for c in mixtures]) ** -2.7
    share = np.diff(np.concatenate([[0], np.cumsum(weight) / weight.sum() * n_conformations]).round().astype(int))
    with h5py.File(directory / "release.h5", "w") as file:
        for mixture, n_frames in zip(mixtures, share, strict=True):
            if n_frames == 0:
                continue
            parts = [molecules[i] for i in mixture]
            n_atoms = sum(len(p["atomic_numbers"]) for p in parts)
            group = file.create_group("-".join(str(i) for i in mixture))
            group["atomic_numbers"] = np.concatenate([p["atomic_numbers"] for p in parts])
            shapes = {
                "coordinates": (n_atoms, 3),
                "wb97x_dz.energy": (),
                "wb97x_dz.forces": (n_atoms, 3),
                "wb97x_dz.dipole": (3,),
                "wb97x_tz.energy": (),
                "ccsd(t)_cbs.energy": (),
            }
            double = [k for k in shapes if k.endswith("energy")]
            data = {k: group.create_dataset(k, (n_frames, *s), dtype=np.float64 if k in double else np.float32) for k, s in shapes.items()}
            for start in range(0, n_frames, 5000):
                stop = min(start + 5000, n_frames)
                pick = rng.integers(16, size=(len(parts), stop - start))
                x = np.concatenate([p["coordinates"][k] + [6.0 * i, 0, 0] for i, (p, k) in enumerate(zip(parts, pick, strict=True))], axis=1)
                forces = np.concatenate([p["ani1x_ensemble.forces"][k] for p, k in zip(parts, pick, strict=True)], axis=1)
                forces[rng.random(stop - start) < 1e-3] = np.nan
                data["coordinates"][start:stop] = x + rng.normal(scale=0.02, size=x.shape)
                data["wb97x_dz.energy"][start:stop] = sum(p["ani1x_ensemble.energy"][k] for p, k in zip(parts, pick, strict=True))
                data["wb97x_dz.forces"][start:stop] = forces
                data["wb97x_dz.dipole"][start:stop] = 0.0
                for rare in ("wb97x_tz.energy", "ccsd(t)_cbs.energy"):
                    data[rare][start:stop] = np.nan
        n_groups = len(file)
    return {"conformations": n_conformations, "groups": n_groups, "gigabytes": (directory / "release.h5").stat().st_size / 1e9}


def pack(directory):
    """`prepare` as the command line calls it."""
    from training.data.prepare import prepare

    watch = Stopwatch()
    dataset = prepare([directory / "release.h5"], directory / "packed", test=0.05)
    rates = watch.rates("conformations", len(dataset))
    m = dataset.metadata
    return {
        "seconds": watch.wall(),
        **rates,
        "kept": len(dataset),
        "skipped": m["skipped"],
        "atoms_per_conformation": m["n_atoms"] / m["n_frames"],
    }


def load(directory, seconds):
    """Random batches for `seconds`, after the time to the first."""
    from ase.data import atomic_numbers as NUMBER_OF_SYMBOL

    from training.config import read_config
    from training.data.batches import Collator, SizeSampler
    from training.data.packed import PackedDataset

    config = read_config(CONFIG)
    watch = Stopwatch()
    dataset = PackedDataset(directory / "packed")
    frames = dataset.indices("train")
    sampler = SizeSampler(frames, np.diff(dataset.offsets)[frames], config.run.batch_molecules, config.run.batch_edges, 0)
    collate = Collator(dataset, tuple(NUMBER_OF_SYMBOL[s] for s in config.network.elements), config.network.cutoff)
    stream = map(collate, sampler.stream(0))
    next(stream)
    first = watch.wall()
    molecules, batches, watch = 0, 0, Stopwatch()
    while watch.wall() < seconds:
        molecules += len(next(stream).energies)
        batches += 1
    return {"seconds_to_first_batch": first, **watch.rates("molecules", molecules), "molecules_per_batch": molecules / batches}


def step(directory, seconds):
    """Optimizer steps for `seconds`, on batches that are ready in memory: what the loader has to keep up with."""
    import torch
    from ase.data import atomic_numbers as NUMBER_OF_SYMBOL

    from training.config import read_config
    from training.data.batches import Collator, SizeSampler
    from training.data.packed import PackedDataset
    from training.loss import EnergyForceLoss, predict
    from training.network import SE3Transformer

    config = read_config(CONFIG)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dataset = PackedDataset(directory / "packed")
    numbers = tuple(NUMBER_OF_SYMBOL[s] for s in config.network.elements)
    frames = np.random.default_rng(0).permutation(dataset.indices("train"))[:100_000]
    sampler = SizeSampler(frames, np.diff(dataset.offsets)[frames], config.run.batch_molecules, config.run.batch_edges, 0)
    batches = [Collator(dataset, numbers, config.network.cutoff)(f).to(device) for f in itertools.islice(sampler.stream(0), 8)]
    network = SE3Transformer(config.network, numbers).to(device)
    loss = EnergyForceLoss(config.loss, 1.0, 1.0)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4)

    def one(batch):
        optimizer.zero_grad()
        loss.per_molecule(*predict(network, batch, False, create_graph=False), batch).mean().backward()
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    one(batches[0])
    molecules, watch = 0, Stopwatch()
    for batch in itertools.cycle(batches):
        one(batch)
        molecules += len(batch.energies)
        if watch.wall() > seconds:
            break
    return {"device": device, "threads": torch.get_num_threads(), **watch.rates("molecules", molecules)}


def main():
    """Run every stage in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--conformations", type=int, default=200_000)
    parser.add_argument("--seconds", type=float, default=10.0, help="for each of the loader and the training step")
    parser.add_argument("--directory", type=Path, help="where the files go while it runs; by default the system's temporary directory")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stage:
        stages = {
            "generate": lambda d: generate(d, arguments.conformations),
            "prepare": pack,
            "loader": lambda d: load(d, arguments.seconds),
            "step": lambda d: step(d, arguments.seconds),
        }
        with MemoryWatch() as memory:
            result = stages[arguments.stage](arguments.directory)
        print(json.dumps({**result, **memory.megabytes()}))
        return
    results = {}
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        for stage in ("generate", "prepare", "loader", "step"):
            options = [
                "--stage",
                stage,
                "--directory",
                directory,
                "--conformations",
                str(arguments.conformations),
                "--seconds",
                str(arguments.seconds),
            ]
            out = subprocess.run(
                [sys.executable, "-W", "ignore", "-m", "benchmarks", "data-scale", *options], check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT
            ).stdout
            results[stage] = json.loads(out.splitlines()[-1])
            print(f"{stage:9s} " + "  ".join(f"{k} {v:,.1f}" if isinstance(v, float) else f"{k} {v}" for k, v in results[stage].items()), flush=True)
    device = results["step"]["device"]
    rate = "molecules_per_cpu_second" if device == "cpu" else "molecules_per_second"
    ratio = results["loader"][rate] / results["step"][rate]
    print(f"the loader makes {ratio:.0f} times as many molecules per second as the training step on this {device} consumes")
    results["loader_to_step"] = ratio
    if arguments.output:
        save(arguments.output, **results)


if __name__ == "__main__":
    main()
