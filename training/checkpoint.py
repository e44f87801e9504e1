"""Checkpoints that survive a kill and a full disk, and the way back to a network."""

import io
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from ase.data import atomic_numbers as NUMBER_OF_SYMBOL
from lightning.fabric.plugins import TorchCheckpointIO

from openmm_se3.errors import ModelFileError
from openmm_se3.model_file import ModelMetadata, load_model, read_attachment
from training.config import ConfigError, FitConfig, parse_config
from training.data.frames import DataError
from training.files import replacing
from training.network import AnyNetwork, AnyNetworkConfig, build_network
from training.units import ANGSTROM_PER_NM, KJ_PER_MOL_PER_EV

#: Inside an exported file: configuration and weights of the network as it was trained, from which a new run can start.
NETWORK_FILE = "network.ckpt"
#: The same of the fast network, in files that have one.
FAST_FILE = "fast.ckpt"
#: Of the names of the averaged weights in a checkpoint.
AVERAGED = "ema.module."
#: What an exported file says of the data that its network was trained on.
TOLD_OF_DATA = ("sources", "sha256", "split_seed", "split_fractions", "self_energies_origin")


class CheckpointError(ValueError):
    """A checkpoint cannot be read or written; the message says what to do."""


class SafeCheckpointIO(TorchCheckpointIO):
    """Write beside the target, flush to disk, then rename: the last good checkpoint is whole at every instant."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Save `checkpoint`.

        Raises
        ------
        CheckpointError
            If the disk is full or cannot be written; an earlier checkpoint at `path` is left as it was.
        """
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with replacing(target) as partial, open(partial, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:
            message = f"cannot write checkpoint {target}: {error}. The last good checkpoint is kept; free some space and resume."
            raise CheckpointError(message) from error

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Load the checkpoint from which a run goes on.

        Raises
        ------
        CheckpointError
            If it is damaged.
        """
        try:
            return super().load_checkpoint(path, map_location, weights_only)
        except Exception as error:  # torch raises whatever the reader met
            best = Path(path).with_name("best.ckpt")
            remedy = f"put a copy of {best} in its place and resume from there, or " if best.exists() and best != Path(path) else ""
            message = f"{path}: no checkpoint to go on from ({type(error).__name__}: {error}); {remedy}start a new run in another directory"
            raise CheckpointError(" ".join(message.split())) from None


@dataclass
class LoadedCheckpoint:
    """A network and where it comes from.

    Attributes
    ----------
    network : SE3Transformer or ReferenceTransformer
        With the averaged weights, in evaluation mode.
    config : FitConfig
        Configuration of the run.
    data : dict
        Metadata of the data it was trained on (elements, self-energies in eV, hash ...).
    step : int
        Optimizer steps.
    released_with : dict
        Of an exported file its ``licence``, ``citation`` and ``metrics``; empty for a checkpoint, which has none yet.
    fast : LoadedCheckpoint or None
        The fast network of an exported file that has one.
    untrained : list of str
        As in `ModelMetadata`.
    """

    network: AnyNetwork
    config: FitConfig
    data: dict[str, Any]
    step: int
    released_with: dict[str, Any] = field(default_factory=dict)
    fast: "LoadedCheckpoint | None" = None
    untrained: list[str] = field(default_factory=list)


def load_checkpoint(path: Path) -> LoadedCheckpoint:
    """Read a checkpoint of `fit`; only plain data and tensors are unpickled.

    Raises
    ------
    CheckpointError
        If the file is missing, damaged or not one of ours.
    """
    try:
        raw = torch.load(path, map_location="cpu", weights_only=True)
        ours = raw["openmm_se3"]
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such checkpoint") from None
    except Exception as error:
        raise CheckpointError(f"{path}: not a checkpoint of 'python -m training fit' ({error})") from None
    config = parse_config(ours["config"], str(path))
    network = build_network(config.network, tuple(NUMBER_OF_SYMBOL[s] for s in config.network.elements))
    state = {k.removeprefix(AVERAGED): v for k, v in raw["state_dict"].items() if k.startswith(AVERAGED)}
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise DataError(f"{path}: weights do not fit the network of its own configuration: {error}") from None
    loss = config.loss
    weights = {"direct": loss.force_weight, "conservative": max(loss.energy_weight, loss.conservative_weight)}
    untrained = [forces for forces, weight in weights.items() if weight == 0]
    return LoadedCheckpoint(network.eval().requires_grad_(False), config, ours["data"], int(raw["global_step"]), untrained=untrained)


def weights_alone(source: Path, target: Path) -> None:
    """Write what of a checkpoint another machine has a use for: a third of the size, to evaluate, to export and to start from, not to resume.

    Parameters
    ----------
    source : Path
        Checkpoint of `fit`.
    target : Path
        File to write; it has the averaged weights, the configuration and what is known of the data, with names in place of the paths of this machine.

    Raises
    ------
    CheckpointError
        If `source` is none, or `target` cannot be written.
    """
    loaded = load_checkpoint(source)
    start = loaded.config.initial_model
    names = {"data": Path(loaded.config.data).name, "initial_model": None if start is None else Path(start).stem}
    raw = {
        "openmm_se3": {"config": loaded.config.model_copy(update=names).model_dump(mode="json"), "data": loaded.data},
        "state_dict": {AVERAGED + k: v for k, v in loaded.network.state_dict().items()},
        "global_step": loaded.step,
    }
    SafeCheckpointIO().save_checkpoint(raw, target)


def attach_network(loaded: LoadedCheckpoint) -> bytes:
    """What an exported file carries as `NETWORK_FILE` or `FAST_FILE`: sizes and weights of a network as it was trained."""
    buffer = io.BytesIO()
    torch.save({"config": asdict(loaded.config.network), "weights": loaded.network.state_dict()}, buffer)
    return buffer.getvalue()


def _attached_network(name_or_path: str) -> tuple[ModelMetadata, dict[str, Any] | None, dict[str, torch.Tensor]]:
    """Metadata of an exported file, sizes of its network (None in files that do not tell them yet) and weights."""
    try:
        metadata = load_model(name_or_path).metadata
        network = read_attachment(name_or_path, NETWORK_FILE)
    except ModelFileError as error:
        raise CheckpointError(str(error)) from None
    if metadata.n_members > 1:
        raise CheckpointError(f"{name_or_path} is a committee of {metadata.n_members} networks; give the checkpoint of one of them")
    if not network:
        raise CheckpointError(f"{name_or_path} does not carry the network it was exported from; export it again, or give its checkpoint")
    return (metadata, *_sizes_and_weights(network))


def _sizes_and_weights(attached: bytes) -> tuple[dict[str, Any] | None, dict[str, torch.Tensor]]:
    raw = torch.load(io.BytesIO(attached), map_location="cpu", weights_only=True)
    return (raw["config"], raw["weights"]) if "weights" in raw else (None, raw)


def load_exported(name_or_path: str) -> LoadedCheckpoint:
    """Read the trained network, or networks, back from an exported file, as if from its checkpoint.

    Parameters
    ----------
    name_or_path : str
        Exported file, or name of a released model.

    Returns
    -------
    LoadedCheckpoint
        Its configuration holds the network alone, its data what the file tells of them.

    Raises
    ------
    CheckpointError
        If the file is none, is a committee, or lacks the network or its sizes.
    """
    metadata, sizes, weights = _attached_network(name_or_path)
    usual = {"elements": metadata.elements, "cutoff": metadata.cutoff_nm * ANGSTROM_PER_NM, "num_layers": metadata.n_layers}
    self_energies = {s: e / KJ_PER_MOL_PER_EV for s, e in metadata.self_energies.items()}
    common = {"elements": metadata.elements, "self_energies": self_energies, "level_of_theory": metadata.level_of_theory}
    loaded = _rebuilt(name_or_path, usual if sizes is None else sizes, weights, metadata.training_data, common)
    loaded.released_with = {"licence": metadata.licence, "citation": metadata.citation, "metrics": metadata.metrics}
    loaded.untrained = metadata.untrained
    attached = read_attachment(name_or_path, FAST_FILE)
    if attached:
        fast_sizes, fast_weights = _sizes_and_weights(attached)
        loaded.fast = _rebuilt(name_or_path, fast_sizes, fast_weights, metadata.fast_network["training_data"], common)
    return loaded


def _rebuilt(
    origin: str, sizes: dict[str, Any] | None, weights: dict[str, torch.Tensor], training_data: dict[str, Any], common: dict[str, Any]
) -> LoadedCheckpoint:
    config = parse_config({"data": "of an exported file", "network": sizes}, origin)
    network = build_network(config.network, tuple(NUMBER_OF_SYMBOL[s] for s in config.network.elements))
    try:
        network.load_state_dict(weights)
    except RuntimeError:
        raise CheckpointError(f"{origin} does not tell the sizes of its network, and they are not the usual ones; give its checkpoint") from None
    data = {k: training_data.get(k) for k in (*TOLD_OF_DATA, "hold_out_molecules")} | common
    return LoadedCheckpoint(network.eval().requires_grad_(False), config, data, int(training_data["steps"]))


def initial_weights(name_or_path: str, config: AnyNetworkConfig) -> dict[str, torch.Tensor]:
    """Weights to start a new run from.

    Parameters
    ----------
    name_or_path : str
        Checkpoint of `fit`, exported file, or name of a released model.
    config : NetworkConfig or ReferenceConfig
        Of the new run.

    Returns
    -------
    dict of Tensor
        State of the network, scales of its outputs included.

    Raises
    ------
    CheckpointError
        If it is neither a checkpoint nor a model file.
    ConfigError
        If its elements, sizes or other settings, such as its cutoff, are not those of `config`.
    """
    path = Path(name_or_path)
    if path.suffix == ".ckpt":
        loaded = load_checkpoint(path)
        elements, state, settings = loaded.config.network.elements, loaded.network.state_dict(), asdict(loaded.config.network)
    else:
        try:
            metadata, sizes, state = _attached_network(name_or_path)
        except CheckpointError as error:
            raise CheckpointError(f"initial_model: {error}") from None
        settings = sizes or {"elements": metadata.elements, "cutoff": round(metadata.cutoff_nm * ANGSTROM_PER_NM, 6)}
        elements = settings["elements"] = tuple(settings["elements"])  # of the network; the file announces those that it was trained on
    if elements != config.elements:
        remedy = f"set network.elements to [{', '.join(elements)}]"
        new = [s for s in config.elements if s not in elements]
        if new:
            remedy = (
                f"a trained model cannot learn new elements: leave molecules with {', '.join(new)} out of the data and {remedy}, "
                "or start without initial_model"
            )
        raise ConfigError(
            f"initial_model: {name_or_path} knows the elements {', '.join(elements)}, the configuration has {', '.join(config.elements)}; {remedy}"
        )
    expected = build_network(config, tuple(NUMBER_OF_SYMBOL[s] for s in config.elements)).state_dict()
    wrong = [k for k in expected.keys() | state.keys() if k not in expected or k not in state or expected[k].shape != state[k].shape]
    if wrong:
        raise ConfigError(
            f"initial_model: {name_or_path} has other sizes than the network of the configuration ({len(wrong)} tensors, among them {min(wrong)})"
        )
    # What leaves no trace in the sizes of tensors: the same weights would mean something else.
    different = [(name, value, now) for name, value in settings.items() if (now := getattr(config, name, value)) != value]
    if different:
        shown = "; ".join(f"network.{name} is {value}, the configuration has {now}" for name, value, now in different)
        remedy = ", ".join(f"network.{name} to {value}" for name, value, _ in different)
        raise ConfigError(f"initial_model: of {name_or_path} {shown}; set {remedy}, or start without initial_model")
    return state
