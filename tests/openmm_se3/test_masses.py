"""Heavier hydrogens: the masses that OpenMM's force fields would give, in Systems of the model and in simulations."""

import io
import json
from dataclasses import replace

import openmm
import pytest
from openmm import app, unit

from openmm_se3.errors import UnsupportedSystemError
from openmm_se3.masses import repartition_hydrogen_mass
from openmm_se3.simulate import simulate
from openmm_se3.simulation_settings import SimulationSettings
from openmm_se3.structures import read_structure
from tests.openmm_se3.helpers import EXAMPLES, MODEL, ethanol, potential


def masses(system):
    return [system.getParticleMass(i).value_in_unit(unit.dalton) for i in range(system.getNumParticles())]


def own_masses(topology):
    system = openmm.System()
    for atom in topology.atoms():
        system.addParticle(atom.element.mass)
    return system


def force_field(topology):
    """One that knows the residue of `topology`, and no interactions."""
    types = "".join(
        f'<Type name="{e.symbol}" class="{e.symbol}" element="{e.symbol}" mass="{e.mass.value_in_unit(unit.dalton)}"/>'
        for e in {a.element for a in topology.atoms()}
    )
    atoms = "".join(f'<Atom name="{a.name}" type="{a.element.symbol}"/>' for a in topology.atoms())
    bonds = "".join(f'<Bond atomName1="{b[0].name}" atomName2="{b[1].name}"/>' for b in topology.bonds())
    template = f'<Residues><Residue name="X">{atoms}{bonds}</Residue></Residues>'
    return app.ForceField(io.StringIO(f"<ForceField><AtomTypes>{types}</AtomTypes>{template}</ForceField>"))


@pytest.mark.parametrize("mass", [3.0, 3.0 * unit.dalton, 3.0 * unit.gram / unit.mole])
@pytest.mark.parametrize("structure", ["ethanol.sdf", "alanine_dipeptide.pdb"])
def test_as_a_force_field_does_it(structure, mass):
    topology, _ = read_structure(EXAMPLES / structure)
    expected = force_field(topology).createSystem(topology, hydrogenMass=3.0)
    made, own = potential("direct").createSystem(topology, hydrogenMass=mass), potential("direct").createSystem(topology)
    assert masses(made) == pytest.approx(masses(expected))
    assert masses(made).count(3.0) == sum(a.element == app.element.hydrogen for a in topology.atoms())
    assert sum(masses(made)) == pytest.approx(sum(masses(own)))


def test_hydrogens_bonded_to_hydrogens_keep_their_mass():
    topology = app.Topology()
    residue = topology.addResidue("H2", topology.addChain())
    pair = [topology.addAtom(f"H{i}", app.element.hydrogen, residue) for i in range(2)]
    topology.addBond(*pair)
    system = own_masses(topology)
    repartition_hydrogen_mass(topology, system, 3.0)
    assert masses(system) == masses(own_masses(topology))


def test_refusals():
    topology, _ = ethanol()
    with pytest.raises(ValueError, match=r"hydrogenMass must be positive \(dalton\), got 0"):
        potential("direct").createSystem(topology, hydrogenMass=0.0)
    with pytest.raises(ValueError, match=r"hydrogenMass of 6 leaves atom \d \(C\) a mass of -"):
        potential("direct").createSystem(topology, hydrogenMass=6.0)
    bare = app.Topology()
    residue = bare.addResidue("HOH", bare.addChain())
    for name in ("O", "H1", "H2"):
        bare.addAtom(name, app.Element.getBySymbol(name[0]), residue)
    with pytest.raises(UnsupportedSystemError, match="2 hydrogens have none in the topology, the first of them atom 1"):
        potential("direct").createSystem(bare, hydrogenMass=3.0)


def test_in_a_simulation(tmp_path):
    """The mass is in the settings, so that a resumed run has it too, and the motion differs."""
    light = SimulationSettings(str(EXAMPLES / "ethanol.sdf"), model=MODEL, steps=20, report_every=10, platform="Reference", minimize=False)
    simulate(light, tmp_path / "light")
    simulate(replace(light, hydrogen_mass=3.0), tmp_path / "heavy")
    assert (tmp_path / "light" / "log.csv").read_text() != (tmp_path / "heavy" / "log.csv").read_text()
    settings = json.loads((tmp_path / "heavy" / "settings.json").read_text())
    assert settings["hydrogen_mass"] == 3.0
    simulate(replace(light, hydrogen_mass=3.0, steps=10), tmp_path / "parts")
    kept = json.loads((tmp_path / "parts" / "settings.json").read_text())
    (tmp_path / "parts" / "settings.json").write_text(json.dumps({**kept, "steps": 20}))
    simulate(None, tmp_path / "parts", resume=True)
    assert (tmp_path / "parts" / "log.csv").read_text() == (tmp_path / "heavy" / "log.csv").read_text()
    topology, _ = read_structure(tmp_path / "parts" / "topology.pdb")
    assert topology.getNumBonds() == 8
