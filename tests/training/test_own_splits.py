"""Data that come with a split: files of frames that choose a model, or test it."""

from itertools import combinations

import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read, write
from typer.testing import CliRunner

from training.__main__ import app
from training.data.frames import DataError
from training.data.molecules import Frames, formulas_of_parts, parts_by_formula
from training.data.packed import PackedDataset
from training.data.prepare import prepare
from training.data.splits import SPLITS
from training.label.hold_out import HeldOut


def append(path, *frames, seed=0):
    """Extended XYZ of frames that are displaced and labelled at random."""
    rng = np.random.default_rng(seed)
    for frame in frames:
        atoms = frame.copy()
        atoms.positions += 0.05 * rng.normal(size=atoms.positions.shape)
        forces = rng.normal(size=atoms.positions.shape)
        atoms.calc = SinglePointCalculator(atoms, energy=-10.0 * len(atoms) + rng.normal(), forces=forces)
        write(path, atoms, format="extxyz", append=True)
    return path


def pair_of(first, second):
    """Two molecules, far from each other."""
    other = molecule(second)
    other.translate([6.0, 0, 0])
    return molecule(first) + other


@pytest.fixture
def files(tmp_path):
    """Frames of four molecules in three files: train, validation, test."""
    names = [("H2O", 6), ("CH4", 6)], [("NH3", 3), ("H2O", 2)], [("C2H6", 4)]
    frames = [[molecule(name) for name, n in of_file for _ in range(n)] for of_file in names]
    return [append(tmp_path / f"{split}.xyz", *f, seed=i) for i, (split, f) in enumerate(zip(SPLITS, frames, strict=True))]


def test_every_file_keeps_its_split(files, tmp_path):
    train, validation, test = files
    dataset = prepare([train], tmp_path / "packed", validation_data=[validation], test_data=[test])
    assert dataset.metadata["split_frames"] == {"train": 12, "validation": 5, "test": 4}
    assert {dataset.formula(f) for f in dataset.indices("test")} == {"C2H6"}
    assert dataset.metadata["split_files"] == {"validation": ["validation.xyz"], "test": ["test.xyz"]}
    assert dataset.frames_of_trained_formulas("validation") == 2
    assert dataset.frames_of_trained_formulas("test") == 0
    assert PackedDataset(dataset.directory).indices("validation").tolist() == dataset.indices("validation").tolist()


@pytest.mark.parametrize("split_by", ["formula", "frame"])
def test_the_rest_is_split_by_the_rule(files, tmp_path, split_by):
    train, _, test = files
    dataset = prepare([train], tmp_path / "packed", validation=0.5, test_data=[test], split_by=split_by, seed=1)
    alone = prepare([train], tmp_path / "alone", validation=0.5, split_by=split_by, seed=1)
    assert alone.metadata["split_frames"]["validation"] == 6
    assert dataset.indices("validation").tolist() == alone.indices("validation").tolist()
    assert dataset.indices("train").tolist() == alone.indices("train").tolist()
    assert dataset.indices("test").tolist() == [12, 13, 14, 15]


def test_molecules_of_conformations():
    """A chain is one molecule, however long; pairs and clusters are several, in any order of their atoms."""
    chain = Atoms("C12", positions=[[1.5 * i, 0, 0] for i in range(12)])
    assert formulas_of_parts(chain.numbers[None].astype(np.uint8), chain.positions[None]) == [set()]
    water, methane = molecule("H2O"), molecule("CH4")
    methane.translate([3.5, 0, 0])
    third = molecule("H2O")
    third.translate([0, 0, 4.0])
    cluster = water + methane + third
    orders = [np.random.default_rng(seed).permutation(len(cluster)) for seed in range(3)]
    numbers = np.stack([cluster.numbers[order].astype(np.uint8) for order in orders])
    positions = np.stack([cluster.positions[order] for order in orders])
    assert formulas_of_parts(numbers, positions) == [{"CH4", "H2O"}] * 3
    assert formulas_of_parts(water.numbers[None, :1].astype(np.uint8), water.positions[None, :1]) == [set()]


def test_molecules_in_close_contact():
    """Two oxygen atoms 1.7 Angstrom apart look bonded at 1.3 times their radii; stretched bonds do not make molecules of their own."""
    water, other = molecule("H2O"), molecule("H2O")
    other.positions[:, 2] *= -1  # oxygen atoms face each other
    other.translate([0, 0, water.positions[0, 2] + 1.7 - other.positions[0, 2]])
    close = water + other
    assert close.get_distance(0, 3) == pytest.approx(1.7)
    assert formulas_of_parts(close.numbers[None].astype(np.uint8), close.positions[None]) == [{"H2O"}]
    ethane = molecule("C2H6")
    for stretched in ([2, 3], [2, 3, 4]):  # hydrogen atoms, 1.25 times their bonds
        x = ethane.positions.copy()
        x[stretched] = x[0] + 1.25 * (x[stretched] - x[0])
        assert formulas_of_parts(ethane.numbers[None].astype(np.uint8), x[None]) == [set()]
    x = ethane.positions + np.where(ethane.positions[:, 2:] > 0, 0.2, 0.0) * [0, 0, 1]  # C-C 1.73 Angstrom: two radicals
    assert formulas_of_parts(ethane.numbers[None].astype(np.uint8), x[None]) == [set()]


def test_frames_of_a_formula_are_looked_at_by_portions(files, tmp_path, monkeypatch):
    pairs = append(tmp_path / "pairs.xyz", *[pair_of("C2H6", "H2O")] * 5)
    dataset = prepare([files[0], pairs], tmp_path / "packed", test_data=[files[2]], validation=0.0)
    data = Frames(dataset.numbers, dataset.coordinates, dataset.offsets, dataset.formula_index)
    monkeypatch.setattr("training.data.molecules.FRAMES_AT_ONCE", 2)
    found = [(frames.tolist(), parts) for frames, parts in parts_by_formula(data, dataset.indices("train"))]
    assert max(len(frames) for frames, _ in found) == 2
    assert sorted(i for frames, _ in found for i in frames) == dataset.indices("train").tolist()
    alone = [parts for frames, of_frames in found for parts in of_frames if not parts]
    assert len({id(parts) for parts in alone}) == 1  # millions of empty sets would fill the memory
    assert dataset.frames_tested_on_parts() == 4


def test_molecules_that_are_trained_on_in_pairs(files, tmp_path):
    """The formula of the pair is not that of the test set; its halves are."""
    train, _, test = files
    append(train, pair_of("C2H6", "H2O"))
    options = ["prepare", str(train), "--test-data", str(test), "--validation", "0", "--output", str(tmp_path / "packed")]
    told = " ".join(CliRunner().invoke(app, options).output.split())
    assert "test: 4 of 4 frames are of molecules that are trained on in pairs or clusters" in told
    alone = prepare([files[0]], tmp_path / "alone", test_data=[files[1]], validation=0.0)
    assert alone.frames_tested_on_parts() == 2  # water, not ammonia


class TestMoleculesHeldOut:
    """`hold_out_molecules`: pairs have formulas of their own, their halves are held out all the same."""

    def test_no_split_has_a_molecule_of_a_later_one(self, tmp_path):
        alone = [molecule(name) for name in ("CH4", "CH3OH", "CO2", "C2H4")]
        train = append(tmp_path / "a.xyz", *alone, pair_of("CH4", "H2O"), pair_of("CH4", "C2H6"), pair_of("CH4", "CO2"))
        validation = append(tmp_path / "b.xyz", molecule("C2H6"), pair_of("CO2", "H2O"), pair_of("C2H6", "C2H6"))
        test = append(tmp_path / "c.xyz", molecule("H2O"))
        packed = prepare([train], tmp_path / "packed", validation_data=[validation], test_data=[test], hold_out_molecules=True)
        assert packed.metadata["split_frames"] == {"train": 5, "validation": 2, "test": 1}
        assert packed.metadata["left_out_frames"] == 3
        left_out = set(range(len(packed))) - {int(i) for split in ("train", "validation", "test") for i in packed.indices(split)}
        assert {packed.formula(i) for i in left_out} == {"CH6O", "C3H10", "CH2O3"}
        assert packed.frames_tested_on_parts() == 0

    def test_by_a_fraction(self, tmp_path):
        """By hash some formulas are held out, and then the pairs that hold them, wherever their own hash puts those."""
        names = ["CH4", "CH3OH", "CO2", "C2H4", "H2O", "NH3", "C2H6", "HCN"]
        data = append(tmp_path / "a.xyz", *map(molecule, names), *(pair_of(*pair) for pair in combinations(names, 2)))
        usual, strict = (prepare([data], tmp_path / f"{hold}", validation=0.0, test=0.3, hold_out_molecules=hold) for hold in (False, True))
        assert usual.frames_tested_on_parts() > 0
        assert strict.frames_tested_on_parts() == 0
        assert np.array_equal(strict.indices("test"), usual.indices("test"))
        assert set(strict.indices("train")) < set(usual.indices("train"))
        assert strict.metadata["left_out_frames"] == len(usual.indices("train")) - len(strict.indices("train"))

    def test_molecules_alone(self, files, tmp_path):
        """Files may hold out a molecule that others train on; then it is not."""
        train, validation, test = files
        packed = prepare([train], tmp_path / "packed", validation_data=[validation], test_data=[test], hold_out_molecules=True)
        tested = packed.formulas_of(packed.indices("test"))
        chosen = packed.formulas_of(packed.indices("validation"))
        assert not tested & chosen
        assert not (tested | chosen) & packed.formulas_of(packed.indices("train"))

    def test_the_command_tells_how_many(self, files, tmp_path):
        train, _, test = files
        append(train, pair_of("C2H6", "H2O"))
        options = ["prepare", str(train), "--test-data", str(test), "--validation", "0", "--output", str(tmp_path / "packed")]
        result = CliRunner().invoke(app, [*options, "--hold-out-molecules"])
        assert result.exit_code == 0, result.output
        told = " ".join(result.output.split())
        assert "train 12, validation 0, test 4, left out 1, which have a held-out molecule (train 1, validation 0)" in told
        assert "trained on in pairs" not in told

    def test_frames_that_are_left_out_hold_nothing_out(self, tmp_path):
        """Ethene with water gives way to the test split, and then ethanol, of the same formula, may be trained on."""
        train = append(tmp_path / "a.xyz", molecule("CH3CH2OH"), molecule("CH4"), seed=1)
        validation = append(tmp_path / "b.xyz", pair_of("C2H4", "H2O"), seed=2)
        test = append(tmp_path / "c.xyz", molecule("H2O"), seed=3)
        options = ["--validation-data", validation, "--test-data", test, "--output", tmp_path / "packed", "--hold-out-molecules"]
        result = CliRunner().invoke(app, ["prepare", str(train), *map(str, options)])
        assert result.exit_code == 0, result.output
        told = " ".join(result.output.split())
        assert "train 2, validation 0, test 1, left out 1, which have a held-out molecule (train 0, validation 1)" in told
        assert "the validation split is empty: every frame of its files has a molecule of the test split; give other files" in told

    def test_nothing_left_to_train_on(self, tmp_path):
        train = append(tmp_path / "a.xyz", pair_of("H2O", "CH4"), pair_of("H2O", "NH3"))
        test = append(tmp_path / "b.xyz", molecule("H2O"))
        with pytest.raises(DataError, match=r"leaves no frame to train on: .*; 2 frames hold such molecules; leave --hold-out-molecules out"):
            prepare([train], tmp_path / "packed", validation=0.0, test_data=[test], hold_out_molecules=True)
        assert not (tmp_path / "packed.partial").exists()

    def test_frame_by_frame_it_makes_no_sense(self, files, tmp_path):
        with pytest.raises(DataError, match="hold_out_molecules is for data split by formula"):
            prepare([files[0]], tmp_path / "packed", split_by="frame", hold_out_molecules=True)


def test_by_the_command(files, tmp_path):
    train, validation, test = files
    options = ["--validation-data", validation, "--test-data", test, "--output", tmp_path / "packed"]
    result = CliRunner().invoke(app, ["prepare", str(train), *map(str, options)])
    assert result.exit_code == 0, result.output
    told = " ".join(result.output.split())
    assert "train 12, validation 5, test 4" in told
    assert "validation: 2 of 5 frames are of formulas that are trained on, too" in told
    assert "test: " not in told


@pytest.mark.parametrize("split_by", ["formula", "frame"])
def test_a_frame_in_two_files_is_an_error(files, tmp_path, split_by):
    train, validation, _ = files
    write(validation, read(train, 3), format="extxyz", append=True)
    with pytest.raises(DataError, match="1 frames are in two splits, the first of them as train and as validation"):
        prepare([train], tmp_path / "packed", validation_data=[validation], split_by=split_by)
    assert not (tmp_path / "packed").exists()
    assert not (tmp_path / "packed.partial").exists()


def test_a_fraction_besides_is_an_error(files, tmp_path):
    train, validation, test = files
    with pytest.raises(DataError, match=r"test frames come from files or are a fraction \(0.1\) of the others, not both"):
        prepare([train], tmp_path / "packed", test=0.1, test_data=[test])
    with pytest.raises(DataError, match="validation frames come from files"):
        prepare([train], tmp_path / "packed", validation=0.1, validation_data=[validation])


def test_a_file_that_is_not_there(files, tmp_path):
    with pytest.raises(DataError, match=r"nothing\.xyz: no such file"):
        prepare([files[0]], tmp_path / "packed", test_data=[tmp_path / "nothing.xyz"])
    assert not (tmp_path / "packed.partial").exists()


def test_new_data_keep_off_their_formulas(files, tmp_path):
    train, validation, test = files
    prepare([train], tmp_path / "packed", validation_data=[validation], test_data=[test])
    held = HeldOut((str(tmp_path / "packed"),))
    assert [molecule(name) in held for name in ("C2H6", "NH3", "H2O", "CH4")] == [True, True, True, False]
