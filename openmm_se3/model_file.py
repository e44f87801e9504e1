"""Find an exported model, open it and check that it is what it claims to be.

The reader owns the schema: `training` writes a file through `metadata_to_json` and ends by opening it with `load_model`.
"""

import hashlib
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from openmm_se3.errors import ModelFileError

FORMAT_VERSION = 1
METADATA_FILE = "metadata.json"
CHECKSUM_FILE = "metadata.sha256"

#: Golden values are recomputed in float64 with the weights of the file; other hardware differs in the last digits only.
GOLDEN_ENERGY_TOLERANCE = 1e-5  # kJ/mol
GOLDEN_FORCE_TOLERANCE = 1e-4  # kJ/mol/nm


@dataclass(frozen=True)
class GoldenStructure:
    """A structure with the energy and forces that the model gave when it was exported, in float64.

    Attributes
    ----------
    name : str
        What the structure is.
    atomic_numbers : list of int
        ``(n_atoms,)``.
    positions_nm : list of list of float
        ``(n_atoms, 3)`` nm.
    box_vectors_nm : list of list of float or None
        ``(3, 3)`` nm, rows, or None without periodic boundaries.
    energy : float
        kJ/mol.
    forces : list of list of float
        ``(n_atoms, 3)`` direct forces, kJ/mol/nm.
    """

    name: str
    atomic_numbers: list[int]
    positions_nm: list[list[float]]
    box_vectors_nm: list[list[float]] | None
    energy: float
    forces: list[list[float]]


@dataclass(frozen=True)
class ModelMetadata:
    """What an exported model says of itself.

    Attributes
    ----------
    format_version : int
        Version of the contract.
    name : str
        Name of the model.
    elements : list of str
        Chemical symbols the model was trained on.
    cutoff_nm : float
        Cutoff of a layer; an atom feels others up to ``n_layers`` times as far.
    n_layers, n_parameters : int
        Attention layers and trained numbers.
    units : dict
        Units of positions, energy and forces.
    self_energies : dict
        Chemical symbol to the energy that was subtracted from the labels, kJ/mol.
    level_of_theory : str
        Origin of the labels.
    weights_sha256 : str
        Hash over all parameters and buffers.
    training_data : dict
        Sources, hash and splits of the training data.
    licence, citation : str
        Terms of use, and what to cite.
    code_version, torch_version : str
        What made the file.
    golden : list of GoldenStructure
        Reference values, recomputed whenever the file is opened.
    metrics : dict
        Errors on held-out data, with units in the keys.
    n_members : int
        Networks whose mean the model is; a committee, of two or more, has the method ``deviations`` too.
    fast_network : dict
        Of a model with the method ``fast``: cutoff, layers, parameters and training data of the network behind it, under the names above;
        empty for others.
    untrained : list of str
        Forces that nothing in the last stage of training was matched to: ``direct`` where direct forces had no weight, ``conservative`` where
        neither energies nor their gradient had.
    """

    format_version: int
    name: str
    elements: list[str]
    cutoff_nm: float
    n_layers: int
    n_parameters: int
    units: dict[str, str]
    self_energies: dict[str, float]
    level_of_theory: str
    weights_sha256: str
    training_data: dict[str, Any]
    licence: str
    citation: str
    code_version: str
    torch_version: str
    golden: list[GoldenStructure]
    metrics: dict[str, Any]
    n_members: int = 1
    fast_network: dict[str, Any] = field(default_factory=dict)
    untrained: list[str] = field(default_factory=list)


def metadata_to_json(metadata: ModelMetadata) -> str:
    """Serialise metadata; the inverse of what `read_metadata` does."""
    return json.dumps(asdict(metadata), indent=1, sort_keys=True)


def text_sha256(text: str) -> str:
    """SHA-256 of a text, hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def weights_sha256(state: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes of a state dictionary, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def _parse_metadata(text: str, path: Path) -> ModelMetadata:
    try:
        raw = json.loads(text)
    except json.JSONDecodeError as error:
        raise ModelFileError(f"{path}: its metadata are not valid JSON ({error}); export the model again") from None
    version = raw.get("format_version") if isinstance(raw, dict) else None
    if version != FORMAT_VERSION:
        raise ModelFileError(
            f"{path}: model format {version!r}, but this version of openmm-se3 reads {FORMAT_VERSION}; update the package or export again"
        )
    names = {f.name for f in fields(ModelMetadata)}
    required = {f.name for f in fields(ModelMetadata) if f.default is MISSING and f.default_factory is MISSING}
    missing, unknown = sorted(required - set(raw)), sorted(set(raw) - names)
    if missing or unknown:
        raise ModelFileError(f"{path}: metadata lack {missing} and hold unknown {unknown}; export the model again")
    try:
        raw["golden"] = [GoldenStructure(**g) for g in raw["golden"]]
    except TypeError as error:
        raise ModelFileError(f"{path}: a golden structure of its metadata is none ({error}); export the model again") from None
    return ModelMetadata(**raw)


def models_directory() -> Path:
    """Folder of the released models: inside the package when installed, beside it in a checkout."""
    installed = Path(__file__).parent / "torchscript_models"
    return installed if installed.is_dir() else Path(__file__).parent.parent / "torchscript_models"


def available_models() -> list[str]:
    """Names of the released models, which `load_model` and `SE3Potential` accept.

    Returns
    -------
    list of str
        Sorted names.
    """
    return sorted(p.stem for p in models_directory().glob("*.pt"))


def find_model(name_or_path: str | Path) -> Path:
    """Path of a model given by the name of a released one or by a path.

    Raises
    ------
    ModelFileError
        If there is none; the message lists the released models.
    """
    path = Path(name_or_path)
    if path.is_file():
        return path
    released = models_directory() / f"{name_or_path}.pt"
    if path.name == str(name_or_path) and released.is_file():
        return released
    known = ", ".join(available_models()) or "none"
    raise ModelFileError(f"no model {str(name_or_path)!r}: neither a file nor a released model (released: {known})")


def _load(path: Path, extra: dict[str, Any]) -> torch.jit.ScriptModule:
    """Open the archive, and fill `extra` with those further files in it that it names."""
    try:
        return torch.jit.load(io.BytesIO(path.read_bytes()), map_location="cpu", _extra_files=extra)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ModelFileError(
            f"{path}: not a readable TorchScript file ({reason}); it may be truncated or of another kind: copy or export it again"
        ) from None


def _open(path: Path) -> tuple[torch.jit.ScriptModule, ModelMetadata]:
    """Open the archive, check checksums; golden values are not checked here."""
    extra: dict[str, Any] = {METADATA_FILE: "", CHECKSUM_FILE: ""}
    module = _load(path, extra)
    texts = {k: v.decode() if isinstance(v, bytes) else v for k, v in extra.items()}
    if not texts[METADATA_FILE]:
        raise ModelFileError(f"{path}: a TorchScript file without openmm-se3 metadata; export models with 'python -m training export'")
    if text_sha256(texts[METADATA_FILE]) != texts[CHECKSUM_FILE]:
        raise ModelFileError(f"{path}: the checksum of its metadata disagrees; the file was altered: get it again from its source")
    metadata = _parse_metadata(texts[METADATA_FILE], path)
    if weights_sha256(module.state_dict()) != metadata.weights_sha256:
        raise ModelFileError(f"{path}: the checksum of its weights disagrees; the file was altered: get it again from its source")
    return module, metadata


def module_to_bytes(module: torch.jit.ScriptModule) -> bytes:
    """TorchScript archive of a module, without metadata; the inverse of `module_from_bytes`."""
    buffer = io.BytesIO()
    torch.jit.save(module, buffer)
    return buffer.getvalue()


def module_from_bytes(archive: bytes) -> torch.jit.ScriptModule:
    """Open what `module_to_bytes` made, on the CPU and in evaluation mode."""
    return torch.jit.load(io.BytesIO(archive), map_location="cpu").eval()


def golden_errors(module: torch.jit.ScriptModule, metadata: ModelMetadata) -> tuple[float, float]:
    """Largest difference of energy (kJ/mol) and force component (kJ/mol/nm) from the golden values, in float64.

    Parameters
    ----------
    module : ScriptModule
        The model; it is converted to float64 and back, which leaves float32 weights unchanged.
    metadata : ModelMetadata
        With the golden structures.

    Returns
    -------
    tuple of float
        Errors of energy and force; NaN if one of them is.
    """
    module.to(torch.float64)
    energy_error = force_error = 0.0
    for g in metadata.golden:
        positions = torch.tensor(g.positions_nm, dtype=torch.float64)
        box = None if g.box_vectors_nm is None else torch.tensor(g.box_vectors_nm, dtype=torch.float64)
        energy, forces = module(positions, torch.tensor(g.atomic_numbers), box)
        # "not <=" below must also catch NaN, so carry it through max().
        energy_error = max(energy_error, abs(float(energy) - g.energy), key=lambda x: (x != x, x))
        force_error = max(force_error, float((forces - torch.tensor(g.forces, dtype=torch.float64)).abs().max()), key=lambda x: (x != x, x))
    module.to(torch.float32)
    return energy_error, force_error


def load_model(name_or_path: str | Path) -> torch.jit.ScriptModule:
    """Open a model and check its checksums and golden values.

    Parameters
    ----------
    name_or_path : str or Path
        Name of a released model (see `available_models`) or path of an exported file.

    Returns
    -------
    ScriptModule
        On the CPU, float32 weights, evaluation mode. Call it as ``module(positions, atomic_numbers, box_vectors)`` with
        positions ``(n_atoms, 3)`` in nm to get the energy () in kJ/mol and direct forces ``(n_atoms, 3)`` in kJ/mol/nm;
        ``module.conservative_and_direct(...)`` gives minus the gradient of the energy between the two, but not in files from before there
        was such a method; ``module.energy(...)`` the energy alone, differentiable. Its ``.metadata`` is a `ModelMetadata`. A committee
        (``metadata.n_members > 1``) also has ``module.deviations(...)``, ``(n_atoms,)`` in kJ/mol/nm; a model with a fast network for
        multiple time steps ``module.fast(...)``, that network's energy and conservative forces.

    Raises
    ------
    ModelFileError
        If the file is missing, truncated, foreign, of another format, or if checksums or golden values disagree.

    Examples
    --------
    >>> model = load_model("se3-ani1x")  # doctest: +SKIP
    >>> model.metadata.elements  # doctest: +SKIP
    ['H', 'C', 'N', 'O']
    """
    path = find_model(name_or_path)
    module, metadata = _open(path)
    module.eval()
    energy_error, force_error = golden_errors(module, metadata)
    if not (energy_error <= GOLDEN_ENERGY_TOLERANCE and force_error <= GOLDEN_FORCE_TOLERANCE):
        raise ModelFileError(
            f"{path}: golden values disagree (energy by {energy_error:.3g} kJ/mol, force by {force_error:.3g} kJ/mol/nm): "
            f"this torch ({torch.__version__}) does not compute what the model computed with torch {metadata.torch_version} when it was exported"
        )
    module.metadata = metadata
    parts: Iterable[Any] = module.modules()
    for part in parts:
        if hasattr(part, "threads"):
            part.threads = torch.get_num_threads()
    return module


def read_metadata(name_or_path: str | Path) -> ModelMetadata:
    """Metadata of a model, with its checksums checked; parameters and errors as `load_model`."""
    return _open(find_model(name_or_path))[1]


def read_attachment(name_or_path: str | Path, name: str) -> bytes:
    """Bytes of a further file that rides in a model file.

    Parameters
    ----------
    name_or_path : str or Path
        As of `load_model`.
    name : str
        Of the further file.

    Returns
    -------
    bytes
        Empty if there is none of that name.

    Raises
    ------
    ModelFileError
        If there is no such model, or the file is none.
    """
    extra: dict[str, Any] = {name: b""}
    _load(find_model(name_or_path), extra)
    attached: bytes = extra[name]
    return attached
