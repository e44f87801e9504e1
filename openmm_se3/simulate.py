"""Run dynamics of a structure file: minimise, simulate, write everything a user wants to look at, resume."""

import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import openmm
import torch
from openmm import app, unit

from openmm_se3.binding import MULTIPLE_TIME_STEPS
from openmm_se3.checks import check_box
from openmm_se3.cuda_graphs import needs_width, width_for
from openmm_se3.errors import SimulationError, UnsupportedSystemError
from openmm_se3.guard import DomainError
from openmm_se3.integrators import MultipleTimeStepIntegrator
from openmm_se3.model_file import ModelMetadata, read_metadata
from openmm_se3.molecules import keep_molecules_whole, make_whole
from openmm_se3.platforms import choose_platform, has_gpu, torch_threads
from openmm_se3.potential import SE3Potential
from openmm_se3.simulation_files import (
    CHECKPOINT_FILE,
    FINAL_FILE,
    LOG_FILE,
    PLOT_FILE,
    STATE_FILE,
    SimulationFiles,
    absolute_model,
    alone,
    check_same_weights,
    extend,
    frames_until,
    is_begun,
    move_model,
    plot_log,
    portable_state,
    read_settings,
    require_empty,
    restore,
    write_settings,
)
from openmm_se3.simulation_settings import SimulationSettings
from openmm_se3.structures import as_ase, check_coordinates, molecule_of_atoms, read_structure, unlikely_molecules

#: Outer step beyond which ``"mts-fast"`` wants heavier hydrogens: vibrations of ordinary ones get fewer than six kicks in a period.
LONGEST_STEP_FS = 1.5
FORCE_TOLERANCE = 0.01  # eV/Angstrom, on each atom
MOST_STEPS = 500  # of a minimisation
MOST_BETWEEN_VOLUMES = 25  # steps between trial changes of the volume


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

    Returns
    -------
    str
        One of the force modes.

    Raises
    ------
    ModelFileError
        If the model cannot be opened.

    Warns
    -----
    UserWarning
        If they are conservative for what direct forces would do.
    """
    if "direct" in read_metadata(settings.model).untrained:
        return "conservative"
    if settings.thermostatted and topology.getPeriodicBoxVectors() is None and not molecule_of_atoms(topology, positions).any():
        return "direct"
    warnings.warn(
        "forces are conservative here, since direct ones heat a liquid, and any molecule at constant energy. Multiple time steps take less "
        "time: --forces mts, or mts-fast with --hydrogen-mass 3",
        stacklevel=2,
    )
    return "conservative"


def minimize(topology: app.Topology, positions: np.ndarray, settings: SimulationSettings) -> np.ndarray:
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

    Returns
    -------
    ndarray
        ``(n_atoms, 3)`` nm: what was reached within `MOST_STEPS` steps.
    """
    from ase import units
    from ase.optimize import LBFGS

    from openmm_se3.calculator import SE3Calculator

    atoms = as_ase(topology, positions)
    device = "cuda" if choose_platform(settings.platform).getName() == "CUDA" and has_gpu() else "cpu"
    forces = "conservative" if settings.forces in MULTIPLE_TIME_STEPS else settings.forces
    atoms.calc = SE3Calculator(settings.model, forces=forces, precision=settings.precision, device=device)
    LBFGS(atoms, maxstep=0.05, logfile=None).run(fmax=FORCE_TOLERANCE, steps=MOST_STEPS)
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


def _barostat_interval(report_every: int) -> int:
    """Steps between trial changes of the volume, which fall on those where the state is saved if possible.

    A Context counts them from its start and no checkpoint keeps that count, so elsewhere a resumed run would make them at other steps.
    """
    divisors = [n for n in range(5, MOST_BETWEEN_VOLUMES + 1) if report_every % n == 0]
    return max(divisors, default=MOST_BETWEEN_VOLUMES)


def _add_barostat(system: openmm.System, topology: app.Topology, settings: SimulationSettings) -> None:
    if topology.getPeriodicBoxVectors() is None:
        raise UnsupportedSystemError(f"{settings.structure} has no periodic box, so there is no pressure to keep; give one with --box")
    keep_molecules_whole(topology, system)
    interval = _barostat_interval(settings.report_every)
    barostat = openmm.MonteCarloBarostat(settings.pressure_bar * unit.bar, settings.temperature * unit.kelvin, interval)
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
        state = portable_state(resumed)
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


def simulate(
    settings: SimulationSettings | None,
    output: Path,
    resume: bool = False,
    progress: Callable[[int, int, float, float, float], None] | None = None,
    steps: int | None = None,
    model: str | None = None,
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
    steps : int, optional
        With `resume`: so many in all, to make the run longer.
    model : str, optional
        With `resume`: the model's file where it is now, if it was moved.

    Returns
    -------
    Path
        `output`.

    Raises
    ------
    FileExistsError
        If `output` holds a run and `resume` is False.
    SimulationError
        If there is nothing to resume, or only with another model than the run began with, or another process runs in `output`, or the dynamics fail;
        or if OpenMM has no such platform.
    ValueError
        If `settings` is None without `resume`, or `steps` or `model` are given without it; for forces that the model was not trained for.
    UnsupportedSystemError, ModelFileError
        For structures and models that cannot be used.
    ImportError
        If neither TorchForce nor PythonForce can be used.
    OSError
        If `output` cannot be written.

    Warns
    -----
    UserWarning
        If a molecule looks like an ion or radical, or lacks hydrogens, `openmm_se3.structures.unlikely_molecules`; if the file holds several
        structures; if a run is resumed without its checkpoint, or that is of another machine; if ``energy_temperature.png`` cannot be drawn.
    """
    with ExitStack() as stack:
        if resume:
            read_settings(output)  # before a directory is made for the lock: where there is no run, none should be
            stack.enter_context(alone(output))
            if model is not None:
                move_model(output, model)
            if steps is not None:
                extend(output, steps)
            settings = read_settings(output)
            # A run that was killed before its first checkpoint begins anew.
            begun = is_begun(output)
        else:
            if settings is None or steps is not None or model is not None:
                raise ValueError("a new run needs settings, which tell its steps and its model; steps and model are for resume=True")
            require_empty(output)
            begun = False
        # A resumed run reads its own copy of the structure, so that the original may be moved or edited meanwhile.
        topology, positions = read_structure(output / "topology.pdb") if begun else read_structure(Path(settings.structure), settings.box_nm)
        if begun and (output / STATE_FILE).exists():
            # Where the run is now: a PDB file rounds the box, and the positions of the start need not fit into one that has shrunk.
            state = portable_state(output)
            positions = state.getPositions(asNumpy=True).value_in_unit(unit.nanometer)
            if topology.getPeriodicBoxVectors() is not None:
                topology.setPeriodicBoxVectors(state.getPeriodicBoxVectors())
        check_coordinates(topology, positions)
        if settings.forces == "auto":
            settings = replace(settings, forces=suitable_forces(settings, topology, positions))
        stack.enter_context(torch_threads(topology.getNumAtoms()))
        simulation, positions, potential, width = _prepare(settings, output, begun, topology, positions)
        if not resume:
            # Not sooner, since what is refused should leave no directory; and before minimising: a place that cannot be written costs no time.
            stack.enter_context(alone(output))
            require_empty(output)  # another process may have been here meanwhile
        _simulate(settings, output, begun, simulation, positions, potential, width, progress)
    return output


def _prepare(
    settings: SimulationSettings, output: Path, resume: bool, topology: app.Topology, positions: np.ndarray
) -> tuple[app.Simulation, np.ndarray, SE3Potential, int | None]:
    """Simulation, positions (nm) to start from, model, and the width of its neighbour matrix."""
    platform = choose_platform(settings.platform)
    potential = SE3Potential(settings.model, forces=settings.forces, precision=settings.precision, inner_steps=settings.inner_steps)
    if resume:
        check_same_weights(output, settings.model, potential.metadata.weights_sha256)
    width = _width(potential.model, platform.getName(), topology, positions, output if resume else None)
    potential.max_neighbors = width
    _check_box_of(settings, topology, potential.metadata)
    # All motion of a lone atom is that of its centre.
    centred = settings.ensemble == "nvt" and topology.getNumAtoms() > 1
    system = potential.createSystem(topology, removeCMMotion=centred, hydrogenMass=settings.hydrogen_mass)
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
    return app.Simulation(topology, system, _integrator(settings), platform), positions, potential, width


def _simulate(
    settings: SimulationSettings,
    output: Path,
    resume: bool,
    simulation: app.Simulation,
    positions: np.ndarray,
    potential: SE3Potential,
    width: int | None,
    progress: Callable[[int, int, float, float, float], None] | None,
) -> None:
    topology, outputs = simulation.topology, SimulationFiles(output, settings, simulation)
    if resume:
        frames = frames_until(restore(simulation, output, settings.seed), settings.report_every, output)
    else:
        # Before minimising: a run that is killed meanwhile can be begun anew.
        kept = replace(settings, structure=str(Path(settings.structure).resolve()), model=absolute_model(settings.model))
        write_settings(kept, output, potential.metadata.weights_sha256)
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
            # A run that was made longer may be between two of its reports.
            to_report = settings.report_every - simulation.currentStep % settings.report_every
            simulation.step(min(to_report, settings.steps - simulation.currentStep))
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
