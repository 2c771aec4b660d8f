"""``predict``: the average over functions drawn from the posterior, and how far they agree.

Note [One set of functions]. Function s of a seed is that of ``fixed_sample(model, seed,
sample=s)``, for every batch, whatever the batch size, the number of samples in a pass, or the rank.
Every function's output is turned into moments by itself and added to the running statistics in the
order of s, in float64: so the figures, too, do not depend on how the work was cut. Where one of our
kernels convolves they are the same bits. The choice of ``algorithm("auto")`` depends on the size of
a batch, as does the rounding of PyTorch's own kernels. What may share a pass is found out: see
``_passes``, Note [Sharing is proved].
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

from . import _arguments, likelihoods
from ._passes import Forward, Passes, one_at_a_time, rows
from .likelihoods import Likelihood, Moments
from .models import bayesian_layers, eval_mode

# Bytes of one pass: larger tensors leave a CPU's caches, and the allocator's for reuse.
_MEMORY = {"cpu": 2**26}
_DEVICE_MEMORY = 2**30
# A pass is shared where so many functions fit: fewer save less than its larger tensors cost.
_SHARED = {"cpu": 16}
_PEAK = 4  # tensors of the largest layer's size that live at once: input, output, a skip, a copy
_QUIET_SECONDS = 2.0  # before a progress bar shows by itself


@dataclass(frozen=True)
class Prediction:
    """The average over functions. Tensors are float64, on the device of the model's output.

    Attributes:
        mean: mean over the functions of probabilities, of the target's mean, or of what a function
            given as likelihood returned; (N, ...).
        variance: of the same over the functions, sum of squares / number of functions: what the
            weights are to blame for. For a gaussian likelihood the variance of the target,
            ``aleatoric_variance + epistemic_variance``.
        entropy: of the mean probabilities, in nats: the whole uncertainty. None for a gaussian
            likelihood and a function, as the next two.
        expected_entropy: mean of the functions' entropies, in nats: what known weights leave.
        mutual_information: of target and weights, the difference of the two, in nats.
        aleatoric_variance: mean of the functions' variances; gaussian only.
        epistemic_variance: variance of the functions' means; gaussian only.
        samples: the functions' own ``mean``, (num_samples, N, ...); with ``keep_samples``.

    Example:
        >>> from fastbconv import BayesLinear
        >>> found = predict(BayesLinear(3, 2), torch.ones(4, 3), num_samples=8)
        >>> tuple(found.mean.shape), tuple(found.entropy.shape)
        ((4, 2), (4,))
    """

    mean: Tensor
    variance: Tensor
    entropy: Tensor | None = None
    expected_entropy: Tensor | None = None
    mutual_information: Tensor | None = None
    aleatoric_variance: Tensor | None = None
    epistemic_variance: Tensor | None = None
    samples: Tensor | None = None


def predict(
    model: nn.Module,
    x: Tensor | Iterable[Any],
    num_samples: int = 32,
    *,
    likelihood: likelihoods.Name | Likelihood | Any = "categorical",
    seed: int | Tensor = 0,
    forward: Forward | None = None,
    batch_size: int | None = None,
    samples_per_pass: int | None = None,
    memory: int | None = None,
    keep_samples: bool = False,
    progress: bool | None = None,
) -> Prediction:
    r"""Averages the predictions of ``num_samples`` functions drawn from the posterior.

    .. code-block:: text

        p_s         = likelihood(f_s(x))                    probabilities, never logits
        mean        = 1/S sum_s p_s
        entropy     = H(mean),  expected_entropy = 1/S sum_s H(p_s)           in nats
        mutual_information = entropy - expected_entropy

    The functions are the same for every batch and every call with this seed: function s is that of
    ``with fixed_sample(model, seed, sample=s)``, on every rank. The seed is 0 unless given, so that
    ``torch.manual_seed`` changes nothing. The model runs in ``eval()`` without gradients; the
    ``training`` flag of every module is put back, also after an exception. Dropout is off; every
    Bayesian layer draws, whatever its ``eval_mode``. A model without Bayesian layers is one
    function, and gets one sample. A ``collect_kl`` around it, and ``kl_loss`` after it, see nothing
    of the prediction. Threads that predict with one model wait for each other; nothing else may
    call it meanwhile.

    Several functions share a pass (``weight_samples``) where the model treats the rows of its input
    alike. That is tried: the first such pass has to return what passes of its first and its last
    function alone return, to rounding (64 machine epsilon of the largest value, or 4 of a dtype of
    16 bits, or of TF32, on the way), which costs those two passes once for each prediction. Where
    it does not (rows on another axis, as in ``nn.LSTM`` without ``batch_first``; halves of a batch
    that belong together; outputs that are no tensors with rows; random numbers of the model's own;
    an error), or where the two functions hardly differ, by less than four times what was found
    between together and alone, every function gets a pass of its own. A compiled model is compiled
    for each number of functions in a pass: for one, and for one or two others.

    Args:
        model: any module; it is given copies of the batches, and may change them in place.
        x: a tensor (N, ...), or a DataLoader or other iterable of batches: tensors, or tuples whose
            first element is taken; with ``forward`` any structure of tensors. Moved to the device
            of the model's parameters.
        num_samples: number of functions.
        likelihood: 'categorical' (logits, classes on axis 1; further axes become maps),
            'bernoulli' (a logit for each target), 'gaussian' (the pair (mean, variance)), an object
            of ``fastbconv.likelihoods``, or a function of what the model returned for one batch
            under one function, which gives the tensor to be averaged.
        seed: int or int64 tensor (2,).
        forward: how a batch is given to the model, ``forward(model, batch)``, the batch being on
            the model's device; it has to call ``model``, before which rows are repeated (arguments
            by keyword included). The rows are those of the first tensor with dimensions. None:
            ``model(batch)`` of a tensor, ``model(batch[0])`` of a tuple or list.
        batch_size: rows of a tensor ``x`` in one pass; None: as ``memory`` allows, where two rows
            give what each gives alone; else all.
        samples_per_pass: functions in one pass, at most; they are spread evenly, so that passes
            have two sizes at most. An error where the model cannot have them. None: as ``memory``
            allows, and one where functions cannot share a pass or, on a CPU, fewer than 16 fit:
            larger tensors would cost more than fewer passes save.
        memory: bytes that the tensors of one pass may take, weights apart; a rough bound, from the
            largest output of a module in a pass over one row with mean weights, made beforehand.
            None: 64 MiB on a CPU, where more is slower, and 1 GiB elsewhere. Memory does not grow
            with ``num_samples`` unless samples are kept.
        keep_samples: also return every function's own prediction.
        progress: a progress bar (tqdm) in samples of batches; None: on a terminal, where the work
            takes more than two seconds.

    Returns:
        A ``Prediction``.

    Raises:
        TypeError: ``x`` holds no tensors, or a likelihood of another type.
        ValueError: a number that does not fit, an unknown likelihood, no batches, or a model that
            cannot have ``samples_per_pass`` functions in a pass.
        ImportError: ``progress=True`` without tqdm.

    Warns:
        UserWarning: Bayesian layers were not called, so that their noise has no part in the
            prediction: the model reads ``layer.weight`` itself, the mean, as ``F.linear`` in a
            ``forward`` of one's own and the fast path of ``nn.TransformerEncoderLayer`` do. Not
            known of compiled modules.

    Example:
        >>> from fastbconv import BayesLinear
        >>> prediction = predict(BayesLinear(3, 2), torch.ones(5, 3), num_samples=8)
        >>> prediction.mean.shape, prediction.mutual_information.shape
        (torch.Size([5, 2]), torch.Size([5]))
    """
    num_samples = _arguments.integer("num_samples", num_samples, 1)
    samples_per_pass = _optional("samples_per_pass", samples_per_pass)
    if forward is not None and not callable(forward):
        raise TypeError(
            "forward: expected a function of the model and a batch, got "
            f"{_arguments.type_name(forward)}; None calls model(batch)"
        )
    plan = _Plan(
        Passes(model, seed, forward, insists=samples_per_pass is not None),
        likelihoods.resolve(likelihood),
        num_samples if bayesian_layers(model) else 1,
        samples_per_pass,
        _optional("memory", memory),
        keep_samples,
    )
    batch_size = _optional("batch_size", batch_size)
    if batch_size is not None and not isinstance(x, Tensor):
        raise ValueError(f"batch_size: expected None for an iterable of batches, got {batch_size}")
    with one_at_a_time(model), eval_mode(model), torch.no_grad(), plan.passes.apart():
        batches = plan.batches(x, batch_size)
        with _bar(plan.num_samples, batches, progress) as advance:
            parts = [plan.predict_batch(batch, advance) for batch in batches]
    if not parts:
        raise ValueError("x: expected at least one batch, got none")
    left_out = plan.passes.layers_left_out()
    if left_out:
        warnings.warn(
            f"model: layers were not called, so that their noise has no part in the prediction: "
            f"{_arguments.listed(left_out)}; a model that reads layer.weight gets the mean, "
            "layer(x) draws",
            stacklevel=2,
        )
    return _concatenated(parts)


@dataclass
class _Plan:
    """One prediction: what is drawn, and in which pieces."""

    passes: Passes
    likelihood: Likelihood
    num_samples: int
    samples_per_pass: int | None
    memory: int | None
    keep_samples: bool
    rows: int | None = None

    def batches(self, x: Any, batch_size: int | None) -> Iterable[Any]:
        """The batches, a tensor cut as memory allows."""
        if isinstance(x, Tensor):
            return x.split(batch_size or self._rows_together(x)) if x.ndim else [x]
        if isinstance(x, str | bytes | Mapping) or not isinstance(x, Iterable):
            raise TypeError(
                "x: expected a tensor, or an iterable of tensors or of tuples that begin with "
                f"one, got {_arguments.type_name(x)}; one batch of another form is forward=..., "
                "[x]"
            )
        return x

    def _rows_together(self, x: Tensor) -> int:
        """How many rows of a tensor make a batch: all, where a part of them is another input."""
        n = len(x)
        cut = min(self.rows_per_pass(self.passes.batch(x[:2])), max(n, 1))
        if cut >= n:
            return cut
        for other in dict.fromkeys((n - 1, n // 2, n // 4 or 1)):  # neighbours may be equal
            pair = self.passes.batch(torch.cat([x[:1], x[other : other + 1]]))
            alike = self.passes.rows_are_alike(pair, self.likelihood)
            if alike is not None:
                return cut if alike else n
        return n

    def rows_per_pass(self, batch: Any) -> int:
        """How many rows of all functions together fit into memory."""
        if self.rows is None:
            default = _MEMORY.get(self.passes.device.type, _DEVICE_MEMORY)
            row = self.passes.bytes_per_row(batch)
            self.rows = max(1, (self.memory or default) // max(1, _PEAK * row))
        return self.rows

    def predict_batch(self, batch: Any, advance: Any) -> Prediction:
        """All functions on one batch."""
        batch = self.passes.batch(batch)
        count = self._count(batch)
        running = _Running(self.likelihood, self.keep_samples)
        for first in range(0, self.num_samples, count):
            # An output of this pass that a variable held would still be there during the next one.
            outputs = self.passes.outputs(batch, first, min(count, self.num_samples - first))
            for moments in map(self.likelihood.moments, outputs):
                running.add(moments)
                advance()
        return running.result()

    def _count(self, batch: Any) -> int:
        """Functions in a pass: evenly, since a compiled model is compiled for each number."""
        n = rows(batch)
        if n == 0 or self.passes.shares is False:
            return 1
        count = self.samples_per_pass or self.rows_per_pass(batch) // n
        if self.samples_per_pass is None and count < _SHARED.get(self.passes.device.type, 2):
            return 1
        count = min(count, self.num_samples)
        passes = -(-self.num_samples // max(1, count))
        return -(-self.num_samples // passes)


@dataclass
class _Running:
    """Mean and variance over functions, one after the other (Welford), and sums of the rest."""

    likelihood: Likelihood
    keep_samples: bool
    count: int = 0
    mean: Tensor | None = None
    squares: Tensor | None = None
    variance: Tensor | None = None
    entropy: Tensor | None = None
    samples: list[Tensor] = field(default_factory=list)

    def add(self, moments: Moments) -> None:
        """Takes one function in."""
        self.count += 1
        if self.keep_samples:
            self.samples.append(moments.mean)
        if self.mean is None or self.squares is None:
            self.mean, self.squares = moments.mean.clone(), torch.zeros_like(moments.mean)
            self.variance, self.entropy = moments.variance, moments.entropy
            return
        difference = moments.mean - self.mean
        self.mean += difference / self.count
        self.squares += difference * (moments.mean - self.mean)
        if moments.variance is not None:
            self.variance = self.variance + moments.variance
        if moments.entropy is not None:
            self.entropy = self.entropy + moments.entropy

    def result(self) -> Prediction:
        """What has been gathered."""
        assert self.mean is not None
        assert self.squares is not None
        spread = self.squares / self.count
        entropy = self.likelihood.entropy(self.mean)
        expected = None if self.entropy is None else self.entropy / self.count
        information = None
        if entropy is not None and expected is not None:
            information = (entropy - expected).clamp_min(0)
        noise = None if self.variance is None else self.variance / self.count
        return Prediction(
            mean=self.mean,
            variance=spread if noise is None else spread + noise,
            entropy=entropy,
            expected_entropy=expected,
            mutual_information=information,
            aleatoric_variance=noise,
            epistemic_variance=None if noise is None else spread,
            samples=torch.stack(self.samples) if self.keep_samples else None,
        )


def _concatenated(parts: list[Prediction]) -> Prediction:
    """The rows of several batches; ``samples`` has them on its second axis."""
    if len(parts) == 1:
        return parts[0]
    joined = {}
    for name in (entry.name for entry in fields(Prediction)):
        values = [getattr(part, name) for part in parts]
        axis = 1 if name == "samples" else 0
        joined[name] = None if values[0] is None else torch.cat(values, axis)
    return Prediction(**joined)


def _optional(name: str, value: int | None) -> int | None:
    return None if value is None else _arguments.integer(name, value, 1)


@contextmanager
def _bar(num_samples: int, batches: Any, wanted: bool | None) -> Iterator[Any]:
    """What to call after every sample of a batch; a bar advances with it where one is wanted."""
    tqdm = None
    if wanted is not False:
        try:
            from tqdm import tqdm
        except ImportError as error:
            if wanted:
                raise ImportError(
                    "progress: expected tqdm to be installed, got none; pip install tqdm, or "
                    "progress=False"
                ) from error
    if tqdm is None:
        yield lambda: None
        return
    try:
        total = num_samples * len(batches)
    except TypeError:  # an iterator, or a DataLoader of an IterableDataset
        total = None
    delay, disable = (0.0, False) if wanted else (_QUIET_SECONDS, None)
    options = {"delay": delay, "disable": disable, "desc": "predict", "unit": "sample"}
    with tqdm(total=total, leave=False, **options) as bar:
        yield lambda: bar.update() and None
