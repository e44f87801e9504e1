"""A built wheel holds the runtime package and the released models, and nothing of training."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from openmm_se3.model_file import available_models

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def contents(tmp_path_factory):
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "-w", str(target), str(ROOT)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (wheel,) = target.glob("*.whl")
    return zipfile.ZipFile(wheel)


def test_models_are_inside(contents):
    for name in available_models():
        for suffix in ("pt", "md", "json"):
            assert f"openmm_se3/torchscript_models/{name}.{suffix}" in contents.namelist()


def test_data_of_the_physics_measures_are_inside(contents):
    for path in (ROOT / "openmm_se3" / "physics").iterdir():
        if path.is_file():
            assert f"openmm_se3/physics/{path.name}" in contents.namelist()


def test_training_is_not(contents):
    top = {n.split("/")[0] for n in contents.namelist()}
    assert top == {"openmm_se3", next(t for t in top if t.endswith(".dist-info"))}


def test_entry_points(contents):
    (name,) = [n for n in contents.namelist() if n.endswith("entry_points.txt")]
    text = contents.read(name).decode()
    for model in ["se3", *available_models()]:
        assert f"{model} = openmm_se3.openmmml_plugin:SE3PotentialImplFactory" in text
