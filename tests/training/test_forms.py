"""Either form of the network through configuration, training, checkpoint, evaluation and export."""

import pytest
import torch

from openmm_se3.model_file import load_model
from tests.training.helpers import sample_dataset, small_config
from training.checkpoint import initial_weights, load_checkpoint
from training.config import ConfigError, parse_config, read_config
from training.evaluate import evaluate
from training.export import ExportError, export
from training.fit import fit
from training.network import NetworkConfig, ReferenceConfig, ReferenceTransformer, SE3Transformer, build_network
from training.sweep import sweep

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
    model, positions = load_model(tmp_path / "model.pt"), torch.tensor([[0.0, 0.0, 0.0], [0.1, 0.09, 0.0], [0.1, -0.09, 0.0]])
    energy, forces = model(positions, torch.tensor([8, 1, 1]))
    assert torch.isfinite(energy)
    assert float(forces.abs().max()) > 0
    assert torch.isnan(model(positions, torch.tensor([16, 1, 1]))[0])  # the network has weights for sulfur, the data none of it
    start = initial_weights(str(tmp_path / "model.pt"), module.config.network)
    assert all(torch.equal(start[name], value) for name, value in load_checkpoint(checkpoint).network.state_dict().items())


def test_sweep_over_energy_weights_goes_on_where_it_was(tmp_path):
    dataset = sample_dataset(tmp_path)
    config = reference_config(dataset.directory, "all")
    first = sweep(config, tmp_path / "sweep", (1e-1, 1e-3), accelerator="cpu")
    assert [row["energy_weight"] for row in first] == [1e-1, 1e-3]
    assert first[0]["validation_energy_rmse"] != first[1]["validation_energy_rmse"]
    assert {p.name for p in (tmp_path / "sweep").iterdir()} == {"energy-weight-0.1", "energy-weight-0.001", "sweep.json", "sweep.png"}
    before = (tmp_path / "sweep" / "energy-weight-0.1" / "log.csv").read_text()
    again = sweep(config, tmp_path / "sweep", (1e-1, 1e-3, 1e-5), accelerator="cpu")
    assert again[:2] == first
    assert len(again) == 3
    assert (tmp_path / "sweep" / "energy-weight-0.1" / "log.csv").read_text() == before
    with pytest.raises(ValueError, match="at least one number"):
        sweep(config, tmp_path / "sweep", ())


def test_a_learning_rate_far_too_high_leaves_finite_weights(tmp_path):
    dataset = sample_dataset(tmp_path)
    raw = reference_config(dataset.directory, "all").model_dump(mode="json")
    raw["optimizer"] |= {"learning_rate": 1e-1, "warmup_steps": 0}
    raw["run"] |= {"max_steps": 15, "validate_every": 15}
    module = fit(parse_config(raw, "test"), tmp_path / "run", accelerator="cpu")
    assert not module.bad_batches
    assert all(torch.isfinite(p).all() for p in module.network.parameters())


@pytest.mark.parametrize(
    ("name", "channels"), [("basic", (2, 2, 2)), ("wider", (4, 4, 4)), ("higher-order", (4, 4, 4, 4)), ("energy-only", (2, 2, 2))]
)
def test_presets_of_the_thesis(request, name, channels):
    config = read_config(request.config.rootpath / "training" / "configs" / f"thesis-{name}.yaml")
    assert isinstance(config.network, ReferenceConfig)
    assert (config.network.head_channels, config.network.num_heads, config.network.num_layers) == (channels, 8, 3)
    assert set(config.network.channels) == {8}
    assert (config.network.parity, config.network.embedding) == ("all", "one-hot")
    assert config.optimizer.schedule == "steps"
    build_network(config.network, (1, 6, 7, 8))


def test_export_refuses_energies_that_change_in_a_mirror(tmp_path):
    """All J of equation 2.1, as in the thesis, are equivariant under rotations only; exported models promise reflections too."""
    dataset = sample_dataset(tmp_path)
    fit(reference_config(dataset.directory, "all"), tmp_path / "run", accelerator="cpu")
    with pytest.raises(ExportError, match=r"reflection.*train with 'natural'"):
        export(tmp_path / "run" / "last.ckpt", tmp_path / "model.pt")
    assert not (tmp_path / "model.pt").exists()
