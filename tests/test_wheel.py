"""What is distributed: the wheel, built from the sdist, holds the runtime package and the released models, and nothing of training."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from openmm_se3.model_file import available_models

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Folder with the sdist and the wheel that was built from it, as users who install from the sdist build it."""
    target = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--outdir", str(target), str(ROOT)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return target


@pytest.fixture(scope="module")
def contents(built):
    (wheel,) = built.glob("*.whl")
    return zipfile.ZipFile(wheel)


def test_sdist_holds_the_models_and_what_builds_them_in(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    expected = {f"torchscript_models/{name}.{suffix}" for name in available_models() for suffix in ("pt", "md", "json")}
    assert expected | {"pyproject.toml", "README.md", "LICENSE", "torchscript_models/README.md"} <= names
    # Half of a test suite would be no use: setuptools takes test_*.py and leaves out what they import.
    assert not {name for name in names if name.split("/")[0] in ("tests", "training")}


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
