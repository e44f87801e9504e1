"""Physics of the whole network."""

import pytest
import torch

from benchmarks.clusters import NUMBERS, all_pairs, evaluate, random_cluster, random_orthogonal
from tests.training.helpers import SMALL, small_network
from training import neighbors as neighbor_search
from training.exported import ExportedModel
from training.neighbors import minimum_image, neighbor_matrix

LIMIT = {torch.float32: 1e-6, torch.float64: 1e-12}


@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("reflect", [False, True], ids=["rotation", "reflection"])
def test_equivariance(dtype, reflect, num_layers):
    network = small_network(num_layers=num_layers)
    species, x = random_cluster(9)
    q = random_orthogonal(3, reflect)
    energy, force = evaluate(network, species, x)
    rotated_energy, rotated_force = evaluate(network, species, x @ q.T)
    expected = (force.double() @ q.T).to(dtype)
    assert float((rotated_energy - energy).norm() / energy.norm()) < LIMIT[dtype]
    assert float((rotated_force - expected).norm() / expected.norm()) < LIMIT[dtype]


@pytest.mark.parametrize("num_layers", [1, 3])
def test_translation_and_permutation(dtype, num_layers):
    network = small_network(num_layers=num_layers)
    species, x = random_cluster(9)
    energy, force = evaluate(network, species, x)
    shifted_energy, shifted_force = evaluate(network, species, x + torch.tensor([0.7, -1.3, 2.1]))
    assert float((shifted_energy - energy).norm() / energy.norm()) < LIMIT[dtype]
    assert float((shifted_force - force).norm() / force.norm()) < LIMIT[dtype]
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    permuted_energy, permuted_force = evaluate(network, species[order], x[order])
    assert float((permuted_energy - energy[order]).norm() / energy.norm()) < LIMIT[dtype]
    assert float((permuted_force - force[order]).norm() / force.norm()) < LIMIT[dtype]


@pytest.mark.parametrize("num_layers", [1, 3])
def test_gradient_against_finite_differences(num_layers):
    network = small_network(num_layers=num_layers).double()
    species, x = random_cluster(6)
    x.requires_grad_(True)
    (gradient,) = torch.autograd.grad(evaluate(network, species, x)[0].sum(), x)
    h = 1e-5
    for i, a in ((0, 0), (2, 1), (5, 2)):
        moved = []
        for sign in (1, -1):
            y = x.detach().clone()
            y[i, a] += sign * h
            moved.append(float(evaluate(network, species, y)[0].sum()))
        assert (moved[0] - moved[1]) / (2 * h) == pytest.approx(float(gradient[i, a]), rel=1e-6, abs=1e-9)


def test_separated_molecules_add_up():
    network = small_network().double()
    species, x = random_cluster(5)
    energy, force = evaluate(network, species, x)
    both_energy, both_force = evaluate(network, torch.cat([species, species]), torch.cat([x, x + 50.0]))
    torch.testing.assert_close(both_energy, torch.cat([energy, energy]))
    torch.testing.assert_close(both_force, torch.cat([force, force]))


def test_isolated_atom_is_finite_and_feels_nothing():
    network = small_network()
    species = torch.tensor([3, 1])
    positions = torch.tensor([[0.0, 0, 0], [30.0, 0, 0]])
    energy, force = evaluate(network, species, positions)
    assert torch.isfinite(energy).all()
    assert torch.equal(force, torch.zeros(2, 3))


def test_energy_and_forces_are_continuous_as_a_neighbour_crosses_the_cutoff():
    """Pull the only close neighbour of an atom out: energy, force and its slope fade to exactly zero, without a jump."""
    network = small_network().double()
    species = torch.tensor([1, 0])

    def at(r: float):
        x = torch.tensor([[0.0, 0, 0], [r, 0, 0]], dtype=torch.float64, requires_grad=True)
        energy, force = evaluate(network, species, x)
        (gradient,) = torch.autograd.grad(energy.sum(), x)
        return float(energy.sum()), float(gradient[1, 0]), float(force[1, 0])

    beyond = at(SMALL.cutoff + 0.1)
    assert beyond[1:] == (0.0, 0.0)
    inside = [at(SMALL.cutoff - d) for d in (1e-3, 2e-3)]
    # The envelope falls as (r_c - r)^3: the energy by 1e-9, its slope by 1e-6.
    assert abs(inside[0][0] - beyond[0]) < 1e-7
    assert abs(inside[0][1]) < 1e-4
    assert abs(inside[1][1]) / abs(inside[0][1]) == pytest.approx(4.0, rel=0.05)
    assert abs(inside[1][2]) / abs(inside[0][2]) == pytest.approx(8.0, rel=0.05)


def test_padding_never_reaches_the_result():
    network = small_network()
    species, x = random_cluster(6)
    x = x.float()
    neighbors, mask = all_pairs(x, 4.0)
    displacement = x[neighbors] - x.unsqueeze(1)
    expected = network(species, displacement, neighbors, mask)
    padding = torch.full((6, 3), float("nan"))[:, :, None].expand(-1, -1, 3)
    wide = torch.cat([displacement, padding], dim=1)
    more = torch.cat([neighbors, torch.zeros(6, 3, dtype=torch.int64)], dim=1)
    got = network(species, wide, more, torch.cat([mask, torch.zeros(6, 3, dtype=torch.bool)], dim=1))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_coincident_atoms_give_finite_gradients():
    network = small_network()
    x = torch.zeros(2, 3, requires_grad=True)
    energy, force = evaluate(network, torch.tensor([1, 0]), x)
    (gradient,) = torch.autograd.grad(energy.sum(), x)
    assert torch.isfinite(energy).all()
    assert torch.isfinite(force).all()
    assert torch.isfinite(gradient).all()


class TestExportedModule:
    def test_scripted_equals_eager(self, dtype):
        model = ExportedModel(small_network(), NUMBERS).eval()
        scripted = torch.jit.script(model)
        species, x = random_cluster(9)
        numbers, x = torch.tensor(NUMBERS)[species], (x / 10).to(dtype)
        box = torch.tensor([[1.1, 0, 0], [0.2, 1.0, 0], [-0.3, 0.4, 0.9]], dtype=dtype)
        for cell in (None, box):
            energy, forces = model(x, numbers, cell)
            for _ in range(4):  # the interpreter optimises during the first calls
                scripted_energy, scripted_forces = scripted(x, numbers, cell)
            torch.testing.assert_close(scripted_energy, energy, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(scripted_forces, forces, rtol=1e-4, atol=1e-3)
            torch.testing.assert_close(scripted.energy(x, numbers, cell), energy, rtol=1e-6, atol=1e-6)

    def test_unknown_element_gives_nan_never_a_number(self):
        model = ExportedModel(small_network(), NUMBERS)
        energy, forces = model(torch.rand(2, 3), torch.tensor([1, 17]))
        assert torch.isnan(energy)
        assert torch.isnan(forces).all()

    def test_coordinates_that_are_not_finite_give_nan_never_a_number(self):
        model = ExportedModel(small_network(), NUMBERS)
        for bad in (float("nan"), float("inf")):
            energy, forces = model(torch.tensor([[0.0, 0, 0], [0.1, bad, 0], [0, 0, 0.1]]), torch.tensor([1, 6, 8]))
            assert torch.isnan(energy)
            assert torch.isnan(forces).all()

    def test_small_box_is_refused(self):
        model = ExportedModel(small_network(), NUMBERS)
        with pytest.raises(ValueError, match="box is too small"):
            model(torch.rand(2, 3), torch.tensor([1, 6]), torch.eye(3) * 0.79)

    def test_wrong_shapes_are_refused(self):
        model = ExportedModel(small_network(), NUMBERS)
        with pytest.raises(ValueError, match="positions must be"):
            model(torch.rand(2, 3), torch.tensor([1]))


@pytest.mark.parametrize("rows_at_once", [1000, 7])
@pytest.mark.parametrize("seed", range(4))
def test_neighbor_matrix_against_brute_force_over_images(seed, rows_at_once, monkeypatch):
    """Random triclinic boxes in reduced form, atoms far outside: the same pairs as an explicit sum over lattice images."""
    generator = torch.Generator().manual_seed(seed)
    box = torch.diag(0.9 + 0.4 * torch.rand(3, generator=generator, dtype=torch.float64))
    box[1, 0] = (torch.rand((), generator=generator) - 0.5) * box[0, 0]
    box[2, 0] = (torch.rand((), generator=generator) - 0.5) * box[0, 0]
    box[2, 1] = (torch.rand((), generator=generator) - 0.5) * box[1, 1]
    cutoff = 0.5 * float(torch.diag(box).min()) - 1e-3
    x = (torch.rand(30, 3, generator=generator, dtype=torch.float64) * 5 - 2) @ box
    monkeypatch.setattr(neighbor_search, "_pairs_at_once", lambda positions: 30 * rows_at_once)
    neighbors, mask = neighbor_matrix(x, box, cutoff)
    found = {(i, int(j)) for i in range(30) for j in neighbors[i][mask[i]]}
    fractional = x @ torch.linalg.inv(box)
    wrapped = (fractional - fractional.floor()) @ box
    images = torch.cartesian_prod(*[torch.arange(-2.0, 3.0, dtype=torch.float64)] * 3) @ box
    distance = (wrapped[None, :, None] + images[None, None] - wrapped[:, None, None]).norm(dim=-1).amin(-1)
    expected = {(int(i), int(j)) for i, j in torch.nonzero(distance < cutoff) if i != j}
    assert found == expected
    shortest = torch.stack(minimum_image(*(x[neighbors] - x.unsqueeze(1)).unbind(-1), box)).norm(dim=0)
    torch.testing.assert_close(shortest[mask], torch.stack([distance[i, j] for i in range(30) for j in neighbors[i][mask[i]]]))
