"""The final report: measured once on the test images, printed, and saved as text and JSON."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import fastbconv as fb

from . import checkpoint, plots, steptime
from . import device as devices
from .data import Dataset
from .evaluate import NUM_BINS, Evaluation, HeldOut, evaluate, evaluate_held_out
from .loop import Run
from .settings import NOISE_STRENGTHS, Settings

SHOWN_STRENGTH = 0.4
PLOTS = ("curves.png", "reliability.png", "rejection.png", "entropy.png")
FILES = ("report.txt", "report.json", *PLOTS)


@dataclass(frozen=True)
class Results:
    """Everything measured.

    Attributes:
        evaluations: network -> its figures on the test images.
        held_out: network -> its figures on known and unknown classes; empty if not trained.
        steps: quartiles of step times and their ratios.
    """

    settings: Settings
    data: Dataset
    runs: list[Run]
    evaluations: dict[str, Evaluation]
    held_out: dict[str, HeldOut]
    steps: dict[str, steptime.Quartiles]


def measure(settings: Settings, data: Dataset, runs: list[Run]) -> Results:
    """Evaluates every trained network on the test images, and times the step."""
    evaluations, held_out = {}, {}
    # The functions of an evaluation: one key each, apart for runs with different seeds.
    seed = (settings.seed + 1) * 1_000_000
    for run in runs:
        arguments = (settings.num_samples, seed)
        if run.stage.kept_only:
            found = evaluate_held_out(run.model, data.test, data.held_out, *arguments)
            held_out[run.stage.name] = found
        else:
            evaluations[run.stage.name] = evaluate(run.model, data.test, *arguments)
    return Results(settings, data, runs, evaluations, held_out, steptime.measure(settings, data))


def to_json(results: Results) -> dict[str, Any]:
    """The whole report as plain values."""
    networks = {run.stage.name: run for run in results.runs}
    return {
        "settings": results.settings.to_dict(),
        "data": results.data.describe(),
        "environment": _environment(results),
        "kl_weight": results.settings.beta,
        "is_elbo": results.settings.beta == 1.0,
        "networks": {
            name: {
                "title": networks[name].stage.title,
                "test": {f"{s:g}": m.to_dict() for s, m in evaluation.metrics.items()},
            }
            for name, evaluation in results.evaluations.items()
        },
        "held_out": {
            "classes": [results.data.classes[index] for index in results.data.held_out],
            "networks": {
                name: {
                    "test": found.metrics.to_dict(),
                    "entropy_auroc": found.entropy_auroc,
                    "information_auroc": found.information_auroc,
                }
                for name, found in results.held_out.items()
            },
        },
        "noise_ratio_to_deterministic": _noise_ratio(results),
        "step": {name: list(values) for name, values in results.steps.items()},
        "history": {name: run.history for name, run in networks.items()},
    }


def _environment(results: Results) -> dict[str, Any]:
    info = fb.build_info()
    return {
        "fastbconv": fb.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "device": devices.describe(results.runs[0].device),
        "kernels": str(info.get("isa") or "pure-PyTorch reference"),
    }


def _noise_ratio(results: Results) -> dict[str, dict[str, float]]:
    """NLL and calibration error of the Bayesian network over the others', under noise."""
    ours = results.evaluations.get("bayesian")
    ratios = {}
    for name in ("deterministic", "map"):
        theirs = results.evaluations.get(name)
        if ours is None or theirs is None:
            continue
        a, b = ours.metrics[SHOWN_STRENGTH], theirs.metrics[SHOWN_STRENGTH]
        ratios[name] = {
            "nll": a.nll / max(b.nll, 1e-12),
            "calibration_error": a.calibration_error / max(b.calibration_error, 1e-12),
        }
    return ratios


def to_text(results: Results) -> str:
    """The report for people."""
    settings, data = results.settings, results.data
    title = {run.stage.name: run.stage.title for run in results.runs}
    environment = ", ".join(f"{name} {value}" for name, value in _environment(results).items())
    kl = "the loss is the negative ELBO" if settings.beta == 1 else "only 1 is the ELBO"
    lines = [
        data.describe(),
        environment,
        f"KL weight (--beta) {settings.beta:g}: {kl}",
        f"{settings.epochs} epochs, batches of {settings.batch_size}, seed {settings.seed}, "
        f"{settings.num_samples} samples per prediction",
        "",
    ]
    for strength in (0.0, *NOISE_STRENGTHS) if results.evaluations else ():
        lines += [*_table(results, strength, title), ""]
    for name, ratio in _noise_ratio(results).items():
        lines.append(
            f"pixel noise {SHOWN_STRENGTH:g}, {title['bayesian']} over {title[name]}: "
            f"NLL {ratio['nll']:.2f}, calibration error {ratio['calibration_error']:.2f}"
        )
    return "\n".join(lines + _held_out_lines(results, title) + _step_lines(results)) + "\n"


def _table(results: Results, strength: float, title: dict[str, str]) -> list[str]:
    heading = (
        "test images, clean" if strength == 0 else f"test images, pixel noise of sd {strength:g}"
    )
    rows = [
        f"{heading:<38} {'accuracy':>9} {'NLL':>8} {'cal.error':>10} {'entropy':>8} "
        f"{'mut.inf.':>9} {'AUROC':>7}"
    ]
    for name, evaluation in results.evaluations.items():
        m = evaluation.metrics[strength]
        auroc = "-" if m.auroc_noise is None else f"{m.auroc_noise:.3f}"
        rows.append(
            f"  {title[name]:<36} {m.accuracy:>9.2%} {m.nll:>8.4f} {m.calibration_error:>10.4f} "
            f"{m.entropy:>8.4f} {m.mutual_information:>9.4f} {auroc:>7}"
        )
    return rows


def _held_out_lines(results: Results, title: dict[str, str]) -> list[str]:
    if not results.held_out:
        return []
    names = " and ".join(results.data.classes[index] for index in results.data.held_out)
    lines = ["", f"trained without the classes {names}; AUROC of telling their test images"]
    for name, found in results.held_out.items():
        information = "-" if found.information_auroc is None else f"{found.information_auroc:.3f}"
        lines.append(
            f"  {title[name]:<36} accuracy {found.metrics.accuracy:.2%}, "
            f"AUROC by entropy {found.entropy_auroc:.3f}, by mutual information {information}"
        )
    return lines


def _step_lines(results: Results) -> list[str]:
    lines = ["", "training step (forward, KL, backward, Adam), median (quartiles)"]
    for name in ("bayesian", "deterministic", "unfused"):
        low, middle, high = (1e3 * value for value in results.steps[name])
        label = {"unfused": "Bayesian written by hand"}.get(name, name)
        lines.append(f"  {label:<26} {middle:8.2f} ms ({low:.2f} to {high:.2f})")
    for name, label in (("deterministic", "deterministic"), ("unfused", "written by hand")):
        low, middle, high = results.steps[f"to_{name}"]
        text = f"ratio to {label}"
        lines.append(f"  {text:<26} {middle:8.2f}    ({low:.2f} to {high:.2f})")
    footnotes = [
        "",
        "NLL: mean of -log(mean probability over the samples). cal.error: expected calibration "
        f"error, {NUM_BINS} bins.",
        "entropy and mut.inf. in nats. AUROC: entropy telling noisy images from clean ones.",
    ]
    return lines + footnotes


def write(results: Results, out: Path) -> str:
    """Saves text, JSON and plots under ``out``; returns the text."""
    text = to_text(results)
    checkpoint.write_text(out / "report.txt", text)
    checkpoint.write_json(out / "report.json", to_json(results))
    main = [run for run in results.runs if not run.stage.kept_only]
    plots.curves(main or results.runs, out / "curves.png")
    labels = results.data.test.labels
    if results.evaluations:
        shown = (0.0, SHOWN_STRENGTH)
        plots.reliability(results.evaluations, labels, shown, out / "reliability.png")
        plots.rejection(results.evaluations, labels, shown, out / "rejection.png")
    plots.entropy(results.evaluations, results.held_out, SHOWN_STRENGTH, out / "entropy.png")
    return text
