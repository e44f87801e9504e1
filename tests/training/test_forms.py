"""Either form of the network through configuration, training, checkpoint, evaluation and export."""

import pytest
import torch

from openmm_se3.model_file import load_model
from tests.training.helpers import sample_dataset, small_config
from training.checkpoint import initial_weights, load_checkpoint
from training.config import ConfigError, parse_config
from training.evaluate import evaluate
from training.export import ExportError, export
from training.fit import fit
from training.network import NetworkConfig, ReferenceConfig, ReferenceTransformer, SE3Transformer, build_network

# Sulfur is in no molecule of the sample: the physical embedding must have an answer for it.
REFERENCE = {
    "form": "reference",
    "elements": ["H", "C", "N", "O", "S"],
    "cutoff": 4.0,
    "channels": [3, 2, 2],
    "num_heads": 2,
    "num_layers": 2,
    "embedding": "physical",
    "embedding_channels": 4,
    "n_basis": 6,
    "radial_hidden": 8,
    "hidden": 8,
}


def reference_config(data, parity: str):
    """Six steps of training of a small reference network."""
    raw = small_config(data).model_dump(mode="json") | {"network": {**REFERENCE, "parity": parity}}
    return parse_config(raw, "test")


class TestConfiguration:
    def test_without_a_form_it_is_the_production_form(self):
        """Files and checkpoints older than the reference form say nothing of it."""
        for raw in ({"data": "x"}, {"data": "x", "network": {"cutoff": 4.5}}):
            assert isinstance(parse_config(raw, "test").network, NetworkConfig)

    def test_round_trip(self):
        config = parse_config({"data": "x", "network": REFERENCE}, "test")
        assert isinstance(config.network, ReferenceConfig)
        assert parse_config(config.model_dump(mode="json"), "test") == config
        assert isinstance(build_network(config.network, (1, 6, 7, 8, 16)), ReferenceTransformer)
        assert isinstance(build_network(NetworkConfig(), (1, 6, 7, 8)), SE3Transformer)

    @pytest.mark.parametrize(
        ("network", "message"),
        [
            ({"form": "fancy"}, r"network: .*fancy"),
            ({"form": "reference", "hidden_channels": 4}, "network.hidden_channels: unknown key"),
            ({"form": "production", "parity": "all"}, "network.parity: unknown key"),
            ({"form": "reference", "channels": [4]}, "two to four positive numbers"),
            ({"form": "reference", "embedding": "two-hot"}, "network.embedding: .*one-hot"),
        ],
    )
    def test_refusals_name_the_key(self, network, message):
        with pytest.raises(ConfigError, match=message):
            parse_config({"data": "x", "network": network}, "test")


def test_reference_form_from_training_to_exported_file(tmp_path):
    dataset = sample_dataset(tmp_path)
    module = fit(reference_config(dataset.directory, "natural"), tmp_path / "run", accelerator="cpu")
    assert isinstance(module.network, ReferenceTransformer)
    checkpoint = tmp_path / "run" / "last.ckpt"
    assert isinstance(load_checkpoint(checkpoint).network, ReferenceTransformer)
    assert all(c.passed for c in export(checkpoint, tmp_path / "model.pt"))
    from_checkpoint = evaluate(str(checkpoint), dataset.directory, split="validation", conservative=False)
    from_file = evaluate(str(tmp_path / "model.pt"), dataset.directory, split="validation", conservative=False)
    for key in ("force_rmse_kcal_per_mol_per_angstrom", "energy_rmse_kcal_per_mol"):
        assert from_file[key] == pytest.approx(from_checkpoint[key], rel=1e-4)
    hydrogen_sulfide = torch.tensor([[0.0, 0.0, 0.0], [0.1, 0.09, 0.0], [0.1, -0.09, 0.0]])
    energy, forces = load_model(tmp_path / "model.pt")(hydrogen_sulfide, torch.tensor([16, 1, 1]))
    assert torch.isfinite(energy)
    assert float(forces.abs().max()) > 0
    start = initial_weights(str(tmp_path / "model.pt"), module.config.network)
    assert all(torch.equal(start[name], value) for name, value in load_checkpoint(checkpoint).network.state_dict().items())


def test_export_refuses_energies_that_change_in_a_mirror(tmp_path):
    """All J of equation 2.1, as in the thesis, are equivariant under rotations only; exported models promise reflections too."""
    dataset = sample_dataset(tmp_path)
    fit(reference_config(dataset.directory, "all"), tmp_path / "run", accelerator="cpu")
    with pytest.raises(ExportError, match=r"reflection.*train with 'natural'"):
        export(tmp_path / "run" / "last.ckpt", tmp_path / "model.pt")
    assert not (tmp_path / "model.pt").exists()
