"""A periodic box of water at constant volume: does it hold together, how is it structured, and how much do direct forces and inner steps heat it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.build import molecule
from openmm import Vec3, app, unit

from openmm_se3.binding import modes_of
from openmm_se3.errors import SimulationError
from openmm_se3.physics.dynamics import Progress
from openmm_se3.physics.report import Line, Panel, Quantity, Section
from openmm_se3.physics.settings import PhysicsSettings
from openmm_se3.physics.statistics import mean_with_error
from openmm_se3.physics.subject import Subject
from openmm_se3.physics.trajectory import read_dcd
from openmm_se3.physics.units import ANGSTROM_PER_NM, DALTON_PER_KG_PER_M3_NM3
from openmm_se3.simulate import simulate
from openmm_se3.simulation_files import FINAL_FILE, LOG_FILE, SETTINGS_FILE, TRAJECTORY_FILE, read_log
from openmm_se3.simulation_settings import SimulationSettings

DENSITY_KG_PER_M3 = 997.0  # of liquid water at 298 K and 1 bar
LONGEST_BOND_NM = 0.13  # an O-H bond longer than this is broken
BIN_NM = 0.005
EQUILIBRATION = 0.25  # of a run, which averages leave out
REPORT_PS = 0.05
#: Forces that are, or have in their inner steps, no gradient; each goes on where the run ends, for this part of its length.
WITH_DIRECT, PART = ("mts", "direct"), 0.1


def water_box(waters: int, seed: int) -> tuple[app.Topology, np.ndarray]:
    """Water at its density, molecules on a cubic lattice, turned at random.

    Parameters
    ----------
    waters : int
        Number of molecules.
    seed : int
        Of the orientations.

    Returns
    -------
    tuple
        Topology with a cubic box, and positions ``(3 waters, 3)`` nm, O H H of each molecule in turn.
    """
    one: Atoms = molecule("H2O")
    edge = float((waters * one.get_masses().sum() / (DENSITY_KG_PER_M3 * DALTON_PER_KG_PER_M3_NM3)) ** (1 / 3))
    side = int(np.ceil(waters ** (1 / 3) - 1e-9))
    cells = np.stack(np.meshgrid(*[np.arange(side)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    rng = np.random.default_rng(seed)
    # Where the lattice has more cells than there are molecules, the empty ones are spread over the box.
    chosen = cells[np.sort(rng.permutation(len(cells))[:waters])]
    topology = app.Topology()
    chain = topology.addChain()
    positions = []
    for cell in chosen:
        residue = topology.addResidue("HOH", chain)
        o, *hydrogens = [topology.addAtom(n, app.Element.getBySymbol(n[0]), residue) for n in ("O", "H1", "H2")]
        for h in hydrogens:
            topology.addBond(o, h)
        turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
        positions.append((one.positions - one.positions[0]) @ turn / ANGSTROM_PER_NM + (cell + 0.5) * edge / side)
    topology.setPeriodicBoxVectors([Vec3(edge, 0, 0), Vec3(0, edge, 0), Vec3(0, 0, edge)] * unit.nanometer)
    return topology, np.concatenate(positions)


def radial_distribution(frames: np.ndarray, edge: float, bin_nm: float = BIN_NM) -> tuple[np.ndarray, np.ndarray]:
    """Pair distribution g(r) of like particles in a cubic box, up to half its edge.

    Parameters
    ----------
    frames : ndarray
        ``(n_frames, n, 3)`` nm.
    edge : float
        nm.
    bin_nm : float
        Width of the bins.

    Returns
    -------
    tuple of ndarray
        Centres of the bins, nm, and g, both ``(n_bins,)``.
    """
    n = frames.shape[1]
    bounds = np.arange(0.0, edge / 2, bin_nm)
    i, j = np.triu_indices(n, k=1)
    counts = np.zeros(len(bounds) - 1)
    for x in frames.astype(np.float64):
        d = x[i] - x[j]
        d -= edge * np.round(d / edge)
        counts += np.histogram(np.linalg.norm(d, axis=1), bins=bounds)[0]
    shells = 4 / 3 * np.pi * (bounds[1:] ** 3 - bounds[:-1] ** 3)
    ideal = len(frames) * n * (n - 1) / 2 * shells / edge**3
    return (bounds[1:] + bounds[:-1]) / 2, counts / ideal


def _lasting(picoseconds: float, run: SimulationSettings) -> SimulationSettings:
    """The run with so many of its steps."""
    steps = round(picoseconds * 1e3 / run.step_fs)
    return replace(run, steps=steps, report_every=max(1, min(round(REPORT_PS * 1e3 / run.step_fs), steps // 2)))


def _simulate(run: SimulationSettings, home: Path, progress: Progress | None) -> tuple[dict[str, np.ndarray], list[str]]:
    """Make a run, or go on with one that was interrupted; its log, and why it failed."""

    def show(step: int, total: int, *_: float) -> None:
        if progress is not None:
            progress(step / total)

    notes = []
    try:
        if (home / SETTINGS_FILE).exists():
            simulate(None, home, resume=True, progress=show)
        else:
            simulate(run, home, progress=show)
    except SimulationError as failure:
        notes.append(str(failure))
    log = read_log(home / LOG_FILE) if (home / LOG_FILE).exists() else {"time_ps": np.zeros(0), "temperature_k": np.zeros(0)}
    return log, notes


def measure_water_box(subject: Subject, settings: PhysicsSettings, directory: Path, progress: Progress | None = None) -> Section:
    """Langevin dynamics in ``directory/water-box``, then in ``water-box-mts`` and ``water-box-direct``; goes on where it was interrupted.

    The first run has multiple time steps, whose averages are those of the energy; where the model has a fast network, with that and heavier
    hydrogens, which change no average. The others begin where it ends, unless molecules broke, with hydrogens of their own mass. They tell what
    direct forces, which are no gradient, add to the temperature, on their own and in the inner steps.

    Parameters
    ----------
    subject : Subject
        The model; one without hydrogen or oxygen is not measured.
    settings : PhysicsSettings
        Number of waters and length of the run; 0 ps leaves it out.
    directory : Path
        Exists.
    progress : callable, optional
        Called with the share that is done.

    Returns
    -------
    Section
        Without quantities if nothing was run.
    """
    if settings.box_ps == 0:
        return Section("water-box", "Water box", [], notes=["left out of the quick setting"])
    if not subject.knows(["H", "O"]):
        return Section("water-box", "Water box", [], notes=["the model knows no water"])
    modes = modes_of(subject.module)
    forces = next(mode for mode in ("mts-fast", "mts", "conservative", "direct") if mode in modes)
    title = f"{settings.box_waters} waters at constant volume, {settings.temperature:g} K, {settings.box_ps:g} ps, {forces}"
    topology, positions = water_box(settings.box_waters, settings.seed)
    edge = topology.getPeriodicBoxVectors()[0][0].value_in_unit(unit.nanometer)
    structure, home = directory / "water-box.pdb", directory / "water-box"
    with open(structure, "w") as file:
        app.PDBFile.writeFile(topology, positions * unit.nanometer, file)
    run = SimulationSettings(
        structure=str(structure),
        model=subject.model,
        forces=forces,
        temperature=settings.temperature,
        timestep_fs=settings.timestep_fs,
        inner_steps=settings.mts_outer,
        hydrogen_mass=settings.hydrogen_mass if forces == "mts-fast" else None,
        seed=settings.seed,
    )
    others = [mode for mode in WITH_DIRECT if mode in modes and mode != forces]
    share = 1 - PART * len(others)
    log, notes = _simulate(_lasting(settings.box_ps, run), home, None if progress is None else lambda part: progress(share * part))
    if not len(log["time_ps"]):
        return Section("water-box", title, [Quantity("time not reached", settings.box_ps, "ps", must=0.0)], notes=notes)
    frames = read_dcd(home / TRAJECTORY_FILE)
    molecules = frames.reshape(len(frames), -1, 3, 3)
    bonds = molecules[:, :, 1:] - molecules[:, :, :1]
    lengths = np.linalg.norm(bonds - edge * np.round(bonds / edge), axis=-1)
    kept = slice(int(EQUILIBRATION * len(frames)), None)
    r, g = radial_distribution(molecules[kept, :, 0], edge)
    peak = int(np.argmax(g))
    mean, error = mean_with_error(log["temperature_k"][kept])
    left = settings.box_ps - float(log["time_ps"][-1])
    broken = int((lengths[-1] > LONGEST_BOND_NM).any(-1).sum())
    quantities = [
        Quantity("time not reached", left if left > 1e-6 else 0.0, "ps", must=0.0),
        Quantity("broken molecules at the end", float(broken), must=0.0),
        Quantity("longest O-H bond of the run", float(lengths.max()) * ANGSTROM_PER_NM, "Å"),
        # A tenth is what `openmm-se3 simulate` too gives notice of.
        Quantity("mean temperature above the thermostat's", mean - settings.temperature, "K", must=0.1 * settings.temperature, uncertainty=error),
        Quantity("first peak of g(O-O) at", float(r[peak]) * ANGSTROM_PER_NM, "Å"),
        Quantity("height of the first peak", float(g[peak])),
    ]
    temperatures = [Line(forces, log["time_ps"].tolist(), log["temperature_k"].tolist())]
    for k, other in enumerate(others if not notes and not broken else []):
        begun = share + PART * k
        show = None if progress is None else lambda part, begun=begun: progress(begun + PART * part)
        then = replace(run, structure=str(home / FINAL_FILE), forces=other, hydrogen_mass=None, minimize=False)
        log, failures = _simulate(_lasting(PART * settings.box_ps, then), directory / f"water-box-{other}", show)
        notes += failures
        if len(log["time_ps"]):
            mean, error = mean_with_error(log["temperature_k"][int(EQUILIBRATION * len(log["time_ps"])) :])
            limits = {"must": 0.1 * settings.temperature} if other == "mts" else {}  # direct forces alone are reported, not judged
            name = f"{other}, mean temperature above the thermostat's"
            quantities.append(Quantity(name, mean - settings.temperature, "K", uncertainty=error, **limits))
            temperatures.append(Line(other, (settings.box_ps + log["time_ps"]).tolist(), log["temperature_k"].tolist()))
    panels = [
        Panel("O-O radial distribution", "distance (Angstrom)", "g(r)", [Line("O-O", (ANGSTROM_PER_NM * r).tolist(), g.tolist())]),
        Panel("temperature", "time (ps)", "temperature (K)", temperatures),
    ]
    return Section("water-box", title, quantities, panels, notes)
