"""The GPU measuring script without a GPU: a dry run, its file, its processes."""

from __future__ import annotations

import json
import re
import signal
import time
from pathlib import Path

import h200
import pytest
import torch
from gpu import correctness, kernels, process, report, stages, supervise
from gpu.record import STATUS, DeviceLost, Record
from gpu.stage import Bench, Item, NotAvailable, run_items
from h200_support import bench_of, build_library

# --- the whole script -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory: pytest.TempPathFactory) -> dict:
    build_library()
    path = tmp_path_factory.mktemp("h200") / "dry.json"
    arguments = ["--device", "cpu", "--quick", "--in-process", "--out", str(path)]
    began = time.process_time()  # what others do on the machine does not count
    assert h200.main(arguments) == 0
    found = json.loads(path.read_text())
    return {**found, "cpu seconds": time.process_time() - began}


def test_dry_run_has_every_stage_and_says_that_it_is_one(dry_run: dict) -> None:
    assert dry_run["format"] == 1
    assert dry_run["dry run"] is True
    assert list(dry_run["stages"]) == list(stages.STAGES)
    for stage in dry_run["stages"].values():
        assert {"commit", "dirty", "started", "status", "items"} <= stage.keys()
        assert "running" not in stage
        assert stage["items"]
        statuses = {item["status"] for item in stage["items"].values()}
        assert "ok" not in {stage["status"], *statuses}
    assert '"ok"' not in json.dumps(dry_run["stages"])


def test_dry_run_says_what_it_did_instead(dry_run: dict) -> None:
    items = {
        name: item for stage in dry_run["stages"].values() for name, item in stage["items"].items()
    }
    assert items["eps equals the CPU's"]["instead"] == "the CPU against itself"
    assert items["graph auto"]["replays"] == 0
    assert "no graph" in items["graph direct"]["instead"]
    assert "unwatched" in items["memcheck"]["instead"]
    assert "none is asked for" in items["info"]["instead"]
    assert "batch 2" in items["resnet18 128 graph step"]["instead"]
    assert items["resnet18 128"]["status"] == "not measured"  # peaks, which a CPU does not count
    done = {name for name, item in items.items() if item["status"] == "dry run"}
    assert all("instead" in items[name] for name in done - {"machine"}), done


def test_table_of_a_dry_run_has_no_figures(dry_run: dict, tmp_path: Path) -> None:
    record = Record(tmp_path / "file.json")
    record.data = dry_run
    body = report.table(record).split("\nG1 ")[0]
    assert "DRY RUN" in body
    assert not re.search(r"\d (ms|us|s|[GT]B/s|TFLOP/s)\b|x det", body), body


def test_dry_run_is_short_and_compiles_nothing(dry_run: dict) -> None:
    assert dry_run["cpu seconds"] < 40.0
    assert "compiling" not in dry_run["stages"]["build"]["items"]["build"]["said"]


def test_dry_run_runs_every_path(dry_run: dict) -> None:
    """What a CPU lacks may be missing, with its reason; nothing may fail."""
    for name, stage in dry_run["stages"].items():
        assert stage["status"] == "dry run", (name, stage)
        for item, found in stage["items"].items():
            rows = {item: found, **found.get("variants", {})}
            for row, values in rows.items():
                where = f"{name}/{item}/{row}: {values.get('reason')} {values.get('traceback')}"
                assert values["status"] in STATUS, where
                assert values["status"] != "failed", where
                if values["status"] != "dry run":
                    assert values["reason"], where


def test_dry_run_times_ours_and_theirs(dry_run: dict) -> None:
    rows = dry_run["stages"]["models"]["items"]["resnet18 128 graph step"]["variants"]
    for name in ("det", "unfused", "fb", "fb-direct"):
        assert rows[name]["status"] == "dry run"
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
    output = capfd.readouterr().out
    assert "DRY RUN" in output
    assert f"written: {path}" in output
    assert "(at most " in output


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


def test_no_gpu_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert h200.main([]) == 2
    error = capsys.readouterr().err
    assert "no CUDA device: " in error
    if torch.version.cuda is None:
        assert "built without CUDA" in error
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    assert "sees no GPU" in h200.no_device()

    def old() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old\nmore")

    monkeypatch.setattr(torch.cuda, "init", old)
    assert h200.no_device().endswith("driver on your system is too old")
    with pytest.raises(SystemExit, match="--only"):  # the names first
        h200.main(["--only", "foo"])


def test_where_the_file_cannot_be_is_said_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(h200, "run", lambda *_: pytest.fail("it measured"))
    cpu = ["--device", "cpu", "--only", "facts", "--out"]
    assert h200.main([*cpu, str(tmp_path / "no" / "such" / "x.json")]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert h200.main([*cpu, str(tmp_path)]) == 2
    assert "expected a file" in capsys.readouterr().err
    path = tmp_path / "measured.json"
    path.write_text('{"format": 1, "dry run": false, "stages": {}}')
    assert h200.main([*cpu, str(path)]) == 2
    assert "do not mix" in capsys.readouterr().err
    options = h200.parser().parse_args([*cpu, str(tmp_path / "new" / "x.json")])
    assert h200.refusal(options) is None  # the folder is made


def test_check_that_judged_nothing_is_not_passed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = Record(tmp_path / "file.json")
    record.data["goals"] = [{"name": "G1", "status": "met"}, {"name": "G2", "status": "met"}]
    assert h200.verdict(record, True) == 0
    record.data["goals"][1]["status"] = "not measured"
    assert h200.verdict(record, False) == 0
    assert capsys.readouterr().out == ""
    assert h200.verdict(record, True) == 3
    assert "1 of 2 goals not measured: G2" in capsys.readouterr().out
    record.data["goals"][0]["status"] = "missed"
    assert h200.verdict(record, True) == 1
    assert "missed: G1" in capsys.readouterr().out


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
from pathlib import Path
sys.path.insert(0, {folder!r})
from gpu.record import Record
record = Record(Path({path!r}))
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


def test_a_stage_over_its_time_is_ended(tmp_path: Path) -> None:
    """What still ran was not measured; the worker that follows says so of the rest."""
    path = tmp_path / "file.json"
    record = Record(path)
    record.begin("facts")
    record.save()
    folder = str(Path(h200.__file__).parent)
    code = WORKER.format(folder=folder, path=str(path), part=None, fault="time.sleep(60)")
    code = code.replace("0.4", "50.0")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(supervise, "GRACE", 1.0)
        supervise.supervise(
            path, "facts", 0.5, lambda left, banned: process.python("-c", code, "bad"[left > 0 :])
        )
    items = Record(path).items("facts")
    assert items["two"] == {"status": "not measured", "reason": supervise.OVER}
    assert Record(path).data["stages"]["facts"]["status"] != "failed"


def test_a_program_over_its_limit_is_interrupted(tmp_path: Path) -> None:
    assert process.run(process.python("-c", "print('done')"), 30.0) == process.Outcome(0, "done\n")
    code = "import time\ntry:\n time.sleep(60)\nexcept KeyboardInterrupt:\n print('asked')"
    for ours in (signal.default_int_handler, signal.SIG_IGN):  # in front, and in the background
        former = signal.signal(signal.SIGINT, ours)
        try:
            cut = process.run(process.python("-c", code), 1.5)
        finally:
            signal.signal(signal.SIGINT, former)
        assert cut == process.Outcome(None, "asked\n")


def test_counts_of_a_test_run(tmp_path: Path) -> None:
    (tmp_path / "test_two.py").write_text("def test_a(): pass\ndef test_b(): assert 1 == 2\n")
    found = correctness.run_pytest(tmp_path, 60.0)
    assert (found["passed"], found["failed"], found["status"]) == (1, 1, "failed")
    assert found["failures"][0]["test"].endswith("test_b")
    assert "1 == 2" in found["failures"][0]["message"]
