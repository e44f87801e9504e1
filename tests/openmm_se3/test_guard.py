"""The domain guard names atoms; minimisation by OpenMM; importing openmm-ml stays cheap and safe."""

import subprocess
import sys

import numpy as np
import openmm
import pytest
from openmm import app, unit

from openmm_se3.errors import SimulationError, UnsupportedSystemError
from openmm_se3.guard import DomainError, DomainGuard
from openmm_se3.simulate import simulate
from openmm_se3.simulation_settings import SimulationSettings
from tests.openmm_se3.helpers import MODEL, ROOT, ethanol, potential


def state_of(topology, positions, forces=None):
    """A State of a System whose forces are those given, by default none."""
    system = openmm.System()
    if topology.getPeriodicBoxVectors() is not None:
        system.setDefaultPeriodicBoxVectors(*topology.getPeriodicBoxVectors())
    external = openmm.CustomExternalForce("-(fx*x+fy*y+fz*z)")
    for name in ("fx", "fy", "fz"):
        external.addPerParticleParameter(name)
    for i in range(len(positions)):
        system.addParticle(1.0)
        external.addParticle(i, np.zeros(3) if forces is None else forces[i])
    system.addForce(external)
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(positions)
    return context.getState(getPositions=True, getForces=True)


class TestGuard:
    def test_passes_a_molecule(self):
        topology, x = ethanol()
        DomainGuard(topology, 10).check(state_of(topology, x), 0)

    def test_names_atoms_that_fuse(self):
        topology, x = ethanol()
        guard = DomainGuard(topology, 10)
        guard.check(state_of(topology, x), 10)
        x[8] = x[0] + 0.01
        with pytest.raises(DomainError, match=r"step 20: atoms 0 \(C\) and 8 \(H\) are 0.173 Angstrom apart.*at step 10 the largest force"):
            guard.check(state_of(topology, x), 20)

    def test_sees_atoms_that_fuse_through_a_face_of_the_box(self):
        topology, x = ethanol()
        topology.setPeriodicBoxVectors(np.array([[2.0, 0, 0], [0.4, 1.9, 0], [-0.5, 0.6, 1.8]]) * unit.nanometer)
        x[8] = x[2] + np.array([-0.5, 0.6, 1.8]) + 0.01
        with pytest.raises(DomainError, match=r"atoms 2 \(O\) and 8 \(H\)"):
            DomainGuard(topology, 10).check(state_of(topology, x), 1)
        DomainGuard(topology, 10, atoms=list(range(8))).check(state_of(topology, x), 1)

    def test_asks_the_system_for_its_box(self):
        """The topology's may be missing, as where the System was read from XML."""
        topology, x = ethanol()
        box = np.diag([2.0, 2.0, 2.0])
        topology.setPeriodicBoxVectors(box * unit.nanometer)
        system = potential("direct").createSystem(topology)
        topology.setPeriodicBoxVectors(None)
        simulation = app.Simulation(topology, system, openmm.VerletIntegrator(1e-9), openmm.Platform.getPlatformByName("Reference"))
        x[8] = x[2] + box[0] + 0.01
        simulation.context.setPositions(x)
        simulation.reporters.append(DomainGuard(topology, 1))
        with pytest.raises(DomainError, match=r"atoms 2 \(O\) and 8 \(H\)"):
            simulation.step(1)

    def test_a_large_box(self):
        """With cells of nanometers in place of Angstrom the search takes minutes and gigabytes."""
        topology, per_edge = app.Topology(), 16
        residue = topology.addResidue("X", topology.addChain())
        for _ in range(per_edge**3):
            topology.addAtom("H", app.element.hydrogen, residue)
        edge = 0.2 * per_edge
        topology.setPeriodicBoxVectors(np.diag([edge] * 3) * unit.nanometer)
        x = 0.2 * np.stack(np.meshgrid(*[np.arange(per_edge)] * 3, indexing="ij"), -1).reshape(-1, 3)
        DomainGuard(topology, 10).check(state_of(topology, x), 1)
        x[0, 0], x[-1] = 0.01, [edge - 0.01, 0, edge]
        with pytest.raises(DomainError, match=rf"atoms 0 \(H\) and {len(x) - 1} \(H\) are 0.200 Angstrom apart, and 1 pairs"):
            DomainGuard(topology, 10).check(state_of(topology, x), 1)

    def test_atoms_may_be_any_iterable_but_must_exist(self):
        topology, x = ethanol()
        x[8] = x[2] + 0.01
        DomainGuard(topology, 10, atoms=set(range(8))).check(state_of(topology, x), 1)
        with pytest.raises(UnsupportedSystemError, match=r"atoms holds \[9\], but the topology has atoms 0 to 8"):
            DomainGuard(topology, 10, atoms=[3, 9])
        with pytest.raises(TypeError, match=r"got a mask of bools; take numpy\.flatnonzero of it"):
            DomainGuard(topology, 10, atoms=np.arange(9) < 8)
        with pytest.raises(TypeError, match=r"atoms must be indices, got 1\.5"):
            DomainGuard(topology, 10, atoms=[1.5])
        with pytest.raises(UnsupportedSystemError, match="an index more than once"):
            DomainGuard(topology, 10, atoms=[3, 4, 3])

    def test_names_atoms_without_finite_forces(self):
        topology, x = ethanol()
        forces = np.zeros((9, 3))
        forces[4, 1] = np.inf
        with pytest.raises(openmm.OpenMMException, match=r"atoms 4 \(H\) have forces that are not finite"):
            DomainGuard(topology, 10).check(state_of(topology, x, forces), 1)

    def test_stops_a_simulation(self):
        topology, x = ethanol()
        system = potential("direct").createSystem(topology)
        simulation = app.Simulation(topology, system, openmm.VerletIntegrator(1e-9), openmm.Platform.getPlatformByName("Reference"))
        simulation.reporters.append(DomainGuard(topology, 2))
        simulation.context.setPositions(x)
        simulation.step(4)
        x[3] = x[4] + 0.001
        simulation.context.setPositions(x)
        simulation.context.setVelocities(np.zeros((9, 3)))
        with pytest.raises(DomainError, match=r"step 6: "):
            simulation.step(2)

    def test_refuses_settings(self):
        with pytest.raises(ValueError, match="must be positive, got 0"):
            DomainGuard(ethanol()[0], 0)
        with pytest.raises(UnsupportedSystemError, match="no atoms to look at"):
            DomainGuard(ethanol()[0], 1, atoms=[])


def test_simulate_names_atoms(tmp_path):
    (tmp_path / "close.xyz").write_text("3\n\nO 0 0 0\nH 0 0 0.96\nH 0 0.1 1.28\n")
    settings = SimulationSettings(
        structure=str(tmp_path / "close.xyz"),
        model=MODEL,
        steps=4,
        report_every=2,
        platform="Reference",
        minimize=False,
        temperature=0,
        timestep_fs=1e-6,
    )
    with pytest.raises(SimulationError, match=r"dynamics failed near step 2: step 2: atoms 1 \(H\) and 2 \(H\) are 0.335 Angstrom apart"):
        simulate(settings, tmp_path / "md")


@pytest.mark.parametrize("mode", ["conservative", "mts"])
def test_local_energy_minimizer(mode):
    """OpenMM's own minimiser reaches its tolerance with forces that belong to the energy."""
    topology, x = ethanol()
    system = potential(mode).createSystem(topology)
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(x)
    before = context.getState(getEnergy=True).getPotentialEnergy()
    openmm.LocalEnergyMinimizer.minimize(context, 10)
    state = context.getState(getEnergy=True, getForces=True)
    assert state.getPotentialEnergy() < before
    assert np.sqrt((state.getForces(asNumpy=True)._value ** 2).mean()) < 12


class TestImportOfOpenmmml:
    def test_costs_little_on_our_account(self):
        """Loading and instantiating our factories, as openmm-ml does, with everything of openmm-ml already there."""
        program = """
import sys, time, openmmml
from importlib.metadata import entry_points
ours = [e for e in entry_points(group="openmmml.potentials") if e.value.startswith("openmm_se3")]
assert ours
for name in [m for m in sys.modules if m.startswith("openmm_se3")]:
    del sys.modules[name]
begin = time.perf_counter()
for entry in ours:
    entry.load()()
print(1e3 * (time.perf_counter() - begin))
"""
        result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
        assert float(result.stdout) < 50, result.stderr

    @pytest.mark.parametrize("broken", ["openmmtorch", "torch"])
    def test_survives(self, broken):
        program = f"import sys; sys.modules[{broken!r}] = None; import openmmml; print('se3-ani1x' in openmmml.MLPotential._implFactories)"
        result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
        assert result.stdout.strip() == "True", result.stderr

    @pytest.mark.parametrize("first", ["openmm_se3.openmmml_plugin", "openmm_se3.openmmml_potential", "openmmml"])
    def test_whichever_is_imported_first_finds_the_other(self, first):
        program = f"""
import {first}
from openmmml import MLPotential
from openmm_se3.openmmml_plugin import SE3PotentialImplFactory
print(type(MLPotential._implFactories["se3"]) is SE3PotentialImplFactory)
"""
        result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
        assert result.stdout.strip() == "True", result.stderr
