"""``predict`` for models that do not treat rows alike, or return anything."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from prediction_models import logits, separately, wide
from torch import Tensor, nn

import fastbconv as fb
from fastbconv.testing import assert_close


class Sequence(nn.Module):
    """Rows are on axis 1, as in nn.LSTM by default; logits of every step, or of the last."""

    def __init__(self, last: bool) -> None:
        super().__init__()
        self.body, self.head, self.last = nn.LSTM(4, 5), wide(fb.BayesLinear(5, 3)), last

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.body(x)
        return self.head(y[-1] if self.last else y)


class Mirrored(nn.Module):
    """Two copies of a batch behind each other, and their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.body = wide(fb.BayesLinear(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.body(torch.cat([x, x.flip(1)])).chunk(2)
        return (first + second) / 2


class Halves(nn.Module):
    """Siamese: the second half of a batch belongs to the first."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = wide(fb.BayesLinear(4, 4)), wide(fb.BayesLinear(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.body(x).chunk(2)
        return self.head((first - second).abs())


class Prototypes(nn.Module):
    """A layer that is given something else than the batch, of as many rows as there are draws."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.layer = nn.Parameter(torch.randn(8, 4)), wide(fb.BayesLinear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.layer(self.queries).T


class OneQuery(Prototypes):
    """Likewise, and but one row of what the layer gives is read."""

    def __init__(self, row: int) -> None:
        super().__init__()
        self.row = row

    def forward(self, x: Tensor) -> Tensor:
        return x * self.layer(self.queries)[self.row]


class TimeMajor(nn.Module):
    """Steps before rows, and the last step's output: all of it is of the last of several draws."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = wide(fb.BayesLinear(4, 5)), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x.transpose(0, 1)))[-1])


class Related(nn.Module):
    """Logits of which something is taken that is made of all of them."""

    def __init__(self, make: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.body, self.make = wide(fb.BayesLinear(4, 3)), make

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.body(x)
        return hidden - self.make(hidden) / 2


def numbered(hidden: Tensor) -> Tensor:
    """Everything of the rows behind the twelfth."""
    return hidden * (torch.arange(len(hidden)) >= 12).unsqueeze(1)


class Batch(nn.Module):
    """Batch norm by the statistics of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.body = wide(fb.BayesLinear(4, 3))
        self.norm = nn.BatchNorm1d(3, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.body(x))


MIXING: dict[str, Callable[[], nn.Module]] = {
    "steps": lambda: Sequence(False),
    "last-step": lambda: Sequence(True),
    "mirrored": Mirrored,
    "halves": Halves,
    "prototypes": Prototypes,
    "last-query": lambda: OneQuery(-1),
    "inner-query": lambda: OneQuery(5),
    "time-major": TimeMajor,
    "last-is-reference": lambda: Related(lambda hidden: hidden[-1:]),
    "first-is-reference": lambda: Related(lambda hidden: hidden[:1]),
    "both-ends": lambda: Related(lambda hidden: hidden.flip(0)),
    "neighbours": lambda: Related(lambda hidden: hidden.roll(1, 0)),
    "numbered": lambda: Related(numbered),
    "batch-statistics": Batch,
}


def _input(model: nn.Module) -> Tensor:
    if isinstance(model, TimeMajor):
        return torch.randn(6, 16, 4)
    return torch.randn(6, 2, 4) if isinstance(model, Sequence) else torch.randn(6, 4)


@pytest.mark.parametrize("num_samples", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("name", MIXING)
def test_a_model_that_mixes_rows_gets_a_pass_for_each_function(name: str, num_samples: int) -> None:
    """A shared pass of these gave other figures, without an error for most."""
    model = MIXING[name]()
    x = _input(model)
    got = fb.predict(model, x, num_samples, likelihood=logits, keep_samples=True)
    expected = separately(model.eval(), x, num_samples)
    assert_close(got.samples, expected, 1e-5, 1e-6)
    assert bool((got.variance > 0).all())


@pytest.mark.parametrize("name", MIXING)
def test_asking_for_shared_passes_of_such_a_model_is_an_error(name: str) -> None:
    model = MIXING[name]()
    with pytest.raises(ValueError, match=r"samples_per_pass: expected .*4 functions in one pass"):
        fb.predict(model, _input(model), 8, likelihood=logits, samples_per_pass=4)
    assert model.training


@pytest.mark.parametrize(
    "name", ["steps", "last-step", "halves", "last-is-reference", "batch-statistics"]
)
def test_rows_that_belong_together_are_not_cut_by_memory(name: str) -> None:
    model = MIXING[name]()
    x = _input(model)
    got = fb.predict(model, x, 2, likelihood=logits, keep_samples=True, memory=1)
    assert_close(got.samples, separately(model.eval(), x, 2), 1e-5, 1e-6)


def test_equal_neighbours_prove_nothing() -> None:
    """Batch statistics of two equal rows are those of each alone."""
    model, x = Batch(), torch.randn(6, 4)
    x[1] = x[0]
    got = fb.predict(model, x, 2, likelihood=logits, keep_samples=True, memory=1)
    assert_close(got.samples, separately(model.eval(), x, 2), 1e-5, 1e-6)


def test_a_likelihood_sees_the_passes_of_the_prediction_alone() -> None:
    seen = []

    def likelihood(output: Tensor) -> Tensor:
        seen.append(tuple(output.shape))
        return output

    fb.predict(Mirrored(), torch.randn(5, 4), 4, likelihood=likelihood, memory=1)
    assert seen == [(1, 3)] * 20


def test_one_difference_from_its_first_batch_on_is_enough() -> None:
    """Tried once: afterwards each function has its pass."""
    model = Mirrored()
    seen = []
    model.register_forward_hook(lambda _m, _i, output: seen.append(len(output)))
    fb.predict(model, [torch.randn(3, 4)] * 2, 4, likelihood=logits)
    assert seen == [1, 3, 3, 12, 3, 3, 3, 3, 3, 3]


@pytest.mark.parametrize("first", [0.0, float("nan")])
def test_a_batch_that_tells_no_functions_apart_proves_nothing(first: float) -> None:
    """It was taken for the proof, and the batches behind it got wrong variances."""
    model = Mirrored()
    nn.init.zeros_(model.body.bias)
    batches = [torch.full((6, 4), first), torch.randn(6, 4)]
    got = fb.predict(model, batches, 8, likelihood=logits, keep_samples=True)
    assert_close(got.samples[:, 6:], separately(model.eval(), batches[1], 8), 1e-5, 1e-6)


def test_rows_that_give_the_same_prove_nothing() -> None:
    """Nor may they be cut apart: here each is the reference of the others."""
    model, x = MIXING["last-is-reference"](), torch.randn(6, 4)
    x[:3] = x[0]
    got = fb.predict(model, x, 2, likelihood=logits, keep_samples=True, memory=1)
    assert_close(got.samples, separately(model.eval(), x, 2), 1e-5, 1e-6)


def test_a_rectified_output_that_is_zero_proves_nothing() -> None:
    """A function that is zero is found again; what is wrong with another tells them apart."""
    for seed in range(20):
        torch.manual_seed(seed)
        model, x = nn.Sequential(Mirrored(), nn.ReLU()), torch.randn(1, 4)
        got = fb.predict(model, x, 8, likelihood=logits, keep_samples=True)
        assert_close(got.samples, separately(model.eval(), x, 8), 1e-5, 1e-6)


def test_functions_that_differ_by_no_more_than_rounding_share_no_pass() -> None:
    """In bfloat16 the mean of two functions passed for either: deviations were 11 % off."""
    model = Mirrored()
    nn.init.constant_(model.body.weight_rho, -4.6)
    x = torch.randn(6, 4)
    with torch.autocast("cpu", torch.bfloat16):
        got = fb.predict(model, x, 8, likelihood=logits, keep_samples=True)
        expected = separately(model.eval(), x, 8)
    assert torch.equal(got.samples, expected.double())


def test_asked_for_shared_passes_are_made_of_functions_that_do_not_differ() -> None:
    model = fb.BayesLinear(4, 3)
    nn.init.constant_(model.weight_rho, -30.0)
    seen = []
    model.register_forward_hook(lambda _m, _i, output: seen.append(len(output)))
    fb.predict(model, torch.randn(3, 4), 4, likelihood=logits, samples_per_pass=4, batch_size=3)
    assert seen[-1] == 12


def test_an_error_of_the_model_itself_is_raised_as_it_is() -> None:
    for samples_per_pass in (None, 1, 4):
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            fb.predict(
                nn.Sequential(nn.Linear(4, 4), fb.BayesLinear(4, 3)),
                torch.ones(2, 5),
                4,
                samples_per_pass=samples_per_pass,
            )


def test_a_batch_that_cannot_be_shared_later_on() -> None:
    """The first batch was proof enough; a shorter one takes another way through the model."""

    class Short(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = wide(fb.BayesLinear(4, 3))

        def forward(self, x: Tensor) -> Tensor:
            if len(x) > 8:
                raise IndexError("no more than 8 rows")
            return self.body(x)

    model, parts = Short(), [torch.randn(2, 4), torch.randn(3, 4)]
    got = fb.predict(model, parts, 4, likelihood=logits, keep_samples=True)
    assert_close(got.samples, separately(model, torch.cat(parts), 4), 1e-5, 1e-6)
    with pytest.raises(ValueError, match="got IndexError: no more than 8 rows; use samples_per"):
        fb.predict(model, parts, 4, likelihood=logits, samples_per_pass=4)


# --- outputs --------------------------------------------------------------------------------------


@dataclasses.dataclass
class Output:
    """No structure that PyTorch knows."""

    logits: Tensor


class Returning(nn.Module):
    """A layer, and what is made of its output."""

    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.body, self.make = wide(fb.BayesLinear(4, 3)), make

    def forward(self, x: Tensor) -> Any:
        return self.make(self.body(x))


RETURNED: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "namespace": (lambda y: types.SimpleNamespace(logits=y), lambda output: output.logits),
    "dataclass": (Output, lambda output: output.logits),
    "distribution": (lambda y: torch.distributions.Normal(y, 1.0), lambda output: output.mean),
    "loss": (lambda y: (y, y.square().mean()), lambda output: output[0] + output[1]),
    "none": (lambda y: {"logits": y, "loss": None, "name": "y"}, lambda output: output["logits"]),
}


@pytest.mark.parametrize("name", RETURNED)
def test_a_likelihood_gets_what_the_model_returns_for_one_function(name: str) -> None:
    make, read = RETURNED[name]
    model, x = Returning(make), torch.randn(5, 4)

    def likelihood(output: Any) -> Tensor:
        value = read(output)
        assert len(value) in (1, 2, 5)  # never a whole pass
        return value

    for memory in (None, 1):
        got = fb.predict(model, x, 4, likelihood=likelihood, keep_samples=True, memory=memory)
        for sample in range(4):
            with torch.no_grad(), fb.fixed_sample(model, 0, sample=sample):
                expected = read(model(x))
            assert_close(got.samples[sample], expected, 1e-5, 1e-6)


def test_structures_of_rows_share_a_pass() -> None:
    """None, numbers and names in an output are no obstacle, and neither are NaN."""

    def make(y: Tensor) -> Any:
        return {
            "y": y,
            "all": [y.argmax(1), None, 2.5],
            "bad": y.new_tensor(torch.nan).expand(y.shape),
        }

    model = Returning(make)
    got = fb.predict(model, torch.randn(5, 4), 4, likelihood=lambda o: o["y"], samples_per_pass=4)
    assert got.mean.shape == (5, 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_rounding_of_the_dtype_is_no_difference(dtype: torch.dtype) -> None:
    body = [layer for _ in range(6) for layer in (nn.Linear(32, 32), nn.Tanh())]
    model = nn.Sequential(fb.BayesLinear(32, 32), *body)
    x = torch.randn(33, 32, dtype=dtype)
    for layer in body[::2]:
        layer.to(dtype)
    if dtype == torch.float64:
        model.double()
    got = fb.predict(model, x, 8, likelihood=logits, samples_per_pass=8)
    assert bool(got.mean.isfinite().all())


def test_rounding_under_autocast_is_no_difference() -> None:
    """The output is float32, what leads to it is not."""

    class Wide(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.float()

    model = nn.Sequential(fb.BayesLinear(64, 64), nn.Linear(64, 64), nn.Tanh(), Wide())
    with torch.autocast("cpu", torch.bfloat16):
        got = fb.predict(model, torch.randn(33, 64), 8, likelihood=logits, samples_per_pass=8)
    assert bool(got.mean.isfinite().all())


@pytest.mark.parametrize("value", [{"a": torch.ones(2)}, (torch.ones(2), torch.ones(2)), 3.0])
def test_a_likelihood_of_several_heads_is_told_what_to_do(value: Any) -> None:
    with pytest.raises(TypeError, match=r"likelihood: expected a tensor .*loop over fixed_sam"):
        fb.predict(fb.BayesLinear(4, 3), torch.ones(2, 4), 2, likelihood=lambda _: value)


class _MakesItsHead(nn.Module):
    """Has its second layer from its first call on, in front of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"body": fb.BayesLinear(4, 6)})

    def forward(self, x: Tensor) -> Tensor:
        if len(self.parts) == 1:
            torch.manual_seed(0)
            parts = {"head": fb.BayesLinear(6, 3), "body": self.parts["body"]}
            self.parts = nn.ModuleDict(parts).eval()
        return self.parts["head"](self.parts["body"](x))


def test_a_layer_that_the_first_pass_makes_has_its_noise_by_the_seed() -> None:
    torch.manual_seed(1)
    model, x = _MakesItsHead(), torch.randn(5, 4)
    got = fb.predict(model, x, 3, likelihood=logits, keep_samples=True)
    assert got.samples is not None
    for s, sample in enumerate(got.samples):
        with torch.no_grad(), fb.fixed_sample(model, 0, sample=s):
            assert_close(sample, model(x).double(), 1e-6, 1e-6)
