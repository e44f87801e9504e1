"""Training throughput: molecules per second of this project's production network, direct and conservative, beside other networks.

    python -m benchmarks training-throughput packed --peer nequip=2,4,24=/envs/nequip/bin/python --output training_throughput.json

A peer is NAME=OPTIONS=INTERPRETER: a network of `benchmarks/training_worker.py`, its options and the Python that holds it (NequIP: l_max,
layers, features; MACE: channels, L). All take the same batches, whose neighbours are found beforehand, with Adam, clipping and averaged
weights; their steps are interleaved. The rate is over all steps, by the processor's time, as several programs may share the machine; the
first step of each is not counted.
"""

import argparse
import sys
import tempfile
from dataclasses import fields
from pathlib import Path

import numpy as np

from benchmarks.records import save, settings_of
from benchmarks.workers import Worker

TRAINING_WORKER = Path(__file__).with_name("training_worker.py")


def write_batches(packed, n_batches, molecules, path):
    """Store the first batches of a training stream, one array for each field of `Batch`."""
    from training.data.batches import Collator, SizeSampler
    from training.data.packed import PackedDataset

    dataset = PackedDataset(Path(packed))
    frames = dataset.indices("train")
    stream = SizeSampler(frames, np.diff(dataset.offsets)[frames], molecules, 25_000, 0).stream(0)
    collate = Collator(dataset, (1, 6, 7, 8), 5.0)
    statistics_of = dataset.metadata["statistics"]
    arrays = {"n_batches": n_batches, "scales": [statistics_of["residual_per_sqrt_atom"]["rms"], statistics_of["force_rms"]]}
    for k in range(n_batches):
        batch = collate(next(stream))
        arrays |= {f"{k}/{f.name}": getattr(batch, f.name).numpy() for f in fields(batch)}
    np.savez(path, **arrays)


def rates_of(records):
    """Molecules per second of the processor, over all steps ``{label: [record, ...]}``."""
    return {label: sum(r["molecules"] for r in each) / sum(r["cpu_s"] for r in each) for label, each in records.items()}


def main():
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packed", type=Path, help="packed data set with forces")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=OPTIONS=PYTHON")
    parser.add_argument("--compile", action="store_true", help="ours by torch.compile too, as the configurations of se3-ani1x ask for")
    parser.add_argument("--molecules", type=int, default=20, help="most molecules in a batch")
    parser.add_argument("--batches", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=2, help="how often each batch is taken")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="JSON")
    arguments = parser.parse_args()
    rows = {mode: (f"se3={mode}", sys.executable) for mode in ("direct", "conservative")}
    if arguments.compile:
        rows |= {f"{mode}, compiled": (f"se3={mode},compile", sys.executable) for mode in ("direct", "conservative")}
    for peer in arguments.peer:
        network, _, interpreter = peer.rpartition("=")
        rows[network.replace("=", " ")] = (network, interpreter)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "batches.npz"
        write_batches(arguments.packed, arguments.batches, arguments.molecules, path)
        workers = {}
        for label, (network, interpreter) in rows.items():  # one after the other, up to the end of the first steps
            given = [network, str(path), "--threads", str(arguments.threads)]
            workers[label] = Worker(interpreter, TRAINING_WORKER, given, arguments.threads)
            for _ in range(arguments.batches if "compiled" in label else 1):
                workers[label].ask("step")
        records = {label: [] for label in rows}
        for _ in range(arguments.batches * arguments.repeats):
            for label, worker in workers.items():
                records[label].append(worker.ask("step"))
        for worker in workers.values():
            worker.close()
    rates = rates_of(records)
    for label, rate in rates.items():
        ratios = "  ".join(f"{rate / rates[other]:6.2f} x {other}" for other in list(rows)[len(rows) - len(arguments.peer) :] if other != label)
        print(f"{label:24s} {records[label][0]['parameters']:9,} parameters  {rate:8.1f} molecules per second of the processor  {ratios}", flush=True)
    if arguments.output:
        save(arguments.output, settings=settings_of(arguments), molecules_per_cpu_second=rates, steps=records)


if __name__ == "__main__":
    main()
