"""What happens on each atom: joint norm, merged linear maps, attentive self-interaction, readouts.

A state is one tensor per degree, ``(n_atoms, 2*l + 1, channels_l)``. The norm's gains are multiplied into the maps that follow it.
"""

from typing import cast

import torch
from torch import Tensor, nn

from training.network.linear import EquivariantLinear
from training.network.norm import EquivariantRMSNorm
from training.network.readout import DirectForceReadout, EnergyReadout
from training.network.self_interaction import AttentiveSelfInteraction


def _weight(module: nn.Module) -> Tensor:
    """Weight of a linear map, from input to output channels."""
    return cast(nn.Linear, module).weight.detach().t()


def _bias(module: nn.Module) -> Tensor:
    return cast(nn.Linear, module).bias.detach()


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.clone(memory_format=torch.contiguous_format), requires_grad=False)


class JointScale(nn.Module):
    """The scalar 1 / rms of `EquivariantRMSNorm`, without its gains.

    Parameters
    ----------
    norm : EquivariantRMSNorm
        The norm.
    """

    weights: Tensor

    def __init__(self, norm: EquivariantRMSNorm) -> None:
        super().__init__()
        self.epsilon = norm.epsilon
        n = len(norm.gains)
        sizes = [(2 * degree + 1) * len(g) for degree, g in enumerate(norm.gains)]
        weights = [torch.full((size, 1), 1.0 / (n * size), dtype=norm.gains[0].dtype) for size in sizes]
        self.register_buffer("weights", torch.cat(weights))

    def forward(self, state: list[Tensor]) -> Tensor:
        """State of the norm's degrees to ``(n_atoms, 1, 1)``."""
        flat = torch.cat([f.flatten(1) for f in state], dim=1)
        return torch.rsqrt(torch.matmul(flat * flat, self.weights) + self.epsilon).unsqueeze(-1)


class MergedLinear(nn.Module):
    """Several bias-free equivariant maps of the same normalised features, as one map per degree, side by side.

    Parameters
    ----------
    maps : sequence of EquivariantLinear
        Maps whose outputs are put side by side; a map may stop at a lower degree than another.
    norm : EquivariantRMSNorm
        Norm before them, whose gains are multiplied in.
    factors : sequence of sequence of float, optional
        A factor per map and degree.
    """

    def __init__(self, maps: list[EquivariantLinear], norm: EquivariantRMSNorm, factors: list[list[float]] | None = None) -> None:
        super().__init__()
        self.weights = nn.ParameterList()
        for degree in range(max(len(m.maps) for m in maps)):
            parts = []
            for i, m in enumerate(maps):
                if degree < len(m.maps):
                    weight = _weight(m.maps[degree])
                    parts.append(weight if factors is None else weight * factors[i][degree])
            self.weights.append(_frozen(norm.gains[degree].detach().unsqueeze(1) * torch.cat(parts, dim=1)))

    def forward(self, state: list[Tensor]) -> list[Tensor]:
        """``[(n_atoms, 2*l + 1, channels_in[l])]`` to ``[(n_atoms, 2*l + 1, sum of channels_out[l])]``."""
        out: list[Tensor] = []
        for degree, weight in enumerate(self.weights):
            out.append(torch.matmul(state[degree], weight))
        return out


class AddedLinear(nn.Module):
    """An equivariant map whose result is added to the residual stream, in one operation per degree.

    Parameters
    ----------
    linear : EquivariantLinear
        The map, bias-free.
    n_residual : int
        Degrees that the residual stream already has; the others begin here.
    """

    def __init__(self, linear: EquivariantLinear, n_residual: int) -> None:
        super().__init__()
        self.n_residual = n_residual
        self.weights = nn.ParameterList([_frozen(_weight(m)) for m in linear.maps])

    def forward(self, state: list[Tensor], gathered: Tensor) -> list[Tensor]:
        """State before, and ``(n_atoms, components, c)`` with degrees stacked, to the state after."""
        out: list[Tensor] = []
        start = 0
        for degree, weight in enumerate(self.weights):
            stop = start + 2 * degree + 1
            x = gathered[:, start:stop].reshape(-1, gathered.shape[2])
            start = stop
            y = torch.addmm(state[degree].reshape(-1, weight.shape[1]), x, weight) if degree < self.n_residual else torch.mm(x, weight)
            out.append(y.view(gathered.shape[0], 2 * degree + 1, weight.shape[1]))
        return out


class FusedSelfInteraction(nn.Module):
    """Norm, attentive self-interaction and residual sum.

    Parameters
    ----------
    module : AttentiveSelfInteraction
        The trained block.
    norm : EquivariantRMSNorm
        The norm before it.
    """

    def __init__(self, module: AttentiveSelfInteraction, norm: EquivariantRMSNorm) -> None:
        super().__init__()
        self.scale = JointScale(norm)
        degrees = range(len(norm.gains))
        # The mean over the components of a product becomes a sum: the left factor carries 1 / (2 l + 1).
        factors = [[1.0 / (2 * d + 1) for d in degrees], [1.0 for _ in degrees], [1.0 for _ in degrees]]
        self.linear = MergedLinear([module.left, module.right, module.mix], norm, factors)
        self.n_products = _weight(module.left.maps[0]).shape[1]
        self.channels = [len(g) for g in norm.gains]
        self.sections = list(module.sections)
        first, last = module.network[0], module.network[2]
        gains = torch.ones(_weight(first).shape[0], 1, dtype=norm.gains[0].dtype)
        gains[: self.channels[0], 0] = norm.gains[0].detach()
        self.hidden_weight, self.hidden_bias = _frozen(gains * _weight(first)), _frozen(_bias(first))
        self.out_weight, self.out_bias = _frozen(_weight(last)), _frozen(_bias(last))

    def forward(self, state: list[Tensor]) -> list[Tensor]:
        """State before to state after."""
        scale = self.scale(state)
        normed = [f * scale for f in state]
        inputs = [normed[0].squeeze(1)]
        mixed: list[Tensor] = []
        for degree, y in enumerate(self.linear(normed)):
            left, right, mix = y.split([self.n_products, self.n_products, self.channels[degree]], dim=2)
            inputs.append((left * right).sum(1))
            mixed.append(mix)
        hidden = nn.functional.silu(torch.addmm(self.hidden_bias, torch.cat(inputs, dim=1), self.hidden_weight))
        gates = torch.addmm(self.out_bias, hidden, self.out_weight).unsqueeze(1).split(self.sections, dim=2)
        out = [torch.addcmul(state[0] + gates[0], gates[1], mixed[0])]
        for degree in range(1, len(mixed)):
            out.append(torch.addcmul(state[degree], gates[degree + 1], mixed[degree]))
        return out


class FusedReadout(nn.Module):
    """Norm, energy and direct force of every atom; both networks of the scalars run as one.

    Parameters
    ----------
    energy, force : EnergyReadout, DirectForceReadout
        The trained readouts.
    norm : EquivariantRMSNorm
        The norm before them.
    energy_scale, force_scale : Tensor
        Scales of the outputs, ().
    """

    def __init__(self, energy: EnergyReadout, force: DirectForceReadout, norm: EquivariantRMSNorm, energy_scale: Tensor, force_scale: Tensor) -> None:
        super().__init__()
        self.scale = JointScale(norm)
        gain0, gate = norm.gains[0].detach().unsqueeze(1), norm.gains[1].detach() * force_scale
        first, last = (energy.network[0], force.network[0]), (energy.network[2], force.network[2])
        self.hidden_weight = _frozen(gain0 * torch.cat([_weight(m) for m in first], dim=1))
        self.hidden_bias = _frozen(torch.cat([_bias(m) for m in first]))
        self.out_weight = _frozen(torch.block_diag(_weight(last[0]) * energy_scale, _weight(last[1]) * gate))
        self.out_bias = _frozen(torch.cat([_bias(last[0]) * energy_scale, _bias(last[1]) * gate]))

    def forward(self, state: list[Tensor]) -> tuple[Tensor, Tensor]:
        """State of degrees 0 and 1 to ``(n_atoms,)`` and ``(n_atoms, 3)``, scaled."""
        scale = self.scale(state)
        hidden = nn.functional.silu(torch.addmm(self.hidden_bias, (state[0] * scale).squeeze(1), self.hidden_weight))
        out = torch.addmm(self.out_bias, hidden, self.out_weight)
        gates = out[:, 1:] * scale.squeeze(-1)
        return out[:, 0], torch.bmm(state[1], gates.unsqueeze(2)).squeeze(2)
