"""Where the main job computes: names, errors, and that nothing of a step stays on the host."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fastbconv.train import cli, data, device, loop, steptime
from fastbconv.train.settings import Settings, Stage, TrainError

GPUS = torch.cuda.device_count()


@pytest.mark.parametrize(
    ("text", "name"), [("cpu", "cpu"), ("cpu:0", "cpu"), ("cuda", "cuda"), ("cuda:3", "cuda:3")]
)
def test_names(text: str, name: str) -> None:
    assert device.parse(text) == name


@pytest.mark.parametrize("text", ["", "gpu", "cuda:x", "mps", "meta"])
def test_other_names_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected cpu, cuda, or one GPU"):
        device.parse(text)


def test_processes_share_no_gpu() -> None:
    with pytest.raises(TrainError, match="expected cuda without a number"):
        device.find("cuda:0", processes=2)


def test_a_gpu_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert cli.main(["--device", f"cuda:{GPUS}", "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert f"--device cuda:{GPUS}: expected {GPUS + 1} GPU" in error
    assert f"got {GPUS} that PyTorch" in error
    assert not out.exists()


def test_processes_without_a_gpu_each_fail_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that failed alone was silent, and the others waited for it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for rank in range(3):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
        with pytest.raises(TrainError, match="expected 3 GPUs on this machine, got 2"):
            device.find("cuda", processes=3)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert device.find("cuda", processes=2) == torch.device("cuda", 1)


SMALL = ["--networks", "bayesian", "--channels", "4", "--hidden", "8", "--epochs", "1"]
SMALL += ["--num-samples", "2", "--threads", "1"]


def test_a_run_goes_on_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Begun on a GPU, or before there was the setting, and continued on a CPU."""
    monkeypatch.setattr(steptime, "_SECONDS", 0.0)
    out = tmp_path / "out"
    assert cli.main([*SMALL, "--out", str(out)]) == 0
    settings = json.loads((out / "settings.json").read_text())
    state = torch.load(path := out / "checkpoints" / "bayesian.pt", weights_only=True)
    for value in ("cuda", None):
        for kept in (settings, state["settings"]):
            kept.pop("device")
            if value:
                kept["device"] = value
        if value is None:
            del state["generators"]["cuda"]
        (out / "settings.json").write_text(json.dumps(settings))
        torch.save(state, path)
        (out / "report.json").unlink()
        assert cli.main(["--resume", "--device", "cpu", "--out", str(out)]) == 0
        assert (out / "report.json").exists()


@pytest.mark.parametrize("bayesian", [True, False], ids=["bayesian", "deterministic"])
def test_a_step_leaves_nothing_behind(bayesian: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device, which is not the host's either: an operator refuses tensors of two."""
    monkeypatch.setattr(device, "find", lambda name, processes: torch.device(name))
    plain = torch.optim.Adam  # the fused one knows no meta device
    monkeypatch.setattr(loop, "make_optimizer", lambda model, lr: plain(model.parameters(), lr))
    settings = Settings(channels=(4, 8), hidden=8, device="meta")
    part = data.Part(torch.zeros(6, 1, 8, 8, dtype=torch.uint8), torch.zeros(6).long(), 16.0)
    found = data.Dataset("fake", ("a", "b"), part, part, part, ())
    run = loop.start(Stage("name", "title", bayesian, beta=1.0), settings, found)
    batch = part.batch(torch.tensor([1, 4]), run.device)
    terms = loop.train_step(run, *batch, count=6)
    assert [term.device.type for term in terms] == ["meta"] * 3
    assert all(value.is_meta for value in run.model.state_dict().values())
