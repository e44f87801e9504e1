"""Systems with a TorchForce are read and copied without crashing the process, whatever pair of OpenMM and openmm-torch is installed."""

import copy
import pickle
import re
import subprocess
import sys

import numpy as np
import openmm
import pytest
import torch

from openmm_se3 import installation, mend_serialisation
from openmm_se3.force import _import_torch_force
from tests.openmm_se3.helpers import ROOT, energy_and_forces

#: Looked up when called, since they may have been mended meanwhile.
WAYS = {
    "XML": lambda system: openmm.XmlSerializer.deserialize(openmm.XmlSerializer.serialize(system)),
    "clone": lambda system: openmm.XmlSerializer.clone(system),
    "deepcopy": copy.deepcopy,
    "pickle": lambda system: pickle.loads(pickle.dumps(system)),
}


class Energy(torch.nn.Module):
    """A small model with a parameter and a box, as a force that is differentiated has them."""

    def forward(self, positions: torch.Tensor, box: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return scale.reshape([]) * (positions * positions).sum() + torch.diagonal(box).sum()


class Forces(torch.nn.Module):
    """A small model that gives forces itself."""

    def forward(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return positions.sum(), (-positions.detach()).contiguous()


@pytest.fixture(scope="module")
def system():
    """Two TorchForces between forces of OpenMM's own, with all that a TorchForce can be told; System and positions."""
    torch_force = _import_torch_force()
    made, bonds = openmm.System(), openmm.HarmonicBondForce()
    for _ in range(3):
        made.addParticle(1.0)
    bonds.addBond(0, 1, 0.15, 1e4)
    first, second = torch_force(torch.jit.script(Energy())), torch_force(torch.jit.script(Forces()))
    first.setForceGroup(2)
    first.setUsesPeriodicBoundaryConditions(True)
    first.addGlobalParameter("strength", 1.5)
    first.addEnergyParameterDerivative("strength")
    first.setProperty("CUDAGraphWarmupSteps", "7")
    first.setName("first of the small ones")
    second.setOutputsForces(True)
    for force in (openmm.CMMotionRemover(), first, bonds, second):
        made.addForce(force)
    return made, np.array([[0.1, 0.2, 0.3], [0.2, 0.1, 0.5], [0.4, 0.4, 0.1]])


def without_modules(system):
    """XML but for the bytes of modules, which torch writes anew each time."""
    return re.sub(r'encodedFileContents="[^"]*"', "", openmm.XmlSerializer.serialize(system))


@pytest.mark.parametrize("way", WAYS)
def test_all_of_a_system_comes_back(way, system):
    original, _ = system
    copied = WAYS[way](original)
    assert without_modules(copied) == without_modules(original)
    if way in ("clone", "deepcopy") and mend_serialisation():  # openmm-torch itself loses the names
        assert [f.getName() for f in copied.getForces()] == [f.getName() for f in original.getForces()]


def test_it_gives_the_same_numbers(system):
    original, x = system
    copied = WAYS["XML"](original)
    (energy, forces), (got_energy, got_forces) = (energy_and_forces(s, x) for s in (original, copied))
    assert got_energy == pytest.approx(energy, abs=1e-9)
    np.testing.assert_allclose(got_forces, forces, atol=1e-9)


def test_one_force_comes_back(system):
    force = system[0].getForce(3)
    for copied in (copy.deepcopy(force), openmm.XmlSerializer.deserialize(openmm.XmlSerializer.serialize(force))):
        assert without_modules(copied) == without_modules(force)


def test_systems_without_the_model_are_left_to_openmm(system):
    del system  # only that something may have been mended
    plain = openmm.System()
    plain.addParticle(1.0)
    plain.addForce(openmm.CMMotionRemover())
    for way in WAYS.values():
        assert openmm.XmlSerializer.serialize(way(plain)) == openmm.XmlSerializer.serialize(plain)


@pytest.mark.skipif(installation.serialisation_mismatch() is None, reason="here OpenMM copies a TorchForce inside another force by itself")
@pytest.mark.parametrize("container", ["CustomCVForce", "ATMForce"])
def test_inside_another_force_it_is_refused_before_the_process_dies(container, system):
    force = copy.deepcopy(system[0].getForce(1))
    outer = getattr(openmm, container)("x")
    add = outer.addForce if container == "ATMForce" else lambda inner: outer.addCollectiveVariable("x", inner)
    with pytest.raises(openmm.OpenMMException, match=rf"inside a {container} here: acellera.*use scaleParameter"):
        add(force)
    holds = openmm.CustomCVForce("x")
    holds.addCollectiveVariable("x", openmm.HarmonicBondForce())  # others are as welcome as ever
    text = openmm.XmlSerializer.serialize(holds).replace('type="HarmonicBondForce"', 'type="TorchForce"')
    with pytest.raises(openmm.OpenMMException, match="inside a CustomCVForce"):
        openmm.XmlSerializer.deserialize(text)


def test_a_script_that_only_reads(system, tmp_path):
    """A new process that makes no force of this package: one call before reading."""
    original, _ = system
    (tmp_path / "system.xml").write_text(openmm.XmlSerializer.serialize(original))
    program = """
import openmm, openmm_se3
openmm_se3.mend_serialisation()
system = openmm.XmlSerializer.deserialize(open("system.xml").read())
print(system.getNumForces(), system.getNumParticles())
"""
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": ""}
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", program], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["4", "3"]


def test_a_worker_that_was_handed_a_pickle(system, tmp_path):
    """What `multiprocessing` does with arguments: unpickle before any code of the user could mend."""
    (tmp_path / "system.pkl").write_bytes(pickle.dumps(system[0]))
    program = "import pickle; print(pickle.load(open('system.pkl', 'rb')).getNumForces())"
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": ""}
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", program], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "4"


def test_nothing_is_touched_where_the_pair_fits(monkeypatch):
    from openmm_se3 import serialisation

    monkeypatch.setattr(serialisation, "serialisation_mismatch", lambda: None)
    monkeypatch.setattr(serialisation, "_mended", False)
    before = openmm.XmlSerializer.deserializeSystem
    assert not mend_serialisation()
    assert openmm.XmlSerializer.deserializeSystem is before
