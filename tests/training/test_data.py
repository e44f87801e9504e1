"""Readers, the packed data set, self-energies, splits and batches: real input, and every kind of bad input."""

import contextlib
import json
import re
import shutil

import h5py
import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write
from ase.neighborlist import neighbor_list
from typer.testing import CliRunner

from benchmarks.clusters import NUMBERS
from tests.training.helpers import KEYS, SAMPLE, distorted_waters, sample_dataset
from training.__main__ import app
from training.data.batches import Collator, SizeSampler, padded_neighbors
from training.data.frames import DataError, ReadReport
from training.data.hdf5 import detect_layout, read_ani1, read_ani1x
from training.data.packed import PackedDataset
from training.data.packing import PackedWriter
from training.data.prepare import prepare
from training.data.self_energy import check_residual
from training.data.splits import split_frames, split_of
from training.files import replacing
from training.units import energy_factor


@pytest.fixture
def damaged(tmp_path):
    """A copy of the sample to damage: yields the path and an opener."""
    path = tmp_path / "data.h5"
    shutil.copy(SAMPLE, path)
    return path


def write_ani1(path, symbols=("C", "H", "H", "H", "H"), n=6):
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        group = file.create_group("gdb11_s01/gdb11_s01-0")
        group["species"] = np.array([s.encode() for s in symbols])
        group["coordinates"] = rng.normal(size=(n, len(symbols), 3)).astype(np.float32)
        group["energies"] = -40.5 + 0.01 * rng.normal(size=n)


class TestAni1x:
    def test_values_and_units(self):
        report = ReadReport()
        blocks = list(read_ani1x(SAMPLE, report, KEYS["energy_key"], KEYS["force_key"]))
        with h5py.File(SAMPLE) as file:
            group = file[next(iter(file))]
            np.testing.assert_allclose(blocks[0].energies, group[KEYS["energy_key"]][()] * units.Hartree, rtol=1e-14)
            np.testing.assert_allclose(blocks[0].forces, group[KEYS["force_key"]][()] * units.Hartree, rtol=1e-6)
            np.testing.assert_array_equal(blocks[0].coordinates, group["coordinates"][()])
        assert "surrogate of wB97X" in report.level_of_theory

    def test_nan_entries_are_skipped_and_counted(self, damaged):
        with h5py.File(damaged, "r+") as file:
            first, second = list(file)[:2]
            file[first][KEYS["energy_key"]][3] = np.nan
            file[second][KEYS["force_key"]][0, 1, 2] = np.nan
        report = ReadReport()
        n = sum(len(b.energies) for b in read_ani1x(damaged, report, **KEYS))
        assert report.skipped == {"energy or coordinates not finite": 1, "forces not finite": 1}
        with h5py.File(SAMPLE) as file:
            assert n == sum(len(file[k]["coordinates"]) for k in file) - 2

    def test_missing_key_names_those_there_are(self, damaged):
        with pytest.raises(DataError, match=r"no data set 'wb97x_dz.energy'; it holds .*ani1x_ensemble.energy"):
            list(read_ani1x(damaged, ReadReport(), energy_key="wb97x_dz.energy"))

    def test_the_other_label_is_of_the_same_level(self, damaged):
        with h5py.File(damaged, "r+") as file:
            for group in file.values():
                group["tz.energy"], group["tz.forces"] = group[KEYS["energy_key"]][()] - 1, 2 * group[KEYS["force_key"]][()]
                group["cc"] = group[KEYS["energy_key"]][()]
        both = [next(read_ani1x(damaged, ReadReport(), **keys)) for keys in ({"energy_key": "tz.energy"}, {"force_key": "tz.forces"}, KEYS)]
        for block in both[:2]:
            np.testing.assert_allclose(block.energies, both[2].energies - units.Hartree)
            np.testing.assert_allclose(block.forces, 2 * both[2].forces, rtol=1e-6)
        with pytest.raises(DataError, match="'cc' alone does not tell which forces belong to it; name both"):
            next(read_ani1x(damaged, ReadReport(), energy_key="cc"))
        assert next(read_ani1x(damaged, ReadReport(), energy_key="cc", force_key=None)).forces is None

    @pytest.mark.parametrize("number", [0, -1, 119, 300])
    def test_atomic_numbers_of_no_element(self, damaged, number):
        with h5py.File(damaged, "r+") as file:
            group = file[next(iter(file))]
            numbers = group["atomic_numbers"][()].astype(int)
            numbers[0] = number
            del group["atomic_numbers"]
            group["atomic_numbers"] = numbers
        with pytest.raises(DataError, match=rf"atomic_numbers holds \[{number}, .*from 1 to 118"):
            list(read_ani1x(damaged, ReadReport(), **KEYS))

    def test_coordinates_in_bohr(self, damaged):
        expected = next(read_ani1x(damaged, ReadReport(), **KEYS)).coordinates
        with h5py.File(damaged, "r+") as file:
            for group in file.values():
                group["coordinates"][()] /= units.Bohr
                group["coordinates"].attrs["units"] = "Bohr"
        np.testing.assert_allclose(next(read_ani1x(damaged, ReadReport(), **KEYS)).coordinates, expected, atol=1e-6)

    def test_wrong_shape(self, damaged):
        with h5py.File(damaged, "r+") as file:
            group = file[next(iter(file))]
            del group[KEYS["energy_key"]]
            group[KEYS["energy_key"]] = np.zeros(3)
        with pytest.raises(DataError, match=r"has shape \(3,\), expected"):
            list(read_ani1x(damaged, ReadReport(), **KEYS))

    def test_unit_mismatch(self, damaged):
        with pytest.raises(DataError, match="states its units as 'Hartree', but 'eV' was asked for"):
            list(read_ani1x(damaged, ReadReport(), energy_unit="eV", **KEYS))

    def test_cut_off_file(self, damaged):
        damaged.write_bytes(damaged.read_bytes()[: damaged.stat().st_size // 2])
        with pytest.raises(DataError, match=r"not a readable HDF5 file.*truncated"):
            list(read_ani1x(damaged, ReadReport(), **KEYS))

    def test_damage_in_the_middle(self, damaged):
        data = bytearray(damaged.read_bytes())
        middle = len(data) // 2
        data[middle : middle + 20_000] = b"\x55" * 20_000
        damaged.write_bytes(bytes(data))
        with pytest.raises(DataError, match=r"data\.h5"):
            list(read_ani1x(damaged, ReadReport(), **KEYS))

    def test_any_byte_may_be_damaged(self, damaged):
        """What h5py raises then is of many kinds; here it is one, and its message names the file."""
        whole, rng = damaged.read_bytes(), np.random.default_rng(0)
        refused = 0
        for _ in range(60):
            data = bytearray(whole)
            where = int(rng.integers(8, 20_000))
            data[where : where + 64] = rng.bytes(64)
            damaged.write_bytes(bytes(data))
            try:
                list(read_ani1x(damaged, ReadReport(), **KEYS))
            except DataError as error:
                refused += "data.h5" in str(error)
        assert refused > 10

    def test_foreign_file(self, tmp_path):
        with h5py.File(tmp_path / "other.h5", "w") as file:
            file["numbers"] = np.zeros(3)
        with pytest.raises(DataError, match="neither the ANI-1x layout"):
            detect_layout(tmp_path / "other.h5")


def test_the_ani1x_release_needs_no_option(tmp_path):
    """Its layout: many properties beside the labels, NaN where one was not computed, no ``units`` attributes."""
    with h5py.File(SAMPLE) as sample, h5py.File(tmp_path / "ani1x-release.h5", "w") as release:
        for name in sample:
            group = release.create_group(name)
            n = len(sample[name]["coordinates"])
            group["atomic_numbers"] = sample[name]["atomic_numbers"][()]
            group["coordinates"] = sample[name]["coordinates"][()]
            group["wb97x_dz.energy"] = sample[name][KEYS["energy_key"]][()]
            group["wb97x_dz.forces"] = sample[name][KEYS["force_key"]][()]
            group["wb97x_dz.dipole"] = np.zeros((n, 3))
            for unlabelled in ("ccsd(t)_cbs.energy", "wb97x_tz.energy"):
                group[unlabelled] = np.full(n, np.nan)
            group["wb97x_tz.forces"] = np.full(group["coordinates"].shape, np.nan)
        first, second = list(release)[:2]
        release[first]["wb97x_dz.energy"][2] = np.nan
        release[second]["wb97x_dz.forces"][5] = np.nan
    dataset = prepare([tmp_path / "ani1x-release.h5"], tmp_path / "packed")
    expected = sample_dataset(tmp_path / "expected")
    assert len(dataset) == len(expected) - 2
    assert dataset.metadata["skipped"] == {"energy or coordinates not finite": 1, "forces not finite": 1}
    assert dataset.metadata["statistics"]["total"]["mean"] == pytest.approx(expected.metadata["statistics"]["total"]["mean"], rel=1e-2)
    assert set(dataset.energies) < set(expected.energies)
    # A rare property can be asked for; where nothing has it, that is said.
    with pytest.raises(DataError, match="no usable frame"):
        prepare([tmp_path / "ani1x-release.h5"], tmp_path / "rare", energy_key="ccsd(t)_cbs.energy", energies_only=True)


def test_files_with_keys_of_their_own_are_packed_together(tmp_path):
    """One file names its labels in its attributes, in the other they are the only ones."""
    with h5py.File(SAMPLE) as sample, h5py.File(tmp_path / "named.h5", "w") as named:
        named.attrs["energy_key"], named.attrs["force_key"] = "mine.energy", "mine.forces"
        named.attrs["level_of_theory"] = "CCSD(T)/CBS"
        name = next(iter(sample))
        group = named.create_group(name)
        for source, target in (
            ("atomic_numbers",) * 2,
            ("coordinates",) * 2,
            (KEYS["energy_key"], "mine.energy"),
            (KEYS["force_key"], "mine.forces"),
        ):
            group[target] = sample[name][source][()]
        group["other.energy"] = group["mine.energy"][()] + 1.0
    with h5py.File(tmp_path / "named.h5") as named:
        n = len(named[name]["coordinates"])
    dataset = prepare([SAMPLE, tmp_path / "named.h5", tmp_path / "named.h5"], tmp_path / "packed")
    once = sample_dataset(tmp_path / "once")
    assert len(dataset) == len(once) + 2 * n  # named twice, it weighs twice
    assert dataset.metadata["sources"] == [SAMPLE.name, "named.h5 (2 times)"]
    assert dataset.metadata["level_of_theory"] == f"{once.metadata['level_of_theory']}; CCSD(T)/CBS"
    assert dataset.energies[-1] in once.energies
    # What goes on from a model keeps the references that its energies are relative to.
    further = prepare([tmp_path / "named.h5"], tmp_path / "further", self_energies=str(once.directory))
    assert further.metadata["self_energies"].items() <= once.metadata["self_energies"].items()


class TestAni1:
    def test_species_strings_and_no_forces(self, tmp_path):
        write_ani1(tmp_path / "ani1.h5")
        assert detect_layout(tmp_path / "ani1.h5") == "ani1"
        (block,) = read_ani1(tmp_path / "ani1.h5", ReadReport())
        assert block.formula == "CH4"
        assert block.atomic_numbers.tolist() == [6, 1, 1, 1, 1]
        assert block.forces is None
        dataset = prepare([tmp_path / "ani1.h5"], tmp_path / "packed")
        assert dataset.forces is None
        assert not dataset.metadata["with_forces"]

    @pytest.mark.parametrize("option", ["force_key", "force_unit"])
    def test_forces_cannot_be_asked_for(self, tmp_path, option):
        write_ani1(tmp_path / "ani1.h5")
        with pytest.raises(DataError, match="of the ANI-1 layout energies alone are read"):
            prepare([tmp_path / "ani1.h5"], tmp_path / "packed", **{option: "forces"})

    def test_coordinates_in_bohr(self, tmp_path):
        write_ani1(tmp_path / "ani1.h5")
        (angstrom,) = read_ani1(tmp_path / "ani1.h5", ReadReport())
        with h5py.File(tmp_path / "ani1.h5", "r+") as file:
            file["gdb11_s01/gdb11_s01-0/coordinates"].attrs["units"] = "bohr"
        (bohr,) = read_ani1(tmp_path / "ani1.h5", ReadReport())
        np.testing.assert_allclose(bohr.coordinates, angstrom.coordinates * units.Bohr, rtol=1e-6)

    def test_energies_of_another_name(self, tmp_path):
        write_ani1(tmp_path / "ani1.h5")
        with h5py.File(tmp_path / "ani1.h5", "r+") as file:
            file["gdb11_s01/gdb11_s01-0/ccsd"] = np.full(6, -41.0)
        dataset = prepare([tmp_path / "ani1.h5"], tmp_path / "packed", energy_key="ccsd", validation=0.0)
        np.testing.assert_allclose(dataset.energies, -41.0 * units.Hartree)
        with pytest.raises(DataError, match="no data set 'other'; it holds ccsd, coordinates, energies, species"):
            prepare([tmp_path / "ani1.h5"], tmp_path / "other", energy_key="other")

    def test_unknown_symbols(self, tmp_path):
        write_ani1(tmp_path / "ani1.h5", symbols=("C", "Xx"))
        with pytest.raises(DataError, match="Xx, which are no chemical symbols"):
            list(read_ani1(tmp_path / "ani1.h5", ReadReport()))

    def test_among_files_with_forces_it_is_refused(self, tmp_path):
        write_ani1(tmp_path / "ani1.h5")
        inputs = [SAMPLE, tmp_path / "ani1.h5"]
        with pytest.raises(DataError, match=r"ani1.h5 has no forces \(ANI-1 layout\), the other files do; .*--energies-only"):
            prepare(inputs, tmp_path / "packed")
        assert prepare(inputs, tmp_path / "packed", energies_only=True).forces is None


class TestExtxyz:
    @staticmethod
    def frames(n=4, forces=True):
        return distorted_waters(n, forces)

    def test_isolated_atoms_become_self_energies(self, tmp_path):
        lone = [Atoms("H", info={"energy": -13.5, "config_type": "IsolatedAtom"}), Atoms("O", info={"energy": -1970.0})]
        frames = self.frames()
        write(tmp_path / "x.xyz", [*lone, *frames], format="extxyz")
        dataset = prepare([tmp_path / "x.xyz"], tmp_path / "packed")
        assert dataset.metadata["self_energies"] == {"H": -13.5, "O": -1970.0}
        assert dataset.metadata["self_energies_origin"] == "isolated atoms"
        assert len(dataset) == 4
        np.testing.assert_allclose(dataset.forces[:3], frames[0].arrays["forces"], rtol=1e-5)

    def test_isolated_atoms_that_contradict_each_other(self, tmp_path):
        lone = [Atoms("H", info={"energy": e}) for e in (-13.5, -13.6)] + [Atoms("O", info={"energy": -1970.0})]
        write(tmp_path / "x.xyz", [*lone, *self.frames()], format="extxyz")
        with pytest.raises(DataError, match=r"x\.xyz, frame 1, gives H -13\.600000 eV, one before it -13\.500000 eV"):
            prepare([tmp_path / "x.xyz"], tmp_path / "packed")
        assert not (tmp_path / "packed.partial").exists()
        prepare([tmp_path / "x.xyz"], tmp_path / "packed", self_energies="least-squares")  # does not need them
        write(tmp_path / "y.xyz", [lone[0], lone[2], *self.frames()], format="extxyz")
        prepare([tmp_path / "y.xyz", tmp_path / "y.xyz"], tmp_path / "twice")

    def test_isolated_atoms_that_are_none(self, tmp_path):
        write(tmp_path / "solid.xyz", [Atoms("H", cell=[2, 2, 2], pbc=True, info={"energy": -13.5}), *self.frames()], format="extxyz")
        with pytest.raises(DataError, match="frame 0 is periodic"):
            prepare([tmp_path / "solid.xyz"], tmp_path / "packed")
        write(tmp_path / "nan.xyz", [Atoms("H", info={"energy": np.nan}), *self.frames()], format="extxyz")
        with pytest.raises(DataError, match="frame 0, an isolated H, has the energy nan"):
            prepare([tmp_path / "nan.xyz"], tmp_path / "packed")

    @pytest.mark.parametrize(
        ("info", "refused"),
        [
            ({"charge": 0, "spin": 1}, None),
            ({"total_charge": 0.0, "spin": 0, "spin_multiplicity": 1}, None),
            ({"charge": -1}, "charge=-1"),
            ({"total_charge": 1}, "total_charge=1"),
            ({"multiplicity": 3}, "multiplicity=3"),
            ({"spin_multiplicity": 2}, "spin_multiplicity=2"),
            ({"spin": 2}, "spin=2"),
        ],
    )
    def test_charged_and_open_shell_frames(self, tmp_path, info, refused):
        frames = self.frames(5)
        for frame in frames[2:4]:
            frame.info |= info
        lone = [Atoms("H", info={"energy": -13.5, "multiplicity": 2}), Atoms("O", info={"energy": -1970.0, "spin_multiplicity": 3})]
        write(tmp_path / "x.xyz", [*lone, *frames], format="extxyz")
        if refused is None:
            assert len(prepare([tmp_path / "x.xyz"], tmp_path / "packed")) == 5
        else:
            with pytest.raises(DataError, match=rf"x\.xyz: 2 of 7 frames are charged .*the first: frame 4 has {refused}; .*remove these frames"):
                prepare([tmp_path / "x.xyz"], tmp_path / "packed")
            assert not (tmp_path / "packed.partial").exists()

    @pytest.mark.parametrize("where", ["between", "at the end"])
    def test_empty_lines(self, tmp_path, where):
        """At one of them ASE ends without a word."""
        write(tmp_path / "x.xyz", self.frames(4), format="extxyz")
        text = (tmp_path / "x.xyz").read_text()
        (tmp_path / "x.xyz").write_text(text + "\n" + (text if where == "between" else "  \n"))
        if where == "at the end":
            assert len(prepare([tmp_path / "x.xyz"], tmp_path / "packed")) == 4
        else:
            with pytest.raises(DataError, match="after 4 frames there is an empty line, and more from line"):
                prepare([tmp_path / "x.xyz"], tmp_path / "packed")

    def test_forces_asked_for_but_absent(self, tmp_path):
        write(tmp_path / "x.xyz", self.frames(forces=False), format="extxyz")
        with pytest.raises(DataError, match=r"frame 0 has no forces 'forces'.*ask for energies alone"):
            prepare([tmp_path / "x.xyz"], tmp_path / "packed")
        assert not (tmp_path / "packed").exists()
        assert not (tmp_path / "packed.partial").exists()
        assert prepare([tmp_path / "x.xyz"], tmp_path / "packed", energies_only=True).forces is None

    def test_a_name_with_an_at_sign(self, tmp_path):
        write(tmp_path / "x.xyz", self.frames(4), format="extxyz")
        (tmp_path / "x.xyz").rename(tmp_path / "run@300K.xyz")
        assert len(prepare([tmp_path / "run@300K.xyz"], tmp_path / "packed")) == 4

    def test_the_frame_with_the_absurd_energy_is_named(self, tmp_path):
        frames = self.frames(8)
        frames[5].info["energy"] += 1000.0
        write(tmp_path / "x.xyz", frames, format="extxyz")
        with pytest.raises(DataError, match=r"Farthest from the median, in eV per atom, are frames 5 \(H2O\) by"):
            prepare([tmp_path / "x.xyz"], tmp_path / "packed", validation=0.0)

    def test_missing_energy_and_periodic_and_broken(self, tmp_path):
        (frame,) = self.frames(1)
        del frame.info["energy"]
        write(tmp_path / "a.xyz", frame, format="extxyz")
        with pytest.raises(DataError, match="frame 0 has no energy"):
            prepare([tmp_path / "a.xyz"], tmp_path / "packed")
        frame.info["energy"] = 1.0
        frame.set_cell([9, 9, 9])
        frame.pbc = True
        write(tmp_path / "b.xyz", frame, format="extxyz")
        with pytest.raises(DataError, match="frame 0 is periodic"):
            prepare([tmp_path / "b.xyz"], tmp_path / "packed")
        text = (tmp_path / "a.xyz").read_text()
        (tmp_path / "c.xyz").write_text(text[: len(text) // 2])
        with pytest.raises(DataError, match="cannot read frame 0"):
            prepare([tmp_path / "c.xyz"], tmp_path / "packed")

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("2\nProperties=species:S:1:pos:R:3:forces:R:3 energy={}\nH 0 0 0 0 0 0\nH 0 0 0.74 0 0 0\n", "cannot read frame 1 as extended XYZ"),
            ("0\nenergy={}\n", "frame 1 has no atoms; remove it"),
        ],
    )
    def test_the_number_is_that_of_the_bad_frame(self, tmp_path, text, message):
        write(tmp_path / "x.xyz", self.frames(1), format="extxyz")
        with open(tmp_path / "x.xyz", "a") as file:
            file.write(text.format("high"))
        with pytest.raises(DataError, match=message):
            prepare([tmp_path / "x.xyz"], tmp_path / "packed")


def _labelled(name, seed, shift):
    """A distorted molecule with made-up labels, its energy `shift` eV too high."""
    rng = np.random.default_rng(seed)
    atoms = molecule(name)
    atoms.rattle(0.02, rng=rng)
    energy = sum({1: -16.0, 6: -1036.0, 7: -1488.0, 8: -2046.0}[z] for z in atoms.numbers) + rng.normal() + shift
    atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=rng.normal(size=(len(atoms), 3)))
    return atoms


class TestPacked:
    def test_round_trip_statistics_and_splits(self, tmp_path):
        dataset = sample_dataset(tmp_path, validation=0.3, test=0.2)
        blocks = list(read_ani1x(SAMPLE, ReadReport(), **KEYS))
        assert len(dataset) == sum(len(b.energies) for b in blocks)
        energies = np.concatenate([b.energies for b in blocks])
        np.testing.assert_array_equal(dataset.energies, energies)
        assert dataset.energies.dtype == np.float64
        np.testing.assert_array_equal(dataset.coordinates, np.concatenate([b.coordinates.reshape(-1, 3) for b in blocks]))
        statistics = dataset.metadata["statistics"]
        assert statistics["total"]["mean"] == pytest.approx(energies.mean(), rel=1e-12)
        assert statistics["total"]["std"] == pytest.approx(energies.std(), rel=1e-6)
        assert statistics["residual"]["std"] < 1e-3 * statistics["total"]["std"]
        parts = [dataset.indices(s) for s in ("train", "validation", "test")]
        assert sorted(np.concatenate(parts).tolist()) == list(range(len(dataset)))
        formulas = [{dataset.formula(i) for i in part} for part in parts]
        assert not (formulas[0] & formulas[1])
        assert not (formulas[0] & formulas[2])
        assert not (formulas[1] & formulas[2])

    def test_a_formula_keeps_its_split_whatever_else_is_in_the_data(self):
        fractions = {"validation": 0.3, "test": 0.3}
        assert [split_of("C2H6O", fractions, 0) for _ in range(3)] == [split_of("C2H6O", fractions, 0)] * 3
        counts = [split_of(f"C{i}H{j}", fractions, 1) for i in range(40) for j in range(40)]
        assert counts.count("test") / len(counts) == pytest.approx(0.3, abs=0.05)

    def test_frames_of_one_molecule_are_split_one_by_one(self, tmp_path):
        dataset = sample_dataset(tmp_path / "a", validation=0.1, test=0.2, split_by="frame")
        n = len(dataset)
        splits = {split: set(dataset.indices(split).tolist()) for split in ("train", "validation", "test")}
        assert {k: len(v) for k, v in splits.items()} == dataset.metadata["split_frames"]
        assert (len(splits["validation"]), len(splits["test"])) == (round(0.1 * n), round(0.2 * n))
        assert set.union(*splits.values()) == set(range(n))
        assert sum(map(len, splits.values())) == n
        again = sample_dataset(tmp_path / "b", validation=0.1, test=0.2, split_by="frame", seed=1)
        assert set(again.indices("test").tolist()) != splits["test"]

    def test_copies_of_a_frame_share_their_split(self, tmp_path):
        once = sample_dataset(tmp_path / "once", validation=0.2, test=0.2, split_by="frame")
        thrice = prepare([SAMPLE] * 3, tmp_path / "thrice", validation=0.2, test=0.2, split_by="frame", **KEYS)
        n = len(once)
        np.testing.assert_array_equal(thrice.split.reshape(3, n), np.tile(once.split, (3, 1)))

    def test_copies_are_told_in_another_format_too(self, tmp_path):
        """ASE writes eight decimals, which are other numbers in single precision."""
        write(tmp_path / "x.xyz", TestExtxyz.frames(6), format="extxyz")
        text = (tmp_path / "x.xyz").read_text()
        last_digits = re.sub(r"(\.\d{7})\d", r"\g<1>9", text)
        assert last_digits != text
        (tmp_path / "again.xyz").write_text(last_digits)
        with pytest.raises(DataError, match="6 frames are in two splits"):
            prepare([tmp_path / "x.xyz"], tmp_path / "packed", validation=0.0, test_data=[tmp_path / "again.xyz"])

    def test_two_who_prepare_the_same(self, tmp_path):
        first = PackedWriter(tmp_path / "packed", with_forces=True)
        with pytest.raises(FileExistsError, match="another process prepares"):
            PackedWriter(tmp_path / "packed", with_forces=True)
        first.discard()
        (tmp_path / "packed.partial").mkdir()
        (tmp_path / "packed.partial" / "energies.bin").write_bytes(b"of one that was killed")
        assert sorted(p.name for p in sample_dataset(tmp_path).directory.iterdir()) == sorted(
            ["metadata.json", *(f"{name}.bin" for name in ("numbers", "coordinates", "forces", "energies", "offsets", "formula_index"))]
        )
        assert not (tmp_path / "packed.partial").exists()

    def test_a_lock_that_cannot_be_written_is_not_somebody_elses(self, tmp_path):
        (tmp_path / "packed.partial" / ".lock").mkdir(parents=True)
        with pytest.raises(IsADirectoryError, match=r"\.lock"):
            PackedWriter(tmp_path / "packed", with_forces=True)

    def test_every_split_of_a_few_frames_has_one(self):
        fractions = {"validation": 0.05, "test": 0.05}
        counts = {n: np.bincount(split_frames(np.arange(n), fractions, 0), minlength=3).tolist() for n in (1, 2, 3, 30, 200)}
        assert counts == {1: [1, 0, 0], 2: [1, 1, 0], 3: [1, 1, 1], 30: [26, 2, 2], 200: [180, 10, 10]}
        assert np.bincount(split_frames(np.arange(3), {"validation": 0.9, "test": 0.05}, 0), minlength=3).tolist() == [1, 1, 1]

    def test_data_packed_before_frames_were_told_apart_keep_their_split(self, tmp_path):
        dataset = sample_dataset(tmp_path, validation=0.1, test=0.2, split_by="frame", seed=3)
        metadata = {k: v for k, v in dataset.metadata.items() if k != "with_split_array"}
        (dataset.directory / "metadata.json").write_text(json.dumps(metadata))
        (dataset.directory / "split.bin").unlink()
        n = len(dataset)
        order = np.random.default_rng(3).permutation(n)
        test = round(0.2 * n)
        held = test + round(0.1 * n)
        former = PackedDataset(dataset.directory)
        np.testing.assert_array_equal(former.split, dataset.split)  # without copies it is the same draw
        for split, expected in (("test", order[:test]), ("validation", order[test:held]), ("train", order[held:])):
            np.testing.assert_array_equal(former.indices(split), np.sort(expected))

    def test_a_formula_alone_cannot_be_split(self, tmp_path):
        """By its hash it falls into one split or another."""
        (frame,) = TestExtxyz.frames(1)
        write(tmp_path / "x.xyz", [frame] * 4, format="extxyz")
        held, kept = (next(s for s in range(100) if (split_of("H2O", {"validation": 0.4}, s) == "train") == kept) for kept in (False, True))
        with pytest.raises(DataError, match=r"no frame to train on: of 1 formulas all are held out .*--split-by frame"):
            prepare([tmp_path / "x.xyz"], tmp_path / "packed", validation=0.4, seed=held)
        assert not (tmp_path / "packed.partial").exists()
        arguments = ["prepare", str(tmp_path / "x.xyz"), "-o", str(tmp_path / "packed"), "--validation", "0.4", "--seed", str(kept)]
        result = CliRunner().invoke(app, [*arguments, "--level-of-theory", "none"])
        assert "the validation split is empty, though 0.4 was asked for" in " ".join(result.output.split())
        assert "too few to tell the elements apart" in " ".join(result.output.split())
        assert PackedDataset(tmp_path / "packed").metadata["level_of_theory"] == "none"

    def test_least_squares_recovers_known_self_energies(self, tmp_path):
        known = {1: -16.0, 6: -1036.0, 8: -2046.0}
        rng = np.random.default_rng(0)
        with h5py.File(tmp_path / "x.h5", "w") as file:
            for name in ("H2O", "CH4", "CH3CH2OH", "CO2"):
                atoms = molecule(name)
                group = file.create_group(name)
                group["atomic_numbers"] = atoms.numbers.astype(np.uint8)
                group["coordinates"] = np.repeat(atoms.positions[None], 3, axis=0)
                group["e"] = np.full(3, sum(known[z] for z in atoms.numbers))
                group["f"] = rng.normal(size=(3, len(atoms), 3))
        options = {"energy_key": "e", "force_key": "f", "energy_unit": "eV", "force_unit": "eV/Angstrom"}
        dataset = prepare([tmp_path / "x.h5"], tmp_path / "packed", **options)
        assert dataset.metadata["self_energies"] == pytest.approx({"H": -16.0, "C": -1036.0, "O": -2046.0}, rel=1e-9)
        assert dataset.metadata["statistics"]["residual"]["std"] < 1e-6

    def test_what_is_held_out_plays_no_part_in_what_training_sees(self, tmp_path):
        """Neither in self-energies nor in the scales of energies and forces."""
        frames = [_labelled(name, seed, shift=0.0) for name in ("H2O", "CH4", "CH3OH", "CO2") for seed in range(3)]
        write(tmp_path / "train.xyz", frames, format="extxyz")
        found = []
        for shift in (0.0, 50.0):
            write(tmp_path / "test.xyz", [_labelled("CH3CH2OH", seed, shift) for seed in range(3)], format="extxyz")
            options = {"validation": 0.0, "test_data": [tmp_path / "test.xyz"]}
            found.append(prepare([tmp_path / "train.xyz"], tmp_path / f"packed-{shift}", **options).metadata)
        assert found[0]["self_energies"] == found[1]["self_energies"]
        for name in ("force_rms", "residual_per_sqrt_atom"):
            assert found[0]["statistics"][name] == found[1]["statistics"][name]
        assert found[0]["statistics"]["residual"] != found[1]["statistics"]["residual"]

    def test_an_element_of_held_out_frames_alone(self, tmp_path):
        write(tmp_path / "train.xyz", [_labelled("H2O", seed, 0.0) for seed in range(3)], format="extxyz")
        write(tmp_path / "test.xyz", [_labelled("NH3", seed, 0.0) for seed in range(3)], format="extxyz")
        dataset = prepare([tmp_path / "train.xyz"], tmp_path / "packed", validation=0.0, test_data=[tmp_path / "test.xyz"])
        assert sorted(dataset.metadata["self_energies"]) == ["H", "N", "O"]

    def test_absurd_forces_do_not_set_the_scale(self, tmp_path):
        frames = [_labelled("CH3OH", seed, 0.0) for seed in range(40)]
        write(tmp_path / "x.xyz", frames, format="extxyz")
        usual = prepare([tmp_path / "x.xyz"], tmp_path / "usual", validation=0.0).metadata["statistics"]
        frames[7].calc.results["forces"][2] = 3e4
        write(tmp_path / "x.xyz", frames, format="extxyz")
        result = CliRunner().invoke(app, ["prepare", str(tmp_path / "x.xyz"), "-o", str(tmp_path / "packed"), "--validation", "0"])
        assert "1 frames have forces 100 times as large as usual (the first: [7])" in " ".join(result.output.split())
        statistics = PackedDataset(tmp_path / "packed").metadata["statistics"]
        assert statistics["force_rms"] == pytest.approx(usual["force_rms"], rel=0.05)
        assert usual["strange_forces"] == 0

    def test_absurd_forces_of_frames_that_are_held_out_are_not_trained_on(self, tmp_path):
        frames = [_labelled("CH3OH", seed, 0.0) for seed in range(12)]
        write(tmp_path / "train.xyz", frames[:10], format="extxyz")
        frames[11].calc.results["forces"][2] = 3e4
        write(tmp_path / "test.xyz", frames[10:], format="extxyz")
        dataset = prepare([tmp_path / "train.xyz"], tmp_path / "packed", validation=0.0, test_data=[tmp_path / "test.xyz"])
        statistics = dataset.metadata["statistics"]
        assert (statistics["strange_forces"], statistics["first_strange_forces"]) == (0, [])

    def test_coordinates_in_nanometers(self, tmp_path):
        frames = [_labelled("CH3OH", seed, 0.0) for seed in range(3)]
        for atoms in frames:
            atoms.calc.atoms.positions /= 10
            atoms.positions /= 10
        write(tmp_path / "x.xyz", frames, format="extxyz")
        with pytest.raises(DataError, match=r"closest atoms of a frame are 0\.1\d* Angstrom apart .* are they in nm"):
            prepare([tmp_path / "x.xyz"], tmp_path / "packed")

    @pytest.mark.parametrize(("unit", "doubted"), [("Hartree", False), ("eV", True)])
    def test_doubtful_units_are_told(self, tmp_path, unit, doubted):
        with h5py.File(tmp_path / "x.h5", "w") as file:
            for name in ("H2O", "CH4", "CH3CH2OH", "CO2", "NH3", "N2", "CH3OH", "HCN"):
                atoms = molecule(name)
                group = file.create_group(name)
                group["atomic_numbers"] = atoms.numbers.astype(np.uint8)
                group["coordinates"] = atoms.positions[None]
                group["a.energy"] = [sum({1: -0.6, 6: -38.1, 7: -54.7, 8: -75.2}[z] for z in atoms.numbers)]
                group["a.forces"] = np.ones((1, len(atoms), 3))
        options = ["-o", str(tmp_path / "packed"), "--validation", "0", "--energy-unit", unit, "--force-unit", "eV/Angstrom"]
        output = " ".join(CliRunner().invoke(app, ["prepare", str(tmp_path / "x.h5"), *options]).output.split())
        assert f"read: energies in {unit}, forces in eV/Angstrom" in output
        assert ("is the energy unit right?" in output) == doubted

    def test_table_and_absurd_residual(self, tmp_path):
        table = {"unit": "Hartree", "H": -0.60095298, "C": -38.08316124, "N": -54.70775770, "O": -75.19446356}
        (tmp_path / "sae.json").write_text(json.dumps(table))
        dataset = prepare([SAMPLE], tmp_path / "packed", self_energies=str(tmp_path / "sae.json"), **KEYS)
        assert dataset.metadata["self_energies"]["C"] == pytest.approx(-38.08316124 * energy_factor("Hartree"))
        (tmp_path / "wrong.json").write_text(json.dumps({**table, "unit": "eV"}))
        with pytest.raises(DataError, match=r"eV per atom; expected.*the energy unit is wrong"):
            prepare([SAMPLE], tmp_path / "other", self_energies=str(tmp_path / "wrong.json"), **KEYS)
        assert not (tmp_path / "other").exists()

    def test_whether_the_elements_can_be_told_apart(self, tmp_path):
        assert sample_dataset(tmp_path / "a").metadata["self_energies_determined"]
        write(tmp_path / "x.xyz", TestExtxyz.frames(3), format="extxyz")
        fitted = prepare([tmp_path / "x.xyz"], tmp_path / "b").metadata
        assert not fitted["self_energies_determined"]
        (tmp_path / "sae.json").write_text(json.dumps({"unit": "eV", **fitted["self_energies"]}))
        assert prepare([tmp_path / "x.xyz"], tmp_path / "c", self_energies=str(tmp_path / "sae.json")).metadata["self_energies_determined"]

    def test_table_with_what_is_no_number(self, tmp_path):
        (tmp_path / "sae.json").write_text('{"unit": "eV", "H": -13.6, "C": NaN, "N": Infinity, "O": -2000.0}')
        with pytest.raises(DataError, match="self-energies of C, N are not finite"):
            prepare([SAMPLE], tmp_path / "packed", self_energies=str(tmp_path / "sae.json"), **KEYS)
        with pytest.raises(DataError, match="energies are nan"):
            check_residual(float("nan"), float("nan"), "table")

    def test_table_without_an_element(self, tmp_path):
        (tmp_path / "sae.json").write_text(json.dumps({"unit": "Hartree", "H": -0.6, "C": -38.0}))
        with pytest.raises(DataError, match="table lacks self-energies of N, O"):
            prepare([SAMPLE], tmp_path / "packed", self_energies=str(tmp_path / "sae.json"), **KEYS)

    def test_nothing_is_overwritten(self, tmp_path):
        sample_dataset(tmp_path)
        with pytest.raises(FileExistsError, match="exists already"):
            sample_dataset(tmp_path)

    def test_damaged_data_set_is_noticed(self, tmp_path):
        dataset = sample_dataset(tmp_path)
        path = dataset.directory / "energies.bin"
        path.write_bytes(path.read_bytes()[:-8])
        with pytest.raises(DataError, match="bytes, expected"):
            PackedDataset(dataset.directory)
        with pytest.raises(DataError, match="not a packed data set"):
            PackedDataset(tmp_path)

    @pytest.mark.parametrize(("changes", "message"), [({"validation": 0.7, "test": 0.4}, "fractions"), ({"layout": "csv"}, "layout must be one of")])
    def test_bad_options(self, tmp_path, changes, message):
        with pytest.raises(DataError, match=message):
            sample_dataset(tmp_path, **changes)


class TestBatches:
    def test_neighbors_against_ase(self):
        molecules = [molecule(n) for n in ("H2O", "CH3CH2OH", "C6H6")]
        positions = np.concatenate([m.positions for m in molecules])
        offsets = np.cumsum([0] + [len(m) for m in molecules])
        neighbors, mask = padded_neighbors(positions, offsets, 2.6)
        found = {(i, int(j)) for i in range(len(positions)) for j in neighbors[i][mask[i]]}
        expected = set()
        for m, start in zip(molecules, offsets[:-1], strict=True):
            expected |= {(int(i + start), int(j + start)) for i, j in zip(*neighbor_list("ij", m, 2.6), strict=True)}
        assert found == expected
        assert mask.any(0).all()  # no column is wasted

    def test_batch_energies_are_relative_and_forces_match(self, tmp_path):
        dataset = sample_dataset(tmp_path)
        frames = np.array([3, 20, 40])
        batch = Collator(dataset, NUMBERS, 4.0)(frames)
        table = dataset.self_energies()
        for k, frame in enumerate(frames):
            atoms = slice(dataset.offsets[frame], dataset.offsets[frame + 1])
            assert float(batch.energies[k]) == pytest.approx(dataset.energies[frame] - table[dataset.numbers[atoms]].sum(), abs=1e-9)
            np.testing.assert_array_equal(batch.forces[batch.molecule == k], dataset.forces[atoms])
        assert batch.energies.dtype == torch.float64

    def test_unknown_element_is_named(self, tmp_path):
        with pytest.raises(DataError, match=r"the data hold O, which the network does not know \(it knows H, C, N\): leave those molecules out"):
            Collator(sample_dataset(tmp_path), (1, 6, 7), 4.0)

    def test_every_frame_once_per_epoch_and_reproducible(self):
        rng = np.random.default_rng(0)
        frames, sizes = np.arange(5000), rng.integers(3, 30, size=5000)
        sampler = SizeSampler(frames, sizes, 16, 4000, seed=3)
        epoch = sampler.epoch(2)
        assert sorted(np.concatenate(epoch).tolist()) == frames.tolist()
        assert max(len(b) for b in epoch) <= 16
        assert max((sizes[b] * np.minimum(sizes[b] - 1, 50)).sum() for b in epoch) <= 4000
        assert all(np.array_equal(a, b) for a, b in zip(epoch, sampler.epoch(2), strict=True))
        assert not all(np.array_equal(a, b) for a, b in zip(epoch, sampler.epoch(3), strict=False))

    def test_batches_are_cut_as_one_by_one(self):
        """Against the plain loop that adds molecules until one is too many; but the last two batches share."""
        rng = np.random.default_rng(1)
        sizes = rng.integers(1, 80, size=700)
        sampler = SizeSampler(np.arange(700), sizes, 12, 5000, seed=0)
        expected, edges = [[]], 0
        for frame in np.argsort(sizes, kind="stable"):
            cost = sizes[frame] * min(sizes[frame] - 1, 50)
            if expected[-1] and (len(expected[-1]) == 12 or edges + cost > 5000):
                expected.append([])
                edges = 0
            expected[-1].append(frame)
            edges += cost
        found = [b.tolist() for b in sampler.epoch(0, shuffle=False)]
        assert found[:-2] == expected[:-2]
        assert np.concatenate(found).tolist() == np.concatenate(expected).tolist()
        assert len(found[-2]) >= len(found[-1]) >= len(expected[-1])

    @pytest.mark.parametrize(("n", "molecules", "edges"), [(101, 100, 10**6), (1010, 100, 10**6), (101, 100, 60_000)])
    def test_no_batch_is_much_smaller_than_the_others(self, n, molecules, edges):
        """All weigh the same in the training."""
        sizes = np.random.default_rng(0).integers(6, 26, size=n)
        batches = SizeSampler(np.arange(n), sizes, molecules, edges, seed=0).epoch(0)
        assert min(len(b) for b in batches) > 0.5 * max(len(b) for b in batches)
        assert max((sizes[b] * np.minimum(sizes[b] - 1, 50)).sum() for b in batches) <= edges

    def test_stream_continues_anywhere(self):
        sampler = SizeSampler(np.arange(50), np.full(50, 5), 8, 10_000, seed=0)
        whole = sampler.stream(0)
        expected = [next(whole) for _ in range(20)]
        late = sampler.stream(11)
        for batch in expected[11:]:
            np.testing.assert_array_equal(next(late), batch)


def test_a_file_that_fails_on_the_way_leaves_the_old_one(tmp_path):
    path = tmp_path / "log.csv"
    for text, fails in (("old", False), ("new", True), ("newest", False)):
        with contextlib.suppress(ZeroDivisionError), replacing(path) as partial:
            partial.write_text(text)
            assert not fails or 1 / 0
        assert path.read_text() == ("old" if fails else text)
        assert list(tmp_path.iterdir()) == [path]
