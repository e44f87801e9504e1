"""The benchmarks run, at their smallest, and what they store is what they print."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import openmm
import pytest
import yaml
from typer.testing import CliRunner

from benchmarks import speed_worker
from benchmarks.__main__ import BENCHMARKS, app, path_of
from benchmarks.workers import Worker, WorkerError
from openmm_se3.binding import FORCE_MODES
from tests.openmm_se3.physics.models import MorseWithGradient, write_model
from tests.training.helpers import sample_dataset
from training.allocator import keep_freed_memory


def run(name, *options):
    """A benchmark by the command line; its standard output."""
    previous = sys.argv
    try:
        result = CliRunner().invoke(app, [name, *map(str, options)], catch_exceptions=False)
    finally:
        sys.argv = previous
    assert result.exit_code == 0, result.output
    return result.output


def stored(path):
    record = json.loads(path.read_text())
    assert record["machine"]["cores"] >= 1
    assert record["versions"]["openmm"] == openmm.__version__
    return record


def test_every_benchmark_is_listed_with_its_first_line():
    listed = run("--help")
    for name in BENCHMARKS:
        assert name in listed
        assert path_of(name).is_file()


@pytest.fixture(scope="module")
def speed(tmp_path_factory):
    """Direct forces on water beside a peer that does not exist."""
    path = tmp_path_factory.mktemp("speed") / "speed.json"
    options = ("--systems", "water", "--modes", "direct", "--blocks", 2, "--seconds", 0.05, "--threads", 1, "--output", path)
    return run("speed", *options, "--peer", f"nonsense={sys.executable}"), stored(path)["systems"]["water"]["rows"]


def test_time_per_step(speed):
    output, rows = speed
    row = rows["direct"]
    assert len(row["blocks"]) == 2
    assert min(row["blocks"]) <= row["ms_per_step"] <= max(row["blocks"])
    assert f"direct           {row['ms_per_step']:10.2f} ms/step" in output
    assert row["finite"]
    assert 0 < row["peak_of_the_potential_mb"] < row["peak_mb"]


def test_a_row_that_fails_does_not_stop_the_others(speed):
    output, rows = speed
    assert rows["direct"]["ms_per_step"] > 0
    assert "KeyError: 'nonsense'" in rows["nonsense"]["error"]
    assert "FAILED: KeyError: 'nonsense'" in output


def test_a_worker_that_says_much_goes_on_and_the_end_of_it_is_told(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import json, sys\nprint(2**20 * '-', file=sys.stderr)\nprint(json.dumps({'line': input()}))\nsys.exit('the end')\n")
    worker = Worker(sys.executable, script, [], threads=1)
    assert worker.ask("one") == {"line": "one"}
    with pytest.raises(WorkerError, match=r"-\nthe end$"):
        worker.ask("two")


def test_peak_memory_in_bytes_as_macos_tells_it(monkeypatch):
    monkeypatch.setattr(speed_worker, "open", lambda _: (_ for _ in ()).throw(OSError()), raising=False)
    monkeypatch.setattr(speed_worker.resource, "getrusage", lambda _: SimpleNamespace(ru_maxrss=300 * 2**20))
    monkeypatch.setattr(sys, "platform", "darwin")
    assert speed_worker.resident_mb() == 300


def test_all_modes_are_those_of_the_model(tmp_path):
    from benchmarks.evaluation import force_modes

    assert force_modes("se3-ani1x") == FORCE_MODES
    assert force_modes(write_model(MorseWithGradient(), tmp_path / "morse.pt")) == ("direct", "conservative", "mts")


def test_operators_and_neighbors(tmp_path):
    run("operators", "--systems", "water", "--modes", "direct,conservative", "--device", "cpu", "--output", tmp_path / "operators.json")
    counts = stored(tmp_path / "operators.json")["results"]["water"]
    assert 0 < counts["direct"]["views"] < counts["direct"]["operators"] < counts["conservative"]["operators"]
    assert counts["direct"]["cuda_kernels"] is None
    run("neighbors", "--systems", "water", "--device", "cpu", "--repeats", 3, "--output", tmp_path / "neighbors.json")
    assert 0 < stored(tmp_path / "neighbors.json")["results"]["water"]["share"] < 1


def test_endurance(tmp_path):
    run("endurance", "--steps", 100, "--blocks", 10, "--output", tmp_path / "endurance.json")
    record = stored(tmp_path / "endurance.json")
    assert len(record["blocks"]) == 10
    assert record["result"]["speed_ratio"] == pytest.approx(record["blocks"][0] / record["blocks"][-1])


def test_heating(tmp_path):
    options = ("--picoseconds", 0.1, "--copies", 2, "--hydrogen-mass", 1.008, 3, "--output", tmp_path / "heating.json")
    output = run("heating", "--molecule", "ethanol", *options)
    own, heavy = stored(tmp_path / "heating.json")["results"]
    assert heavy["hydrogen_mass"] == 3.0
    assert own["k_per_ps"] != heavy["k_per_ps"]
    assert len(own["k_per_ps"]) == 2
    assert own["mean"] == pytest.approx(np.mean(own["k_per_ps"]))
    assert own["time_ps"][-1] <= own["picoseconds"] == pytest.approx(0.1)
    assert f"hydrogen 3 Da: {heavy['mean']:+.4f} +- {heavy['standard_error']:.4f} K/ps" in output


def test_heating_goes_on_from_its_output(tmp_path, monkeypatch):
    from benchmarks import heating

    def measure(copies, picoseconds=0.1):
        argv = ["heating", "--molecule", "water", "--picoseconds", picoseconds, "--copies", copies, "--output", tmp_path / "heating.json"]
        monkeypatch.setattr(sys, "argv", list(map(str, argv)))
        heating.main()
        return stored(tmp_path / "heating.json")["results"][0]

    subject = heating.Subject("se3-ani1x")
    monkeypatch.setattr(heating, "Subject", lambda _: subject)  # opened once
    monkeypatch.setattr(heating, "TOGETHER", 2)
    two, five = measure(2), measure(5)
    assert len(five["k_per_ps"]) == 5
    assert five["k_per_ps"][:2] == two["k_per_ps"]
    assert len(set(five["k_per_ps"])) == 5
    assert five["standard_error"] == pytest.approx(np.std(five["k_per_ps"], ddof=1) / np.sqrt(5))
    monkeypatch.setattr(heating, "TOGETHER", 5)
    (tmp_path / "heating.json").unlink()
    together = measure(5)
    for name in ("k_per_ps", "mean", "rise_at_start_k", "mean_change_k"):
        np.testing.assert_allclose(five[name], together[name], rtol=1e-2, atol=2e-2)  # in float32
    monkeypatch.setattr(heating, "molecule_at_constant_energy", None)
    assert measure(5) == together  # nothing is left to run
    with pytest.raises(SystemExit):
        measure(5, picoseconds=0.2)


def test_memory(tmp_path, monkeypatch):
    from benchmarks import memory

    peaks = iter([100.0, 121.6])
    monkeypatch.setattr(memory, "measure", lambda structure, rows, blocks, seconds: {"direct": {"peak_of_the_potential_mb": next(peaks)}})
    output = run("memory", "--modes", "direct", "--waters", "36,108", "--output", tmp_path / "memory.json")
    rows = stored(tmp_path / "memory.json")["results"]["direct"]
    assert list(rows) == ["108", "324"]
    assert rows["324"]["kb_per_added_atom"] == pytest.approx(102.4)
    assert "102.4 kB for each atom more" in output


def test_training_throughput(tmp_path):
    packed = sample_dataset(tmp_path).directory
    run("training-throughput", packed, "--molecules", 2, "--batches", 1, "--repeats", 2, "--output", tmp_path / "training.json")
    record = stored(tmp_path / "training.json")
    for mode in ("direct", "conservative"):
        assert len(record["steps"][mode]) == 2
        assert record["steps"][mode][0]["parameters"] == 446_169
        assert record["molecules_per_cpu_second"][mode] > 0
    losses = [s["loss"] for s in record["steps"]["direct"]]
    assert losses[1] < losses[0]  # the same batch twice: it learns


def test_allocator(tmp_path):
    if not keep_freed_memory(False):
        pytest.skip("the C library is not glibc and has nothing to set")
    packed = sample_dataset(tmp_path).directory
    network = {"channels": [8, 4, 2], "hidden_channels": 4, "hidden": 8, "num_heads": 2, "num_layers": 2, "cutoff": 4.0}
    run_of = {"batch_molecules": 2, "batch_edges": 500}
    config = tmp_path / "small.yaml"
    config.write_text(yaml.safe_dump({"data": "elsewhere", "network": network, "run": run_of}))
    output = run("allocator", packed, config, "--batches", 2, "--output", tmp_path / "allocator.json")
    assert "small: ratio" in output
    seconds = stored(tmp_path / "allocator.json")["cpu_seconds"]["small"]
    assert [len(steps) for steps in seconds.values()] == [2, 2]


class TestGpu:
    def test_rehearsal(self, tmp_path, monkeypatch):
        from benchmarks import gpu

        # One mode, case and precision are enough to see the parts fit together.
        monkeypatch.setattr(gpu, "force_modes", lambda model: ("mts",))
        monkeypatch.setattr(gpu, "LIMITS", {"single": gpu.LIMITS["single"]})
        whole = gpu.cases()
        monkeypatch.setattr(gpu, "cases", lambda: {"subset, triclinic": whole["subset, triclinic"]})
        output = run("gpu", "--output", tmp_path / "gpu", "--platform", "Reference", "--sizes", "water", "--blocks", 1, "--seconds", 0.05)
        record = stored(tmp_path / "gpu" / "gpu.json")
        (row,) = record["correctness"]
        assert row["passed"]
        assert row["force_error"] > 0
        assert record["systems"]["water"]["rows"]["mts"]["ms_per_step"] > 0
        assert set(record["operators"]["water"]) == {"mts, direct", "mts, conservative - direct"}
        assert "| water | 3 | mts |" in (tmp_path / "gpu" / "gpu.md").read_text()
        assert (tmp_path / "gpu" / "gpu.png").stat().st_size > 1000
        assert "0 of 1 checks failed" in output

    def test_a_deviation_is_noticed(self, tmp_path, monkeypatch):
        from benchmarks import gpu

        monkeypatch.setattr(gpu, "LIMITS", {"single": gpu.LIMITS["single"]})
        monkeypatch.setattr(gpu, "cases", lambda: {"molecule": (None, None, None)})
        results = iter([(1.0, openmm_forces(1.0)), (1.0, openmm_forces(1.001))])
        monkeypatch.setattr(gpu, "evaluate", lambda *a, **k: next(results))
        rows, graphs = gpu.check_mode("direct", "se3-ani1x", "Reference")
        assert [row["passed"] for row in rows] == [False]
        assert graphs == []

    @pytest.mark.skipif("CUDA" in [openmm.Platform.getPlatform(i).getName() for i in range(openmm.Platform.getNumPlatforms())], reason="has CUDA")
    def test_refuses_without_cuda(self, tmp_path):
        result = CliRunner().invoke(app, ["gpu", "--output", str(tmp_path / "gpu")])
        assert result.exit_code == 2
        assert not (tmp_path / "gpu").exists()


def openmm_forces(largest):
    return np.array([[largest, 0.0, 0.0], [0.5, 0.0, 0.0]])
