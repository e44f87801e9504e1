"""Potentials that step, or networks that train, beside each other, each in a process of its own, their blocks interleaved."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
SPEED_WORKER = Path(__file__).with_name("speed_worker.py")


class WorkerError(RuntimeError):
    """A worker ended early; the message is the end of what it said."""


@dataclass(frozen=True)
class Row:
    """One potential in one setting.

    Attributes
    ----------
    potential : str
        As `benchmarks/speed_worker.py` takes it.
    interpreter : str
        The Python that holds it.
    platform : str
        OpenMM platform.
    threads : int or None
        Of torch and of OpenMM's CPU platform; None leaves the choice to them.
    """

    potential: str
    interpreter: str = sys.executable
    platform: str = "Reference"
    threads: int | None = None


def ours(model, mode, **settings):
    """The row of a model of this project in one force mode."""
    return Row(f"se3={model}:{mode}", **settings)


def peers(arguments, **settings):
    """Rows of ``NAME=PYTHON`` or ``NAME=OPTIONS=PYTHON``, by label."""
    rows = {}
    for peer in arguments:
        potential, _, interpreter = peer.rpartition("=")
        rows[potential.replace("=", " ")] = Row(potential, interpreter, **settings)
    return rows


class Worker:
    """A script in a process of its own, which answers each line with a JSON record.

    Parameters
    ----------
    interpreter : str
        The Python that runs it; this one finds the packages of this checkout.
    script : Path
        Reads lines from standard input until their end.
    arguments : list of str
        Of the script.
    threads : int or None
        Of torch and of OpenMM's CPU platform; None leaves the choice to them.
    """

    def __init__(self, interpreter, script, arguments, threads=None):
        environment = dict(os.environ)
        if interpreter == sys.executable:
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), environment.get("PYTHONPATH"))))
        if threads:
            environment |= {k: str(threads) for k in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENMM_CPU_THREADS")}
        # A file, since a pipe that nobody reads would stop the process once it is full.
        self.said = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        pipe = subprocess.PIPE
        self.process = subprocess.Popen([interpreter, str(script), *arguments], stdin=pipe, stdout=pipe, stderr=self.said, text=True, env=environment)

    def ask(self, line):
        """Its record on one line; the first one also waits for the start.

        Raises
        ------
        WorkerError
            If it ends without one.
        """
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended; what it said follows
        for answer in self.process.stdout:
            if answer.startswith("{"):
                return json.loads(answer)
        self.process.communicate()
        self.said.seek(0)
        said = self.said.read()[-2000:].strip()
        self.said.close()
        raise WorkerError(said or f"ended with status {self.process.returncode}")

    def close(self):
        """End the process."""
        self.process.communicate()
        self.said.close()


class Stepper(Worker):
    """One row on one structure."""

    def __init__(self, row, structure):
        super().__init__(row.interpreter, SPEED_WORKER, [row.potential, str(structure), "--platform", row.platform], row.threads)
        self.records = []

    def block(self, amount, kind="seconds"):
        """Time one block, ``seconds`` long or of a number of ``steps``."""
        self.records.append(self.ask(f"{kind} {amount}"))
        return self.records[-1]

    def summary(self):
        """The last record, with the medians of the blocks."""
        out = dict(self.records[-1])
        for key in ("ms_per_step", "cpu_ms_per_step", "cpu_per_wall"):
            out[key] = statistics.median(r[key] for r in self.records)
        return out | {"blocks": [r["ms_per_step"] for r in self.records]}


def measure(structure, rows, blocks, seconds):
    """Interleaved blocks of all rows ``{label: Row}`` on one structure.

    A row that fails, for want of memory or of a package, is stored as ``{"error": ...}``, and the others go on.
    """
    workers, results = {}, {}
    # One after the other: a worker that has started waits, and waiting costs nothing.
    for label, row in rows.items():
        worker = Stepper(row, structure)
        try:
            worker.block(0.0)
            worker.records.clear()
            workers[label] = worker
        except WorkerError as error:
            results[label] = {"error": str(error)}
    for _ in range(blocks):
        for label, worker in list(workers.items()):
            try:
                worker.block(seconds)
            except WorkerError as error:
                results[label] = {"error": str(error)}
                del workers[label]
    for label, worker in workers.items():
        worker.close()
        results[label] = worker.summary()
    return {label: results[label] for label in rows}


def line_of(name, n_atoms, label, record, first):
    """One line of a table: time, ratio to the first row, time per atom, memory."""
    if "error" in record:
        return f"{name:18s} {n_atoms:6d} atoms  {label:16s} FAILED: " + record["error"].splitlines()[-1]
    ratio = record["ms_per_step"] / first["ms_per_step"] if "ms_per_step" in first else float("nan")
    return (
        f"{name:18s} {n_atoms:6d} atoms  {label:16s} {record['ms_per_step']:10.2f} ms/step  {ratio:6.2f} x  "
        f"{1e3 * record['ms_per_step'] / n_atoms:8.1f} us/atom  peak {record['peak_mb']:6.0f} MB  cpu/wall {record['cpu_per_wall']:.2f}"
        + ("" if record["finite"] else "  FORCES NOT FINITE")
    )
