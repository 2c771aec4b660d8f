"""Where the main job computes: names, errors, and that nothing of a step stays on the host."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastbconv.train import cli, data, device, loop
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
    assert f"expected GPU {GPUS} to be there, got {GPUS}" in capsys.readouterr().err
    assert not out.exists()


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
