"""What is measured: accuracy, NLL, calibration, entropies, and the separation of the unknown."""

from __future__ import annotations

import dataclasses
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

import fastbconv as fb

from .data import Part
from .settings import NOISE_STRENGTHS

NUM_BINS = 15
_NOISE_SEED = 1234


@dataclass(frozen=True)
class Metrics:
    """Figures of one network on one set of images. Entropies are in nats.

    Attributes:
        accuracy: share of images whose most probable class is right.
        nll: mean of -log(mean probability of the right class).
        calibration_error: expected calibration error, 15 equal bins of confidence.
        entropy: mean entropy of the mean probabilities: the whole uncertainty.
        mutual_information: mean of that minus the mean entropy of the samples: the part that the
            weights are to blame for; zero for a deterministic network.
        auroc_noise: how well the entropy tells these images from the clean ones; None: they are.
    """

    accuracy: float
    nll: float
    calibration_error: float
    entropy: float
    mutual_information: float
    auroc_noise: float | None = None

    def to_dict(self) -> dict[str, float | None]:
        """For JSON."""
        return asdict(self)


def add_noise(images: Tensor, strength: float) -> Tensor:
    """Images plus Gaussian noise of this standard deviation; white is 1, nothing is clipped.

    The same noise for every network and every run; the strengths are multiples of one draw.
    """
    generator = torch.Generator().manual_seed(_NOISE_SEED)
    return images + strength * torch.randn(images.shape, generator=generator)


def predict(
    model: nn.Module, part: Part, num_samples: int, *, seed: int, noise: float = 0.0
) -> fb.Prediction:
    """The mean over ``num_samples`` functions, the same ones for every set of images.

    A network without Bayesian layers has one function. What comes back lies in the host's memory.
    """
    images, _ = part.batch(slice(None))
    if noise > 0:
        images = add_noise(images, noise)
    images = images.to(next(model.parameters()).device)
    found = fb.predict(model, images, num_samples, seed=seed)
    return dataclasses.replace(
        found,
        **{name: value.cpu() for name, value in vars(found).items() if value is not None},
    )


def accuracy(probability: Tensor, labels: Tensor) -> float:
    """Share of images whose most probable class is right; logarithms will do."""
    return (probability.argmax(dim=1) == labels).double().mean().item()


def nll(log_probability: Tensor, labels: Tensor) -> float:
    """Mean of -log(probability of the right class)."""
    return -log_probability.gather(1, labels[:, None]).mean().item()


def calibration_error(log_probability: Tensor, labels: Tensor) -> float:
    """Expected calibration error: mean over images of |accuracy - confidence| of their bin."""
    from torchmetrics.functional.classification import multiclass_calibration_error

    return multiclass_calibration_error(
        log_probability.exp().float(),
        labels,
        num_classes=log_probability.shape[1],
        n_bins=NUM_BINS,
        norm="l1",
    ).item()


def auroc(known: Tensor, unknown: Tensor) -> float:
    """Area under the ROC curve of a score that should be higher for what is unknown.

    0.5: it tells nothing; 1: every unknown image scores higher than every known one.
    """
    from torchmetrics.functional.classification import binary_auroc

    scores = torch.cat([known, unknown])
    # Ranks, since the metric takes scores beyond [0, 1] for logits and rounds them apart.
    _, ranks = torch.unique(scores, return_inverse=True)
    target = torch.cat([torch.zeros(len(known)), torch.ones(len(unknown))]).long()
    return binary_auroc(ranks.double() / max(len(scores), 1), target).item()


def measure(
    prediction: fb.Prediction, labels: Tensor, clean_entropy: Tensor | None = None
) -> Metrics:
    """All figures of a prediction."""
    log_mean = prediction.mean.log()
    return Metrics(
        accuracy=accuracy(log_mean, labels),
        nll=nll(log_mean, labels),
        calibration_error=calibration_error(log_mean, labels),
        entropy=prediction.entropy.mean().item(),
        mutual_information=prediction.mutual_information.mean().item(),
        auroc_noise=None if clean_entropy is None else auroc(clean_entropy, prediction.entropy),
    )


@dataclass(frozen=True)
class Evaluation:
    """One network on the test images, clean (strength 0) and under noise.

    Attributes:
        metrics: strength -> figures.
        log_probability: strength -> (N, classes), of the mean probability.
        entropy: strength -> (N,).
    """

    metrics: dict[float, Metrics]
    log_probability: dict[float, Tensor]
    entropy: dict[float, Tensor]


def evaluate(model: nn.Module, part: Part, num_samples: int, seed: int) -> Evaluation:
    """Measures a network, clean and under noise of five strengths, with the same functions."""
    result = Evaluation({}, {}, {})
    for strength in (0.0, *NOISE_STRENGTHS):
        prediction = predict(model, part, num_samples, seed=seed, noise=strength)
        clean = result.entropy.get(0.0)
        result.metrics[strength] = measure(prediction, part.labels, clean)
        result.log_probability[strength] = prediction.mean.log()
        result.entropy[strength] = prediction.entropy
    return result


@dataclass(frozen=True)
class HeldOut:
    """A network trained without some classes, on images of the others and of those.

    Attributes:
        metrics: on the test images of the classes that it knows.
        entropy_auroc: how well the entropy tells the held-out classes' test images from the others.
        information_auroc: the same with the mutual information; None without Bayesian layers.
        entropy_known: (N,); entropy_unknown: (M,).
    """

    metrics: Metrics
    entropy_auroc: float
    information_auroc: float | None
    entropy_known: Tensor
    entropy_unknown: Tensor


def evaluate_held_out(
    model: nn.Module, test: Part, held_out: tuple[int, ...], num_samples: int, seed: int
) -> HeldOut:
    """Measures a network that was trained without the classes ``held_out``."""
    kept = sorted(set(test.labels.tolist()) - set(held_out))
    known, unknown = test.only(kept), test.only(list(held_out))
    seen, unseen = (predict(model, part, num_samples, seed=seed) for part in (known, unknown))
    information = None
    if any(getattr(module, "is_bayesian", False) for module in model.modules()):
        information = auroc(seen.mutual_information, unseen.mutual_information)
    return HeldOut(
        metrics=measure(seen, known.labels),
        entropy_auroc=auroc(seen.entropy, unseen.entropy),
        information_auroc=information,
        entropy_known=seen.entropy,
        entropy_unknown=unseen.entropy,
    )
