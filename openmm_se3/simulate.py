"""Run dynamics of a structure file: minimise, simulate, write everything a user wants to look at, resume."""

import csv
import json
import math
import os
import struct
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import openmm
import torch
from openmm import app, unit

from openmm_se3.binding import MULTIPLE_TIME_STEPS
from openmm_se3.cuda_graphs import needs_width, width_for
from openmm_se3.errors import UnsupportedSystemError
from openmm_se3.force import check_box
from openmm_se3.guard import DomainError, DomainGuard
from openmm_se3.integrators import MultipleTimeStepIntegrator
from openmm_se3.masses import masses_of
from openmm_se3.model_file import ModelMetadata, find_model, read_metadata
from openmm_se3.molecules import keep_molecules_whole, make_whole
from openmm_se3.platforms import platform_names
from openmm_se3.potential import SE3Potential
from openmm_se3.structures import check_coordinates, molecule_of_atoms, read_structure, unlikely_molecules

ENSEMBLES = ("nvt", "nve")
#: Outer step beyond which ``"mts-fast"`` wants heavier hydrogens: vibrations of ordinary ones get fewer than six kicks in a period.
LONGEST_STEP_FS = 1.5
SETTINGS_FILE = "settings.json"
CHECKPOINT_FILE = "checkpoint.chk"
STATE_FILE = "state.xml"
TRAJECTORY_FILE = "trajectory.dcd"
LOG_FILE = "log.csv"
PLOT_FILE = "energy_temperature.png"
FINAL_FILE = "final.pdb"
FORCE_TOLERANCE = 0.01  # eV/Angstrom, on each atom
ONE_THREAD_UP_TO = 200  # atoms, below which handing work to a second thread costs more than it brings
BAROSTAT_INTERVAL = 25  # steps between trial changes of the volume
_CSV_HEADER = ("step", "time_ps", "potential_kj_per_mol", "kinetic_kj_per_mol", "total_kj_per_mol", "temperature_k")
_CSV_PERIODIC = ("volume_nm3", "density_g_per_ml")


class SimulationError(RuntimeError):
    """The simulation cannot start or go on; the message says what happened and what is left."""


@dataclass(frozen=True)
class SimulationSettings:
    """What to simulate and how.

    Attributes
    ----------
    structure : str
        Structure file (.pdb, .cif, .sdf, .xyz).
    model : str
        Name of a released model or path of an exported file.
    forces : str
        Force mode of `SE3Potential`; ``auto`` as `suitable_forces` says.
    precision : str
        ``single`` or ``double``.
    ensemble : str
        ``nvt`` (Langevin) or ``nve`` (Verlet); for multiple time steps `MultipleTimeStepIntegrator` with friction or without.
    pressure_bar : float or None
        With ``nvt`` and a periodic box, keeps this pressure (bar) by a Monte Carlo barostat that scales the box in all directions alike and
        moves molecules, as the bonds of the structure tell them, as a whole; None keeps the volume.
    box_nm : sequence of three floats, or empty, or None
        Edges of an orthorhombic periodic box, nm; None takes what the structure file says, an empty sequence no box.
    temperature : float
        Kelvin; also of the initial velocities. 0 starts at rest.
    timestep_fs : float
        Femtoseconds; for multiple time steps of the inner ones.
    inner_steps : int
        For multiple time steps, inner ones to each outer one, 1 or an even number; one step of the run is all of them. Other force modes
        take one step at a time.
    hydrogen_mass : float or None
        Dalton, taken from the atoms that hydrogens are bonded to; None for their own.
    friction_per_ps : float
        Langevin friction. The default couples tightly, because direct forces put heat in (see the model's card).
    steps : int
        Steps in all.
    report_every : int
        Steps between frames, log lines and checkpoints.
    minimize : bool
        Whether to minimise first, see `minimize`.
    platform : str
        OpenMM platform; ``auto`` takes CUDA if there is one, else Reference, whose step overhead is the smallest on a CPU.
    seed : int
        Seed of velocities and thermostat.
    """

    structure: str
    model: str = "se3-ani1x"
    forces: str = "auto"
    precision: str = "single"
    ensemble: str = "nvt"
    pressure_bar: float | None = None
    box_nm: Sequence[float] | None = None
    temperature: float = 300.0
    timestep_fs: float = 0.5
    inner_steps: int = 4
    hydrogen_mass: float | None = None
    friction_per_ps: float = 10.0
    steps: int = 20_000
    report_every: int = 100
    minimize: bool = True
    platform: str = "auto"
    seed: int = 1

    def __post_init__(self) -> None:
        if self.ensemble not in ENSEMBLES:
            raise ValueError(f"ensemble must be one of {', '.join(ENSEMBLES)}, got {self.ensemble!r}")
        for name in ("timestep_fs", "inner_steps", "steps", "report_every"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.inner_steps > 1 and self.inner_steps % 2:
            raise ValueError(f"inner_steps must be 1 or even, got {self.inner_steps}")
        for name in ("temperature", "friction_per_ps"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.pressure_bar is not None and not math.isfinite(self.pressure_bar):
            raise ValueError(f"pressure_bar must be a number, got {self.pressure_bar}")
        if self.pressure_bar is not None and (self.ensemble != "nvt" or self.temperature == 0):
            raise ValueError(f"a pressure needs a thermostat: ensemble nvt and a temperature above 0, got {self.ensemble} and {self.temperature:g} K")
        if self.box_nm and (len(self.box_nm) != 3 or not min(self.box_nm) > 0 or not max(self.box_nm) < math.inf):
            raise ValueError(f"box_nm must be three positive edges in nm, or empty, got {self.box_nm}")

    @property
    def step_fs(self) -> float:
        """Time that one step of the integrator takes, fs."""
        return self.timestep_fs * (self.inner_steps if self.forces in MULTIPLE_TIME_STEPS else 1)


def choose_platform(name: str) -> openmm.Platform:
    """Platform by name; ``auto`` as in `SimulationSettings`.

    Raises
    ------
    SimulationError
        If there is no such platform; the message lists those there are.
    """
    names = platform_names()
    if name == "auto":
        name = "CUDA" if "CUDA" in names else "Reference"
    if name not in names:
        raise SimulationError(f"OpenMM has no platform {name!r} here; it has {', '.join(names)}")
    return openmm.Platform.getPlatformByName(name)


@contextmanager
def torch_threads(n_atoms: int) -> Iterator[None]:
    """Let torch use the number of threads that suits a system of so many atoms on a CPU, and restore what was set.

    One up to `ONE_THREAD_UP_TO` atoms, above it what torch takes by itself, the number of cores. The environment variable
    ``OMP_NUM_THREADS`` is obeyed, whatever the size.
    """
    before = torch.get_num_threads()
    if n_atoms <= ONE_THREAD_UP_TO and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def suitable_forces(settings: SimulationSettings, topology: app.Topology, positions: np.ndarray) -> str:
    """Force mode for a run whose settings leave it open: ``direct`` for one molecule under a thermostat, else ``conservative``.

    Direct forces put heat in. In a molecule the thermostat takes it away, at constant energy nothing does, and between molecules there is more of it
    than the default friction takes: water of `se3-ani1x` runs 41 K too hot (its card). A barostat compares energies, whose gradient direct forces
    are not. A model that was not trained for direct forces has conservative ones always.

    Parameters
    ----------
    settings : SimulationSettings
        Of the run.
    topology : openmm.app.Topology
        Elements and box.
    positions : ndarray
        ``(n_atoms, 3)`` nm, from which the molecules are told.

    Warns
    -----
    UserWarning
        If they are conservative for what direct forces would do.
    """
    if "direct" in read_metadata(settings.model).untrained:
        return "conservative"
    if settings.ensemble == "nvt" and topology.getPeriodicBoxVectors() is None and not molecule_of_atoms(topology, positions).any():
        return "direct"
    warnings.warn(
        "forces are conservative here, since direct ones heat a liquid, and any molecule at constant energy. Multiple time steps take less "
        "time: --forces mts, or mts-fast with --hydrogen-mass 3",
        stacklevel=2,
    )
    return "conservative"


def minimize(topology: app.Topology, positions: np.ndarray, settings: SimulationSettings, max_iterations: int = 500) -> np.ndarray:
    """Minimise with the forces that will drive the dynamics (the sum of both, conservative, for ``mts``), until none exceeds `FORCE_TOLERANCE`.

    ASE's LBFGS goes by forces alone, so direct forces, which are no exact gradient, do not confuse a line search; and it moves no
    atom by more than 0.05 Angstrom at once, so it stays in the basin it started in.

    Parameters
    ----------
    topology : openmm.app.Topology
        Atoms and box.
    positions : ndarray
        ``(n_atoms, 3)`` nm.
    settings : SimulationSettings
        Model, force mode and platform.
    max_iterations : int
        Most steps; what was reached by then is returned.

    Returns
    -------
    ndarray
        ``(n_atoms, 3)`` nm.
    """
    from ase import Atoms, units
    from ase.optimize import LBFGS

    from openmm_se3.calculator import SE3Calculator

    atoms = Atoms([a.element.symbol for a in topology.atoms()], positions=positions * (units.nm / units.Ang))
    box = topology.getPeriodicBoxVectors()
    if box is not None:
        atoms.set_cell(np.array(box.value_in_unit(unit.angstrom)))
        atoms.pbc = True
    device = "cuda" if choose_platform(settings.platform).getName() == "CUDA" else "cpu"
    forces = "conservative" if settings.forces in MULTIPLE_TIME_STEPS else settings.forces
    atoms.calc = SE3Calculator(settings.model, forces=forces, precision=settings.precision, device=device)
    LBFGS(atoms, maxstep=0.05, logfile=None).run(fmax=FORCE_TOLERANCE, steps=max_iterations)
    return np.array(atoms.positions * (units.Ang / units.nm))


def _integrator(settings: SimulationSettings) -> openmm.Integrator:
    step = settings.step_fs * unit.femtosecond
    temperature, friction = settings.temperature * unit.kelvin, settings.friction_per_ps / unit.picosecond
    integrator: openmm.Integrator
    if settings.forces in MULTIPLE_TIME_STEPS:
        friction = friction if settings.ensemble == "nvt" else 0.0
        integrator = MultipleTimeStepIntegrator(temperature, friction, step, settings.inner_steps, fastInSlow=True)
    elif settings.ensemble == "nve":
        integrator = openmm.VerletIntegrator(step)
    else:
        integrator = openmm.LangevinMiddleIntegrator(temperature, friction, step)
    if settings.ensemble == "nvt":
        integrator.setRandomNumberSeed(settings.seed)
    return integrator


def _add_barostat(system: openmm.System, topology: app.Topology, settings: SimulationSettings) -> None:
    if topology.getPeriodicBoxVectors() is None:
        raise UnsupportedSystemError(f"{settings.structure} has no periodic box, so there is no pressure to keep; give one with --box")
    keep_molecules_whole(topology, system)
    barostat = openmm.MonteCarloBarostat(settings.pressure_bar * unit.bar, settings.temperature * unit.kelvin, BAROSTAT_INTERVAL)
    barostat.setRandomNumberSeed(settings.seed)
    system.addForce(barostat)


def _check_box_of(settings: SimulationSettings, topology: app.Topology, metadata: ModelMetadata) -> None:
    box = topology.getPeriodicBoxVectors()
    try:
        if box is not None:
            check_box(box, metadata)
    except UnsupportedSystemError as error:
        raise UnsupportedSystemError(f"{settings.structure}: {error} For a molecule in vacuum leave the box out, with --box none.") from None


def _width(model: torch.jit.ScriptModule, platform: str, topology: app.Topology, positions: np.ndarray, resumed: Path | None = None) -> int | None:
    """Width of the neighbour matrix, where a GPU needs one to replay a step as a CUDA graph. A `resumed` run may have become denser."""
    if platform != "CUDA" or not needs_width(model, len(positions)):
        return None
    box = topology.getPeriodicBoxVectors()
    if resumed is not None:
        state = _portable_state(resumed)
        positions = state.getPositions(asNumpy=True).value_in_unit(unit.nanometer)
        box = box if box is None else state.getPeriodicBoxVectors()
    return width_for(positions, box, model.metadata.cutoff_nm)


def _too_small(context: openmm.Context, metadata: ModelMetadata) -> str | None:
    """What to say of a box that the barostat has made too small for the model, or None."""
    try:
        check_box(context.getState().getPeriodicBoxVectors(), metadata)
    except UnsupportedSystemError as error:
        return str(error)
    return None


def _degrees_of_freedom(system: openmm.System) -> int:
    moving = sum(system.getParticleMass(i) > 0 * unit.dalton for i in range(system.getNumParticles()))
    removed = any(isinstance(f, openmm.CMMotionRemover) for f in system.getForces())
    return max(3 * moving - (3 if removed else 0), 1)


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside `path`, then rename, so that a kill leaves the old file or the new one."""
    partial = path.with_name("partial-" + path.name)
    write(partial)
    os.replace(partial, path)


class _Outputs:
    """Trajectory, log and checkpoint, always at the same step."""

    def __init__(self, directory: Path, settings: SimulationSettings, simulation: app.Simulation) -> None:
        self.directory, self.settings, self.simulation = directory, settings, simulation
        self.dof = _degrees_of_freedom(simulation.system)
        self.time = 0.0
        self.temperature = 0.0
        self.potential = 0.0
        self.guard = DomainGuard(simulation.topology, settings.report_every)
        self.periodic = simulation.system.usesPeriodicBoundaryConditions()
        self.header = _CSV_HEADER + (_CSV_PERIODIC if self.periodic else ())
        self.mass = float(masses_of(simulation.system).sum())

    def open(self, frames: int) -> None:
        """Start the files, or cut them back to `frames` frames after a kill."""
        trajectory, log = self.directory / TRAJECTORY_FILE, self.directory / LOG_FILE
        step = self.settings.step_fs * unit.femtosecond
        if frames:
            truncate_dcd(trajectory, frames)
            with open(log, newline="") as file:
                lines = [line for line in list(csv.reader(file))[: frames + 1] if len(line) == len(self.header)]
        else:
            lines = [list(self.header)]
        with open(log, "w", newline="") as file:
            csv.writer(file).writerows(lines)
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
        with open(self.directory / LOG_FILE, "a", newline="") as file:
            csv.writer(file).writerow([self.simulation.currentStep, *(f"{v:.8g}" for v in values)])
        _replace(self.directory / STATE_FILE, lambda p: p.write_text(openmm.XmlSerializer.serialize(state)))
        _replace(self.directory / CHECKPOINT_FILE, lambda p: p.write_bytes(context.createCheckpoint()))

    def last(self) -> str:
        """When the last state was written."""
        return f"at {self.time:g} ps" if (self.directory / STATE_FILE).exists() else "none yet"

    def close(self) -> None:
        """Close the trajectory."""
        self._file.close()


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


def simulate(
    settings: SimulationSettings | None,
    output: Path,
    resume: bool = False,
    progress: Callable[[int, int, float, float, float], None] | None = None,
) -> Path:
    """Run, or continue, a simulation.

    Parameters
    ----------
    settings : SimulationSettings or None
        The run; None with `resume`, which takes those in `output`.
    output : Path
        Directory for ``trajectory.dcd``, ``log.csv``, ``topology.pdb``, ``final.pdb``, ``checkpoint.chk``, ``state.xml``,
        ``settings.json`` and ``energy_temperature.png``.
    resume : bool
        Continue the run in `output` from its checkpoint.
    progress : callable, optional
        Called with the step, all steps, the simulated time (ps), the temperature (K) and the potential energy (kJ/mol).

    Returns
    -------
    Path
        `output`.

    Raises
    ------
    FileExistsError
        If `output` holds a run and `resume` is False.
    SimulationError
        If there is nothing to resume, or the dynamics fail.
    UnsupportedSystemError, ModelFileError
        For structures and models that cannot be used.

    Warns
    -----
    UserWarning
        If a molecule looks like an ion or radical, or lacks hydrogens: `openmm_se3.structures.unlikely_molecules`.
    """
    if resume:
        settings = read_settings(output)
        # A run that was killed before its first checkpoint begins anew.
        resume = (output / CHECKPOINT_FILE).exists()
    elif output.exists() and any(output.iterdir()):
        raise FileExistsError(f"{output} is not empty; choose another output directory, or continue the run in it with --resume")
    if settings is None:
        raise ValueError("a new run needs settings")

    # A resumed run reads its own copy of the structure, so that the original may be moved or edited meanwhile.
    topology, positions = read_structure(output / "topology.pdb") if resume else read_structure(Path(settings.structure), settings.box_nm)
    symbols = [a.element.symbol if a.element is not None else "?" for a in topology.atoms()]
    check_coordinates(positions, symbols)
    if settings.forces == "auto":
        settings = replace(settings, forces=suitable_forces(settings, topology, positions))
    with torch_threads(topology.getNumAtoms()):
        _run(settings, output, resume, topology, positions, progress)
    return output


def _run(
    settings: SimulationSettings,
    output: Path,
    resume: bool,
    topology: app.Topology,
    positions: np.ndarray,
    progress: Callable[[int, int, float, float, float], None] | None,
) -> None:
    platform = choose_platform(settings.platform)
    potential = SE3Potential(settings.model, forces=settings.forces, precision=settings.precision, inner_steps=settings.inner_steps)
    width = potential.max_neighbors = _width(potential.model, platform.getName(), topology, positions, output if resume else None)
    _check_box_of(settings, topology, potential.metadata)
    system = potential.createSystem(topology, removeCMMotion=settings.ensemble == "nvt", hydrogenMass=settings.hydrogen_mass)
    if settings.pressure_bar is not None:
        _add_barostat(system, topology, settings)
        positions = make_whole(topology, positions)
    for sentence in [] if resume else unlikely_molecules(topology, positions):
        warnings.warn(f"{settings.structure}: {sentence}. The model takes every molecule for a neutral closed shell.", stacklevel=2)
    if settings.forces == "mts-fast" and settings.hydrogen_mass is None and settings.step_fs > LONGEST_STEP_FS and not resume:
        warnings.warn(
            f"mts-fast with steps of {settings.step_fs:g} fs (timestep times inner steps) may heat bonds to hydrogen of ordinary mass; add "
            "--hydrogen-mass 3, or take fewer inner steps, or mts",
            stacklevel=2,
        )
    simulation = app.Simulation(topology, system, _integrator(settings), platform)
    outputs = _Outputs(output, settings, simulation)

    if resume:
        frames = -(-_restore(simulation, output) // settings.report_every)
    else:
        # Before minimising: a place that cannot be written costs no time, and a run that is killed meanwhile can be begun anew.
        output.mkdir(parents=True, exist_ok=True)
        absolute = {"structure": str(Path(settings.structure).resolve()), "model": _absolute_model(settings.model)}
        _replace(output / SETTINGS_FILE, lambda p: p.write_text(json.dumps({**asdict(settings), **absolute}, indent=1) + "\n"))
        if settings.minimize:
            positions = minimize(topology, positions, settings)
        with open(output / "topology.pdb", "w") as file:
            app.PDBFile.writeFile(topology, positions * unit.nanometer, file, keepIds=True)
        simulation.context.setPositions(positions)
        if settings.temperature > 0:
            simulation.context.setVelocitiesToTemperature(settings.temperature * unit.kelvin, settings.seed)
        frames = 0
    outputs.open(frames)
    try:
        while simulation.currentStep < settings.steps:
            simulation.step(min(settings.report_every, settings.steps - simulation.currentStep))
            outputs.write()
            if progress is not None:
                progress(simulation.currentStep, settings.steps, outputs.time, outputs.temperature, outputs.potential)
    except openmm.OpenMMException as error:
        small = _too_small(simulation.context, potential.metadata) if settings.pressure_bar is not None else None
        if small is not None:
            raise SimulationError(
                f"near step {simulation.currentStep} at {settings.pressure_bar:g} bar the barostat tried a box too small for the model: {small} "
                "It might have refused that box, but its energy cannot be computed to tell; so near to the limit a box holds too few molecules for "
                "a pressure. Repeat it (ase.Atoms.repeat) or add molecules, or keep the volume. "
                f"The last good state, {outputs.last()}, is in {output / STATE_FILE} and {CHECKPOINT_FILE}."
            ) from error
        reason = str(error).strip().split("\n")[-1]
        if not isinstance(error, DomainError):  # which says so itself
            reason += outputs.guard.last_good()
        raise SimulationError(
            f"the dynamics failed near step {simulation.currentStep}: {reason}. Frames so far are in {output}. "
            "Try a shorter --timestep, a lower temperature, or check that the structure is complete (hydrogens, no clashes)."
            + (f" If an atom has come to have more than {width} neighbours, --resume makes room for them." if width else "")
        ) from error
    finally:
        outputs.close()
        if (output / LOG_FILE).exists():
            plot_log(output / LOG_FILE, output / PLOT_FILE)
    state = simulation.context.getState(getPositions=True)
    if outputs.periodic:
        topology.setPeriodicBoxVectors(state.getPeriodicBoxVectors())
    with open(output / FINAL_FILE, "w") as file:
        app.PDBFile.writeFile(topology, state.getPositions(), file, keepIds=True)


def read_settings(output: Path) -> SimulationSettings:
    """Settings of the run in a directory.

    Raises
    ------
    SimulationError
        If it holds none, or what it holds was altered.
    """
    file = output / SETTINGS_FILE
    try:
        return SimulationSettings(**json.loads(file.read_text()))
    except FileNotFoundError:
        raise SimulationError(f"{output} holds no run to resume (no {SETTINGS_FILE})") from None
    except (TypeError, ValueError) as error:
        raise SimulationError(f"{file} holds no settings of a run: {error}") from error


def extend(output: Path, steps: int) -> None:
    """Let the run in a directory go on to so many steps in all when it is resumed.

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
    text = json.dumps({**asdict(settings), "steps": steps}, indent=1) + "\n"
    _replace(output / SETTINGS_FILE, lambda p: p.write_text(text))


def _absolute_model(model: str) -> str:
    """Released models by name, files by absolute path, so that a resumed run finds them from any folder."""
    return str(find_model(model).resolve()) if Path(model).is_file() else model


def _portable_state(output: Path) -> openmm.State:
    return openmm.XmlSerializer.deserialize((output / STATE_FILE).read_text())


def _restore(simulation: app.Simulation, output: Path) -> int:
    """Load the checkpoint; where it is of another machine or platform, the portable state. Returns the step."""
    try:
        simulation.context.loadCheckpoint((output / CHECKPOINT_FILE).read_bytes())
    except openmm.OpenMMException:
        simulation.context.setState(_portable_state(output))
    return int(simulation.currentStep)


def read_log(path: Path) -> dict[str, np.ndarray]:
    """Columns of a log as arrays."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    names = list(rows[0]) if rows else _CSV_HEADER
    return {name: np.array([float(r[name]) for r in rows]) for name in names}


def temperature_deviation(output: Path) -> float | None:
    """Relative deviation of the mean temperature, over the second half of a finished run, from that of its thermostat.

    Returns
    -------
    float or None
        None where there is no thermostat, or there are fewer than 100 samples to judge by.
    """
    settings = read_settings(output)
    temperature = read_log(output / LOG_FILE)["temperature_k"]
    if settings.ensemble != "nvt" or settings.temperature == 0 or len(temperature) < 100:
        return None
    return float(temperature[len(temperature) // 2 :].mean() / settings.temperature - 1)


def plot_log(log: Path, picture: Path) -> None:
    """Draw energies and temperature over time; the density too, where it changes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = read_log(log)
    if not len(columns["step"]):
        return
    density = columns.get("density_g_per_ml")
    changes = density is not None and np.ptp(density) > 0
    figure, axes = pyplot.subplots(3 + changes, 1, figsize=(8, 9 if changes else 7), sharex=True, constrained_layout=True)
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
    pyplot.close(figure)
    os.replace(temporary, picture)
