"""The main job: artefacts, resuming bit for bit, damaged checkpoints, the command line."""

from __future__ import annotations

import json
import os
import pickle
import random
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastbconv as fb
from fastbconv.train import checkpoint, cli, data, loop, report, steptime
from fastbconv.train.settings import NETWORKS, Settings, TrainError, stages

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["--channels", "4", "6", "--hidden", "8", "--num-samples", "2", "--threads", "1"]
TWO = [*SMALL, "--epochs", "3", "--networks", "bayesian", "deterministic"]


@pytest.fixture(autouse=True)
def _few_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Step times are taken, but not for long."""
    monkeypatch.setattr(steptime, "_SECONDS", 0.0)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two networks that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steptime, "_SECONDS", 0.0)
        assert cli.main([*TWO, "--out", str(out)]) == 0
    return out


def assert_equal(ours: Any, theirs: Any, where: str = "") -> None:
    """Bit for bit, through containers; seconds are the clock's and left out."""
    assert type(ours) is type(theirs), where
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key in ours.keys() - {"seconds"}:
            assert_equal(ours[key], theirs[key], f"{where}.{key}")
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs), where
        for index, pair in enumerate(zip(ours, theirs, strict=True)):
            assert_equal(*pair, f"{where}[{index}]")
    elif isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs), where
    else:
        assert ours == theirs, where


def assert_same_run(ours: Path, theirs: Path) -> None:
    """Weights, optimiser, generators, history, and every figure of the report."""
    names = {path.name for path in (theirs / "checkpoints").iterdir()}
    assert {path.name for path in (ours / "checkpoints").iterdir()} == names
    for name in names:
        pair = [checkpoint.load(out / "checkpoints" / name) for out in (ours, theirs)]
        assert_equal(*pair, name)
    reports = [json.loads((out / "report.json").read_text()) for out in (ours, theirs)]
    for values in reports:
        del values["step"]
    assert_equal(*reports, "report")


# --- A run ---------------------------------------------------------------------------------------


def test_all_networks_write_every_artefact(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "runs" / "digits"
    assert cli.main([*SMALL, "--epochs", "2", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    for name in report.FILES:
        assert (out / name).stat().st_size > 0
    for name in ("curves.png", "reliability.png", "rejection.png", "entropy.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    expected = stages(Settings())
    assert [stage.name for stage in expected] == [
        *("bayesian", "deterministic", "map", "elbo", "held-out-bayesian", "held-out-deterministic")
    ]
    for stage in expected:
        lines = [line for line in text.splitlines() if line.startswith(f"{stage.name} ")]
        assert len(lines) == 2  # one per epoch
        assert all(word in lines[0] for word in ("loss", "nll", "kl", "validation accuracy", " s"))
        assert checkpoint.load(out / "checkpoints" / f"{stage.name}.pt")["epoch"] == 2
    assert "KL weight (--beta) 0.1: only 1 is the ELBO" in text
    assert (out / "report.txt").read_text() in text
    values = json.loads((out / "report.json").read_text())
    assert values["networks"].keys() == {"bayesian", "deterministic", "map", "elbo"}
    assert values["networks"]["bayesian"]["test"].keys() == {"0", "0.1", "0.2", "0.3", "0.4", "0.5"}
    assert values["held_out"]["classes"] == ["8", "9"]
    assert len(values["held_out"]["networks"]) == 2
    assert values["noise_ratio_to_deterministic"]["deterministic"]["nll"] > 0
    for name in ("bayesian", "deterministic", "unfused", "to_deterministic", "to_unfused"):
        low, middle, high = values["step"][name]
        assert 0 < low <= middle <= high


def test_the_bayesian_network_learns() -> None:
    """A fifth of the default epochs are enough for nine of ten validation images."""
    torch.set_num_threads(1)
    settings = Settings(epochs=12)
    found = data.load("digits")
    run = loop.start(stages(settings)[0], settings, found)
    for epoch in range(settings.epochs):
        run.epoch = epoch
        row = loop.train_epoch(run, found.train, lambda _: None)
    assert loop.validation_accuracy(run, found.validation) >= 0.9
    assert row["nll"] < 0.3


@pytest.mark.parametrize("name", NETWORKS[:4])
def test_loss_is_mean_nll_plus_weighted_kl(name: str) -> None:
    settings = Settings(networks=(name,), channels=(4,), hidden=8, beta=0.3, prior_scale=0.5)
    (stage,) = stages(settings)
    found = data.load("digits")
    run = loop.start(stage, settings, found)
    images, labels = found.train.batch(slice(0, 16))
    loss, nll, kl = loop.loss_terms(stage, settings, run.model, images, labels, 1000)
    torch.testing.assert_close(kl, fb.kl_loss(run.model))
    expected = nll + stage.beta * kl / 1000
    if name == "map":
        prior = torch.distributions.Normal(0.0, 0.5)
        weights = [m.weight for m in run.model.modules() if hasattr(m, "weight")]
        constant = prior.log_prob(torch.zeros(()))
        penalty = sum((constant - prior.log_prob(w)).sum() for w in weights)
        expected = nll + 0.3 * penalty / 1000
    torch.testing.assert_close(loss, expected)
    assert stage.beta == {"elbo": 1.0, "deterministic": 0.0}.get(name, 0.3)


def test_a_run_that_is_there_is_kept(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    one = [*SMALL, "--epochs", "1", "--networks", "deterministic", "--out", str(out)]
    for seed in ("1", "2", "3"):
        assert cli.main([*one, "--seed", seed]) == 0
    seeds = [
        json.loads((tmp_path / name / "settings.json").read_text())["seed"]
        for name in ("out.1", "out.2", "out")
    ]
    assert seeds == [1, 2, 3]


# --- Resuming ------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop_at", [5, 27, 18 * 3 + 40], ids=["first", "second", "other network"])
def test_resuming_after_an_interrupt_is_bit_for_bit(
    stop_at: int, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stopped in the middle of an epoch: 18 steps each, 3 epochs, two networks."""
    out, taken = tmp_path / "out", 0

    def interrupted(*args: Any) -> Any:
        nonlocal taken
        taken += 1
        if taken == stop_at:
            raise KeyboardInterrupt
        return step(*args)

    step = loop.train_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", interrupted)
        assert cli.main([*TWO, "--out", str(out)]) == 130
    message = capsys.readouterr().err
    assert f"continue with: python -m fastbconv train --resume --out {out}" in message
    torch.manual_seed(99)  # the generators of the new process are anywhere
    np.random.seed(99)  # noqa: NPY002
    random.seed(99)
    assert cli.main(["--resume", "--out", str(out)]) == 0
    assert_same_run(out, whole)


def test_resuming_after_a_kill_is_bit_for_bit(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "fastbconv", "train", *TWO, "--out", str(out)]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}
    ) as process:
        for line in process.stdout:
            if " epoch " in line:
                process.send_signal(signal.SIGKILL)
                break
        process.stdout.read()
    assert process.returncode == -signal.SIGKILL
    assert not (out / "report.json").exists()
    assert checkpoint.load(out / "checkpoints" / "bayesian.pt")["epoch"] >= 1
    assert cli.main(["--resume", "--out", str(out)]) == 0
    assert_same_run(out, whole)


def test_resuming_a_finished_run_reports_again(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for path in ("settings.json", "checkpoints/bayesian.pt", "checkpoints/deterministic.pt"):
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        (out / path).write_bytes((whole / path).read_bytes())
    # What a process leaves that is killed while it writes a checkpoint.
    (out / "checkpoints" / ".bayesian.pt.123.tmp").write_bytes(b"half of it")
    assert cli.main(["--resume", "--out", str(out), "--epochs", "3"]) == 0
    assert_same_run(out, whole)


def test_kl_weight_one_is_trained_once() -> None:
    names = [stage.name for stage in stages(Settings(beta=1.0))]
    assert names[:3] == ["bayesian", "deterministic", "map"]
    assert "elbo" not in names
    assert [s.name for s in stages(Settings(beta=1.0, networks=("elbo",)))] == ["elbo"]


def test_generators_come_back() -> None:
    state = checkpoint.generators()
    first = (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random())  # noqa: NPY002
    checkpoint.restore_generators(state)
    second = (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random())  # noqa: NPY002
    assert first == second


def test_writing_is_all_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    checkpoint.write_text(path, "former")

    def half(file: Any) -> None:
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        checkpoint.write_atomically(path, half)
    assert path.read_text() == "former"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


# --- What is damaged or does not fit -------------------------------------------------------------


class Evil:
    """Runs a command where it is unpickled."""

    def __reduce__(self) -> tuple:
        return os.system, ("echo ran > /dev/null",)


def flip(path: Path) -> None:
    """One bit in the middle of the largest stored tensor."""
    with zipfile.ZipFile(path) as archive:
        entry = max(archive.infolist(), key=lambda info: info.file_size)
    content = bytearray(path.read_bytes())
    content[entry.header_offset + 200 + entry.file_size // 2] ^= 1
    path.write_bytes(bytes(content))


def other_settings(path: Path) -> None:
    content = checkpoint.load(path)
    content["settings"]["seed"] = 5
    torch.save(content, path)


def other_shapes(path: Path) -> None:
    content = checkpoint.load(path)
    content["model"]["last.weight"] = torch.zeros(3)
    torch.save(content, path)


DAMAGE = {
    "cut": (lambda p: p.write_bytes(p.read_bytes()[:-2000]), "damaged or another file"),
    "empty": (lambda p: p.write_bytes(b""), "damaged or another file"),
    "bit": (flip, "wrong checksum"),
    "text": (lambda p: p.write_text("weights"), "damaged or another file"),
    "code": (lambda p: torch.save({"format": Evil()}, p), "damaged or another file"),
    "pickle": (lambda p: p.write_bytes(pickle.dumps(Evil())), "damaged or another file"),
    "other": (lambda p: torch.save({"epoch": 1}, p), "checkpoint of this version"),
    "settings": (other_settings, "settings of this run"),
    "shapes": (other_shapes, "expected the state of 'bayesian'"),
}


def copy_run(source: Path, target: Path) -> Path:
    (target / "checkpoints").mkdir(parents=True)
    for name in ("settings.json", "checkpoints/bayesian.pt"):
        (target / name).write_bytes((source / name).read_bytes())
    return target


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_gets_one_sentence(
    kind: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = copy_run(whole, tmp_path / "out")
    damage, says = DAMAGE[kind]
    damage(out / "checkpoints" / "bayesian.pt")
    before = (out / "checkpoints" / "bayesian.pt").read_bytes()
    assert cli.main(["--resume", "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert "bayesian.pt: expected" in error
    assert error.count("\n") == 1
    assert (out / "checkpoints" / "bayesian.pt").read_bytes() == before


def no_run(out: Path) -> list[str]:
    (out / "settings.json").unlink()
    return []


def damaged_settings(out: Path) -> list[str]:
    (out / "settings.json").write_text("{")
    return []


def unknown_settings(out: Path) -> list[str]:
    (out / "settings.json").write_text('{"epoch": 3}')
    return []


REFUSED: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "no run": (no_run, "--resume: expected a run in"),
    "damaged settings": (damaged_settings, "settings.json: expected the settings of a run"),
    "unknown settings": (unknown_settings, "another batch_size"),
    "other epochs": (lambda _: ["--epochs", "4"], "--epochs: expected 3, with which"),
    "other channels": (lambda _: ["--channels", "9"], "--channels: expected (4, 6)"),
    "other networks": (lambda _: ["--networks", "elbo"], "--networks: expected ('bayesian'"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_resuming_what_does_not_fit(
    kind: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = copy_run(whole, tmp_path / "out")
    change, says = REFUSED[kind]
    assert cli.main(["--resume", "--out", str(out), *change(out)]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_out_that_is_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").write_text("x")
    assert cli.main([*TWO, "--out", str(tmp_path / "out")]) == 2
    assert "expected a folder, got a file" in capsys.readouterr().err


def test_a_loss_that_is_not_finite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*SMALL, "--epochs", "2", "--networks", "deterministic", "--lr", "1e30"]
    assert cli.main([*arguments, "--out", str(tmp_path / "out")]) == 2
    assert "expected a finite loss, got" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--epochs", "0"],
        ["--epochs", "two"],
        ["--lr", "0"],
        ["--lr", "inf"],
        ["--beta", "-1"],
        ["--beta", "nan"],
        ["--seed", "-1"],
        ["--networks", "resnet"],
        ["--device", "tpu"],
        ["--unknown"],
    ],
    ids=" ".join,
)
def test_bad_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        cli.main(arguments)
    assert raised.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_help_shows_every_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        cli.main(["--help"])
    text = capsys.readouterr().out
    assert raised.value.code == 0
    assert "only 1 is the ELBO" in " ".join(text.split())
    assert text.count("(default") == 17  # every option but --help and --resume


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    import filelock

    settings, found = cli._fresh({})
    assert (settings.threads, settings.channels) == (1, (32, 64))
    assert found.image_shape == (1, 8, 8)
    with filelock.FileLock(tmp_path / ".out.lock"), pytest.raises(TrainError, match="no other run"):
        cli._run({}, tmp_path / "out", False)
