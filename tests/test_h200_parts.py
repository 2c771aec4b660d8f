"""The GPU measuring script, part by part: clock, checks, networks, predictions, goals, table."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch
from gpu import (
    checks,
    clock,
    correctness,
    expected,
    facts,
    goals,
    kernels,
    networks,
    report,
    shapes,
    variants,
)
from gpu.stage import NotAvailable, outcome
from h200_support import CPU, bench_of, build_library, filled


@pytest.fixture(scope="module", autouse=True)
def _library() -> None:
    build_library()


# --- clock and statistics -------------------------------------------------------------------------


def test_variants_take_turns_and_equal_is_said() -> None:
    log: list[str] = []
    calls = {"det": lambda: log.append("det"), "other": lambda: log.append("other")}
    effort = clock.Effort(rounds=3, repeats=2, seconds=0.0)
    times = clock.interleave(clock.Clock(CPU), calls, effort)
    assert [len(repeat) for repeat in times["det"]] == [3, 3]
    pairs = [set(log[-2 * n : len(log) - 2 * n + 2]) for n in range(1, 7)]
    assert all(pair == {"det", "other"} for pair in pairs)
    table = clock.summary(
        {"det": [[1.0, 1.0], [1.1, 1.1]], "a": [[1.05, 1.05], [1.1, 1.1]], "b": [[2, 2], [2, 2]]},
        "det",
    )
    assert [table[name]["verdict"] for name in ("det", "a", "b")] == ["equal", "equal", "slower"]
    assert table["b"]["ratio"]["median"] == pytest.approx(1.909, rel=1e-3)
    assert clock.copies(1e6) == clock.MOST_COPIES
    assert clock.copies(1e9) == 2


def test_sweep_times_all_copies() -> None:
    log: list[int] = []
    calls = [lambda n=n: log.append(n) for n in range(3)]
    found = clock.sweep(clock.Clock(CPU), calls, replays=4)
    assert (found["copies"], found["replays"]) == (3, 4)
    assert log[:6] == [0, 1, 2, 0, 1, 2]


def test_a_check_that_finds_a_difference_fails(tmp_path: Path) -> None:
    """The comparisons see a wrong element, a missing one, and noise that repeats."""
    right = torch.ones(4)
    assert checks.distance(right, right) == 0.0
    assert checks.distance(torch.tensor([1.0, 1.0, 1.0, float("nan")]), right) == float("inf")
    bench = bench_of(tmp_path / "file.json")
    shifted = checks.step

    def wrong(*arguments: object) -> tuple[torch.Tensor, ...]:
        output, *rest = shifted(*arguments)
        return (output * 1.5, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checks, "step", wrong)
        with pytest.raises(AssertionError, match="further than"):
            checks.against_float64(bench, "auto", torch.float32)
        patch.setattr(checks, "step", lambda *a: (torch.rand(3),) * 6)
        with pytest.raises(AssertionError, match="two runs differ"):
            checks.twice_the_same(bench, "auto")
        patch.setattr(checks, "step", lambda *a: (torch.ones(3),) * 6)
        with pytest.raises(AssertionError, match="same noise"):
            checks.replay(bench, "auto")


# --- what only a GPU has, by stand-ins ------------------------------------------------------------


class FakeCuda:
    """torch.cuda as far as the script uses it: a clock that each call moves on by a second."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.log: list[str] = []
        outer = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                self.time: float | None = None
                assert enable_timing

            def record(self) -> None:
                self.time = outer.now

            def synchronize(self) -> None:
                outer.log.append("wait")

            def elapsed_time(self, end: Event) -> float:
                return 1000.0 * (end.time - self.time)

        class Graph:
            def replay(self) -> None:
                outer.call()

        class Stream:
            def wait_stream(self, other: Stream) -> None:
                outer.log.append("order")

        fakes = {
            "Event": Event,
            "CUDAGraph": Graph,
            "Stream": Stream,
            "current_stream": Stream,
            "stream": lambda stream: contextlib.nullcontext(),
            "graph": lambda graph: contextlib.nullcontext(),
            "synchronize": lambda device: outer.log.append("wait"),
            "empty_cache": lambda: None,
            "reset_peak_memory_stats": lambda device: None,
            "memory_allocated": lambda device: 100,
            "max_memory_allocated": lambda device: 175,
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)

    def call(self) -> str:
        """Takes a second."""
        self.now += 1.0
        self.log.append("call")
        return "result"


def test_clock_uses_events_and_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCuda(monkeypatch)
    time_of = clock.Clock(torch.device("cuda", 0))
    assert time_of.block(fake.call, 4) == pytest.approx(1.0)
    assert fake.log[0] == "wait"  # an idle device first
    assert time_of.each(fake.call, 3) == pytest.approx([1.0, 1.0, 1.0])
    replay = time_of.capture(fake.call, warm_up=2)
    before = len(fake.log)
    assert replay() == "result"
    assert fake.log[before:] == ["call"]
    assert time_of.peak(fake.call) == 75
    found = clock.sweep(time_of, [fake.call, fake.call], replays=3)
    assert found["mode"] == "graph"
    assert found["seconds"]["median"] == pytest.approx(0.5)  # one replay, two calls in it
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        time_of.capture(fake.call)

    def broken(device: object) -> None:
        raise RuntimeError("illegal memory access")

    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    assert not time_of.alive()


def program(folder: Path, name: str, text: str) -> None:
    """A program of that name on PATH."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_tools_are_read_as_they_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    program(tmp_path, "nvidia-smi", "echo 'NVIDIA H200, 580.1, 345 MHz, 3201 MHz'")
    assert facts.smi()["clocks.mem"] == "3201 MHz"
    program(tmp_path, "nvidia-smi", "echo 'no devices'; exit 6")
    with pytest.raises(NotAvailable, match="no devices"):
        facts.smi()
    bench = bench_of(tmp_path / "file.json")
    bench.clock.cuda = True  # the tool is looked for; the target runs nothing here
    bench.kept["ours"] = None
    program(tmp_path, "compute-sanitizer", "echo done; echo '== ERROR SUMMARY: 0 errors'")
    found = correctness.sanitizer(bench, "memcheck")
    assert found == {"summary": ["== ERROR SUMMARY: 0 errors"], "watched": True}
    program(tmp_path, "compute-sanitizer", "echo done; echo '== ERROR SUMMARY: 1 error'; exit 9")
    with pytest.raises(RuntimeError, match="status 9"):
        correctness.sanitizer(bench, "racecheck")
    program(tmp_path, "compute-sanitizer", "echo 'Device not supported'; exit 1")
    with pytest.raises(NotAvailable, match="not supported"):
        correctness.sanitizer(bench, "racecheck")


def test_a_failed_build_is_tried_once(tmp_path: Path) -> None:
    bench = bench_of(tmp_path / "file.json")
    bench.record.begin("build")["items"]["build"] = {"status": "failed"}
    with pytest.raises(NotAvailable, match="could not be built"):
        bench.need_ours()


# --- networks, predictions, goals -----------------------------------------------------------------


def test_shapes_are_those_of_the_networks() -> None:
    """The lists of the kernel table against the networks, and the counts of the predictions."""
    for name, listed, millions in (
        ("resnet18", shapes.RESNET18, 11.2),
        ("resnet50", shapes.RESNET50, 23.5),
    ):
        with torch.device("meta"):
            network = networks.make(name, variants.PlainKit())
        found = [tuple(p.shape) for p in network.parameters() if p.ndim == 4]
        assert sorted(found) == sorted(listed)
        weights = sum(torch.Size(shape).numel() for shape in listed)
        assert weights == pytest.approx(millions * 1e6, rel=0.01)
    for layer in shapes.LAYERS:  # the floors that are written down
        assert layer.flop / expected.MATMUL * 1e6 == pytest.approx(layer.mma_us, rel=0.15, abs=0.06)
        moved = (layer.image_bytes + 2 * layer.weights) / expected.COPY * 1e6
        assert moved == pytest.approx(layer.hbm_us, rel=0.2, abs=0.15), layer.name
    for size, shape in kernels.SINGLE.items():
        assert torch.Size(shape).numel() == pytest.approx(float(size[:-1]) * 1e6, rel=0.06)


@pytest.mark.parametrize("name", ["lenet", "resnet18", "resnet50", "layer"])
def test_variants_compute_one_network(name: str, tmp_path: Path) -> None:
    """With negligible noise and the same parameters, all give the deterministic output."""
    bench = bench_of(tmp_path / "file.json")
    det = variants.build(bench, "det", name, 2)
    for other in ("unfused", "fb"):
        program = variants.build(bench, other, name, 2)
        parameters = dict(program.network.named_parameters())
        for key, value in det.network.named_parameters():
            parameters.pop(key).data.copy_(value)
        for rho in parameters.values():
            rho.data.fill_(-15.0)
        output, kl = program.forward()
        assert float(kl) > 0
        expected_output, none = det.forward()
        assert none is None
        assert checks.distance(output, expected_output) < 0.02
        program.step()
        assert all(p.grad is not None for p in program.network.parameters())


def test_predictions_are_compared() -> None:
    assert expected.compare(None, 1.0) == {}
    found = expected.compare(expected.Prediction(2.0, "arithmetic"), 2.5)
    assert found["flag"] is True
    assert found["miss"] == 0.25
    assert not expected.compare(expected.Prediction(2.0, "arithmetic"), 2.2)["flag"]
    assert all(found.source for found in expected.PREDICTED.values())
    fast, slow = (expected.conv_seconds(shapes.LAYERS[1], name) for name in ("det", "direct"))
    assert fast.value < slow.value


def test_goals_are_judged(tmp_path: Path) -> None:
    status = {g["name"]: g["status"] for g in goals.judge(filled(tmp_path / "a.json", 1.02))}
    unmeasured = {"G13", "G14"}
    assert {name for name, word in status.items() if word == "not measured"} == unmeasured
    assert {name for name, word in status.items() if word == "missed"} == {"G10"}
    record = filled(tmp_path / "b.json", 1.09)
    status = {g["name"]: g["status"] for g in goals.judge(record)}
    assert status["G1"] == "missed"  # the step's part of it
    assert status["G4"] == "met"
    record.data["stages"]["facts"]["items"]["machine"]["device"] = "NVIDIA H100"
    record.data["stages"]["facts"]["items"]["copy"]["bytes_per_second"] = 3.4e12
    status = {g["name"]: g["status"] for g in goals.judge(record)}
    assert status["G10"] == "met"  # 88 % of that card's copy, as 3.8 of 4.3 TB/s
    record.items("correctness")["eps equals the CPU's"] = {"status": "failed"}
    assert {g["name"]: g["status"] for g in goals.judge(record)}["G16"] == "missed"


def test_table_has_forty_lines_whatever_happens(tmp_path: Path) -> None:
    record = filled(tmp_path / "a.json", 1.02)
    record.data["goals"] = goals.judge(record)
    text = report.table(record)
    assert "G1  met" in text
    assert "resnet18 128 graph step: det" in text
    failed = {"status": "failed", "reason": "x" * 500}
    record.items("models").update({f"broken {n}": failed for n in range(50)})
    lines = report.table(record).splitlines()
    assert len(lines) <= report.LINES
    assert max(map(len, lines)) <= report.WIDTH
    assert any("more failures in the file" in line for line in lines)
    listed = [line for line in lines if line.startswith("G")]
    assert len(listed) == 16
    assert not any(line.endswith("...") for line in listed)


def test_table_names_what_was_left_out(tmp_path: Path) -> None:
    record = filled(tmp_path / "a.json", 1.02)
    record.data["goals"] = goals.judge(record)
    away = {"status": "not available", "reason": "nvidia-smi is not on PATH"}
    record.items("facts").update({"clocks before": away, "clocks after": away})
    text = report.table(record)
    assert "  facts: clocks before, clocks after: not available: nvidia-smi is not on PATH" in text
    reasons = {f"n{i}": {"status": "not measured", "reason": f"reason {i}"} for i in range(40)}
    record.items("memory").update(reasons)
    lines = report.table(record).splitlines()
    assert len(lines) <= report.LINES
    assert any(line.endswith("more not done, in the file") for line in lines)


def test_small_rates_are_not_rounded_to_zero(tmp_path: Path) -> None:
    record = filled(tmp_path / "a.json", 1.02)
    record.items("facts")["matmul"] = {"status": "ok", "flop_per_second": 3.2e10}
    assert "bf16 matmul 0.032 TFLOP/s" in report.table(record)


def test_an_item_without_a_variant_was_not_measured(tmp_path: Path) -> None:
    bench = bench_of(tmp_path / "file.json")
    done = {"status": "dry run"}
    none = {"status": "not measured", "reason": "a CPU does not count"}
    found = outcome(bench, lambda: {"variants": {"a": none, "b": none}})
    assert (found["status"], found["reason"]) == (
        "not measured",
        "no variant: a CPU does not count",
    )
    assert outcome(bench, lambda: {"variants": {"a": none, "b": done}})["status"] == "dry run"
