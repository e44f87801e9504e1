"""What happens on each atom: joint norm, merged linear maps, attentive self-interaction, readouts.

A state is one tensor per degree, ``(n_atoms, 2*l + 1, channels_l)``. The norm's gains are multiplied into the maps that follow it.

Every module has an `adjoint`: from the cotangent g of its result, the derivative of the energy with respect to that result, it makes those
of its arguments, from what `forward` computed on its way.
"""

import math
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


def _map(x: Tensor, weight: Tensor) -> Tensor:
    """``(n, components, c_in)`` times ``(c_in, c_out)``."""
    return torch.mm(x.reshape(-1, x.shape[2]), weight).view(x.shape[0], x.shape[1], weight.shape[1])


def _add_map(x: Tensor, weight: Tensor, to: Tensor) -> Tensor:
    """The same, added to ``(n, components, c_out)``."""
    return torch.addmm(to.reshape(-1, to.shape[2]), x.reshape(-1, x.shape[2]), weight).view(to.shape)


def _affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``(n, c_in)`` to ``(n, c_out)`` with a weight ``(c_out, c_in)``.

    On a processor by `linear`: TorchScript makes two operators of an addmm, but leaves that alone. A GPU takes four kernels for it where rows are
    few; there the sum is fused with what follows.
    """
    return torch.mm(x, weight.t()) + bias if x.is_cuda else nn.functional.linear(x, weight, bias)


def joined(parts: list[Tensor], dim: int) -> Tensor:
    """Side by side; a single one is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)


class JointScale(nn.Module):
    """The scalar 1 / rms of `EquivariantRMSNorm`, without its gains.

    Parameters
    ----------
    norm : EquivariantRMSNorm
        The norm.
    """

    weights: Tensor
    epsilon: Tensor

    def __init__(self, norm: EquivariantRMSNorm) -> None:
        super().__init__()
        n = len(norm.gains)
        sizes = [(2 * degree + 1) * len(g) for degree, g in enumerate(norm.gains)]
        # Whole numbers over a common denominator: exact in every precision, so that the adjoint is that of the same function in each.
        self.denominator = math.lcm(*(n * size for size in sizes))
        self.weight_of_degree = [1.0 / (n * size) for size in sizes]
        counts = [torch.full((size, 1), self.denominator // (n * size), dtype=norm.gains[0].dtype) for size in sizes]
        self.register_buffer("weights", torch.cat(counts))
        self.register_buffer("epsilon", torch.full((1, 1), norm.epsilon, dtype=norm.gains[0].dtype))

    def forward(self, state: list[Tensor]) -> Tensor:
        """State of the norm's degrees to ``(n_atoms, 1, 1)``."""
        flat = joined([f.flatten(1) for f in state], 1)
        return torch.rsqrt(torch.addmm(self.epsilon, flat * flat, self.weights, alpha=1.0 / self.denominator)).unsqueeze(-1)

    def adjoint(self, state: list[Tensor], scale: Tensor, product: Tensor, g: list[Tensor]) -> list[Tensor]:
        """What comes through the scale: with y = s f and s = (w . f^2 + epsilon)^(-1/2), ds/df = -s^3 w f.

        Parameters
        ----------
        state, scale : list of Tensor and Tensor
            Argument and result of `forward`.
        product : Tensor
            ``(n_atoms, 1)``: the cotangent of y times y, summed over all features.
        g : list of Tensor
            Cotangent of the state as far as it does not come through the scale; degrees beyond those of the norm have none and stay.

        Returns
        -------
        list of Tensor
            The cotangent of the state: g - (s^2 product) w f.
        """
        factor = scale.square() * product.unsqueeze(-1)
        out: list[Tensor] = []
        for degree, weight in enumerate(self.weight_of_degree):
            out.append(torch.addcmul(g[degree], state[degree], factor, value=-weight))
        return out


class MergedLinear(nn.Module):
    """Several bias-free equivariant maps of the same normalised features, as one map per degree, side by side.

    Parameters
    ----------
    maps : sequence of EquivariantLinear
        Maps whose outputs are put side by side; one that stops at a lower degree than another gives zeros above it.
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
                else:
                    parts.append(torch.zeros(len(norm.gains[degree]), _weight(m.maps[0]).shape[1], dtype=norm.gains[degree].dtype))
            self.weights.append(_frozen(norm.gains[degree].detach().unsqueeze(1) * torch.cat(parts, dim=1)))

    def forward(self, state: list[Tensor]) -> list[Tensor]:
        """``[(n_atoms, 2*l + 1, channels_in[l])]`` to ``[(n_atoms, 2*l + 1, sum of channels_out[l])]``."""
        out: list[Tensor] = []
        for degree, weight in enumerate(self.weights):
            out.append(_map(state[degree], weight))
        return out

    def adjoint(self, g: list[Tensor], to: list[Tensor]) -> list[Tensor]:
        """Cotangent of the result, times the transposed maps, added to `to`."""
        out: list[Tensor] = []
        for degree, weight in enumerate(self.weights):
            out.append(_add_map(g[degree], weight.t(), to[degree]))
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
        for degree, weight in enumerate(self.weights):
            x = gathered.narrow(1, degree * degree, 2 * degree + 1)
            out.append(_add_map(x, weight, state[degree]) if degree < self.n_residual else _map(x, weight))
        return out

    def adjoint(self, g: list[Tensor]) -> Tensor:
        """Cotangent of the state after to that of `gathered`; that of the state before is the same as that of the state after."""
        out: list[Tensor] = []
        for degree, weight in enumerate(self.weights):
            out.append(_map(g[degree], weight.t()))
        return torch.cat(out, dim=1)


class FusedSelfInteraction(nn.Module):
    """Norm, attentive self-interaction and residual sum.

    With y the normalised state, y_L, y_R and y_M its images under three maps and x = (y_0, y_L . y_R of each degree), the gates are
    h = W_2 silu(W_1 x + b_1) + b_2, and f + h y_M is the result, with one more term of h for degree 0.

    Parameters
    ----------
    module : AttentiveSelfInteraction
        The trained block.
    norm : EquivariantRMSNorm
        The norm before it.
    """

    order_of_input: Tensor
    order_of_gate: Tensor

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
        self.hidden_weight, self.hidden_bias = _frozen((gains * _weight(first)).t()), _frozen(_bias(first))
        self.out_weight, self.out_bias = _frozen(_weight(last).t()), _frozen(_bias(last))
        # How often each entry holds y as a factor: once in a scalar, twice in a product; and beside each gate.
        self.input_sections = [self.channels[0], *[self.n_products for _ in degrees]]
        orders = [torch.full((size, 1), 1.0 if i == 0 else 2.0, dtype=gains.dtype) for i, size in enumerate(self.input_sections)]
        self.register_buffer("order_of_input", torch.cat(orders))
        orders = [torch.full((size, 1), 0.0 if i == 0 else 1.0, dtype=gains.dtype) for i, size in enumerate(self.sections)]
        self.register_buffer("order_of_gate", torch.cat(orders))

    def forward(self, state: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """State before to state after, and what `adjoint` needs."""
        scale = self.scale(state)
        normed = [f * scale for f in state]
        inputs = [normed[0].squeeze(1)]
        images = self.linear(normed)
        mixed: list[Tensor] = []
        for degree, y in enumerate(images):
            left, right, mix = y.split([self.n_products, self.n_products, self.channels[degree]], dim=2)
            inputs.append((left * right).sum(1))
            mixed.append(mix)
        x = torch.cat(inputs, dim=1)
        hidden = _affine(x, self.hidden_weight, self.hidden_bias)
        gates = _affine(nn.functional.silu(hidden), self.out_weight, self.out_bias)
        parts = gates.unsqueeze(1).split(self.sections, dim=2)
        out = [torch.addcmul(state[0] + parts[0], parts[1], mixed[0])]
        for degree in range(1, len(mixed)):
            out.append(torch.addcmul(state[degree], parts[degree + 1], mixed[degree]))
        return out, [scale, x, hidden, gates] + images  # noqa: RUF005 - TorchScript knows no unpacking

    def adjoint(self, state: list[Tensor], saved: list[Tensor], g: list[Tensor]) -> list[Tensor]:
        """Cotangent of the state after to that of the state before, by the product and the chain rule.

        For the norm it takes the cotangent of y times y, which by Euler's theorem is that of every quantity made of y times the quantity
        and the number of factors y in it.
        """
        scale, x, hidden, gates = saved[0], saved[1], saved[2], saved[3]
        parts = gates.unsqueeze(1).split(self.sections, dim=2)
        g_gates = [g[0].squeeze(1)]
        for degree, channels in enumerate(self.channels):
            g_gates.append((g[degree] * saved[4 + degree].narrow(2, 2 * self.n_products, channels)).sum(1))
        g_gate = torch.cat(g_gates, dim=1)
        g_hidden = torch.ops.aten.silu_backward(torch.mm(g_gate, self.out_weight), hidden)
        g_x = torch.mm(g_hidden, self.hidden_weight)
        g_inputs = g_x.unsqueeze(1).split(self.input_sections, dim=2)
        g_images: list[Tensor] = []
        for degree, channels in enumerate(self.channels):
            left, right, _ = saved[4 + degree].split([self.n_products, self.n_products, channels], dim=2)
            g_product = g_inputs[degree + 1]
            g_images.append(torch.cat([g_product * right, g_product * left, parts[degree + 1] * g[degree]], dim=2) * scale)
        direct = [torch.addcmul(g[0], g_inputs[0], scale)] + g[1:]  # noqa: RUF005
        product = torch.addmm(torch.mm(g_x * x, self.order_of_input), g_gate * gates, self.order_of_gate)
        return self.scale.adjoint(state, scale, product, self.linear.adjoint(g_images, direct))


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
        self.energy_hidden = _weight(first[0]).shape[1]
        self.hidden_weight = _frozen((gain0 * torch.cat([_weight(m) for m in first], dim=1)).t())
        self.hidden_bias = _frozen(torch.cat([_bias(m) for m in first]))
        self.out_weight = _frozen(torch.block_diag(_weight(last[0]) * energy_scale, _weight(last[1]) * gate).t())
        self.out_bias = _frozen(torch.cat([_bias(last[0]) * energy_scale, _bias(last[1]) * gate]))

    def forward(self, state: list[Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
        """State of degrees 0 and 1 to ``(n_atoms,)`` and ``(n_atoms, 3)``, scaled, and what `adjoint` needs."""
        scale = self.scale(state[:2])
        scalars = (state[0] * scale).squeeze(1)
        hidden = _affine(scalars, self.hidden_weight, self.hidden_bias)
        out = _affine(nn.functional.silu(hidden), self.out_weight, self.out_bias)
        gates = out.narrow(1, 1, out.shape[1] - 1) * scale.squeeze(-1)
        return out.select(1, 0), torch.bmm(state[1], gates.unsqueeze(2)).squeeze(2), [scale, scalars, hidden]

    def adjoint(self, state: list[Tensor], saved: list[Tensor]) -> list[Tensor]:
        """Derivative of the summed energies by the state; the vectors act through the norm alone."""
        scale, scalars, hidden = saved[0], saved[1], saved[2]
        of_energy = self.out_weight.narrow(0, 0, 1).narrow(1, 0, self.energy_hidden)
        hidden = hidden.narrow(1, 0, self.energy_hidden)
        g_hidden = torch.ops.aten.silu_backward(of_energy.expand(hidden.shape), hidden)
        g_scalars = torch.mm(g_hidden, self.hidden_weight.narrow(0, 0, self.energy_hidden))
        product = (g_scalars * scalars).sum(1, keepdim=True)
        return self.scale.adjoint(state, scale, product, [g_scalars.unsqueeze(1) * scale, torch.zeros_like(state[1])])
