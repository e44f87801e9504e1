"""What `openmm_se3.simulate` is told."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from openmm_se3.binding import MULTIPLE_TIME_STEPS
from openmm_se3.integrators import may_be_inner_steps

ENSEMBLES = ("nvt", "nve")


@dataclass(frozen=True)
class SimulationSettings:
    """What to simulate and how.

    Attributes
    ----------
    structure : str
        Structure file (.pdb, .cif, .sdf, .xyz).
    model : str
        Name of a released model or path of an exported file.
    forces : str
        Force mode of `SE3Potential`; ``auto`` as `suitable_forces` says.
    precision : str
        ``single`` or ``double``.
    ensemble : str
        ``nvt`` (Langevin) or ``nve`` (Verlet); for multiple time steps `MultipleTimeStepIntegrator` with friction or without.
    pressure_bar : float or None
        With ``nvt`` and a periodic box, keeps this pressure (bar) by a Monte Carlo barostat that scales the box in all directions alike and
        moves molecules, as the bonds of the structure tell them, as a whole; None keeps the volume.
    box_nm : sequence of three floats, or empty, or None
        Edges of an orthorhombic periodic box, nm; None takes what the structure file says, an empty sequence no box.
    temperature : float
        Kelvin; also of the initial velocities. 0 starts at rest.
    timestep_fs : float
        Femtoseconds; for multiple time steps of the inner ones.
    inner_steps : int
        For multiple time steps, inner ones to each outer one, 1 or an even number; one step of the run is all of them. Other force modes
        take one step at a time.
    hydrogen_mass : float or None
        Dalton, taken from the atoms that hydrogens are bonded to; None for their own.
    friction_per_ps : float
        Langevin friction. The default couples tightly, because direct forces put heat in (see the model's card). 0 is constant energy.
    steps : int
        Steps in all.
    report_every : int
        Steps between frames, log lines and checkpoints.
    minimize : bool
        Whether to minimise first, see `minimize`.
    platform : str
        OpenMM platform; ``auto`` takes CUDA if torch too sees the GPU, else Reference, whose step overhead is the smallest on a CPU.
    seed : int
        Seed of velocities and thermostat, from 1 to 2^31 - 1: to OpenMM 0 means that it choose one.
    """

    structure: str
    model: str = "se3-ani1x"
    forces: str = "auto"
    precision: str = "single"
    ensemble: str = "nvt"
    pressure_bar: float | None = None
    box_nm: Sequence[float] | None = None
    temperature: float = 300.0
    timestep_fs: float = 0.5
    inner_steps: int = 4
    hydrogen_mass: float | None = None
    friction_per_ps: float = 10.0
    steps: int = 20_000
    report_every: int = 100
    minimize: bool = True
    platform: str = "auto"
    seed: int = 1

    def __post_init__(self) -> None:
        # What is kept in settings.json.
        for name in ("structure", "model"):
            object.__setattr__(self, name, str(getattr(self, name)))
        if self.box_nm is not None:
            object.__setattr__(self, "box_nm", tuple(float(edge) for edge in self.box_nm))
        if self.ensemble not in ENSEMBLES:
            raise ValueError(f"ensemble must be one of {', '.join(ENSEMBLES)}, got {self.ensemble!r}")
        for name in ("timestep_fs", "inner_steps", "steps", "report_every"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not may_be_inner_steps(self.inner_steps):
            raise ValueError(f"inner_steps must be 1 or even, got {self.inner_steps}")
        if not 1 <= self.seed < 2**31:
            raise ValueError(f"seed must be from 1 to {2**31 - 1}, got {self.seed}")
        for name in ("temperature", "friction_per_ps"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.pressure_bar is not None and not math.isfinite(self.pressure_bar):
            raise ValueError(f"pressure_bar must be a number, got {self.pressure_bar}")
        if self.pressure_bar is not None and not (self.thermostatted and self.temperature > 0):
            raise ValueError(
                f"a pressure needs a thermostat: ensemble nvt, a temperature and a friction above 0, got {self.ensemble}, {self.temperature:g} K and "
                f"{self.friction_per_ps:g}/ps"
            )
        if self.box_nm and (len(self.box_nm) != 3 or not all(0 < edge < math.inf for edge in self.box_nm)):
            raise ValueError(f"box_nm must be three positive edges in nm, or empty, got {self.box_nm}")

    @property
    def thermostatted(self) -> bool:
        """Whether a heat bath is coupled to the atoms."""
        return self.ensemble == "nvt" and self.friction_per_ps > 0

    @property
    def step_fs(self) -> float:
        """Time that one step of the integrator takes, fs."""
        return self.timestep_fs * (self.inner_steps if self.forces in MULTIPLE_TIME_STEPS else 1)
