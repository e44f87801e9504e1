"""The wall between the two packages: what may import what."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TRAINING_ONLY = ("training", "e3nn", "h5py", "lightning", "pydantic", "yaml", "rdkit")
ALLOWED_FROM_RUNTIME = {"openmm_se3", "openmm_se3.model_file", "openmm_se3.validation", "openmm_se3.errors"}


def imports(path: Path) -> set[str]:
    """Modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


@pytest.mark.parametrize("path", sorted((ROOT / "openmm_se3").rglob("*.py")), ids=lambda p: p.name)
def test_runtime_never_imports_training(path):
    assert not {m for m in imports(path) if m.split(".")[0] in TRAINING_ONLY}


@pytest.mark.parametrize("path", sorted((ROOT / "training").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_training_sees_only_the_reader_and_the_validator(path):
    assert {m for m in imports(path) if m.split(".")[0] == "openmm_se3"} <= ALLOWED_FROM_RUNTIME


@pytest.mark.parametrize("path", sorted((ROOT / "training" / "network").rglob("*.py")), ids=lambda p: p.name)
def test_network_knows_nothing_of_data(path):
    assert {m.split(".")[0] for m in imports(path)} <= {"torch", "training", "math", "dataclasses", "collections", "typing", "ase", "e3nn"}
    assert all(m.startswith("training.network") for m in imports(path) if m.startswith("training"))


def test_data_knows_nothing_of_the_network():
    for path in (ROOT / "training" / "data").rglob("*.py"):
        assert not {m for m in imports(path) if m.startswith("training.network")}, path


def test_torch_jit_is_called_in_few_files():
    callers = {
        p.name
        for d in ("openmm_se3", "training")
        for p in (ROOT / d).rglob("*.py")
        if "torch.jit.s" in p.read_text() or "torch.jit.load(" in p.read_text()
    }
    assert callers == {"model_file.py", "force.py", "cuda_graphs.py", "validation.py", "export.py"}


def test_runtime_works_where_training_cannot_be_imported():
    """In a process that refuses the modules of training, the released model opens and gives forces."""
    program = f"""
import sys, warnings
warnings.simplefilter("ignore")
class Wall:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {TRAINING_ONLY!r}:
            raise ImportError(f"the wall: {{name}}")
sys.meta_path.insert(0, Wall())
import openmm_se3.cli, openmm_se3.simulate, openmm_se3.calculator, openmm_se3.physics.validate
from openmm_se3 import SE3Potential, available_models
from openmm import app
topology = app.Topology()
residue = topology.addResidue("X", topology.addChain())
for s in ("H", "O", "H"):
    topology.addAtom(s, app.Element.getBySymbol(s), residue)
print(SE3Potential(available_models()[0]).createSystem(topology).getNumForces())
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "2"


def test_importing_the_package_imports_no_torch():
    program = "import sys, openmm_se3, openmmml, openmm_se3.openmmml_plugin; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.strip() == "False", result.stderr
