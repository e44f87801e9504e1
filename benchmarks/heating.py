"""Heating at constant energy, of several copies of a molecule with different velocities: of one run it says little, since the energy wanders.

    python -m benchmarks heating --hydrogen-mass 1.008 3 --output heating.json

As `openmm-se3 validate --physics --measure heating`: from the minimum, with kinetic energy for 600 K, of which half becomes potential; the rate is
the slope of the total energy over the degrees of freedom, after the first tenth of the run. Printed: every copy, then their mean with its standard
error, and what the energy rose in that tenth.

Copies run a few at a time, and the output is written after each few. The same command, with as many copies or more, goes on from what the output has.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.records import save, settings_of
from openmm_se3.physics.heating import after_start, molecule_at_constant_energy, rates_of_copies
from openmm_se3.physics.molecules import molecule_names
from openmm_se3.physics.settings import FULL
from openmm_se3.physics.statistics import mean_of_independent
from openmm_se3.physics.subject import Subject
from openmm_se3.physics.units import BOLTZMANN
from openmm_se3.potential import FORCE_MODES

#: Means of the energy that are kept, so that a reader sees its course.
POINTS = 20
#: Copies that run in one System.
TOGETHER = 8
#: Settings in which a measurement may differ from the one that it continues.
FREE = ("copies", "hydrogen_mass")


def summary(energies, degrees_of_freedom):
    """Rates, and the course of the mean energy, K per degree of freedom, of copies that ran together."""
    change = (energies.total - energies.total[:1]) / (degrees_of_freedom * BOLTZMANN)
    first = after_start(len(change)).start
    parts = np.array_split(np.arange(len(change)), min(POINTS, len(change)))
    return {
        "complete": energies.complete,
        "picoseconds": float(energies.time[-1]),
        "k_per_ps": [rate for rate, _ in rates_of_copies(energies, degrees_of_freedom)],
        "rise_at_start_k": float(change[first : 2 * first + 1].mean()),
        "time_ps": [float(energies.time[part].mean()) for part in parts],
        "mean_change_k": [float(change[part].mean()) for part in parts],
    }


def joined(before, more):
    """The summary of all copies from those of the complete groups before and of one more, with mean and standard error of the rates."""
    found = dict(more)
    if before is not None:
        found["k_per_ps"] = before["k_per_ps"] + more["k_per_ps"]
        copies = [len(before["k_per_ps"]), len(more["k_per_ps"])]
        for name in ("time_ps", "mean_change_k", "rise_at_start_k"):
            # Of a group that blew up the course is another stretch of time.
            found[name] = np.average([before[name], more[name]], axis=0, weights=copies).tolist() if more["complete"] else before[name]
    mean, error = mean_of_independent(found["k_per_ps"])
    return {**found, "mean": mean, "standard_error": error}


def earlier_results(path, settings):
    """What a file has of the same measurement, by the mass of hydrogen; nothing where there is none.

    Raises
    ------
    ValueError
        If the file holds another measurement.
    """
    if path is None or not path.exists():
        return {}
    record = json.loads(path.read_text())
    of_file = record.get("settings", {})
    other = [name for name in settings if name not in FREE and settings[name] != of_file.get(name)]
    if other:
        told = ", ".join(f"{name} {of_file.get(name)}, not {settings[name]}" for name in other)
        raise ValueError(f"{path} holds another measurement ({told}): give another --output, or remove it")
    return {result["hydrogen_mass"]: result for result in record["results"]}


def groups_of_copies(done, wanted):
    """First copy and number of each group that is still to run."""
    return [(first, min(TOGETHER, wanted - first)) for first in range(done, wanted, TOGETHER)]


def main():
    """Run, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="se3-ani1x", help="name or path")
    parser.add_argument("--molecule", choices=molecule_names(), default="ethanol")
    parser.add_argument("--mode", choices=FORCE_MODES, default="mts")
    parser.add_argument("--hydrogen-mass", type=float, nargs="+", default=[1.008], help="dalton; several are compared")
    parser.add_argument("--timestep", type=float, default=FULL.timestep_fs, help="femtoseconds, of the inner steps with mts")
    parser.add_argument("--inner-steps", type=int, default=FULL.mts_outer)
    parser.add_argument("--picoseconds", type=float, default=FULL.nve_ps)
    parser.add_argument("--copies", type=int, default=FULL.nve_copies, help="of the molecule, with different velocities")
    parser.add_argument("--output", type=Path, help="JSON")
    arguments = parser.parse_args()
    if arguments.copies < 2:
        parser.error(f"--copies must be at least 2 for a standard error, got {arguments.copies}")
    try:
        results = earlier_results(arguments.output, settings_of(arguments))
    except ValueError as error:
        parser.error(str(error))
    torch.set_num_threads(1)
    subject = Subject(arguments.model)
    at = subject.minimum(arguments.molecule)
    settings = replace(FULL, nve_ps=arguments.picoseconds, timestep_fs=arguments.timestep, mts_outer=arguments.inner_steps)
    for mass in arguments.hydrogen_mass:
        run = f"{arguments.molecule}, {arguments.mode}, hydrogen {mass:g} Da"
        done = results.get(mass)
        for first, count in groups_of_copies(len(done["k_per_ps"]) if done else 0, arguments.copies):
            of_group = replace(settings, nve_copies=count, seed=settings.seed + first)
            if done and not done["complete"]:
                break
            done = joined(done, summary(molecule_at_constant_energy(subject, at, arguments.mode, of_group, mass), len(at.wavenumbers)))
            results[mass] = {"hydrogen_mass": mass, **done}
            if arguments.output:
                save(arguments.output, model=arguments.model, settings=settings_of(arguments), results=list(results.values()))
            print(f"{run}: {len(done['k_per_ps'])} of {arguments.copies} copies", flush=True)
        for k, rate in enumerate(done["k_per_ps"]):
            print(f"{run}, copy {k + 1}: {rate:+.4f} K/ps")
        ended = "" if done["complete"] else f"; a copy blew up after {done['picoseconds']:g} ps"
        print(f"{run}: {done['mean']:+.4f} +- {done['standard_error']:.4f} K/ps, {done['rise_at_start_k']:+.2f} K before{ended}", flush=True)


if __name__ == "__main__":
    main()
