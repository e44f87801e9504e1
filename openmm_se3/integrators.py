"""`MultipleTimeStepIntegrator`: drives the two forces of ``forces="mts"`` or ``"mts-fast"`` with no evaluation more than there are inner steps."""

from numbers import Integral
from typing import Any

import numpy as np
import openmm
from openmm import unit

_GAS_CONSTANT = unit.MOLAR_GAS_CONSTANT_R.value_in_unit(unit.kilojoule_per_mole / unit.kelvin)


class MultipleTimeStepIntegrator(openmm.CustomIntegrator):
    """Reversible multiple time steps (r-RESPA) for the two force groups of ``"mts"`` and ``"mts-fast"``, with Langevin friction or without.

    The fast forces are evaluated `innerSteps` times in one step, what they lack of the conservative forces once. The slow force is
    applied at the middle of the step, as one kick; the inner steps around it are those of BAOAB, or of velocity Verlet without friction:

        [B A O A B] n/2 times,  v += stepSize f_slow / m,  [B A O A B] n/2 times.

    So the last force of a step is the first of the next, and OpenMM, which keeps the force that it computed last, does not compute it
    again. ``openmm.mtsintegrator`` kicks with the slow force at both ends and evaluates the fast one n + 1 times, but for platforms that
    keep the forces of several groups, as CUDA does. Both are symmetric and of second order. Where the fast forces are the gradient of an
    energy, as with ``"mts-fast"``, they conserve an energy near the total one, but for vibrations in resonance with the kicks, which take up energy.
    Bonds to hydrogen have periods of 9 to 11 fs, so a step of 2 fs is long for them: couple a thermostat, make hydrogens heavier (``hydrogenMass``
    of `SE3Potential.createSystem`), or take conservative forces where the total energy itself matters.

    At the middle both forces act at the same positions, and the slow one needs the fast one anyway, as it is what that lacks. The forces of
    ``SE3Potential(inner_steps=n)`` save that evaluation: they are f' = (1 - 1/n) f_fast and f_slow + f_fast / n. With `fastInSlow` all kicks but that
    at the middle are by n / (n - 1) f', and that one by the second force alone, which makes the same steps.

    Rigid constraints of a force field around the model are respected. Forces in other groups are neither integrated nor seen by barostats and
    minimisers. Virtual sites follow their atoms within a step on GPU platforms alone: OpenMM's Reference and CPU platforms (8.6) move those of a
    CustomIntegrator at its end, so that forces in between come from where sites were, and the energy runs away. `SE3Potential` warns of that.

    With friction the kinetic energy, and so the temperature of reporters, is that of the velocities before the last half kick of a step, as
    LangevinMiddleIntegrator reports it. Those have the bath's temperature; at the end of a step h velocities are too cold by (omega h)^2 / 4 in
    a vibration of frequency omega, some per cent for bonds to hydrogen, though positions are sampled rightly. Of velocities that are set anew it is
    not, until the next step: compute it from them, where a Monte Carlo test needs it.

    Temperature and friction are part of the state, as every variable of a CustomIntegrator is: ``Context.loadCheckpoint``, ``Context.setState``
    and ``Simulation.loadState`` bring back those that were saved, which `getTemperature` and `getFriction` then tell. To go on at others, set
    them after it. After `setStepSize` a Context takes steps of the new size, but goes on counting its time by the size that it began with (any
    CustomIntegrator, OpenMM 8.6).

    Parameters
    ----------
    temperature : openmm.unit.Quantity or float
        Of the heat bath; K if it has no unit.
    frictionCoeff : openmm.unit.Quantity or float
        Coupling to the heat bath; 1/ps if it has no unit. 0 is dynamics at constant energy.
    stepSize : openmm.unit.Quantity or float
        All inner steps together; ps if it has no unit.
    innerSteps : int
        An even number, or 1, which is velocity Verlet (BAOAB with friction) of the conservative model.
    forceGroup : int
        Group of the fast forces, as given to `SE3Potential.addForces`; the slow force is in the next.
    fastInSlow : bool
        Whether the forces are those of ``SE3Potential(inner_steps=innerSteps)``, all that there are in both groups, so no force field's. The kicks of
        others would be as large in all, but uneven.

    Raises
    ------
    ValueError
        For unusable `innerSteps`, `forceGroup`, `temperature` or `frictionCoeff`.

    References
    ----------
    M. Tuckerman, B. J. Berne, G. J. Martyna, J. Chem. Phys. 97, 1990 (1992); B. Leimkuhler, C. Matthews, Appl. Math. Res. Express 2013, 34;
    of resonance, T. Schlick, M. Mandziuk, R. D. Skeel, K. Srinivas, J. Comput. Phys. 140, 1 (1998).

    Examples
    --------
    >>> system = SE3Potential("se3-ani1x", forces="mts", inner_steps=4).createSystem(topology, hydrogenMass=3)  # doctest: +SKIP
    >>> integrator = MultipleTimeStepIntegrator(300 * unit.kelvin, 1 / unit.picosecond, 2 * unit.femtosecond, 4, fastInSlow=True)  # doctest: +SKIP
    """

    def __init__(self, temperature: Any, frictionCoeff: Any, stepSize: Any, innerSteps: int, forceGroup: int = 0, fastInSlow: bool = False) -> None:
        kelvin, friction = (_number(temperature, unit.kelvin), _number(frictionCoeff, unit.picosecond**-1))
        if not may_be_inner_steps(innerSteps):
            raise ValueError(f"innerSteps must be 1 or even, since the slow force acts at the middle of a step, got {innerSteps}")
        if not 0 <= forceGroup <= 30:
            raise ValueError(f"forceGroup must be from 0 to 30, since the slow force is in the group after it, got {forceGroup}")
        if not (kelvin >= 0 and friction >= 0):
            raise ValueError(f"temperature and frictionCoeff must not be negative, got {kelvin} K and {friction}/ps")
        super().__init__(stepSize)
        self._thermostatted = friction > 0
        self._inner = f"dt/{innerSteps}"
        self.addGlobalVariable("kT", _GAS_CONSTANT * kelvin)
        self.addGlobalVariable("friction", friction)
        self.addPerDofVariable("x1", 0)
        self.setIntegrationForceGroups({forceGroup, forceGroup + 1})
        fast, slow = f"f{forceGroup}", f"f{forceGroup + 1}"
        if innerSteps == 1:
            fast = "f"
        elif fastInSlow:
            fast = f"{innerSteps}/{innerSteps - 1}*{fast}"
        # What the last half kick adds. Without friction it stays 0, but is there: a State brings the variables of the integrator that it was saved
        # with, and those must exist.
        self.addPerDofVariable("kick", 0)
        if self._thermostatted:
            self.setKineticEnergyExpression("0.5*m*(v - kick)^2")
        self.addUpdateContextState()
        self._kick(f"0.5*{self._inner}*{fast}")
        for i in range(1, innerSteps + 1):
            self._drift()
            at_middle = 2 * i == innerSteps
            if not (at_middle and fastInSlow):
                # The second half of a kick and the first half of the next are one.
                self._kick(f"{self._inner}*{fast}" if i < innerSteps else f"0.5*{self._inner}*{fast}", keep=i == innerSteps)
            if at_middle:
                self._kick(f"dt*{slow}")

    def __getstate__(self) -> Any:
        """For `pickle`: what OpenMM keeps of an integrator, and what belongs to this one."""
        return super().__getstate__(), self._thermostatted, self._inner

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state[0])
        _, self._thermostatted, self._inner = state

    def getLastKick(self) -> np.ndarray:
        """What the last half kick of a step, with friction, added to the velocities: ``(n_particles, 3)`` nm/ps; without friction 0."""
        return np.array(self.getPerDofVariableByName("kick")) if self._thermostatted else np.zeros(1)

    def getTemperature(self) -> unit.Quantity:
        """Temperature of the heat bath."""
        return self.getGlobalVariableByName("kT") / _GAS_CONSTANT * unit.kelvin

    def setTemperature(self, temperature: Any) -> None:
        """Set the temperature of the heat bath, K if it has no unit.

        Raises
        ------
        ValueError
            If it is negative.
        """
        kelvin = _number(temperature, unit.kelvin)
        if not kelvin >= 0:
            raise ValueError(f"temperature must not be negative, got {kelvin} K")
        self.setGlobalVariableByName("kT", _GAS_CONSTANT * kelvin)

    def getFriction(self) -> unit.Quantity:
        """Coupling to the heat bath; 0 where the integrator was made without, whatever a state brought."""
        return self.getGlobalVariableByName("friction") * self._thermostatted / unit.picosecond

    def setFriction(self, coeff: Any) -> None:
        """Set the coupling to the heat bath, 1/ps if it has no unit.

        Raises
        ------
        ValueError
            If it is negative, or positive in an integrator that was made without.
        """
        friction = _number(coeff, unit.picosecond**-1)
        if not friction >= 0 or (friction > 0 and not self._thermostatted):
            raise ValueError(f"friction must not be negative, nor positive where the integrator was made without, got {friction}/ps")
        self.setGlobalVariableByName("friction", friction)

    def _kick(self, impulse: str, keep: bool = False) -> None:
        keep = keep and self._thermostatted
        if keep:
            self.addComputePerDof("kick", "v")
        self.addComputePerDof("v", f"v + {impulse}/m")
        self.addConstrainVelocities()
        if keep:
            self.addComputePerDof("kick", "v - kick")

    def _drift(self) -> None:
        if self._thermostatted:
            # 1 - exp(-2 y) is 2 tanh(y) / (1 + tanh(y)), which keeps its digits in single precision where y, friction times step, is small.
            self.addComputePerDof("x", f"x + 0.5*{self._inner}*v")
            self.addComputePerDof("v", f"exp(-y)*v + sqrt(2*t/(1 + t)*kT/m)*gaussian; t = tanh(y); y = friction*{self._inner}")
            self.addComputePerDof("x", f"x + 0.5*{self._inner}*v")
        else:
            self.addComputePerDof("x", f"x + {self._inner}*v")
        self.addComputePerDof("x1", "x")
        self.addConstrainPositions()
        self.addComputePerDof("v", f"v + (x - x1)/({self._inner})")


def may_be_inner_steps(number: int) -> bool:
    """Whether a step can have so many inner ones, with the slow force at its middle: 1 or an even number."""
    return isinstance(number, Integral) and (number == 1 or (number > 1 and number % 2 == 0))


def _number(value: Any, of: unit.Unit) -> float:
    return float(value.value_in_unit(of)) if unit.is_quantity(value) else float(value)
