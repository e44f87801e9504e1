"""The inference form against the network it is built from, values and gradients, and every adjoint against autograd."""

import numpy as np
import pytest
import torch

from benchmarks.clusters import NUMBERS, all_pairs, random_cluster, random_orthogonal
from tests.training.helpers import small_network
from training.exported import ExportedModel
from training.fused import FusedTransformer
from training.fused.edges import NO_WEIGHT, EdgeCotangents, cotangents_in_portions, in_portions, make_edges
from training.fused.repulsion import TabulatedRepulsion
from training.fused.spline import SplineBasis, SplineTable, spline_table
from training.network.repulsion import ScreenedRepulsion


def seasoned_network(seed: int = 0, num_layers: int = 3):
    """A small float64 network in which nothing is at its initial value: gains, sinks, scales and shifts differ too."""
    network = small_network(seed, num_layers).double()
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
        table, basis = SplineTable(*spline_table(self.function, 5.0, 1024)), SplineBasis(5.0, 1024).double()
        r = torch.rand(2000, dtype=torch.float64) * 5
        r[:3] = torch.tensor([0.0, 5.0, 5.0 / 1024 * 7])
        r.requires_grad_(True)
        values = table(basis(r))[:, 0]
        assert float((values - self.function(r)).abs().max()) < 2e-8  # differences rounded to float32 add up
        for column in range(2):
            (got,) = torch.autograd.grad(table(basis(r))[:, 0, column].sum(), r)
            (expected,) = torch.autograd.grad(self.function(r)[:, column].sum(), r)
            assert float((got - expected).abs().max()) < 1e-6

    def test_error_falls_with_the_fourth_power_of_the_interval(self):
        errors = []
        for n in (32, 64):
            table, basis = SplineTable(*spline_table(self.function, 5.0, n)), SplineBasis(5.0, n).double()
            r = torch.linspace(0, 5, 3001, dtype=torch.float64)
            errors.append(float((table(basis(r))[:, 0] - self.function(r)).abs().max()))
        assert 12 < errors[0] / errors[1] < 20

    def test_value_slope_and_curvature_are_continuous_at_the_nodes(self):
        table, basis = SplineTable(*spline_table(self.function, 5.0, 16)), SplineBasis(5.0, 16).double()

        def derivatives(r0):
            r = torch.tensor([r0], dtype=torch.float64, requires_grad=True)
            value = table(basis(r))[0, 0, 0]
            (slope,) = torch.autograd.grad(value, r)
            return float(value), float(slope)

        h, node = 1e-7, 5.0 / 16 * 5
        below, above = derivatives(node - h), derivatives(node + h)
        assert abs(above[0] - below[0]) < 1e-6
        assert abs(above[1] - below[1]) < 1e-5

    def test_no_jump_at_any_node_in_float64_though_the_table_is_float32(self):
        n = 512
        table, basis = SplineTable(*spline_table(self.function, 5.0, n)), SplineBasis(5.0, n).double()
        exact = table.table.clone()
        table.float().double()  # as a file is written and read
        assert torch.equal(table.table, exact)
        nodes = torch.arange(1, n, dtype=torch.float64) * (5.0 / n)
        h = 1e-11

        def jumps():
            below, above = table(basis(nodes - h)), table(basis(nodes + h))
            return float((above - below - 2 * h * table(basis(nodes, True))[:, 1:] * basis.per_length).abs().max())

        assert jumps() < 1e-11
        table.residues.zero_()
        assert jumps() > 1e-8  # what the residues are for

    def test_slopes_are_the_derivatives_of_the_table(self):
        table, basis = SplineTable(*spline_table(self.function, 5.0, 64)), SplineBasis(5.0, 64).double()
        r = (torch.rand(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 5).requires_grad_(True)
        both = table(basis(r, True)).detach()
        for column in range(2):
            values = table(basis(r))[:, 0, column]
            assert torch.equal(both[:, 0, column], values)
            (expected,) = torch.autograd.grad(values.sum(), r)
            torch.testing.assert_close(both[:, 1, column] * basis.per_length, expected, rtol=1e-12, atol=1e-12)


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
    distance.requires_grad_(True)
    energy, _, slope = table.evaluate(*arguments, True)
    torch.testing.assert_close(slope, torch.autograd.grad(energy.sum(), distance)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("num_layers", [1, 2, 3])
@pytest.mark.parametrize("n_atoms", [1, 2, 7, 25])
def test_equals_the_network(n_atoms, num_layers):
    network = seasoned_network(num_layers=num_layers)
    fused = FusedTransformer(network)
    species, positions = random_cluster(n_atoms, seed=n_atoms, spread=1.0 + 0.06 * n_atoms)
    neighbors, mask = (
        all_pairs(positions, network.cutoff) if n_atoms > 1 else (torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.bool))
    )
    expected = outputs_and_gradient(network, species, positions, neighbors, mask)
    got = outputs_and_gradient(fused, species, positions, neighbors, mask)
    for a, b, limit in zip(got, expected, (1e-7, 1e-7, 5e-6), strict=True):
        assert float((a - b).abs().max()) <= limit * max(1.0, float(b.abs().max()))


@pytest.mark.parametrize("threads", [1, 2, 9])
def test_portions_of_receivers_change_nothing(threads):
    """A portion grows with the threads that share it."""
    fused = FusedTransformer(seasoned_network())
    species, positions = random_cluster(20, spread=2.0)
    neighbors, mask = all_pairs(positions, fused.cutoff)
    whole = outputs_and_gradient(fused, species, positions, neighbors, mask)
    fused.edges_at_once_cpu, fused.threads = 3 * neighbors.shape[1], threads
    assert fused.receivers_at_once(neighbors) == 3 * threads
    for a, b in zip(outputs_and_gradient(fused, species, positions, neighbors, mask), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def randn(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def random_state(network, n, degrees):
    channels = network.layers[1].self_interaction.channels
    return [randn(n, 2 * d + 1, channels[d], seed=d + 1).requires_grad_(True) for d in range(degrees)]


def cotangents(outputs):
    """A random cotangent of every output, and the sum of their products, to be differentiated."""
    g = [randn(*y.shape, seed=10 + i) for i, y in enumerate(outputs)]
    return g, sum((a * y).sum() for a, y in zip(g, outputs, strict=True))


def assert_gradients(got, total, inputs):
    expected = torch.autograd.grad(total, inputs)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12 * float(b.abs().max()))


class TestWaysOfGpu:
    """What a GPU computes in other steps, on a CPU."""

    def test_factors_of_a_table(self):
        frequencies, mix = torch.linspace(0.3, 2.0, 6, dtype=torch.float64), torch.randn(6, 40, generator=torch.Generator().manual_seed(0)).double()
        table = SplineTable(*spline_table(lambda r: torch.tanh(r.unsqueeze(1) * frequencies) @ mix, 5.0, 64)).float()
        assert table.has_factors
        assert table.columns.shape == (3 * 65, 8)
        spline = SplineBasis(5.0, 64).float()(torch.rand(300) * 5, True)
        values, found = table(spline), table.by_factors(spline)
        for kind in range(2):
            assert float((found - values)[:, kind].abs().max()) < 1e-6 * float(values[:, kind].abs().max())

    def test_a_table_of_few_functions_has_no_factors(self):
        assert not SplineTable(*spline_table(TestSpline.function, 5.0, 64)).has_factors

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_softmax(self, dtype):
        softmax = FusedTransformer(seasoned_network()).layers[0].attention.softmax.to(dtype)
        products = 30 * torch.randn(5, 7, softmax.sink.shape[2], dtype=dtype, generator=torch.Generator().manual_seed(0))
        log_cutoff = torch.zeros(5, 7, 1, dtype=dtype)
        log_cutoff[0], log_cutoff[1, 3:] = NO_WEIGHT, NO_WEIGHT  # an atom without neighbours, one with padding
        logits = torch.addmm(log_cutoff.reshape(-1, 1), products.view(35, -1), softmax.sum_in_head).view(products.shape)
        expected = softmax(products, log_cutoff)
        assert (expected[0] == 0).all()
        torch.testing.assert_close(softmax.by_sums(logits), expected)


class TestAdjointsOfNodes:
    """Each against autograd through its own `forward`."""

    n = 4

    @pytest.mark.parametrize("layer", [0, 1, 2])
    def test_merged_and_added_maps(self, network, layer):
        block = [*network.layers, network.last][layer]
        state = random_state(network, self.n, len(block.components))
        out = block.value_query(state)
        g, total = cotangents(out)
        to = [randn(*f.shape, seed=20) for f in state]
        got = block.value_query.adjoint(g, to)
        assert_gradients([a - b for a, b in zip(got, to, strict=True)], total, state)
        gathered = randn(self.n, len(block.add.weights) ** 2, block.channels).requires_grad_(True)
        out = block.add(state, gathered)
        g, total = cotangents(out)
        assert_gradients([block.add.adjoint(g)], total, [gathered])

    def test_scale(self, network):
        state = random_state(network, self.n, 3)
        module = network.layers[1].scale
        scale = module(state)
        g, total = cotangents([f * scale for f in state])
        product = sum((a * f * scale).sum([1, 2]) for a, f in zip(g, state, strict=True)).unsqueeze(1)
        assert_gradients(module.adjoint(state, scale, product, [a * scale for a in g]), total, state)

    @pytest.mark.parametrize("layer", [0, 2])
    def test_self_interaction(self, network, layer):
        module = [*network.layers, network.last][layer].self_interaction
        state = random_state(network, self.n, len(module.channels))
        out, saved = module(state)
        g, total = cotangents(out)
        assert_gradients(module.adjoint(state, saved, g), total, state)

    def test_readout(self, network):
        state = random_state(network, self.n, 2)
        energy, _, saved = network.readout(state)
        assert_gradients(network.readout.adjoint(state, saved), energy.sum(), state)


class TestAdjointsOfEdges:
    """Geometry and attention on random edges, with padding."""

    n, k = 5, 4

    def edges(self, network):
        rng = np.random.default_rng(2)
        displacement = torch.tensor(rng.normal(size=(self.n, self.k, 3))).requires_grad_(True)
        mask = torch.tensor(rng.uniform(size=(self.n, self.k)) < 0.8)
        mask[0] = False
        neighbors = torch.tensor(rng.integers(0, self.n, (self.n, self.k))) * mask
        return displacement, neighbors, mask

    def test_geometry(self, network):
        displacement, _, mask = self.edges(network)
        distance, u, coupling, log_cutoff = network.geometry(displacement, mask)
        block = coupling.view(self.n, self.k, 6, 9)[:, :, 1:, 1:].transpose(1, 2)
        (g_distance, g_block, g_log), total = cotangents([distance, block, log_cutoff.squeeze(2)])
        got = network.geometry.adjoint(distance, u, mask, g_distance, EdgeCotangents(torch.zeros_like(g_log), g_block, g_log))
        assert_gradients([got], total, [displacement])

    @pytest.mark.parametrize("layer", [0, 1, 2])
    def test_attention(self, network, layer):
        """Degree 0 in; 2 in and out; 2 in, 1 out."""
        displacement, neighbors, mask = self.edges(network)
        block = [*network.layers, network.last][layer]
        module, c = block.attention, block.channels
        value = randn(self.n, sum(block.components), c, seed=5).requires_grad_(True)
        query = randn(self.n, block.asked, c, seed=6).requires_grad_(True)
        distance, u, coupling, log_cutoff = network.geometry(displacement, mask)
        # Apart from each other, so that each cotangent is compared by itself; the displacement enters by the coupling alone.
        r, envelope = (x.detach().requires_grad_(True) for x in (distance, log_cutoff))
        gathered, _, _ = module(query, value, make_edges(neighbors, network.spline(r.view(-1)), coupling, envelope))
        (g,), total = cotangents([gathered])
        with torch.no_grad():
            edges = make_edges(neighbors, network.spline(distance.view(-1), True), coupling, log_cutoff)
            again, alpha, made = module(query, value, edges)
            g_value, g_edges = torch.zeros_like(value), network.geometry.no_cotangents(log_cutoff)
            g_query = module.adjoint(made, alpha, again, query, edges, g, g_value, g_edges)
            nothing = torch.zeros_like(distance)
            turn = network.geometry.adjoint(distance, u, mask, nothing, EdgeCotangents(nothing, g_edges.coupling, nothing))
        assert torch.equal(again, gathered)
        got = [g_edges.slots * network.spline.per_length, g_edges.log_cutoff.unsqueeze(2), turn]
        inputs = [r, envelope, displacement]
        if layer > 0:  # values and queries of the first do not depend on the positions
            got, inputs = [*got, g_value, g_query], [*inputs, value, query]
        assert_gradients(got, total, inputs)

    def test_portions_are_as_wide_as_their_neighbors(self, network):
        displacement, neighbors, mask = self.edges(network)
        mask[1, 2:], mask[2], mask[3] = False, False, True
        distance, _, coupling, log_cutoff = network.geometry(displacement, mask)
        whole = (neighbors, network.spline(distance.view(-1), True), coupling, log_cutoff)
        portions = in_portions(*whole, mask, 2)
        places = cotangents_in_portions(network.geometry.no_cotangents(log_cutoff), portions)
        widths = [int((m * torch.arange(1, self.k + 1)).max()) for m in mask.split(2)]
        assert [p.neighbors.shape for p in portions] == [(2, widths[0]), (2, self.k), (1, widths[2])]
        assert [tuple(p.coupling.shape) for p in places] == [(2, 5, widths[0], 8), (2, 5, self.k, 8), (1, 5, widths[2], 8)]
        for i, portion in enumerate(portions):
            of = slice(2 * i, 2 * i + 2), slice(0, widths[i])
            assert torch.equal(portion.neighbors, neighbors[of])
            assert torch.equal(portion.log_cutoff, log_cutoff[of])
            a = coupling.view(self.n, self.k, 6, 9)[of]
            assert torch.equal(portion.coupling, a.reshape(-1, 6, 9))
            assert torch.equal(portion.lift, a.transpose(1, 2))
            alone = network.spline(distance[of].reshape(-1), True)
            assert all(torch.equal(a, b) for a, b in zip(portion.spline, alone, strict=True))
        assert in_portions(*whole, torch.zeros_like(mask), 4)[0].neighbors.shape == (4, 1)  # no neighbour at all
        assert in_portions(*whole, mask, self.n)[0].neighbors is neighbors


@pytest.fixture(scope="module")
def network():
    return FusedTransformer(seasoned_network())


@pytest.fixture(scope="module", params=[1, 2, 3], ids=lambda n: f"{n} layers")
def of_any_depth(request):
    return FusedTransformer(seasoned_network(num_layers=request.param))


@pytest.fixture(scope="module")
def scripted(of_any_depth):
    return torch.jit.script(of_any_depth)


@pytest.fixture
def copy_of(of_any_depth):
    """Makes the same network anew."""
    return lambda: FusedTransformer(seasoned_network(num_layers=len(of_any_depth.layers) + 1))


class TestGradient:
    """`energy_and_gradient` of the whole network, as it is exported: scripted."""

    @staticmethod
    def edges(n_atoms, cutoff, extra=0):
        """A cluster, the last atom far from all others; `extra` padded slots."""
        species, positions = random_cluster(n_atoms, seed=n_atoms, spread=1.0 + 0.06 * n_atoms)
        if n_atoms == 1:
            return species, torch.zeros(1, 1, 3, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.bool)
        positions[-1] += 50.0
        neighbors, mask = all_pairs(positions, cutoff)
        neighbors, mask = (torch.nn.functional.pad(x, (0, extra)) for x in (neighbors, mask))
        return species, positions[neighbors] - positions.unsqueeze(1), neighbors, mask

    @staticmethod
    def by_autograd(network, species, displacement, neighbors, mask):
        leaf = displacement.clone().requires_grad_(True)
        energy, force = network(species, leaf, neighbors, mask)
        return energy.detach(), force.detach(), torch.autograd.grad(energy.sum(), leaf)[0]

    @pytest.mark.parametrize(("n_atoms", "extra"), [(1, 0), (2, 0), (7, 0), (7, 3), (20, 0)])
    def test_equals_autograd(self, of_any_depth, scripted, n_atoms, extra):
        arguments = self.edges(n_atoms, of_any_depth.cutoff, extra)
        expected = self.by_autograd(of_any_depth, *arguments)
        for module in (of_any_depth, scripted):
            for got, value in zip(module.energy_and_gradient(*arguments), expected, strict=True):
                torch.testing.assert_close(got, value, rtol=1e-12, atol=1e-12 * max(1.0, float(value.abs().max())))
        assert (expected[2][~arguments[3]] == 0).all()
        assert n_atoms <= 2 or expected[2].abs().max() > 0.1

    def test_portions_keep_the_messages_or_make_them_again(self, of_any_depth, copy_of):
        arguments = self.edges(20, of_any_depth.cutoff)
        expected = of_any_depth.energy_and_gradient(*arguments)
        in_portions, kept = copy_of(), copy_of()
        in_portions.edges_kept_cpu, in_portions.edges_at_once_cpu = 0, 3 * arguments[2].shape[1] + 1  # the last portion is not full
        kept.edges_kept_cpu, kept.edges_at_once_cpu = arguments[2].numel(), in_portions.edges_at_once_cpu
        whole = copy_of()
        whole.edges_kept_cpu = 0
        of_threads = copy_of()
        of_threads.edges_kept_cpu, of_threads.edges_at_once_cpu, of_threads.threads = 0, 2 * arguments[2].shape[1], 3
        for other in (torch.jit.script(in_portions), in_portions, torch.jit.script(kept), kept, whole, of_threads):
            for a, b in zip(other.energy_and_gradient(*arguments), expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12 * float(b.abs().max()))

    def test_single_precision(self, of_any_depth, copy_of):
        """As near to float64 as autograd is in single precision, with displacements in either."""
        species, displacement, neighbors, mask = self.edges(12, of_any_depth.cutoff)
        exact = of_any_depth.energy_and_gradient(species, displacement, neighbors, mask)[2]
        single = copy_of().float()
        for wide in (displacement, displacement.float()):
            got = single.energy_and_gradient(species, wide, neighbors, mask)[2]
            assert got.dtype == wide.dtype
            autograd = self.by_autograd(single, species, wide, neighbors, mask)[2]
            errors = [float((x.double() - exact).abs().max() / exact.abs().max()) for x in (got, autograd)]
            assert errors[0] < max(2 * errors[1], 1e-6)

    @pytest.mark.parametrize("reflect", [False, True])
    def test_equivariance(self, of_any_depth, reflect):
        species, displacement, neighbors, mask = self.edges(8, of_any_depth.cutoff)
        q = random_orthogonal(3, reflect)
        gradient = of_any_depth.energy_and_gradient(species, displacement, neighbors, mask)[2]
        turned = of_any_depth.energy_and_gradient(species, displacement @ q.T, neighbors, mask)[2]
        assert float((turned - gradient @ q.T).abs().max()) <= 1e-13 * float(gradient.abs().max())

    def test_coincident_atoms_give_finite_numbers(self, of_any_depth):
        species, displacement, neighbors, mask = self.edges(5, of_any_depth.cutoff)
        displacement = displacement.clone()
        displacement[0, 0] = 0.0
        displacement[neighbors[0, 0], (neighbors[neighbors[0, 0]] == 0).nonzero()[0, 0]] = 0.0
        for x in of_any_depth.energy_and_gradient(species, displacement, neighbors, mask):
            assert torch.isfinite(x).all()


@pytest.fixture(scope="module", params=[1, 3], ids=lambda n: f"{n} layers")
def exported(request):
    """A model whose messages are made in portions of 512 edges, as it is, scripted, and frozen as in OpenMM."""
    model = ExportedModel(seasoned_network(num_layers=request.param), NUMBERS).double().eval()
    model.network.edges_at_once_cpu = model.network.edges_kept_cpu = 512
    scripted = torch.jit.script(model)
    return model, scripted, torch.jit.freeze(scripted, preserved_attrs=["conservative_and_direct"])


@pytest.mark.parametrize("n_atoms", [1, 9, 60])  # alone; all pairs; listed, and in several portions
@pytest.mark.parametrize("periodic", [False, True])
def test_exported_conservative_forces(exported, n_atoms, periodic):
    """Minus the gradient of the energy, which autograd takes from the same file."""
    scripted = exported[1]
    rng = np.random.default_rng(n_atoms)
    box = torch.tensor([[1.1, 0, 0], [0.2, 1.0, 0], [-0.3, 0.1, 1.2]], dtype=torch.float64) if periodic else None
    grid = np.stack(np.meshgrid(*[np.arange(4)] * 3, indexing="ij"), -1).reshape(-1, 3)[:n_atoms]
    x = torch.tensor(0.24 * grid + rng.uniform(-0.04, 0.04, (n_atoms, 3)))
    z = torch.tensor(rng.choice(NUMBERS, n_atoms))
    leaf = x.clone().requires_grad_(True)
    energy = scripted.energy(leaf, z, box)
    (gradient,) = torch.autograd.grad(energy, leaf)
    direct = scripted(x, z, box)[1]
    for module in exported:
        for _ in range(3):  # the interpreter optimises during the first calls
            got = module.conservative_and_direct(leaf, z, box)
            assert not any(y.requires_grad for y in got)
            assert float(got[0]) == pytest.approx(float(energy), rel=1e-12, abs=1e-9)
            torch.testing.assert_close(got[1], -gradient, rtol=1e-10, atol=1e-10 * float(gradient.abs().max()))
            torch.testing.assert_close(got[2], direct, rtol=1e-10, atol=1e-8)


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
    unknown = [([1, 6, z, 8], x) for z in (17, 0, 255, 256, 1000, -1)]
    for z, moved in (*unknown, ([1, 6, 7, 8], x.clone().fill_diagonal_(torch.inf))):
        energy, forces = model(moved, torch.tensor(z))
        assert torch.isnan(energy)
        assert torch.isnan(forces).all()


@pytest.mark.parametrize("n_atoms", [4, 40])
@pytest.mark.parametrize("entry", [(1, 0), (2, 1), (2, 2)])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_box_that_is_not_finite_gives_nan(n_atoms, entry, value):
    """It makes atoms look isolated, with a plausible energy."""
    model = ExportedModel(seasoned_network(), NUMBERS)
    x = torch.rand(n_atoms, 3, dtype=torch.float64)
    box = torch.eye(3, dtype=torch.float64) * 1.5
    box[entry] = value
    energy, forces = model(x, torch.tensor([1, 6, 7, 8]).repeat(n_atoms // 4), box)
    assert torch.isnan(energy)
    assert torch.isnan(forces).all()


def test_no_atoms_are_an_error():
    model = ExportedModel(seasoned_network(), NUMBERS)
    with pytest.raises(ValueError, match="of at least one atom"):
        model(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))


def test_conservative_forces_of_a_rounded_file_in_float64():
    """What is rounded to float32 is rounded for both: the gradient stays that of the energy, to float64."""
    model = ExportedModel(seasoned_network(), NUMBERS).to(torch.float32).double().eval()
    x = torch.tensor(np.random.default_rng(0).uniform(0, 0.4, (12, 3))).requires_grad_(True)
    z = torch.tensor([1, 6, 7, 8] * 3)
    (gradient,) = torch.autograd.grad(model.energy(x, z), x)
    got = model.conservative_and_direct(x, z)[1]
    torch.testing.assert_close(got, -gradient, rtol=0, atol=1e-12 * float(gradient.abs().max()))
