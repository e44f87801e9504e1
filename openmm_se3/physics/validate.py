"""Run the measures, keep what is finished, write report and pictures."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import openmm_se3
from openmm_se3.model_file import available_models, find_model
from openmm_se3.physics.asymmetry import measure_asymmetry
from openmm_se3.physics.continuity import measure_continuity
from openmm_se3.physics.dissociation import measure_dissociation
from openmm_se3.physics.dynamics import Progress
from openmm_se3.physics.equipartition import measure_equipartition
from openmm_se3.physics.gradient import measure_gradient
from openmm_se3.physics.heating import measure_heating
from openmm_se3.physics.loop_work import measure_loop_work
from openmm_se3.physics.molecules import molecule_names, starting_structure
from openmm_se3.physics.plot import plot_section
from openmm_se3.physics.report import Quantity, Section, read_report, write_report
from openmm_se3.physics.settings import PhysicsSettings
from openmm_se3.physics.subject import NotConvergedError, Subject, left_out
from openmm_se3.physics.torsion import measure_torsion
from openmm_se3.physics.vibrations import measure_vibrations
from openmm_se3.physics.water_box import measure_water_box
from openmm_se3.simulation_files import alone, require_empty

REPORT_FILE = "report.json"

_Measure = Callable[[Subject, PhysicsSettings, Progress, Path], Section]

#: Every measure by its name on the command line, the cheap ones first.
MEASURES: dict[str, _Measure] = {
    "gradient": lambda subject, settings, progress, directory: measure_gradient(subject, settings),
    "asymmetry": lambda subject, settings, progress, directory: measure_asymmetry(subject, settings),
    "loop-work": lambda subject, settings, progress, directory: measure_loop_work(subject, settings),
    "continuity": lambda subject, settings, progress, directory: measure_continuity(subject, settings),
    "dissociation": lambda subject, settings, progress, directory: measure_dissociation(subject, settings),
    "vibrations": lambda subject, settings, progress, directory: measure_vibrations(subject, settings),
    "torsion": lambda subject, settings, progress, directory: measure_torsion(subject, settings),
    "heating": lambda subject, settings, progress, directory: measure_heating(subject, settings, progress),
    "equipartition": lambda subject, settings, progress, directory: measure_equipartition(subject, settings, progress),
    "water-box": lambda subject, settings, progress, directory: measure_water_box(subject, settings, directory, progress),
}

#: Those of the molecules that the settings name.
OF_MOLECULES = ("gradient", "asymmetry", "loop-work", "heating", "equipartition")


def validate_physics(
    model: str | Path,
    output: Path,
    settings: PhysicsSettings,
    measures: Sequence[str] = tuple(MEASURES),
    resume: bool = False,
    progress: Callable[[str, float], None] | None = None,
) -> list[Section]:
    """Measure the physics of a model.

    Parameters
    ----------
    model : str or Path
        Name of a released model, or path.
    output : Path
        Directory for ``report.json``, one picture per measure, and the run of the water box.
    settings : PhysicsSettings
        `QUICK`, `FULL`, or others.
    measures : sequence of str
        Keys of `MEASURES`.
    resume : bool
        Keep the measures that `output` holds already, and continue its water box.
    progress : callable, optional
        Called with the name of a measure and the share of it that is done.

    Returns
    -------
    list of Section
        In the order of `MEASURES`.

    Raises
    ------
    FileExistsError
        If `output` is not empty and `resume` is False.
    SimulationError
        If another process runs there.
    ValueError
        For an unknown measure or molecule, or if `output` is of another model or other settings.
    ModelFileError
        If the model cannot be opened.
    """
    unknown = sorted(set(measures) - set(MEASURES))
    if unknown:
        raise ValueError(f"no measure {', '.join(map(repr, unknown))}; there are {', '.join(MEASURES)}")
    if unknown := sorted(set(settings.molecules) - set(molecule_names())):
        raise ValueError(f"no molecule {', '.join(map(repr, unknown))}; there are {', '.join(molecule_names())}")
    path = find_model(model)
    subject = Subject(model if str(model) in available_models() else path.resolve())
    head = {
        "model": subject.metadata.name,
        "weights_sha256": subject.metadata.weights_sha256,
        "package_version": openmm_se3.__version__,
        "settings": asdict(settings),
    }
    _kept(output, head, resume)  # which refuses before a directory is made, or a lock put into one
    with alone(output):
        return _measure(subject, output, settings, measures, head, _kept(output, head, resume), progress)


def _kept(output: Path, head: dict[str, Any], resume: bool) -> dict[str, Section]:
    """The sections that the directory holds already."""
    report = output / REPORT_FILE
    if not (resume and report.exists()):
        require_empty(output)
        return {}
    previous, sections = read_report(report)
    # A report that was read back has lists where the settings have tuples.
    if (previous.get("weights_sha256"), previous.get("settings")) != (head["weights_sha256"], _listed(head["settings"])):
        raise ValueError(f"{report} is of another model or other settings; choose another output directory")
    return {s.name: s for s in sections}


def _measure(
    subject: Subject,
    output: Path,
    settings: PhysicsSettings,
    measures: Sequence[str],
    head: dict[str, Any],
    done: dict[str, Section],
    progress: Callable[[str, float], None] | None,
) -> list[Section]:
    report = output / REPORT_FILE
    # From here on the directory tells what it is of, so that it can be continued whenever it is interrupted.
    write_report(report, head, [done[m] for m in MEASURES if m in done])
    symbols = {m: starting_structure(m).get_chemical_symbols() for m in settings.molecules}
    usable = replace(settings, molecules=tuple(m for m in settings.molecules if subject.knows(symbols[m])))
    for name in (m for m in MEASURES if m in measures and m not in done):

        def show(share: float, name: str = name) -> None:
            if progress is not None:
                progress(name, share)

        show(0.0)
        begin = time.perf_counter()
        try:
            section = MEASURES[name](subject, usable, show, output)
        except NotConvergedError as error:
            section = Section(name, name, [Quantity("could not be measured", float("nan"), must=0.0)], notes=[str(error)])
        unknown = left_out(subject, symbols) if name in OF_MOLECULES else []
        done[name] = replace(section, notes=[*section.notes, *unknown], seconds=time.perf_counter() - begin)
        if section.panels:
            plot_section(section, output / f"{name}.png")
        write_report(report, head, [done[m] for m in MEASURES if m in done])
        show(1.0)
    return [done[m] for m in MEASURES if m in done]


def _listed(settings: dict[str, Any]) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}
