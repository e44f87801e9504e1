"""The accuracy benchmark from files to table: on frames of the sample, with a network that trains in seconds."""

import json
from dataclasses import replace

import h5py
import numpy as np
import pytest
import yaml
from ase import Atoms, units
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write
from rdkit import Chem
from rdkit.Chem import Descriptors

from benchmarks.accuracy import run
from benchmarks.accuracy.fragments import fragments
from benchmarks.accuracy.rings import RING_SYSTEMS, decorated_rings
from benchmarks.accuracy.scans import FACTORS, scan
from benchmarks.accuracy.without import without
from tests.training.helpers import KEYS, SAMPLE, SMALL
from training.checkpoint import load_checkpoint


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A folder with the files of a set, and configurations of a tiny network."""
    with h5py.File(SAMPLE) as sample:
        group = max(sample.values(), key=lambda g: len(g["coordinates"]))
        numbers = group["atomic_numbers"][()]
        columns = [group[k][()] for k in ("coordinates", KEYS["energy_key"], KEYS["force_key"])]
    frames = []
    for x, energy, forces in zip(*columns, strict=True):
        atoms = Atoms(numbers, x)
        atoms.calc = SinglePointCalculator(atoms, energy=energy * units.Hartree, forces=forces * units.Hartree)
        frames.append(atoms)
    write(tmp_path / "train_300K.xyz", frames)
    write(tmp_path / "test_600K.xyz", frames[:3])
    configs = tmp_path / "configs"
    configs.mkdir()
    for path in run.CONFIGS.glob("scratch-*.yaml"):
        raw = yaml.safe_load(path.read_text())
        raw["network"] = {k: getattr(SMALL, k) for k in SMALL.__dataclass_fields__ if k != "elements"}
        raw["run"]["compile"] = False  # compiling takes longer than the steps, and needs a C++ compiler
        (configs / path.name).write_text(yaml.safe_dump(json.loads(json.dumps(raw))))
    monkeypatch.setattr(run, "CONFIGS", configs)
    monkeypatch.setitem(run.SETS, "3bpa", replace(run.SETS["3bpa"], validation=0.25, test=0.25))
    return tmp_path, len(frames)


def test_from_files_to_table_and_again(tiny, capsys, monkeypatch):
    folder, n = tiny
    exported = []

    def record(checkpoint, model, **options):  # the exporter itself, which takes longer than all the rest here, has tests of its own
        assert checkpoint.is_file()
        exported.append((model.name, options["level_of_theory"], sorted(options["metrics"])))
        model.touch()

    monkeypatch.setattr(run, "export", record)
    command = ["3bpa", str(folder), "--output", str(folder / "out"), "--from-scratch", "--steps", "2"]
    run.main(command)
    printed = capsys.readouterr().out
    assert "MACE (published)" in printed
    results = json.loads((folder / "out" / "results.json").read_text())
    assert {row: found["n_frames"] for row, found in results["rmse"].items()} == {"300 K": round(0.25 * n), "600 K": 3}
    assert all(np.isfinite(value) for found in results["rmse"].values() for value in found.values())
    assert (results["from"], results["steps"]) == (None, 2)
    before = {p: p.stat().st_mtime_ns for p in (folder / "out").glob("*/*.ckpt")}
    run.main(command)
    assert {p: p.stat().st_mtime_ns for p in (folder / "out").glob("*/*.ckpt")} == before  # nothing is trained twice
    for other in (["--seed", "1"], ["--steps", "3"]):
        with pytest.raises(SystemExit, match=r"has results of .* choose another --output"):
            run.main([*command, *other])
    assert exported == [("3bpa-scratch-seed0.pt", "wB97X/6-31G(d)", ["300 K", "600 K"])]
    assert load_checkpoint(folder / "out" / "3bpa-scratch-seed0.ckpt").step == 2


def test_a_copy_without_some_molecules(tmp_path):
    with h5py.File(SAMPLE) as sample:
        names = list(sample)
        expected = {names[0]: len(sample[names[0]]["coordinates"])}
    assert without(SAMPLE, tmp_path / "less.h5", [names[0]]) == expected
    with h5py.File(SAMPLE) as sample, h5py.File(tmp_path / "less.h5") as less:
        assert list(less) == names[1:]
        assert dict(less.attrs).keys() == dict(sample.attrs).keys()
        assert all(np.array_equal(less[n]["coordinates"][()], sample[n]["coordinates"][()]) for n in less)
    with pytest.raises(FileExistsError, match="exists already"):
        without(SAMPLE, tmp_path / "less.h5", [names[0]])
    with pytest.raises(ValueError, match="no conformations of C60"):
        without(SAMPLE, tmp_path / "other.h5", [names[0], "C60"])
    assert not (tmp_path / "other.h5").exists()


@pytest.mark.parametrize("name", ["finetune", "scratch-1-direct", "scratch-2-conservative"])
def test_configurations_are_valid(name):
    assert run.read_config(run.CONFIGS / f"{name}.yaml").run.batch_molecules == 5


class TestRings:
    def test_small_closed_shell_molecules_of_the_elements_that_the_model_knows(self):
        for smiles in decorated_rings():
            molecule = Chem.MolFromSmiles(smiles)
            assert molecule.GetNumHeavyAtoms() <= 15
            assert {a.GetSymbol() for a in molecule.GetAtoms()} <= {"C", "N", "O"}
            assert Chem.GetFormalCharge(molecule) == 0
            assert Descriptors.NumRadicalElectrons(molecule) == 0
            assert "." not in smiles

    def test_every_ring_system_comes_bare_and_substituted(self):
        found = decorated_rings()
        assert len(set(found)) == len(found) > 3 * len(RING_SYSTEMS)
        assert {Chem.CanonSmiles(s) for s in RING_SYSTEMS} <= set(found)

    def test_the_seed_decides(self):
        assert decorated_rings(seed=3) == decorated_rings(seed=3) != decorated_rings(seed=4)


def test_formulas_that_are_trained_on_in_pairs(tmp_path):
    water, ammonia, methane = (molecule(name) for name in ("H2O", "NH3", "CH4"))
    far = methane.copy()
    far.translate([4.0, 0, 0])
    near = methane.copy()
    near.translate([2.6, 0, 0])
    files = {"train": [water + far, water + near, ammonia], "test": [water, methane, ammonia]}
    for name, structures in files.items():
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            for atoms in {a.get_chemical_formula(): a for a in structures}.values():
                same = [a for a in structures if a.get_chemical_formula() == atoms.get_chemical_formula()]
                group = file.create_group(atoms.get_chemical_formula())
                group["atomic_numbers"] = atoms.numbers
                group["coordinates"] = np.stack([a.positions for a in same])
    # What is trained on alone is what a split by formula takes care of.
    assert fragments(tmp_path / "train.h5", tmp_path / "test.h5") == {"CH4": (1, 2), "H2O": (1, 2)}


class TestScans:
    def test_there_is_one_of_the_bonds_that_symmetry_makes_alike(self):
        assert len(scan("[H][H]")) == len(FACTORS)
        assert len(scan("C")) == len(scan("O")) == len(FACTORS[1:])
        ethane = scan("CC")
        assert len(ethane) == 2 * len(FACTORS[1:])  # C-C and one C-H
        assert all(atoms.get_chemical_formula() == "C2H6" for atoms in ethane)

    def test_the_bond_is_as_long_as_it_is_said_to_be_and_the_rest_keeps_its_shape(self):
        factors = np.array(FACTORS[1:])
        frames = scan("CC")[: len(factors)]
        lengths = np.array([atoms.get_distance(0, 1) for atoms in frames])
        at_rest = np.sum(lengths) / np.sum(factors)
        assert at_rest == pytest.approx(1.53, abs=0.1)
        np.testing.assert_allclose(lengths, at_rest * factors, atol=0.2)
        of_methyl = np.array([atoms.get_distance(0, 2) for atoms in frames])
        assert np.ptp(of_methyl) < 0.3

    def test_the_seed_draws_the_displacements(self):
        first, same, other = (scan("O", seed=seed)[0].positions for seed in (0, 0, 1))
        assert (first == same).all()
        assert (first != other).any()
