"""Every layer: equivariance under rotation and reflection, hand-computed values, refusals, finite gradients."""

import itertools

import pytest
import torch
from e3nn import o3

from benchmarks.clusters import all_pairs, random_cluster, random_orthogonal, representation, transform
from tests.training.helpers import equivariance_error, random_features
from training.network.attention import EquivariantAttention, KernelMessages, SmoothSoftmax
from training.network.geometry import EdgeGeometry, safe_norm
from training.network.linear import EquivariantLinear, invariant_products
from training.network.norm import EquivariantRMSNorm
from training.network.radial import BesselBasis, envelope
from training.network.readout import DirectForceReadout, EnergyReadout
from training.network.repulsion import ScreenedRepulsion
from training.network.rigid import remove_net_force_and_torque
from training.network.self_interaction import AttentiveSelfInteraction

LIMIT = {torch.float32: 1e-6, torch.float64: 1e-12}
CUTOFF = 4.0


def edges(n_atoms: int, q: torch.Tensor, dtype: torch.dtype):
    """Neighbours and edge functions of a random cluster that was transformed by `q`."""
    _, positions = random_cluster(n_atoms)
    neighbors, mask = all_pairs(positions, CUTOFF)
    rotated = positions @ q.T
    distance, direction, coupling = EdgeGeometry()(rotated[neighbors] - rotated.unsqueeze(1), mask)
    basis = BesselBasis(6, CUTOFF)(distance).to(dtype)
    weight = (envelope(distance, CUTOFF) * mask).to(dtype)
    return neighbors, basis, direction.to(dtype), coupling.to(dtype), weight


@pytest.mark.parametrize("reflect", [False, True], ids=["rotation", "reflection"])
class TestEquivariance:
    def test_linear(self, dtype, reflect):
        layer = EquivariantLinear((7, 5, 3), (4, 6, 2))
        x, q = random_features((7, 5, 3), 9), random_orthogonal(1, reflect)
        assert equivariance_error(layer(transform(x, q)), transform(layer(x), q)) < LIMIT[dtype]

    def test_norm(self, dtype, reflect):
        layer = EquivariantRMSNorm((7, 5, 3))
        for gain in layer.gains:
            torch.nn.init.normal_(gain)
        x, q = random_features((7, 5, 3), 9), random_orthogonal(2, reflect)
        assert equivariance_error(layer(transform(x, q)), transform(layer(x), q)) < LIMIT[dtype]

    def test_self_interaction(self, dtype, reflect):
        layer = AttentiveSelfInteraction((7, 5, 3), 4, 16)
        x, q = random_features((7, 5, 3), 9), random_orthogonal(3, reflect)
        assert equivariance_error(layer(transform(x, q)), transform(layer(x), q)) < LIMIT[dtype]

    def test_invariant_products(self, dtype, reflect):
        x, y, q = random_features((3, 3, 3), 9), random_features((3, 3, 3), 9, seed=1), random_orthogonal(4, reflect)
        got, expected = invariant_products(transform(x, q), transform(y, q)), invariant_products(x, y)
        assert equivariance_error([got], [expected]) < LIMIT[dtype]

    @pytest.mark.parametrize(("degree_in", "degree_out"), [(0, 1), (0, 2), (2, 1), (2, 2)])
    def test_messages(self, dtype, reflect, degree_in, degree_out):
        torch.manual_seed(0)
        layer = KernelMessages(degree_in, degree_out, 4, 6, 8)
        q = random_orthogonal(5, reflect)
        one = torch.eye(3, dtype=torch.float64)
        features = random_features((4, 4, 4)[: degree_in + 1], 8)
        sizes = [1, 3, 5][: degree_out + 1]

        def messages(f, rotation):
            neighbors, basis, direction, coupling, weight = edges(8, rotation, dtype)
            sender = torch.cat(f, dim=1)[neighbors]
            out = layer(sender, basis, direction, coupling) * (weight > 0)[..., None, None]  # padding has a constant direction
            return [m.flatten(0, 1) for m in out.split(sizes, dim=2)]

        assert equivariance_error(messages(transform(features, q), q), transform(messages(features, one), q)) < LIMIT[dtype]

    @pytest.mark.parametrize("channels_in", [(7,), (7, 5, 3)])
    @pytest.mark.parametrize("channels_out", [(6, 4), (6, 4, 5)])
    def test_attention(self, dtype, reflect, channels_in, channels_out):
        torch.manual_seed(0)
        layer = EquivariantAttention(channels_in, channels_out, 8, 4, 6, 8)
        q = random_orthogonal(6, reflect)
        features = random_features(channels_in, 8)
        out = layer(features, *edges(8, torch.eye(3, dtype=torch.float64), dtype))
        rotated = layer(transform(features, q), *edges(8, q, dtype))
        assert equivariance_error(rotated, transform(out, q)) < LIMIT[dtype]

    def test_readouts(self, dtype, reflect):
        q = random_orthogonal(7, reflect)
        features = random_features((7, 5), 9)
        rotated = transform(features, q)
        energy, force = EnergyReadout(7, 8), DirectForceReadout(7, 5, 8)
        assert equivariance_error([energy(rotated[0])], [energy(features[0])]) < LIMIT[dtype]
        expected = transform([features[0], force(*features).unsqueeze(-1)], q)[1].squeeze(-1)
        assert equivariance_error([force(*rotated)], [expected]) < LIMIT[dtype]

    def test_geometry(self, dtype, reflect):
        q = random_orthogonal(8, reflect)
        x = torch.randn(5, 4, 3, dtype=torch.float64).to(dtype)
        mask = torch.ones(5, 4, dtype=torch.bool)
        d, u, g = EdgeGeometry()(x, mask)
        rotated_d, rotated_u, rotated_g = EdgeGeometry()(x @ q.T.to(dtype), mask)
        expected_g = torch.einsum("mn,eknb,ab->ekma", representation(q, 2).to(dtype), g, q.to(dtype))
        assert equivariance_error([rotated_d, rotated_u, rotated_g], [d, u @ q.T.to(dtype), expected_g]) < LIMIT[dtype]

    def test_repulsion(self, dtype, reflect):
        layer = ScreenedRepulsion((1, 6, 7, 8))
        q = random_orthogonal(9, reflect).to(dtype)
        species, positions = random_cluster(6, spread=0.7)
        positions = (positions * 0.7).to(dtype)
        neighbors, mask = all_pairs(positions, CUTOFF)

        def run(x):
            distance, direction, _ = EdgeGeometry()(x[neighbors] - x.unsqueeze(1), mask)
            return layer(species, neighbors, distance, direction, mask)

        energy, force = run(positions)
        rotated_energy, rotated_force = run(positions @ q.T)
        assert float(energy.abs().max()) > 0
        # A wall as steep as r^-12 magnifies the rounding of a distance by about as much.
        assert equivariance_error([rotated_energy, rotated_force], [energy, force @ q.T]) < 20 * LIMIT[dtype]


@pytest.mark.parametrize(("receiver_degree", "sender_degree"), list(itertools.product(range(3), range(3))))
def test_messages_span_all_clebsch_gordan_kernels(receiver_degree, sender_degree):
    """The Cartesian messages of each pair of degrees are exactly equation 2.1's kernels of natural parity, no more, no fewer."""
    torch.set_default_dtype(torch.float64)
    try:
        direction = torch.nn.functional.normalize(torch.tensor([0.3, -0.5, 0.8]), dim=0)
        _, u, coupling = EdgeGeometry()(direction.view(1, 1, 3), torch.ones(1, 1, dtype=torch.bool))
        n_receiver, n_sender = 2 * receiver_degree + 1, 2 * sender_degree + 1
        start, stop = receiver_degree**2, (receiver_degree + 1) ** 2
        columns = range(sender_degree**2, (sender_degree + 1) ** 2)
        layer = KernelMessages(2, 2, 1, 1, 1)
        ours = []
        for path in range(14):
            psi = torch.zeros(1, 1, 14, 1)
            psi[0, 0, path, 0] = 1.0
            layer.radial.forward = lambda _, psi=psi: psi  # one radial weight at a time
            kernel = torch.stack([layer(torch.eye(9)[c].view(1, 1, 9, 1), psi, u, coupling).view(9)[start:stop] for c in columns], dim=1)
            if kernel.abs().max() > 1e-12:
                ours.append(kernel.flatten())
        expected = []
        for degree in range(abs(receiver_degree - sender_degree), receiver_degree + sender_degree + 1, 2):
            harmonics = o3.spherical_harmonics(degree, direction, normalize=True)
            expected.append(torch.einsum("abm,m->ab", o3.wigner_3j(receiver_degree, sender_degree, degree), harmonics).flatten())
        ours_matrix, expected_matrix = torch.stack(ours), torch.stack(expected)
    finally:
        torch.set_default_dtype(torch.float32)
    assert len(ours) == len(expected) == min(receiver_degree, sender_degree) + 1
    assert ours_matrix.shape[1] == n_receiver * n_sender
    assert torch.linalg.matrix_rank(ours_matrix) == len(expected)
    solution = torch.linalg.lstsq(ours_matrix.T, expected_matrix.T).solution
    assert float((ours_matrix.T @ solution - expected_matrix.T).abs().max()) < 1e-12


def test_coupling_gives_e3nn_harmonics_of_degree_two():
    x = torch.nn.functional.normalize(torch.randn(6, 1, 3, dtype=torch.float64), dim=-1)
    _, u, coupling = EdgeGeometry()(x, torch.ones(6, 1, dtype=torch.bool))
    ours = torch.einsum("ekma,eka->ekm", coupling, u)
    expected = o3.spherical_harmonics(2, x, normalize=True)
    assert float((ours / ours.norm(dim=-1, keepdim=True) - expected / expected.norm(dim=-1, keepdim=True)).abs().max()) < 1e-12


class TestHandComputed:
    def test_smooth_softmax(self):
        layer = SmoothSoftmax(1)
        logits = torch.tensor([[[1.0], [2.0]]])
        weights = layer(logits, torch.tensor([[1.0, 0.5]]))
        e = torch.e
        total = 1.0 + e + 0.5 * e**2  # the sink is exp(0)
        torch.testing.assert_close(weights.flatten(), torch.tensor([e / total, 0.5 * e**2 / total]))

    def test_softmax_without_neighbours_is_zero(self):
        weights = SmoothSoftmax(2)(torch.zeros(1, 3, 2), torch.zeros(1, 3))
        assert torch.equal(weights, torch.zeros(1, 3, 2))

    def test_softmax_survives_large_logits(self):
        weights = SmoothSoftmax(1)(torch.tensor([[[1e4], [-1e4]]]), torch.ones(1, 2))
        torch.testing.assert_close(weights.flatten(), torch.tensor([1.0, 0.0]))

    def test_softmax_ignores_large_logits_of_padding(self):
        layer = SmoothSoftmax(1)
        neighbours, envelope_of = torch.tensor([[[1.0], [-2.0]]]), torch.tensor([[1.0, 0.5]])
        logits = torch.cat([neighbours, torch.tensor([[[1e4], [-1e4], [torch.inf]]])], dim=1).requires_grad_(True)
        weights = layer(logits, torch.cat([envelope_of, torch.zeros(1, 3)], dim=1))
        torch.testing.assert_close(weights[:, :2], layer(neighbours, envelope_of))
        assert torch.equal(weights[:, 2:], torch.zeros(1, 3, 1))
        gradient, sink = torch.autograd.grad(weights.square().sum(), [logits, layer.sink])
        assert torch.isfinite(gradient).all()
        assert torch.isfinite(sink).all()
        assert torch.equal(gradient[:, 2:], torch.zeros(1, 3, 1))

    def test_linear_with_identity_weights(self):
        layer = EquivariantLinear((2, 2), (2, 2), bias=False)
        for linear in layer.maps:
            torch.nn.init.eye_(linear.weight)
        x = random_features((2, 2), 3)
        for a, b in zip(layer(x), x, strict=True):
            torch.testing.assert_close(a, b)

    def test_norm_of_unit_features(self):
        layer = EquivariantRMSNorm((2, 1), epsilon=0.0)
        out = layer([torch.full((1, 1, 2), 3.0), torch.full((1, 3, 1), 3.0)])
        torch.testing.assert_close(out[0], torch.ones(1, 1, 2))
        torch.testing.assert_close(out[1], torch.ones(1, 3, 1))

    def test_repulsion_of_two_carbons(self):
        layer = ScreenedRepulsion((6,))
        x = torch.tensor([[0.0, 0, 0], [0.5, 0, 0]])
        neighbors, mask = all_pairs(x, CUTOFF)
        distance, direction, _ = EdgeGeometry()(x[neighbors] - x.unsqueeze(1), mask)
        energy, force = layer(torch.zeros(2, dtype=torch.int64), neighbors, distance, direction, mask)
        a = 0.8854 * 0.529177 / (2 * 6**0.23)
        phi = sum(c * torch.exp(torch.tensor(-e * 0.5 / a)) for c, e in zip(layer.COEFFICIENTS, layer.EXPONENTS, strict=True))
        y = 0.5 / (0.9 * 2 * 0.76)
        inside = 1 - 28 * y**6 + 48 * y**7 - 21 * y**8
        assert float(energy.sum()) == pytest.approx(14.39964 * 36 / 0.5 * float(phi) * inside, rel=1e-4)
        assert force[0, 0] < 0 < force[1, 0]  # they push each other apart

    def test_rigid_removal_keeps_internal_forces(self):
        x = torch.tensor([[0.0, 0, 0], [1.0, 0, 0], [0, 1.0, 0]])
        internal = torch.tensor([[-1.0, 0, 0], [1.0, 0, 0], [0.0, 0, 0]])
        torch.testing.assert_close(remove_net_force_and_torque(internal, x, True), internal)
        torque = torch.linalg.cross(torch.tensor([[0.0, 0, 1.0]]).expand(3, 3), x - x.mean(0))
        assert float(remove_net_force_and_torque(torque, x, True).abs().max()) < 1e-6
        assert float(remove_net_force_and_torque(torch.ones(3, 3), x, False).abs().max()) < 1e-6

    @pytest.mark.parametrize(
        "x", [torch.zeros(1, 3), torch.tensor([[0.0, 0, 0], [0, 0, 1.0]]), torch.zeros(2, 3)], ids=["atom", "linear", "coincident"]
    )
    def test_rigid_removal_is_finite(self, x):
        out = remove_net_force_and_torque(torch.randn(len(x), 3), x, True)
        assert torch.isfinite(out).all()
        assert float(out.sum(0).abs().max()) < 1e-6


class TestFiniteGradients:
    def test_safe_norm_at_zero(self):
        x = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
        safe_norm(x).sum().backward()
        assert torch.equal(x.grad, torch.zeros(2, 3, dtype=torch.float64))

    def test_plain_norm_would_fail(self):
        """The failure that safe_norm is there for: the derivative of sqrt(x.x) at zero."""
        x = torch.zeros(1, 3, requires_grad=True)
        (x * x).sum(-1).sqrt().sum().backward()
        assert torch.isnan(x.grad).any()

    @pytest.mark.parametrize("axis", [0, 1, 2])
    @pytest.mark.parametrize("sign", [-1.0, 1.0])
    def test_geometry_along_axes_and_at_zero(self, axis, sign):
        x = torch.zeros(1, 2, 3, dtype=torch.float64)
        x[0, 0, axis] = sign  # slot 1 stays a zero vector
        x.requires_grad_(True)
        total = sum(t.square().sum() for t in EdgeGeometry()(x, torch.ones(1, 2, dtype=torch.bool)))
        (gradient,) = torch.autograd.grad(total, x, create_graph=True)
        (second,) = torch.autograd.grad(gradient.sum(), x)
        assert torch.isfinite(gradient).all()
        assert torch.isfinite(second).all()

    def test_norm_at_zero_features(self):
        x = [torch.zeros(2, 1, 3, requires_grad=True), torch.zeros(2, 3, 2, requires_grad=True)]
        sum(t.sum() for t in EquivariantRMSNorm((3, 2))(x)).backward()
        assert all(torch.isfinite(t.grad).all() for t in x)


def test_envelope_is_smooth_at_the_cutoff():
    r = torch.tensor([3.9999, 4.0, 4.5], dtype=torch.float64, requires_grad=True)
    value = envelope(r, 4.0)
    (first,) = torch.autograd.grad(value.sum(), r, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), r)
    for derivative, scale in ((value, 1e-10), (first, 1e-6), (second, 1e-2)):
        assert abs(float(derivative[0].detach())) < scale
        assert torch.equal(derivative[1:].detach(), torch.zeros(2, dtype=torch.float64))
    assert float(envelope(torch.zeros(1), 4.0)) == 1.0


def test_repulsive_force_is_minus_the_gradient():
    layer = ScreenedRepulsion((1, 6, 7, 8)).double()
    species, positions = random_cluster(6, spread=0.7)
    x = (positions * 0.7).requires_grad_(True)
    neighbors, mask = all_pairs(x.detach(), CUTOFF)
    distance, direction, _ = EdgeGeometry()(x[neighbors] - x.unsqueeze(1), mask)
    energy, force = layer(species, neighbors, distance, direction, mask)
    (gradient,) = torch.autograd.grad(energy.sum(), x)
    torch.testing.assert_close(force, -gradient, rtol=1e-6, atol=1e-8)  # constants are float32


@pytest.mark.parametrize(("arguments", "message"), [((1, 2, 4, 6, 8), "degree_in"), ((2, 3, 4, 6, 8), "degree_out")])
def test_messages_refuse_other_degrees(arguments, message):
    with pytest.raises(ValueError, match=message):
        KernelMessages(*arguments)


def test_attention_refuses_channels_that_heads_do_not_divide():
    with pytest.raises(ValueError, match=r"hidden_channels \(6\) must be divisible by num_heads \(4\)"):
        EquivariantAttention((4,), (4, 4, 4), 6, 4, 6, 8)
