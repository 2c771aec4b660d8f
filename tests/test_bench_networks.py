"""Whole networks in the benchmark: rows, counts, columns, checks, one run. No time is judged."""

from __future__ import annotations

import csv
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fastbconv.bench import check, cli, columns, network_columns, networks, shapes
from fastbconv.bench.columns import COLUMNS, Column
from fastbconv.bench.network_columns import NetworkProblem, NetworkProgram
from fastbconv.bench.settings import Settings
from fastbconv.bench.shapes import NETWORK_ROWS, ROWS, SHAPES, NetworkRow, Shape
from fastbconv.testing import assert_close

LENET, TINY = NetworkRow("lenet5", 4), Shape(2, 5, 3, 4, 3)
OWN = [name for name in network_columns.BUILDS if name in COLUMNS]
OTHERS = [name for name in COLUMNS if name not in network_columns.BUILDS]


# --- rows -----------------------------------------------------------------------------------------


def test_networks_come_after_the_layers() -> None:
    assert shapes.select([]) == ROWS == (*SHAPES, *NETWORK_ROWS)
    assert shapes.select(["13", "lenet5", "lenet5@128"]) == (NetworkRow("lenet5", 128),)
    assert shapes.select(["resnet18", "resnet18@32"]) == (
        NetworkRow("resnet18", 64),
        NetworkRow("resnet18", 32),
    )
    for text in ("resnet18@0", "resnet18@many", "vgg16", "vgg16@8"):
        with pytest.raises(ValueError, match=r"shapes: expected .*, got"):
            shapes.select([text])


def test_networks_survive_the_way_to_the_process() -> None:
    settings = Settings("user", (TINY, LENET), ("auto",))
    assert Settings.parse(settings.dump()) == settings


def test_counts_of_lenet() -> None:
    first = 2 * 28 * 28 * 6 * 25
    forward = first + 2 * 10 * 10 * 16 * 150 + 2 * (400 * 120 + 120 * 84 + 84 * 10)
    assert LENET.weights == 150 + 2400 + 48000 + 10080 + 840
    assert LENET.flops == 4 * forward
    assert LENET.step_flops == 4 * (3 * forward - first)  # nobody wants the gradient of images
    assert LENET.largest == LENET.weights
    assert NetworkRow("lenet5", 128).largest == 128 * 6 * 28 * 28


def test_counts_of_resnet() -> None:
    row = NetworkRow("resnet18", 2)
    assert row.weights == 11_164_352
    assert 2 * row.flops == NetworkRow("resnet18", 4).flops
    assert 1.1e9 < row.flops // 2 < 1.12e9
    normalised = [
        m for m in networks.ResNet18(networks.Kit()).modules() if type(m) is nn.BatchNorm2d
    ]
    assert len(normalised) == 20


# --- columns --------------------------------------------------------------------------------------


def test_columns_compute_lenet() -> None:
    assert len(OWN) == 12
    chosen = [COLUMNS[name] for name in OWN]
    assert check.check([LENET], chosen) == (len(OWN), [])


def test_auto_computes_resnet() -> None:
    torch.set_num_threads(1)  # tensors are small: threads would wait for one another
    assert check.check([NetworkRow("resnet18", 2)], [COLUMNS["auto"]]) == (1, [])


@pytest.mark.parametrize("name", ["auto", "direct", "library", "flipout", "local", "unfused-nchw"])
def test_a_vanishing_scale_gives_the_deterministic_network(name: str) -> None:
    problem = NetworkProblem(LENET)
    for key, value in problem.state.items():
        if key.endswith("_rho"):
            value.fill_(-200.0)
    plain = problem.build(COLUMNS["det-nchw"]).step()
    bayes = problem.build(COLUMNS[name])
    result = bayes.step()
    # Ours keeps a floor of 2^-23, which moves a sum of 400 terms by some 1e-6.
    assert_close(result.output, plain.output, 1e-4, 1e-4)
    expected = problem.build(COLUMNS["det-nchw"])
    named = dict(zip(dict(expected.model.named_parameters()), plain.grads, strict=True))
    found = dict(zip(dict(bayes.model.named_parameters()), result.grads, strict=True))
    # The KL's own gradient, loc / n, is all that is added.
    for key, grad in named.items():
        own = problem.state[key] / 50_000 if f"{key}_rho" in found else 0.0
        assert_close(found[key] - own, grad, 1e-3, 1e-4, key)


@pytest.mark.parametrize("name", OWN)
def test_a_step_has_every_gradient_and_leaves_none(name: str) -> None:
    program = NetworkProblem(LENET).build(COLUMNS[name])
    result = program.step()
    parameters = list(program.model.parameters())
    assert len(result.grads) == len(parameters) == (10 if name.startswith("det") else 15)
    assert all(grad is not None for grad in result.grads)
    assert all(parameter.grad is None for parameter in parameters)
    assert (result.kl is None) == name.startswith("det")
    assert program.model.training


@pytest.mark.parametrize("fault", ["output", "kl", "parameters"])
def test_check_sees_a_wrong_result(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(problem: NetworkProblem) -> NetworkProgram:
        right = network_columns.BUILDS["auto"](problem)
        model = right.model

        def run(image: Tensor) -> tuple[Tensor, Tensor]:
            result = right.forward()
            output, kl = result.output, result.kl
            if fault == "output":
                output = output + 1e-3
            if fault == "parameters":  # the same value, another derivative
                output = output + 1e-3 * (model.fc3.bias - model.fc3.bias.detach())
            return output, 1.001 * kl if fault == "kl" else kl

        more = {"noise": right.noise, "scale_floor": right.scale_floor}
        return network_columns._program(problem, model, run, "nhwc", **more)

    monkeypatch.setitem(network_columns.BUILDS, "broken", build)
    compared, wrong = check.check([LENET], [Column("broken", "", None, "peer")])
    assert compared == len(wrong) == 1
    assert f"{LENET} broken" in wrong[0]
    said = {"output": "forward: output", "kl": "forward: kl", "parameters": "d fc3.bias"}
    assert said[fault] in wrong[0]


def test_what_does_not_exist_for_networks_says_why() -> None:
    said: list[str] = []
    chosen = [COLUMNS[name] for name in OTHERS]
    assert check.check([LENET], chosen, said.append) == (0, [])
    assert len(said) == len(OTHERS) + 1
    for name, text in zip(OTHERS, said, strict=False):
        start = f"not compared: {LENET} {name}: not available for networks: "
        assert text.startswith(start)
        assert len(text) > len(start)


def test_layers_and_networks_replay_the_same_estimators() -> None:
    names = ["flipout", "local"]
    assert check.check([TINY, LENET], columns.select(names, [])) == (8, [])


# --- the whole command ----------------------------------------------------------------------------


def test_command_reports_networks_apart(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["--shapes", "lenet5@2", str(TINY), "--columns", "auto", "winograd2"]
    arguments += ["--budget", "0.01", "--repeats", "3", "--modes", "user"]
    assert cli.main([*arguments, "--out", str(tmp_path), "--name", "nets"]) == 0
    said = capfd.readouterr().out
    assert "lenet5@2 winograd2: not available for networks: its kernels compute 3 x 3" in said

    assert said.index(f"\n{TINY} ") < said.index("\nlenet5@2 "), "networks come after the layers"
    content = json.loads((tmp_path / "nets.json").read_text())
    cells = {
        (cell["shape"], cell["direction"], cell["column"]): cell
        for cell in content["cells"]
        if "ratio" in cell
    }
    for direction in ("forward", "step"):
        find = partial(_mean, content["means"], direction)
        for column in ("auto", "det-nhwc"):
            assert find("all", column) == (1, cells[str(TINY), direction, column]["ratio"])
            assert find("networks", column) == (1, cells["lenet5@2", direction, column]["ratio"])
        assert find("all", "winograd2")[0] == 1
        assert find("networks", "winograd2") is None
        cell = cells["lenet5@2", direction, "auto"]
        assert cell["peak_fraction"] > 0.0
        assert cell["saved_weights"] > 0.0
    lines = (tmp_path / "nets.csv").read_text().splitlines()
    rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    assert {row["shape"] for row in rows} == {str(TINY), "lenet5@2"}
    assert (tmp_path / "nets.png").read_bytes().startswith(b"\x89PNG")


def _mean(means: list[dict], direction: str, rows: str, column: str) -> tuple[int, float] | None:
    for mean in means:
        if (mean["direction"], mean["rows"], mean["column"]) == (direction, rows, column):
            return mean["count"], pytest.approx(mean["ratio"])
    return None


def test_list_names_the_networks(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--list"]) == 0
    said = capsys.readouterr().out
    for row in NETWORK_ROWS:
        assert f"{row!s:<16} {row.flops * 1e-9:6.2f} GFLOP" in said
