"""What is measured: accuracy, NLL, calibration, entropies, and the separation of the unknown."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

import fastbconv as fb

from .data import Part
from .settings import NOISE_STRENGTHS

NUM_BINS = 15
_NOISE_SEED = 1234
_BATCH = 1000


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


@torch.no_grad()
def predict(
    model: nn.Module, part: Part, num_samples: int, *, seed: int, noise: float = 0.0
) -> Tensor:
    """Log probabilities of every class under ``num_samples`` functions.

    Sample s is one function for the whole set: all batches use the weights of seed + s. A network
    without Bayesian layers has one function, and one sample.

    Returns:
        (num_samples, N, classes) float64.
    """
    bayesian = any(getattr(module, "is_bayesian", False) for module in model.modules())
    images, _ = part.batch(slice(None))
    if noise > 0:
        images = add_noise(images, noise)
    model.eval()
    samples = []
    for sample in range(num_samples if bayesian else 1):
        with fb.fixed_sample(model, seed + sample):
            logits = [model(batch) for batch in images.split(_BATCH)]
        samples.append(torch.cat(logits).double().log_softmax(dim=1))
    return torch.stack(samples)


def log_mean(log_probabilities: Tensor) -> Tensor:
    """log of the mean probability over the samples: (S, N, classes) -> (N, classes)."""
    return log_probabilities.logsumexp(dim=0) - math.log(len(log_probabilities))


def accuracy(log_probability: Tensor, labels: Tensor) -> float:
    """Share of images whose most probable class is right."""
    return (log_probability.argmax(dim=1) == labels).double().mean().item()


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


def entropies(log_probabilities: Tensor) -> tuple[Tensor, Tensor]:
    """Entropy of the mean probabilities, and mutual information of class and weights: (N,) each."""
    total = torch.special.entr(log_mean(log_probabilities).exp()).sum(dim=1)
    expected = torch.special.entr(log_probabilities.exp()).sum(dim=2).mean(dim=0)
    return total, (total - expected).clamp_min(0)


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
    log_probabilities: Tensor, labels: Tensor, clean_entropy: Tensor | None = None
) -> Metrics:
    """All figures of (S, N, classes) log probabilities."""
    mean = log_mean(log_probabilities)
    total, information = entropies(log_probabilities)
    return Metrics(
        accuracy=accuracy(mean, labels),
        nll=nll(mean, labels),
        calibration_error=calibration_error(mean, labels),
        entropy=total.mean().item(),
        mutual_information=information.mean().item(),
        auroc_noise=None if clean_entropy is None else auroc(clean_entropy, total),
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
        log_probabilities = predict(model, part, num_samples, seed=seed, noise=strength)
        clean = result.entropy.get(0.0)
        result.metrics[strength] = measure(log_probabilities, part.labels, clean)
        result.log_probability[strength] = log_mean(log_probabilities)
        result.entropy[strength] = entropies(log_probabilities)[0]
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
    predicted = [predict(model, part, num_samples, seed=seed) for part in (known, unknown)]
    scores = [entropies(log_probabilities) for log_probabilities in predicted]
    sampled = len(predicted[0]) > 1
    return HeldOut(
        metrics=measure(predicted[0], known.labels),
        entropy_auroc=auroc(scores[0][0], scores[1][0]),
        information_auroc=auroc(scores[0][1], scores[1][1]) if sampled else None,
        entropy_known=scores[0][0],
        entropy_unknown=scores[1][0],
    )
