"""Opening model files: released ones, and every kind of bad one."""

import json
import shutil
import zipfile

import pytest
import torch

from benchmarks.systems import water_box
from openmm_se3 import available_models, load_model
from openmm_se3.errors import ModelFileError
from openmm_se3.model_file import (
    CHECKSUM_FILE,
    METADATA_FILE,
    ModelMetadata,
    find_model,
    metadata_to_json,
    read_attachment,
    read_metadata,
    text_sha256,
    weights_sha256,
)
from tests.openmm_se3.helpers import MODEL


def resave(target, change_metadata=None, change_module=None, checksum=True):
    """Write the released model again with changes, as a tamperer who knows the format would."""
    extra = {METADATA_FILE: ""}
    module = torch.jit.load(str(find_model(MODEL)), _extra_files=extra)
    raw = json.loads(extra[METADATA_FILE])
    if change_module is not None:
        change_module(module, raw)
    if change_metadata is not None:
        change_metadata(raw)
    text = json.dumps(raw, indent=1, sort_keys=True)
    torch.jit.save(module, str(target), _extra_files={METADATA_FILE: text, CHECKSUM_FILE: text_sha256(text) if checksum else "0" * 64})
    return target


def nudge(module, raw=None):
    with torch.no_grad():
        next(module.parameters()).view(-1)[0] += 1e-3


def nudge_and_sign(module, raw):
    nudge(module)
    raw["weights_sha256"] = weights_sha256(module.state_dict())


def test_released_model_opens():
    assert MODEL in available_models()
    model = load_model(MODEL)
    assert isinstance(model.metadata, ModelMetadata)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {b.device.type for b in model.buffers()} == {"cpu"}
    assert load_model(find_model(MODEL)).metadata == model.metadata
    assert read_metadata(MODEL) == model.metadata


def test_portions_are_made_for_the_threads_there_are():
    """And nothing but the speed depends on them, in a system of many portions."""
    topology, positions = water_box(40)
    x, z = torch.tensor(positions), torch.tensor([atom.element.atomic_number for atom in topology.atoms()])
    box = torch.tensor(topology.getPeriodicBoxVectors()._value, dtype=torch.float64)
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            model = load_model(MODEL).double()
            assert model.network.threads == model.fast_model.network.threads == threads
            found.append([*model(x, z, box), *model.conservative_and_direct(x, z, box)])
    finally:
        torch.set_num_threads(before)
    for one, three in zip(*found, strict=True):
        torch.testing.assert_close(one, three, rtol=1e-10, atol=1e-8)


def test_metadata_survive_a_round_trip(tmp_path):
    text = metadata_to_json(read_metadata(MODEL))
    assert json.loads(text)["name"] == MODEL


def test_unknown_name_lists_the_released_models():
    with pytest.raises(ModelFileError, match=f"no model 'nothing'.*released: .*{MODEL}"):
        load_model("nothing")


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.99])
def test_truncated(tmp_path, fraction):
    data = find_model(MODEL).read_bytes()
    (tmp_path / "cut.pt").write_bytes(data[: int(fraction * len(data))])
    with pytest.raises(ModelFileError, match=r"cut\.pt: not a readable TorchScript file.*truncated"):
        load_model(tmp_path / "cut.pt")


def test_foreign(tmp_path):
    (tmp_path / "a.pt").write_bytes(b"not a model at all")
    for read in (load_model, lambda path: read_attachment(path, "network.pt")):
        with pytest.raises(ModelFileError, match="not a readable TorchScript file"):
            read(tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "b.pt", "w") as archive:
        archive.writestr("hello.txt", "world")
    with pytest.raises(ModelFileError, match="not a readable TorchScript file"):
        load_model(tmp_path / "b.pt")
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(tmp_path / "c.pt"))
    with pytest.raises(ModelFileError, match="without openmm-se3 metadata"):
        load_model(tmp_path / "c.pt")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checksum": False}, "checksum of its metadata disagrees"),
        ({"change_module": nudge}, "checksum of its weights disagrees"),
        ({"change_module": nudge_and_sign}, "golden values disagree"),
        ({"change_metadata": lambda raw: raw["golden"][0].update(energy=0.0)}, "golden values disagree"),
        ({"change_metadata": lambda raw: raw["golden"][0].update(energy=float("nan"))}, "golden values disagree"),
        ({"change_metadata": lambda raw: raw.update(format_version=2)}, "model format 2, but this version"),
        ({"change_metadata": lambda raw: raw.pop("elements")}, r"lack \['elements'\]"),
        ({"change_metadata": lambda raw: raw["golden"][0].update(stress=0.0)}, r"a golden structure of its metadata is none \(.*'stress'"),
        ({"change_metadata": lambda raw: raw.update(golden=None)}, "a golden structure of its metadata is none"),
    ],
)
def test_tampered(tmp_path, changes, message):
    with pytest.raises(ModelFileError, match=message):
        load_model(resave(tmp_path / "altered.pt", **changes))


def test_flipped_bytes(tmp_path):
    """A file damaged in transit is refused, by the archive's own checksums or by ours."""
    shutil.copy(find_model(MODEL), tmp_path / "x.pt")
    data = bytearray((tmp_path / "x.pt").read_bytes())
    middle = len(data) // 2
    data[middle : middle + 64] = bytes(64)
    (tmp_path / "x.pt").write_bytes(bytes(data))
    with pytest.raises(ModelFileError):
        load_model(tmp_path / "x.pt")
