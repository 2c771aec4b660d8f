"""Training one network: the step, the epoch, the checkpoint after each."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import fastbconv as fb

from . import checkpoint, evaluate
from . import device as devices
from .data import Dataset, Part
from .model import ConvNet, weight_decay
from .processes import ALONE, Processes
from .settings import Settings, Stage, TrainError

VALIDATION_SAMPLES = 4


@dataclass
class Run:
    """One network in training.

    Attributes:
        forward: the model as it is called: gradients are averaged over processes.
        processes: this process among those of the run.
        epoch: epochs that are done.
        history: one dict per epoch: epoch, loss, nll, kl, validation_accuracy, seconds.
    """

    stage: Stage
    settings: Settings
    model: ConvNet
    forward: nn.Module
    optimizer: torch.optim.Optimizer
    processes: Processes = ALONE
    epoch: int = 0
    history: list[dict[str, float]] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device


def start(stage: Stage, settings: Settings, data: Dataset, processes: Processes = ALONE) -> Run:
    """A network at its first weights; seeds the generators of torch, NumPy and Python."""
    checkpoint.seed_generators(settings.seed)
    kind = "bayesian" if stage.bayesian else "deterministic"
    model = ConvNet(kind, data.image_shape, len(data.classes), settings)
    model.to(devices.find(settings.device, processes.count))
    optimizer = make_optimizer(model, settings.lr)
    return Run(stage, settings, model, processes.wrap(model), optimizer, processes)


def make_optimizer(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """Adam, the same for every network; its decay is off, the prior is in the loss."""
    return torch.optim.Adam(fb.param_groups(model, lr), fused=True)


def learning_rate(settings: Settings, step: int, num_steps: int) -> float:
    """Half a cosine from ``lr`` to zero: a function of the step alone, so nothing to save."""
    return settings.lr * 0.5 * (1 + math.cos(math.pi * step / num_steps))


def data_order(settings: Settings, epoch: int, count: int) -> Iterator[Tensor]:
    """The batches of an epoch: a function of seed and epoch alone, the same for every network."""
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + epoch)
    yield from torch.randperm(count, generator=generator).split(settings.batch_size)


def loss_terms(
    stage: Stage,
    settings: Settings,
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    count: int,
    weight: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of a step, mean NLL + beta * KL / count, with its NLL and its KL (nats, a sum).

    ``weight`` is that of the NLL of this process's images (``Processes.share``).

    The KL comes out of the fused forward pass, and equals ``fastbconv.kl_loss(model)``. A
    deterministic network has none; where the stage asks for its prior, the negative log density of
    the weights takes the place of the KL in the loss.
    """
    with fb.collect_kl(model) as collected:
        nll = weight * F.cross_entropy(model(images), labels)
    kl = collected.sum() if stage.bayesian else torch.zeros_like(nll)
    loss = nll + stage.beta / count * kl
    if not stage.bayesian and stage.beta > 0:
        loss = nll + stage.beta / count * weight_decay(model, settings.prior_scale)
    return loss, nll, kl


def train_step(
    run: Run, images: Tensor, labels: Tensor, count: int, weight: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Forward, backward, update; returns loss, NLL and KL without their graph."""
    run.optimizer.zero_grad(set_to_none=True)
    terms = loss_terms(run.stage, run.settings, run.forward, images, labels, count, weight)
    terms[0].backward()
    run.optimizer.step()
    return tuple(term.detach() for term in terms)


def train_epoch(run: Run, part: Part, bar: Callable[[int], Any]) -> dict[str, float]:
    """One pass over the training images; ``bar`` is told the images that are done."""
    settings, count = run.settings, len(part)
    steps = math.ceil(count / settings.batch_size)
    sums = torch.zeros(3, dtype=torch.float64, device=run.device)
    run.model.train()
    for index, batch in enumerate(data_order(settings, run.epoch, count)):
        rate = learning_rate(settings, run.epoch * steps + index, settings.epochs * steps)
        for group in run.optimizer.param_groups:
            group["lr"] = rate
        own, weight = run.processes.share(batch)
        terms = torch.stack(train_step(run, *part.batch(own, run.device), count, weight))
        sums += terms.double() * len(batch)
        bar(len(batch))
    loss, nll, kl = (run.processes.mean(sums.cpu()) / count).tolist()
    if not math.isfinite(loss):
        raise TrainError(
            f"{run.stage.name}, epoch {run.epoch + 1}: expected a finite loss, got {loss}; "
            f"a lower --lr than {settings.lr:g} may help"
        )
    return {"loss": loss, "nll": nll, "kl": kl}


def train(run: Run, data: Dataset, path: Path, say: Callable[[str], None]) -> None:
    """Trains to the last epoch, with a checkpoint at ``path`` after each, of the first process."""
    settings, stage, first = run.settings, run.stage, run.processes.is_first
    while run.epoch < settings.epochs:
        began = time.perf_counter()
        with tqdm(
            total=len(data.train),
            desc=f"{stage.name} {run.epoch + 1}/{settings.epochs}",
            unit="img",
            leave=False,
            disable=None if first else True,  # None: no bar where nobody watches: a file, a pipe
            mininterval=0.2,
        ) as bar:
            row = train_epoch(run, data.train, bar.update)
        if first:
            row["validation_accuracy"] = validation_accuracy(run, data.validation)
        row["seconds"] = time.perf_counter() - began
        run.epoch += 1
        run.history.append({"epoch": run.epoch, **row})
        run.processes.first(lambda: save(run, path))
        if first:
            say(epoch_line(run))


def validation_accuracy(run: Run, part: Part) -> float:
    """Of the mean probability of a few samples; draws nothing from the global generator."""
    prediction = evaluate.predict(run.model, part, VALIDATION_SAMPLES, seed=0)
    return evaluate.accuracy(prediction.mean, part.labels)


def epoch_line(run: Run) -> str:
    """The result of the last epoch in one line."""
    row = run.history[-1]
    return (
        f"{run.stage.name:<22} epoch {row['epoch']:3.0f}/{run.settings.epochs}  "
        f"loss {row['loss']:9.4f}  nll {row['nll']:7.4f}  kl {row['kl']:9.0f}  "
        f"validation accuracy {row['validation_accuracy']:6.2%}  {row['seconds']:6.2f} s"
    )


def save(run: Run, path: Path) -> None:
    """Everything that the next epoch depends on."""
    checkpoint.save(
        path,
        {
            "stage": run.stage.name,
            "settings": run.settings.to_dict(),
            "epoch": run.epoch,
            "model": run.model.state_dict(),
            "optimizer": run.optimizer.state_dict(),
            "generators": checkpoint.generators(run.device),
            "history": run.history,
        },
    )


def resume(run: Run, path: Path) -> None:
    """Puts a run that ``start`` made where its checkpoint is; restores the generators.

    Raises:
        TrainError: the file is damaged, or belongs to another network or other settings.
    """
    content = checkpoint.load(path)
    saved = {**content["settings"], "device": run.settings.device}  # another one may go on
    if content["stage"] != run.stage.name or saved != run.settings.to_dict():
        raise TrainError(
            f"{path}: expected network {run.stage.name!r} with the settings of this run, "
            f"got {content['stage']!r} with {content['settings']}"
        )
    try:
        run.model.load_state_dict(content["model"])
        run.optimizer.load_state_dict(content["optimizer"])
        run.epoch, run.history = int(content["epoch"]), list(content["history"])
        checkpoint.restore_generators(content["generators"], run.device)
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise TrainError(
            f"{path}: expected the state of {run.stage.name!r}, got another ({reason})"
        ) from None
