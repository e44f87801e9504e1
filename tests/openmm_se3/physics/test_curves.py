"""Continuity at the cutoff, shapes of curves, profiles and geometries, on curves whose faults are known."""

from types import SimpleNamespace

import numpy as np
import pytest
from ase.build import molecule
from ase.data import covalent_radii

from openmm_se3.physics.continuity import derivative, jump, measure_continuity, two_bodies
from openmm_se3.physics.dissociation import bare_pairs, curve_shape, measure_dissociation, pull
from openmm_se3.physics.plot import plot_section
from openmm_se3.physics.settings import QUICK
from openmm_se3.physics.subject import Subject
from openmm_se3.physics.torsion import profile_errors
from openmm_se3.physics.vibrations import bonds_and_angles, geometry_errors
from tests.openmm_se3.physics.models import CUTOFF_NM, Morse, write_model


class TestJump:
    def test_of_a_step(self):
        assert jump(lambda s: np.array([np.sin(s), np.cos(s) + 0.3 * (s > 0)])) == pytest.approx(0.3, rel=1e-6)

    def test_none_where_smooth(self):
        assert jump(lambda s: np.exp(5 * np.array([s, -s]))) < 1e-12

    def test_of_a_kink_is_in_the_derivative(self):
        def kink(s):
            return np.array(2.0 * max(s, 0.0))

        assert jump(kink) < 1e-12
        assert jump(derivative(kink)) == pytest.approx(2.0)

    def test_the_first_atoms_are_a_cutoff_apart(self):
        place, axis = two_bodies(molecule("H2O"), molecule("CH4"), 0.5)
        x = place(0.01)
        np.testing.assert_allclose(x[3] - x[0], 0.51 * axis, atol=1e-12)


class TestCutoff:
    def quantities(self, tmp_path, smooth):
        subject = Subject(write_model(Morse(smooth=smooth), tmp_path / "morse.pt"))
        return {q.name: q for q in measure_continuity(subject, QUICK).quantities}

    def test_truncated(self, tmp_path):
        found = self.quantities(tmp_path, smooth=False)
        fall = np.exp(-25.0 * (CUTOFF_NM - (covalent_radii[8] + covalent_radii[1]) / 10))
        assert found["O and H: jump of the energy"].value == pytest.approx(400 * (1 - (1 - fall) ** 2), rel=1e-6)
        assert found["O and H: jump of the energy"].verdict == "missed"
        slope = 2 * 400 * 25 * fall * (1 - fall)
        for kind in ("direct", "conservative"):
            # Two atoms along the axis (0.62, 0.48, 0.62): the largest component of the force carries this share of it.
            share = 0.62 / np.linalg.norm([0.62, 0.48, 0.62])
            assert found[f"O and H: jump of the {kind} force"].value == pytest.approx(slope * share, rel=1e-6)

    def test_smooth(self, tmp_path):
        assert all(q.verdict == "ok" for q in self.quantities(tmp_path, smooth=True).values())


class TestShape:
    R = np.linspace(0.05, 0.5, 400)

    def morse(self):
        return 400 * ((1 - np.exp(-25 * (self.R - 0.1))) ** 2 - 1)

    def test_sound(self):
        shape = curve_shape(self.R, self.morse(), 0.12)
        assert shape.well == pytest.approx(0.1, abs=0.002)
        assert shape.wall_drop == shape.hole == shape.outer_drop == 0.0
        assert shape.wall_top_height == np.inf

    def test_a_hole_behind_the_wall(self):
        """A wall that turns down at 0.07 nm, 600 kJ/mol deep."""
        energies = self.morse()
        top = np.argmin(np.abs(self.R - 0.07))
        energies[:top] = energies[top] - 600 * (self.R[top] - self.R[:top]) / (self.R[top] - self.R[0])
        shape = curve_shape(self.R, energies, 0.1)
        assert shape.wall_drop == pytest.approx(600)
        assert shape.wall_top == pytest.approx(0.07, abs=0.002)
        assert shape.wall_top_height == pytest.approx(energies[top] - energies.min() - shape.hole)
        assert shape.hole == pytest.approx(-400 - (energies[top] - 600), abs=0.1)

    def test_a_false_minimum_outside(self):
        energies = self.morse() - 450 * np.exp(-(((self.R - 0.35) / 0.03) ** 2))
        shape = curve_shape(self.R, energies, 0.1)
        assert shape.well == pytest.approx(0.1, abs=0.003)
        assert shape.hole > 40
        assert shape.outer_drop > 400
        assert shape.wall_drop == 0.0

    @pytest.mark.parametrize("where", [slice(0, 4), slice(44, 45), slice(None)])
    def test_what_is_not_a_number_has_no_shape(self, where):
        energies = self.morse()
        energies[where] = np.nan
        assert np.isnan(list(vars(curve_shape(self.R, energies, 0.1)).values())).all()

    def test_a_model_that_gives_no_numbers_misses_everything(self, tmp_path):
        surface = SimpleNamespace(energy=lambda x: np.nan)
        subject = SimpleNamespace(
            metadata=SimpleNamespace(elements=["H"], cutoff_nm=0.5), knows=lambda symbols: True, surface=lambda symbols: surface
        )
        section = measure_dissociation(subject, QUICK)
        assert {q.verdict for q in section.quantities if q.must is not None} == {"missed"}
        plot_section(section, tmp_path / "dissociation.png")

    def test_one_pair_on_whose_wall_there_are_no_numbers_misses(self):
        def surface(symbols):
            wall = np.nan if symbols == ["C", "C"] else 1e3
            return SimpleNamespace(energy=lambda x: wall if x[1, 0] < 0.05 else 1.0 / x[1, 0])

        subject = SimpleNamespace(metadata=SimpleNamespace(elements=["H", "C"], cutoff_nm=0.5), surface=surface)
        quantities, _ = bare_pairs(subject, QUICK)
        assert [(q.name, q.verdict) for q in quantities] == [
            ("bare pairs: fall inwards by (C-C)", "missed"),
            ("bare pairs: hole on the wall (C-C)", "missed"),
        ]

    def test_pull_moves_one_group_along_the_bond(self):
        x = np.random.default_rng(0).normal(size=(5, 3))
        moved = pull(x, 0, 2, [2, 4])(7.0)
        assert np.linalg.norm(moved[2] - moved[0]) == pytest.approx(7.0)
        np.testing.assert_allclose(moved[4] - moved[2], x[4] - x[2])
        np.testing.assert_array_equal(moved[[0, 1, 3]], x[[0, 1, 3]])

    def test_walls_of_a_model(self, tmp_path):
        """A Morse model has walls; its negative has none anywhere."""
        for depth, verdict in ((400.0, "ok"), (-400.0, "missed")):
            subject = Subject(write_model(Morse(depth=depth, steepness=40.0), tmp_path / f"{verdict}.pt"))
            bare = [q for q in measure_dissociation(subject, QUICK).quantities if q.name.startswith("bare pairs: fall")]
            assert [q.verdict for q in bare] == [verdict]


def test_profile_errors():
    """A constant offset is no error; twice the profile is."""
    reference = np.array([0.0, 4.0, 1.0, 3.0])
    assert profile_errors(reference + 50, reference) == pytest.approx((0.0, 0.0))
    assert profile_errors(2 * reference, reference) == pytest.approx((np.std(reference), 4.0))


class TestGeometry:
    @pytest.mark.parametrize(("name", "bonds", "angles"), [("H2O", 2, 1), ("CH4", 4, 6), ("HCN", 2, 1), ("CH3OH", 5, 7)])
    def test_bonds_and_angles(self, name, bonds, angles):
        found = bonds_and_angles(molecule(name))
        assert (len(found[0]), len(found[1])) == (bonds, angles)

    def test_errors_of_a_changed_molecule(self):
        reference = molecule("H2O")
        changed = reference.copy()
        changed.set_angle(1, 0, 2, reference.get_angle(1, 0, 2) + 3.0)
        changed.set_distance(0, 1, reference.get_distance(0, 1) + 0.02, fix=0)
        changed.rotate(70, (1, 2, 3))
        lengths, angles = geometry_errors(changed, reference)
        np.testing.assert_allclose(sorted(lengths), [0.0, 0.02], atol=1e-9)
        np.testing.assert_allclose(angles, [3.0], atol=1e-6)
