"""Two processes train as one with their batches put together, and agree on what to skip."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.training.helpers import sample_dataset, small_config
from training import module as training_module
from training.callbacks import read_log
from training.config import FitConfig
from training.fit import fit

ROOT = Path(__file__).parent.parent.parent
MODES = {"direct": 0.0, "conservative": 1.0}

# Run by both processes: lightning starts the second one with the same command.
SCRIPT = """
import json, sys, warnings
from pathlib import Path

import torch

from training import module as training_module
from training.config import read_config
from training.fit import fit

warnings.filterwarnings("ignore")
torch.set_num_threads(1)
folder = Path(sys.argv[1])
for name in ("direct", "conservative", "poisoned"):
    config = read_config(folder / f"{'direct' if name == 'poisoned' else name}.yaml")
    if name == "poisoned":
        whole = training_module.Collator.__call__
        calls = []

        def poisoned(self, frames):
            batch = whole(self, frames)
            calls.append(None)
            if len(calls) == 2 and torch.distributed.get_rank() == 1:
                batch.energies[0] = float("nan")
            return batch

        training_module.Collator.__call__ = poisoned
    module = fit(config, folder / name, accelerator="cpu", devices=2)
    rank = module.global_rank
    torch.save(module.network.state_dict(), folder / f"{name}-{rank}.pt")
    (folder / f"{name}-{rank}.json").write_text(json.dumps([module.bad_batches, module.global_step]))
"""


def config_of(data: Path, mode: str) -> FitConfig:
    config = small_config(data, max_steps=3, validate_every=3)
    return config.model_copy(update={"loss": config.loss.model_copy(update={"conservative_weight": MODES[mode]})})


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """Directory with the packed data, and the runs of the script."""
    folder = tmp_path_factory.mktemp("distributed")
    data = sample_dataset(folder).directory
    for mode in MODES:
        (folder / f"{mode}.yaml").write_text(json.dumps(config_of(data, mode).model_dump(mode="json")))
    (folder / "script.py").write_text(SCRIPT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, folder / "script.py", folder], env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return folder


@pytest.mark.parametrize("mode", MODES)
def test_the_same_weights_as_one_process_with_the_same_global_batch(two_processes, tmp_path, monkeypatch, mode):
    class Together(training_module._BatchStream):
        """Each batch is what two processes get in one step."""

        def __iter__(self):
            stream = self.sampler.stream(2 * self.start)
            return (self.collate(np.concatenate([first, next(stream)])) for first in stream)

    monkeypatch.setattr(training_module, "_BatchStream", Together)
    config = config_of(two_processes / "packed", mode)
    expected = fit(config, tmp_path / "run", accelerator="cpu").network.state_dict()
    torch.manual_seed(config.run.seed)
    start = training_module.TrainingModule(config, training_module.PackedDataset(config.data)).network.state_dict()
    names = [name for name, _ in training_module.build_network(config.network, (1, 6, 7, 8)).named_parameters()]

    def flat(state):
        return torch.cat([state[name].double().flatten() for name in names])

    moved = (flat(expected) - flat(start)).norm()
    assert moved > 1e-2  # the steps did something
    for rank in (0, 1):
        # Sums over molecules come in another order, and Adam divides small gradients, and so their rounding, by themselves. Without the
        # other's gradient, or with a mean of means, the distance is that of the steps themselves.
        assert (flat(torch.load(two_processes / f"{mode}-{rank}.pt")) - flat(expected)).norm() < 0.01 * moved
    found, expected = (read_log(folder / "log.csv")[-1] for folder in (two_processes / mode, tmp_path / "run"))
    for column in ("validation_energy_rmse", "validation_energy_mae", "validation_force_rmse"):
        assert float(found[column]) == pytest.approx(float(expected[column]), rel=1e-3), column


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # of a machine with fewer cores
@pytest.mark.parametrize("rank", [0, 1])
def test_loaders_of_a_gpu_bring_the_batches_in_the_order_of_one(two_processes, rank):
    config = config_of(two_processes / "packed", "direct")
    module = training_module.TrainingModule(config, training_module.PackedDataset(config.data))
    stream = training_module._BatchStream(module.sampler("train"), module.collate, 3, rank, 2)
    expected = [batch.frames.tolist() for batch in itertools.islice(stream, 7)]
    loader = training_module.DataLoader(stream, batch_size=None, num_workers=3)
    assert [batch.frames.tolist() for batch in itertools.islice(loader, 7)] == expected
    assert expected[0] != expected[1]


def test_a_loss_that_is_not_finite_in_one_process_skips_the_step_of_all(two_processes):
    (bad, step), (bad_of_other, step_of_other) = (json.loads((two_processes / f"poisoned-{rank}.json").read_text()) for rank in (0, 1))
    assert bad == bad_of_other
    assert len(bad) == 1
    assert bad[0]["batch"] == 2
    assert step == step_of_other == 3
    weights = [torch.load(two_processes / f"poisoned-{rank}.pt") for rank in (0, 1)]
    for name, value in weights[0].items():
        assert torch.isfinite(value).all()
        torch.testing.assert_close(value, weights[1][name], atol=0, rtol=0)
