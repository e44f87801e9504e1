"""Equation 2.2: kernels, the sum of basis kernels weighted by learned functions of the distance."""

import math

import torch
from torch import Tensor, nn

from training.network.radial import RadialNetwork
from training.network.reference.basis_kernels import coupled_degrees


class RadialKernels(nn.Module):
    """Equation 2.2: W^{lk}(x) = sum_J psi_J^{lk}(|x|) W_J^{lk}(x / |x|), applied to the senders' features.

    psi, one small network per pair of degrees, gives a weight for every J, every input and every output channel. The kernel, a matrix of
    ``(2*l + 1) * channels_out`` rows and ``(2*k + 1) * channels_in`` columns, is never written down: the basis kernels act on the components
    first, the radial weights on the channels then.

    Parameters
    ----------
    channels_in, channels_out : tuple of int
        Channels of the senders' degrees k = 0, 1, ... and of the messages' degrees l = 0, 1, ...
    max_degree : int
        As of the `BasisKernels`.
    natural_parity : bool
        As of the `BasisKernels`.
    n_scalars, hidden : int
        Invariants of an edge (radial basis and whatever else it carries), and width of the radial networks.
    """

    def __init__(
        self, channels_in: tuple[int, ...], channels_out: tuple[int, ...], max_degree: int, natural_parity: bool, n_scalars: int, hidden: int
    ) -> None:
        super().__init__()
        n_in, n_out = len(channels_in), len(channels_out)
        n_paths = [[len(coupled_degrees(receiver, sender, natural_parity)) for sender in range(n_in)] for receiver in range(n_out)]
        self.n_in = n_in
        self.pair_index = [receiver * (max_degree + 1) + sender for receiver in range(n_out) for sender in range(n_in)]
        self.radial = nn.ModuleList(
            RadialNetwork(n_scalars, hidden, n_paths[receiver][sender] * channels_in[sender], channels_out[receiver])
            for receiver in range(n_out)
            for sender in range(n_in)
        )
        # Terms that are summed into one component of a message: without this its size would grow with their number.
        self.scales = [1.0 / math.sqrt(sum(p * c for p, c in zip(paths, channels_in, strict=True))) for paths in n_paths]

    def forward(self, sender: list[Tensor], scalars: Tensor, kernels: list[Tensor]) -> list[Tensor]:
        """Messages of every edge.

        Parameters
        ----------
        sender : list of Tensor
            Features at the senders, ``[(n_atoms, max_neighbors, 2*k + 1, channels_in[k])]``.
        scalars : Tensor
            ``(n_atoms, max_neighbors, n_scalars)``.
        kernels : list of Tensor
            Of `BasisKernels`.

        Returns
        -------
        list of Tensor
            ``[(n_atoms, max_neighbors, 2*l + 1, channels_out[l])]``.
        """
        messages: list[Tensor] = []
        for pair, radial in enumerate(self.radial):
            kernel = kernels[self.pair_index[pair]]
            n, k, rows, paths, columns = kernel.shape
            f = sender[pair % self.n_in]
            turned = torch.matmul(kernel.reshape(n, k, rows * paths, columns), f).view(n, k, rows, paths * f.shape[3])
            message = torch.matmul(turned, radial(scalars)) * self.scales[pair // self.n_in]  # equation 2.2, applied to f
            if pair % self.n_in == 0:
                messages.append(message)
            else:
                messages[-1] = messages[-1] + message
        return messages
