"""Heating at constant energy, over several draws of velocities: of one short run it says little, since the energy wanders.

    python -m benchmarks heating --hydrogen-mass 1.008 3 --seeds 6 --output heating.json

As `openmm-se3 validate --physics --measure heating`: from the minimum, with kinetic energy for 600 K, of which half becomes potential; the rate is
the slope of the total energy over the degrees of freedom. Printed: each run, then the mean of the runs with its standard error.
"""

import argparse
import statistics
from pathlib import Path

import numpy as np
import torch
from openmm import unit

from benchmarks.records import save, settings_of
from openmm_se3.binding import MULTIPLE_TIME_STEPS
from openmm_se3.physics.dynamics import run, velocities
from openmm_se3.physics.heating import SAMPLE_FS, heating_rate, nve_integrator
from openmm_se3.physics.molecules import molecule_names
from openmm_se3.physics.subject import Subject
from openmm_se3.potential import FORCE_MODES, SE3Potential
from openmm_se3.structures import topology_of


def heating(potential, topology, at, hydrogen_mass, timestep_fs, inner_steps, picoseconds, seed):
    """K/ps of one run, and whether it reached its end."""
    system = potential.createSystem(topology, removeCMMotion=False, hydrogenMass=hydrogen_mass)
    masses = np.array([system.getParticleMass(i).value_in_unit(unit.dalton) for i in range(system.getNumParticles())])
    start = velocities(at.positions_nm, masses, 600.0, seed, internal=True)
    integrator = nve_integrator(potential.forces, timestep_fs, inner_steps)
    step = timestep_fs * (inner_steps if potential.forces in MULTIPLE_TIME_STEPS else 1)
    trace = run(system, integrator, at.positions_nm, start, picoseconds, sample_fs=max(SAMPLE_FS, step))
    return heating_rate(trace, len(at.wavenumbers))[0], trace.complete


def main():
    """Run, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="se3-ani1x", help="name or path")
    parser.add_argument("--molecule", choices=molecule_names(), default="ethanol")
    parser.add_argument("--mode", choices=FORCE_MODES, default="mts")
    parser.add_argument("--hydrogen-mass", type=float, nargs="+", default=[1.008], help="dalton; several are compared")
    parser.add_argument("--timestep", type=float, default=0.5, help="femtoseconds, of the inner steps with mts")
    parser.add_argument("--inner-steps", type=int, default=4)
    parser.add_argument("--picoseconds", type=float, default=10.0)
    parser.add_argument("--seeds", type=int, default=5, help="how many draws of velocities")
    parser.add_argument("--output", type=Path, help="JSON")
    arguments = parser.parse_args()
    if arguments.seeds < 2:
        parser.error(f"--seeds must be at least 2 for a standard error, got {arguments.seeds}")
    torch.set_num_threads(1)
    subject = Subject(arguments.model)
    at = subject.minimum(arguments.molecule)
    topology = topology_of(at.atoms)
    potential = SE3Potential(subject.model, forces=arguments.mode)
    results = []
    for mass in arguments.hydrogen_mass:
        rates = []
        for seed in range(1, arguments.seeds + 1):
            rate, complete = heating(potential, topology, at, mass, arguments.timestep, arguments.inner_steps, arguments.picoseconds, seed)
            print(f"hydrogen {mass:g} Da, seed {seed}: {rate:+.4f} K/ps{'' if complete else ', blew up'}", flush=True)
            rates.append(rate)
        mean, error = statistics.mean(rates), statistics.stdev(rates) / len(rates) ** 0.5
        print(f"{arguments.molecule}, {arguments.mode}, hydrogen {mass:g} Da: {mean:+.4f} +- {error:.4f} K/ps, mean of {len(rates)} runs", flush=True)
        results.append({"hydrogen_mass": mass, "k_per_ps": rates, "mean": mean, "standard_error": error})
        if arguments.output:
            save(arguments.output, model=arguments.model, settings=settings_of(arguments), results=results)


if __name__ == "__main__":
    main()
