"""What a run is told, and the networks that it trains."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

NETWORKS = ("bayesian", "deterministic", "map", "elbo", "held-out")
NOISE_STRENGTHS = (0.1, 0.2, 0.3, 0.4, 0.5)


class TrainError(Exception):
    """Something the user can put right; the message is one sentence that says what."""


@dataclass(frozen=True)
class Settings:
    """Everything that decides the numbers of a run; saved beside them, and compared on resuming.

    Attributes:
        data: "digits", or the path of a data set.
        image_size: (height, width) that images of a folder are scaled to; None: they agree.
        networks: what to train, of NETWORKS.
        epochs: passes over the training images.
        batch_size: images per step.
        lr: first learning rate of Adam; it falls to zero along a half cosine.
        beta: weight of the KL in the loss. Only 1 is the evidence lower bound.
        prior_scale: standard deviation of the normal prior on the weights.
        initial_scale: first standard deviation of the weights, times 1 / sqrt(fan_in).
        channels: filters of the convolutions; every one but the first halves the image.
        hidden: units of the dense layer before the last.
        seed: of initial weights, data order and weight noise. The split does not depend on it.
        num_samples: Monte Carlo samples of an evaluation.
        threads: of torch; a resumed run keeps it, since sums depend on it in library kernels.
        device: what computes: "cpu", "cuda", or one GPU as in "cuda:1".
        shared_noise: the processes of a run draw the same weights.
        processes: of torchrun; 1 without it. Not an option.
    """

    data: str = "digits"
    image_size: tuple[int, int] | None = None
    networks: tuple[str, ...] = NETWORKS
    epochs: int = 60
    batch_size: int = 64
    lr: float = 2e-3
    beta: float = 0.1
    prior_scale: float = 0.25
    initial_scale: float = 0.5
    channels: tuple[int, ...] = (32, 64)
    hidden: int = 128
    seed: int = 0
    num_samples: int = 32
    threads: int = 1
    device: str = "cpu"
    shared_noise: bool = False
    processes: int = 1

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON and a checkpoint hold them."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Settings:
        """The inverse of ``to_dict``.

        Raises:
            ValueError: a field is missing or unknown.
        """
        values = {"device": "cpu", **values}  # runs from before that setting
        expected = {field.name for field in fields(cls)}
        if values.keys() != expected:
            wrong = ", ".join(sorted(values.keys() ^ expected))
            raise ValueError(f"settings: expected the fields of this version, got another {wrong}")
        return cls(
            **{
                name: tuple(value) if isinstance(value, list) else value
                for name, value in values.items()
            }
        )


@dataclass(frozen=True)
class Stage:
    """One network to train.

    Attributes:
        name: of its checkpoint, ``checkpoints/<name>.pt``.
        title: in the report.
        bayesian: Bayesian layers, or the deterministic network of the same shape.
        beta: weight of the KL; of the log prior density (weight decay) without Bayesian layers.
        kept_only: trained without the held-out classes.
    """

    name: str
    title: str
    bayesian: bool
    beta: float
    kept_only: bool = False


def stages(settings: Settings) -> list[Stage]:
    """The networks of a run, in the order in which they are trained.

    All of them start from the same means and see the same batches. "deterministic" minimises the
    mean NLL alone; "map" adds the prior of the Bayesian network as weight decay, with the same
    weight beta, so that what remains between the two is the posterior's width.
    """
    beta = settings.beta
    found = {
        "bayesian": [Stage("bayesian", f"Bayesian, KL weight {beta:g}", True, beta)],
        "deterministic": [Stage("deterministic", "deterministic", False, 0.0)],
        "map": [Stage("map", "deterministic, prior as weight decay", False, beta)],
        "elbo": [Stage("elbo", "Bayesian, KL weight 1 (ELBO)", True, 1.0)],
        "held-out": [
            Stage("held-out-bayesian", "Bayesian, without the classes", True, beta, True),
            Stage("held-out-deterministic", "deterministic, without", False, 0.0, True),
        ],
    }
    if beta == 1.0 and "bayesian" in settings.networks:
        found["elbo"] = []  # it is the first network
    return [stage for name in NETWORKS if name in settings.networks for stage in found[name]]
