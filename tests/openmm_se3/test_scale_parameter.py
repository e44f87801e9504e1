"""A global parameter that scales the model, with its energy derivative."""

import numpy as np
import openmm
import pytest
from openmm import unit

from tests.openmm_se3.helpers import energy_and_forces, ethanol, ethanol_in_classical_water, potential

NAME = "lambda_se3"


def scaled(system, positions, value, platform):
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName(platform))
    context.setPositions(positions)
    assert context.getParameter(NAME) == 1.0
    context.setParameter(NAME, value)
    state = context.getState(getEnergy=True, getForces=True, getParameterDerivatives=True)
    return state.getPotentialEnergy()._value, state.getForces(asNumpy=True)._value, dict(state.getEnergyParameterDerivatives())


@pytest.mark.parametrize(
    ("mode", "periodic", "platform"),
    [("direct", False, "CPU"), ("direct", True, "Reference"), ("conservative", False, "Reference"), ("mts", True, "Reference")],
)
def test_scales_energy_and_forces(mode, periodic, platform):
    topology, positions = ethanol()
    if periodic:
        topology.setUnitCellDimensions(openmm.Vec3(2.0, 2.0, 2.0) * unit.nanometer)
    energy, forces = energy_and_forces(potential(mode).createSystem(topology), positions, platform)
    system = potential(mode).createSystem(topology, scaleParameter=NAME)
    got_energy, got_forces, derivatives = scaled(system, positions, 0.3, platform)
    assert got_energy == pytest.approx(0.3 * energy, abs=1e-6)
    np.testing.assert_allclose(got_forces, 0.3 * forces, atol=1e-6)
    assert derivatives == {NAME: pytest.approx(energy, abs=1e-6)}


def test_scales_the_model_of_a_mixed_system_alone():
    mode = "direct"
    topology, classical, x = ethanol_in_classical_water()
    plain = potential(mode).createMixedSystem(topology, classical, range(9))
    system = potential(mode).createMixedSystem(topology, classical, range(9), scaleParameter=NAME)
    model, _ = energy_and_forces(potential(mode).createSystem(ethanol()[0]), x[:9])
    energy, _, derivatives = scaled(system, x, 0.5, "Reference")
    assert energy == pytest.approx(energy_and_forces(plain, x)[0] - 0.5 * model, abs=1e-6)
    assert derivatives == {NAME: pytest.approx(model, abs=1e-6)}


def test_together_with_interpolation():
    """Both parameters multiply the model; the classical part knows only its own."""
    topology, classical, x = ethanol_in_classical_water()
    system = potential("direct").createMixedSystem(topology, classical, range(9), interpolate=True, scaleParameter=NAME)
    model, _ = energy_and_forces(potential("direct").createSystem(ethanol()[0]), x[:9])
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(x)
    energies = []
    for value in (1.0, 0.5):
        context.setParameter(NAME, value)
        context.setParameter("lambda_interpolate", 0.4)
        energies.append(context.getState(getEnergy=True).getPotentialEnergy()._value)
    assert energies[0] - energies[1] == pytest.approx(0.5 * 0.4 * model, abs=1e-6)


@pytest.mark.parametrize("name", ["", "a b", "lambda_interpolate"])
def test_refuses_names(name):
    with pytest.raises(ValueError, match="scaleParameter must be a name such as 'lambda_se3'"):
        potential("direct").createSystem(ethanol()[0], scaleParameter=name)
