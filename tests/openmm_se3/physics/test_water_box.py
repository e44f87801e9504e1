"""The water box: how it is built, its radial distribution, its trajectory, a run that is interrupted."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from openmm import unit

from openmm_se3.physics import water_box as water_box_module
from openmm_se3.physics.settings import QUICK
from openmm_se3.physics.subject import Subject
from openmm_se3.physics.trajectory import read_dcd
from openmm_se3.physics.water_box import measure_water_box, radial_distribution, water_box
from openmm_se3.simulate import simulate
from openmm_se3.simulation_files import alone, read_log, write_settings
from openmm_se3.simulation_settings import SimulationSettings
from openmm_se3.structures import read_structure
from tests.openmm_se3.physics.models import Morse, MorseWithFast, write_model


@pytest.mark.parametrize("waters", [64, 100, 216])
def test_box(waters):
    topology, positions = water_box(waters, seed=0)
    edges = topology.getPeriodicBoxVectors().value_in_unit(unit.nanometer)
    # 33.37 molecules per nm^3 is 997 kg/m^3.
    assert waters / edges[0][0] ** 3 == pytest.approx(33.33, abs=0.1)
    assert [a.element.symbol for a in topology.atoms()] == ["O", "H", "H"] * waters
    assert topology.getNumBonds() == 2 * waters
    oxygens = positions[::3]
    d = oxygens[:, None] - oxygens
    d -= edges[0][0] * np.round(d / edges[0][0])
    assert np.linalg.norm(d, axis=-1)[~np.eye(waters, dtype=bool)].min() > 0.24


class TestRadialDistribution:
    def test_ideal_gas(self):
        frames = np.random.default_rng(0).uniform(-3, 3, size=(40, 200, 3))  # far outside of the box, as unwrapped molecules are
        _, g = radial_distribution(frames, 2.0, bin_nm=0.1)
        np.testing.assert_allclose(g[2:], 1.0, atol=0.1)

    def test_lattice(self):
        """A simple cubic lattice: 6 neighbours at the spacing, 12 at root two of it."""
        x = 0.3 * np.stack(np.meshgrid(*[np.arange(6)] * 3), axis=-1).reshape(1, -1, 3)
        r, g = radial_distribution(x, 1.8, bin_nm=0.02)
        shells = 4 * np.pi * (r**2 + 0.02**2 / 12) * 0.02
        counts = g * shells * 215 / 1.8**3
        found = {round(float(radius), 2): count for radius, count in zip(r, counts, strict=True) if count > 0}
        assert sum(v for k, v in found.items() if k < 0.35) == pytest.approx(6)
        assert sum(v for k, v in found.items() if 0.35 < k < 0.47) == pytest.approx(12)


def test_trajectory_holds_what_was_simulated(tmp_path):
    model = write_model(Morse(), tmp_path / "morse.pt")
    (tmp_path / "water.xyz").write_text("3\n\nO 0 0 0\nH 0.96 0 0\nH -0.24 0.93 0\n")
    settings = SimulationSettings(structure=str(tmp_path / "water.xyz"), model=str(model), steps=40, report_every=10, platform="Reference")
    simulate(settings, tmp_path / "md")
    frames = read_dcd(tmp_path / "md" / "trajectory.dcd")
    assert frames.shape == (4, 3, 3)
    _, final = read_structure(tmp_path / "md" / "final.pdb")
    np.testing.assert_allclose(frames[-1], final, atol=1e-4)
    (tmp_path / "cut.dcd").write_bytes((tmp_path / "md" / "trajectory.dcd").read_bytes()[:-5])
    with pytest.raises(ValueError, match="ends within a frame"):
        read_dcd(tmp_path / "cut.dcd")
    with pytest.raises(ValueError, match="not a DCD file"):
        read_dcd(tmp_path / "water.xyz")


class TestMeasure:
    SETTINGS = replace(QUICK, box_waters=8, box_ps=0.1)

    @pytest.mark.filterwarnings("ignore:.*closed shell")
    @pytest.mark.parametrize("kind", [Morse, partial(MorseWithFast, fast_depth=8.0)], ids=["multiple time steps", "fast network"])
    def test_run_and_continue(self, kind, tmp_path, monkeypatch):
        monkeypatch.setattr(water_box_module, "LONGEST_BOND_NM", 1.0)  # as if the weak bonds of this model held
        # Steep, so that atoms, which all attract each other here, do not come too close.
        subject = Subject(write_model(kind(depth=10.0, steepness=60.0), tmp_path / "morse.pt"))
        seen = []
        section = measure_water_box(subject, self.SETTINGS, tmp_path, seen.append)
        found = {q.name: q for q in section.quantities}
        assert found["time not reached"].verdict == "ok"
        assert np.isfinite([q.value for q in section.quantities]).all()
        log = read_log(tmp_path / "water-box" / "log.csv")["temperature_k"]
        assert found["mean temperature above the thermostat's"].value == pytest.approx(log.mean() - 300.0)
        # Without a fast network the first run is that of multiple time steps.
        others = ["direct"] if kind is Morse else ["mts", "direct"]
        for other in others:
            after = read_log(tmp_path / f"water-box-{other}" / "log.csv")
            assert after["time_ps"][-1] == pytest.approx(0.01)
            assert found[f"{other}, mean temperature above the thermostat's"].value == pytest.approx(after["temperature_k"].mean() - 300.0)
        assert [line.label for line in section.panels[1].lines][1:] == others
        assert seen == sorted(seen)
        assert seen[-1] == 1.0
        assert [p.title for p in section.panels] == ["O-O radial distribution", "temperature"]
        written = (tmp_path / "water-box" / "trajectory.dcd").stat().st_size
        again = measure_water_box(subject, self.SETTINGS, tmp_path)
        assert [q.value for q in again.quantities] == [q.value for q in section.quantities]
        assert (tmp_path / "water-box" / "trajectory.dcd").stat().st_size == written

    def test_water_that_falls_apart_is_noticed(self, tmp_path):
        """Without bonds, hydrogens leave."""
        subject = Subject(write_model(Morse(depth=1e-3), tmp_path / "loose.pt"))
        found = {q.name: q for q in measure_water_box(subject, self.SETTINGS, tmp_path).quantities}
        assert found["broken molecules at the end"].value > 0
        assert found["broken molecules at the end"].verdict == "missed"
        assert not (tmp_path / "water-box-direct").exists()

    def test_a_run_before_its_first_checkpoint_is_not_swept_away(self, tmp_path):
        """Another process may be in it."""
        run = SimulationSettings(structure="water.pdb")
        with alone(tmp_path / "run"):
            write_settings(run, tmp_path / "run", None)
            _, notes = water_box_module._simulate(run, tmp_path / "run", None)
        assert (tmp_path / "run" / "settings.json").exists()
        assert "another process runs in" in notes[0]

    def test_left_out_when_quick(self, tmp_path):
        subject = Subject(write_model(Morse(), tmp_path / "morse.pt"))
        assert measure_water_box(subject, QUICK, tmp_path).quantities == []
