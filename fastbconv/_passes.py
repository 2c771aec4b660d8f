"""The passes of a prediction over its model: how a batch is given, and what shares a pass.

Note [Sharing is proved]. One pass for many functions, or over a part of the rows, gives what the
model gives only where it treats the rows of its input alike. No model says so: rows may be another
axis (``nn.LSTM``), two halves of a batch may belong together, a layer may be given something else
than the batch. So ``predict`` tries: the first pass that several functions share has to return what
passes of the first and of the last of them alone return, and two rows have to give what each gives
alone. Where they do not, functions get a pass each, and all rows of a tensor stay together. Both
ends, because a model that reads but the last of its rows, or takes the last as a reference, gives
the last function alone its due. And it proves nothing unless the two functions, or rows, differ by
more than ``_APART`` times what was found between together and alone: what mixing two that hardly
differ changes would pass for rounding.

Note [What lasts]. A prediction leaves nothing behind in a model: its passes run on copies of the
batch, which a model may change in place; collectors of a training step do not see them; and the
layers forget the calls, of whose weights a Monte-Carlo KL would otherwise be.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass, field
from numbers import Number
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only

from . import _arguments
from .contexts import installed
from .layers._base import BayesLayer
from .layers.tfp_base import VariationalLayer
from .likelihoods import Likelihood
from .models import bayesian_layers, fixed_sample, mean_weights, placement, seeds_of_layers
from .weight_samples import outside_any_other, weight_samples

Forward = Callable[[nn.Module, Any], Any]

_TF32_EPS = 2.0**-10
_APART = 4.0
_LAST_CALLS = ("_last_draw", "_last")  # what layers of either face keep of their last call
_LOCKS: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()
_LOCKS_LOCK = threading.Lock()


@contextmanager
def one_at_a_time(model: nn.Module) -> Iterator[None]:
    """Waits until no other thread predicts with this model, compiled or not."""
    with _LOCKS_LOCK:
        lock = _LOCKS.setdefault(_uncompiled(model), threading.RLock())
    with lock:
        yield


@dataclass
class Passes:
    """Runs the model for one prediction.

    Attributes:
        model: any module.
        seed: of the functions.
        forward: how a batch is given to the model; None: ``_first``, alone.
        insists: several functions in a pass were asked for: an error where that cannot be.
        shares: whether functions share passes; None: not tried yet.
        called: positions of the layers that were called in the passes whose output was used.
    """

    model: nn.Module
    seed: int | Tensor
    forward: Forward | None
    insists: bool
    shares: bool | None = None
    called: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.layers = bayesian_layers(self.model)
        self.device, _ = placement(self.model)

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Keeps the prediction out of what a training step reads; see Note [What lasts]."""
        kept = [
            (layer, name, vars(layer)[name])
            for layer in self.layers
            for name in _LAST_CALLS
            if name in vars(layer)
        ]
        settings = [{"apart": True, "calls": (self.called, n)} for n in range(len(self.layers))]
        try:
            with installed(self.layers, settings):
                yield
        finally:
            for layer, name, value in kept:
                setattr(layer, name, value)

    def batch(self, value: Any) -> Any:
        """What the model is given of an item of the iterable, on the model's device."""
        if self.forward is None and isinstance(value, tuple | list) and value:
            value = value[0]
        _check_batch(value, self.forward is not None)
        return tree_map_only(Tensor, lambda tensor: tensor.to(self.device), value)

    def outputs(self, batch: Any, first: int, count: int) -> Iterator[Any]:
        """What the model returns under each of ``count`` functions, in one pass if possible."""
        alone: dict[int, Any] = {}
        if count > 1 and self.shares is not False:
            output, alone = self._shared(batch, first, count)
            if output is not None:
                yield from (_part(output[0], s, rows(batch)) for s in range(count))
                return
        for sample in range(first, first + count):
            yield alone.pop(sample) if sample in alone else self._run(batch, sample, 1)

    def _run(self, batch: Any, first: int, count: int, compiled: bool = True) -> Any:
        with self._functions(first, count):
            return self._give(self.model if compiled else _uncompiled(self.model), batch)

    @contextmanager
    def _functions(self, first: int, count: int) -> Iterator[None]:
        """As ``fixed_sample`` around ``weight_samples``; for one function in one frame."""
        if count > 1:
            fixed = fixed_sample(self.model, self.seed, sample=first)
            with fixed, weight_samples(self.model, count):
                yield
            return
        layers = bayesian_layers(self.model)  # a forward may have made one
        seeds = seeds_of_layers(layers, self.seed, first)
        settings = [{**own, "num_samples": 1, "share_input": False} for own in seeds]
        with installed(layers, settings, outside_any_other):
            yield

    def _give(self, model: nn.Module, batch: Any) -> Any:
        batch = tree_map_only(Tensor, torch.clone, batch)
        return model(batch) if self.forward is None else self.forward(model, batch)

    def _shared(
        self, batch: Any, first: int, count: int
    ) -> tuple[tuple[Any] | None, dict[int, Any]]:
        """The output of one pass of several functions, in a tuple; None where they share none: then
        with what functions alone have returned on the way, by number."""
        n, last = rows(batch), first + count - 1
        alone: dict[int, Any] = {}
        apart = math.inf
        if self.shares is None:
            # Before the shared pass, and copied: a CUDA graph of torch.compile writes over it.
            for sample in (first, last):
                alone[sample] = tree_map_only(Tensor, torch.clone, self._run(batch, sample, 1))
            if not self.insists and any(_unfit(output, n, 1) for output in alone.values()):
                self.shares = False
                return None, alone
            apart = self._distance(*alone.values())
            if apart == 0.0 and not self.insists:  # asked again at the next batch
                return None, alone
        called = set(self.called)
        failure: Exception | None = None
        try:
            output = self._run(batch, first, count)
            wrong = _unfit(output, n, count)
            for sample, expected in alone.items():
                part = None if wrong else _part(output, sample - first, n)
                wrong = wrong or self._difference(part, expected)
            if wrong is None:
                parts = [(_part(output, s - first, n), found) for s, found in alone.items()]
                between = max((self._distance(*pair) for pair in parts), default=0.0)
                proved = apart > _APART * between
                if proved or self.insists:
                    self.shares = True if apart > 0.0 else None
                    return (output,), {}
        except Exception as error:  # whatever it is: if it is no matter of sharing, it comes again
            wrong = f"{type(error).__name__}: {error}"
            failure = error if self.insists else None  # holds the tensors of the pass
        self.called.intersection_update(called)
        if not self.insists:
            self.shares = False
            return None, alone
        if not alone:
            self._run(batch, last, 1)
        raise ValueError(
            f"samples_per_pass: expected a model that gives {count} functions in one pass over "
            f"{count} groups of {n} rows what it gives each, got {wrong}; use samples_per_pass=1 "
            "or None"
        ) from failure

    def _difference(self, got: Any, expected: Any) -> str | None:
        """What differs by more than rounding; None: nothing."""
        (ours, our_form), (theirs, form) = tree_flatten(got), tree_flatten(expected)
        if our_form != form:
            return "an output of another structure"
        for one, other in zip(ours, theirs, strict=True):
            if not isinstance(one, Tensor) or not isinstance(other, Tensor):
                same = one is other or (type(one) is type(other) and one == other)
                if not same:
                    return f"{one!r} instead of {other!r}"
            elif one.shape != other.shape or one.dtype != other.dtype:
                return (
                    f"{one.dtype} {tuple(one.shape)} instead of {other.dtype} {tuple(other.shape)}"
                )
            elif _distance(one, other) > self._rounding(one.dtype):
                return "other values"
        return None

    def _distance(self, one: Any, other: Any) -> float:
        """The largest difference of two outputs, in units of rounding."""
        pairs = list(zip(_tensors(one), _tensors(other), strict=False))
        if any(a.shape != b.shape or a.dtype != b.dtype for a, b in pairs):
            return math.inf
        distances = (_distance(a, b) / max(self._rounding(a.dtype), 1e-300) for a, b in pairs)
        return max(distances, default=0.0)

    def _rounding(self, dtype: torch.dtype) -> float:
        """What sums in another order may change, relative to the largest value.

        That of the coarsest dtype on the way to the output: those of the parameters, of autocast,
        and TF32, in which a GPU may convolve.
        """
        dtypes = [dtype, *(parameter.dtype for parameter in self.model.parameters())]
        kind = self.device.type
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            dtypes.append(torch.get_autocast_dtype(kind))
        allowed = 0.0
        for found in dtypes:
            if found.is_floating_point or found.is_complex:
                eps = torch.finfo(found).eps
                allowed = max(allowed, (4 if eps > 1e-4 else 64) * eps)
                if found is torch.float32 and kind == "cuda" and _takes_tf32():
                    allowed = max(allowed, 4 * _TF32_EPS)
        return allowed

    # --- memory -----------------------------------------------------------------------------------

    def bytes_per_row(self, batch: Any) -> int:
        """Bytes of the largest output of a module for one row; no noise is drawn."""
        try:
            return self._largest_output(_rows_of(batch, 0, 1))
        except Exception:  # some models need more than one row; any other error comes again
            pass
        n = max(1, rows(batch))
        return -(-self._largest_output(batch) // n)

    def _largest_output(self, batch: Any) -> int:
        model = _uncompiled(self.model)  # compiled modules do not call new hooks
        sizes = [_bytes(batch)]
        handles = [
            module.register_forward_hook(lambda _module, _input, out: sizes.append(_bytes(out)))
            for module in model.modules()
        ]
        try:
            with mean_weights(model):
                self._give(model, batch)
        finally:
            for handle in handles:
                handle.remove()
            self.called.clear()  # with hooks, modules take other ways
        return max(sizes)

    def rows_are_alike(self, batch: Any, likelihood: Likelihood) -> bool | None:
        """Whether two rows give what each gives alone; None: they give the same, which tells
        nothing.

        That is the output where it has rows, and what the likelihood finds in it where only the
        likelihood knows: it may be a function that notes its calls.
        """
        try:
            # One row and two would be compiled for nothing else.
            both, *alone = (
                self._run(_rows_of(batch, start, stop), 0, 1, compiled=False)
                for start, stop in ((0, 2), (0, 1), (1, 2))
            )
            if _unfit(both, 1, 2) is not None:
                both, *alone = (astuple(likelihood.moments(output)) for output in (both, *alone))
            if _unfit(both, 1, 2) is not None:
                return False
            parts = [(_part(both, row, 1), one) for row, one in enumerate(alone)]
            if any(self._difference(*pair) for pair in parts):
                return False
            apart, between = self._distance(*alone), max(self._distance(*pair) for pair in parts)
            return None if apart == 0.0 else apart > _APART * between
        except Exception:  # an error that is no matter of rows comes again
            return False
        finally:
            self.called.clear()

    # --- layers without a part --------------------------------------------------------------------

    def layers_left_out(self) -> list[str]:
        """Names of the layers that no pass has called.

        Without those of compiled modules, which note no calls, and layers of the user's own, which
        have only the mark of a Bayesian layer.
        """
        compiled = {
            layer
            for module in self.model.modules()
            if _is_compiled(module)
            for layer in bayesian_layers(module)
        }
        left = {
            layer
            for position, layer in enumerate(self.layers)
            if position not in self.called
            and layer not in compiled
            and isinstance(layer, BayesLayer | VariationalLayer)
        }
        return [name for name, module in self.model.named_modules() if module in left]


def rows(batch: Any) -> int:
    """Rows of a batch: those of its first tensor with dimensions."""
    return next(len(value) for value in _tensors(batch) if value.ndim)


def _rows_of(batch: Any, start: int, stop: int) -> Any:
    n = rows(batch)
    return tree_map_only(
        Tensor, lambda value: value[start:stop] if value.ndim and len(value) == n else value, batch
    )


def _part(output: Any, sample: int, n: int) -> Any:
    """The rows of one function."""
    return tree_map_only(Tensor, lambda value: value[sample * n : (sample + 1) * n], output)


def _unfit(output: Any, n: int, count: int) -> str | None:
    """Why an output cannot be cut into functions; None: it can."""
    for value in tree_leaves(output):
        if isinstance(value, Tensor):
            if not value.ndim or len(value) != count * n:
                return f"an output of shape {tuple(value.shape)} instead of {count * n} rows"
        elif value is not None and not isinstance(value, Number | str):
            return f"an output that holds a {_arguments.type_name(value)}"
    return None


def _distance(got: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest value; NaN is NaN."""
    if not got.numel():
        return 0.0
    if not got.is_floating_point() and not got.is_complex():
        return 0.0 if torch.equal(got, expected) else math.inf
    wide = torch.complex128 if got.is_complex() else torch.float64
    got, expected = got.to(wide), expected.to(wide)
    same = (got == expected) | (got.isnan() & expected.isnan())
    size = expected.abs()
    largest = float(size.masked_fill(~size.isfinite(), 0.0).max())
    between = (got - expected).abs().masked_fill(same, 0.0)
    furthest = float(between.nan_to_num(nan=math.inf, posinf=math.inf).max())
    return furthest / largest if largest > 0.0 else (math.inf if furthest > 0.0 else 0.0)


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _bytes(value: Any) -> int:
    """Of the largest tensor. Compilers trace it, as a hook of ``module.compile()``."""
    return max([0, *(tensor.numel() * tensor.element_size() for tensor in _tensors(value))])


def _uncompiled(model: nn.Module) -> nn.Module:
    found: nn.Module = getattr(model, "_orig_mod", model)
    return found


def _takes_tf32() -> bool:
    parts = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)
    return any(part.fp32_precision == "tf32" for part in parts)


def _is_compiled(module: nn.Module) -> bool:
    """By torch.compile(module), module.compile(), or torch.compile of its forward."""
    return (
        hasattr(module, "_orig_mod")
        or module._compiled_call_impl is not None
        or hasattr(module.forward, "_torchdynamo_orig_callable")
    )


def _check_batch(batch: Any, any_structure: bool) -> None:
    if any_structure and not _tensors(batch):
        raise TypeError(
            "x: expected batches that hold tensors, got "
            f"{_arguments.type_name(batch)} without any in it"
        )
    if not any_structure and not isinstance(batch, Tensor):
        raise TypeError(
            "x: expected a tensor, or an iterable of tensors or of tuples that begin with one, got "
            f"{_arguments.type_name(batch)} in it; for other batches give "
            "forward=lambda model, batch: model(...)"
        )
    if not any(value.ndim for value in _tensors(batch)):
        raise ValueError("x: expected rows, got a tensor without dimensions")
