"""Candidates from two molecules beside each other, where a model learns how molecules attract and repel."""

import numpy as np
from ase import Atoms
from scipy.spatial.transform import Rotation


def random_dimer(first: Atoms, second: Atoms, contacts: tuple[float, float], rng: np.random.Generator) -> Atoms:
    """Two molecules in random orientations, `second` moved along a random direction until the closest contact is that which was drawn.

    Parameters
    ----------
    first, second : ase.Atoms
        The molecules; left as they are.
    contacts : tuple of float
        Least and largest of the closest contacts, Angstrom.
    rng : numpy.random.Generator
        Of orientations, direction and contact, the last uniform within `contacts`.
    """
    contact = rng.uniform(*contacts)
    while True:  # a direction along which they pass by each other, say through a ring, is drawn again
        a, b = (Rotation.random(rng=rng).apply(m.positions - m.positions.mean(0)) for m in (first, second))
        direction = rng.standard_normal(3)
        direction /= np.linalg.norm(direction)
        # Moved by t, a pair is at sqrt(across + (along + t)^2): each says where it touches last, and the farthest of these is the contact.
        difference = (b[None] - a[:, None]).reshape(-1, 3)
        along = difference @ direction
        across = np.square(difference).sum(1) - np.square(along)
        touching = across < contact**2
        if touching.any():
            break
    shift = (np.sqrt(contact**2 - across[touching]) - along[touching]).max()
    return Atoms(np.concatenate([first.numbers, second.numbers]), np.concatenate([a, b + shift * direction]))
