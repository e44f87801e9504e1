"""The conda recipe and the conda environments ask for what pyproject.toml asks for."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import openmm_se3

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
#: Names that conda-forge gives to packages of PyPI.
CONDA_NAMES = {"matplotlib": "matplotlib-base", "openmmml": "openmm-ml", "torch": "pytorch"}
#: What a recipe or environment has besides: the interpreter, and openmm-torch, which on PyPI comes with the extras.
BESIDES = {"python", "openmm-torch"}


def read_recipe():
    """`recipe/meta.yaml`, its variables filled in as conda-build does, before it is read as YAML."""
    text = (ROOT / "recipe" / "meta.yaml").read_text()
    variables = {"PYTHON": "python"} | dict(re.findall(r'^{% set (\w+) = "([^"]*)" %}$', text, re.M))
    text = re.sub(r"^{%.*%}$", "", text, flags=re.M)
    return yaml.safe_load(re.sub(r"{{ (\w+) }}", lambda match: variables[match[1]], text)), variables


RECIPE, VARIABLES = read_recipe()


def requirements(lines):
    """Name to version range, of lines such as ``numpy >=1.26``."""
    return {name: SpecifierSet(versions.strip()) for name, _, versions in (line.partition(" ") for line in lines)}


def project_requirements(extras=()):
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in PROJECT["optional-dependencies"][extra])]
    found = [Requirement(line) for line in lines]
    return {CONDA_NAMES.get(r.name.lower(), r.name.lower()): r.specifier for r in found}


def test_version_is_that_of_the_package():
    assert RECIPE["package"] == {"name": PROJECT["name"], "version": openmm_se3.__version__}


def test_dependencies_are_those_of_the_project():
    run, expected = requirements(RECIPE["requirements"]["run"]), project_requirements()
    assert set(run) - BESIDES == set(expected)
    for name, versions in expected.items():
        assert run[name] == versions, f"{name}: recipe {run[name]}, project {versions}"


def test_python_is_that_of_the_project():
    assert requirements(RECIPE["requirements"]["run"])["python"] == SpecifierSet(PROJECT["requires-python"])
    assert f">={VARIABLES['python_min']}" in PROJECT["requires-python"]


def test_build_is_pure_python_with_the_entry_points_of_the_project():
    build = RECIPE["build"]
    assert build["noarch"] == "python"
    assert build["entry_points"] == [f"{name} = {target}" for name, target in PROJECT["scripts"].items()]
    host = requirements(line for line in RECIPE["requirements"]["host"] if line.startswith("setuptools"))
    (setuptools,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert host["setuptools"] == Requirement(setuptools).specifier


def test_licence():
    assert RECIPE["about"]["license"] == PROJECT["license"]
    assert [RECIPE["about"]["license_file"]] == PROJECT["license-files"]


@pytest.mark.parametrize("path", sorted(ROOT.glob("environment*.yml")), ids=lambda p: p.name)
def test_environments_agree(path):
    content = yaml.safe_load(path.read_text())
    assert content["channels"] == ["conda-forge"]
    lines = [line for line in content["dependencies"] if isinstance(line, str) and "=*" not in line and not re.search(r"\w=\d", line)]
    found, expected = requirements(lines), project_requirements(["training"])
    for name, versions in expected.items():
        # openmm-ml without a range: conda-forge may still have an older one that works for everything but mixed systems.
        assert name in found, f"{path.name} lacks {name}"
        assert found[name] in (versions, SpecifierSet()), f"{name}: {path.name} {found[name]}, project {versions}"
    assert found["python"] == SpecifierSet(PROJECT["requires-python"])
