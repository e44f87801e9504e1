"""Every example runs, with settings short enough for a test."""

import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
SHORT = {
    "molecule_in_vacuum.py": (["--steps", "20", "--output", "{tmp}"], r"20 steps, potential energy -?\d.*"),
    "water_box_npt.py": (["--steps", "4"], r"(step +\d+ .* 64 molecules\s*){4}"),
    "ligand_in_water.py": (["--steps", "4", "--padding", "0.8"], r"22 atoms by the model, \d{3,} classical; 4 steps; potential energy -?\d"),
    "multiple_time_steps.py": (["--femtoseconds", "20"], r"conservative: total energy .*\s+mts: total energy"),
    "optimise_and_vibrate_with_ase.py": ([], r"frequencies, 1/cm: 1\d\d\d 3\d\d\d 3\d\d\d"),
    "replicas.py": (["--copies", "2", "--steps", "4", "--blocks", "2"], r"component: \d\.\de[-+]0\d .*\s+2 copies: .* times as fast"),
    "fine_tuning.py": (["--frames", "4", "--steps", "2", "--output", "{tmp}/tuned"], r"before: .*\s+after: molecules held out"),
    "lambda_scan.py": (["--windows", "2", "--steps", "4"], r"free energy of switching -?\d"),
}


def test_every_example_is_run():
    assert {p.name for p in EXAMPLES.glob("*.py")} == set(SHORT)


@pytest.mark.parametrize("name", SHORT)
def test_example(name, tmp_path, capsys, monkeypatch):
    arguments, expected = SHORT[name]
    monkeypatch.setattr(sys, "argv", [name, *(a.format(tmp=tmp_path) for a in arguments)])
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    output = capsys.readouterr().out
    assert re.search(expected, output), output
