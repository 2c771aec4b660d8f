"""The benchmark: its clock, its statistics, its checks, and one tiny run. No time is judged."""

from __future__ import annotations

import csv
import gc
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastbconv import _native
from fastbconv.bench import check, cli, columns, memory, report, results, roofline, shapes
from fastbconv.bench import statistics as stats
from fastbconv.bench.columns import Column
from fastbconv.bench.problem import Problem, program
from fastbconv.bench.settings import Settings
from fastbconv.bench.shapes import SHAPES, Shape
from fastbconv.bench.timer import Effort, Samples, Usage, interleave
from fastbconv.bench.worker import summarise

TINY = Shape(2, 5, 3, 4, 3)
OWN = {"auto", "direct", "library", "on-access", "unfused-nchw", "unfused-nhwc"}


class FakeClock:
    """Time that passes only inside the calls."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def __call__(self) -> float:
        return self.now

    def call(self, name: str, seconds: float):
        def run() -> None:
            self.log.append(name)
            self.now += seconds

        return run


def still() -> Usage:
    return Usage(0, 0)


# --- timer ----------------------------------------------------------------------------------------


def test_timer_measures_each_call_alone() -> None:
    clock = FakeClock()
    calls = {"slow": clock.call("slow", 3.0), "fast": clock.call("fast", 0.5)}
    samples = interleave(
        calls,
        Effort(budget=0.0, turns=4, warm_up=2),
        between=clock.call("between", 100.0),
        clock=clock,
        usage=still,
    )
    assert samples["slow"].seconds == [3.0] * 4
    assert samples["fast"].seconds == [0.5] * 4
    assert clock.log.count("slow") == clock.log.count("fast") == 2 + 4
    assert clock.log[::2] == ["between"] * 12


def test_timer_takes_turns_in_a_changing_order() -> None:
    clock = FakeClock()
    names = ["a", "b", "c"]
    interleave({n: clock.call(n, 1.0) for n in names}, Effort(0.0, 20, 0), clock=clock, usage=still)
    turns = [clock.log[i : i + 3] for i in range(0, 60, 3)]
    assert all(sorted(turn) == names for turn in turns)
    assert {turn[0] for turn in turns} == set(names)


@pytest.mark.parametrize(("budget", "turns", "expected"), [(10.0, 3, 10), (1.0, 7, 7)])
def test_timer_goes_on_until_budget_and_turns_are_spent(
    budget: float, turns: int, expected: int
) -> None:
    clock = FakeClock()
    calls = {"one": clock.call("one", 1.5), "other": clock.call("other", 0.5)}
    samples = interleave(calls, Effort(budget, turns, 5), clock=clock, usage=still)
    assert len(samples["one"].seconds) == len(samples["other"].seconds) == expected


def test_timer_counts_faults_and_preemptions_and_restores_the_collector() -> None:
    readings = iter([Usage(0, 0), Usage(7, 0), Usage(7, 0), Usage(9, 2)])
    seen = []
    samples = interleave(
        {"one": lambda: seen.append(gc.isenabled())},
        Effort(0.0, 2, 0),
        clock=FakeClock(),
        usage=lambda: next(readings),
    )
    assert samples["one"].faults == [7, 2]
    assert samples["one"].preempted == [False, True]
    assert seen == [False, False]
    assert gc.isenabled()


def test_timer_drops_results_before_it_reads_the_clock() -> None:
    clock = FakeClock()

    class Costly:
        def __del__(self) -> None:
            clock.now += 2.0

    samples = interleave({"one": Costly}, Effort(0.0, 3, 1), clock=clock, usage=still)
    assert samples["one"].seconds == [2.0] * 3


# --- statistics -----------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 4, 15, 100])
def test_quartiles_are_numpys(count: int) -> None:
    values = np.random.default_rng(count).gamma(2.0, size=count)
    expected = np.percentile(values, [25, 50, 75])
    np.testing.assert_allclose(stats.quartiles(values.tolist()), expected, rtol=1e-12)


def test_ratios_are_taken_turn_by_turn() -> None:
    drift = np.linspace(1.0, 9.0, 50)  # a machine that slows down changes no ratio
    found = stats.ratios((0.5 * drift).tolist(), drift.tolist())
    np.testing.assert_allclose(found, [0.5, 0.5, 0.5], rtol=1e-12)
    with pytest.raises(ValueError, match="expected 2 of them"):
        stats.ratios([1.0], [1.0, 2.0])


def test_geometric_mean_is_numpys() -> None:
    values = np.random.default_rng(0).gamma(2.0, size=12)
    expected = float(np.exp(np.log(values).mean()))
    assert math.isclose(stats.geometric_mean(values.tolist()), expected, rel_tol=1e-12)
    with pytest.raises(ValueError, match="all positive"):
        stats.geometric_mean([1.0, 0.0])


def test_denominator_is_one_column_the_faster_deterministic_one() -> None:
    chosen = columns.select(["auto"], [])
    times = {"det-nchw": [2.0, 2.0, 0.1], "det-nhwc": [1.0, 1.0, 1.0], "auto": [0.5, 0.6, 0.7]}
    samples = {name: Samples(t, [0] * 3, [False] * 3) for name, t in times.items()}
    cells = {cell["column"]: cell for cell in summarise(samples, chosen)}
    assert {cell["base"] for cell in cells.values()} == {"det-nhwc"}
    assert cells["auto"]["ratio"] == 0.6
    assert cells["det-nhwc"]["ratio_low"] == cells["det-nhwc"]["ratio_high"] == 1.0


# --- rows, settings, memory -----------------------------------------------------------------------


def test_rows_are_named_by_number_text_or_extents() -> None:
    assert shapes.select([])[:12] == SHAPES
    assert len(SHAPES) == 12
    assert sum(shape.for_direct for shape in SHAPES) == 7
    assert shapes.select(["2", "64,32,3,64,3", "2,5,3,4,3"]) == (SHAPES[1], TINY)
    assert [str(s) for s in shapes.select(["512,512"])] == ["64,4,512,512,3", "16,7,512,512,3"]
    assert SHAPES[0].flops == 2 * 128 * 28 * 28 * 32 * 25
    for text in ("15", "0", "9,9,9", "2,5,3,4,2", "2,0,3,4,3", ""):
        with pytest.raises(ValueError, match=r"shapes: expected .*, got"):
            shapes.select([text])


def test_settings_survive_the_way_to_the_process() -> None:
    settings = Settings("user", (TINY,), ("auto",), ("step",), 1, Effort(0.5, 3, 1), True)
    assert Settings.parse(settings.dump()) == settings


def test_saved_bytes_leave_out_what_lives_anyway() -> None:
    x, w = torch.randn(8, 16).requires_grad_(), torch.randn(16, 4).requires_grad_()

    def exponential() -> tuple[torch.Tensor, ...]:
        return ((x @ w).exp(),)  # saves x, w and its own result

    def square_root_of_softplus() -> tuple[torch.Tensor, ...]:
        return (F.softplus(x @ w).sqrt(),)  # saves the product as well

    assert memory.saved_bytes(exponential, [x, w]) == 0
    assert memory.saved_bytes(square_root_of_softplus, [x, w]) == 8 * 4 * 4


def test_bounds_grow_with_what_they_count() -> None:
    compute, traffic, sampling = roofline.bound(
        Shape(2, 4, 8, 8, 3), roofline.Limits(1.0, 1.0, 1.0)
    )
    assert math.isclose(compute, 2e-9 * 2 * 16 * 8 * 8 * 9)
    assert math.isclose(traffic, 4e-9 * (2 * 16 * 16 + 2 * 576))
    assert sampling == 576.0


def test_peak_is_of_registers_with_every_thread() -> None:
    native = _native.load()
    assert native.multiply_add_rate(100) > 0.0
    with pytest.raises(ValueError, match="iterations: expected at least 1, got 0"):
        native.multiply_add_rate(0)
    peak = roofline.measure_peak(0.0)
    assert peak.gflops > 0.0
    assert peak.source == f"float32 multiply-adds on registers ({native.cpu_capability()})"


def test_peak_without_a_native_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "load", lambda: None)
    monkeypatch.setattr(roofline, "_MATRIX", 16)
    peak = roofline.measure_peak(0.0)
    assert peak.source == "a float32 matrix product"
    assert 0.0 < peak.gflops < float("inf")


# --- columns --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [TINY, Shape(1, 4, 16, 16, 1), Shape(3, 6, 1, 8, 5)], ids=str)
def test_columns_compute_the_layer(shape: Shape) -> None:
    assert check.check([shape], columns.select(["default"], [])) == (8, [])


@pytest.mark.parametrize("shape", [TINY, Shape(3, 1, 9, 8, 1), Shape(3, 6, 1, 8, 5)], ids=str)
def test_estimators_compute_the_layer(shape: Shape) -> None:
    names = [name for name, column in columns.COLUMNS.items() if column.group == "estimator"]
    assert check.check([shape], columns.select(names, [])) == (6, [])


@pytest.mark.parametrize("fault", ["output", "kl", "grad"])
def test_check_sees_a_wrong_result(fault: str) -> None:
    def build(problem: Problem):
        right = columns.COLUMNS["unfused-nchw"].build(problem)

        def layer(x, loc, rho, bias):
            scale = F.softplus(rho)
            weight = loc + scale * torch.randn_like(loc)
            if fault == "grad":
                weight = weight - (scale - scale.detach())  # the same value, another derivative
            output = F.relu(F.conv2d(x, weight, bias, padding=1))
            kl = (0.5 * (scale.square() + loc.square()) - scale.log() - 0.5).sum()
            if fault == "output":
                output = output + 1e-3
            return output, 1.001 * kl if fault == "kl" else kl

        return program(problem, layer, right.leaves, "nchw", right.eps)

    compared, wrong = check.check([TINY], [Column("broken", "", build, "peer")])
    assert compared == len(wrong) == 1
    assert f"{TINY} broken" in wrong[0]
    assert {"output": "forward: output", "kl": "forward: kl", "grad": "d rho"}[fault] in wrong[0]


def test_check_does_not_count_what_cannot_be_had() -> None:
    def absent(problem: Problem):
        raise NotImplementedError(f"no kernel for {problem.shape}")

    def failing(problem: Problem):
        raise RuntimeError(f"broken for {problem.shape}")

    said: list[str] = []
    pair = [Column("absent", "", absent, "peer"), Column("failing", "", failing, "peer")]
    assert check.check([TINY], pair, said.append) == (1, [f"{TINY} failing broken for {TINY}"])
    assert said[0] == f"not compared: {TINY} absent: no kernel for {TINY}"


def test_unknown_columns_are_named() -> None:
    with pytest.raises(ValueError, match=r"columns: expected some of .*auto.*, got fastest"):
        columns.select(["fastest"], [])
    names = [column.name for column in columns.select(["unfused-nchw"], [])]
    assert names == ["det-nchw", "det-nhwc", "unfused-nchw"]


def test_requests_that_make_no_sense_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--shapes", "99"], ["--columns", "fastest"], ["--threads", "0"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        assert stop.value.code == 2
        assert "expected" in capsys.readouterr().err


# --- the whole command ----------------------------------------------------------------------------


def test_command_measures_checks_and_writes(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--shapes", str(TINY), "--budget", "0.01", "--repeats", "3", "--check"]
    assert cli.main([*arguments, "--out", str(tmp_path), "--name", "tiny"]) == 0
    said = capfd.readouterr().out
    assert "checked: 8 of 8 cells agree with float64, 0 are wrong, 0 cannot be had" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny.csv", "tiny.json", "tiny.png"]

    content = json.loads((tmp_path / "tiny.json").read_text())
    cells = content["cells"]
    modes = set(content["modes"])
    assert modes == ({"user", "recycled"} if memory.can_recycle() else {"user"})
    for mode in modes:
        for direction in ("forward", "step"):
            found = {
                c["column"]: c for c in cells if (c["mode"], c["direction"]) == (mode, direction)
            }
            assert found.keys() == OWN | {"det-nchw", "det-nhwc"}
            for cell in found.values():
                assert cell["shape"] == str(TINY)
                assert cell["turns"] >= 3
                assert 0.0 < cell["ratio_low"] <= cell["ratio"] <= cell["ratio_high"]
                assert 0.0 < cell["seconds_min"] <= cell["seconds_low"] <= cell["seconds"]
                assert cell["gflops"] > 0.0
                assert cell["peak_fraction"] > 0.0
    kept = {cell["column"]: cell["saved_weights"] for cell in cells}
    assert kept["det-nhwc"] == 0.0
    assert kept["unfused-nhwc"] >= 3.0
    assert kept["auto"] < 1.0, "a tensor of the size of the weight was kept"
    assert {mean["column"] for mean in content["means"]} >= {"auto", "direct", "unfused"}
    environment = content["environment"]
    for name in ("processor", "torch", "threads", "load average before", "multiply-add peak"):
        assert environment[name]

    lines = (tmp_path / "tiny.csv").read_text().splitlines()
    rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    assert len(rows) == len(cells)
    assert tuple(rows[0]) == results.FIELDS
    assert all(float(row["ratio"]) > 0.0 for row in rows)
    assert (tmp_path / "tiny.png").read_bytes().startswith(b"\x89PNG")
    for column in OWN:
        assert re.search(rf"geometric mean +{column} ", said)


def test_an_interrupted_file_gives_its_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "cells.jsonl"
    assert results.read_lines(path) == []
    path.write_text('{"column": "auto"}\n{"colu')
    assert results.read_lines(path) == [{"column": "auto"}]


def test_what_a_column_cannot_do_is_said() -> None:
    run = results.Run({}, {"user": ""}, {"det-nchw": "", "auto": "", "winograd2": ""})
    where = {"mode": "user", "shape": str(TINY), "direction": "forward"}
    samples = {name: Samples([1.0, 2.0], [0, 0], [False] * 2) for name in ("det-nchw", "auto")}
    cells = summarise(samples, columns.select(["auto"], []))
    cells = [{**where, "saved_bytes": 0, **cell} for cell in cells]
    run.add([*cells, {**where, "column": "winograd2", "absent": "no such kernel"}], peak=100.0)
    text = report.tables(run)
    assert f"{TINY} winograd2: no such kernel" in text
    assert "auto" in text
    assert json.loads(run.as_json())["cells"][2]["absent"] == "no such kernel"
