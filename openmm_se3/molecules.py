"""What a System of ML atoms does not tell OpenMM by itself: which atoms are one molecule, for barostats and trajectories."""

from typing import Any

import numpy as np
import openmm
from openmm import app, unit

from openmm_se3.checks import in_nanometers
from openmm_se3.errors import UnsupportedSystemError


def keep_molecules_whole(topology: app.Topology, system: openmm.System) -> openmm.HarmonicBondForce:
    """Tell OpenMM the molecules of a System, by bonds without strength along those of the topology.

    OpenMM takes atoms for one molecule if a bonded force or a constraint connects them. The model has none, so by itself every atom
    is a molecule: a Monte Carlo barostat then scales all atomic coordinates. That samples the right ensemble, but each move stretches
    or squeezes every covalent bond, so it is accepted for minute changes of volume only, and the box relaxes slowly. With the bonds
    it moves molecules as a whole, as with a force field, and trajectories are wrapped by molecule. (`setScaleMoleculesAsRigid` has no
    effect where every atom is a molecule of its own.)

    Energies, forces and dynamics at constant volume do not change. Do not use it where bonds run through the whole box (a covalent
    crystal), nor where they are to break: what is bonded in `topology` is moved together for ever.

    Parameters
    ----------
    topology : openmm.app.Topology
        With the bonds. ``Topology.createStandardBonds`` makes those of standard residues; SDF, CONECT records and
        `openmm_se3.structures.read_structure` bring others. Positions must have each molecule in one piece: see `make_whole`.
    system : openmm.System
        The force is added to it. Of a mixed System that which ``createMixedSystem`` made, which keeps no bonds among the atoms of the model.

    Returns
    -------
    openmm.HarmonicBondForce
        The added force.

    Raises
    ------
    UnsupportedSystemError
        If the topology has no bonds, or none for some hydrogens, or other atoms than the System (virtual sites that follow them in the System, as
        the caps of a mixed System do, belong to none).

    Examples
    --------
    >>> system = SE3Potential("se3-ani1x").createSystem(topology)  # doctest: +SKIP
    >>> keep_molecules_whole(topology, system)  # doctest: +SKIP
    >>> system.addForce(openmm.MonteCarloBarostat(1 * unit.bar, 300 * unit.kelvin))  # doctest: +SKIP
    """
    if topology.getNumBonds() == 0:
        raise UnsupportedSystemError("the topology has no bonds, so it does not tell the molecules; add them, or call createStandardBonds")
    bonded = {atom.index for bond in topology.bonds() for atom in bond}
    loose = [a.index for a in topology.atoms() if a.element is not None and a.element.atomic_number == 1 and a.index not in bonded]
    # The caps of a mixed System are hydrogens of its topology, on virtual sites.
    loose = [i for i in loose if i >= system.getNumParticles() or not system.isVirtualSite(i)]
    if loose:
        raise UnsupportedSystemError(
            f"{len(loose)} hydrogens have no bonds in the topology, the first of them atom {loose[0]}, so it does not tell all molecules; add them "
            "(Topology.addBond, CONECT records), or read the file by openmm_se3.structures.read_structure, which finds them by distance"
        )
    n_atoms, n_particles = topology.getNumAtoms(), system.getNumParticles()
    if n_atoms > n_particles or not all(system.isVirtualSite(i) for i in range(n_atoms, n_particles)):
        raise UnsupportedSystemError(f"the topology has {n_atoms} atoms, but the System has {n_particles} particles")
    force = openmm.HarmonicBondForce()
    force.setName("Molecules (bonds without strength)")
    force.setUsesPeriodicBoundaryConditions(system.usesPeriodicBoundaryConditions())
    for first, second in topology.bonds():
        force.addBond(first.index, second.index, 0.1, 0.0)
    system.addForce(force)
    return force


def make_whole(topology: app.Topology, positions: Any) -> np.ndarray:
    """Put molecules that the faces of the box cut into one piece.

    Parameters
    ----------
    topology : openmm.app.Topology
        Bonds and periodic box.
    positions : ndarray, sequence of openmm.Vec3, or openmm.unit.Quantity of either
        ``(n_atoms, 3)``; nm if they have no unit.

    Returns
    -------
    ndarray
        ``(n_atoms, 3)`` nm, each atom at that lattice image which is nearest to the atom it is bonded to.

    Raises
    ------
    UnsupportedSystemError
        If the topology has no box.
    ValueError
        If `positions` are not as many as the atoms.
    """
    vectors = topology.getPeriodicBoxVectors()
    if vectors is None:
        raise UnsupportedSystemError("the topology has no periodic box, so there is nothing that cuts molecules")
    box = np.array(vectors.value_in_unit(unit.nanometer))
    bonded: list[list[int]] = [[] for _ in range(topology.getNumAtoms())]
    for first, second in topology.bonds():
        bonded[first.index].append(second.index)
        bonded[second.index].append(first.index)
    whole = in_nanometers(positions, topology.getNumAtoms())
    seen = np.zeros(len(whole), dtype=bool)
    for start in range(len(whole)):
        stack = [start] if not seen[start] else []
        seen[start] = True
        while stack:
            here = stack.pop()
            for other in bonded[here]:
                if seen[other]:
                    continue
                seen[other] = True
                displacement = whole[other] - whole[here]
                for row in (2, 1, 0):  # OpenMM's reduced form: from the last vector to the first
                    displacement -= np.round(displacement[row] / box[row, row]) * box[row]
                whole[other] = whole[here] + displacement
                stack.append(other)
    return whole
