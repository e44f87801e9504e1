"""Candidates from Langevin dynamics."""

import numpy as np
from ase import Atoms, units
from ase.calculators.calculator import Calculator
from ase.md.langevin import Langevin
from ase.optimize import FIRE

from training.label.structures import is_plausible

TIMESTEP_FS = 0.5
FRICTION_PER_FS = 0.02  # loses its memory within 50 fs: frames are to differ, not to follow true dynamics
STEPS_BETWEEN_FRAMES = 50
DESCENT_STEPS = 50  # takes the strain of another force field out of a geometry before it turns into heat
DESCENT_FMAX = 1.0  # eV/Angstrom


def langevin_frames(atoms: Atoms, calculator: Calculator, temperature: float, n_frames: int, rng: np.random.Generator) -> list[Atoms]:
    """Frames of one trajectory: a short descent, then Langevin dynamics from Maxwell-Boltzmann velocities.

    Parameters
    ----------
    atoms : ase.Atoms
        Where it starts; left as it is.
    calculator : Calculator
        What drives the atoms.
    temperature : float
        K.
    n_frames : int
        Frames wanted, 25 fs apart.
    rng : numpy.random.Generator
        Of velocities and noise.

    Returns
    -------
    list of ase.Atoms
        Without calculator; fewer than asked for if atoms collided.
    """
    moving = atoms.copy()
    moving.calc = calculator
    FIRE(moving, logfile=None).run(fmax=DESCENT_FMAX, steps=DESCENT_STEPS)
    width = np.sqrt(units.kB * temperature * moving.get_masses())
    moving.set_momenta(width[:, None] * rng.standard_normal((len(moving), 3)))  # Maxwell-Boltzmann
    dynamics = Langevin(moving, TIMESTEP_FS * units.fs, temperature_K=temperature, friction=FRICTION_PER_FS / units.fs, fixcm=False, rng=rng)
    frames: list[Atoms] = []
    for _ in range(n_frames):
        dynamics.run(STEPS_BETWEEN_FRAMES)
        if not is_plausible(moving):
            break
        frames.append(Atoms(moving.numbers, moving.positions))
    return frames
