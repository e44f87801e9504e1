"""Data that come with a split: files of frames that choose a model, or test it."""

import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read, write
from typer.testing import CliRunner

from training.__main__ import app
from training.data.frames import DataError
from training.data.molecules import formulas_of_parts, frames_tested_on_parts
from training.data.packed import PackedDataset
from training.data.prepare import prepare
from training.label.hold_out import HeldOut


@pytest.fixture
def files(tmp_path):
    """Ten molecules' frames in three files: train, validation, test."""
    rng = np.random.default_rng(0)
    names = [("H2O", 6), ("CH4", 6)], [("NH3", 3), ("H2O", 2)], [("C2H6", 4)]
    paths = [tmp_path / f"{split}.xyz" for split in ("train", "validation", "test")]
    for path, molecules in zip(paths, names, strict=True):
        for name, n in molecules:
            for _ in range(n):
                atoms = molecule(name)
                atoms.positions += 0.05 * rng.normal(size=atoms.positions.shape)
                forces = rng.normal(size=atoms.positions.shape)
                atoms.calc = SinglePointCalculator(atoms, energy=-10.0 * len(atoms) + rng.normal(), forces=forces)
                write(path, atoms, format="extxyz", append=True)
    return paths


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


def test_molecules_that_are_trained_on_in_pairs(files, tmp_path):
    """The formula of the pair is not that of the test set; its halves are."""
    train, _, test = files
    ethane, water = molecule("C2H6"), molecule("H2O")
    water.translate([4.0, 0, 0])
    pair = ethane + water
    pair.calc = SinglePointCalculator(pair, energy=-110.0, forces=np.ones((len(pair), 3)))
    write(train, pair, format="extxyz", append=True)
    options = ["prepare", str(train), "--test-data", str(test), "--validation", "0", "--output", str(tmp_path / "packed")]
    told = " ".join(CliRunner().invoke(app, options).output.split())
    assert "test: 4 of 4 frames are of molecules that are trained on in pairs or clusters" in told
    alone = prepare([files[0]], tmp_path / "alone", test_data=[files[1]], validation=0.0)
    assert frames_tested_on_parts(alone) == 2  # water, not ammonia


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
