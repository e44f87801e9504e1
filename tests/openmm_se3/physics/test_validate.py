"""The whole: reports, the command, resuming, refusals; the released model."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from openmm_se3.cli import app as cli
from openmm_se3.errors import SimulationError
from openmm_se3.physics import QUICK, Quantity, Section, validate_physics
from openmm_se3.physics.molecules import molecule_names, starting_structure
from openmm_se3.physics.reference import reference_curve, reference_molecules
from openmm_se3.physics.report import Line, Panel, missed, read_report, report_table, write_report
from openmm_se3.physics.torsion import CURVES
from openmm_se3.physics.validate import MEASURES, OF_MOLECULES
from openmm_se3.simulation_files import alone
from tests.openmm_se3.helpers import MODEL
from tests.openmm_se3.physics.models import Morse, write_model

SHORT = replace(QUICK, molecules=("water",), frames=2, nve_ps=0.05, langevin_ps=0.05, points=20)


class TestReport:
    @pytest.mark.parametrize(
        ("value", "uncertainty", "verdict"),
        [(0.001, 0.0, "aim"), (-0.02, 0.0, "ok"), (0.06, 0.0, "missed"), (-0.06, 0.0, "missed"), (0.06, 0.01, "open"), (0.001, 0.5, "open")],
    )
    def test_verdicts(self, value, uncertainty, verdict):
        assert Quantity("x", value, "K/ps", must=0.05, aim=0.005, uncertainty=uncertainty).verdict == verdict

    def test_what_is_not_a_number_misses(self):
        assert Quantity("x", float("nan"), must=1.0).verdict == "missed"
        assert Quantity("x", 5.0).verdict == ""

    def test_round_trip(self, tmp_path):
        panel = Panel("p", "x", "y", [Line("a", [0.0, 1.0], [2.0, 3.0], points=True)], y_range=(0.0, 1.0))
        sections = [
            Section("a", "A", [Quantity("q", 2.0, "K", 1.0), Quantity("n", float("nan"), must=1.0, uncertainty=float("inf"))], [panel], ["note"], 3.0)
        ]
        write_report(tmp_path / "r.json", {"model": "m"}, sections)
        head, back = read_report(tmp_path / "r.json")
        assert head == {"model": "m"}
        assert back[0].panels == sections[0].panels
        assert back[0].quantities[0] == sections[0].quantities[0]
        assert np.isnan(back[0].quantities[1].value)
        assert np.isinf(back[0].quantities[1].uncertainty)
        assert [q.name for q in missed(back)] == ["q", "n"]
        raw = json.loads((tmp_path / "r.json").read_text(), parse_constant=pytest.fail)
        assert raw["sections"][0]["quantities"][0]["verdict"] == "missed"

    @pytest.mark.parametrize("text", ["", "[1]", "{}", '{"sections": [{"name": "a"}]}'])
    def test_foreign_file(self, tmp_path, text):
        (tmp_path / "r.json").write_text(text)
        with pytest.raises(ValueError, match=r"r\.json is not a report of physics"):
            read_report(tmp_path / "r.json")

    def test_table(self):
        console = Console(width=100, record=True, file=io.StringIO())
        console.print(report_table([Section("a", "Title", [Quantity("q", 2.0, "K", 1.0, uncertainty=0.25)], notes=["a note"])]))
        text = console.export_text()
        for piece in ("Title", "q", "2 ± 0.25 K", "MISSED", "a note"):
            assert piece in text

    def test_brackets_are_no_markup(self):
        console = Console(width=100, record=True, file=io.StringIO())
        console.print(report_table([Section("a", "[/b]1", [Quantity("[/b]2", 2.0, "[/b]3")], notes=["in a folder [/b]4"])]))
        text = console.export_text()
        assert all(f"[/b]{k}" in text for k in (1, 2, 3, 4))


class TestReferences:
    """The shipped DFT values are what they claim to be."""

    def test_molecules(self):
        found = reference_molecules()
        assert len(found) == 6
        for name, reference in found.items():
            linear = name == "hydrogen cyanide"
            assert len(reference.wavenumbers) == 3 * len(reference.atoms) - (5 if linear else 6), name
            assert (np.diff(reference.wavenumbers) >= 0).all()
        water = found["water"]
        assert water.atoms.get_distance(0, 1) == pytest.approx(0.965, abs=0.01)
        # Harmonic, gas phase: experiment gives 1649, 3832 and 3943 1/cm (Benedict et al., 1956); this level is within a few percent.
        np.testing.assert_allclose(water.wavenumbers, [1649, 3832, 3943], rtol=0.05)

    def test_curves(self):
        for name in ("water O-H", "water dimer O-O", *CURVES):
            curve = reference_curve(name)
            assert curve.positions_nm.shape == (len(curve.values), len(curve.symbols), 3)
            assert len(curve.energies) == len(curve.values)
        butane = reference_curve("butane C-C-C-C")
        assert butane.values[np.argmin(butane.energies)] == 180
        assert butane.values[np.argmax(butane.energies)] == 0
        dimer = reference_curve("water dimer O-O")
        assert 2.7 <= dimer.values[np.argmin(dimer.energies)] <= 3.0

    def test_starting_structures(self):
        assert len(starting_structure("paracetamol")) == 20
        with pytest.raises(ValueError, match=f"no molecule 'gold'; there are {', '.join(molecule_names())}"):
            starting_structure("gold")


@pytest.fixture(scope="module")
def morse(tmp_path_factory):
    return write_model(Morse(swirl=50.0), tmp_path_factory.mktemp("model") / "morse.pt")


class TestValidatePhysics:
    def test_every_measure(self, morse, tmp_path):
        seen = []
        sections = validate_physics(morse, tmp_path / "out", SHORT, progress=lambda name, share: seen.append((name, share)))
        assert [s.name for s in sections] == list(MEASURES)
        assert {name for name, share in seen if share == 1.0} == set(MEASURES)
        names = {p.name for p in (tmp_path / "out").iterdir()}
        pictures = {f"{m}.png" for m in ("continuity", "dissociation", "vibrations", "torsion", "heating", "equipartition")}
        assert names == {"report.json", ".lock", *pictures}
        found = {q.name: q for s in sections for q in s.quantities}
        assert found["water: |F + dE/dx| / |dE/dx|"].verdict == "aim"
        assert 0 < found["water: lambda"].value < 1
        assert found["water: |work| per length"].value > 0

    def test_exact_direct_forces_have_no_asymmetry(self, tmp_path):
        model = write_model(Morse(), tmp_path / "exact.pt")
        sections = validate_physics(model, tmp_path / "out", SHORT, ("asymmetry", "loop-work"))
        values = {q.name: q.value for s in sections for q in s.quantities}
        assert values["water: lambda"] < 1e-6
        assert values["water: |work| over the integral of |F dx|"] < 1e-6

    def test_resume_keeps_what_is_done(self, morse, tmp_path):
        out = tmp_path / "out"
        validate_physics(morse, out, SHORT, ("torsion",))
        text = (out / "report.json").read_text()
        raw = json.loads(text)
        raw["sections"][0]["quantities"][0]["value"] = 12345.0
        (out / "report.json").write_text(json.dumps(raw))
        with pytest.raises(FileExistsError, match=r"not empty.*--resume"):
            validate_physics(morse, out, SHORT, ("torsion",))
        sections = validate_physics(morse, out, SHORT, ("gradient", "torsion"), resume=True)
        assert [s.name for s in sections] == ["gradient", "torsion"]
        assert sections[1].quantities[0].value == 12345.0
        with pytest.raises(ValueError, match="other settings"):
            validate_physics(morse, out, replace(SHORT, seed=2), resume=True)

    def test_a_model_of_other_elements(self, tmp_path):
        """Nothing that it does not know is asked of it."""
        model = write_model(Morse(), tmp_path / "hydrogen.pt", elements=("H",))
        sections = validate_physics(model, tmp_path / "out", SHORT)
        assert {s.name for s in sections if s.quantities} == {"continuity", "dissociation"}
        left_out = {s.name: s.notes[0].removeprefix("left out, with elements that the model was not trained on: ") for s in sections if s.notes}
        assert {left_out[name] for name in OF_MOLECULES} == {"water"}
        assert left_out["torsion"] == "ethanol H-O-C-C, butane C-C-C-C"
        assert "methane" in left_out["vibrations"]
        assert left_out["dissociation"] == "water O-H, water dimer O-O, ethanol C-C, methane dimer C-C"
        assert left_out["continuity"] == "water dimer"

    def test_a_model_that_was_not_trained_for_direct_forces(self, tmp_path):
        """They are not held against it."""
        model = write_model(Morse(swirl=5000.0), tmp_path / "energies.pt", untrained=["direct"])
        sections = validate_physics(model, tmp_path / "out", SHORT, ("asymmetry", "loop-work", "continuity"))
        assert [s.notes for s in sections] == [["direct forces left out: the model was not trained for them"]] * 3
        assert [bool(s.quantities) for s in sections] == [False, False, True]
        assert not [q.name for s in sections for q in s.quantities if "direct" in q.name]

    def test_while_another_process_runs_there(self, morse, tmp_path):
        with alone(tmp_path / "out"), pytest.raises(SimulationError, match="another process runs in"):
            validate_physics(morse, tmp_path / "out", SHORT, ("torsion",))
        assert not (tmp_path / "out" / "report.json").exists()

    def test_no_minimum_is_reported_and_the_rest_goes_on(self, morse, tmp_path, monkeypatch):
        monkeypatch.setattr("ase.optimize.LBFGS.run", lambda self, fmax, steps: False)
        sections = validate_physics(morse, tmp_path / "out", replace(SHORT, points=5), ("gradient", "torsion"))
        assert [q.name for q in missed(sections)] == ["could not be measured"]
        assert "water: no minimum" in sections[0].notes[0]
        assert sections[1].quantities

    def test_released_model(self, tmp_path):
        sections = validate_physics(MODEL, tmp_path / "out", replace(SHORT, points=6), ("gradient", "asymmetry", "continuity", "torsion"))
        for section in sections:
            values = [q.value for q in section.quantities]
            assert values, section.name
            assert np.isfinite(values).all(), section.name
            if section.name in ("gradient", "continuity"):
                assert not missed([section])


class TestCommandLine:
    def run(self, *arguments):
        return CliRunner().invoke(cli, ["validate", *map(str, arguments)])

    def test_one_measure(self, tmp_path):
        result = self.run(MODEL, "--physics", "-o", tmp_path / "out", "--measure", "torsion")
        assert result.exit_code == 0, result.output
        assert "butane" in result.output
        assert json.loads((tmp_path / "out" / "report.json").read_text())["model"] == MODEL

    def test_one_molecule(self, tmp_path):
        result = self.run(MODEL, "--physics", "-o", tmp_path / "out", "--measure", "asymmetry", "--molecule", "water")
        assert result.exit_code == 0, result.output
        report = json.loads((tmp_path / "out" / "report.json").read_text())
        assert report["settings"]["molecules"] == ["water"]
        assert [q["name"].split(":")[0] for s in report["sections"] for q in s["quantities"]] == ["water"]

    def test_a_miss_fails(self, tmp_path):
        model = write_model(Morse(smooth=False), tmp_path / "truncated.pt")
        result = self.run(model, "--physics", "-o", tmp_path / "out", "--measure", "continuity")
        assert result.exit_code == 1
        assert "miss what they must keep" in result.output

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("nothing", "--physics"), "no model 'nothing'"),
            ((MODEL, "--physics", "--measure", "taste"), "no measure 'taste'; there are gradient"),
            ((MODEL, "--physics", "--molecule", "soup"), "no molecule 'soup'; there are water, methane"),
            ((MODEL, "--full"), "go with --physics"),
        ],
    )
    def test_refusals(self, arguments, message, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        result = self.run(*arguments)
        assert result.exit_code == 1
        assert message in result.output
        assert "Traceback" not in result.output
        assert not list(tmp_path.iterdir())
