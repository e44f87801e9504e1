"""The N-body experiment: the simulation against loops, the network's symmetries, a short run from trajectories to metrics."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

from benchmarks.clusters import random_orthogonal
from training.__main__ import app
from training.callbacks import read_log
from training.checkpoint import CheckpointError
from training.config import ConfigError, OptimizerConfig
from training.data.frames import DataError
from training.guard import NonFiniteTraining
from training.nbody.data import NBodyData, TrainingStream
from training.nbody.evaluate import evaluate_nbody
from training.nbody.fit import NBodyConfig, NBodyModule, fit_nbody, load_nbody, read_nbody_config
from training.nbody.network import NBodyNetworkConfig, NBodyTransformer
from training.nbody.protocol import PROTOCOLS
from training.nbody.simulate import INITIAL_SPEED, MAX_FORCE, N_STEPS, TIME_STEP, coulomb_forces, simulate, write_trajectories

SMALL = NBodyNetworkConfig(channels=(8, 6, 4), hidden_channels=8, num_heads=2, num_layers=2, n_basis=6, radial_hidden=8, n_products=4, hidden=8)


@pytest.fixture(scope="module")
def trajectories(tmp_path_factory):
    """A small set for each protocol."""
    directory = tmp_path_factory.mktemp("nbody")
    for protocol in PROTOCOLS:
        write_trajectories(directory / protocol, protocol, 120, seed=0)
    return directory


class TestSimulation:
    def test_force_of_two_charges(self):
        x = np.array([[[0.0], [2.0]], [[0.0], [0.0]], [[0.0], [0.0]]])
        attracted = coulomb_forces(x, np.array([[1.0], [-1.0]]))[:, :, 0]
        np.testing.assert_allclose(attracted, [[0.25, -0.25], [0, 0], [0, 0]])
        np.testing.assert_allclose(coulomb_forces(x, np.array([[1.0], [1.0]]))[:, :, 0], -attracted)

    def test_close_encounters_are_limited(self):
        x = np.array([[[0.0], [1e-3]], [[0.0], [0.0]], [[0.0], [0.0]]])
        assert np.abs(coulomb_forces(x, np.array([[1.0], [1.0]]))).max() == MAX_FORCE

    def test_equals_a_scheme_written_out_by_loops(self):
        """One particle, one component after the other, on the starts that the vectorised simulation took."""
        positions, velocities, charges = simulate(2, seed=3)
        trajectory = 1
        x, v, q = positions[trajectory, 0].astype(float), velocities[trajectory, 0].astype(float), charges[trajectory]
        np.testing.assert_allclose(np.linalg.norm(v, axis=1), INITIAL_SPEED, rtol=1e-6)
        assert set(np.abs(q)) == {1.0}
        for _ in range(200):
            force = np.zeros((5, 3))
            for i in range(5):
                for j in range(5):
                    if i != j:
                        r = x[i] - x[j]
                        force[i] += q[i] * q[j] * r / np.linalg.norm(r) ** 3
            v += TIME_STEP * np.clip(force, -MAX_FORCE, MAX_FORCE)
            x += TIME_STEP * v
        # The starts were rounded to float32 on the way here.
        np.testing.assert_allclose(positions[trajectory, 2], x, atol=1e-4)
        np.testing.assert_allclose(velocities[trajectory, 2], v, atol=1e-3)

    def test_the_first_trajectories_do_not_depend_on_the_number(self, trajectories):
        positions, _, charges = simulate(3, seed=0)
        data = NBodyData(trajectories / "egnn")
        np.testing.assert_array_equal(data.positions[:3], positions)
        np.testing.assert_array_equal(data.charges[:3], charges)
        assert positions.shape == (3, 50, 5, 3)
        assert (N_STEPS - 1) // 100 + 1 == 50

    def test_centre_of_mass_goes_straight(self):
        positions, velocities, _ = simulate(20, seed=1)
        expected = positions[:, 0].mean(1) + 100 * TIME_STEP * velocities[:, 0].mean(1)
        # Unless a force was limited, which then is not that of its partner.
        error = np.abs(positions[:, 1].mean(1) - expected).max(1)
        assert np.median(error) < 1e-6


class TestData:
    def test_splits_share_no_trajectory(self, trajectories):
        data = NBodyData(trajectories / "egnn")
        parts = [data.trajectories(s) for s in ("train", "validation", "test")]
        assert [len(p) for p in parts] == [51, 34, 34]  # 3 : 2 : 2
        assert len(np.unique(np.concatenate(parts))) == sum(map(len, parts))

    def test_egnn_protocol_asks_for_step_4100_from_step_3100(self, trajectories):
        data = NBodyData(trajectories / "egnn")
        batch = next(data.evaluation_batches("test", size=4))
        chosen = data.trajectories("test")[:4]
        np.testing.assert_array_equal(batch.positions, data.positions[chosen, 31])
        np.testing.assert_array_equal(batch.targets, data.positions[chosen, 41])
        assert data.time_ahead == pytest.approx(1.0)

    def test_thesis_protocol_asks_for_500_steps_from_any_frame(self, trajectories):
        data = NBodyData(trajectories / "thesis")
        starts = data.starts(np.arange(2000), np.random.default_rng(0))
        assert (starts.min(), starts.max()) == (0, 44)
        first, again = (next(data.evaluation_batches("validation")) for _ in range(2))
        assert torch.equal(first.positions, again.positions)
        batch = data.batch(np.array([7, 7]), np.array([0, 44]))
        np.testing.assert_array_equal(batch.targets, data.positions[7, [5, 49]])

    def test_a_stream_can_begin_later(self, trajectories):
        data = NBodyData(trajectories / "thesis")
        whole, later = (iter(TrainingStream(data, 25, seed=3, start=n)) for n in (0, 5))
        for _ in range(5):
            next(whole)
        for _ in range(4):  # into the next epochs
            a, b = next(whole), next(later)
            assert torch.equal(a.positions, b.positions)
            assert torch.equal(a.trajectories, b.trajectories)

    def test_training_sees_each_trajectory_once_per_epoch(self, trajectories):
        data = NBodyData(trajectories / "egnn")
        stream = iter(TrainingStream(data, 17, seed=0))
        seen = torch.cat([next(stream).positions for _ in range(3)])
        assert len(torch.unique(seen[:, 0, 0])) == 51

    def test_refusals(self, tmp_path, trajectories):
        with pytest.raises(DataError, match="nbody simulate"):
            NBodyData(tmp_path)
        with pytest.raises(FileExistsError, match="exists already"):
            write_trajectories(trajectories / "egnn", "egnn", 5, seed=0)
        write_trajectories(tmp_path / "few", "egnn", 2, seed=0)
        with pytest.raises(DataError, match="leave none"):
            NBodyData(tmp_path / "few")


def random_state(n: int, dtype):
    generator = torch.Generator().manual_seed(0)
    x, v = torch.randn(2, n, 5, 3, generator=generator, dtype=torch.float64)
    q = torch.randn(n, 5, generator=generator, dtype=torch.float64).sign()
    return x.to(dtype), v.to(dtype), q.to(dtype)


NETWORK_LIMIT = {torch.float32: 2e-6, torch.float64: 1e-13}


class TestNetwork:
    def network(self):
        torch.manual_seed(0)
        network = NBodyTransformer(SMALL, 5, 1.0)
        network.scale.fill_(3.0)  # so that the correction, not straight motion, is what is tested
        return network

    def error(self, got, expected):
        return float((got - expected).norm() / expected.norm())

    @pytest.mark.parametrize("reflect", [False, True], ids=["rotation", "reflection"])
    def test_rotation_and_translation(self, dtype, reflect):
        network = self.network()
        x, v, q = random_state(4, dtype)
        r = random_orthogonal(1, reflect).to(dtype)
        expected = network(x, v, q) @ r.T + 0.5
        assert self.error(network(x @ r.T + 0.5, v @ r.T, q), expected) < NETWORK_LIMIT[dtype]

    def test_moving_frame_permutation_and_opposite_charges(self, dtype):
        network = self.network()
        x, v, q = random_state(4, dtype)
        out = network(x, v, q)
        boost = torch.tensor([0.3, -0.2, 0.1], dtype=dtype)
        order = torch.tensor([3, 0, 4, 1, 2])
        assert self.error(network(x, v + boost, q), out + boost) < NETWORK_LIMIT[dtype]  # time ahead is 1
        assert self.error(network(x[:, order], v[:, order], q[:, order]), out[:, order]) < NETWORK_LIMIT[dtype]
        assert self.error(network(x, v, -q), out) < NETWORK_LIMIT[dtype]
        assert self.error(network(x, v, q.abs()), out) > 1e-3  # but the charges are seen

    def test_centre_of_mass_goes_straight(self):
        x, v, q = random_state(4, torch.float32)
        torch.testing.assert_close(self.network()(x, v, q).mean(1), (x + v).mean(1))

    def test_trajectories_do_not_see_each_other(self):
        network = self.network()
        x, v, q = random_state(3, torch.float32)
        torch.testing.assert_close(network(x[1:2], v[1:2], q[1:2]), network(x, v, q)[1:2])

    def test_gradients_are_finite_where_particles_meet(self):
        network = self.network()
        x = torch.zeros(1, 5, 3, requires_grad=True)
        out = network(x, torch.zeros(1, 5, 3), torch.ones(1, 5))
        gradients = torch.autograd.grad(out.square().sum(), [x, *network.parameters()], allow_unused=True)
        assert all(torch.isfinite(g).all() for g in gradients if g is not None)


class TestRun:
    def config(self, data, **changes):
        optimizer = OptimizerConfig(learning_rate=1e-2, warmup_steps=5, ema_decay=0.9, gradient_clip=1.0)
        return NBodyConfig(data=str(data), network=SMALL, optimizer=optimizer, max_steps=60, batch=25, validate_every=30, **changes)

    @pytest.mark.parametrize("protocol", list(PROTOCOLS))
    def test_from_trajectories_to_metrics(self, tmp_path, trajectories, protocol):
        fit_nbody(self.config(trajectories / protocol), tmp_path / "run", accelerator="cpu")
        rows = read_log(tmp_path / "run" / "log.csv")
        assert [int(r["step"]) for r in rows if r["train_mse"]] == [20, 40, 60]
        assert [int(r["step"]) for r in rows if r["validation_mse"]] == [30, 60]
        metrics = evaluate_nbody(tmp_path / "run" / "best.ckpt", trajectories / protocol, tmp_path / "out")
        assert metrics["test_mse"] < metrics["baselines_mse"]["straight motion"]
        assert metrics["printed_mse"] == PROTOCOLS[protocol].printed
        assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == metrics
        assert (tmp_path / "out" / "trajectories.png").stat().st_size > 0
        # The reported error is that of a plain loop over the test trajectories.
        network, _, _ = load_nbody(tmp_path / "run" / "best.ckpt")
        batches = list(NBodyData(trajectories / protocol).evaluation_batches("test", size=1))
        single = [float((network(b.positions, b.velocities, b.charges) - b.targets).square().mean()) for b in batches]
        assert metrics["test_mse"] == pytest.approx(np.mean(single), rel=1e-4)
        with pytest.raises(FileExistsError, match="holds metrics already"):
            evaluate_nbody(tmp_path / "run" / "best.ckpt", trajectories / protocol, tmp_path / "out")
        other = next(p for p in PROTOCOLS if p != protocol)
        with pytest.raises(ValueError, match="ahead"):
            evaluate_nbody(tmp_path / "run" / "best.ckpt", trajectories / other)
        with pytest.raises(FileExistsError, match="not empty"):
            fit_nbody(self.config(trajectories / protocol), tmp_path / "run")

    def test_killed_and_resumed_equals_uninterrupted(self, tmp_path, trajectories):
        config = self.config(trajectories / "thesis")
        fit_nbody(config, tmp_path / "whole", accelerator="cpu")
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
        command = [sys.executable, "-m", "training", "nbody", "fit", "-o", str(tmp_path / "killed"), "--accelerator", "cpu"]
        process = subprocess.Popen([*command, str(tmp_path / "config.yaml")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        last = tmp_path / "killed" / "last.ckpt"
        deadline = time.monotonic() + 120
        while not last.exists() and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.002)
        process.kill()
        process.wait()
        assert torch.load(last, weights_only=True)["global_step"] < 60, "the run ended before it was killed"
        resumed = subprocess.run([*command, "--resume"], capture_output=True)
        assert resumed.returncode == 0, resumed.stderr.decode()
        whole, parts = (torch.load(tmp_path / run / "last.ckpt", weights_only=True)["state_dict"] for run in ("whole", "killed"))
        for name, value in whole.items():
            assert torch.equal(parts[name], value), name
        logs = [[r for r in read_log(tmp_path / run / "log.csv") if r["train_mse"]] for run in ("whole", "killed")]
        assert logs[0] == logs[1]

    def test_stopped_by_a_signal(self, tmp_path, trajectories, monkeypatch):
        whole = NBodyModule.training_step

        def interrupted(self, batch, batch_idx):
            whole(self, batch, batch_idx)
            if self.batches_seen == 3:
                os.kill(os.getpid(), signal.SIGTERM)

        monkeypatch.setattr(NBodyModule, "training_step", interrupted)
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(self.config(trajectories / "egnn").model_dump(mode="json")))
        run = ["-o", str(tmp_path / "run"), "--accelerator", "cpu"]
        result = CliRunner().invoke(app, ["nbody", "fit", str(tmp_path / "config.yaml"), *run])
        assert result.exit_code == 143
        assert "stopped at step 3 (SIGTERM); continue with --resume" in result.output
        assert load_nbody(tmp_path / "run" / "last.ckpt")[2] == 3

    def test_resuming_refuses_what_is_no_such_run(self, tmp_path, trajectories):
        with pytest.raises(CheckpointError, match="no run to resume"):
            fit_nbody(None, tmp_path / "nothing", resume=True)
        config = self.config(trajectories / "egnn").model_copy(update={"max_steps": 1})
        fit_nbody(config, tmp_path / "run", accelerator="cpu")
        with pytest.raises(ConfigError, match="differs from"):
            fit_nbody(config.model_copy(update={"max_steps": 2}), tmp_path / "run", resume=True)
        write_trajectories(tmp_path / "other", "egnn", 120, seed=1)
        (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump({**config.model_dump(mode="json"), "data": str(tmp_path / "other")}))
        with pytest.raises(DataError, match="other trajectories"):
            fit_nbody(None, tmp_path / "run", resume=True, accelerator="cpu")

    def test_batches_that_are_not_finite_are_skipped_then_stop_the_run(self, tmp_path, trajectories, capsys):
        shutil.copytree(trajectories / "egnn", tmp_path / "data")
        positions = np.load(tmp_path / "data" / "positions.npy", mmap_mode="r+")
        positions[7] = np.nan
        positions.flush()
        config = self.config(tmp_path / "data").model_copy(update={"max_steps": 6, "validate_every": 3})
        module = fit_nbody(config, tmp_path / "run", accelerator="cpu")
        assert {(b["trajectory"], b["reason"]) for b in module.bad_batches} == {(7, "loss not finite")}
        assert "loss not finite, step skipped; 1 trajectories: 7" in capsys.readouterr().out
        assert all(torch.isfinite(v).all() for v in module.state_dict().values())
        assert module.batches_seen > 6  # steps that count
        positions[:] = np.nan
        positions.flush()
        with pytest.raises(NonFiniteTraining, match="20 batches in a row were not finite"):
            fit_nbody(config, tmp_path / "diverged", accelerator="cpu")

    def test_refusals(self, tmp_path):
        with pytest.raises(CheckpointError, match="nbody fit"):
            load_nbody(tmp_path / "none.ckpt")
        with pytest.raises(ConfigError, match="cannot be read"):
            read_nbody_config(tmp_path / "none.yaml")
        (tmp_path / "bad.yaml").write_text("{data: x, network: {heads: 3}}")
        with pytest.raises(ConfigError, match=r"network.heads: unknown key"):
            read_nbody_config(tmp_path / "bad.yaml")

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ("network: {n_basis: 1}", "n_basis must be at least 2, got 1"),
            ("network: {num_layers: 0}", "num_layers must be at least 1, got 0"),
            ("network: {shortest: 0}", "shortest must be positive and less than longest, got 0.0 and 8.0"),
            ("network: {shortest: 9}", "shortest must be positive and less than longest, got 9.0 and 8.0"),
            ("network: {longest: .inf}", "finite number"),
            ("network: {channels: [8, 4]}", "channels must be three positive numbers"),
            ("network: {num_heads: 5}", r"hidden_channels \(16\) must be divisible by num_heads \(5\)"),
            ("seed: -1", "seed: .*greater than or equal to 0"),
        ],
    )
    def test_configurations_of_which_nothing_can_be_made(self, tmp_path, given, message):
        (tmp_path / "bad.yaml").write_text(f"data: x\n{given}\n")
        with pytest.raises(ConfigError, match=message):
            read_nbody_config(tmp_path / "bad.yaml")

    @pytest.mark.parametrize("protocol", list(PROTOCOLS))
    def test_shipped_configurations(self, protocol, request):
        config = read_nbody_config(request.config.rootpath / "training" / "configs" / "nbody" / f"{protocol}.yaml")
        assert config.data == f"nbody-{protocol}"

    def test_command_line(self, tmp_path):
        runner = CliRunner()
        result = runner.invoke(app, ["nbody", "simulate", "-o", str(tmp_path / "a"), "--protocol", "none"])
        assert result.exit_code == 1
        result = runner.invoke(app, ["nbody", "simulate", "-o", str(tmp_path / "a"), "--trajectories", "0"])
        assert result.exit_code == 2
        assert not (tmp_path / "a").exists()
        result = runner.invoke(app, ["nbody", "simulate", "-o", str(tmp_path / "a"), "--trajectories", "2"])
        assert result.exit_code == 0, result.output
        assert "wrote 2 trajectories" in result.output
