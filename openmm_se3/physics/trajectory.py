"""Read the trajectories that ``openmm-se3 simulate`` writes."""

from pathlib import Path

import numpy as np

from openmm_se3.physics.units import ANGSTROM_PER_NM


def read_dcd(path: Path) -> np.ndarray:
    """Positions of all frames of a DCD file as OpenMM writes it, on a little-endian machine.

    Parameters
    ----------
    path : Path
        The file.

    Returns
    -------
    ndarray
        ``(n_frames, n_atoms, 3)`` nm, float32.

    Raises
    ------
    ValueError
        If it is no such file or ends within a frame.
    """
    data = path.read_bytes()
    if len(data) < 276 or data[4:8] != b"CORD":
        raise ValueError(f"{path}: not a DCD file with OpenMM's header of 276 bytes")
    n_atoms = int.from_bytes(data[268:272], "little")
    cell = 56 if int.from_bytes(data[48:52], "little") else 0
    axis = 4 * n_atoms + 8
    frame = cell + 3 * axis
    if (len(data) - 276) % frame:
        raise ValueError(f"{path}: ends within a frame; the run that wrote it was killed: continue it with --resume")
    body = np.frombuffer(data, dtype=np.uint8, offset=276).reshape(-1, frame)[:, cell:].reshape(-1, 3, axis)[:, :, 4:-4]
    return np.ascontiguousarray(body).view("<f4").transpose(0, 2, 1) * np.float32(1 / ANGSTROM_PER_NM)
