"""The figures of a run; drawn without a display and without pyplot's global state."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from .checkpoint import write_atomically
from .evaluate import NUM_BINS, Evaluation, HeldOut
from .loop import Run

_COLOURS = {
    "bayesian": "tab:blue",
    "deterministic": "tab:orange",
    "map": "tab:green",
    "elbo": "tab:purple",
}


def _save(figure: Figure, path: Path) -> None:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    write_atomically(path, lambda file: file.write(buffer.getvalue()))


def curves(runs: list[Run], path: Path) -> None:
    """Loss, NLL, KL and validation accuracy by epoch."""
    figure = Figure(figsize=(12, 3.2), layout="constrained")
    panels = figure.subplots(1, 4)
    titles = {
        "loss": "loss (training)",
        "nll": "NLL (training)",
        "kl": "KL, nats",
        "validation_accuracy": "validation accuracy",
    }
    for panel, (key, title) in zip(panels, titles.items(), strict=True):
        for run in runs:
            if key == "kl" and not run.stage.bayesian:
                continue
            epochs = [row["epoch"] for row in run.history]
            values = [row[key] for row in run.history]
            colour = _COLOURS.get(run.stage.name)
            panel.plot(epochs, values, label=run.stage.title, color=colour, marker=".", ms=3)
        panel.set(title=title, xlabel="epoch")
        if key in ("loss", "nll", "kl"):
            panel.set_yscale("log")
    panels[-1].legend(fontsize=7)
    _save(figure, path)


def reliability_bins(log_probability: Tensor, labels: Tensor) -> tuple[np.ndarray, ...]:
    """(confidence, accuracy, count) of the equal bins of confidence that hold an image."""
    confidence, predicted = log_probability.exp().max(dim=1)
    right = (predicted == labels).double().numpy()
    confidence = confidence.numpy()
    bins = np.clip((confidence * NUM_BINS).astype(int), 0, NUM_BINS - 1)
    count = np.bincount(bins, minlength=NUM_BINS)
    filled = count > 0
    mean = [np.bincount(bins, w, minlength=NUM_BINS)[filled] for w in (confidence, right)]
    return mean[0] / count[filled], mean[1] / count[filled], count[filled]


def reliability(
    evaluations: dict[str, Evaluation], labels: Tensor, strengths: tuple[float, ...], path: Path
) -> None:
    """Accuracy over confidence; the diagonal is perfect calibration, the area the bin's size."""
    figure = Figure(figsize=(4.2 * len(strengths), 4), layout="constrained")
    panels = figure.subplots(1, len(strengths), squeeze=False)[0]
    for panel, strength in zip(panels, strengths, strict=True):
        panel.plot([0, 1], [0, 1], color="grey", lw=1, ls="--")
        for name, evaluation in evaluations.items():
            bins = reliability_bins(evaluation.log_probability[strength], labels)
            confidence, accuracy, count = bins
            error = evaluation.metrics[strength].calibration_error
            colour = _COLOURS.get(name)
            panel.plot(confidence, accuracy, color=colour, lw=0.8, alpha=0.4)
            panel.scatter([], [], s=30, color=colour, label=f"{name}, error {error:.3f}")
            panel.scatter(confidence, accuracy, s=4 + 200 * count / count.sum(), color=colour)
        title = "clean test images" if strength == 0 else f"pixel noise {strength:g}"
        panel.set(title=title, xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1.02))
        panel.legend(fontsize=7)
    _save(figure, path)


def kept_accuracy(log_probability: Tensor, entropy: Tensor, labels: Tensor) -> np.ndarray:
    """Accuracy of the k images of least entropy, for k = 1 to N."""
    right = (log_probability.argmax(dim=1) == labels).double()[entropy.argsort(stable=True)]
    return (right.cumsum(0) / torch.arange(1, len(labels) + 1)).numpy()


def rejection(
    evaluations: dict[str, Evaluation], labels: Tensor, strengths: tuple[float, ...], path: Path
) -> None:
    """Accuracy of what is kept when the images of highest entropy are handed to somebody else."""
    figure = Figure(figsize=(4.2 * len(strengths), 3.6), layout="constrained")
    panels = figure.subplots(1, len(strengths), squeeze=False)[0]
    for panel, strength in zip(panels, strengths, strict=True):
        for name, evaluation in evaluations.items():
            parts = (evaluation.log_probability[strength], evaluation.entropy[strength])
            accuracy = kept_accuracy(*parts, labels)
            rejected = 1 - np.arange(1, len(accuracy) + 1) / max(len(accuracy), 1)
            panel.plot(rejected, accuracy, color=_COLOURS.get(name), label=name)
        title = "clean test images" if strength == 0 else f"pixel noise {strength:g}"
        panel.set(title=title, xlabel="share rejected", ylabel="accuracy of the rest", xlim=(0, 1))
        panel.legend(fontsize=7)
    _save(figure, path)


def entropy(
    evaluations: dict[str, Evaluation], held_out: dict[str, HeldOut], strength: float, path: Path
) -> None:
    """Histograms of the predictive entropy: known images, noisy images, classes never seen."""
    panels_of = [
        (
            f"{name}: clean, noise {strength:g}",
            {"clean": e.entropy[0.0], "noisy": e.entropy[strength]},
        )
        for name, e in evaluations.items()
        if name in ("bayesian", "deterministic")
    ] + [
        (f"{name}", {"known classes": h.entropy_known, "held-out classes": h.entropy_unknown})
        for name, h in held_out.items()
    ]
    columns = max(len(panels_of), 1)
    figure = Figure(figsize=(3.4 * columns, 3.2), layout="constrained")
    panels = figure.subplots(1, columns, squeeze=False)[0]
    for panel, (title, groups) in zip(panels, panels_of, strict=False):
        highest = max(float(values.max()) for values in groups.values())
        edges = np.linspace(0, max(highest, 1e-3), 31)
        for label, values in groups.items():
            panel.hist(values.numpy(), bins=edges, alpha=0.6, density=True, label=label)
        panel.set(title=title, xlabel="predictive entropy, nats", yscale="log")
        panel.legend(fontsize=7)
    _save(figure, path)
