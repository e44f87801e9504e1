"""From the last features to a type-0 energy and a type-1 force per atom."""

from torch import Tensor, nn


class EnergyReadout(nn.Module):
    """Energy per atom from the scalars: a two-layer network.

    Parameters
    ----------
    channels : int
        Channels of degree 0.
    hidden : int
        Width of the network.
    """

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(channels, hidden), nn.SiLU(), nn.Linear(hidden, 1))

    def forward(self, scalars: Tensor) -> Tensor:
        """``(n_atoms, 1, channels)`` to ``(n_atoms,)``, in units of the energy scale."""
        return self.network(scalars).view(-1)


class DirectForceReadout(nn.Module):
    """Force per atom: the vectors, each channel weighted by a network of the scalars.

    Parameters
    ----------
    channels : int
        Channels of degree 0.
    vector_channels : int
        Channels of degree 1.
    hidden : int
        Width of the network.
    """

    def __init__(self, channels: int, vector_channels: int, hidden: int) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(channels, hidden), nn.SiLU(), nn.Linear(hidden, vector_channels))

    def forward(self, scalars: Tensor, vectors: Tensor) -> Tensor:
        """``(n_atoms, 1, channels)`` and ``(n_atoms, 3, vector_channels)`` to ``(n_atoms, 3)``, in units of the force scale."""
        return (self.network(scalars) * vectors).sum(-1)
