"""Masses of particles, and heavier hydrogens: slower vibrations, and so longer steps, for the same free energies."""

from typing import Any

import numpy as np
import openmm
from openmm import app, unit

from openmm_se3.errors import UnsupportedSystemError


def masses_of(system: openmm.System) -> np.ndarray:
    """Masses of all particles, ``(n_particles,)`` dalton."""
    return np.array([system.getParticleMass(i).value_in_unit(unit.dalton) for i in range(system.getNumParticles())])


def kinetic_energy_of_centre(state: openmm.State, masses: np.ndarray) -> float:
    """Kinetic energy of the centre of mass, kJ/mol.

    A thermostat adds it in every step, and CMMotionRemover takes it away at the start of the next, so it belongs to no temperature that leaves the
    centre's degrees of freedom out.

    Parameters
    ----------
    state : openmm.State
        With velocities.
    masses : ndarray
        ``(n_particles,)`` dalton.
    """
    momentum = masses @ state.getVelocities(asNumpy=True).value_in_unit(unit.nanometer / unit.picosecond)
    return float(momentum @ momentum) / (2 * float(masses.sum()))


def repartition_hydrogen_mass(topology: app.Topology, system: openmm.System, hydrogenMass: Any) -> None:
    """Give hydrogens another mass and take the difference from the atoms they are bonded to, so that no molecule changes its own.

    Averages over positions do not depend on masses; vibrations and rates of motion do. It is what ``hydrogenMass`` of
    ``openmm.app.ForceField.createSystem`` does. Hydrogens bonded to hydrogens alone keep their mass.

    Parameters
    ----------
    topology : openmm.app.Topology
        With the bonds.
    system : openmm.System
        Of the same atoms; its masses are changed.
    hydrogenMass : openmm.unit.Quantity or float
        Of each hydrogen; dalton if it has no unit.

    Raises
    ------
    UnsupportedSystemError
        If a hydrogen has no bonds: the topology then does not tell from which atom to take the mass.
    ValueError
        If `hydrogenMass` is not positive, or takes all the mass of an atom.

    References
    ----------
    K. A. Feenstra, B. Hess, H. J. C. Berendsen, J. Comput. Chem. 20, 786 (1999).
    """
    wanted = float(hydrogenMass.value_in_unit(unit.dalton) if unit.is_quantity(hydrogenMass) else hydrogenMass)
    if not wanted > 0:
        raise ValueError(f"hydrogenMass must be positive (dalton), got {wanted:g}")
    masses = masses_of(system)
    hydrogens = {a.index for a in topology.atoms() if a.element == app.element.hydrogen}
    bonded: set[int] = set()
    for pair in topology.bonds():
        ends = {atom.index for atom in pair}
        bonded |= ends
        if len(ends & hydrogens) == 1:
            ((hydrogen,), (other,)) = (ends & hydrogens, ends - hydrogens)
            masses[other] -= wanted - masses[hydrogen]
            masses[hydrogen] = wanted
    if hydrogens - bonded:
        raise UnsupportedSystemError(
            f"hydrogenMass needs bonds, but {len(hydrogens - bonded)} hydrogens have none in the topology, the first of them atom "
            f"{min(hydrogens - bonded)}; add them (Topology.addBond, CONECT records, an SDF file) or leave out hydrogenMass"
        )
    for atom in topology.atoms():
        if masses[atom.index] <= 0 and atom.index in bonded:
            raise ValueError(
                f"hydrogenMass of {wanted:g} leaves atom {atom.index} ({atom.element.symbol}) a mass of {masses[atom.index]:.3f} dalton; "
                "choose a smaller one"
            )
    for i, mass in enumerate(masses):
        system.setParticleMass(i, mass)
