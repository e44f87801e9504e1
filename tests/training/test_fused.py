"""The inference form against the network it is built from: values and gradients."""

import numpy as np
import pytest
import torch

from tests.training.helpers import NUMBERS, all_pairs, random_cluster, random_orthogonal, small_network
from training.exported import ExportedModel
from training.fused import FusedTransformer
from training.fused.repulsion import TabulatedRepulsion
from training.fused.spline import SplineBasis, SplineTable, spline_table
from training.network.repulsion import ScreenedRepulsion


def seasoned_network(seed: int = 0):
    """A small float64 network in which nothing is at its initial value: gains, sinks, scales and shifts differ too."""
    network = small_network(seed).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
        network.energy_scale.fill_(1.7)
        network.force_scale.fill_(0.6)
        network.energy_shift.copy_(torch.tensor([0.1, -0.2, 0.3, -0.4]))
    return network.requires_grad_(False)


def outputs_and_gradient(network, species, positions, neighbors, mask):
    """Energies, forces, and the gradient of a sum that both enter."""
    x = positions.clone().requires_grad_(True)
    energy, force = network(species, x[neighbors] - x.unsqueeze(1), neighbors, mask)
    weights = torch.linspace(-1, 1, force.numel(), dtype=force.dtype).view_as(force)
    (gradient,) = torch.autograd.grad(energy.sum() + (force * weights).sum(), x)
    return energy.detach(), force.detach(), gradient


class TestSpline:
    @staticmethod
    def function(r):
        return torch.stack([torch.sin(3 * r) + 2.0, torch.exp(-r) * r], dim=1)

    def test_values_and_slopes(self):
        table, basis = SplineTable(spline_table(self.function, 5.0, 1024)), SplineBasis(5.0, 1024).double()
        r = torch.rand(2000, dtype=torch.float64) * 5
        r[:3] = torch.tensor([0.0, 5.0, 5.0 / 1024 * 7])
        r.requires_grad_(True)
        values = table(*basis(r))
        assert float((values - self.function(r)).abs().max()) < 3e-10
        for column in range(2):
            (got,) = torch.autograd.grad(table(*basis(r))[:, column].sum(), r)
            (expected,) = torch.autograd.grad(self.function(r)[:, column].sum(), r)
            assert float((got - expected).abs().max()) < 1e-6

    def test_error_falls_with_the_fourth_power_of_the_interval(self):
        errors = []
        for n in (32, 64):
            table, basis = SplineTable(spline_table(self.function, 5.0, n)), SplineBasis(5.0, n).double()
            r = torch.linspace(0, 5, 3001, dtype=torch.float64)
            errors.append(float((table(*basis(r)) - self.function(r)).abs().max()))
        assert 12 < errors[0] / errors[1] < 20

    def test_value_slope_and_curvature_are_continuous_at_the_nodes(self):
        table, basis = SplineTable(spline_table(self.function, 5.0, 16)), SplineBasis(5.0, 16).double()

        def derivatives(r0):
            r = torch.tensor([r0], dtype=torch.float64, requires_grad=True)
            value = table(*basis(r))[0, 0]
            (slope,) = torch.autograd.grad(value, r)
            return float(value), float(slope)

        h, node = 1e-7, 5.0 / 16 * 5
        below, above = derivatives(node - h), derivatives(node + h)
        assert abs(above[0] - below[0]) < 1e-6
        assert abs(above[1] - below[1]) < 1e-5


def test_repulsion_table():
    repulsion = ScreenedRepulsion(NUMBERS).double()
    table = TabulatedRepulsion(repulsion).double()
    rng = np.random.default_rng(0)
    n, k = 30, 8
    species, neighbors = torch.tensor(rng.integers(0, 4, n)), torch.tensor(rng.integers(0, n, (n, k)))
    distance = torch.tensor(rng.uniform(0.3, 2.0, (n, k)))
    direction = torch.nn.functional.normalize(torch.tensor(rng.normal(size=(n, k, 3))), dim=-1)
    mask = torch.tensor(rng.uniform(size=(n, k)) < 0.8)
    arguments = (species, neighbors, distance, direction, mask)
    for got, expected in zip(table(*arguments), repulsion(*arguments), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("n_atoms", [1, 2, 7, 25])
def test_equals_the_network(n_atoms):
    network = seasoned_network()
    fused = FusedTransformer(network)
    species, positions = random_cluster(n_atoms, seed=n_atoms, spread=1.0 + 0.06 * n_atoms)
    neighbors, mask = (
        all_pairs(positions, network.cutoff) if n_atoms > 1 else (torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.bool))
    )
    expected = outputs_and_gradient(network, species, positions, neighbors, mask)
    got = outputs_and_gradient(fused, species, positions, neighbors, mask)
    for a, b, limit in zip(got, expected, (1e-7, 1e-7, 5e-6), strict=True):
        assert float((a - b).abs().max()) <= limit * max(1.0, float(b.abs().max()))


def test_portions_of_receivers_change_nothing():
    fused = FusedTransformer(seasoned_network())
    species, positions = random_cluster(20, spread=2.0)
    neighbors, mask = all_pairs(positions, fused.cutoff)
    whole = outputs_and_gradient(fused, species, positions, neighbors, mask)
    for layer in fused.layers:
        layer.edges_at_once_cpu = 3 * neighbors.shape[1] + 1
    for a, b in zip(outputs_and_gradient(fused, species, positions, neighbors, mask), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reflect", [False, True])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
def test_equivariance(reflect, dtype, limit):
    fused = FusedTransformer(seasoned_network()).to(dtype)
    species, positions = random_cluster(8)
    neighbors, mask = all_pairs(positions, fused.cutoff)
    q = random_orthogonal(3, reflect)
    energy, force = fused(species, (positions[neighbors] - positions.unsqueeze(1)).to(dtype), neighbors, mask)
    turned = positions @ q.T
    turned_energy, turned_force = fused(species, (turned[neighbors] - turned.unsqueeze(1)).to(dtype), neighbors, mask)
    assert float((turned_energy - energy).abs().max()) <= limit * float(energy.abs().max())
    assert float((turned_force - force @ q.T.to(dtype)).abs().max()) <= limit * float(force.abs().max())


def test_a_neighbour_fades_out_at_the_cutoff():
    """Energy and its slope on both sides of the cutoff, and far below rounding just inside."""
    model = ExportedModel(seasoned_network(), NUMBERS).double()
    z = torch.tensor([8, 1, 6])

    def energy_and_slope(r):
        x = torch.tensor([[0.0, 0.0, 0.0], [0.1, 0.0, 0.0], [0.0, r, 0.0]], dtype=torch.float64, requires_grad=True)
        energy = model.energy(x, z, None)
        (gradient,) = torch.autograd.grad(energy, x)
        return float(energy.detach()), gradient

    inside, outside = energy_and_slope(model.cutoff_nm - 1e-6), energy_and_slope(model.cutoff_nm + 1e-6)
    assert abs(inside[0] - outside[0]) < 1e-9
    assert float((inside[1] - outside[1]).abs().max()) < 1e-5
    middle = energy_and_slope(0.8 * model.cutoff_nm)
    assert abs(middle[0] - outside[0]) > 1e-3


def test_an_unknown_element_or_a_lost_coordinate_gives_nan():
    model = ExportedModel(seasoned_network(), NUMBERS)
    x = torch.rand(4, 3, dtype=torch.float64)
    assert torch.isfinite(model(x, torch.tensor([1, 6, 7, 8]))[1]).all()
    for z, moved in (([1, 6, 17, 8], x), ([1, 6, 7, 8], x.clone().fill_diagonal_(torch.inf))):
        energy, forces = model(moved, torch.tensor(z))
        assert torch.isnan(energy)
        assert torch.isnan(forces).all()
