"""Whole simulations: every input format, all outputs, restart, refusals; through the library and the command line."""

import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import openmm
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from ase.io import read, write
from openmm import app, unit
from typer.testing import CliRunner

from openmm_se3.cli import _fail
from openmm_se3.cli import app as cli
from openmm_se3.errors import SimulationError, UnsupportedSystemError
from openmm_se3.installation import MEND
from openmm_se3.model_file import find_model
from openmm_se3.platforms import choose_platform, torch_threads
from openmm_se3.simulate import minimize, simulate, suitable_forces
from openmm_se3.simulation_files import (
    SimulationFiles,
    alone,
    extend,
    plot_log,
    read_log,
    restore,
    temperature_deviation,
    truncate_dcd,
    write_settings,
)
from openmm_se3.simulation_settings import SimulationSettings
from openmm_se3.structures import check_coordinates, read_structure, topology_of, unlikely_molecules
from tests.openmm_se3.helpers import EXAMPLES, MODEL, ROOT

SHORT = SimulationSettings(structure=str(EXAMPLES / "water.xyz"), model=MODEL, steps=40, report_every=10, platform="Reference")


def dcd_frames(path):
    """Number of frames by size, and that which the header states."""
    data = path.read_bytes()
    n_atoms = int.from_bytes(data[268:272], "little")
    return (len(data) - 276) / (3 * (4 * n_atoms + 8)), int.from_bytes(data[8:12], "little")


def dcd_frames_in_a_box(path):
    """Number of frames by size, of six atoms with a box."""
    return (len(path.read_bytes()) - 276) / (3 * (4 * 6 + 8) + 56)


@pytest.fixture(scope="module")
def structures(tmp_path_factory):
    """Ethanol in every format."""
    directory = tmp_path_factory.mktemp("structures")
    topology, positions = read_structure(EXAMPLES / "ethanol.sdf")
    with open(directory / "ethanol.pdb", "w") as file:
        app.PDBFile.writeFile(topology, positions * unit.nanometer, file)
    with open(directory / "ethanol.cif", "w") as file:
        app.PDBxFile.writeFile(topology, positions * unit.nanometer, file)
    write(directory / "ethanol.xyz", read(EXAMPLES / "ethanol.sdf"), format="xyz")
    (directory / "ethanol.sdf").write_text((EXAMPLES / "ethanol.sdf").read_text())
    return directory


@pytest.mark.parametrize("suffix", ["pdb", "cif", "sdf", "xyz"])
def test_formats(structures, suffix):
    topology, positions = read_structure(structures / f"ethanol.{suffix}")
    assert sorted(a.element.symbol for a in topology.atoms()) == ["C"] * 2 + ["H"] * 6 + ["O"]
    _, expected = read_structure(structures / "ethanol.sdf")
    np.testing.assert_allclose(positions, expected, atol=1.1e-4)


@pytest.mark.parametrize("name", ["conf@2.xyz", "POSCAR.xyz", "OUTCAR.sdf"])
def test_names_that_mean_something_to_ase(structures, tmp_path, name):
    path = tmp_path / name
    shutil.copy(structures / f"ethanol{path.suffix}", path)
    assert read_structure(path)[0].getNumAtoms() == 9


def test_hydrogen_is_a_molecule(tmp_path):
    write(tmp_path / "x.xyz", molecule("H2"))
    topology, positions = read_structure(tmp_path / "x.xyz")
    assert topology.getNumBonds() == 1
    assert unlikely_molecules(topology, positions) == []


def test_box_of_an_extended_xyz(tmp_path):
    atoms = read(EXAMPLES / "water.xyz")
    atoms.set_cell([[11.0, 0, 0], [2.0, 12.0, 0], [-3.0, 1.0, 13.0]])
    atoms.pbc = True
    write(tmp_path / "boxed.xyz", atoms, format="extxyz")
    topology, _ = read_structure(tmp_path / "boxed.xyz")
    np.testing.assert_allclose(topology.getPeriodicBoxVectors().value_in_unit(unit.nanometer), atoms.cell.array / 10, atol=1e-6)
    topology, _ = read_structure(tmp_path / "boxed.xyz", (2.0, 2.1, 2.2))
    np.testing.assert_allclose(topology.getPeriodicBoxVectors().value_in_unit(unit.nanometer), np.diag([2.0, 2.1, 2.2]), atol=1e-12)


class TestPDB:
    @pytest.mark.parametrize("name", ["CH3CH2OH", "C6H6", "CO2", "NH3"])
    def test_atoms_of_the_same_name_are_all_read(self, tmp_path, name):
        """ASE calls every carbon C."""
        atoms = molecule(name)
        write(tmp_path / "x.pdb", atoms)
        topology, positions = read_structure(tmp_path / "x.pdb")
        assert [a.element.symbol for a in topology.atoms()] == atoms.get_chemical_symbols()
        np.testing.assert_allclose(positions, atoms.positions / 10, atol=1e-4)

    def test_without_columns_for_the_element(self, tmp_path):
        lines = [f"HETATM{i + 1:5d} {s:<4} UNL     1    {2.0 * i:8.3f}{0:8.3f}{0:8.3f}  1.00  0.00\n" for i, s in enumerate([" C", " O", "CL", " C"])]
        (tmp_path / "x.pdb").write_text("".join(lines))
        topology, _ = read_structure(tmp_path / "x.pdb")
        assert [a.element.symbol for a in topology.atoms()] == ["C", "O", "Cl", "C"]

    @pytest.mark.parametrize("names", [("O", "H", "H"), ("O", "H1", "H1")])
    def test_names_that_are_unlike_all_others_stay(self, tmp_path, names):
        """OpenMM knows the bonds of water by them, here and in the copy that a run keeps."""
        water = molecule("H2O").positions
        lines = [
            f"HETATM{i + 1:5d}  {n:<3} HOH A   1    {x:8.3f}{y:8.3f}{z:8.3f}  1.00  0.00           {n[0]}\n"
            for i, (n, (x, y, z)) in enumerate(zip(names, water, strict=True))
        ]
        (tmp_path / "x.pdb").write_text("".join(lines) + "CONECT    1    2    3\nEND\n")
        topology, positions = read_structure(tmp_path / "x.pdb")
        assert [a.name for a in topology.atoms()] == ["O", "H1", "H2"]
        with open(tmp_path / "again.pdb", "w") as file:
            app.PDBFile.writeFile(topology, positions * unit.nanometer, file)
        assert topology.getNumBonds() == read_structure(tmp_path / "again.pdb")[0].getNumBonds() == 2

    def test_bonds_by_distance_where_hydrogens_have_none(self, structures, tmp_path):
        """A ligand without CONECT records beside water, as docking programs write it; bonds that are there stay as they are."""
        lines = (structures / "ethanol.pdb").read_text().splitlines(keepends=True)
        ligand = [line for line in lines if line.startswith("HETATM")]
        water = [
            f"HETATM{i + 10:5d}  {n:<3} HOH B   2    {10.0 + x:8.3f}{y:8.3f}{z:8.3f}  1.00  0.00           {n[0]}\n"
            for i, (n, (x, y, z)) in enumerate(zip(("O", "H1", "H2"), 3 * molecule("H2O").positions, strict=True))
        ]
        (tmp_path / "x.pdb").write_text("".join(ligand + water))
        topology, _ = read_structure(tmp_path / "x.pdb")
        expected, _ = read_structure(structures / "ethanol.sdf")
        bonds = {tuple(sorted((a.index, b.index))) for a, b in topology.bonds()}
        assert bonds == {tuple(sorted((a.index, b.index))) for a, b in expected.bonds()} | {(9, 10), (9, 11)}

    def test_names_that_differ_stay(self):
        topology, _ = read_structure(EXAMPLES / "alanine_dipeptide.pdb")
        original = app.PDBFile(str(EXAMPLES / "alanine_dipeptide.pdb")).topology
        assert [a.name for a in topology.atoms()] == [a.name for a in original.atoms()]
        assert topology.getNumBonds() == original.getNumBonds()

    def test_alternate_locations_are_not_atoms_of_their_own(self, tmp_path):
        line = "HETATM{:5d}  {:<3}{}WAT A   1    {:8.3f}{:8.3f}{:8.3f}  0.50  0.00           {}\n"
        atoms = [("O", " ", 0, 0, 0, "O"), ("H1", "A", 0.96, 0, 0, "H"), ("H1", "B", 0.9, 0.3, 0, "H"), ("H2", " ", -0.24, 0.93, 0, "H")]
        (tmp_path / "x.pdb").write_text("".join(line.format(i, *a) for i, a in enumerate(atoms)))
        assert read_structure(tmp_path / "x.pdb")[0].getNumAtoms() == 3
        (tmp_path / "x.pdb").write_text("".join(line.format(i, *a) for i, a in enumerate([*atoms, ("O", " ", 5, 5, 5, "O")])))
        with pytest.raises(UnsupportedSystemError, match="WAT A   1' has atoms of the same name, and alternate locations besides"):
            read_structure(tmp_path / "x.pdb")

    def test_a_meaningless_box_is_none(self, tmp_path):
        write(tmp_path / "x.pdb", molecule("H2O"))
        crystal = "CRYST1    1.000    1.000    1.000  90.00  90.00  90.00 P 1           1\n"
        (tmp_path / "x.pdb").write_text(crystal + (tmp_path / "x.pdb").read_text())
        assert read_structure(tmp_path / "x.pdb")[0].getPeriodicBoxVectors() is None
        (tmp_path / "x.pdb").write_text(crystal.replace(" 1.000", "25.000") + (tmp_path / "x.pdb").read_text().split("\n", 1)[1])
        assert read_structure(tmp_path / "x.pdb")[0].getPeriodicBoxVectors() is not None
        assert read_structure(tmp_path / "x.pdb", ())[0].getPeriodicBoxVectors() is None

    def test_more_than_a_thousand_atoms_come_back(self, tmp_path):
        """Names longer than four characters would be cut, and atoms of the same name lost."""
        water = molecule("H2O")
        for atoms in (
            sum((_moved(water, 4.0 * i) for i in range(1, 400)), water.copy()),
            Atoms("H1300", positions=[[0.7 * i, 0, 0] for i in range(1300)]),
        ):
            topology = topology_of(atoms)
            with open(tmp_path / "x.pdb", "w") as file:
                app.PDBFile.writeFile(topology, (atoms.positions % 900) * unit.angstrom, file, keepIds=True)
            again, _ = read_structure(tmp_path / "x.pdb")
            assert [a.element.symbol for a in again.atoms()] == atoms.get_chemical_symbols()
            assert again.getNumBonds() == topology.getNumBonds()


CO2 = """CRYST1   20.000   20.000   20.000  90.00  90.00  90.00 P 1           1
HETATM    1  O   HOH A   1       0.000   0.000   0.000  1.00  0.00           O
HETATM    2  H1  HOH A   1       0.960   0.000   0.000  1.00  0.00           H
HETATM    3  H2  HOH A   1      -0.240   0.930   0.000  1.00  0.00           H
HETATM    4  C   CO2 A   2       6.000   0.000   0.000  1.00  0.00           C
HETATM    5  O1  CO2 A   2       7.160   0.000   0.000  1.00  0.00           O
HETATM    6  O2  CO2 A   2       4.840   0.000   0.000  1.00  0.00           O
HETATM    7 NA   NA  A   3      -2.300   0.000   0.000  1.00  0.00          NA
HETATM    8  M   M   A   4       0.100   0.000   0.000  1.00  0.00
"""


def test_bonds_by_distance_without_hydrogens(tmp_path):
    """Carbon dioxide without CONECT records, beside water whose bonds OpenMM knows, and an ion and a site that are near enough to it for bonds."""
    (tmp_path / "x.pdb").write_text(CO2)
    topology, _ = read_structure(tmp_path / "x.pdb")
    assert {frozenset((a.index, b.index)) for a, b in topology.bonds()} == {frozenset(pair) for pair in ((0, 1), (0, 2), (3, 4), (3, 5))}


CIF = """data_x
_cell.entry_id x
_cell.length_a ?
_cell.length_b ?
_cell.length_c ?
_cell.angle_alpha ?
_cell.angle_beta ?
_cell.angle_gamma ?
loop_
_atom_site.group_PDB
_atom_site.id
_atom_site.type_symbol
_atom_site.label_atom_id
_atom_site.label_alt_id
_atom_site.label_comp_id
_atom_site.label_asym_id
_atom_site.label_seq_id
_atom_site.Cartn_x
_atom_site.Cartn_y
_atom_site.Cartn_z
_atom_site.pdbx_PDB_model_num
HETATM 1 O O . HOH A 1 0 0 0 1
HETATM 2 H H1 . HOH A 1 .96 0 0 1
HETATM 3 H H2 . HOH A 1 -.24 .93 0 1
"""


def test_a_cell_that_is_not_known_is_none(tmp_path):
    (tmp_path / "x.cif").write_text(CIF)
    assert read_structure(tmp_path / "x.cif")[0].getPeriodicBoxVectors() is None
    (tmp_path / "x.cif").write_text(
        CIF.replace("length_a ?", "length_a 20").replace("length_b ?", "length_b 20").replace("length_c ?", "length_c 20").replace(" ?", " 90")
    )
    assert read_structure(tmp_path / "x.cif")[0].getPeriodicBoxVectors() is not None


@pytest.mark.parametrize("suffix", ["pdb", "cif", "sdf", "xyz"])
def test_the_first_of_several_structures_is_taken_with_a_notice(structures, tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    if suffix == "pdb":
        path.write_text("".join(f"MODEL        {k}\n{CO2}ENDMDL\n" for k in (1, 2)))
    elif suffix == "cif":
        path.write_text(CIF + "".join(line[:-1] + "2\n" for line in CIF.splitlines(keepends=True) if line.startswith("HETATM")))
    else:
        path.write_text(2 * (structures / f"ethanol.{suffix}").read_text())
    with pytest.warns(UserWarning, match=rf"x.{suffix} holds 2 structures; the first is taken"):
        topology, _ = read_structure(path)
    assert topology.getNumAtoms() == {"pdb": 8, "cif": 3}.get(suffix, 9)


class TestChargesThatAFileStates:
    WATER = "O 0 0 0\nH .96 0 0\nH -.24 .93 0\n"

    @pytest.mark.parametrize(
        ("comment", "message"), [("charge=-1", "charge -1 was asked for"), ("charge=0 multiplicity=3", "multiplicity 3 was asked for")]
    )
    def test_extended_xyz(self, tmp_path, comment, message):
        (tmp_path / "x.xyz").write_text(f"3\n{comment}\n{self.WATER}")
        with pytest.raises(UnsupportedSystemError, match=rf"x.xyz: {message}, but the model was trained on neutral closed shells alone"):
            read_structure(tmp_path / "x.xyz")

    @pytest.mark.parametrize("comment", ["charge=0 multiplicity=1", "water, without charge", ""])
    def test_xyz_of_neutral_ones(self, tmp_path, comment):
        (tmp_path / "x.xyz").write_text(f"3\n{comment}\n{self.WATER}")
        assert read_structure(tmp_path / "x.xyz")[0].getNumAtoms() == 3

    def test_codes_in_the_lines_of_atoms(self, structures, tmp_path):
        """As older files have them; where there are lines ``M  CHG`` or ``M  RAD``, these alone count."""
        text, end = (structures / "ethanol.sdf").read_text(), "M  END"
        lines = text.splitlines(keepends=True)
        for k, code in ((4, 5), (5, 6)):
            lines[k] = f"{lines[k][:36]}{code:3d}{lines[k][39:]}"
        coded = "".join(lines)
        path = tmp_path / "x.sdf"
        path.write_text(coded)
        with pytest.raises(UnsupportedSystemError, match="charge -3 was asked for"):
            read_structure(path)
        path.write_text(coded.replace(end, f"M  CHG  2   1   1   3  -1\n{end}"))
        assert read_structure(path)[0].getNumAtoms() == 9

    @pytest.mark.parametrize("suffix", ["sdf", "mol"])
    def test_formal_charges(self, structures, tmp_path, suffix):
        """Those of a nitro group, for example, sum to zero; other molecules of a file do not count."""
        text, end = (structures / "ethanol.sdf").read_text(), "M  END"
        path = tmp_path / f"x.{suffix}"
        path.write_text(text.replace(end, f"M  CHG  2   1   1   3  -1\n{end}") + text.replace(end, f"M  CHG  1   1   1\n{end}"))
        with pytest.warns(UserWarning, match="2 structures"):
            read_structure(path)
        path.write_text(text.replace(end, f"M  CHG  2   1   1   2   1\n{end}"))
        with pytest.raises(UnsupportedSystemError, match="charge 2 was asked for"):
            read_structure(path)

    @pytest.mark.parametrize("suffix", ["pdb", "cif"])
    def test_formal_charges_of_other_files(self, structures, tmp_path, suffix):
        topology, positions = read_structure(structures / "ethanol.pdb")
        atoms, path = list(topology.atoms()), tmp_path / f"x.{suffix}"

        def write_charges(*charges):
            for atom, charge in zip(atoms, charges, strict=False):
                atom.formalCharge = charge
            with open(path, "w") as file:
                (app.PDBFile if suffix == "pdb" else app.PDBxFile).writeFile(topology, positions * unit.nanometer, file)
            if suffix == "cif":  # OpenMM writes none into these
                lines = path.read_text().splitlines(keepends=True)
                rows = [k for k, line in enumerate(lines) if line.startswith(("ATOM", "HETATM"))]
                for k, charge in zip(rows, charges, strict=False):
                    words = lines[k].split()
                    words[-6] = str(charge)
                    lines[k] = " ".join(words) + "\n"
                path.write_text("".join(lines))

        write_charges(1, -1)
        assert read_structure(path)[0].getNumAtoms() == 9
        write_charges(1, 1)
        with pytest.raises(UnsupportedSystemError, match="charge 2 was asked for"):
            read_structure(path)

    def test_radicals(self, structures, tmp_path):
        text, end = (structures / "ethanol.sdf").read_text(), "M  END"
        path = tmp_path / "x.sdf"
        path.write_text(text.replace(end, f"M  RAD  1   1   3\n{end}"))
        with pytest.raises(UnsupportedSystemError, match="multiplicity 3 was asked for"):
            read_structure(path)


def test_bonds_of_an_sdf_file_are_kept(structures, tmp_path):
    """However long they are; by distance only where the file has none."""
    lines = (structures / "ethanol.sdf").read_text().splitlines(keepends=True)
    expected = [(b[0].index, b[1].index) for b in read_structure(structures / "ethanol.sdf")[0].bonds()]
    x, y, z = (float(lines[12][k : k + 10]) for k in (0, 10, 20))
    lines[12] = f"{x + 1.0:10.4f}{y + 1.0:10.4f}{z:10.4f}" + lines[12][30:]
    path = tmp_path / "x.sdf"
    path.write_text("".join(lines))
    assert [(b[0].index, b[1].index) for b in read_structure(path)[0].bonds()] == expected
    lines[3] = lines[3][:3] + "  0" + lines[3][6:]
    path.write_text("".join(lines[:13] + lines[13 + len(expected) :]))
    assert len(list(read_structure(path)[0].bonds())) == len(expected) - 1


def test_byte_order_mark(structures, tmp_path):
    (tmp_path / "x.xyz").write_text((structures / "ethanol.xyz").read_text(), encoding="utf-8-sig")
    assert read_structure(tmp_path / "x.xyz")[0].getNumAtoms() == 9


def _moved(atoms, by):
    copied = atoms.copy()
    copied.translate([by, 0, 0])
    return copied


def test_residues_are_molecules_where_their_atoms_are_together():
    water = molecule("H2O")
    two = water + _moved(water, 5.0)
    assert [r.name for r in topology_of(two).residues()] == ["MOL", "MOL"]
    assert [a.name for a in topology_of(two).atoms()] == ["O1", "H1", "H2"] * 2
    mixed = two[[0, 3, 1, 2, 4, 5]]
    topology = topology_of(mixed)
    assert topology.getNumResidues() == 1
    assert [a.element.symbol for a in topology.atoms()] == mixed.get_chemical_symbols()
    assert topology.getNumBonds() == 4


def test_outputs(tmp_path):
    simulate(SHORT, tmp_path / "md")
    names = {p.name for p in (tmp_path / "md").iterdir()}
    assert names == {
        "trajectory.dcd",
        "log.csv",
        "topology.pdb",
        "final.pdb",
        "checkpoint.chk",
        "state.xml",
        "settings.json",
        "energy_temperature.png",
        ".lock",
    }
    assert b"\r" not in (tmp_path / "md" / "log.csv").read_bytes()
    log = read_log(tmp_path / "md" / "log.csv")
    assert log["step"].tolist() == [10, 20, 30, 40]
    np.testing.assert_allclose(log["time_ps"], 0.0005 * log["step"], rtol=1e-6)
    np.testing.assert_allclose(log["total_kj_per_mol"], log["potential_kj_per_mol"] + log["kinetic_kj_per_mol"], rtol=1e-6)
    assert dcd_frames(tmp_path / "md" / "trajectory.dcd") == (4, 4)
    final = app.PDBFile(str(tmp_path / "md" / "final.pdb")).getPositions(asNumpy=True)
    assert np.isfinite(final._value).all()
    with pytest.raises(FileExistsError, match="not empty"):
        simulate(SHORT, tmp_path / "md")


@pytest.mark.parametrize("cut", ["30,0.0", "30,0.015,1.0,1.0,2.0,", "30,0.015,1.0,1.0,2.0,30"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])  # older logs mix them
def test_log_whose_last_line_is_cut(tmp_path, cut, end):
    log = tmp_path / "log.csv"
    header = "step,time_ps,potential_kj_per_mol,kinetic_kj_per_mol,total_kj_per_mol,temperature_k\n"
    log.write_text(header + f"10,0.005,1.0,1.0,2.0,300.0{end}20,0.01,1.0,1.0,2.0,310.0{end}{cut}", newline="")
    assert read_log(log)["temperature_k"].tolist() == [300.0, 310.0]
    plot_log(log, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").exists()


class TestPicture:
    """It hides no error, and is none."""

    def test_of_a_run_whose_disk_is_full(self, tmp_path, monkeypatch):
        def write(self):
            with open(self.directory / "log.csv", "a") as file:
                file.write("10,0.0")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(SimulationFiles, "write", write)
        with pytest.raises(OSError, match="No space left on device"):
            simulate(replace(SHORT, minimize=False), tmp_path / "md")

    def test_that_cannot_be_drawn(self, tmp_path):
        (tmp_path / "log.csv").write_text("step,time_ps\n10,0.005\n")
        with pytest.warns(UserWarning, match=r"picture\.png could not be drawn \(KeyError: 'potential_kj_per_mol'\)"):
            plot_log(tmp_path / "log.csv", tmp_path / "picture.png")


def test_a_run_that_another_process_has_begun_meanwhile_is_kept(tmp_path, monkeypatch):
    """Between the first look at the directory and its lock."""
    settings = tmp_path / "md" / "settings.json"

    def check(topology, positions):
        settings.parent.mkdir()
        settings.write_text("of another run")

    monkeypatch.setattr("openmm_se3.simulate.check_coordinates", check)
    with pytest.raises(FileExistsError, match="md is not empty"):
        simulate(SHORT, tmp_path / "md")
    assert settings.read_text() == "of another run"


def test_what_a_kill_left_without_its_name_is_no_run(tmp_path):
    (tmp_path / "md").mkdir()
    (tmp_path / "md" / "partial-settings.json").write_text("{")
    simulate(replace(SHORT, steps=1, minimize=False), tmp_path / "md")


def test_steps_and_model_are_for_runs_that_are_resumed(tmp_path):
    for arguments in ({"settings": None}, {"settings": SHORT, "steps": 50}, {"settings": SHORT, "model": MODEL}):
        with pytest.raises(ValueError, match="a new run needs settings, which tell its steps and its model"):
            simulate(output=tmp_path / "md", **arguments)
    assert not (tmp_path / "md").exists()


class TestGPUThatTorchDoesNotSee:
    @pytest.fixture(autouse=True)
    def blind(self, monkeypatch):
        monkeypatch.setattr("openmm_se3.platforms.platform_names", lambda: ["Reference", "CPU", "CUDA"])
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def test_is_not_taken_by_itself(self):
        assert choose_platform("auto").getName() == "Reference"

    def test_minimisation_does_without(self, monkeypatch):
        monkeypatch.setattr("openmm_se3.simulate.choose_platform", lambda name: SimpleNamespace(getName=lambda: "CUDA"))
        topology, positions = read_structure(EXAMPLES / "water.xyz")
        assert np.isfinite(minimize(topology, positions, replace(SHORT, forces="direct", platform="CUDA"))).all()


def test_threads_of_torch(monkeypatch):
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        with torch_threads(9):
            assert torch.get_num_threads() == 1
        with torch_threads(648):
            assert torch.get_num_threads() == 3
        monkeypatch.setenv("OMP_NUM_THREADS", "3")
        with torch_threads(9):
            assert torch.get_num_threads() == 3
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_minimisation_lowers_the_energy(tmp_path):
    at_rest = replace(SHORT, structure=str(EXAMPLES / "ethanol.sdf"), forces="conservative", temperature=0.0, ensemble="nve", steps=1, report_every=1)
    simulate(at_rest, tmp_path / "minimised")
    simulate(replace(at_rest, minimize=False), tmp_path / "not")
    energies = [read_log(tmp_path / d / "log.csv")["potential_kj_per_mol"][0] for d in ("minimised", "not")]
    assert energies[0] < energies[1]


class TestResume:
    def test_interrupted_equals_uninterrupted(self, tmp_path):
        simulate(SHORT, tmp_path / "whole")
        simulate(replace(SHORT, steps=20), tmp_path / "parts")
        settings = json.loads((tmp_path / "parts" / "settings.json").read_text())
        (tmp_path / "parts" / "settings.json").write_text(json.dumps({**settings, "steps": 40}))
        # What a kill between a frame and its checkpoint leaves behind: a frame and half a line too many.
        with open(tmp_path / "parts" / "trajectory.dcd", "ab") as file:
            file.write(b"\0" * 70)
        with open(tmp_path / "parts" / "log.csv", "a") as file:
            file.write("30,0.0")
        simulate(None, tmp_path / "parts", resume=True)
        assert (tmp_path / "parts" / "log.csv").read_text() == (tmp_path / "whole" / "log.csv").read_text()
        assert (tmp_path / "parts" / "trajectory.dcd").read_bytes()[276:] == (tmp_path / "whole" / "trajectory.dcd").read_bytes()[276:]
        assert dcd_frames(tmp_path / "parts" / "trajectory.dcd") == (4, 4)

    def test_from_the_portable_state_where_the_checkpoint_is_foreign(self, tmp_path):
        simulate(replace(SHORT, steps=20), tmp_path / "md")
        settings = json.loads((tmp_path / "md" / "settings.json").read_text())
        (tmp_path / "md" / "settings.json").write_text(json.dumps({**settings, "steps": 40}))
        (tmp_path / "md" / "checkpoint.chk").write_bytes(b"of another machine")
        with pytest.warns(UserWarning, match="checkpoint.chk is of another machine, platform or version, so the run goes on from state.xml"):
            simulate(None, tmp_path / "md", resume=True)
        assert read_log(tmp_path / "md" / "log.csv")["step"].tolist() == [10, 20, 30, 40]

    def test_from_the_portable_state_where_there_is_no_checkpoint(self, tmp_path):
        simulate(replace(SHORT, steps=20), tmp_path / "md")
        extend(tmp_path / "md", 40)
        (tmp_path / "md" / "checkpoint.chk").unlink()
        with pytest.warns(UserWarning, match="checkpoint.chk is missing, so the run goes on from state.xml"):
            simulate(None, tmp_path / "md", resume=True)
        assert read_log(tmp_path / "md" / "log.csv")["step"].tolist() == [10, 20, 30, 40]
        assert dcd_frames(tmp_path / "md" / "trajectory.dcd") == (4, 4)

    def test_while_another_process_runs_there(self, tmp_path):
        simulate(replace(SHORT, steps=20), tmp_path / "md")
        extend(tmp_path / "md", 40)
        before = (tmp_path / "md" / "log.csv").read_bytes()
        with alone(tmp_path / "md"), pytest.raises(SimulationError, match=r"another process runs in .*md; wait for its end"):
            simulate(None, tmp_path / "md", resume=True)
        assert (tmp_path / "md" / "log.csv").read_bytes() == before
        simulate(None, tmp_path / "md", resume=True)

    @pytest.mark.filterwarnings("ignore:.*is of another machine")
    def test_random_numbers_from_the_portable_state(self, tmp_path):
        """Not those of the first steps again, of thermostat or barostat, but the same whenever the run goes on from there."""

        def begun():
            topology, system, periodic = topology_of(molecule("H2O")), openmm.System(), openmm.HarmonicBondForce()
            periodic.setUsesPeriodicBoundaryConditions(True)
            system.addForce(periodic)
            for mass in (16.0, 1.0, 1.0):
                system.addParticle(mass)
            barostat = openmm.MonteCarloBarostat(1.0, 300.0, 0)
            barostat.setRandomNumberSeed(7)
            system.addForce(barostat)
            integrator = openmm.LangevinMiddleIntegrator(300.0, 1e5, 0.001)  # whose velocities are all noise
            integrator.setRandomNumberSeed(7)
            simulation = app.Simulation(topology, system, integrator, openmm.Platform.getPlatformByName("Reference"))
            simulation.context.setPositions(np.zeros((3, 3)))
            return simulation, barostat

        def step(simulation):
            simulation.step(1)
            return simulation.context.getState(positions=True, velocities=True)

        (tmp_path / "checkpoint.chk").write_bytes(b"of another machine")
        state, seeds = step(begun()[0]), [7]
        noise = [state.getVelocities(asNumpy=True)._value]
        for k in (1, 2):
            (tmp_path / "state.xml").write_text(openmm.XmlSerializer.serialize(state))
            again = []
            for _ in range(2):
                simulation, barostat = begun()
                assert restore(simulation, tmp_path, 7) == k
                state = step(simulation)
                again.append(state.getVelocities(asNumpy=True)._value)
            np.testing.assert_array_equal(*again)
            noise.append(again[0])
            seeds.append(barostat.getRandomNumberSeed())
        assert len(set(seeds)) == 3
        for a, b in ((0, 1), (0, 2), (1, 2)):
            assert np.abs(noise[a] - noise[b]).max() > 0.1

    def test_with_another_model(self, tmp_path):
        simulate(replace(SHORT, steps=10, minimize=False), tmp_path / "md")
        extend(tmp_path / "md", 20)
        file = tmp_path / "md" / "settings.json"
        kept = json.loads(file.read_text())
        file.write_text(json.dumps({**kept, "weights_sha256": "0" * 64}))
        with pytest.raises(
            SimulationError, match=rf"began with other weights \(SHA-256 000000000000\) than {MODEL} has now \({kept['weights_sha256'][:12]}\)"
        ):
            simulate(None, tmp_path / "md", resume=True)
        # A run from before the hash was kept.
        file.write_text(json.dumps({name: value for name, value in kept.items() if name != "weights_sha256"}))
        simulate(None, tmp_path / "md", resume=True)
        extend(tmp_path / "md", 30)
        assert "weights_sha256" not in json.loads(file.read_text())

    def test_sigkill(self, tmp_path):
        command = [sys.executable, "-m", "openmm_se3.cli", "simulate"]
        options = ["--steps", "3000", "--report-every", "10", "--platform", "Reference", "--model", MODEL, "-o", str(tmp_path / "md")]
        process = subprocess.Popen([*command, str(EXAMPLES / "water.xyz"), *options], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        log = tmp_path / "md" / "log.csv"
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None and not (log.exists() and len(log.read_text().splitlines()) > 5):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        settings = json.loads((tmp_path / "md" / "settings.json").read_text())
        before = len(log.read_text().splitlines())
        assert before < 300, "the run ended before it was killed"
        (tmp_path / "md" / "settings.json").write_text(json.dumps({**settings, "steps": (before + 5) * 10}))
        resumed = subprocess.run([*command, "--resume", "-o", str(tmp_path / "md")], cwd=ROOT, capture_output=True)
        assert resumed.returncode == 0, resumed.stderr.decode()
        steps = read_log(log)["step"]
        np.testing.assert_array_equal(steps, 10 * np.arange(1, before + 6))
        assert dcd_frames(tmp_path / "md" / "trajectory.dcd") == (before + 5, before + 5)

    def test_killed_before_the_first_checkpoint_begins_anew(self, tmp_path):
        simulate(SHORT, tmp_path / "whole")
        simulate(SHORT, tmp_path / "md")
        for file in (tmp_path / "md").iterdir():
            if file.name not in ("settings.json", "log.csv", "trajectory.dcd"):
                file.unlink()
        log = tmp_path / "md" / "log.csv"
        with pytest.raises(SimulationError, match=r"has a log of steps but neither checkpoint\.chk nor state.xml"):
            simulate(None, tmp_path / "md", resume=True)
        log.write_text("".join(log.read_text().splitlines(keepends=True)[:2]))  # with one line it may have been killed between the two
        simulate(None, tmp_path / "md", resume=True)
        for name, header in (("log.csv", 0), ("trajectory.dcd", 276)):  # with the date in it
            assert (tmp_path / "md" / name).read_bytes()[header:] == (tmp_path / "whole" / name).read_bytes()[header:]

    def test_to_more_steps(self, tmp_path):
        simulate(replace(SHORT, steps=60), tmp_path / "whole")
        simulate(replace(SHORT, steps=25), tmp_path / "md")
        with pytest.raises(SimulationError, match="is of 25 steps; --steps 20 would end it before"):
            extend(tmp_path / "md", 20)
        extend(tmp_path / "md", 60)
        simulate(None, tmp_path / "md", resume=True)
        log = read_log(tmp_path / "md" / "log.csv")
        assert log["step"].tolist() == [10, 20, 25, 30, 40, 50, 60]
        assert dcd_frames(tmp_path / "md" / "trajectory.dcd") == (7, 7)
        expected = read_log(tmp_path / "whole" / "log.csv")
        kept = np.isin(log["step"], expected["step"])
        assert log["potential_kj_per_mol"][kept] == pytest.approx(expected["potential_kj_per_mol"], abs=1e-5)

    def test_to_more_steps_again_and_again(self, tmp_path):
        """A frame at a former end is one like all others, whatever the run that goes on from it."""
        simulate(replace(SHORT, steps=15, minimize=False), tmp_path / "md")
        for steps in (18, 40):
            extend(tmp_path / "md", steps)
            simulate(None, tmp_path / "md", resume=True)
        assert read_log(tmp_path / "md" / "log.csv")["step"].tolist() == [10, 15, 18, 20, 30, 40]
        assert dcd_frames(tmp_path / "md" / "trajectory.dcd") == (6, 6)

    def test_log_that_was_cut(self, tmp_path):
        simulate(replace(SHORT, minimize=False), tmp_path / "md")
        log = tmp_path / "md" / "log.csv"
        extend(tmp_path / "md", 60)
        for left in ("", "".join(log.read_text().splitlines(keepends=True)[:3])):
            log.write_text(left)
            with pytest.raises(SimulationError, match=rf"log.csv holds {2 if left else 0} lines up to step 40 of the checkpoint"):
                simulate(None, tmp_path / "md", resume=True)
            assert log.read_text() == left

    def test_settings_that_were_altered(self, tmp_path):
        simulate(SHORT, tmp_path / "md")
        (tmp_path / "md" / "settings.json").write_text('{"structure": "x.xyz", "thermostat": 1}')
        with pytest.raises(SimulationError, match=r"settings.json holds no settings of a run: .*thermostat"):
            simulate(None, tmp_path / "md", resume=True)

    def test_nothing_to_resume(self, tmp_path):
        with pytest.raises(SimulationError, match="no run to resume"):
            simulate(None, tmp_path / "none", resume=True)

    def test_trajectory_that_was_cut(self, tmp_path):
        simulate(SHORT, tmp_path / "md")
        with pytest.raises(SimulationError, match="fewer than the 5 frames"):
            truncate_dcd(tmp_path / "md" / "trajectory.dcd", 5)


class TestPressure:
    @pytest.fixture
    def waters(self, tmp_path):
        """Two waters for a box of 1.2 nm, one of them cut by a face of it, in a file that does not tell the box."""
        water = np.array([[0, 0, 0], [0.957, 0, 0], [-0.24, 0.927, 0]])
        x = np.concatenate([water + 3.0, water + np.array([3.0, 3.5, 9.0])])
        x[1, 0] += 12.0
        lines = [f"{s} {a:.4f} {b:.4f} {c:.4f}" for s, (a, b, c) in zip("OHHOHH", x, strict=True)]
        (tmp_path / "waters.xyz").write_text("\n".join(["6", "", *lines]) + "\n")
        structure = str(tmp_path / "waters.xyz")
        return replace(SHORT, structure=structure, forces="conservative", box_nm=(1.2, 1.2, 1.2), pressure_bar=1.0, minimize=False)

    def test_volume_and_density(self, waters, tmp_path):
        simulate(replace(waters, steps=120, report_every=40), tmp_path / "md")
        log = read_log(tmp_path / "md" / "log.csv")
        assert len(set(log["volume_nm3"])) > 1
        np.testing.assert_allclose(log["volume_nm3"], 1.2**3, rtol=0.2)
        # Two molecules of 18.015 g/mol; 1 g/mL is 602.214 g/mol in a cubic nanometre.
        np.testing.assert_allclose(log["density_g_per_ml"], 2 * 18.015 / 602.214 / log["volume_nm3"], rtol=1e-4)
        start, final = (app.PDBFile(str(tmp_path / "md" / f"{name}.pdb")) for name in ("topology", "final"))
        for pdb in (start, final):
            x = pdb.getPositions(asNumpy=True)._value.reshape(2, 3, 3)
            assert np.abs(np.linalg.norm(x[:, 1:] - x[:, :1], axis=2) - 0.0957).max() < 0.015  # in one piece
        edge = final.topology.getPeriodicBoxVectors()[0][0]._value
        assert edge**3 == pytest.approx(log["volume_nm3"][-1], rel=1e-3)

    def test_resume(self, waters, tmp_path):
        simulate(replace(waters, steps=40, report_every=20), tmp_path / "md")
        before = read_log(tmp_path / "md" / "log.csv")
        settings = json.loads((tmp_path / "md" / "settings.json").read_text())
        (tmp_path / "md" / "settings.json").write_text(json.dumps({**settings, "steps": 60}))
        simulate(None, tmp_path / "md", resume=True)
        log = read_log(tmp_path / "md" / "log.csv")
        assert log["step"].tolist() == [20, 40, 60]
        np.testing.assert_array_equal(log["volume_nm3"][:2], before["volume_nm3"])
        # It went on from the box of the checkpoint, with the same trial changes as without a break.
        simulate(replace(waters, steps=60, report_every=20), tmp_path / "at-once")
        np.testing.assert_allclose(log["volume_nm3"], read_log(tmp_path / "at-once" / "log.csv")["volume_nm3"], rtol=1e-5)
        assert dcd_frames_in_a_box(tmp_path / "md" / "trajectory.dcd") == 3

    @pytest.mark.filterwarnings("ignore:.*odd number of electrons")  # in so small a box the waters overlap
    def test_box_too_small_keeps_the_last_good_state(self, waters, tmp_path):
        structure = Path(waters.structure)
        structure.write_text(structure.read_text().replace("15.9570", " 3.9570"))  # whole in any box
        squeezed = replace(waters, box_nm=(1.003, 1.003, 1.003), pressure_bar=1e5, steps=1000, report_every=20)
        with pytest.raises(
            SimulationError, match=r"at 100000 bar the barostat tried a box too small .*needs at least 1 nm.* last good state, at .* ps"
        ):
            simulate(squeezed, tmp_path / "md")
        state = openmm.XmlSerializer.deserialize((tmp_path / "md" / "state.xml").read_text())
        assert min(state.getPeriodicBoxVectors()[k][k]._value for k in range(3)) >= 1.0
        assert np.isfinite(state.getPositions(asNumpy=True)._value).all()
        assert read_log(tmp_path / "md" / "log.csv")["time_ps"][-1] == pytest.approx(state.getTime()._value)

    def test_refusals(self, waters, tmp_path):
        with pytest.raises(ValueError, match="a pressure needs a thermostat"):
            replace(waters, ensemble="nve")
        with pytest.raises(ValueError, match="a friction above 0, got nvt, 300 K and 0/ps"):
            replace(waters, friction_per_ps=0.0)
        with pytest.raises(ValueError, match="three positive edges"):
            replace(waters, box_nm=(1.2, 0.0, 1.2))
        with pytest.raises(UnsupportedSystemError, match="no periodic box, so there is no pressure to keep; give one with --box"):
            simulate(replace(waters, box_nm=None), tmp_path / "md")
        assert not (tmp_path / "md").exists()

    def test_command_line(self, waters, tmp_path):
        options = ["--steps", "30", "--report-every", "30", "--no-minimize", "--platform", "Reference", "-o", str(tmp_path / "md")]
        wrong = CliRunner().invoke(cli, ["simulate", waters.structure, *options, "--box", "1.2 nm"])
        assert wrong.exit_code == 1
        assert "must be one number or three with commas" in wrong.output
        result = CliRunner().invoke(cli, ["simulate", waters.structure, *options, "--box", "1.2", "--pressure", "1"])
        assert result.exit_code == 0, result.output
        assert "volume_nm3" in read_log(tmp_path / "md" / "log.csv")


class TestRefusals:
    @pytest.mark.parametrize(
        ("name", "text", "message"),
        [
            ("none.pdb", None, "no such file"),
            ("CCO", None, "no such file; a structure file with coordinates is needed, such as RDKit"),
            ("x.mol2", "x", "expected one of .pdb"),
            ("x.xyz", "3\n\nH 0 0", "cannot be read as xyz"),
            ("x.sdf", "nothing", "cannot be read as sdf"),
            ("x.sdf", "\n\n\n  0  0  0     0  0            999 V3000\n", "cannot be read as sdf.* version V3000; save it as V2000"),
            ("x.cif", "data_x\n_cell_length_a 5.0(1)\n", "cannot be read as mmCIF, the only kind of .cif file|holds no atoms"),
            ("x.pdb", "END\n", "holds no atoms|cannot be read"),
            ("x.xyz", "2\n\nH 0 0 0\nH 0 0 0.001\n", "0.001 Angstrom apart"),
            ("x.xyz", "2\n\nH 0 0 0\nH nan 0 0.8\n", "not finite"),
            ("x.xyz", "2\n\nNa 0 0 0\nCl 0 0 2.4\n", "not trained on Cl, Na"),
            ("x.xyz", "2\n\n1 0 0 0\n1 0 0 0.7\n", "'1' is no chemical symbol; give symbols instead of atomic numbers"),
            ("x.xyz", "2\n\nD 0 0 0\nD 0 0 0.7\n", "'D' is no chemical symbol; .* and H for deuterium"),
        ],
    )
    def test_structures(self, tmp_path, name, text, message):
        if text is not None:
            (tmp_path / name).write_text(text)
        with pytest.raises(UnsupportedSystemError, match=message):
            simulate(replace(SHORT, structure=str(tmp_path / name)), tmp_path / "md")
        assert not (tmp_path / "md").exists()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"ensemble": "npt"}, "ensemble"),
            ({"timestep_fs": 0.0}, "timestep_fs"),
            ({"timestep_fs": math.nan}, "timestep_fs"),
            ({"temperature": -1.0}, "temperature"),
            ({"temperature": math.inf}, "temperature"),
            ({"pressure_bar": math.nan}, "pressure_bar"),
            ({"seed": 0}, "seed must be from 1 to 2147483647, got 0"),
            ({"seed": 2**31}, "seed"),
            ({"box_nm": (1.0, math.inf, 1.0)}, "box_nm"),
            ({"box_nm": (2.0, math.nan, 2.0)}, "box_nm"),
        ],
    )
    def test_settings(self, change, message):
        with pytest.raises(ValueError, match=message):
            replace(SHORT, **change)

    def test_settings_of_other_kinds_are_kept_as_plain_ones(self):
        settings = replace(SHORT, structure=EXAMPLES / "water.xyz", model=Path(MODEL), box_nm=np.array([2.0, 2.0, 3.0]))
        assert SimulationSettings(**json.loads(json.dumps(asdict(settings)))) == settings

    def test_platform(self, tmp_path):
        with pytest.raises(SimulationError, match="no platform 'Abacus' here; it has Reference"):
            simulate(replace(SHORT, platform="Abacus"), tmp_path / "md")

    def test_dynamics_that_fail_keep_their_frames(self, tmp_path):
        with pytest.raises(SimulationError, match=r"dynamics failed near step .*shorter --timestep"):
            simulate(replace(SHORT, temperature=1e300, minimize=False), tmp_path / "md")
        assert (tmp_path / "md" / "log.csv").exists()

    def test_coincident_atoms_are_named(self):
        with pytest.raises(UnsupportedSystemError, match=r"atoms 0 \(H\) and 1 \(O\)"):
            check_coordinates(topology_of(molecule("OH")[::-1]), np.zeros((2, 3)))

    def test_resume_where_the_start_would_not_fit_into_the_box_of_now(self, tmp_path):
        water = molecule("H2O", cell=[12.0, 12.0, 12.0], pbc=True)
        write(tmp_path / "x.xyz", water + _moved(water, 5.0), format="extxyz")
        simulate(replace(SHORT, structure=str(tmp_path / "x.xyz"), forces="direct", steps=2, report_every=2, minimize=False), tmp_path / "md")
        pdb = app.PDBFile(str(tmp_path / "md" / "topology.pdb"))
        start = np.array(pdb.getPositions(asNumpy=True).value_in_unit(unit.nanometer))
        start[3] = start[0] + [1.2, 0.0, 0.0]
        with open(tmp_path / "md" / "topology.pdb", "w") as file:
            app.PDBFile.writeFile(pdb.topology, start * unit.nanometer, file, keepIds=True)
        simulate(None, tmp_path / "md", resume=True, steps=4)
        assert read_log(tmp_path / "md" / "log.csv")["step"].tolist() == [2, 4]

    def test_resume_in_a_box_that_a_pdb_file_would_round_to_one_too_small(self, tmp_path):
        water = molecule("H2O", cell=12.24745 / 2**0.5 * np.array([[0, 1, 1], [1, 0, 1], [1, 1, 0]]), pbc=True)
        write(tmp_path / "x.xyz", water, format="extxyz")
        simulate(replace(SHORT, structure=str(tmp_path / "x.xyz"), forces="direct", steps=2, report_every=2, minimize=False), tmp_path / "md")
        simulate(None, tmp_path / "md", resume=True, steps=4)
        assert read_log(tmp_path / "md" / "log.csv")["step"].tolist() == [2, 4]

    def test_atoms_that_coincide_with_an_image_are_named(self, tmp_path):
        """As crystals have them that were written with both faces of the cell."""
        water = molecule("H2O")
        twice = water + _moved(water, 12.0)
        twice.set_cell([12.0, 12.0, 12.0])
        twice.pbc = True
        write(tmp_path / "x.xyz", twice, format="extxyz")
        with pytest.raises(UnsupportedSystemError, match=r"atoms 0 \(O\) and 3 \(O\) coincide across the faces of the periodic box"):
            simulate(replace(SHORT, structure=str(tmp_path / "x.xyz")), tmp_path / "md")


def test_temperature_off_the_thermostat_is_noticed(tmp_path):
    simulate(SHORT, tmp_path / "md")
    assert temperature_deviation(tmp_path / "md") is None  # four samples tell nothing
    header = (tmp_path / "md" / "log.csv").read_text().splitlines()[0]
    rows = [f"{i},{0.01 * i},0,1,1,{400 if i > 100 else 900}" for i in range(1, 201)]
    (tmp_path / "md" / "log.csv").write_text("\n".join([header, *rows]) + "\n")
    assert temperature_deviation(tmp_path / "md") == pytest.approx(1 / 3)


@pytest.mark.parametrize(("mean", "scatter", "noticed"), [(360, 5, True), (240, 5, True), (320, 5, False), (360, 250, False)])
@pytest.mark.parametrize("samples", [200, 20_000])
def test_deviations_within_the_scatter_are_not_noticed(tmp_path, mean, scatter, noticed, samples):
    """A temperature of three atoms scatters by half of itself, and stays for a while."""
    write_settings(SHORT, tmp_path, None)
    kelvin = mean + scatter * np.repeat(np.random.default_rng(0).normal(size=10), samples // 10)
    rows = [f"{i},{0.01 * i},0,1,1,{value}" for i, value in enumerate(kelvin)]
    (tmp_path / "log.csv").write_text("step,time_ps,potential_kj_per_mol,kinetic_kj_per_mol,total_kj_per_mol,temperature_k\n" + "\n".join(rows))
    assert (temperature_deviation(tmp_path) is not None) == noticed
    write_settings(replace(SHORT, friction_per_ps=0.0), tmp_path, None)
    assert temperature_deviation(tmp_path) is None


@pytest.mark.parametrize(
    ("forces", "deviation", "remedy"),
    [("direct", 0.2, "+20% .*Direct forces put heat in"), ("direct", -0.2, "-20% .*Take shorter steps"), ("mts", 0.2, "+20% .*Take shorter steps")],
)
def test_remedies_for_the_temperature(tmp_path, monkeypatch, forces, deviation, remedy):
    monkeypatch.setattr("openmm_se3.simulate.simulate", lambda settings, output, *_: write_settings(settings, output, None))
    monkeypatch.setattr("openmm_se3.simulation_files.temperature_deviation", lambda output: deviation)
    result = CliRunner().invoke(cli, ["simulate", str(EXAMPLES / "water.xyz"), "--forces", forces, "-o", str(tmp_path)])
    assert re.search(remedy.replace("+", r"\+"), result.output.replace("\n", " ")), result.output


def test_temperature_is_without_the_motion_of_the_centre(tmp_path):
    """The thermostat adds some in every step: at this friction three of the nine degrees of freedom that are not counted."""
    simulate(replace(SHORT, steps=40, report_every=1, friction_per_ps=1000.0), tmp_path / "md")
    state = openmm.XmlSerializer.deserialize((tmp_path / "md" / "state.xml").read_text())
    v, m = state.getVelocities(asNumpy=True)._value, np.array([15.99943, 1.007947, 1.007947])
    of_centre = np.square(m @ v).sum() / m.sum() / 2
    kinetic = state.getKineticEnergy()._value
    assert of_centre > 0.01 * kinetic
    log = read_log(tmp_path / "md" / "log.csv")
    assert log["kinetic_kj_per_mol"][-1] == pytest.approx(kinetic - of_centre, rel=1e-5)
    gas = unit.MOLAR_GAS_CONSTANT_R.value_in_unit(unit.kilojoule_per_mole / unit.kelvin)
    assert log["temperature_k"][-1] == pytest.approx(2 * (kinetic - of_centre) / (6 * gas), rel=1e-5)


def test_temperature_of_a_lone_atom(tmp_path):
    (tmp_path / "x.xyz").write_text("1\n\nO 0 0 0\n")
    settings = replace(SHORT, structure=str(tmp_path / "x.xyz"), minimize=False, steps=2000, report_every=2)
    with pytest.warns(UserWarning, match="has no hydrogens"):
        simulate(settings, tmp_path / "md")
    assert read_log(tmp_path / "md" / "log.csv")["temperature_k"].mean() == pytest.approx(300, rel=0.3)


class TestForcesLeftOpen:
    """One molecule under a thermostat has direct forces, everything else conservative ones, which a notice tells."""

    @pytest.mark.parametrize(
        ("molecules", "cell", "ensemble", "forces"),
        [(1, None, "nvt", "direct"), (1, None, "nve", "conservative"), (2, None, "nvt", "conservative"), (1, 1.2, "nvt", "conservative")],
        ids=["one molecule", "constant energy", "two molecules", "a box"],
    )
    def test_choice(self, tmp_path, molecules, cell, ensemble, forces):
        water = molecule("H2O")
        write(tmp_path / "x.xyz", water if molecules == 1 else water + _moved(water, 4.0))
        settings = replace(SHORT, structure=str(tmp_path / "x.xyz"), box_nm=cell and (cell,) * 3, ensemble=ensemble, steps=2, report_every=1)
        with nullcontext() if forces == "direct" else pytest.warns(UserWarning, match="forces are conservative here"):
            simulate(settings, tmp_path / "md")
        written = tmp_path / "md" / "settings.json"
        assert json.loads(written.read_text())["forces"] == forces
        extend(tmp_path / "md", 4)
        simulate(None, tmp_path / "md", resume=True)  # as it began, without a notice
        assert json.loads(written.read_text())["forces"] == forces

    def test_without_friction_there_is_no_thermostat(self):
        with pytest.warns(UserWarning, match="any molecule at constant energy"):
            assert suitable_forces(replace(SHORT, friction_per_ps=0.0), *read_structure(EXAMPLES / "water.xyz")) == "conservative"


class TestCommandLine:
    def test_simulate(self, tmp_path):
        options = ["--steps", "20", "--report-every", "10", "--model", MODEL, "-o", str(tmp_path / "md")]
        result = CliRunner().invoke(cli, ["simulate", str(EXAMPLES / "water.xyz"), *options])
        assert result.exit_code == 0, result.output
        assert "trajectory.dcd" in result.output
        again = CliRunner().invoke(cli, ["simulate", str(EXAMPLES / "water.xyz"), *options])
        assert again.exit_code == 1
        assert "not empty" in again.output

    def test_resume_takes_more_steps_and_nothing_else(self, tmp_path):
        options = ["--steps", "20", "--report-every", "10", "--model", MODEL, "-o", str(tmp_path / "md")]
        assert CliRunner().invoke(cli, ["simulate", str(EXAMPLES / "water.xyz"), *options]).exit_code == 0
        again = ["simulate", str(EXAMPLES / "water.xyz"), "--resume", "-o", str(tmp_path / "md"), "--steps", "30"]
        refused = CliRunner().invoke(cli, [*again, "--temperature", "300", "--report-every", "10"])
        assert refused.exit_code == 1
        assert "but not --report-every, --temperature" in refused.output.replace("\n", " ")
        result = CliRunner().invoke(cli, again)
        assert result.exit_code == 0, result.output
        assert read_log(tmp_path / "md" / "log.csv")["step"].tolist() == [10, 20, 30]
        other = CliRunner().invoke(cli, [again[0], str(EXAMPLES / "ethanol.sdf"), *again[2:]])
        assert other.exit_code == 1
        assert "not of" in other.output.replace("\n", " ")

    def test_resume_of_another_structure_of_the_same_name(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "other").mkdir()
        for folder, suffix in (("", "water.xyz"), ("other", "ethanol.sdf")):
            shutil.copy(EXAMPLES / suffix, tmp_path / folder / f"x{Path(suffix).suffix}")
        options = ["--steps", "10", "--report-every", "10", "--model", MODEL]
        assert CliRunner().invoke(cli, ["simulate", "x.xyz", *options]).exit_code == 0
        other = CliRunner().invoke(cli, ["simulate", "other/x.sdf", "--resume"])
        assert other.exit_code == 1
        assert "the run in x-md is of" in other.output.replace("\n", " ")
        assert CliRunner().invoke(cli, ["simulate", "x.xyz", "--resume", "--steps", "20"]).exit_code == 0

    def test_resume_with_a_model_that_was_moved(self, tmp_path):
        model, moved, md = tmp_path / "my.pt", tmp_path / "there" / "my.pt", str(tmp_path / "md")
        shutil.copy(find_model(MODEL), model)
        options = ["--steps", "10", "--report-every", "10", "--model", str(model), "-o", md]
        assert CliRunner().invoke(cli, ["simulate", str(EXAMPLES / "water.xyz"), *options]).exit_code == 0
        moved.parent.mkdir()
        model.rename(moved)
        again = ["simulate", "--resume", "-o", md, "--steps", "20"]
        assert CliRunner().invoke(cli, again).exit_code == 1
        result = CliRunner().invoke(cli, [*again, "--model", str(moved)])
        assert result.exit_code == 0, result.output
        assert json.loads((tmp_path / "md" / "settings.json").read_text())["model"] == str(moved)
        file = tmp_path / "md" / "settings.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "weights_sha256": "0" * 64}))
        refused = CliRunner().invoke(cli, [*again, "--model", str(moved)])
        assert refused.exit_code == 1
        assert "began with other weights" in refused.output.replace("\n", " ")

    def test_resume_of_a_run_that_goes_on_changes_nothing(self, tmp_path):
        simulate(replace(SHORT, steps=10, minimize=False), tmp_path / "md")
        kept = (tmp_path / "md" / "settings.json").read_bytes()
        again = ["simulate", "--resume", "-o", str(tmp_path / "md"), "--steps", "20", "--model", str(find_model(MODEL))]
        with alone(tmp_path / "md"):
            refused = CliRunner().invoke(cli, again)
        assert refused.exit_code == 1
        assert "another process runs in" in refused.output
        assert (tmp_path / "md" / "settings.json").read_bytes() == kept
        assert CliRunner().invoke(cli, again).exit_code == 0
        assert json.loads((tmp_path / "md" / "settings.json").read_text())["steps"] == 20

    def test_no_box(self, tmp_path):
        water = molecule("H2O")
        water.set_cell([3, 3, 3])
        water.pbc = True
        write(tmp_path / "x.xyz", water, format="extxyz")
        options = ["--steps", "2", "--report-every", "2", "--no-minimize", "--model", MODEL, "-o", str(tmp_path / "md")]
        refused = CliRunner().invoke(cli, ["simulate", str(tmp_path / "x.xyz"), *options])
        assert refused.exit_code == 1
        assert "--box none" in refused.output.replace("\n", " ")
        result = CliRunner().invoke(cli, ["simulate", str(tmp_path / "x.xyz"), "--box", "none", *options])
        assert result.exit_code == 0, result.output

    def test_brackets_are_no_markup(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert "no[/b].xyz: no such file" in CliRunner().invoke(cli, ["simulate", "no[/b].xyz"]).output

    def test_advice_keeps_its_extras(self, capsys):
        _fail(RuntimeError(MEND))
        assert "[cpu]" in MEND
        assert MEND in capsys.readouterr().err

    def test_places_that_cannot_be_written(self, tmp_path):
        (tmp_path / "file").write_text("")
        for place in ("file", "file/md"):
            result = CliRunner().invoke(cli, ["simulate", str(EXAMPLES / "water.xyz"), "--model", MODEL, "-o", str(tmp_path / place)])
            assert result.exit_code == 1
            assert re.search(r"error: .*file", result.output)

    def test_models_and_info(self):
        result = CliRunner().invoke(cli, ["models"])
        assert result.exit_code == 0
        assert MODEL in result.output
        result = CliRunner().invoke(cli, ["info", MODEL])
        assert json.loads(result.output)["name"] == MODEL

    @pytest.mark.parametrize("arguments", [["info", "nothing"], ["validate", "nothing"], ["simulate", "nothing.pdb"], ["simulate"]])
    def test_errors_are_one_line_without_a_traceback(self, arguments, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        result = CliRunner().invoke(cli, arguments)
        assert result.exit_code == 1
        assert re.search(r"error: ", result.output)
        assert "Traceback" not in result.output


def unlikely(atoms, box=None):
    topology = app.Topology()
    residue = topology.addResidue("X", topology.addChain())
    for symbol in atoms.get_chemical_symbols():
        topology.addAtom(symbol, app.Element.getBySymbol(symbol), residue)
    if box is not None:
        topology.setUnitCellDimensions(openmm.Vec3(*box) * unit.nanometer)
    return unlikely_molecules(topology, atoms.positions / 10)


class TestUnlikelyMolecules:
    @pytest.mark.parametrize("name", ["H2O", "CH3CH2OH", "C6H6", "CO2", "N2", "CO", "CH3NO2", "HCOOH"])
    def test_closed_shells_pass(self, name):
        assert unlikely(molecule(name)) == []

    @pytest.mark.parametrize(
        ("name", "removed", "expected"),
        [
            ("CH3", 0, "CH3 .*odd number of electrons"),
            ("HCOOH", 1, "CHO2 .*odd number of electrons"),  # formate, as its positions tell
            ("C6H6", 6, "C6 .*no hydrogens"),
            ("H2O", 2, r"^O \(from atom 0 on\) has no hydrogens"),
        ],
    )
    def test_ions_radicals_and_missing_hydrogens_do_not(self, name, removed, expected):
        atoms = molecule(name)
        hydrogens = [i for i, symbol in enumerate(atoms.get_chemical_symbols()) if symbol == "H"]
        del atoms[hydrogens[-removed:] if removed else []]
        (sentence,) = unlikely(atoms)
        assert re.search(expected, sentence)

    def test_counted_by_kind_and_across_the_faces_of_a_box(self):
        atoms = molecule("CH3")
        for k in range(3):
            shifted = molecule("CH3")
            shifted.positions += [0, 0, 4.0 * (k + 1)]
            atoms += shifted
        water = molecule("H2O")
        water.positions += [6.0, 6.0, 0.0]
        atoms += water
        atoms.positions[-1] += [0, 0, 20.0]  # one of its hydrogens, in the next box
        (sentence,) = unlikely(atoms, box=(2, 2, 2))
        assert sentence.startswith("CH3 (from atom 0 on, and 3 more like it)")

    def test_the_command_says_so(self, tmp_path):
        write(tmp_path / "methyl.xyz", molecule("CH3"))
        arguments = ["simulate", str(tmp_path / "methyl.xyz"), "--steps", "2", "--no-minimize", "--output", str(tmp_path / "run")]
        result = CliRunner().invoke(cli, arguments)
        assert result.exit_code == 0, result.output
        assert "notice:" in result.output
        assert "odd number of electrons if it is neutral" in result.output
