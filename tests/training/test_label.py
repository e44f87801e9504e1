"""`label`: structures, sampling, labels that agree with the calculator, resuming after a kill, and a committee that picks."""

import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.build import molecule
from ase.calculators.emt import EMT
from ase.io import write
from rdkit import Chem
from rdkit.Chem import rdDistGeom
from scipy.spatial.distance import cdist
from typer.testing import CliRunner

from tests.training.label_calculators import CountingEMT
from training.__main__ import app
from training.data.frames import DataError
from training.data.prepare import formulas_of_file, prepare
from training.label.calculators import calculator_factory, parse_options
from training.label.dimers import random_dimer
from training.label.disagreement import Committee
from training.label.displacements import SOFTEST, STRETCH, displaced_frames, spring_modes
from training.label.dynamics import langevin_frames
from training.label.errors import LabelError
from training.label.hold_out import HeldOut
from training.label.journal import Candidate, Journal
from training.label.run import LabelSettings, label
from training.label.scans import BEND, STRETCHES, bent_frames, hinges, stretched_frames, turned_frames
from training.label.structures import geometries, is_plausible, read_molecules
from training.units import ANGSTROM_PER_NM, KJ_PER_MOL_PER_EV

ROOT = Path(__file__).parent.parent.parent
COUNTING = "tests.training.label_calculators:CountingEMT"
# Displacements and dimers alone: with dynamics, the sampler's evaluations would be counted too.
QUIET = LabelSettings(calculator=COUNTING, conformers=1, temperatures=(300.0,), frames=0, displacements=3, dimers=2)
INPUTS = ["O", "CO", "C#N"]


@pytest.fixture(autouse=True)
def fresh_count():
    CountingEMT.evaluations, CountingEMT.fail_after = 0, None


def contents(path):
    """Everything in a file that should not depend on when it was made."""
    with h5py.File(path) as file:
        return {f"{g}/{k}": file[g][k][()].tolist() for g in file for k in file[g]}


class TestStructures:
    def test_smiles_file_and_frames(self, tmp_path):
        (tmp_path / "list.smi").write_text("# two\nO water\n\nCO methanol\n")
        write(tmp_path / "two.xyz", [molecule("H2O"), molecule("CH4")])
        found = read_molecules(["C#N", str(tmp_path / "list.smi"), str(tmp_path / "two.xyz")])
        assert [m.name for m in found] == ["C#N", "O", "CO", "two.xyz#0", "two.xyz#1"]
        np.testing.assert_allclose(geometries(found[3], 5, 0)[0].positions, molecule("H2O").positions, atol=1e-6)

    def test_conformers_have_bonds_of_chemistry_and_differ(self):
        (butanol,) = read_molecules(["CCCCO"])
        found = geometries(butanol, 3, seed=1)
        assert len(found) == 3
        assert Counter(found[0].get_chemical_symbols()) == {"C": 4, "H": 10, "O": 1}
        assert 1.3 < found[0].get_distance(3, 4) < 1.5  # C-O
        assert not np.allclose(cdist(*2 * [found[0].positions]), cdist(*2 * [found[1].positions]), atol=0.1)
        np.testing.assert_array_equal(found[1].positions, geometries(butanol, 3, seed=1)[1].positions)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("no-such-file.xyz", "neither an existing file nor a SMILES"),
            ("", "neither an existing file nor a SMILES"),
            ("[NH4+]", "charged or has unpaired electrons"),
            ("[CH3]", "charged or has unpaired electrons"),
            ("*CC", r"\*CC has atoms of no element"),
        ],
    )
    def test_what_is_no_molecule(self, text, message):
        with pytest.raises(LabelError, match=message):
            read_molecules([text])

    def test_records_of_sdf_and_mol(self, tmp_path):
        def record(smiles, hydrogens=True):
            made = Chem.AddHs(Chem.MolFromSmiles(smiles))
            rdDistGeom.EmbedMolecule(made, randomSeed=1)
            return Chem.MolToMolBlock(made if hydrogens else Chem.RemoveHs(made))

        def written(name, *records):
            (tmp_path / name).write_text("$$$$\n".join([*records, ""]) if name.endswith("sdf") else records[0])
            return [str(tmp_path / name)]

        ethanol, water = record("CCO"), record("O")
        found = read_molecules(written("two.sdf", ethanol, water) + written("one.mol", ethanol))
        assert [m.name for m in found] == ["two.sdf#0", "two.sdf#1", "one.mol#0"]
        assert [m.atoms.get_chemical_formula() for m in found] == ["C2H6O", "H2O", "C2H6O"]
        for name, record_, message in (
            ("ion.sdf", record("CC(=O)[O-]"), "record 1 is charged or has unpaired electrons"),
            ("radical.sdf", record("[CH3]"), "record 1 is charged or has unpaired electrons"),
            ("bare.sdf", record("CCO", hydrogens=False), "record 1 lacks hydrogens"),
            ("broken.sdf", ethanol.replace(" C ", " ? ", 1), "RDKit cannot read record 1"),
            ("fused.sdf", ethanol.replace(ethanol.splitlines()[5], ethanol.splitlines()[4]), "record 1 .*on top of each other"),
        ):
            with pytest.raises(LabelError, match=message):
                read_molecules(written(name, water, record_))

    def test_charged_frames_of_a_file(self, tmp_path):
        frames = [molecule("H2O") for _ in range(3)]
        frames[1].info["charge"] = 1
        write(tmp_path / "ions.xyz", frames, format="extxyz")
        with pytest.raises(LabelError, match=r"ions\.xyz: 1 of 3 frames are charged .*frame 1 has charge=1.*remove these frames"):
            read_molecules([str(tmp_path / "ions.xyz")])
        write(tmp_path / "dummy.xyz", Atoms("OX", [[0, 0, 0], [0, 0, 1.5]]))
        with pytest.raises(LabelError, match="frame 0 has atoms of no element"):
            read_molecules([str(tmp_path / "dummy.xyz")])

    def test_bad_files(self, tmp_path):
        (tmp_path / "bad.xyz").write_text("3\n\nH 0 0\n")
        with pytest.raises(LabelError, match=r"bad\.xyz: ASE cannot read it"):
            read_molecules([str(tmp_path / "bad.xyz")])
        write(tmp_path / "box.xyz", Atoms("H2", [[0, 0, 0], [0, 0, 0.7]], cell=[9, 9, 9], pbc=True))
        with pytest.raises(LabelError, match="frame 0 is periodic"):
            read_molecules([str(tmp_path / "box.xyz")])
        write(tmp_path / "fused.xyz", Atoms("H2", [[0, 0, 0], [0, 0, 0.1]]))
        with pytest.raises(LabelError, match="on top of each other"):
            read_molecules([str(tmp_path / "fused.xyz")])
        (tmp_path / "list.smi").write_text("CO\nC(\n")
        with pytest.raises(LabelError, match=r"list\.smi, line 2"):
            read_molecules([str(tmp_path / "list.smi")])
        (tmp_path / "other.smi").write_bytes(b"\xff\xfe")
        with pytest.raises(LabelError, match=r"other\.smi: no text of SMILES"):
            read_molecules([str(tmp_path / "other.smi")])


def test_a_smiles_longer_than_a_name_can_be():
    peptide = "NCC(=O)" * 45 + "O"
    (found,) = read_molecules([peptide])
    assert found.smiles == peptide


def test_a_file_with_an_at_sign(tmp_path):
    write(tmp_path / "x.xyz", molecule("H2O"))
    (tmp_path / "x.xyz").rename(tmp_path / "m@300K.xyz")
    (found,) = read_molecules([str(tmp_path / "m@300K.xyz")])
    assert found.symbols == {"H", "O"}


class TestSampling:
    def test_modes_of_springs(self):
        # Two atoms: V = 1/2 a (x_2 - x_1)^2 has the stiffness 2 a along (-1, 1) / sqrt 2; a linear molecule has 3 n - 5 modes.
        stiffness, modes = spring_modes(molecule("N2"))
        np.testing.assert_allclose(stiffness, [2 * STRETCH])
        np.testing.assert_allclose(np.abs(modes[[2, 5], 0]), 0.5**0.5)
        assert len(spring_modes(molecule("CO2"))[0]) == 4
        # In planar benzene, too, every mode is held, and none moves or turns the whole.
        ring = molecule("C6H6")
        stiffness, modes = spring_modes(ring)
        assert len(stiffness) == 30
        assert stiffness.min() > SOFTEST
        np.testing.assert_allclose(modes.T @ modes, np.eye(30), atol=1e-12)
        moved = modes.T.reshape(30, 12, 3)
        np.testing.assert_allclose(moved.sum(1), 0, atol=1e-12)
        np.testing.assert_allclose(np.cross(ring.positions[None], moved).sum(1), 0, atol=1e-11)
        # The distance of two molecules is held by nothing but the floor.
        pair = molecule("H2O")
        pair.extend(Atoms("H2O", molecule("H2O").positions[[1, 2, 0]] + [0, 0, 5.0]))
        assert (np.abs(spring_modes(pair)[0] - SOFTEST) < 1e-9).sum() == 1

    def test_displacements_have_the_spread_of_the_temperature(self):
        atoms = molecule("CH3CH2OH")
        stiffness, modes = spring_modes(atoms)
        rng = np.random.default_rng(0)
        shifts = np.array([(f.positions - atoms.positions).ravel() for f in displaced_frames(atoms, 100.0, 400, rng)])
        ratio = ((shifts @ modes) ** 2).mean(0) * stiffness / (units.kB * 100.0)
        assert ratio.mean() == pytest.approx(1.0, abs=0.05)
        assert np.square(shifts).sum() == pytest.approx(np.square(shifts @ modes).sum(), rel=1e-9)  # nothing outside of the modes
        assert displaced_frames(Atoms("H"), 100.0, 4, rng) == []

    def test_dynamics_keep_the_temperature_and_the_start(self):
        atoms = Atoms("N2", [[0, 0, 0], [0, 0, 1.1]])
        before = atoms.positions.copy()
        frames = langevin_frames(atoms, EMT(), 300.0, 5, np.random.default_rng(0))
        np.testing.assert_array_equal(atoms.positions, before)
        assert len(frames) == 5
        again = langevin_frames(atoms, EMT(), 300.0, 5, np.random.default_rng(0))
        np.testing.assert_array_equal(frames[4].positions, again[4].positions)
        assert len({round(f.get_distance(0, 1), 6) for f in frames}) == 5

    def test_dimers_touch_at_the_contact_that_was_drawn(self):
        rng = np.random.default_rng(0)
        ring, water = molecule("C6H6"), molecule("H2O")
        contacts = []
        for _ in range(200):
            dimer = random_dimer(ring, water, (1.6, 4.0), rng)
            assert is_plausible(dimer)
            np.testing.assert_allclose(cdist(dimer.positions[:12], dimer.positions[:12]), cdist(ring.positions, ring.positions), atol=1e-9)
            contacts.append(cdist(dimer.positions[:12], dimer.positions[12:]).min())
        assert 1.6 - 1e-9 < min(contacts) < 1.7
        assert 3.9 < max(contacts) < 4.0 + 1e-9
        assert np.mean(contacts) == pytest.approx(2.8, abs=0.15)


class TestScans:
    """At 1e-6 K the displacements vanish, and only what the scan changes is left."""

    def test_hinges_are_the_bonds_outside_of_rings(self):
        (toluene,) = geometries(read_molecules(["Cc1ccccc1"])[0], 1, 0)
        found = {(h.pivot, h.end): h.side.tolist() for h in hinges(toluene)}
        symbols = toluene.get_chemical_symbols()
        assert sorted(symbols[p] + symbols[e] for p, e in found) == ["CC"] + ["CH"] * 8
        methyl = next(side for (p, e), side in found.items() if symbols[e] == "C")
        assert [symbols[k] for k in methyl] == ["C", "H", "H", "H"]
        assert hinges(Atoms("H")) == []

    def test_stretched_bonds_go_from_pressed_to_twice_their_length(self):
        atoms = molecule("H2O")
        frames = stretched_frames(atoms, 1e-6, 300, np.random.default_rng(0))
        ratios = np.array([[f.get_distance(0, k) / atoms.get_distance(0, k) for k in (1, 2)] for f in frames])
        changed = np.abs(ratios - 1) > 1e-3
        assert set(changed.sum(1)) <= {0, 1, 2}
        assert 0.15 < (changed.sum(1) == 2).mean() < 0.35
        assert STRETCHES[0] <= ratios.min() < STRETCHES[0] + 0.02
        assert STRETCHES[1] - 0.02 < ratios.max() <= STRETCHES[1] + 1e-6
        np.testing.assert_allclose([f.get_angle(1, 0, 2) for f in frames], atoms.get_angle(1, 0, 2), atol=1e-2)

    def test_torsions_go_all_the_way_round_and_change_nothing_else(self):
        atoms = molecule("H2O2")
        frames = turned_frames(atoms, 1e-6, 200, np.random.default_rng(0))
        (h, o, p, i) = (2, 0, 1, 3)
        assert atoms.get_chemical_symbols() == ["O", "O", "H", "H"]
        angles = np.array([f.get_dihedral(h, o, p, i) for f in frames])
        assert (np.histogram(angles, bins=8, range=(0, 360))[0] > 8).all()
        for frame in frames[:20]:
            for pair in ((h, o), (o, p), (p, i), (h, p), (o, i)):
                assert frame.get_distance(*pair) == pytest.approx(atoms.get_distance(*pair), abs=1e-4)

    def test_bends_change_angles_within_the_limit(self):
        atoms = molecule("H2O")
        frames = bent_frames(atoms, 1e-6, 200, np.random.default_rng(0))
        change = np.array([f.get_angle(1, 0, 2) for f in frames]) - atoms.get_angle(1, 0, 2)
        assert -BEND - 1e-3 < change.min() < -0.9 * BEND
        assert 0.9 * BEND < change.max() < BEND + 1e-3
        np.testing.assert_allclose([f.get_distance(0, k) for f in frames for k in (1, 2)], atoms.get_distance(0, 1), atol=1e-4)
        linear = bent_frames(molecule("CO2"), 1e-6, 20, np.random.default_rng(0))
        assert min(f.get_angle(1, 0, 2) for f in linear) < 180 - 0.5 * BEND

    def test_what_has_no_such_bond_gives_no_frame(self):
        rng = np.random.default_rng(0)
        assert turned_frames(molecule("H2O"), 300.0, 3, rng) == []
        assert bent_frames(molecule("N2"), 300.0, 3, rng) == []
        assert stretched_frames(Atoms("H"), 300.0, 3, rng) == []


class TestHoldOut:
    def test_molecules_of_a_cluster(self, tmp_path):
        """A cluster has a formula of its own; with a held-out molecule in it, it is held out."""
        write(tmp_path / "held-out.xyz", Atoms("OH2", molecule("H2O").positions), format="extxyz")  # without an energy: formulas are all it takes
        held = HeldOut((str(tmp_path / "held-out.xyz"),))
        pair, other = molecule("NH3") + molecule("H2O"), molecule("NH3") + molecule("CH4")
        for cluster in (pair, other):
            cluster.positions[4:] += [4.0, 0, 0]
        assert [atoms in held for atoms in (molecule("H2O"), pair, other, molecule("NH3"))] == [True, True, False, False]
        write(tmp_path / "clusters.xyz", [pair, other])
        report = label([str(tmp_path / "clusters.xyz")], tmp_path / "out.h5", replace(QUIET, dimers=0, hold_out=(str(tmp_path / "held-out.xyz"),)))
        assert report["notes"] == ["clusters.xyz#0: its formula is held out, or that of a molecule in it"]
        with h5py.File(tmp_path / "out.h5") as file:
            assert list(file) == ["CH7N"]

    @pytest.mark.parametrize("layout", ["ani1x", "ani1", "extxyz"])
    def test_labels_of_held_out_files_may_have_any_name(self, tmp_path, layout):
        water = molecule("H2O")
        path = tmp_path / ("x.xyz" if layout == "extxyz" else "x.h5")
        if layout == "extxyz":
            water.info["dft_energy"] = -2000.0
            write(path, [Atoms("H", info={"dft_energy": -13.6}), water], format="extxyz")
        else:
            with h5py.File(path, "w") as file:
                group = file.create_group("water")
                group["coordinates"], group["dft_energy"] = water.positions[None], [-2000.0]
                name, elements = ("atomic_numbers", water.numbers) if layout == "ani1x" else ("species", np.array([b"O", b"H", b"H"]))
                group[name] = elements
        assert formulas_of_file(path) == {"H2O"}
        with pytest.raises(DataError, match=r"no\.xyz: no such file"):
            formulas_of_file(tmp_path / "no.xyz")

    def test_formulas_of_a_file_and_of_a_split(self, tmp_path):
        def without(source):
            return LabelSettings(**{**QUIET.__dict__, "dimers": 0, "hold_out": (str(tmp_path / source),)})

        label(["O", "CO"], tmp_path / "first.h5", QUIET)
        report = label(["O", "N"], tmp_path / "second.h5", without("first.h5"))
        assert report["notes"] == ["O: its formula is held out, or that of a molecule in it"]
        with h5py.File(tmp_path / "second.h5") as file:
            assert list(file) == ["H3N"]
        # What would be tested on is not seen in pairs either.
        report = label(["O", "N"], tmp_path / "pairs.h5", replace(without("first.h5"), dimers=8))
        assert any("the formula of one of them is held out" in note for note in report["notes"])
        with h5py.File(tmp_path / "pairs.h5") as file:
            assert list(file) == ["H3N", "H6N2"]
        # Methane is not in the data; by the same rule it would go to validation.
        prepare([tmp_path / "first.h5"], tmp_path / "packed", validation=0.5)
        with pytest.raises(LabelError, match="no frame was labelled"):
            label(["C"], tmp_path / "third.h5", without("packed"))


class TestCalculators:
    def test_by_name_and_by_module(self):
        assert type(calculator_factory("emt", {})()).__name__ == "EMT"
        assert isinstance(calculator_factory(COUNTING, {})(), CountingEMT)
        assert parse_options(["xc=PBE", "cart=true", 'scf={"tol": 1e-8}', "name=a=b"]) == {
            "xc": "PBE",
            "cart": True,
            "scf": {"tol": 1e-8},
            "name": "a=b",
        }

    @pytest.mark.parametrize(
        ("specification", "options", "message"),
        [
            ("emtt", {}, "ASE has no calculator 'emtt'"),
            ("tests.training.nowhere:EMT", {}, "no 'EMT' in module 'tests.training.nowhere'"),
            ("ase.calculators.emt:Nothing", {}, "no 'Nothing' in module"),
            ("ase:Atoms", {}, "gives no energy and no forces"),
            ("tests.training.label_calculators:no_forces", {}, "gives no forces"),
            ("tests.training.label_calculators:no_forces", {"a": 1}, "TypeError"),
        ],
    )
    def test_refusals(self, specification, options, message):
        with pytest.raises(LabelError, match=message):
            calculator_factory(specification, options)

    def test_option_without_a_value(self):
        with pytest.raises(LabelError, match="must read key=value, got 'cart'"):
            parse_options(["cart"])


class TestRun:
    def test_labels_are_those_of_the_calculator_and_round_trip(self, tmp_path):
        settings = LabelSettings(calculator="emt", conformers=2, temperatures=(200.0, 400.0), frames=1, displacements=1, dimers=3)
        report = label(INPUTS, tmp_path / "data.h5", settings, level_of_theory="EMT")
        assert report["notes"] == []
        assert not (tmp_path / "data.h5.journal").exists()
        dataset = prepare([tmp_path / "data.h5"], tmp_path / "packed")
        assert len(dataset) == report["labelled"]
        assert report["labelled"] + sum(report["failures"].values()) == report["candidates"] >= 3 * (1 + 2 * 2) + 3 - 1
        assert dataset.metadata["level_of_theory"] == "EMT"
        for frame in range(len(dataset)):
            part = slice(dataset.offsets[frame], dataset.offsets[frame + 1])
            atoms = Atoms(dataset.numbers[part], dataset.coordinates[part], calculator=EMT())
            assert dataset.energies[frame] == pytest.approx(atoms.get_potential_energy(), abs=1e-4)
            np.testing.assert_allclose(dataset.forces[part], atoms.get_forces(), atol=2e-4)
        with h5py.File(tmp_path / "data.h5") as file:
            assert {s.decode().split()[0] for g in file.values() for s in g["source"][()]} == {"conformer", "displacement", "dynamics", "dimer"}
            assert file["CH4O/label.forces"].attrs["units"] == "Hartree/Angstrom"
            assert (np.diff(file["CH4O/atomic_numbers"][()].astype(int)) >= 0).all()

    def test_larger_forces_than_wanted_are_left_out(self, tmp_path):
        stretched = tmp_path / "stretched.xyz"
        write(stretched, [Atoms("N2", [[0, 0, 0], [r, 0, 0]]) for r in (1.0, 1.1)])  # in EMT, 2 and 75 kcal/mol/Angstrom
        settings = LabelSettings(calculator="emt", temperatures=(300.0,), frames=0, displacements=0, max_force=70.0)
        report = label([str(stretched)], tmp_path / "less.h5", settings)
        assert (report["labelled"], report["failures"]) == (1, {"a force above 70 kcal/mol/Angstrom": 1})
        assert label([str(stretched)], tmp_path / "all.h5", replace(settings, max_force=80.0))["labelled"] == 2

    def test_interrupted_and_resumed_equals_uninterrupted(self, tmp_path):
        label(INPUTS, tmp_path / "whole.h5", QUIET)
        needed = CountingEMT.evaluations
        assert needed >= 12
        CountingEMT.evaluations = 0
        for stop in (5, 9):
            CountingEMT.fail_after = stop
            with pytest.raises(KeyboardInterrupt):
                label(INPUTS, tmp_path / "parts.h5", QUIET, resume=stop == 9)
            assert not (tmp_path / "parts.h5").exists()
        CountingEMT.fail_after = None
        label(INPUTS, tmp_path / "parts.h5", QUIET, resume=True)
        assert CountingEMT.evaluations == needed  # no frame was labelled twice
        assert contents(tmp_path / "parts.h5") == contents(tmp_path / "whole.h5")

    def test_killed_in_the_middle(self, tmp_path):
        program = f"""
from pathlib import Path
from tests.training.label_calculators import CountingEMT
from training.label.run import LabelSettings, label
from training.label.scans import BEND, STRETCHES, bent_frames, hinges, stretched_frames, turned_frames
CountingEMT.kill_after = 4
settings = LabelSettings(calculator={COUNTING!r}, conformers=1, temperatures=(300.0,), frames=0, displacements=3, dimers=2)
label({INPUTS!r}, Path({str(tmp_path / "killed.h5")!r}), settings)
"""
        result = subprocess.run([sys.executable, "-W", "ignore", "-c", program], cwd=ROOT, capture_output=True)
        assert result.returncode == -9, result.stderr
        report = label(INPUTS, tmp_path / "killed.h5", QUIET, resume=True)
        label(INPUTS, tmp_path / "whole.h5", QUIET)
        assert CountingEMT.evaluations == 2 * report["labelled"] - 4 + 2 * sum(report["failures"].values())
        assert contents(tmp_path / "killed.h5") == contents(tmp_path / "whole.h5")

    def test_a_calculator_that_is_not_installed_ends_the_run_and_costs_nothing(self, tmp_path):
        settings = LabelSettings(
            calculator="tests.training.label_calculators:BrokenEMT", conformers=1, frames=0, displacements=20, temperatures=(300.0,)
        )
        for resume in (False, True):
            with pytest.raises(LabelError, match=r"20 labels in a row failed, .*the program was not found.*--resume"):
                label(["CO"], tmp_path / "data.h5", settings, resume=resume)
        few = LabelSettings(calculator="tests.training.label_calculators:BrokenEMT", conformers=1, frames=0, displacements=2)
        with pytest.raises(LabelError, match="no label could be computed, lastly: RuntimeError: the program was not found"):
            label(["CO"], tmp_path / "few.h5", few)

    def test_a_molecule_that_the_calculator_cannot_do_is_left_out_however_many_frames_it_has(self, tmp_path):
        settings = LabelSettings(
            calculator="tests.training.label_calculators:EMTWithoutNitrogen", conformers=1, frames=0, displacements=25, temperatures=(300.0,)
        )
        report = label(["CN", "CO"], tmp_path / "data.h5", settings)
        assert report["failures"] == {"RuntimeError: no nitrogen": 26}
        assert report["labelled"] == 26

    def test_frames_that_the_calculator_does_not_trust_are_left_out_however_many(self, tmp_path):
        shy = "tests.training.label_calculators:ShyEMT"
        settings = LabelSettings(calculator=shy, conformers=1, frames=0, displacements=30, temperatures=(300.0,))
        report = label(["CO"], tmp_path / "data.h5", settings)
        assert report["failures"] == {"not today": 30}
        assert report["labelled"] == 1

    def test_failed_dynamics_leave_the_rest(self, tmp_path):
        settings = LabelSettings(calculator="emt", sampler="tests.training.label_calculators:BrokenEMT", conformers=1, frames=1, displacements=2)
        report = label(["CO"], tmp_path / "data.h5", settings)
        assert report["notes"] == ["CO: dynamics failed (RuntimeError: the program was not found)"]
        assert report["labelled"] == 5

    def test_other_settings_are_refused(self, tmp_path):
        CountingEMT.fail_after = 3
        with pytest.raises(KeyboardInterrupt):
            label(INPUTS, tmp_path / "data.h5", QUIET)
        CountingEMT.fail_after = None
        with pytest.raises(LabelError, match="holds an unfinished run; continue it with --resume"):
            label(INPUTS, tmp_path / "data.h5", QUIET)
        with pytest.raises(LabelError, match=r"other settings \(displacements was 3, now 9\)"):
            label(INPUTS, tmp_path / "data.h5", LabelSettings(**{**QUIET.__dict__, "displacements": 9}), resume=True)
        with pytest.raises(LabelError, match="no run to resume"):
            label(INPUTS, tmp_path / "other.h5", QUIET, resume=True)
        open_journal = Journal(tmp_path / "busy.h5.journal", {}, resume=False)
        with pytest.raises(LabelError, match="another run may be using it"):
            Journal(tmp_path / "busy.h5.journal", {}, resume=True)
        open_journal.close()
        (tmp_path / "noise.h5.journal").write_bytes(b"noise" * 1000)
        with pytest.raises(LabelError, match="it is damaged"):
            label(INPUTS, tmp_path / "noise.h5", QUIET, resume=True)

    def test_output_that_cannot_be_made(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(LabelError, match=r"x\.h5\.journal: cannot be opened .*give another"):
            label(INPUTS, tmp_path / "file" / "x.h5", QUIET)
        (tmp_path / "x.h5.journal").mkdir()
        with pytest.raises(LabelError, match=r"x\.h5\.journal: cannot be opened .*give another"):
            label(INPUTS, tmp_path / "x.h5", QUIET, resume=True)

    def test_fragments_without_a_geometry(self, tmp_path, monkeypatch):
        """RDKit puts the two of most of these on top of each other."""
        monkeypatch.setattr("training.label.run.geometries", lambda m, *_: [] if m.smiles == "O.O" else geometries(m, 1, 0))
        report = label(["O.O", "O"], tmp_path / "x.h5", LabelSettings(**{**QUIET.__dict__, "dimers": 4}))
        expected = "O.O: RDKit found no geometry of several fragments; give them as separate molecules, which dimers (--dimers) pair"
        assert report["notes"][0] == expected
        assert {note.partition(": ")[2] for note in report["notes"][1:]} == {expected}

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"conformers": 0}, "conformers must be at least 1, got 0"),
            ({"temperatures": (-3.0,)}, "temperatures must be positive"),
            ({"select": 3}, "belong together"),
            ({"committee": ("a",)}, "belong together"),
            ({"committee": ("a",), "select": 0}, "select must be at least 1"),
            ({"sampler_options": {"a": 1}}, "but no sampler"),
            ({"torsions": -1}, "torsions must be at least 0, got -1"),
            ({"contacts": (3.0, 1.0)}, "contacts must be two positive distances"),
            ({"contacts": (1.0, float("inf"))}, "contacts must be two positive distances"),
            ({"temperatures": (300.0, float("nan"))}, "temperatures must be positive"),
            ({"temperatures": (float("inf"),)}, "temperatures must be positive"),
            ({"max_force": 0.0}, "max_force must be a positive number of kcal/mol/Angstrom, got 0.0"),
            ({"max_force": float("inf")}, "max_force must be a positive number"),
            ({"seed": 99999999999}, r"seed must be less than 2\*\*31, RDKit's limit, got 99999999999"),
        ],
    )
    def test_bad_settings(self, changes, message):
        with pytest.raises(LabelError, match=message):
            LabelSettings(**{"calculator": "emt", **changes})


class TestCommittee:
    def test_disagreement_is_the_largest_spread_of_a_force(self):
        """By hand: two models that differ by 2 eV/A on one atom, each 1 eV/A from their mean, and by less on the others."""
        difference = torch.tensor([[0.0, 0.1, 0.0], [1.2, 0.0, 1.6], [0.0, 0.0, 0.0]], dtype=torch.float64) * KJ_PER_MOL_PER_EV * ANGSTROM_PER_NM
        committee = Committee.__new__(Committee)
        committee._conservative = False
        committee._models = [lambda x, z, box: (0.0, 0 * difference), lambda x, z, box: (0.0, difference)]
        assert committee.disagreement(molecule("H2O")) == pytest.approx(1.0, rel=1e-12)

    def test_of_models_without_direct_forces_it_is_that_of_conservative_ones(self, monkeypatch):
        class Model:
            def __init__(self, force):
                self.force, self.metadata = force, SimpleNamespace(untrained=["direct"], elements=["H", "O"], weights_sha256=str(force))

            def conservative_and_direct(self, x, z, box):
                return 0.0, torch.full_like(x, self.force) * KJ_PER_MOL_PER_EV * ANGSTROM_PER_NM, torch.full_like(x, torch.nan)

        monkeypatch.setattr("openmm_se3.model_file.load_model", lambda force: Model(float(force)))
        assert Committee(["0", "2"]).disagreement(molecule("H2O")) == pytest.approx(3**0.5, rel=1e-12)

    def test_only_what_was_picked_is_labelled(self, tmp_path, monkeypatch):
        class Longest:
            """Disagrees on stretched molecules."""

            def __init__(self, models):
                assert models == ["a", "b"]

            def require_elements(self, symbols):
                assert symbols == {"H", "O"}

            def disagreement(self, atoms):
                return atoms.get_all_distances().max()

        monkeypatch.setattr("training.label.run.Committee", Longest)
        settings = LabelSettings(calculator=COUNTING, frames=0, displacements=10, conformers=1, committee=("a", "b"), select=5)
        report = label(["O"], tmp_path / "data.h5", settings)
        assert (report["candidates"], report["labelled"], CountingEMT.evaluations) == (21, 5, 5)
        with h5py.File(tmp_path / "data.h5") as file:
            spread = [Atoms("H2O", x).get_all_distances().max() for x in file["H2O/coordinates"][()]]
            stored = file["H2O/committee.force_std"]
            np.testing.assert_allclose(stored[()] * units.Hartree, spread, rtol=1e-5)
            assert stored.attrs["units"] == "Hartree/Angstrom"

    def test_journal_keeps_those_with_the_largest_disagreement(self, tmp_path):
        journal = Journal(tmp_path / "journal", {}, resume=False)
        journal.add_task("a", [Candidate("water", "test", molecule("H2O")) for _ in range(6)], None)
        for (frame, _), value in zip(journal.without_disagreement(), [0.1, 0.5, 0.2, 0.9, 0.3, 0.2], strict=True):
            journal.set_disagreement(frame, value)
        journal.choose(3)
        assert [frame for frame, _ in journal.unlabelled()] == [2, 4, 5]
        journal.choose(4)
        assert [frame for frame, _ in journal.unlabelled()] == [2, 3, 4, 5]
        journal.close()

    def test_element_that_a_model_does_not_know(self):
        committee = Committee.__new__(Committee)
        committee._elements = {"H", "C", "N", "O"}
        committee.require_elements({"C", "O"})
        (chloroform,) = read_molecules(["ClC(Cl)Cl"])
        with pytest.raises(LabelError, match="the input holds Cl, which not every model of the committee knows"):
            committee.require_elements(set(chloroform.symbols))

    def test_refusals(self):
        with pytest.raises(LabelError, match="at least two models, got 1"):
            Committee(["se3-ani1x"])
        with pytest.raises(LabelError, match="same weights twice"):
            Committee(["se3-ani1x", "se3-ani1x"])


def test_command_line(tmp_path):
    arguments = ["label", "O", "N", "-o", str(tmp_path / "data.h5"), "--calculator", "emt", "--conformers", "1", "--frames", "1", "--dimers", "1"]
    result = CliRunner().invoke(app, [*arguments, "--temperature", "300", "--displacements", "1"])
    assert result.exit_code == 0, result.output
    assert "7 frames labelled of 7 candidates" in " ".join(result.output.split())
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 1
    assert "exists already" in again.output
    assert "Traceback" not in again.output
