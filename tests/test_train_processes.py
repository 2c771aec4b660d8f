"""The main job under torchrun: two processes train what one does."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torchrun import torchrun

from fastbconv.train import cli, steptime
from fastbconv.train.processes import Processes

PROGRAM = Path(__file__).parent / "distributed" / "train.py"
# Batches of 64 of 1145 images: the last has 57, whose halves differ.
SMALL = ["--networks", "bayesian", "map", "--channels", "4", "8", "--hidden", "16"]
SMALL += ["--num-samples", "2", "--threads", "1"]


def _torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    return torchrun(PROGRAM, *arguments, seconds=600)


def _history(folder: Path) -> dict[str, list[dict[str, float]]]:
    return json.loads((folder / "report.json").read_text())["history"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Three epochs by one process, by two with the same noise and, interrupted, with their own."""
    folder = tmp_path_factory.mktemp("runs")
    names = {"one": folder / "one", "shared": folder / "shared", "own": folder / "own"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steptime, "_SECONDS", 0.0)
        assert cli.main([*SMALL, "--epochs", "3", "--out", str(names["one"])]) == 0
    done = {
        "shared": _torchrun(
            *SMALL, "--epochs", "3", "--shared-noise", "--out", str(names["shared"])
        ),
        "own": _torchrun(*SMALL, "--epochs", "3", "--out", str(names["own"])),
    }
    for run in done.values():
        assert run.returncode == 0, run.stdout + run.stderr
    return {**names, "output": done}


def test_shared_noise_gives_the_epochs_of_one_process(runs: dict[str, Any]) -> None:
    expected, got = _history(runs["one"]), _history(runs["shared"])
    assert got.keys() == expected.keys() == {"bayesian", "map"}
    for name, rows in expected.items():
        for one, two in zip(rows, got[name], strict=True):
            for key in ("loss", "nll", "kl"):
                assert two[key] == pytest.approx(one[key], rel=1e-4), (name, one["epoch"], key)
            assert abs(two["validation_accuracy"] - one["validation_accuracy"]) < 0.02


def test_noise_of_their_own_is_another_run_of_the_same_kind(runs: dict[str, Any]) -> None:
    """The deterministic network draws nothing: it is the same. The KL counts once."""
    one, own = _history(runs["one"]), _history(runs["own"])
    assert own["map"][-1]["loss"] == pytest.approx(one["map"][-1]["loss"], rel=1e-4)
    assert own["bayesian"][-1]["nll"] != pytest.approx(one["bayesian"][-1]["nll"], rel=1e-5)
    assert own["bayesian"][0]["kl"] == pytest.approx(one["bayesian"][0]["kl"], rel=0.05)


def test_one_process_speaks(runs: dict[str, Any]) -> None:
    for name, noise in (("shared", "the same noise"), ("own", "noise of their own")):
        text = runs["output"][name].stdout
        assert text.count("epoch   3/3") == 2  # of each network
        assert text.count(f"2 processes with {noise}") == 1


def test_a_run_goes_on_with_as_many_processes(runs: dict[str, Any], capsys) -> None:
    assert cli.main(["--resume", "--out", str(runs["own"])]) == 2
    assert "expected 2 processes" in capsys.readouterr().err
    again = _torchrun("--resume", "--out", str(runs["own"]))
    assert again.returncode == 0, again.stderr
    assert "bayesian: 3 of 3 epochs are done" in again.stdout


def test_what_the_first_process_cannot_do_ends_all(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    done = _torchrun(*SMALL, "--epochs", "1", "--out", str(tmp_path / "out" / "inner"))
    assert done.returncode != 0
    assert done.stderr.count("fastbconv train: ") == 1


def test_shares_of_a_batch() -> None:
    """Together they are the batch; the weighted means of the shares average to its mean."""
    for count in (1, 2, 3, 5):
        for size in (1, 2, 5, 7, 64):
            values = torch.randn(size, dtype=torch.float64)
            shares = [Processes(rank, count).share(torch.arange(size)) for rank in range(count)]
            if size >= count:
                assert sorted(torch.cat([own for own, _ in shares]).tolist()) == list(range(size))
            mean = sum(weight * values[own].mean() for own, weight in shares) / count
            torch.testing.assert_close(mean, values.mean())
