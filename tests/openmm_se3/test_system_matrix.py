"""Every kind of System on every platform gives the model's own numbers, in absolute tolerances.

Also: small and triclinic boxes against brute-force lattice sums, barostats, restarts, and Systems read back in a new process.
"""

import itertools
import subprocess
import sys
import warnings

import numpy as np
import openmm
import pytest
import torch
from openmm import app, unit

from openmm_se3.errors import UnsupportedSystemError
from openmm_se3.force import create_forces
from openmm_se3.installation import serialisation_mismatch
from openmm_se3.molecules import keep_molecules_whole, make_whole
from openmm_se3.structures import read_structure
from tests.openmm_se3.helpers import EXAMPLES, ROOT, energy_and_forces, ethanol, ethanol_in_classical_water, numbers, potential

PLATFORMS = ["Reference", "CPU"]
ENERGY = 1e-4  # kJ/mol
FORCE = 1e-3  # kJ/mol/nm
ORTHORHOMBIC = np.diag([1.1, 1.2, 1.3])
TRICLINIC = np.array([[1.2, 0, 0], [0.5, 1.1, 0], [-0.4, 0.5, 1.05]])


def model(positions, z, box=None):
    """Energy and conservative forces straight from the module."""
    x = torch.tensor(positions, dtype=torch.float64, requires_grad=True)
    energy = potential("conservative").model.energy(x, z, None if box is None else torch.tensor(box, dtype=torch.float64))
    return float(energy.detach()), -torch.autograd.grad([energy], [x])[0].numpy()


def in_a_box(box):
    topology, x = ethanol()
    topology.setPeriodicBoxVectors(box * unit.nanometer)
    return potential("conservative").createSystem(topology), x, *model(x, numbers(topology), box)


def vacuum():
    topology, x = ethanol()
    return potential("conservative").createSystem(topology), x, *model(x, numbers(topology))


def subset():
    topology, _, x = ethanol_in_classical_water()
    atoms = np.random.default_rng(2).permutation(9)
    system = openmm.System()
    for _ in range(12):
        system.addParticle(1.0)
    potential("conservative").addForces(topology, system, atoms.tolist())
    energy, some = model(x[atoms], numbers(topology)[atoms])
    forces = np.zeros_like(x)
    forces[atoms] = some
    return system, x, energy, forces


def mixed():
    """Expected: the classical System, less the same parameters for ethanol alone, plus the model."""
    topology, classical, x = ethanol_in_classical_water()
    alone, nonbonded, bonds = openmm.System(), openmm.NonbondedForce(), openmm.HarmonicBondForce()
    for i in range(9):
        alone.addParticle(1.0)
        nonbonded.addParticle(*classical.getForce(0).getParticleParameters(i))
        for j in range(i):
            nonbonded.addException(i, j, 0.005, 0.3, 0.0)
    bonds.addBond(0, 1, 0.15, 3e5)
    alone.addForce(nonbonded)
    alone.addForce(bonds)
    energy, forces = energy_and_forces(classical, x)
    energy_alone, forces_alone = energy_and_forces(alone, x[:9])
    energy_model, forces_model = model(x[:9], numbers(topology)[:9])
    forces[:9] += forces_model - forces_alone
    return potential("conservative").createMixedSystem(topology, classical, range(9)), x, energy - energy_alone + energy_model, forces


def interpolated():
    """At lambda 1; the test also looks at 0.3."""
    topology, classical, _ = ethanol_in_classical_water()
    return potential("conservative").createMixedSystem(topology, classical, range(9), interpolate=True), *mixed()[1:]


def four_site_water_around():
    """A four-site water, as of TIP4P, before ethanol: topology, classical System, positions; its virtual site is particle 3."""
    topology, x = ethanol()
    water = app.Topology()
    residue = water.addResidue("HOH", water.addChain())
    for name in ("O", "H1", "H2"):
        water.addAtom(name, app.Element.getBySymbol(name[0]), residue)
    water.addAtom("M", None, residue)
    where = np.array([[0, 0, 0], [0.0957, 0, 0], [-0.024, 0.0927, 0], [0, 0, 0]]) + np.array([0.7, 0.1, 0.2])
    where[3] = 0.7 * where[0] + 0.15 * where[1] + 0.15 * where[2]
    modeller = app.Modeller(water, where * unit.nanometer)
    modeller.add(topology, x * unit.nanometer)
    classical, nonbonded = openmm.System(), openmm.NonbondedForce()
    charges = [0.0, 0.5, 0.5, -1.0] + [0.1] * 9
    for atom, charge in zip(modeller.topology.atoms(), charges, strict=True):
        classical.addParticle(atom.element.mass if atom.element is not None else 0.0)
        nonbonded.addParticle(charge, 0.3, 0.4 if atom.element is not None else 0.0)
    classical.setVirtualSite(3, openmm.ThreeParticleAverageSite(0, 1, 2, 0.7, 0.15, 0.15))
    for i, j in itertools.combinations(range(4), 2):
        nonbonded.addException(i, j, 0.0, 0.3, 0.0)
    classical.addForce(nonbonded)
    return modeller.topology, classical, np.concatenate([where, x])


def virtual_site(interpolate=False):
    """Expected: the classical System, less the same parameters for ethanol alone, plus the model."""
    topology, classical, x = four_site_water_around()
    alone, nonbonded = openmm.System(), openmm.NonbondedForce()
    for i in range(4, 13):
        alone.addParticle(1.0)
        nonbonded.addParticle(*classical.getForce(0).getParticleParameters(i))
    alone.addForce(nonbonded)
    energy, forces = energy_and_forces(classical, x)
    energy_alone, forces_alone = energy_and_forces(alone, x[4:])
    energy_model, forces_model = model(x[4:], torch.tensor([a.element.atomic_number for a in topology.atoms() if a.index > 3]))
    forces[4:] += forces_model - forces_alone
    made = potential("conservative").createMixedSystem(topology, classical, range(4, 13), interpolate=interpolate)
    return made, x, energy - energy_alone + energy_model, forces


KINDS = {
    "vacuum": vacuum,
    "orthorhombic": lambda: in_a_box(ORTHORHOMBIC),
    "triclinic": lambda: in_a_box(TRICLINIC),
    "subset": subset,
    "mixed": mixed,
    "interpolated": interpolated,
    "virtual site": virtual_site,
    "virtual site, interpolated": lambda: virtual_site(True),
}


@pytest.mark.parametrize("kind", KINDS)
def test_numbers(kind):
    system, x, energy, forces = KINDS[kind]()
    for platform in PLATFORMS:
        # The CPU platform computes classical forces in single precision.
        slack = 100 if platform == "CPU" and kind not in ("vacuum", "orthorhombic", "triclinic", "subset") else 1
        got_energy, got_forces = energy_and_forces(system, x, platform)
        assert got_energy == pytest.approx(energy, abs=slack * ENERGY), platform
        np.testing.assert_allclose(got_forces, forces, atol=slack * FORCE, err_msg=platform)


def test_interpolation_is_linear():
    system, x, energy, _ = interpolated()
    _, classical, _ = ethanol_in_classical_water()
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(x)
    context.setParameter("lambda_interpolate", 0.3)
    expected = 0.3 * energy + 0.7 * energy_and_forces(classical, x)[0]
    assert context.getState(getEnergy=True).getPotentialEnergy()._value == pytest.approx(expected, abs=ENERGY)


def test_virtual_sites_in_the_information_and_refused_as_atoms():
    topology, classical, _ = four_site_water_around()
    info = potential("conservative").createMixedSystem(topology, classical, range(4, 13), returnInfo=True)
    assert [a.element for a in info["topology"].atoms()] == [a.element for a in topology.atoms()]
    assert info["system"].isVirtualSite(3)
    from openmmml import MLPotential

    with pytest.raises(UnsupportedSystemError, match=r"atoms \[3\] have no element"):
        MLPotential("se3", potential=potential("conservative")).createMixedSystem(topology, classical, [3, 4])


@pytest.mark.parametrize("interpolate", [False, True])
@pytest.mark.parametrize("platform", PLATFORMS)
def test_link_atom(platform, interpolate):
    """The methyl group of ethanol by the model, capped by a hydrogen on the bond that is cut; the rest has no classical energy."""
    topology, x = ethanol()
    z = numbers(topology).tolist()
    bonds = [(a.index, b.index) for a, b in topology.bonds()]

    def bonded(i):
        return [b if a == i else a for a, b in bonds if i in (a, b)]

    methyl = next(i for i in range(9) if z[i] == 6 and all(z[j] != 8 for j in bonded(i)))
    other = next(j for j in bonded(methyl) if z[j] == 6)
    atoms = [methyl, *(j for j in bonded(methyl) if z[j] == 1)]
    empty = openmm.System()
    for _ in range(9):
        empty.addParticle(12.0)
    cap = 0.109
    info = potential("conservative").createMixedSystem(
        topology, empty, atoms, interpolate=interpolate, returnInfo=True, linkAtomDistances=[(methyl, other, cap * unit.nanometer)]
    )
    assert list(info["oldToNew"]) == list(range(9))
    assert [a.element.atomic_number for a in info["topology"].atoms()] == [*z, 1]
    direction = (x[other] - x[methyl]) / np.linalg.norm(x[other] - x[methyl])
    whole = np.concatenate([x, [x[methyl] + cap * direction]])
    capped = [*atoms, 9]
    energy, forces = model(whole[capped], torch.tensor([*z, 1])[capped])
    context = openmm.Context(info["system"], openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName(platform))
    context.setPositions(whole)
    context.computeVirtualSites()
    state = context.getState(getEnergy=True, getForces=True, getPositions=True)
    np.testing.assert_allclose(state.getPositions(asNumpy=True)._value[9], whole[9], atol=1e-6)
    assert state.getPotentialEnergy()._value == pytest.approx(energy, abs=ENERGY)
    # The cap's force goes to both ends of the bond: x_cap = x_methyl + cap (x_other - x_methyl) / r.
    expected = np.zeros((9, 3))
    expected[atoms] = forces[:-1]
    across = cap / np.linalg.norm(x[other] - x[methyl]) * (forces[-1] - forces[-1] @ direction * direction)
    expected[methyl] += forces[-1] - across
    expected[other] += across
    np.testing.assert_allclose(state.getForces(asNumpy=True)._value[:9], expected, atol=FORCE)


def test_brute_force_lattice_sum():
    """The energy of a small triclinic cell is that of one cell deep inside a crystal.

    Blocks of a x b x c cells without periodic boundaries have an energy that is linear in each of a, b, c once opposite faces do
    not feel each other, so the mixed difference over the three is the energy of one inner cell, exactly.
    """
    metadata = potential("conservative").metadata
    box = TRICLINIC
    heights = abs(np.linalg.det(box)) / np.linalg.norm(np.cross(np.roll(box, -1, 0), np.roll(box, -2, 0)), axis=1)
    reach = int(np.ceil(metadata.n_layers * metadata.cutoff_nm / heights.min()))
    # A water in one corner, and a hydrogen molecule in the opposite one, so that they meet through the faces only.
    cell = np.array([[0.05, 0.05, 0.05], [0.14, 0.07, 0.03], [0.02, 0.13, 0.0], *([0.85, 0.9, 0.85] @ box + [[0, 0, 0], [0.0, 0.07, -0.02]])])
    z = torch.tensor([8, 1, 1, 1, 1])
    energy = 0.0
    for a, b, c in itertools.product((2 * reach, 2 * reach + 1), repeat=3):
        images = np.array(list(itertools.product(range(a), range(b), range(c)))) @ box
        block = torch.tensor((images[:, None] + cell).reshape(-1, 3))
        sign = (-1) ** (a + b + c + 3)
        with torch.no_grad():
            energy += sign * float(potential("conservative").model(block, z.repeat(len(images)))[0])
    periodic = model(cell, z, box)[0]
    assert periodic == pytest.approx(energy, abs=ENERGY)
    free = model(cell, z)[0]
    assert abs(periodic - free) > 100 * ENERGY  # the images matter


@pytest.mark.parametrize("box", [ORTHORHOMBIC, TRICLINIC], ids=["orthorhombic", "triclinic"])
def test_single_atoms_moved_by_lattice_vectors(box):
    system, x, energy, forces = in_a_box(box)
    shifts = np.random.default_rng(4).integers(-3, 4, size=x.shape) @ box
    got_energy, got_forces = energy_and_forces(system, x + shifts)
    assert got_energy == pytest.approx(energy, abs=ENERGY)
    np.testing.assert_allclose(got_forces, forces, atol=FORCE)


def two_waters():
    """Two waters in a box, with bonds; the second is cut by a face of the box."""
    topology = app.Topology()
    chain = topology.addChain()
    for _ in range(2):
        residue = topology.addResidue("HOH", chain)
        oxygen, *hydrogens = (topology.addAtom(n, app.Element.getBySymbol(n[0]), residue) for n in ("O", "H1", "H2"))
        for hydrogen in hydrogens:
            topology.addBond(oxygen, hydrogen)
    topology.setPeriodicBoxVectors(TRICLINIC * 1.1 * unit.nanometer)
    water = np.array([[0, 0, 0], [0.0957, 0, 0], [-0.024, 0.0927, 0]])
    x = np.concatenate([water + 0.3, water + np.array([0.3, 0.3, 0.6])])
    return topology, x


class TestBarostats:
    @pytest.mark.parametrize("kind", ["isotropic", "anisotropic"])
    @pytest.mark.parametrize("platform", PLATFORMS)
    def test_energy_belongs_to_the_scaled_box(self, kind, platform):
        topology, x = two_waters()
        system = potential("direct").createSystem(topology)
        keep_molecules_whole(topology, system)
        if kind == "isotropic":
            barostat = openmm.MonteCarloBarostat(1 * unit.bar, 300 * unit.kelvin, 1)
        else:
            barostat = openmm.MonteCarloAnisotropicBarostat(openmm.Vec3(1, 1, 1) * unit.bar, 300 * unit.kelvin, True, True, False, 1)
        barostat.setRandomNumberSeed(3)
        system.addForce(barostat)
        integrator = openmm.LangevinMiddleIntegrator(300 * unit.kelvin, 10 / unit.picosecond, 0.5 * unit.femtosecond)
        integrator.setRandomNumberSeed(3)
        context = openmm.Context(system, integrator, openmm.Platform.getPlatformByName(platform))
        context.setPositions(x)
        integrator.step(20)
        state = context.getState(getPositions=True, getEnergy=True)
        box = state.getPeriodicBoxVectors(asNumpy=True)._value
        assert abs(np.linalg.det(box) / np.linalg.det(TRICLINIC * 1.1) - 1) > 1e-3  # it moved
        expected = model(state.getPositions(asNumpy=True)._value, numbers(topology), box)[0]
        assert state.getPotentialEnergy()._value == pytest.approx(expected, abs=ENERGY)

    def test_atoms_are_molecules_unless_told(self):
        """What the helper changes: the molecules, not the forces; and what a change of volume costs with and without it."""
        topology, x = two_waters()
        plain, told = (potential("conservative").createSystem(topology) for _ in range(2))
        keep_molecules_whole(topology, told)
        contexts = [openmm.Context(s, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference")) for s in (plain, told)]
        assert [len(c.getMolecules()) for c in contexts] == [6, 2]
        for context in contexts:
            context.setPositions(x)
        a, b = (c.getState(getForces=True, getEnergy=True) for c in contexts)
        assert a.getPotentialEnergy() == b.getPotentialEnergy()
        np.testing.assert_array_equal(a.getForces(asNumpy=True)._value, b.getForces(asNumpy=True)._value)
        scale = 1.1
        centres = x.reshape(2, 3, 3).mean(1, keepdims=True)
        by_molecule = (x.reshape(2, 3, 3) + (scale - 1) * centres).reshape(-1, 3)
        z, box = numbers(topology), TRICLINIC * 1.1 * scale
        start = model(x, z, TRICLINIC * 1.1)[0]
        assert abs(model(x * scale, z, box)[0] - start) > 5 * abs(model(by_molecule, z, box)[0] - start)

    def test_molecules_that_a_face_cuts(self):
        topology, x = two_waters()
        box = TRICLINIC * 1.1
        cut = x + np.array([[0, 0, 0], [1, 0, 0], [0, -1, 1], [0, 0, 0], [0, 2, 0], [-1, 0, 0]]) @ box
        whole = make_whole(topology, cut)
        np.testing.assert_allclose(whole, x, atol=1e-12)
        np.testing.assert_allclose(make_whole(topology, (10 * cut) * unit.angstrom), x, atol=1e-12)

    def test_caps_of_a_mixed_system_belong_to_no_molecule(self):
        topology, _ = two_waters()
        system = openmm.System()
        for _ in range(6):
            system.addParticle(1.0)
        system.addParticle(0.0)
        with pytest.raises(UnsupportedSystemError, match="6 atoms, but the System has 7"):
            keep_molecules_whole(topology, system)
        system.setVirtualSite(6, openmm.TwoParticleAverageSite(0, 1, 0.5, 0.5))
        assert keep_molecules_whole(topology, system).getNumBonds() == 4

    def test_refusals(self):
        topology, _ = two_waters()
        with pytest.raises(UnsupportedSystemError, match="6 atoms, but the System has 0"):
            keep_molecules_whole(topology, openmm.System())
        with pytest.raises(UnsupportedSystemError, match="no bonds"):
            keep_molecules_whole(app.Topology(), openmm.System())
        topology.addAtom("H", app.element.hydrogen, topology.addResidue("LIG", topology.addChain()))
        with pytest.raises(UnsupportedSystemError, match="1 hydrogens have no bonds in the topology, the first of them atom 6"):
            keep_molecules_whole(topology, openmm.System())
        with pytest.raises(UnsupportedSystemError, match="no periodic box"):
            make_whole(ethanol()[0], ethanol()[1])


@pytest.mark.parametrize("platform", PLATFORMS)
def test_restart_from_a_checkpoint_equals_the_uninterrupted_run(platform):
    topology, x = ethanol()
    system = potential("direct").createSystem(topology)
    ends, checkpoint, xml = [], b"", ""
    for start in ("whole", "checkpoint", "state"):
        integrator = openmm.VerletIntegrator(0.5 * unit.femtosecond)
        context = openmm.Context(system, integrator, openmm.Platform.getPlatformByName(platform))
        if start == "whole":
            context.setPositions(x)
            context.setVelocitiesToTemperature(300, 5)
            integrator.step(10)
            checkpoint = context.createCheckpoint()
            xml = openmm.XmlSerializer.serialize(context.getState(getPositions=True, getVelocities=True))
        elif start == "checkpoint":
            context.loadCheckpoint(checkpoint)
        else:
            context.setState(openmm.XmlSerializer.deserialize(xml))
        integrator.step(10)
        ends.append(context.getState(getPositions=True).getPositions(asNumpy=True)._value)
    np.testing.assert_allclose(ends[1], ends[0], atol=1e-9)
    np.testing.assert_allclose(ends[2], ends[0], atol=1e-9)


READ = """
import sys
class Wall:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ImportError(f"the wall: {{name}}")
sys.meta_path.insert(0, Wall())
import numpy, openmm
{imports}
system = openmm.XmlSerializer.deserialize(open("system.xml").read())
positions = numpy.load("positions.npy")
for platform in {platforms!r}:
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName(platform))
    context.setPositions(positions)
    state = context.getState(getEnergy=True, getForces=True)
    forces = state.getForces(asNumpy=True)._value
    print(state.getPotentialEnergy()._value, *forces.ravel())
"""


@pytest.mark.parametrize("backend", ["TorchForce", "PythonForce"])
def test_system_xml_in_a_new_process(backend, tmp_path):
    """A TorchForce needs openmm and openmmtorch alone; a PythonForce pickles a function of this package."""
    if backend == "TorchForce" and serialisation_mismatch() is not None:
        pytest.skip(serialisation_mismatch())
    topology, x = ethanol()
    topology.setPeriodicBoxVectors(TRICLINIC * unit.nanometer)
    system = openmm.System()
    system.setDefaultPeriodicBoxVectors(*topology.getPeriodicBoxVectors())
    for _ in range(9):
        system.addParticle(1.0)
    se3 = potential("mts")
    for force in create_forces(se3.model, se3.metadata, numbers(topology).tolist(), range(9), 9, True, "mts", 0, backend=backend):
        system.addForce(force)
    (tmp_path / "system.xml").write_text(openmm.XmlSerializer.serialize(system))
    np.save(tmp_path / "positions.npy", x)
    blocked = ("openmmml", "training", "e3nn", "ase", *(("openmm_se3",) if backend == "TorchForce" else ("openmmtorch",)))
    imports = "import openmmtorch" if backend == "TorchForce" else ""
    program = READ.format(blocked=blocked, imports=imports, platforms=PLATFORMS)
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": ""}
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", program], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    energy, forces = energy_and_forces(system, x)
    for line in result.stdout.splitlines()[-2:]:
        got = np.array([float(v) for v in line.split()])
        assert got[0] == pytest.approx(energy, abs=ENERGY)
        np.testing.assert_allclose(got[1:].reshape(-1, 3), forces, atol=FORCE)


def two_waters_with_sites(name):
    """Two waters of a force field with virtual sites, 0.29 nm apart: topology, classical System, positions."""
    water, x = read_structure(EXAMPLES / "water.xyz")
    modeller = app.Modeller(water, x * unit.nanometer)
    modeller.add(water, (x + np.array([0.29, 0, 0])) * unit.nanometer)
    field = app.ForceField(f"{name}.xml")
    modeller.addExtraParticles(field)
    return modeller.topology, field.createSystem(modeller.topology, removeCMMotion=False), np.array(modeller.positions.value_in_unit(unit.nanometer))


@pytest.mark.parametrize("name", ["tip4pew", "tip5p"])
def test_sites_of_the_models_atoms_interact_classically_no_more(name):
    """They would go on to attract each other, charges without a hull: the molecules fuse."""
    topology, classical, x = two_waters_with_sites(name)
    atoms = [a.index for a in topology.atoms() if a.element is not None]
    z = torch.tensor([8, 1, 1])
    system = potential("conservative").createMixedSystem(topology, classical, atoms)
    energy, forces = energy_and_forces(system, x)
    expected = model(x[atoms], torch.cat([z, z]))
    assert energy == pytest.approx(expected[0], abs=ENERGY)
    np.testing.assert_allclose(forces[atoms], expected[1], atol=FORCE)
    # One of the two by the model: its sites still meet the other water, and of the classical energy its own part is gone.
    half = potential("conservative").createMixedSystem(topology, classical, atoms[:3])
    apart = x.copy()
    apart[len(x) // 2 :, 0] += 1e3
    own = energy_and_forces(classical, apart)[0] / 2
    assert energy_and_forces(half, x)[0] == pytest.approx(energy_and_forces(classical, x)[0] - own + model(x[atoms[:3]], z)[0], abs=1e-3)


def test_drude_particles_of_the_models_atoms_are_refused():
    topology, _ = ethanol()
    classical, drude = openmm.System(), openmm.DrudeForce()
    for atom in topology.atoms():
        classical.addParticle(atom.element.mass)
    residue = next(topology.residues())
    topology.addAtom("D", None, residue)
    classical.addParticle(0.4)
    drude.addParticle(9, 2, -1, -1, -1, -1.0, 0.001, 1, 1)
    classical.addForce(drude)
    with pytest.raises(UnsupportedSystemError, match=r"atoms \[2\] have Drude particles"):
        potential("direct").createMixedSystem(topology, classical, range(9))


def test_forces_that_would_stay_between_the_models_atoms_are_refused():
    topology, _ = ethanol()
    classical, polarisable = openmm.System(), openmm.AmoebaVdwForce()
    for atom in topology.atoms():
        classical.addParticle(atom.element.mass)
    classical.addForce(polarisable)
    with pytest.raises(UnsupportedSystemError, match="AmoebaVdwForce would go on to act between the atoms of the model"):
        potential("direct").createMixedSystem(topology, classical, range(9))


def test_cut_bonds_in_implicit_solvent_are_refused():
    pdb = app.PDBFile(str(EXAMPLES / "alanine_dipeptide_residues.pdb"))
    classical = app.ForceField("amber14-all.xml", "implicit/obc2.xml").createSystem(pdb.topology)
    members = [a.index for a in pdb.topology.atoms() if a.residue.name == "ALA"]
    with pytest.raises(UnsupportedSystemError, match="the implicit solvent of the System has no parameters"):
        potential("direct").createMixedSystem(pdb.topology, classical, members)
    whole = potential("direct").createMixedSystem(pdb.topology, classical, range(pdb.topology.getNumAtoms()))
    openmm.Context(whole, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference"))


def test_interpolation_knows_the_box_of_the_system():
    """Where the topology has none: atoms on either side of a face are neighbours then too."""
    topology, classical, x = ethanol_in_classical_water()
    box = np.eye(3) * 2.0
    classical.setDefaultPeriodicBoxVectors(*box)
    classical.getForce(0).setNonbondedMethod(openmm.NonbondedForce.CutoffPeriodic)
    topology.setPeriodicBoxVectors(None)
    system = potential("direct").createMixedSystem(topology, classical, range(9), interpolate=True)
    assert all(f.usesPeriodicBoundaryConditions() for f in system.getForces() if f.getName().startswith("SE3Force"))
    moved = x.copy()
    moved[4] += box[0]
    assert energy_and_forces(system, moved)[0] == pytest.approx(energy_and_forces(system, x)[0], abs=1e-3)
    topology.setPeriodicBoxVectors(2 * box * unit.nanometer)
    with pytest.warns(UserWarning, match="the topology's periodic box has a diagonal of"):
        potential("direct").createMixedSystem(topology, classical, range(9), interpolate=True)


def test_interpolation_warns_of_bonds_that_are_constraints():
    topology, classical, _ = ethanol_in_classical_water()
    bonds = openmm.HarmonicBondForce()
    pairs = [(a.index, b.index) for a, b in topology.bonds() if max(a.index, b.index) < 9]
    *strong, loose = pairs
    for first, second in strong:
        bonds.addBond(first, second, 0.1, 1e5)
    classical.addForce(bonds)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*are constraints")
        potential("direct").createMixedSystem(topology, classical, range(9), interpolate=True)
        for pair in strong:  # flexible: with bonds of their own
            classical.addConstraint(*pair, 0.1)
        potential("direct").createMixedSystem(topology, classical, range(9), interpolate=True)
    classical.addConstraint(*loose, 0.1)
    with pytest.warns(UserWarning, match=rf"1 bonds .* are constraints .* atoms {loose[0]} and {loose[1]}, which openmm-ml removes"):
        potential("direct").createMixedSystem(topology, classical, range(9), interpolate=True)


def test_classical_forces_are_in_the_group_of_the_inner_steps():
    topology, classical, _ = ethanol_in_classical_water()
    with pytest.raises(ValueError, match="with forces='mts' forceGroup must be 0, got 2: the classical forces are in group 0"):
        potential("mts").createMixedSystem(topology, classical, range(9), forceGroup=2)


def test_caps_of_cut_bonds_need_no_bonds_of_their_own():
    topology, classical, _ = ethanol_in_classical_water()
    first = next(a.index for a in topology.atoms() if a.element.symbol == "C")
    hydrogens = [b.index if a.index == first else a.index for a, b in topology.bonds() if first in (a.index, b.index)]
    hydrogens = [i for i in hydrogens if list(topology.atoms())[i].element.symbol == "H"]
    info = potential("direct").createMixedSystem(topology, classical, [first, *hydrogens], returnInfo=True)
    assert info["topology"].getNumAtoms() > topology.getNumAtoms()
    atoms = list(info["topology"].atoms())
    for hydrogen in (10, 11):  # of the water, which has no bonds there
        info["topology"].addBond(atoms[9], atoms[hydrogen])
    keep_molecules_whole(info["topology"], info["system"])
    context = openmm.Context(info["system"], openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference"))
    assert sorted(map(len, context.getMolecules()))[-1] >= 9


@pytest.mark.parametrize(("atoms", "message"), [([True, False], "a mask of bools"), ([1.7, 2.2], r"must be indices, got 1\.7"), (["1"], "got '1'")])
def test_atoms_that_are_no_indices(atoms, message):
    with pytest.raises(TypeError, match=message):
        potential("direct").addForces(ethanol()[0], potential("direct").createSystem(ethanol()[0]), atoms)
