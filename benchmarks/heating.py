"""Heating at constant energy, of several copies of a molecule with different velocities: of one run it says little, since the energy wanders.

    python -m benchmarks heating --hydrogen-mass 1.008 3 --output heating.json

As `openmm-se3 validate --physics --measure heating`: from the minimum, with kinetic energy for 600 K, of which half becomes potential; the rate is
the slope of the total energy over the degrees of freedom, after the first tenth of the run. Printed: every copy, then their mean with its standard
error, and what the energy rose in that tenth.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.records import save, settings_of
from openmm_se3.physics.heating import after_start, heating_rate, molecule_at_constant_energy, rates_of_copies
from openmm_se3.physics.molecules import molecule_names
from openmm_se3.physics.settings import FULL
from openmm_se3.physics.subject import Subject
from openmm_se3.physics.units import BOLTZMANN
from openmm_se3.potential import FORCE_MODES

#: Means of the energy that are kept, so that a reader sees its course.
POINTS = 20


def summary(energies, degrees_of_freedom):
    """Rates, their mean, and the course of the mean energy, K per degree of freedom."""
    change = (energies.total - energies.total[:1]) / (degrees_of_freedom * BOLTZMANN)
    first = after_start(len(change)).start
    mean, error = heating_rate(energies, degrees_of_freedom)
    parts = np.array_split(np.arange(len(change)), min(POINTS, len(change)))
    return {
        "complete": energies.complete,
        "picoseconds": float(energies.time[-1]),
        "k_per_ps": [rate for rate, _ in rates_of_copies(energies, degrees_of_freedom)],
        "mean": mean,
        "standard_error": error,
        "rise_at_start_k": float(change[first : 2 * first + 1].mean()),
        "time_ps": [float(energies.time[part].mean()) for part in parts],
        "mean_change_k": [float(change[part].mean()) for part in parts],
    }


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
    torch.set_num_threads(1)
    subject = Subject(arguments.model)
    at = subject.minimum(arguments.molecule)
    settings = replace(
        FULL, nve_ps=arguments.picoseconds, nve_copies=arguments.copies, timestep_fs=arguments.timestep, mts_outer=arguments.inner_steps
    )
    results = []
    for mass in arguments.hydrogen_mass:
        run = f"{arguments.molecule}, {arguments.mode}, hydrogen {mass:g} Da"
        found = summary(molecule_at_constant_energy(subject, at, arguments.mode, settings, mass), len(at.wavenumbers))
        for k, rate in enumerate(found["k_per_ps"]):
            print(f"{run}, copy {k + 1}: {rate:+.4f} K/ps")
        ended = "" if found["complete"] else f"; a copy blew up after {found['picoseconds']:g} ps"
        print(f"{run}: {found['mean']:+.4f} +- {found['standard_error']:.4f} K/ps, {found['rise_at_start_k']:+.2f} K before{ended}", flush=True)
        results.append({"hydrogen_mass": mass, **found})
        if arguments.output:
            save(arguments.output, model=arguments.model, settings=settings_of(arguments), results=results)


if __name__ == "__main__":
    main()
