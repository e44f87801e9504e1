"""Every way to find neighbours against a plain loop over lattice images."""

import itertools

import numpy as np
import pytest
import torch

from training import neighbors as module

# As in the exported file: scripted.
cell_list, find_neighbors, fixed_width, neighbor_matrix = (
    torch.jit.script(getattr(module, name)) for name in ("cell_list", "find_neighbors", "fixed_width", "neighbor_matrix")
)


def in_fixed_width(x, box, cutoff):
    neighbors, mask, excess = fixed_width(x, box, cutoff, 100)
    assert neighbors.shape == mask.shape == (len(x), 100)
    assert excess == 0
    return neighbors, mask


def of_any_number(x, box, cutoff):
    neighbors, displacement, mask, excess = find_neighbors(x, box, cutoff)
    assert excess is None
    length = displacement.norm(dim=-1)
    assert (length[mask] < cutoff).all()
    # Padding is whatever it is, except that a pair within the cutoff is not among it.
    assert neighbors.shape == mask.shape == length.shape
    return neighbors, mask


def of_few(x, box, cutoff):
    """The way for few atoms, 32 of them at a time, whose pairs with the others are left out of what is expected."""
    return find_neighbors(x[:32], box, cutoff)[::2]


CUBIC = np.diag([1.7, 1.9, 2.0])
TRICLINIC = np.array([[1.8, 0.0, 0.0], [0.7, 1.9, 0.0], [-0.8, 0.6, 2.0]])
CUTOFF = 0.45


def brute_force(x, box):
    """Pairs of distinct atoms any of whose images within one lattice vector (two along a) is closer than the cutoff."""
    shifts = [np.zeros(3)] if box is None else [np.array(n) @ box for n in itertools.product((-2, -1, 0, 1, 2), repeat=3)]
    found = set()
    for shift in shifts:
        d = np.linalg.norm(x[None] + shift - x[:, None], axis=-1)
        found |= {(int(i), int(j)) for i, j in zip(*np.nonzero(d < CUTOFF), strict=True) if i != j}
    return found


def pairs(neighbors, mask):
    listed = [(i, int(j)) for i in range(len(mask)) for j in neighbors[i][mask[i]]]
    assert len(listed) == len(set(listed)), "a pair is listed twice"
    return set(listed)


@pytest.mark.parametrize("box", [None, CUBIC, TRICLINIC], ids=["no box", "orthorhombic", "triclinic"])
@pytest.mark.parametrize(
    "way", [of_few, neighbor_matrix, cell_list, of_any_number, in_fixed_width], ids=lambda way: getattr(way, "name", None) or way.__name__
)
def test_pairs(way, box):
    rng = np.random.default_rng(3)
    x = rng.uniform(0, 1, (160, 3)) @ (np.diag([2.3, 1.6, 1.9]) if box is None else box)
    expected = brute_force(x[:32] if way is of_few else x, box)
    if box is not None:
        # Atoms anywhere in space have the same neighbours as in the box.
        x = x + rng.integers(-3, 4, (len(x), 3)) @ box
    assert pairs(*way(torch.tensor(x), None if box is None else torch.tensor(box), CUTOFF)) == expected


def test_ways_agree_in_float32_and_on_faces_of_cells():
    """Coordinates that are multiples of the cutoff lie on the faces of cells."""
    x = torch.tensor(list(itertools.product(range(8), repeat=3)), dtype=torch.float32) * 0.25
    box = torch.eye(3) * 2.0
    for cutoff in (0.25, 0.2501, 0.5, 0.51):
        for periodic in (None, box):
            assert pairs(*cell_list(x, periodic, cutoff)) == pairs(*neighbor_matrix(x, periodic, cutoff))


@pytest.mark.parametrize("edges", [(1, 1, 1), (1, 2, 3), (3, 1, 2)], ids=str)
@pytest.mark.parametrize("is_triclinic", [False, True], ids=["orthorhombic", "triclinic"])
def test_boxes_of_one_two_and_three_cells(edges, is_triclinic):
    """Around a cell of two the other is both before and after, and must not be looked at twice; a single one is its own neighbour."""
    rng = np.random.default_rng(0)
    box = np.diag(0.95 * np.array(edges))
    if is_triclinic:
        box[1, 0], box[2, 0], box[2, 1] = 0.2 * box[0, 0], -0.3 * box[0, 0], 0.15 * box[1, 1]
    x = rng.uniform(-1, 2, (80, 3)) @ box
    assert pairs(*cell_list(torch.tensor(x), torch.tensor(box), CUTOFF)) == brute_force((x @ np.linalg.inv(box) % 1) @ box, box)


def test_a_lone_atom_far_away():
    x = torch.tensor(np.random.default_rng(0).uniform(0, 1, (60, 3)))
    x[0] = 1e7
    assert pairs(*cell_list(x, None, CUTOFF)) == pairs(*neighbor_matrix(x, None, CUTOFF))


def test_a_lone_atom_does_not_gather_all_others_in_one_cell(monkeypatch):
    """The cost is linear whatever evaporates: compared are the atoms of 27 cells, not all with all."""
    x = torch.tensor(np.random.default_rng(0).uniform(0, 4, (1500, 3)))  # 24 atoms in a cubic nanometre
    compared = []
    is_close = module._is_close
    monkeypatch.setattr(module, "_is_close", lambda d, box, cutoff: (compared.append(d[0].numel()), is_close(d, box, cutoff))[1])
    expected = None
    for far in (0.0, 100.0, 3e4):
        x[0] = 4.0 + far
        found = pairs(*module.cell_list(x, None, CUTOFF))
        assert expected is None or found == expected
        expected = found if far else None
    assert compared
    assert sum(compared) < 3 * 0.3 * 1500**2


@pytest.mark.parametrize("extent", [3.0, 300.0, 3e5])
def test_no_pair_is_lost_to_rounding(extent):
    """In float32 far from the first atom, where a cell's number has few digits left."""
    rng = np.random.default_rng(1)
    x = torch.tensor(extent + rng.uniform(0, 1.5, (300, 3)), dtype=torch.float32)
    x[0] = 0.0
    assert pairs(*cell_list(x, None, CUTOFF)) == pairs(*neighbor_matrix(x, None, CUTOFF))


@pytest.mark.parametrize("way", [neighbor_matrix, cell_list], ids=lambda way: way.name)
def test_no_neighbours_and_lost_atoms(way):
    x = torch.arange(40, dtype=torch.float64).unsqueeze(1) * torch.ones(3)
    neighbors, mask = way(x, None, CUTOFF)
    assert neighbors.shape == mask.shape == (40, 1)
    assert not mask.any()
    x[3] = torch.nan
    x[4] = torch.inf
    for box in (torch.eye(3, dtype=torch.float64) * 50, None):
        neighbors, mask = way(x, box, CUTOFF)
        assert not mask[3:5].any()
        assert 0 <= int(neighbors.min()) <= int(neighbors.max()) < 40
    for entry in ((0, 0), (1, 0), (2, 2)):
        for value in (torch.nan, torch.inf):
            box = torch.eye(3, dtype=torch.float64) * 50
            box[entry] = value
            neighbors, mask = way(x, box, CUTOFF)
            assert 0 <= int(neighbors.min()) <= int(neighbors.max()) < 40


@pytest.mark.parametrize("n_atoms", [8, 60], ids=["all pairs", "listed"])
def test_displacements_are_differentiable_nearest_images(n_atoms):
    x = (torch.rand(n_atoms, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 4 - 1).requires_grad_(True)
    box = torch.tensor(TRICLINIC, requires_grad=True)
    neighbors, displacement, mask, _ = find_neighbors(x, box, CUTOFF)
    assert mask.any()
    direct = x[neighbors] - x.unsqueeze(1)
    shift = torch.linalg.solve(box.detach().T, (displacement - direct).detach().reshape(-1, 3).T)
    torch.testing.assert_close(shift, shift.round(), atol=1e-12, rtol=0)
    assert displacement.detach().norm(dim=-1)[mask].max() < CUTOFF
    # By the box too, and by what of it is zero in OpenMM's form, since a strain does not keep it so.
    again = direct + (shift.round().T @ box).view(displacement.shape)
    got, expected = (torch.autograd.grad((d * mask.unsqueeze(-1)).square().sum(), [x, box]) for d in (displacement, again))
    assert expected[1].triu(1).abs().max() > 0
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_more_neighbours_than_a_given_width_holds():
    """Exactly as many fit; one more makes the number NaN that is added to the energy."""
    x = torch.rand(40, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    most = int(neighbor_matrix(x, None, CUTOFF)[1].sum(1).max())
    for capacity, is_nan in ((most, False), (most - 1, True)):
        neighbors, displacement, mask, excess = find_neighbors(x, None, CUTOFF, capacity)
        assert neighbors.shape == mask.shape == displacement.shape[:2] == (40, capacity)
        assert torch.isnan(excess) == is_nan
        assert int(neighbors.min()) >= 0
        assert int(neighbors.max()) < 40
    assert pairs(*find_neighbors(x, None, CUTOFF, most)[::2]) == pairs(*neighbor_matrix(x, None, CUTOFF))
