"""PythonForce where TorchForce cannot be used, what the installation is told, and the doctor."""

import copy
import logging
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import openmm
import pytest
from openmm import app, unit
from typer.testing import CliRunner

from openmm_se3 import doctor, force, installation
from openmm_se3.binding import TERMS
from openmm_se3.cli import app as cli
from openmm_se3.doctor import Evaluation
from tests.openmm_se3.helpers import energy_and_forces, ethanol, ethanol_in_classical_water, potential


@pytest.fixture
def without_openmmtorch(monkeypatch):
    """A process in which openmmtorch cannot be imported."""
    monkeypatch.setitem(sys.modules, "openmmtorch", None)
    monkeypatch.setattr(force, "_problem", force._UNKNOWN)


def notice():
    return pytest.warns(UserWarning, match="runs through openmm.PythonForce instead: the same numbers.*openmm-se3 doctor")


@pytest.mark.parametrize("mode", ["direct", "conservative", "mts", "mts-fast"])
def test_same_numbers_for_a_shuffled_subset_in_a_box(mode, monkeypatch):
    topology, positions = ethanol()
    both = app.Modeller(topology, positions * unit.nanometer)
    both.add(topology, (positions + np.array([0.9, 0.2, 0.1])) * unit.nanometer)
    both.topology.setPeriodicBoxVectors(np.array([[2.0, 0, 0], [0.4, 1.9, 0], [-0.5, 0.6, 1.8]]) * unit.nanometer)
    x = np.array(both.positions.value_in_unit(unit.nanometer))
    atoms = (9 + np.random.default_rng(1).permutation(9)).tolist()
    systems = []
    for blocked in (False, True):
        system = openmm.System()
        system.setDefaultPeriodicBoxVectors(*both.topology.getPeriodicBoxVectors())
        for _ in range(18):
            system.addParticle(1.0)
        if blocked:
            monkeypatch.setitem(sys.modules, "openmmtorch", None)
            monkeypatch.setattr(force, "_problem", force._UNKNOWN)
            with notice():
                potential(mode).addForces(both.topology, system, atoms, scaleParameter="lambda_se3")
            # Without an energy there is no derivative, for which a CustomCVForce is needed.
            kinds = [openmm.CustomCVForce if term.carries_energy else openmm.PythonForce for term in TERMS[mode]]
            assert [type(f) for f in system.getForces()] == kinds
            system = copy.deepcopy(system)  # serialises the model with the System
        else:
            potential(mode).addForces(both.topology, system, atoms)
        systems.append(system)
    for groups in (-1, {0}):
        (energy, forces), (got_energy, got_forces) = (energy_and_forces(s, x, groups=groups) for s in systems)
        assert got_energy == pytest.approx(energy, abs=1e-6)
        np.testing.assert_allclose(got_forces, forces, atol=1e-6)
    context = openmm.Context(systems[1], openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(x)
    context.setParameter("lambda_se3", 0.25)
    energy, forces = energy_and_forces(systems[0], x)
    state = context.getState(getEnergy=True, getForces=True, getParameterDerivatives=True)
    assert state.getPotentialEnergy()._value == pytest.approx(0.25 * energy, abs=1e-6)
    np.testing.assert_allclose(state.getForces(asNumpy=True)._value, 0.25 * forces, atol=1e-6)
    assert dict(state.getEnergyParameterDerivatives()) == {"lambda_se3": pytest.approx(energy, abs=1e-6)}


def test_mixed_system(without_openmmtorch):
    topology, classical, x = ethanol_in_classical_water()
    with notice():
        mixed = potential("direct").createMixedSystem(topology, classical, range(9), interpolate=True)
    context = openmm.Context(mixed, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(x)
    context.setParameter("lambda_interpolate", 0)
    assert context.getState(getEnergy=True).getPotentialEnergy()._value == pytest.approx(energy_and_forces(classical, x)[0], abs=1e-3)


def test_where_openmm_has_no_python_force(without_openmmtorch, monkeypatch):
    monkeypatch.delattr(openmm, "PythonForce")
    with pytest.raises(ImportError, match=r"openmm-torch does not work.*has no PythonForce.*pip install 'openmm-se3\[cpu\]'"):
        potential("direct").createSystem(ethanol()[0])


def build(name, version="1.10", requires=()):
    return SimpleNamespace(name=name, version=version, requires=list(requires))


class TestMismatch:
    def test_here_nothing_is_wrong_with_torch(self):
        assert installation.openmmtorch_mismatch() is None
        assert force.torch_force_problem() is None

    def test_torch_out_of_range(self, monkeypatch):
        monkeypatch.setattr(installation, "openmmtorch_builds", lambda: [build("acellera-openmmtorch-cpu", requires=["openmm", "torch<2.13,>=2.10"])])
        monkeypatch.setattr(installation, "installed_version", lambda name: {"torch": "2.15.0+cpu", "openmm": "8.6.1"}[name])
        expected = "acellera-openmmtorch-cpu 1.10 needs torch <2.13,>=2.10, but torch 2.15.0+cpu is installed"
        assert installation.openmmtorch_mismatch() == expected
        assert force.torch_force_problem() == expected  # before anything is tried

    def test_two_builds(self, monkeypatch):
        monkeypatch.setattr(installation, "openmmtorch_builds", lambda: [build("acellera-openmmtorch-cpu"), build("openmmtorch", "1.5")])
        assert "more than one build" in installation.openmmtorch_mismatch()

    @pytest.mark.parametrize(
        ("openmm_version", "torch_version", "broken"), [("8.6.1", "1.10", True), ("8.5.2", "1.10", False), ("8.6.1", "1.11", False)]
    )
    def test_serialisation(self, monkeypatch, openmm_version, torch_version, broken):
        monkeypatch.setattr(installation, "openmmtorch_builds", lambda: [build("acellera-openmmtorch-cpu", torch_version)])
        monkeypatch.setattr(installation, "installed_version", lambda name: openmm_version)
        assert (installation.serialisation_mismatch() is not None) == broken


class TestDoctor:
    def test_evaluates_in_a_process_of_its_own(self):
        evaluations = doctor._evaluate_in_new_process("Reference")
        assert [(e.backend, e.works) for e in evaluations] == [("PythonForce", True), ("TorchForce", True)], evaluations

    def test_a_crash_is_reported(self, monkeypatch):
        monkeypatch.setattr(doctor.subprocess, "run", lambda *a, **k: SimpleNamespace(stdout="", returncode=-11))
        evaluations = doctor._evaluate_in_new_process("Reference")
        assert [e.error for e in evaluations] == ["the process ended with status -11"] * 2

    @pytest.mark.parametrize("error", [subprocess.TimeoutExpired("nvidia-smi", 30), PermissionError("no")])
    def test_a_driver_that_does_not_answer_is_a_problem(self, monkeypatch, error):
        def run(*_, **__):
            raise error

        monkeypatch.setattr(doctor.shutil, "which", lambda name: name)
        monkeypatch.setattr(doctor.subprocess, "run", run)
        monkeypatch.setattr(doctor, "_evaluate_in_new_process", lambda platform: [Evaluation(platform, "TorchForce", 0.0, 1.0, "")])
        diagnosis = doctor.diagnose()
        assert diagnosis.versions["NVIDIA driver, GPU"] == "none"
        assert diagnosis.problems[0].text.startswith("nvidia-smi tells nothing of the NVIDIA driver")

    @pytest.mark.parametrize("works", [True, False])
    def test_command(self, monkeypatch, works):
        monkeypatch.setattr(
            doctor,
            "_evaluate_in_new_process",
            lambda platform: [Evaluation(platform, "TorchForce", 1e-4 if works else None, 1.0 if works else None, "" if works else "it broke")],
        )
        monkeypatch.setattr(doctor, "openmmtorch_mismatch", lambda: "A 1 needs torch <2.13, but torch 2.15 is installed")
        monkeypatch.setattr(doctor, "openmmtorch_builds", lambda: [build("A", "1", ["torch<2.13"])])
        result = CliRunner().invoke(cli, ["doctor"], env={"COLUMNS": "200"})
        assert "problem: A 1 needs torch <2.13, but torch 2.15 is installed" in result.output
        assert "mend: pip install 'torch<2.13'" in result.output
        assert result.exit_code == (0 if works else 1)
        if not works:
            assert "it broke" in result.output
            assert "works on no platform" in result.output


@pytest.mark.parametrize("level", [logging.NOTSET, logging.INFO, logging.ERROR])
def test_the_users_level_of_logging_stays(level):
    before = logging.root.manager.disable
    try:
        logging.disable(level)
        force._import_torch_force()
        assert logging.root.manager.disable == level
    finally:
        logging.disable(before)
