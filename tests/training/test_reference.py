"""The reference form: every equation of the thesis against explicit loops or e3nn, its symmetries, its derivatives, its way to a file."""

import itertools
import math

import pytest
import torch
from e3nn import o3

from benchmarks.clusters import NUMBERS, all_pairs, evaluate, random_cluster, random_orthogonal, representation, transform
from tests.training.helpers import equivariance_error, random_features
from training.exported import ExportedModel
from training.network import ReferenceConfig, build_network
from training.network.attention import EquivariantAttention
from training.network.geometry import EdgeGeometry, distances_and_directions
from training.network.radial import BesselBasis, envelope
from training.network.reference.attention import ReferenceAttention
from training.network.reference.basis_kernels import BasisKernels, coupled_degrees
from training.network.reference.constants import ExactConstant
from training.network.reference.embedding import PAULING_ELECTRONEGATIVITY, OneHotEmbedding, PhysicalEmbedding, period_and_group, physical_properties
from training.network.reference.layer import ReferenceLayer
from training.network.reference.norm import NormNonlinearity
from training.network.reference.radial_kernels import RadialKernels
from training.network.reference.self_interaction import ReferenceSelfInteraction
from training.network.reference.spherical_harmonics import SphericalHarmonics

LIMIT = {torch.float32: 1e-6, torch.float64: 1e-12}
CUTOFF = 4.0
# Unequal channels per degree, up to the thesis' higher order.
CHANNELS = (4, 3, 2, 1)
SMALL = ReferenceConfig(cutoff=CUTOFF, channels=(4, 3, 2), num_heads=2, num_layers=3, n_basis=6, radial_hidden=8, hidden=8)


def small(seed: int = 0, **changes):
    """A small reference network with random weights."""
    torch.manual_seed(seed)
    return build_network(ReferenceConfig(**{**SMALL.__dict__, **changes}), NUMBERS).eval()


def edges(n_atoms: int, q: torch.Tensor, dtype: torch.dtype, max_degree: int = 3, natural: bool = False):
    """Neighbours, invariants, basis kernels and envelope of a random cluster that was transformed by `q`."""
    _, positions = random_cluster(n_atoms)
    neighbors, mask = all_pairs(positions, CUTOFF)
    rotated = positions @ q.T
    distance, direction = distances_and_directions(rotated[neighbors] - rotated.unsqueeze(1), mask)
    kernels = [k.to(dtype) for k in BasisKernels(max_degree, natural)(direction)]
    return neighbors, BesselBasis(6, CUTOFF)(distance).to(dtype), kernels, (envelope(distance, CUTOFF) * mask).to(dtype)


ONE = torch.eye(3, dtype=torch.float64)


class TestSphericalHarmonics:
    def test_equal_e3nn(self):
        u = torch.nn.functional.normalize(torch.randn(4, 5, 3, dtype=torch.float64), dim=-1)
        for degree, y in enumerate(SphericalHarmonics(6)(u)):
            expected = o3.spherical_harmonics(degree, u, normalize=True, normalization="norm")
            assert float((y - expected).abs().max()) < 1e-13

    def test_hand_computed_degree_two(self):
        x, y, z = 0.36, 0.48, 0.8
        got = SphericalHarmonics(2)(torch.tensor([[[x, y, z]]], dtype=torch.float64))[2].flatten()
        r3 = math.sqrt(3)
        expected = [r3 * x * z, r3 * x * y, y * y - (x * x + z * z) / 2, r3 * y * z, r3 / 2 * (z * z - x * x)]
        torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64))

    @pytest.mark.parametrize("direction", [(0, 0, 1), (0, 0, -1), (0, 1, 0), (1, 0, 0), (0, 0, 0)])
    def test_derivatives_are_finite_everywhere(self, direction):
        x = torch.tensor([[direction]], dtype=torch.float64, requires_grad=True)
        harmonics = SphericalHarmonics(6)
        _, u = distances_and_directions(x, torch.ones(1, 1, dtype=torch.bool))
        (first,) = torch.autograd.grad(sum(y.sum() for y in harmonics(u)), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
        assert torch.isfinite(first).all()
        assert torch.isfinite(second).all()

    @pytest.mark.parametrize("polar", [lambda x: torch.arccos(x[2] / x.norm()), lambda x: torch.atan2((x[0] ** 2 + x[1] ** 2).sqrt(), x[2])])
    def test_angles_fail_on_the_polar_axis(self, polar):
        """The failure that the polynomials are there for: Y_11 ~ sin(theta) cos(phi) = x / r, through angles, at x = y = 0."""

        def through_angles(x):
            return torch.sin(polar(x)) * torch.cos(torch.atan2(x[1], x[0]))

        for direction, fails in (((0.0, 0.0, 1.0), True), ((0.6, 0.0, 0.8), False)):
            x = torch.tensor(direction, requires_grad=True)
            (angular,) = torch.autograd.grad(through_angles(x), x)
            assert bool(torch.isnan(angular).any()) is fails
            _, u = distances_and_directions(x.view(1, 1, 3), torch.ones(1, 1, dtype=torch.bool))
            (ours,) = torch.autograd.grad(SphericalHarmonics(1)(u)[1][0, 0, 0], x)
            assert torch.isfinite(ours).all()
            if not fails:
                torch.testing.assert_close(ours, angular)


def test_constants_stay_exact_through_changes_of_precision():
    values = torch.tensor([1 / 3, -math.sqrt(0.1), 37.5, 0.0], dtype=torch.float64)
    constant = ExactConstant(values).float().double()
    assert float((constant(torch.ones((), dtype=torch.float64)) - values).abs().max()) < 2e-16
    assert constant(torch.ones(())).dtype == torch.float32


PAIRS = list(itertools.product(range(4), range(4)))


class TestEquation21:
    @pytest.mark.parametrize(("receiver", "sender"), PAIRS)
    def test_sum_over_m_by_loops(self, receiver, sender):
        """Equation 2.1 word by word, with the scale that makes messages as large as features."""
        u = torch.nn.functional.normalize(torch.tensor([[[0.3, -0.5, 0.8]]], dtype=torch.float64), dim=-1)
        kernels = BasisKernels(3, False)(u)[receiver * 4 + sender][0, 0]
        degrees = list(range(abs(receiver - sender), receiver + sender + 1))
        assert kernels.shape == (2 * receiver + 1, len(degrees), 2 * sender + 1)
        for path, j in enumerate(degrees):
            y = o3.spherical_harmonics(j, u[0, 0], normalize=True, normalization="norm")
            q = o3.wigner_3j(receiver, sender, j, dtype=torch.float64)
            for a, b in itertools.product(range(2 * receiver + 1), range(2 * sender + 1)):
                expected = math.sqrt((2 * receiver + 1) * (2 * j + 1)) * sum(float(q[a, b, m] * y[m]) for m in range(2 * j + 1))
                assert float(kernels[a, path, b]) == pytest.approx(expected, abs=1e-13)

    @pytest.mark.parametrize(("receiver", "sender"), PAIRS)
    def test_intertwines_rotations(self, receiver, sender):
        """W(R u) = D^l W(u) D^k^T, for every J; under a reflection times (-1)^(l + k + J)."""
        u = torch.nn.functional.normalize(torch.randn(1, 6, 3, dtype=torch.float64), dim=-1)
        basis = BasisKernels(3, False)
        for reflect in (False, True):
            q = random_orthogonal(4, reflect)
            rotated, plain = (basis(v)[receiver * 4 + sender] for v in (u @ q.T, u))
            left, right = representation(q, receiver), representation(q, sender)
            for path, j in enumerate(coupled_degrees(receiver, sender, False)):
                sign = (-1) ** (receiver + sender + j) if reflect else 1
                expected = sign * torch.einsum("ab,nkbc,dc->nkad", left, plain[:, :, :, path], right)
                assert float((rotated[:, :, :, path] - expected).abs().max()) < 1e-12

    @pytest.mark.parametrize(("receiver", "sender"), [(0, 2), (1, 1), (2, 1), (3, 2)])
    def test_equals_e3nn_tensor_product(self, receiver, sender):
        previous = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            u = torch.nn.functional.normalize(torch.randn(1, 1, 3), dim=-1)
            f = torch.randn(2 * sender + 1)
            kernels = BasisKernels(3, False)(u)[receiver * 4 + sender][0, 0]
            for path, j in enumerate(coupled_degrees(receiver, sender, False)):
                # Parities that e3nn's bookkeeping accepts; they play no part in the numbers.
                product = o3.TensorProduct(
                    o3.Irreps([(1, (sender, 1))]),
                    o3.Irreps([(1, (j, 1))]),
                    o3.Irreps([(1, (receiver, 1))]),
                    [(0, 0, 0, "uuu", False)],
                    irrep_normalization="component",
                    path_normalization="none",
                )
                y = o3.spherical_harmonics(j, u[0, 0], normalize=True, normalization="component")
                assert float((kernels[:, path] @ f - product(f, y)).abs().max()) < 1e-12
        finally:
            torch.set_default_dtype(previous)

    def test_natural_parity_keeps_every_other_degree(self):
        assert coupled_degrees(1, 2, False) == [1, 2, 3]
        assert coupled_degrees(1, 2, True) == [1, 3]
        assert sum(len(coupled_degrees(a, b, False)) for a in range(3) for b in range(3)) == 19
        assert sum(len(coupled_degrees(a, b, True)) for a in range(3) for b in range(3)) == 14


def kernel_matrix(layer: RadialKernels, pair: int, channels_in, channels_out, scalars, kernel):
    """Equation 2.2 of one edge by loops, as a matrix ``(2l+1, channels_out, 2k+1, channels_in)``."""
    receiver, sender = divmod(pair, len(channels_in))
    n_paths = kernel.shape[1]
    c_in, c_out = channels_in[sender], channels_out[receiver]
    psi = layer.radial[pair](scalars.view(1, 1, -1)).view(n_paths, c_in, c_out)
    w = torch.zeros(2 * receiver + 1, c_out, 2 * sender + 1, c_in, dtype=torch.float64)
    for path, i, o in itertools.product(range(n_paths), range(c_in), range(c_out)):
        w[:, o, :, i] += psi[path, i, o] * kernel[:, path]
    fan_in = sum(len(coupled_degrees(receiver, k, False)) * c for k, c in enumerate(channels_in))
    return w / math.sqrt(fan_in)


def random_edges(n_atoms: int, n_neighbors: int, max_degree: int):
    generator = torch.Generator().manual_seed(5)
    u = torch.nn.functional.normalize(torch.randn(n_atoms, n_neighbors, 3, generator=generator, dtype=torch.float64), dim=-1)
    scalars = torch.randn(n_atoms, n_neighbors, 6, generator=generator, dtype=torch.float64)
    neighbors = torch.randint(n_atoms, (n_atoms, n_neighbors), generator=generator)
    weight = torch.rand(n_atoms, n_neighbors, generator=generator, dtype=torch.float64)
    return neighbors, scalars, BasisKernels(max_degree, False)(u), weight


class TestEquationsByLoops:
    """Equations 2.2 to 2.9 written out with Python loops, on unequal channels."""

    def test_equation_22_radial_kernels(self):
        torch.manual_seed(0)
        channels_in, channels_out = (3, 2, 1), (2, 4)
        layer = RadialKernels(channels_in, channels_out, 2, False, 6, 8).double()
        neighbors, scalars, kernels, _ = random_edges(3, 2, 2)
        features = [f.double() for f in random_features(channels_in, 3)]
        got = layer([f[neighbors] for f in features], scalars, kernels)
        for i, k, receiver in itertools.product(range(3), range(2), range(2)):
            expected = torch.zeros(2 * receiver + 1, channels_out[receiver], dtype=torch.float64)
            for sender in range(3):
                kernel = kernels[receiver * 3 + sender][i, k]
                w = kernel_matrix(layer, receiver * 3 + sender, channels_in, channels_out, scalars[i, k], kernel)
                expected += torch.einsum("aobi,bi->ao", w, features[sender][neighbors[i, k]])
            torch.testing.assert_close(got[receiver][i, k], expected)

    @pytest.mark.parametrize("channels_in", [(3,), (3, 2)])
    def test_equations_23_to_25_and_28(self, channels_in):
        """Queries, keys, weights and the layer, head by head and neighbour by neighbour."""
        torch.manual_seed(1)
        channels_out, head_channels, heads, n_queried = (5, 4, 2), (2, 1, 3), 2, len(channels_in)
        layer = ReferenceLayer(channels_in, channels_out, head_channels, heads, 2, False, 6, 8, 8).double()
        torch.nn.init.normal_(layer.attention.softmax.sink)
        neighbors, scalars, kernels, weight = random_edges(4, 3, 2)
        features = [f.double() for f in random_features(channels_in, 4)]
        got = layer(features, neighbors, scalars, kernels, weight)
        attention = layer.attention
        both = [2 * heads * c if degree < n_queried else heads * c for degree, c in enumerate(head_channels)]
        n_in = len(channels_in)

        def kernel(i, k, receiver, sender):
            index = receiver * n_in + sender
            return kernel_matrix(attention.kernels, index, channels_in, both, scalars[i, k], kernels[receiver * 3 + sender][i, k])

        own = layer.self_interaction(features)
        for i in range(4):
            query = [features[d][i] @ attention.query.maps[d].weight.T for d in range(n_queried)]  # equation 2.3
            keys, values = [], []
            for k in range(3):  # equation 2.4, and the same with the values' kernels
                message = [
                    sum(torch.einsum("aobi,bi->ao", kernel(i, k, receiver, s), features[s][neighbors[i, k]]) for s in range(n_in))
                    for receiver in range(3)
                ]
                keys.append([m[:, : heads * c] for m, c in zip(message, head_channels, strict=True)][:n_queried])
                values.append([m[:, heads * c :] if d < n_queried else m for d, (m, c) in enumerate(zip(message, head_channels, strict=True))])
            attended = [torch.zeros(2 * d + 1, heads * c, dtype=torch.float64) for d, c in enumerate(head_channels)]
            for h in range(heads):
                cut = [slice(h * c, (h + 1) * c) for c in head_channels]
                size = sum((2 * d + 1) * head_channels[d] for d in range(n_queried))
                s = [sum(float((query[d][:, cut[d]] * key[d][:, cut[d]]).sum()) for d in range(n_queried)) / math.sqrt(size) for key in keys]
                e = [float(weight[i, k]) * math.exp(s[k]) for k in range(3)]  # equation 2.5 with envelope and sink
                total = math.exp(float(attention.softmax.sink[h].detach())) + sum(e)
                for k, degree in itertools.product(range(3), range(3)):
                    attended[degree][:, cut[degree]] += e[k] / total * values[k][degree][:, cut[degree]]
            for degree in range(3):  # equation 2.8
                expected = attended[degree] @ attention.out.maps[degree].weight.T
                if degree < n_in:
                    expected = expected + own[degree][i]
                torch.testing.assert_close(got[degree][i], expected)

    def test_plain_softmax_is_the_limit(self):
        """Equation 2.5 word by word: without sink and with all neighbours well inside the cutoff."""
        layer = ReferenceAttention((3,), (2, 1), (2, 1), 2, 1, False, 6, 8)
        torch.nn.init.constant_(layer.softmax.sink, -60.0)
        logits = torch.randn(4, 5, 2)
        torch.testing.assert_close(layer.softmax(logits, torch.ones(4, 5)), torch.softmax(logits, dim=1))

    def test_equations_26_and_27(self):
        torch.manual_seed(2)
        channels_in, channels_out = (3, 2), (2, 4, 1)
        layer = ReferenceSelfInteraction(channels_in, channels_out, 8)
        features = random_features(channels_in, 3)
        got = layer(features)
        assert len(got) == 2
        for degree, i in itertools.product(range(2), range(3)):
            f, c_in, c_out = features[degree][i], channels_in[degree], channels_out[degree]
            products = [float((f[:, c] * f[:, d]).sum()) / (2 * degree + 1) for c in range(c_in) for d in range(c_in)]
            w = layer.networks[degree](torch.tensor(products)).view(c_in, c_out)  # equation 2.7
            for o in range(c_out):  # equation 2.6
                expected = sum(w[c, o] * f[:, c] for c in range(c_in)) / math.sqrt(c_in)
                torch.testing.assert_close(got[degree][i, :, o], expected)

    def test_equation_29(self):
        layer = NormNonlinearity((3, 2), epsilon=0.1, variance_epsilon=0.01)
        for norm in layer.norms:
            torch.nn.init.normal_(norm.weight)
            torch.nn.init.normal_(norm.bias)
        features = random_features((3, 2), 4)
        got = layer(features)
        for degree, i in itertools.product(range(2), range(4)):
            f, norm = features[degree][i], layer.norms[degree]
            sizes = [math.sqrt(float(f[:, c].square().sum()) + 0.01) for c in range(f.shape[1])]
            mean = sum(sizes) / len(sizes)
            deviation = math.sqrt(sum((s - mean) ** 2 for s in sizes) / len(sizes) + 0.01)
            for c, size in enumerate(sizes):  # equation 2.9
                value = (size - mean) / deviation * float(norm.weight[c]) + float(norm.bias[c])
                torch.testing.assert_close(got[degree][i, :, c], max(value, 0.0) * f[:, c] / size)


@pytest.mark.parametrize("natural", [False, True], ids=["all J", "natural parity"])
@pytest.mark.parametrize("reflect", [False, True], ids=["rotation", "reflection"])
class TestEquivariance:
    """Each layer, degrees 0 to 3. With all J a reflection is no symmetry: then the error must be large, or the test sees nothing."""

    def check(self, got, expected, dtype, symmetric=True):
        error = equivariance_error(got, expected)
        assert error < LIMIT[dtype] if symmetric else error > 1e-3

    @pytest.mark.parametrize("channels_in", [CHANNELS[:1], CHANNELS])
    @pytest.mark.parametrize("channels_out", [(2, 3), (3, 1, 2, 4)])
    def test_layer_and_attention(self, dtype, reflect, natural, channels_in, channels_out):
        torch.manual_seed(0)
        layer = ReferenceLayer(channels_in, channels_out, (1, 3, 2, 1), 2, 3, natural, 6, 8, 8)
        q, features = random_orthogonal(1, reflect), random_features(channels_in, 7)
        # From scalars alone only J = l occurs, so that even with all J there is no pseudo-vector yet.
        symmetric = natural or not reflect or len(channels_in) == 1
        for module in (layer, layer.attention):
            out = module(features, *edges(7, ONE, dtype, natural=natural))
            rotated = module(transform(features, q), *edges(7, q, dtype, natural=natural))
            self.check(rotated, transform(out, q), dtype, symmetric)

    def test_self_interaction_and_norm(self, dtype, reflect, natural):
        torch.manual_seed(0)
        q, features = random_orthogonal(2, reflect), random_features(CHANNELS, 7)
        for module in (ReferenceSelfInteraction(CHANNELS, (2, 3, 1, 2), 8), NormNonlinearity(CHANNELS)):
            self.check(module(transform(features, q)), transform(module(features), q), dtype)

    @pytest.mark.parametrize("channels", [(4, 3), (4, 3, 2), CHANNELS])
    def test_network(self, dtype, reflect, natural, channels):
        network = small(channels=channels, parity="natural" if natural else "all").to(dtype)
        species, x = random_cluster(9)
        q = random_orthogonal(3, reflect)
        energy, force = evaluate(network, species, x)
        rotated_energy, rotated_force = evaluate(network, species, x @ q.T)
        self.check([rotated_force], [(force.double() @ q.T).to(dtype)], dtype, natural or not reflect)
        if natural or not reflect:
            self.check([rotated_energy], [energy], dtype)


def test_translation_and_permutation(dtype):
    network = small().to(dtype)
    species, x = random_cluster(9)
    energy, force = evaluate(network, species, x)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    moved_energy, moved_force = evaluate(network, species[order], x[order] + torch.tensor([0.7, -1.3, 2.1]))
    assert equivariance_error([moved_energy, moved_force], [energy[order], force[order]]) < LIMIT[dtype]


@pytest.mark.parametrize(
    "x",
    [
        [[0, 0, 0], [0, 0, 1.1], [0, 0, -1.1]],  # linear, along the polar axis of the usual angles
        [[0, 0, 0], [1.0, 0, 0], [0, 1.0, 0], [-1.0, 0, 0], [0, -1.0, 0]],  # a plane with a centre: vectors vanish there
        [[0, 0, 0], [0, 0, 0]],  # coincident
        [[0, 0, 0], [30.0, 0, 0]],  # isolated
    ],
    ids=["linear", "planar", "coincident", "isolated"],
)
def test_gradients_are_finite_at_symmetric_sites(x):
    network = small(channels=CHANNELS)
    positions = torch.tensor(x, dtype=torch.float32, requires_grad=True)
    energy, force = evaluate(network, torch.arange(len(x)) % 4, positions)
    gradients = torch.autograd.grad(energy.sum() + force.square().sum(), [positions, *network.parameters()], allow_unused=True)
    assert all(torch.isfinite(g).all() for g in (energy, force, *gradients) if g is not None)


def test_gradient_against_finite_differences():
    network = small().double()
    species, x = random_cluster(5)
    x.requires_grad_(True)
    (gradient,) = torch.autograd.grad(evaluate(network, species, x)[0].sum(), x)
    h = 1e-6
    for i, a in ((0, 0), (2, 1)):
        moved = []
        for sign in (1, -1):
            y = x.detach().clone()
            y[i, a] += sign * h
            moved.append(float(evaluate(network, species, y)[0].sum().detach()))
        assert (moved[0] - moved[1]) / (2 * h) == pytest.approx(float(gradient[i, a]), rel=1e-4, abs=1e-9)


def test_a_neighbour_fades_out_at_the_cutoff():
    network = small().double()
    species = torch.tensor([1, 0])

    def at(r):
        with torch.no_grad():
            energy, force = evaluate(network, species, torch.tensor([[0.0, 0, 0], [r, 0, 0]], dtype=torch.float64))
        return float(energy.sum()), float(force[1, 0])

    far = at(CUTOFF + 1.0)
    assert far[1] == 0.0
    near = [at(CUTOFF - d) for d in (1e-2, 2e-2, 0.5)]
    assert abs(near[2][0] - far[0]) > 1e-6  # half an Angstrom inside it is felt
    assert abs(near[0][0] - far[0]) < 1e-3 * abs(near[2][0] - far[0])
    # The envelope falls as the cube of the distance to the cutoff.
    assert (near[1][0] - far[0]) / (near[0][0] - far[0]) == pytest.approx(8.0, rel=0.1)
    assert near[1][1] / near[0][1] == pytest.approx(8.0, rel=0.1)


def test_padding_never_reaches_the_result():
    network = small()
    species, x = random_cluster(6)
    x = x.float()
    neighbors, mask = all_pairs(x, CUTOFF)
    displacement = x[neighbors] - x.unsqueeze(1)
    expected = network(species, displacement, neighbors, mask)
    wide = torch.cat([displacement, torch.full((6, 2, 3), float("nan"))], dim=1)
    more = torch.cat([neighbors, torch.zeros(6, 2, dtype=torch.int64)], dim=1)
    got = network(species, wide, more, torch.cat([mask, torch.zeros(6, 2, dtype=torch.bool)], dim=1))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


class _Fixed(torch.nn.Module):
    """Radial weights that are given, whatever the distance."""

    def __init__(self, weights):
        super().__init__()
        self.weights = weights

    def forward(self, scalars):
        return self.weights


def test_production_attention_is_the_depthwise_limit_of_the_reference():
    """With natural parity, channels that do not mix in the kernels, and keys equal to values, the two forms are one function.

    The production form's 14 Cartesian products of one direction are expressed in the basis kernels of equation 2.1; with these coefficients
    the reference gives the same messages, weights and results on other edges.
    """
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(3)
        n_atoms, heads, width = 6, 2, 3
        hidden = heads * width
        production = EquivariantAttention((hidden,) * 3, (width,) * 3, hidden, heads, 6, 8)
        reference = ReferenceAttention((hidden,) * 3, (width,) * 3, (width,) * 3, heads, 2, True, 6, 8)
        for degree in range(3):
            torch.nn.init.eye_(production.value.maps[degree].weight)
            ratio = production.logit_scale / reference.logit_scale
            reference.query.maps[degree].weight.data = production.query.maps[degree].weight.data * ratio
            reference.out.maps[degree].weight.data = production.out.maps[degree].weight.data.clone()
        torch.nn.init.normal_(production.softmax.sink)
        reference.softmax.sink.data = production.softmax.sink.data.clone()

        # Coefficients of each production path in the basis kernels, from one direction.
        one = torch.nn.functional.normalize(torch.tensor([0.3, -0.5, 0.8]), dim=0).view(1, 1, 3)
        _, u, coupling = EdgeGeometry()(one, torch.ones(1, 1, dtype=torch.bool))
        basis = BasisKernels(2, True)(u)
        coefficients = [torch.zeros(b.shape[3], 14) for b in basis]
        radial = production.messages.radial
        for path in range(14):
            psi = torch.zeros(1, 1, 14, hidden)
            psi[0, 0, path] = 1.0
            production.messages.radial = _Fixed(psi)
            columns = [production.messages(torch.eye(9)[c].view(1, 1, 9, 1).expand(-1, -1, -1, hidden), psi, u, coupling) for c in range(9)]
            matrix = torch.stack([m[0, 0, :, 0] for m in columns], dim=1)
            for pair, b in enumerate(basis):
                receiver, sender = divmod(pair, 3)
                block = matrix[receiver**2 : (receiver + 1) ** 2, sender**2 : (sender + 1) ** 2]
                vectors = b[0, 0].transpose(0, 1).flatten(1)  # (n_J, (2l+1)(2k+1))
                coefficients[pair][:, path] = torch.linalg.lstsq(vectors.T, block.flatten()).solution
        production.messages.radial = radial

        _, positions = random_cluster(n_atoms)
        neighbors, mask = all_pairs(positions, CUTOFF)
        distance, u, coupling = EdgeGeometry()(positions[neighbors] - positions.unsqueeze(1), mask)
        scalars, weight = BesselBasis(6, CUTOFF)(distance), envelope(distance, CUTOFF) * mask
        psi = production.messages.radial(scalars)  # (n, k, 14, hidden)
        for pair in range(9):
            diagonal = torch.einsum("jp,nkpc->nkjc", coefficients[pair], psi) / reference.kernels.scales[pair // 3]
            mixing = torch.diag_embed(diagonal)  # (n, k, n_J, hidden in, hidden out)
            keys_and_values = torch.cat([mixing, mixing], dim=-1).flatten(2, 3)
            reference.kernels.radial[pair] = _Fixed(keys_and_values)
        features = random_features((hidden,) * 3, n_atoms)
        expected = production(features, neighbors, scalars, u, coupling, weight)
        got = reference(features, neighbors, scalars, BasisKernels(2, True)(u), weight)
        assert equivariance_error(got, expected) < 1e-12
    finally:
        torch.set_default_dtype(previous)


class TestEmbedding:
    def test_one_hot(self):
        expected = torch.tensor([[0.0, 0, 1], [1, 0, 0]])
        assert torch.equal(OneHotEmbedding(3)(torch.tensor([2, 0]), torch.ones(())), expected)

    @pytest.mark.parametrize(
        ("number", "place"), [(1, (1, 1)), (2, (1, 18)), (4, (2, 2)), (6, (2, 14)), (17, (3, 17)), (21, (4, 3)), (35, (4, 17)), (54, (5, 18))]
    )
    def test_periodic_table(self, number, place):
        assert period_and_group(number) == place

    def test_carbon_is_the_origin_and_radii_are_those_of_ase(self):
        assert physical_properties(6) == [0.0, 0.0, 0.0, 0.0]
        assert physical_properties(16)[0] == 1.0  # sulfur, period 3
        assert physical_properties(16)[3] == pytest.approx((1.05 - 0.76) / 0.5)

    def test_electronegativity_rises_along_every_row_of_the_main_groups(self):
        rows = (("Li", "Be", "B", "C", "N", "O", "F"), ("Na", "Mg", "Al", "Si", "P", "S", "Cl"), ("Rb", "Sr", "In", "Sn", "Sb", "Te", "I"))
        for row in rows:
            values = [PAULING_ELECTRONEGATIVITY[symbol] for symbol in row]
            assert values == sorted(values)
        assert max(PAULING_ELECTRONEGATIVITY, key=PAULING_ELECTRONEGATIVITY.__getitem__) == "F"

    def test_similar_elements_come_out_alike(self):
        """What a fixed embedding is for: an element never trained on stands near its neighbours in the table."""
        torch.manual_seed(0)
        numbers = (1, 6, 8, 16)
        h, c, o, s = PhysicalEmbedding(numbers, 8)(torch.arange(4), torch.ones(())).detach()
        assert float((s - o).norm()) < float((s - h).norm())
        assert float((s - c).norm()) < float((s - h).norm())

    @pytest.mark.parametrize("number", [2, 10, 18, 36, 92])
    def test_refuses_elements_without_properties(self, number):
        with pytest.raises(ValueError, match="electronegativity"):
            physical_properties(number)

    @pytest.mark.parametrize("embedding", ["one-hot", "learned", "physical"])
    def test_network_tells_elements_apart(self, embedding):
        network = small(embedding=embedding)
        species, x = random_cluster(5)
        energy, _ = evaluate(network, species, x)
        other, _ = evaluate(network, (species + 1) % 4, x)
        assert float((energy - other).abs().max()) > 1e-4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": (4,)}, "two to four positive numbers"),
        ({"channels": (4, 0, 2)}, "two to four positive numbers"),
        ({"head_channels": (2, 2)}, r"head_channels must be as many positive numbers as channels \(3\), got \(2, 2\)"),
        ({"head_channels": (2, 0, 2)}, "head_channels"),
        ({"num_layers": 1}, "num_layers must be at least 2, got 1"),
        ({"cutoff": -1.0}, "cutoff must be positive"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(ValueError, match=message):
        ReferenceConfig(**changes)


@pytest.mark.parametrize("embedding", ["one-hot", "physical"])
def test_scripted_equals_eager(dtype, embedding):
    model = ExportedModel(small(embedding=embedding, num_layers=2).to(dtype), NUMBERS).eval()
    scripted = torch.jit.script(model)
    species, x = random_cluster(9)
    numbers, x = torch.tensor(NUMBERS)[species], (x / 10).to(dtype)
    energy, forces = model(x, numbers, None)
    for _ in range(3):  # the interpreter optimises during the first calls
        scripted_energy, scripted_forces = scripted(x, numbers, None)
    torch.testing.assert_close(scripted_energy, energy, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(scripted_forces, forces, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scripted.energy(x, numbers, None), energy, rtol=1e-6, atol=1e-6)
