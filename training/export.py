"""`export`: a checkpoint, or those of a committee, in; one TorchScript file that keeps the contract out."""

import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.build import molecule
from ase.data import atomic_numbers as NUMBER_OF_SYMBOL

import openmm_se3
from openmm_se3.model_file import (
    CHECKSUM_FILE,
    FORMAT_VERSION,
    METADATA_FILE,
    GoldenStructure,
    ModelMetadata,
    metadata_to_json,
    read_metadata,
    text_sha256,
    weights_sha256,
)
from openmm_se3.validation import Check, validate_model
from training.checkpoint import FAST_FILE, NETWORK_FILE, TOLD_OF_DATA, LoadedCheckpoint, attach_network, load_checkpoint, load_exported
from training.committee import ExportedCommittee
from training.exported import ExportedModel, ExportedModelWithFast
from training.files import replacing
from training.network import AnyNetworkConfig, ReferenceConfig
from training.units import ANGSTROM_PER_NM, KJ_PER_MOL_PER_EV

CITATION = "B. E. Hedelius, Learning inter-atomic forces with an SE(3)-Transformer, Brigham Young University (2021)"
PARITY_LIMIT = 1e-9  # relative difference of scripted and eager module in float64


class ExportError(RuntimeError):
    """The exported file does not keep the contract; the message lists what failed."""


def _golden_atoms(elements: tuple[str, ...]) -> list[tuple[str, Atoms]]:
    """Small molecules of ASE's G2 set that the model's elements can build; single atoms in a row if there are none."""
    names = ("H2O", "CH3CH2OH", "CH3CONH2", "NH3", "CH4", "N2", "O2", "H2")
    usable = [(n, molecule(n)) for n in names if set(molecule(n).get_chemical_symbols()) <= set(elements)]
    if not usable:
        usable = [("row of atoms", Atoms(list(elements) * 2, positions=[(1.5 * i, 0.1 * i * i, 0.0) for i in range(2 * len(elements))]))]
    return usable[:4]


def golden_structures(model: ExportedModel, elements: tuple[str, ...]) -> list[GoldenStructure]:
    """Energies and forces of a few distorted molecules in float64, one of them in a triclinic box."""
    rng = np.random.default_rng(0)
    out = []
    cutoff = model.cutoff_nm
    triclinic = [[2.2 * cutoff, 0.0, 0.0], [0.3 * cutoff, 2.3 * cutoff, 0.0], [-0.4 * cutoff, 0.5 * cutoff, 2.4 * cutoff]]
    cases: list[tuple[str, Atoms, list[list[float]] | None]] = [(name, atoms, None) for name, atoms in _golden_atoms(elements)]
    cases.append((f"{cases[0][0]} in a triclinic box", cases[0][1], triclinic))
    for name, atoms, box in cases:
        x = np.round((atoms.positions + rng.normal(scale=0.05, size=(len(atoms), 3))) / ANGSTROM_PER_NM, 6)
        energy, forces = model(torch.tensor(x), torch.tensor(atoms.numbers), None if box is None else torch.tensor(box, dtype=torch.float64))
        out.append(GoldenStructure(name, atoms.numbers.tolist(), x.tolist(), box, float(energy), forces.tolist()))
    return out


def _code_version() -> str:
    """Package version and, in a checkout, its commit."""
    root = Path(__file__).parent
    try:
        found = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=root, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        found = "unknown"
    return f"openmm-se3 {openmm_se3.__version__}, commit {found}"


def _read(checkpoint: Path) -> LoadedCheckpoint:
    if checkpoint.suffix == ".ckpt":
        loaded = load_checkpoint(checkpoint)
    else:
        loaded = load_exported(str(checkpoint))
        told = read_metadata(str(checkpoint))
        for part, training_data in ((loaded, told.training_data), (loaded.fast, told.fast_network.get("training_data", {}))):
            if part is not None:
                part.config = part.config.model_copy(update={"initial_model": training_data.get("initial_model")})
    if isinstance(loaded.config.network, ReferenceConfig) and loaded.config.network.parity == "all":
        raise ExportError(
            f"{checkpoint}: with network.parity 'all' energies of mirror images differ, and an exported model promises that they are equal "
            "(equivariance under reflection); train with 'natural' to export. 'evaluate' reads the checkpoint itself"
        )
    return loaded


def _read_committee(checkpoints: Sequence[Path]) -> list[LoadedCheckpoint]:
    """Members that can share their neighbours and whose mean has a meaning."""
    members = [_read(c) for c in checkpoints]
    first = members[0]
    seen: dict[str, Path] = {}
    for path, member in zip(checkpoints, members, strict=True):
        for what, mine, other in (
            ("elements", member.config.network.elements, first.config.network.elements),
            ("cutoff (Angstrom)", member.config.network.cutoff, first.config.network.cutoff),
            ("level of theory", member.data["level_of_theory"], first.data["level_of_theory"]),
        ):
            if mine != other:
                raise ExportError(f"the members of a committee must agree in {what}: {checkpoints[0]} has {other}, {path} has {mine}")
        digest = weights_sha256(member.network.state_dict())
        if digest in seen:
            raise ExportError(f"{seen[digest]} and {path} hold the same weights; a committee needs different training runs")
        seen[digest] = path
    return members


def _read_fast(path: Path, model: Path, network: AnyNetworkConfig) -> LoadedCheckpoint:
    """The fast network of an exported file that has one, else the network of the file itself."""
    loaded = _read(path)
    fast = loaded.fast or loaded
    _check_fits(fast, path, network, model)
    return fast


def _check_fits(fast: LoadedCheckpoint, path: Path, network: AnyNetworkConfig, model: Path) -> None:
    mine = fast.config.network
    if mine.elements != network.elements:
        raise ExportError(
            f"the fast network must know the elements of the model, in their order: {path} has {mine.elements}, {model} {network.elements}"
        )
    if mine.cutoff > network.cutoff:
        raise ExportError(
            f"the fast network's cutoff must not exceed the model's, which decides what boxes are large enough: {path} has {mine.cutoff} Angstrom, "
            f"{model} has {network.cutoff}"
        )


def _sizes(loaded: LoadedCheckpoint) -> dict[str, Any]:
    network = loaded.config.network
    return {
        "cutoff_nm": network.cutoff / ANGSTROM_PER_NM,
        "n_layers": network.num_layers,
        "n_parameters": sum(p.numel() for p in loaded.network.parameters()),
    }


def _training_data(loaded: LoadedCheckpoint) -> dict[str, Any]:
    told = {k: loaded.data[k] for k in TOLD_OF_DATA} | {"steps": loaded.step}
    if loaded.data.get("hold_out_molecules"):
        told["hold_out_molecules"] = True
    start = loaded.config.initial_model
    return told if start is None else told | {"initial_model": Path(start).stem}  # a name: nobody else has these folders


def _self_energies(members: Sequence[LoadedCheckpoint]) -> dict[str, float]:
    """In kJ/mol, of the elements that all members have some of: total energies are the model's plus these, so means go with its mean."""
    return {
        s: sum(m.data["self_energies"][s] for m in members) / len(members) * KJ_PER_MOL_PER_EV
        for s in members[0].data["self_energies"]
        if all(s in m.data["self_energies"] for m in members)
    }


def _eager_model(members: Sequence[LoadedCheckpoint], inner: LoadedCheckpoint | None, elements: tuple[str, ...]) -> ExportedModel:
    """One model of all members, or of one with a fast network for inner steps; `elements` are those that it announces."""
    networks = [m.network for m in members]
    atomic_numbers, trained = (tuple(NUMBER_OF_SYMBOL[s] for s in symbols) for symbols in (members[0].config.network.elements, elements))
    model: ExportedModel
    if len(members) > 1:
        model = ExportedCommittee(networks, atomic_numbers, trained)
    elif inner is not None:
        model = ExportedModelWithFast(networks[0], inner.network, atomic_numbers, trained)
    else:
        model = ExportedModel(networks[0], atomic_numbers, trained)
    model.eval()
    return model


def check_parity(scripted: Callable[..., Any], golden: Sequence[GoldenStructure]) -> None:
    """Compare a scripted module, in float64, with what the eager one gave.

    Raises
    ------
    ExportError
        Where they differ, or either is not finite.
    """
    for g in golden:
        box = None if g.box_vectors_nm is None else torch.tensor(g.box_vectors_nm, dtype=torch.float64)
        energy, forces = scripted(torch.tensor(g.positions_nm, dtype=torch.float64), torch.tensor(g.atomic_numbers), box)
        expected = torch.tensor(g.forces, dtype=torch.float64)
        of_energy = abs(float(energy) - g.energy) / max(abs(g.energy), 1.0)
        of_forces = float((forces - expected).abs().max() / expected.abs().max())
        difference = np.max([of_energy, of_forces])  # Python's max passes NaN over
        if not difference <= PARITY_LIMIT:
            raise ExportError(f"scripted and eager module differ by {difference:.2e} on {g.name}, more than {PARITY_LIMIT:.0e}")


def _save_validated(scripted: torch.jit.ScriptModule, extra: dict[str, str | bytes], output: Path) -> list[Check]:
    """Write the file, which appears only if it passes all checks."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with replacing(output) as partial:
        torch.jit.save(scripted, str(partial), _extra_files=extra)
        checks = validate_model(partial)
        failed = [f"{c.name}: {c.value:.2e} exceeds {c.limit:.0e}" for c in checks if not c.passed]
        if failed:
            raise ExportError("the exported model does not keep the contract: " + "; ".join(failed))
    return checks


def export(
    checkpoints: Path | Sequence[Path],
    output: Path,
    level_of_theory: str | None = None,
    licence: str | None = None,
    citation: str | None = None,
    metrics: dict[str, Any] | None = None,
    overwrite: bool = False,
    fast: Path | None = None,
) -> list[Check]:
    """Write a model file and validate it with the code that users run.

    Parameters
    ----------
    checkpoints : Path or sequence of Path
        Of `fit`; the averaged weights are exported. Several make a committee: one model, the mean of all, that can also tell how
        much their forces deviate. An exported file, or the name of a released model, will do: it is written anew, as this version writes files.
    output : Path
        File to write; its stem is the model's name.
    level_of_theory : str, optional
        Origin of the labels; by default what the training data say.
    licence, citation : str, optional
        Terms of use of the weights, and what to cite; by default those of the exported file that is written anew, else "unspecified" and
        `CITATION`. A committee takes neither from its members.
    metrics : dict, optional
        Errors on held-out data to carry in the file; by default likewise, since the weights are the same.
    overwrite : bool
        Whether an existing file may be replaced.
    fast : Path, optional
        Checkpoint, exported file or released model of a cheaper network, whose conservative forces are to drive the inner steps of multiple
        time stepping; of an exported file that carries such a network, that one. By default that of the exported file that is written
        anew, if it has one.

    Returns
    -------
    list of Check
        All checks of `validate_model`, all passed.

    Raises
    ------
    FileExistsError
        If `output` exists and `overwrite` is False.
    CheckpointError, DataError, ConfigError
        If a checkpoint or exported file cannot be read, or lacks its network.
    ExportError
        If the network has no mirror symmetry, the members of a committee do not belong together, the fast network does not fit, the scripted
        module differs from the eager one, or a check fails; `output` is then not written.
    """
    if output.exists() and not overwrite:
        raise FileExistsError(f"{output} exists already; choose another name, or allow overwriting with --overwrite")
    paths = [checkpoints] if isinstance(checkpoints, Path) else checkpoints
    if fast is not None and len(paths) > 1:
        raise ExportError("a committee has no fast network; export one of its members with it")
    members = _read_committee(paths)
    config = members[0].config.network
    inner = members[0].fast if fast is None else _read_fast(fast, paths[0], config)
    self_energies = _self_energies(members)
    # An element without one is in no data that any member was trained on: its weights are the random ones of the beginning.
    elements = tuple(s for s in config.elements if s in self_energies)
    model = _eager_model(members, inner, elements)
    scripted = torch.jit.script(model)
    model.to(torch.float64)
    scripted.to(torch.float64)
    golden = golden_structures(model, elements)
    check_parity(scripted, golden)
    scripted.to(torch.float32)
    before = members[0].released_with if len(members) == 1 else {}
    metadata = ModelMetadata(
        format_version=FORMAT_VERSION,
        name=output.stem,
        elements=list(elements),
        cutoff_nm=config.cutoff / ANGSTROM_PER_NM,
        n_layers=max(m.config.network.num_layers for m in members),
        n_parameters=sum(p.numel() for m in members for p in m.network.parameters()),
        units={"positions": "nm", "energy": "kJ/mol", "forces": "kJ/mol/nm"},
        self_energies=self_energies,
        level_of_theory=level_of_theory or members[0].data["level_of_theory"] or "unspecified",
        weights_sha256=weights_sha256(scripted.state_dict()),
        training_data=_training_data(members[0]) if len(members) == 1 else {"members": [_training_data(m) for m in members]},
        licence=licence or before.get("licence", "unspecified"),
        citation=citation or before.get("citation", CITATION),
        code_version=_code_version(),
        torch_version=torch.__version__,
        golden=golden,
        metrics=before.get("metrics", {}) if metrics is None else metrics,
        n_members=len(members),
        untrained=sorted({forces for m in members for forces in m.untrained}),
        fast_network={} if inner is None else _sizes(inner) | {"training_data": _training_data(inner)},
    )
    text = metadata_to_json(metadata)
    extra: dict[str, str | bytes] = {METADATA_FILE: text, CHECKSUM_FILE: text_sha256(text)}
    if len(members) == 1:
        extra[NETWORK_FILE] = attach_network(members[0])
    if inner is not None:
        extra[FAST_FILE] = attach_network(inner)
    return _save_validated(scripted, extra, output)
