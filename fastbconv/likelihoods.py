"""What the output of a model means: the distribution of the target that one function predicts.

``fastbconv.predict`` averages over functions what is linear in that distribution: probabilities,
means, variances and entropies, never logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

__all__ = ["Bernoulli", "Categorical", "Function", "Gaussian", "Likelihood", "Moments"]

Name = Literal["categorical", "bernoulli", "gaussian"]


@dataclass(frozen=True)
class Moments:
    """What one function says about each row, in float64.

    Attributes:
        mean: probabilities, or the mean of the target.
        variance: of the target under this function; None where it is not asked for.
        entropy: of the target under this function, in nats; None where it has no use.

    Example:
        >>> Moments(torch.tensor([[0.25, 0.75]])).variance is None
        True
    """

    mean: Tensor
    variance: Tensor | None = None
    entropy: Tensor | None = None


@runtime_checkable
class Likelihood(Protocol):
    """A distribution of the target for each output of a model."""

    def moments(self, output: Any) -> Moments:
        """The moments under one function.

        Args:
            output: what the model returned for one batch under one function.
        """

    def entropy(self, mean: Tensor) -> Tensor | None:
        """Entropy of the averaged distribution, in nats; None where it has no closed form.

        Args:
            mean: average of ``Moments.mean`` over the functions.
        """


class Categorical:
    """Logits of classes on axis 1; further axes are positions, each with a target of its own.

    .. code-block:: text

        mean = softmax(output, axis 1)      entropy = -sum over classes of mean * log mean

    Shape:
        output (N, classes, ...); mean (N, classes, ...); entropy (N, ...).

    Raises:
        ValueError: an output without axis 1.

    Example:
        >>> Categorical().moments(torch.zeros(2, 4, 8, 8)).entropy.shape
        torch.Size([2, 8, 8])
    """

    def moments(self, output: Any) -> Moments:
        """Probabilities and their entropy."""
        logits = _tensor("categorical", output)
        if logits.ndim < 2:
            raise ValueError(
                "output: expected logits (N, classes, ...) for likelihood='categorical', got shape "
                f"{tuple(logits.shape)}; one logit for each target is likelihood='bernoulli'"
            )
        # Classes last: each row is then summed in an order that no other row changes.
        probabilities = logits.movedim(1, -1).contiguous().softmax(-1)
        return Moments(probabilities.movedim(-1, 1), entropy=_entropy(probabilities))

    def entropy(self, mean: Tensor) -> Tensor:
        """Entropy of the mean probabilities."""
        return _entropy(mean.movedim(1, -1).contiguous())


class Bernoulli:
    """One logit for each target, of any shape.

    .. code-block:: text

        mean = sigmoid(output)      entropy = -mean log mean - (1 - mean) log(1 - mean)

    Shape:
        output, mean and entropy (N, ...).

    Example:
        >>> Bernoulli().moments(torch.zeros(3)).mean
        tensor([0.5000, 0.5000, 0.5000], dtype=torch.float64)
    """

    def moments(self, output: Any) -> Moments:
        """Probabilities and their entropy."""
        probability = _tensor("bernoulli", output).sigmoid()
        return Moments(probability, entropy=self.entropy(probability))

    def entropy(self, mean: Tensor) -> Tensor:
        """Entropy of the mean probability, elementwise."""
        return torch.special.entr(mean) + torch.special.entr(1.0 - mean)


@dataclass(frozen=True)
class Gaussian:
    """A normal target: the model returns the pair (mean, variance), as GaussianNLLLoss takes it.

    The averaged distribution is a mixture of normals, whose variance is the mean of their variances
    (aleatoric) plus the variance of their means (epistemic). Its entropy has no closed form.

    Args:
        log_variance: the second of the pair is the logarithm of the variance.
        variance: the noise, where the model returns the mean alone.

    Shape:
        output: two tensors (N, ...) of one shape, or one with ``variance``.

    Raises:
        TypeError: an output of another form.
        ValueError: shapes that differ, or negative variances.

    Example:
        >>> Gaussian(log_variance=True).moments((torch.zeros(2), torch.zeros(2))).variance
        tensor([1., 1.], dtype=torch.float64)
    """

    log_variance: bool = False
    variance: float | None = None

    def __post_init__(self) -> None:
        if self.variance is not None and not self.variance >= 0:
            raise ValueError(f"variance: expected a non-negative number, got {self.variance}")

    def moments(self, output: Any) -> Moments:
        """Mean and variance."""
        if self.variance is not None:
            mean = _tensor("gaussian", output)
            return Moments(mean, torch.full_like(mean, self.variance))
        if not isinstance(output, tuple | list) or len(output) != 2:
            raise TypeError(
                "output: expected the pair (mean, variance) for likelihood='gaussian', got "
                f"{_kind(output)}; a model that returns the mean alone needs "
                "likelihoods.Gaussian(variance=...)"
            )
        mean, variance = (_tensor("gaussian", value) for value in output)
        if mean.shape != variance.shape:
            raise ValueError(
                f"output: expected a variance of shape {tuple(mean.shape)}, like the mean, got "
                f"{tuple(variance.shape)}"
            )
        if self.log_variance:
            return Moments(mean, variance.exp())
        if bool((variance < 0).any()):
            raise ValueError(
                f"output: expected variances of at least 0, got {variance.min().item():g}; a model "
                "that returns their logarithms needs likelihoods.Gaussian(log_variance=True)"
            )
        return Moments(mean, variance)

    def entropy(self, mean: Tensor) -> None:
        """None: that of a mixture of normals has no closed form."""
        del mean


@dataclass(frozen=True)
class Function:
    """Any function of the output: its mean and its variance over the functions are reported.

    Args:
        function: from what the model returned for one batch under one function to a tensor (N, ...)
            of what is to be averaged.

    Example:
        >>> Function(lambda logits: logits.argmax(1)).moments(torch.tensor([[0.0, 2.0]])).mean
        tensor([1.], dtype=torch.float64)
    """

    function: Callable[[Any], Tensor]

    def moments(self, output: Any) -> Moments:
        """The value of the function."""
        value = self.function(output)
        if not isinstance(value, Tensor):
            raise TypeError(
                "likelihood: expected a tensor (N, ...) to average from the function, got "
                f"{_kind(value)}; for a model with several heads give a function for each, lambda "
                "output: output[0].softmax(1), or loop over fixed_sample(model, seed, sample=s)"
            )
        if value.ndim == 0:
            raise ValueError(
                "likelihood: expected a tensor (N, ...) from the function, a value for each row, "
                "got a single number"
            )
        if value.is_complex():
            raise TypeError(
                f"likelihood: expected real values from the function, got {value.dtype}; "
                "torch.view_as_real keeps both parts"
            )
        return Moments(value.double())

    def entropy(self, mean: Tensor) -> None:
        """None: nothing is known about the target."""
        del mean


NAMED: Final[dict[str, Callable[[], Likelihood]]] = {
    "categorical": Categorical,
    "bernoulli": Bernoulli,
    "gaussian": Gaussian,
}


def resolve(likelihood: Name | Likelihood | Callable[[Any], Tensor]) -> Likelihood:
    """A likelihood from its name, from itself, or from a function of the output.

    Raises:
        ValueError: an unknown name.
        TypeError: something else.

    Example:
        >>> type(resolve("bernoulli")).__name__
        'Bernoulli'
    """
    names = ", ".join(map(repr, NAMED))
    expected = f"expected {names}, an object of fastbconv.likelihoods, or a function"
    if isinstance(likelihood, str):
        if likelihood not in NAMED:
            raise ValueError(f"likelihood: {expected} of the output, got {likelihood!r}")
        return NAMED[likelihood]()
    if isinstance(likelihood, Likelihood) and not isinstance(likelihood, type):
        return likelihood
    if callable(likelihood) and not isinstance(likelihood, type):
        return Function(likelihood)
    raise TypeError(f"likelihood: {expected} of the output, got {likelihood!r}")


def _entropy(probabilities: Tensor) -> Tensor:
    """Of distributions on the last axis."""
    return torch.special.entr(probabilities).sum(-1)


def _tensor(likelihood: str, value: object) -> Tensor:
    """The value in float64, if it is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"output: expected a tensor for a {likelihood} likelihood, got {_kind(value)}; a "
            "function as likelihood takes what the model returns and gives the tensor to average"
        )
    return value.double()


def _kind(value: object) -> str:
    if isinstance(value, tuple | list):
        return f"{len(value)} values"
    return type(value).__name__
