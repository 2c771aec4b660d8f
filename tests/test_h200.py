"""The measuring script for GPUs, without one: a dry run, its file, its parent of processes, goals."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import h200
from gpu import (
    checks,
    clock,
    correctness,
    expected,
    goals,
    kernels,
    networks,
    process,
    report,
    shapes,
    stages,
    supervise,
    variants,
)
from gpu.record import STATUS, DeviceLost, Record
from gpu.stage import Bench, Item, NotAvailable, run_items

CPU = torch.device("cpu")


def bench_of(path: Path, seconds: float = 60.0, banned: tuple[str, ...] = ()) -> Bench:
    record = Record(path)
    record.begin("facts")
    deadline = time.monotonic() + seconds
    return Bench(clock.Clock(CPU), True, deadline, record, "facts", banned)


# --- the whole script -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory: pytest.TempPathFactory) -> dict:
    path = tmp_path_factory.mktemp("h200") / "dry.json"
    arguments = ["--device", "cpu", "--quick", "--in-process", "--out", str(path)]
    assert h200.main(arguments) == 0
    return json.loads(path.read_text())


def test_dry_run_has_every_stage_and_says_that_it_is_one(dry_run: dict) -> None:
    assert dry_run["format"] == 1
    assert dry_run["dry run"] is True
    assert list(dry_run["stages"]) == list(stages.STAGES)
    for stage in dry_run["stages"].values():
        assert {"commit", "dirty", "started", "status", "items"} <= stage.keys()
        assert "running" not in stage
        assert stage["items"]


def test_dry_run_runs_every_path(dry_run: dict) -> None:
    """What a CPU lacks may be missing, with its reason; nothing may fail."""
    for name, stage in dry_run["stages"].items():
        assert stage["status"] == "ok", (name, stage)
        for item, found in stage["items"].items():
            rows = {item: found, **found.get("variants", {})}
            for row, values in rows.items():
                where = f"{name}/{item}/{row}: {values.get('reason')} {values.get('traceback')}"
                assert values.get("status", "ok") in STATUS, where
                assert values.get("status") != "failed", where
                if values.get("status", "ok") != "ok":
                    assert values["reason"], where


def test_dry_run_times_ours_and_theirs(dry_run: dict) -> None:
    rows = dry_run["stages"]["models"]["items"]["resnet18 128 graph step"]["variants"]
    for name in ("det", "unfused", "fb", "fb-direct"):
        assert rows[name]["status"] == "ok"
        assert rows[name]["seconds"]["median"] > 0
        assert rows[name]["verdict"] in ("equal", "slower", "faster")
        assert {"ratio", "ratio_spread", "times ours"} <= rows[name].keys()
    kernel = dry_run["stages"]["kernels"]["items"]["sample 11M"]
    assert kernel["bytes"] == kernels.SAMPLE_BYTES * kernel["weights"]
    assert kernel["bytes_per_second"] > 0
    assert dry_run["stages"]["correctness"]["items"]["eps equals the CPU's"]["differ"] == 0


def test_dry_run_judges_no_goal(dry_run: dict) -> None:
    assert [goal["name"] for goal in dry_run["goals"]] == [f"G{n}" for n in range(1, 17)]
    assert {goal["status"] for goal in dry_run["goals"]} == {"not measured"}
    assert "predicted" not in json.dumps(dry_run["stages"])  # no prediction is for a CPU


def test_worker_process_and_merging(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """As a user runs it, one process per stage; --only leaves the other sections alone."""
    path = tmp_path / "file.json"
    path.write_text(json.dumps({"format": 1, "stages": {"models": {"status": "ok", "items": {}}}}))
    arguments = ["--device", "cpu", "--only", "facts", "--out", str(path), "--commit", "abc"]
    assert h200.main(arguments) == 0
    found = json.loads(path.read_text())
    assert set(found["stages"]) == {"models", "facts"}
    assert found["stages"]["facts"]["commit"] == "abc"
    assert found["stages"]["facts"]["items"]["copy"]["bytes_per_second"] > 0
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.json"]
    assert "DRY RUN" in capfd.readouterr().out


def test_arguments() -> None:
    assert h200.chosen("kernels,facts") == ["facts", "kernels"]
    with pytest.raises(SystemExit, match="--only"):
        h200.chosen("kernel")
    names = list(stages.STAGES)
    left = 480.0
    for name in names:  # nobody is left without time, and the whole is not exceeded
        seconds = left * h200.share(name, names)
        assert seconds > 10.0
        left -= seconds
    assert abs(left) < 1e-6


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert h200.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err


# --- items, and processes that break --------------------------------------------------------------


def test_items_are_recorded_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    bench = bench_of(path)
    seen = []

    def look(_: Bench) -> dict:
        seen.append(json.loads(path.read_text())["stages"]["facts"])
        return {"value": float("inf")}

    def fail(_: Bench) -> dict:
        raise ValueError("a reason")

    def lack(_: Bench) -> dict:
        raise NotAvailable("not here")

    listed = [Item("first", look), Item("second", fail), Item("third", lack), Item("fourth", look)]
    run_items(bench, listed)
    assert seen[0]["running"]["item"] == "first"
    assert list(seen[1]["items"]) == ["first", "second", "third"]
    items = json.loads(path.read_text())["stages"]["facts"]["items"]
    assert items["first"]["value"] == "inf"
    assert items["second"]["status"] == "failed"
    assert "ValueError: a reason" in items["second"]["traceback"]
    assert items["third"] == {"status": "not available", "reason": "not here"} | {
        "took": items["third"]["took"]
    }
    run_items(bench, [Item("second", look), Item("fifth", look)])  # what is recorded stays
    assert len(seen) == 3


def test_what_does_not_fit_is_recorded(tmp_path: Path) -> None:
    bench = bench_of(tmp_path / "file.json", seconds=1.0)
    run_items(bench, [Item("long", lambda _: {}, least=5.0)])
    item = bench.record.items("facts")["long"]
    assert item["status"] == "not measured"
    assert "5.0 needed" in item["reason"]


def test_parts_are_noted_and_banned(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    bench = bench_of(path, banned=("bad",))
    bench.item = "item"

    def note() -> dict | None:
        return json.loads(path.read_text())["stages"]["facts"].get("running")

    with bench.record.running("facts", "item", 9.0):
        with bench.part("good"):
            assert note()["part"] == "good"
        assert note()["part"] is None
        with pytest.raises(KeyError), bench.part("good"):
            raise KeyError
        assert note()["part"] is None
        with pytest.raises(NotAvailable, match="bad broke"), bench.part("bad"):
            pass
    assert note() is None
    bench.clock.alive = lambda: False
    with pytest.raises(DeviceLost), bench.part("good"):
        raise RuntimeError("illegal access")
    assert note()["part"] == "good"  # the parent reads what broke


WORKER = """
import json, os, sys, time
sys.path.insert(0, {folder!r})
from gpu.record import Record
record = Record({path!r})
section = record.stage("facts")
banned = sys.argv[1]
for name in ("one", "two", "three"):
    if name in section["items"]:
        continue
    if name == "two":
        with record.running("facts", name, 0.4, {part!r}):
            if banned != "bad":
                {fault}
    section["items"][name] = {{"status": "ok"}}
    record.save()
"""


@pytest.mark.parametrize("fault", ["time.sleep(60)", "os._exit(3)", "os.kill(os.getpid(), 11)"])
@pytest.mark.parametrize("part", ["bad", None])
def test_a_process_that_hangs_or_dies_costs_one_item(
    tmp_path: Path, fault: str, part: str | None
) -> None:
    path = tmp_path / "file.json"
    record = Record(path)
    record.begin("facts")
    record.save()
    folder = str(Path(h200.__file__).parent)
    code = WORKER.format(folder=folder, path=str(path), part=part, fault=fault)
    began = time.monotonic()
    supervise.supervise(
        path, "facts", 20.0, lambda left, banned: process.python("-c", code, "|".join(banned)), 0.05
    )
    assert time.monotonic() - began < 15.0
    section = json.loads(path.read_text())["stages"]["facts"]
    statuses = {name: item["status"] for name, item in section["items"].items()}
    bad = "ok" if part else "failed"  # with its part named, the item runs again without it
    assert statuses == {"one": "ok", "two": bad, "three": "ok"}
    assert section["status"] == "failed"
    assert ("broken" in section) == (part is not None)
    assert "running" not in section


def test_a_program_over_its_limit_is_interrupted(tmp_path: Path) -> None:
    assert process.run(process.python("-c", "print('done')"), 30.0) == process.Outcome(0, "done\n")
    code = "import time\ntry:\n time.sleep(60)\nexcept KeyboardInterrupt:\n print('asked')"
    cut = process.run(process.python("-c", code), 1.5)
    assert cut == process.Outcome(None, "asked\n")


def test_counts_of_a_test_run(tmp_path: Path) -> None:
    (tmp_path / "test_two.py").write_text("def test_a(): pass\ndef test_b(): assert 1 == 2\n")
    found = correctness.run_pytest(tmp_path, 60.0)
    assert (found["passed"], found["failed"], found["status"]) == (1, 1, "failed")
    assert found["failures"][0]["test"].endswith("test_b")
    assert "1 == 2" in found["failures"][0]["message"]


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
        assert layer.image_bytes / expected.COPY * 1e6 == pytest.approx(
            layer.hbm_us, rel=0.2, abs=0.15
        )
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


def row(seconds: float, det: float, ours: float) -> dict:
    quartiles = {"low": seconds, "median": seconds, "high": seconds}
    ratio = {name: value / det for name, value in quartiles.items()}
    return {
        "status": "ok",
        "seconds": quartiles,
        "ratio": ratio,
        "verdict": "slower",
        "times ours": seconds / ours,
    }


def filled(path: Path, ours: float) -> Record:
    """A record as a GPU would leave it; ours takes ``ours`` of the deterministic time."""
    record = Record(path)
    rows = {"det": 1.0, "unfused": 10.0, "bayesian-torch": 20.0, "fb": 2.0, "fb-grouped": ours}
    rows |= {"fb-direct": ours / 2, "compiled": 3.0}
    cells = {name: row(seconds, 1.0, ours) for name, seconds in rows.items()}
    networks_ = ("resnet18 128", "resnet18 512", "resnet50 64", "resnet50 256", "lenet 256")
    names = [
        f"{n} {m} {d}" for n in networks_ for m in ("graph", "eager") for d in ("forward", "step")
    ]
    items = {name: {"status": "ok", "variants": cells} for name in [*names, "compiled"]}
    record.begin("models").update(items=items, status="ok")
    ok = {"status": "ok"}
    record.begin("facts")["items"] = {
        "machine": {**ok, "device": "NVIDIA H200"},
        "copy": {**ok, "bytes_per_second": 4.3e12},
    }
    record.begin("kernels")["items"] = {
        "sample 11M": {**ok, "bytes_per_second": 3.5e12, "seconds": {"median": 3e-5}},
        "backward 11M": {**ok, "bytes_per_second": 3.0e12, "seconds": {"median": 6e-5}},
        "conv R18 128 128>128 @16": {**ok, "direct speed": 0.7},
        "conv R18 8 512>512 @4": {**ok, "direct speed": 1.5},
    }
    record.begin("correctness")["items"] = {"eps equals the CPU's": {**ok, "values": 10**8}}
    layers = {}
    for number in range(2):
        above = {"per example": 10.0, "materialised": 1e6}
        memory = {name: {**ok, "above det": value} for name, value in above.items()}
        layers[f"per example {number}"] = {**ok, "layers": 3, "variants": memory}
    record.begin("memory")["items"] = layers
    return record


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
    assert sum(line.startswith("G") for line in lines) == 16
