"""The command line of the main job: arguments, the run's folder, the order of things."""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from . import checkpoint, data, device, loop, processes, report
from .processes import Processes
from .settings import NETWORKS, Settings, Stage, TrainError, stages

SETTINGS_FILE = "settings.json"
_DEFAULTS = Settings()
_LARGE = 16  # height or width beyond which a step is work: a third convolution, more threads


def _number(
    kind: type, low: float, high: float = math.inf, *, above: bool = False
) -> Callable[[str], Any]:
    """An argparse type: a number in [low, high], or above low."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low < value if above else low <= value) or not value <= high or math.isinf(value):
            word = "an integer" if kind is int else "a number"
            limits = f"above {low}" if above else f"of {low} or more"
            if math.isfinite(high):
                limits += f", at most {high}"
            raise argparse.ArgumentTypeError(f"expected {word} {limits}, got {text!r}")
        return value

    return parse


def _device(text: str) -> str:
    try:
        return device.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _add_settings(parser: argparse.ArgumentParser) -> None:
    """The fields of Settings as options; absent unless given, so that --resume sees what was."""

    def setting(flag: str, text: str, default: str | None = None, **options: Any) -> None:
        name = flag[2:].replace("-", "_")
        shown = getattr(_DEFAULTS, name) if default is None else default
        help_text = f"{text} (default: {shown})"
        parser.add_argument(flag, default=argparse.SUPPRESS, help=help_text, **options)

    positive, count = _number(float, 0.0, above=True), _number(int, 1)
    setting(
        "--data",
        "'digits', or a folder with CIFAR-10 (binary or python), IDX files ((Fashion-)MNIST, "
        "also .gz), or one folder of images per class",
    )
    setting(
        "--image-size",
        "height and width that a folder of images is scaled to",
        "as they are",
        nargs=2,
        type=count,
        metavar=("H", "W"),
    )
    setting(
        "--networks",
        f"what to train, of: {', '.join(NETWORKS)}",
        "all",
        nargs="+",
        choices=NETWORKS,
        metavar="NAME",
    )
    setting("--epochs", "passes over the training images", type=count)
    setting("--batch-size", "images per step", type=count)
    setting("--lr", "first learning rate; falls to zero along a cosine", type=positive)
    setting(
        "--beta",
        "KL weight: loss = mean NLL + beta * KL / training images; only 1 is the ELBO",
        type=_number(float, 0.0),
    )
    setting("--prior-scale", "standard deviation of the weights' normal prior", type=positive)
    setting(
        "--initial-scale",
        "first standard deviation of the weights, times 1 / sqrt(fan-in)",
        type=positive,
    )
    setting("--channels", "filters per convolution", "32 64; 32 64 128", nargs="+", type=count)
    setting("--hidden", "units of the dense layer before the last", type=count)
    setting("--seed", "of weights, order and noise; not of the split", type=_number(int, 0, 10**9))
    setting("--num-samples", "Monte Carlo samples per prediction of the report", type=count)
    setting(
        "--threads",
        "threads of torch",
        f"1 for images of up to {_LARGE} pixels, whose steps are too short to share; else "
        f"torch's, {torch.get_num_threads()}",
        type=count,
    )
    setting(
        "--device",
        "what computes: cpu, cuda, or one GPU as in cuda:1; under torchrun cuda gives every "
        "process the GPU of its number",
        type=_device,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fastbconv train",
        description="Trains a Bayesian convolutional network and what it is compared with: the "
        "deterministic network trained alike, that with the prior as weight decay, KL weight 1, "
        "and both kinds without two classes. Reports accuracy, NLL, calibration and entropy on "
        "clean and noisy test images, and the cost of a step. Under torchrun "
        "(torchrun --nproc-per-node 2 -m fastbconv train) every process takes its share of each "
        "batch.",
    )
    _add_settings(parser)
    parser.add_argument(
        "--shared-noise",
        action="store_true",
        default=argparse.SUPPRESS,
        help="the processes of torchrun draw the same weights, so that the run has the numbers of "
        "one process up to rounding (default: draws of their own, several for each batch)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for checkpoints, report and plots; a run that is there already is kept under "
        "another name (default: runs/digits, runs/<name of the data>)",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue the run in --out after its last whole epoch, as if it had not stopped",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the main job.

    Args:
        argv: arguments; None: those of the process.

    Returns:
        0: done; 1: the disk failed; 2: something to put right, said in one sentence on stderr;
        130: interrupted, to be continued with --resume.
    """
    given = vars(_parser().parse_args(argv))
    out, resuming = given.pop("out"), given.pop("resume")
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    if given.get("data", "digits") != "digits":
        given["data"] = str(Path(given["data"]).resolve())
    if out is None:
        out = Path("runs") / (Path(given.get("data", "digits")).name or "data")
    with processes.started() as ours:
        status = _status_of(given, out, resuming, ours)
    if ours.count > 1:
        processes.leave(status)
    return status


def _status_of(given: dict[str, Any], out: Path, resuming: bool, ours: Processes) -> int:
    try:
        _run(given, out, resuming, ours)
    except TrainError as error:
        return _failed(ours, 2, str(error))
    except OSError as error:
        return _failed(ours, 1, str(error))
    except KeyboardInterrupt:
        command = f"python -m fastbconv train --resume --out {shlex.quote(str(out))}"
        saved = (out / SETTINGS_FILE).exists()
        advice = f"every epoch with a result line is saved; continue with: {command}"
        return _failed(ours, 130, f"interrupted; {advice if saved else 'nothing was begun'}")
    return 0


def _failed(ours: Processes, status: int, problem: str) -> int:
    if ours.is_first:
        line = "\n" if status == 130 else ""  # behind what the terminal shows of Control-C
        print(f"{line}fastbconv train: {problem}", file=sys.stderr)
    return status


def _run(
    given: dict[str, Any], out: Path, resuming: bool, ours: Processes = processes.ALONE
) -> None:
    import filelock

    began = time.perf_counter()
    if out.exists() and not out.is_dir():
        raise TrainError(f"--out {out}: expected a folder, got a file")
    settings, found = _resumed(given, out, ours) if resuming else _fresh(given, ours)
    device.find(settings.device, ours.count)
    lock = filelock.FileLock(out.parent / f".{out.name}.lock", timeout=0)

    def claim() -> None:
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except filelock.Timeout:
            raise TrainError(f"--out {out}: expected no other run at work there, got one") from None
        _begin(settings, found, out, resuming)

    try:
        ours.first(claim)
        with processes.noise(settings.shared_noise):
            _train_and_report(settings, found, out, resuming, ours)
    finally:
        lock.release()
    if ours.is_first:
        _say(f"saved in {out} ({', '.join(report.FILES)}, checkpoints)")
        _say(f"{time.perf_counter() - began:.0f} s in all")


def _begin(settings: Settings, found: data.Dataset, out: Path, resuming: bool) -> None:
    """Makes the folder ready, alone in it, and says what will be done."""
    if resuming:
        checkpoint.remove_leftovers(out)
    else:
        _keep_former(out)
        checkpoint.write_json(out / SETTINGS_FILE, settings.to_dict())
    _say(found.describe())
    kl = "the ELBO" if settings.beta == 1 else "only 1 is the ELBO"
    _say(f"KL weight (--beta) {settings.beta:g}: {kl}")
    if settings.processes > 1:
        noise = "the same noise" if settings.shared_noise else "noise of their own"
        _say(f"{settings.processes} processes with {noise}")


def _train_and_report(
    settings: Settings, found: data.Dataset, out: Path, resuming: bool, ours: Processes
) -> None:
    torch.set_num_threads(settings.threads)
    runs = [
        _train(stage, settings, found, out / "checkpoints" / f"{stage.name}.pt", resuming, ours)
        for stage in _possible(stages(settings), found, ours)
    ]

    def measure() -> None:
        _say("measuring on the test images")
        _say("\n" + report.write(report.measure(settings, found, runs), out))

    ours.first(measure)


def _train(
    stage: Stage,
    settings: Settings,
    found: data.Dataset,
    path: Path,
    resuming: bool,
    ours: Processes,
) -> loop.Run:
    """One network, to its last epoch."""
    own = found.without_held_out() if stage.kept_only else found
    run = loop.start(stage, settings, own, ours)
    if resuming and path.exists():
        loop.resume(run, path)
        if ours.is_first:
            _say(f"{stage.name}: {run.epoch} of {settings.epochs} epochs are done")
    loop.train(run, own, path, _say)
    return run


def _possible(wanted: list[Stage], found: data.Dataset, ours: Processes) -> list[Stage]:
    if not found.held_out and any(stage.kept_only for stage in wanted):
        if ours.is_first:
            _say("no classes are held out: it takes four or more, the last two with test images")
        wanted = [stage for stage in wanted if not stage.kept_only]
    if not wanted:
        raise TrainError("--networks: expected one that this data set allows, got held-out only")
    return wanted


def _fresh(
    given: dict[str, Any], ours: Processes = processes.ALONE
) -> tuple[Settings, data.Dataset]:
    chosen = {**given, "processes": ours.count}
    if "networks" in chosen:
        chosen["networks"] = tuple(name for name in NETWORKS if name in chosen["networks"])
    found = data.load(chosen.get("data", _DEFAULTS.data), chosen.get("image_size"))
    large = max(found.image_shape[1:]) > _LARGE
    chosen.setdefault("channels", (32, 64, 128) if large else (32, 64))
    chosen.setdefault("threads", torch.get_num_threads() if large else 1)
    return Settings(**chosen), found


def _resumed(given: dict[str, Any], out: Path, ours: Processes) -> tuple[Settings, data.Dataset]:
    """The settings of the run in ``out``, which the arguments given may repeat but not change."""
    path = out / SETTINGS_FILE
    try:
        settings = Settings.from_dict(json.loads(path.read_text()))
    except FileNotFoundError:
        raise TrainError(
            f"--resume: expected a run in {out}, got no {SETTINGS_FILE} there"
        ) from None
    except (ValueError, AttributeError) as error:
        raise TrainError(
            f"{path}: expected the settings of a run, got a damaged file ({error})"
        ) from None
    if "networks" in given:
        given["networks"] = tuple(name for name in NETWORKS if name in given["networks"])
    settings = replace(settings, device=given.pop("device", settings.device))
    for name, value in given.items():
        if value != getattr(settings, name):
            flag = "--" + name.replace("_", "-")
            raise TrainError(
                f"{flag}: expected {getattr(settings, name)}, with which the run in {out} was "
                f"begun, got {value}; leave it out, or start afresh without --resume"
            )
    if settings.processes != ours.count:
        raise TrainError(
            f"--resume: expected {settings.processes} processes (torchrun --nproc-per-node), with "
            f"which the run in {out} was begun, got {ours.count}"
        )
    return settings, data.load(settings.data, settings.image_size)


def _keep_former(out: Path) -> None:
    """Moves a run that is there already out of the way."""
    if not (out / SETTINGS_FILE).exists():
        return
    number = 1
    while (kept := out.with_name(f"{out.name}.{number}")).exists():
        number += 1
    out.rename(kept)
    _say(f"the run that was in {out} is now in {kept}")


def _say(text: str) -> None:
    print(text, flush=True)
