"""What a simulation leaves in its directory, and how it goes on from there: settings, trajectory, log, picture, checkpoint."""

import json
import os
import struct
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import openmm
from filelock import FileLock, Timeout
from openmm import app, unit

from openmm_se3.errors import SimulationError
from openmm_se3.guard import DomainGuard
from openmm_se3.masses import kinetic_energy_of_centre, masses_of
from openmm_se3.model_file import find_model, read_metadata
from openmm_se3.physics.statistics import mean_with_error
from openmm_se3.simulation_settings import SimulationSettings

SETTINGS_FILE = "settings.json"
CHECKPOINT_FILE = "checkpoint.chk"
STATE_FILE = "state.xml"
TRAJECTORY_FILE = "trajectory.dcd"
LOG_FILE = "log.csv"
PLOT_FILE = "energy_temperature.png"
FINAL_FILE = "final.pdb"
LOCK_FILE = ".lock"
#: Deviation of the mean temperature from the thermostat's that a user is told of, where it is beyond doubt.
TEMPERATURE_TOLERANCE = 0.1
_PARTIAL = "partial-"  # what is written goes by this name until it is complete
_WEIGHTS = "weights_sha256"  # of the model, beside the settings in their file
_CSV_HEADER = ("step", "time_ps", "potential_kj_per_mol", "kinetic_kj_per_mol", "total_kj_per_mol", "temperature_k")
_CSV_PERIODIC = ("volume_nm3", "density_g_per_ml")


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside `path`, then rename, so that a kill leaves the old file or the new one."""
    partial = path.with_name(_PARTIAL + path.name)
    write(partial)
    os.replace(partial, path)


def require_empty(output: Path) -> None:
    """Refuse a directory that holds anything but a lock, or what a process that was killed had not yet given its name.

    Raises
    ------
    FileExistsError
        If it does.
    """
    if output.exists() and any(path.name != LOCK_FILE and not path.name.startswith(_PARTIAL) for path in output.iterdir()):
        raise FileExistsError(f"{output} is not empty; choose another output directory, or continue the run in it with --resume")


@contextmanager
def alone(output: Path) -> Iterator[None]:
    """Make the directory of a run, and keep every other process from running in it until this one ends, however it does.

    Raises
    ------
    SimulationError
        If another process runs there.
    """
    output.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(output / LOCK_FILE, timeout=0):
            yield
    except Timeout:
        raise SimulationError(f"another process runs in {output}; wait for its end, or choose another output directory") from None


class SimulationFiles:
    """Trajectory, log and checkpoint, always at the same step."""

    def __init__(self, directory: Path, settings: SimulationSettings, simulation: app.Simulation) -> None:
        self.directory, self.settings, self.simulation = directory, settings, simulation
        self.centred = any(isinstance(f, openmm.CMMotionRemover) for f in simulation.system.getForces())
        self.masses = masses_of(simulation.system)
        self.dof = 3 * int(np.count_nonzero(self.masses)) - (3 if self.centred else 0)
        self.time = 0.0
        self.temperature = 0.0
        self.potential = 0.0
        self.guard = DomainGuard(simulation.topology, settings.report_every)
        self.periodic = simulation.system.usesPeriodicBoundaryConditions()
        self.header = _CSV_HEADER + (_CSV_PERIODIC if self.periodic else ())
        self.mass = float(self.masses.sum())

    def open(self, frames: int) -> None:
        """Start the files, or cut them back to `frames` frames after a kill."""
        trajectory, log = self.directory / TRAJECTORY_FILE, self.directory / LOG_FILE
        step = self.settings.step_fs * unit.femtosecond
        if frames:
            truncate_dcd(trajectory, frames)
        lines = [list(self.header), *(_rows(log)[1][:frames] if frames else [])]
        _replace(log, lambda partial: partial.write_text("".join(map(_line, lines)), newline="\n"))
        self._file = open(trajectory, "r+b" if frames else "wb")  # noqa: SIM115 - lives as long as the run
        every = self.settings.report_every
        self._dcd = app.DCDFile(self._file, self.simulation.topology, step, every, every, append=bool(frames))

    def write(self) -> None:
        """One frame, one line, one checkpoint."""
        context = self.simulation.context
        state = context.getState(getPositions=True, getEnergy=True, getVelocities=True, getForces=True)
        self.guard.check(state, self.simulation.currentStep)
        potential = state.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole)
        kinetic = state.getKineticEnergy().value_in_unit(unit.kilojoule_per_mole)
        if self.centred:
            kinetic -= kinetic_energy_of_centre(state, self.masses)
        gas = unit.MOLAR_GAS_CONSTANT_R.value_in_unit(unit.kilojoule_per_mole / unit.kelvin)
        self.temperature, self.potential = 2 * kinetic / (self.dof * gas), potential
        box = state.getPeriodicBoxVectors() if self.periodic else None
        self._dcd.writeModel(state.getPositions(), periodicBoxVectors=box)
        self._file.flush()
        self.time = state.getTime().value_in_unit(unit.picosecond)
        values = [self.time, potential, kinetic, potential + kinetic, self.temperature]
        if self.periodic:
            volume = state.getPeriodicBoxVolume()
            density = self.mass * unit.dalton / volume
            values += [volume.value_in_unit(unit.nanometer**3), density.value_in_unit(unit.gram / unit.item / unit.milliliter)]
        with open(self.directory / LOG_FILE, "a", newline="\n") as file:
            file.write(_line([str(self.simulation.currentStep), *(f"{v:.8g}" for v in values)]))
        _replace(self.directory / STATE_FILE, lambda p: p.write_text(openmm.XmlSerializer.serialize(state)))
        _replace(self.directory / CHECKPOINT_FILE, lambda p: p.write_bytes(context.createCheckpoint()))

    def last(self) -> str:
        """When the last state was written."""
        return f"at {self.time:g} ps" if (self.directory / STATE_FILE).exists() else "none yet"

    def close(self) -> None:
        """Close the trajectory."""
        self._file.close()


def _line(values: Sequence[str]) -> str:
    return ",".join(values) + "\n"


def _rows(log: Path) -> tuple[list[str], list[list[str]]]:
    """Header of a log, and the lines below it, without one that a kill or a full disk cut."""
    lines = [line.rstrip("\n").split(",") for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")]
    header, rows = (lines[0], lines[1:]) if lines else (list(_CSV_HEADER), [])
    return header, [row for row in rows if len(row) == len(header)]


def is_begun(output: Path) -> bool:
    """Whether the run in a directory has a state to go on from; without one it has at most a line of its log.

    Raises
    ------
    SimulationError
        If its log says that it had one.
    """
    if (output / CHECKPOINT_FILE).exists() or (output / STATE_FILE).exists():
        return True
    log = output / LOG_FILE
    if log.exists() and len(_rows(log)[1]) > 1:
        raise SimulationError(
            f"{output} has a log of steps but neither {CHECKPOINT_FILE} nor {STATE_FILE}, from which to go on; put one back, or begin a new run "
            "elsewhere"
        )
    return False


def frames_until(step: int, report_every: int, output: Path) -> int:
    """How many frames a run has written up to a step; a run that was made longer has one more, at its former end.

    Raises
    ------
    SimulationError
        If its log has fewer lines than there must be frames.
    """
    log = output / LOG_FILE
    frames = sum(int(line[0]) <= step for line in _rows(log)[1]) if log.exists() else 0
    if frames < -(-step // report_every):
        raise SimulationError(f"{log} holds {frames} lines up to step {step} of the checkpoint; it was altered, and the run cannot be resumed")
    return frames


def truncate_dcd(path: Path, frames: int) -> None:
    """Keep the first `frames` frames of a DCD file, whatever a kill left behind them.

    Raises
    ------
    SimulationError
        If the file has fewer frames.
    """
    with open(path, "r+b") as file:
        header = file.read(276)
        n_atoms = struct.unpack("<i", header[268:272])[0] if len(header) == 276 else 0
        periodic = struct.unpack("<i", header[48:52])[0] if len(header) == 276 else 0
        frame = 3 * (4 * n_atoms + 8) + (56 if periodic else 0)
        size = file.seek(0, os.SEEK_END)
        if n_atoms == 0 or size < 276 + frames * frame:
            raise SimulationError(f"{path} holds fewer than the {frames} frames of the checkpoint; it was altered, and the run cannot be resumed")
        file.truncate(276 + frames * frame)
        file.seek(8)
        file.write(struct.pack("<i", frames))


def write_settings(settings: SimulationSettings, output: Path, weights_sha256: str | None) -> None:
    """Keep the settings of a run in its directory, and the hash of its model's weights if it is known."""
    kept = asdict(settings) | ({} if weights_sha256 is None else {_WEIGHTS: weights_sha256})
    _replace(output / SETTINGS_FILE, lambda p: p.write_text(json.dumps(kept, indent=1) + "\n"))


def read_settings(output: Path) -> SimulationSettings:
    """Settings of the run in a directory.

    Raises
    ------
    SimulationError
        If it holds none, or what it holds was altered.
    """
    file = output / SETTINGS_FILE
    try:
        return SimulationSettings(**{name: value for name, value in json.loads(file.read_text()).items() if name != _WEIGHTS})
    except FileNotFoundError:
        raise SimulationError(f"{output} holds no run to resume (no {SETTINGS_FILE})") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise SimulationError(f"{file} holds no settings of a run: {error}") from error


def weights_of_run(output: Path) -> str | None:
    """Hash of the weights of a run's model, None of a run from before it was kept."""
    return json.loads((output / SETTINGS_FILE).read_text()).get(_WEIGHTS)


def check_same_weights(output: Path, model: str, weights_sha256: str) -> None:
    """Refuse to go on with another model than the run in a directory began with.

    Raises
    ------
    SimulationError
        If the weights differ.
    """
    began = weights_of_run(output)
    if began not in (None, weights_sha256):
        raise SimulationError(
            f"the run in {output} began with other weights (SHA-256 {began[:12]}) than {model} has now ({weights_sha256[:12]}); "
            "put that model back (a released one comes with the version of openmm-se3 that the run began with), or begin a new run"
        )


def move_model(output: Path, model: str) -> None:
    """Let the run in a directory find its model's file where it is now; called under the lock of `alone`.

    Raises
    ------
    ModelFileError
        If there is no such model.
    SimulationError
        If it has other weights than the run began with, or there is no run.
    """
    settings = read_settings(output)
    check_same_weights(output, model, read_metadata(model).weights_sha256)
    write_settings(replace(settings, model=absolute_model(model)), output, weights_of_run(output))


def absolute_model(model: str) -> str:
    """Released models by name, files by absolute path, so that a resumed run finds them from any folder."""
    return str(find_model(model).resolve()) if Path(model).is_file() else model


def extend(output: Path, steps: int) -> None:
    """Let the run in a directory go on to so many steps in all when it is resumed; called under the lock of `alone`.

    Parameters
    ----------
    output : Path
        Directory of the run.
    steps : int
        Steps in all.

    Raises
    ------
    SimulationError
        If it was to be longer, or there is no run.
    """
    settings = read_settings(output)
    if steps < settings.steps:
        raise SimulationError(f"the run in {output} is of {settings.steps} steps; --steps {steps} would end it before")
    write_settings(replace(settings, steps=steps), output, weights_of_run(output))


def portable_state(output: Path) -> openmm.State:
    """The last state, which any machine and platform can read."""
    return openmm.XmlSerializer.deserialize((output / STATE_FILE).read_text())


def restore(simulation: app.Simulation, output: Path, seed: int) -> int:
    """Load the checkpoint; where there is none, or it is of another machine or platform, the portable state. Returns the step.

    The checkpoint holds the state of the random numbers, the portable state does not. There they begin from a seed of their own, derived from that of
    the run and the step: from the run's they would repeat those of its first steps.

    Warns
    -----
    UserWarning
        If it is the portable state.
    """
    context = simulation.context
    try:
        context.loadCheckpoint((output / CHECKPOINT_FILE).read_bytes())
    except (openmm.OpenMMException, FileNotFoundError) as error:
        state = portable_state(output)
        own = int(np.random.SeedSequence([seed, state.getStepCount()]).generate_state(1)[0]) % (2**31 - 1) + 1
        for part in (simulation.integrator, *simulation.system.getForces()):
            if hasattr(part, "setRandomNumberSeed"):
                part.setRandomNumberSeed(own)
        context.reinitialize()
        context.setState(state)
        found = "is missing" if isinstance(error, FileNotFoundError) else "is of another machine, platform or version"
        warnings.warn(
            f"{output / CHECKPOINT_FILE} {found}, so the run goes on from {STATE_FILE}: with the same positions and velocities, "
            "but, where there is a thermostat or barostat, other random numbers than it would have had there",
            stacklevel=2,
        )
    return int(simulation.currentStep)


def read_log(path: Path) -> dict[str, np.ndarray]:
    """Columns of a log as arrays, without a last line that was cut."""
    header, rows = _rows(path)
    return {name: np.array([float(row[k]) for row in rows]) for k, name in enumerate(header)}


def temperature_deviation(output: Path) -> float | None:
    """Relative deviation of the mean temperature, over the second half of a finished run, from that of its thermostat.

    Returns
    -------
    float or None
        None where it is not more than `TEMPERATURE_TOLERANCE` by two standard errors: few samples of few atoms scatter by more. None, too, where
        there is no thermostat, or there are fewer than 100 samples to judge by.
    """
    settings = read_settings(output)
    temperature = read_log(output / LOG_FILE)["temperature_k"]
    if not settings.thermostatted or settings.temperature == 0 or len(temperature) < 100:
        return None
    judged = temperature[len(temperature) // 2 :]
    # The time that an error takes may grow with the square of the number of samples; means of blocks of them have the same mean and error.
    block = -(-len(judged) // 5000)
    mean, error = mean_with_error(judged[len(judged) % block :].reshape(-1, block).mean(1) / settings.temperature)
    return mean - 1 if abs(mean - 1) - 2 * error > TEMPERATURE_TOLERANCE else None


def plot_log(log: Path, picture: Path) -> None:
    """Draw energies and temperature over time; the density too, where it changes.

    Warns
    -----
    UserWarning
        If the picture cannot be drawn, which is no reason for a run to fail, nor to hide the one for which it does.
    """
    try:
        _plot(read_log(log), picture)
    except Exception as error:  # of a full disk, a log that was altered, a broken matplotlib
        warnings.warn(f"{picture} could not be drawn ({type(error).__name__}: {error})", stacklevel=2)


def _plot(columns: dict[str, np.ndarray], picture: Path) -> None:
    from matplotlib.figure import Figure

    if not len(columns["step"]):
        return
    density = columns.get("density_g_per_ml")
    changes = density is not None and np.ptp(density) > 0
    figure = Figure(figsize=(8, 9 if changes else 7), layout="constrained")
    axes = figure.subplots(3 + changes, 1, sharex=True)
    time = columns["time_ps"]
    axes[0].plot(time, columns["potential_kj_per_mol"], lw=0.8, color="tab:blue")
    axes[0].set_ylabel("potential energy\n(kJ/mol)")
    axes[1].plot(time, columns["total_kj_per_mol"], lw=0.8, color="tab:purple")
    axes[1].set_ylabel("total energy\n(kJ/mol)")
    axes[2].plot(time, columns["temperature_k"], lw=0.8, color="tab:red")
    mean = columns["temperature_k"].mean()
    axes[2].axhline(mean, color="black", lw=0.8, ls="--", label=f"mean {mean:.1f} K")
    axes[2].legend(loc="upper right")
    axes[2].set_ylabel("temperature\n(K)")
    if changes:
        axes[3].plot(time, density, lw=0.8, color="tab:green")
        axes[3].set_ylabel("density\n(g/mL)")
    axes[-1].set_xlabel("time (ps)")
    for axis in axes:
        axis.ticklabel_format(axis="y", useOffset=False)
        axis.grid(alpha=0.3)
    temporary = picture.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=130)
    os.replace(temporary, picture)
