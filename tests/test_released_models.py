"""Every released model keeps the contract, and its card and metrics belong to it."""

import json

import pytest

from openmm_se3.model_file import available_models, find_model, models_directory, read_metadata
from openmm_se3.validation import validate_model


@pytest.mark.parametrize("name", available_models())
class TestReleasedModel:
    def test_contract(self, name):
        checks = validate_model(name)
        assert not [c for c in checks if not c.passed]
        # Stricter than for users' own models.
        errors = [c.value for c in checks if "equivariance" in c.name and "float32" in c.name]
        assert len(errors) >= 4
        assert max(errors) < 1e-6

    def test_card_and_metrics(self, name):
        card = (models_directory() / f"{name}.md").read_text()
        for heading in ("## Data", "## Errors", "## Limits", "## Licence"):
            assert heading in card
        metrics = json.loads((models_directory() / f"{name}.json").read_text())
        assert metrics == read_metadata(name).metrics
        test = metrics["test"]
        assert test["split"] == "all"
        # The card quotes the numbers of the metrics file, not others.
        for key in ("force_rmse_kcal_per_mol_per_angstrom", "energy_rmse_kcal_per_mol", "conservative_force_rmse_kcal_per_mol_per_angstrom"):
            assert f"{test[key]:.2f}" in card, key

    def test_size(self, name):
        assert find_model(name).stat().st_size < 12e6


def test_there_is_a_default_model():
    assert "se3-ani1x" in available_models()
