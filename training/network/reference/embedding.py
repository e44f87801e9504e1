"""What an atom starts with: scalars that tell its element."""

import torch
from ase.data import atomic_numbers as NUMBER_OF_SYMBOL
from ase.data import chemical_symbols, covalent_radii
from torch import Tensor, nn

_NOBLE_GASES = (0, 2, 10, 18, 36, 54)

#: Pauling's scale, H to Xe, compared with the table of the mendeleev package (1.3, after the CRC Handbook); the noble gases before xenon have no
#: value there. Periods and groups below were compared with it too; the radii are those of Cordero et al. (2008), as ase has them: sp3 carbon, and
#: the low-spin ones of Mn, Fe and Co.
PAULING_ELECTRONEGATIVITY: dict[str, float] = {
    **{"H": 2.20, "Li": 0.98, "Be": 1.57, "B": 2.04, "C": 2.55, "N": 3.04, "O": 3.44, "F": 3.98},
    **{"Na": 0.93, "Mg": 1.31, "Al": 1.61, "Si": 1.90, "P": 2.19, "S": 2.58, "Cl": 3.16},
    **{"K": 0.82, "Ca": 1.00, "Sc": 1.36, "Ti": 1.54, "V": 1.63, "Cr": 1.66, "Mn": 1.55, "Fe": 1.83, "Co": 1.88, "Ni": 1.91},
    **{"Cu": 1.90, "Zn": 1.65, "Ga": 1.81, "Ge": 2.01, "As": 2.18, "Se": 2.55, "Br": 2.96},
    **{"Rb": 0.82, "Sr": 0.95, "Y": 1.22, "Zr": 1.33, "Nb": 1.60, "Mo": 2.16, "Tc": 2.10, "Ru": 2.20, "Rh": 2.28, "Pd": 2.20},
    **{"Ag": 1.93, "Cd": 1.69, "In": 1.78, "Sn": 1.96, "Sb": 2.05, "Te": 2.10, "I": 2.66, "Xe": 2.60},
}


def period_and_group(atomic_number: int) -> tuple[int, int]:
    """Row and column of the periodic table, 1 to 5 and 1 to 18.

    Raises
    ------
    ValueError
        Beyond xenon.
    """
    if not 1 <= atomic_number <= _NOBLE_GASES[-1]:
        raise ValueError(f"atomic_number must be 1 to {_NOBLE_GASES[-1]} (H to Xe), got {atomic_number}")
    period = next(row for row, last in enumerate(_NOBLE_GASES) if atomic_number <= last)
    place = atomic_number - _NOBLE_GASES[period - 1]
    length = _NOBLE_GASES[period] - _NOBLE_GASES[period - 1]
    # Short rows jump from column 1 (hydrogen) or 2 over the transition metals.
    before_the_gap = 1 if length == 2 else 2
    return period, place if place <= before_the_gap or length == 18 else 18 - length + place


def physical_properties(atomic_number: int) -> list[float]:
    """Period, group, Pauling's electronegativity and covalent radius (ase), each of the order of one and centred on carbon.

    Raises
    ------
    ValueError
        For an element without an electronegativity on Pauling's scale.
    """
    symbol = chemical_symbols[atomic_number]
    if symbol not in PAULING_ELECTRONEGATIVITY:
        raise ValueError(
            f"embedding 'physical' needs an electronegativity, which Pauling's scale lacks for {symbol}; "
            "use elements from H to Xe without He, Ne, Ar and Kr, or another embedding"
        )
    period, group = period_and_group(atomic_number)
    radius, carbon = float(covalent_radii[atomic_number]), float(covalent_radii[NUMBER_OF_SYMBOL["C"]])
    return [period - 2.0, (group - 14.0) / 4.0, PAULING_ELECTRONEGATIVITY[symbol] - PAULING_ELECTRONEGATIVITY["C"], (radius - carbon) / 0.5]


class OneHotEmbedding(nn.Module):
    """One channel per element, as in the thesis.

    Parameters
    ----------
    n_elements : int
        Number of elements.
    """

    def __init__(self, n_elements: int) -> None:
        super().__init__()
        self.channels = n_elements

    def forward(self, species: Tensor, like: Tensor) -> Tensor:
        """``(n_atoms,)`` species to ``(n_atoms, channels)`` in the dtype of `like`."""
        return nn.functional.one_hot(species, self.channels).to(like.dtype)


class LearnedEmbedding(nn.Module):
    """A learned vector per element.

    Parameters
    ----------
    n_elements, channels : int
        Number of elements, and length of the vectors.
    """

    def __init__(self, n_elements: int, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.table = nn.Embedding(n_elements, channels)

    def forward(self, species: Tensor, like: Tensor) -> Tensor:
        """As `OneHotEmbedding.forward`."""
        return self.table(species)


class PhysicalEmbedding(nn.Module):
    """A network of fixed properties of the element, so that it has an answer for elements that no training molecule held.

    Parameters
    ----------
    atomic_numbers : tuple of int
        Elements in the order of the species index.
    channels : int
        Length of the result.
    """

    properties: Tensor

    def __init__(self, atomic_numbers: tuple[int, ...], channels: int) -> None:
        super().__init__()
        self.channels = channels
        properties = torch.tensor([physical_properties(z) for z in atomic_numbers], dtype=torch.get_default_dtype())
        self.register_buffer("properties", properties)
        self.network = nn.Sequential(nn.Linear(properties.shape[1], 2 * channels), nn.SiLU(), nn.Linear(2 * channels, channels))

    def forward(self, species: Tensor, like: Tensor) -> Tensor:
        """As `OneHotEmbedding.forward`."""
        return self.network(self.properties)[species]
