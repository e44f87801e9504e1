"""Stable dynamics: the thesis' failing case and beyond; prints one line per trajectory, writes JSON.

    python -m benchmarks stability --model se3-ani1x --output stability.json

- water, at the model's minimum, zero velocity: 10,000 NVE steps of 0.5 fs with the direct forces (the thesis' molecule flew
  apart within a few hundred steps), then 1 ns of Langevin dynamics at 300 K: every O-H bond must stay within 0.8 to 1.25 Angstrom;
- ethanol and alanine dipeptide, 100 ps at 300 K: every bond within 25% of its length at the minimum, energy finite.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import openmm
from openmm import unit

from benchmarks.records import save
from openmm_se3 import SE3Potential
from openmm_se3.masses import kinetic_energy_of_centre, masses_of
from openmm_se3.simulate import minimize
from openmm_se3.simulation_settings import SimulationSettings
from openmm_se3.structures import read_structure

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name, structure, model, forces, ensemble, temperature, timestep, steps, friction=10.0, every=20, seed=1):
    """One trajectory; returns what was seen of bonds, temperature and energy."""
    topology, positions = read_structure(EXAMPLES / structure)
    positions = minimize(topology, positions, SimulationSettings(structure=structure, model=model, forces=forces))
    system = SE3Potential(model, forces=forces).createSystem(topology, removeCMMotion=ensemble == "nvt")
    if ensemble == "nve":
        integrator = openmm.VerletIntegrator(timestep * unit.femtosecond)
    else:
        integrator = openmm.LangevinMiddleIntegrator(temperature * unit.kelvin, friction / unit.picosecond, timestep * unit.femtosecond)
        integrator.setRandomNumberSeed(seed)
    context = openmm.Context(system, integrator, openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(positions)
    if temperature > 0:
        context.setVelocitiesToTemperature(temperature * unit.kelvin, seed)
    masses = masses_of(system)
    pairs = np.array([(bond.atom1.index, bond.atom2.index) for bond in topology.bonds()])
    start = np.linalg.norm(positions[pairs[:, 0]] - positions[pairs[:, 1]], axis=1)
    lowest, highest = np.full(len(pairs), np.inf), np.zeros(len(pairs))
    kinetic, potential = [], []
    begin, last = time.perf_counter(), 0.0
    for k in range(steps // every):
        integrator.step(every)
        state = context.getState(getPositions=True, getEnergy=True, getVelocities=True)
        x = state.getPositions(asNumpy=True).value_in_unit(unit.nanometer)
        length = np.linalg.norm(x[pairs[:, 0]] - x[pairs[:, 1]], axis=1)
        lowest, highest = np.minimum(lowest, length), np.maximum(highest, length)
        kinetic.append(state.getKineticEnergy().value_in_unit(unit.kilojoule_per_mole))
        if ensemble == "nvt":
            kinetic[-1] -= kinetic_energy_of_centre(state, masses)
        potential.append(state.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole))
        done = (k + 1) * every * timestep * 1e-3
        if done - last >= 10.0:
            last = done
            print(f"  {name}: {done:.0f} ps so far, bonds {10 * lowest.min():.3f} to {10 * highest.max():.3f} A", flush=True)
    elapsed = time.perf_counter() - begin
    freedom = 3 * len(x) - (3 if ensemble == "nvt" else 0)
    gas = unit.MOLAR_GAS_CONSTANT_R.value_in_unit(unit.kilojoule_per_mole / unit.kelvin)
    result = {
        "trajectory": name,
        "forces": forces,
        "ensemble": ensemble,
        "timestep_fs": timestep,
        "friction_per_ps": friction if ensemble == "nvt" else None,
        "steps": steps,
        "picoseconds": steps * timestep * 1e-3,
        "checked_every_steps": every,
        "bonds": len(pairs),
        "shortest_bond_angstrom": float(lowest.min() * 10),
        "longest_bond_angstrom": float(highest.max() * 10),
        "largest_relative_change_of_a_bond": float(np.maximum(highest / start - 1, 1 - lowest / start).max()),
        "energy_finite": bool(np.isfinite(potential).all()),
        "mean_temperature_k": float(2 * np.mean(kinetic) / freedom / gas),
        "final_temperature_k": float(2 * np.mean(kinetic[-len(kinetic) // 10 :]) / freedom / gas),
        "ms_per_step": elapsed / steps * 1e3,
    }
    print(
        f"{name:28s} {result['picoseconds']:8.1f} ps  bonds {result['shortest_bond_angstrom']:.3f} to {result['longest_bond_angstrom']:.3f} A  "
        f"change at most {100 * result['largest_relative_change_of_a_bond']:.1f}%  mean T {result['mean_temperature_k']:.1f} K  "
        f"{result['ms_per_step']:.2f} ms/step",
        flush=True,
    )
    return result


def main():
    """Run the chosen trajectories."""
    cases = {
        "water-nve": ("water, NVE from rest", "water.xyz", "direct", "nve", 0.0, 0.5, 10_000),
        "water-nve-conservative": ("water, NVE conservative", "water.xyz", "conservative", "nve", 0.0, 0.5, 10_000),
        "water-langevin": ("water, Langevin 300 K", "water.xyz", "direct", "nvt", 300.0, 0.5, 2_000_000),
        "ethanol": ("ethanol, Langevin 300 K", "ethanol.sdf", "direct", "nvt", 300.0, 0.5, 200_000),
        "alanine-dipeptide": ("alanine dipeptide, 300 K", "alanine_dipeptide.pdb", "direct", "nvt", 300.0, 0.5, 200_000),
    }
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="se3-ani1x")
    parser.add_argument("--case", choices=cases, action="append", help="by default all")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--timestep", type=float, help="femtoseconds; the simulated time stays the same")
    parser.add_argument("--friction", type=float, default=10.0, help="of the Langevin thermostat, 1/ps")
    arguments = parser.parse_args()
    results = []
    for case in arguments.case or cases:
        name, structure, forces, ensemble, temperature, timestep, steps = cases[case]
        if arguments.timestep:
            steps, timestep = round(steps * timestep / arguments.timestep), arguments.timestep
        results.append(run(name, structure, arguments.model, forces, ensemble, temperature, timestep, steps, arguments.friction))
        if arguments.output:
            save(arguments.output, model=arguments.model, results=results)


if __name__ == "__main__":
    main()
