"""How much to measure: the quick and the full setting."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PhysicsSettings:
    """Extent of the measures.

    Attributes
    ----------
    molecules : tuple of str
        Molecules of `openmm_se3.physics.molecules` whose forces and dynamics are measured.
    frames : int
        Thermal frames per molecule for the gradient, the Jacobian and the loops.
    nve_ps : float
        Length of each constant-energy run.
    nve_copies : int
        Copies of the molecule in each, with different velocities.
    langevin_ps : float
        Length of each thermostatted run, after a tenth of it that is thrown away.
    langevin_forces : tuple of str
        Kinds of forces that run under the thermostat.
    points : int
        Points of a dissociation curve.
    box_waters : int
        Waters in the periodic box.
    box_ps : float
        Length of its run; 0 leaves it out.
    temperature : float
        Kelvin, of frames and dynamics.
    timestep_fs : float
        Of all dynamics; the inner step of multiple time stepping.
    mts_outer : int
        Inner steps per outer step of multiple time stepping.
    hydrogen_mass : float
        Dalton, of hydrogens at constant energy with ``"mts-fast"``; elsewhere they have their own.
    seed : int
        Of frames, velocities and thermostats.
    """

    molecules: tuple[str, ...]
    frames: int
    nve_ps: float
    nve_copies: int
    langevin_ps: float
    langevin_forces: tuple[str, ...]
    points: int
    box_waters: int
    box_ps: float
    temperature: float = 300.0
    timestep_fs: float = 0.5
    mts_outer: int = 4
    hydrogen_mass: float = 3.0
    seed: int = 1


#: Under two minutes on one core.
QUICK = PhysicsSettings(
    molecules=("ethanol",),
    frames=2,
    nve_ps=0.5,
    nve_copies=1,
    langevin_ps=1.0,
    langevin_forces=("direct",),
    points=100,
    box_waters=0,
    box_ps=0.0,
)
#: Long enough to tell 0.05 K/ps: about a day of one core with the released model.
FULL = PhysicsSettings(
    molecules=("ethanol", "paracetamol"),
    frames=5,
    nve_ps=100.0,
    nve_copies=8,
    langevin_ps=50.0,
    langevin_forces=("direct", "conservative", "mts"),
    points=200,
    box_waters=125,
    box_ps=20.0,
)
