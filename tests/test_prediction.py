"""``predict``: the right average, the same functions however the work is cut."""

from __future__ import annotations

import math
import sys
import types

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastbconv as fb
from fastbconv import likelihoods, models, noise
from fastbconv.testing import assert_close, assert_same

FIELDS = ("mean", "variance", "entropy", "expected_entropy", "mutual_information", "samples")


def _model(classes: int = 5) -> nn.Sequential:
    model = nn.Sequential(
        fb.BayesConv2d(3, 4, 3, activation="relu"),
        nn.BatchNorm2d(4),
        nn.Dropout(0.5),
        fb.BayesConv2d(4, 8, 3),
        nn.Flatten(),
        fb.BayesLinear(128, classes, bayesian_bias=True),
    )
    with torch.no_grad():
        for layer in models.bayesian_layers(model):
            layer.weight_rho += 2.0  # functions that differ
    return model


def _segmentation() -> nn.Sequential:
    first = fb.BayesConv2d(3, 8, 3, padding=1, activation="relu")
    return nn.Sequential(first, fb.BayesConv2d(8, 4, 3, padding=1))


def _images(n: int = 7) -> Tensor:
    return torch.randn(n, 3, 8, 8)


def _same(one: fb.Prediction, other: fb.Prediction) -> None:
    for name in FIELDS:
        if getattr(one, name) is not None:
            assert_same(getattr(one, name), getattr(other, name), name)


# --- the average ----------------------------------------------------------------------------------


def _separately(model: nn.Module, x: Tensor, num_samples: int, seed: int = 0) -> Tensor:
    """(num_samples, N, ...) outputs, one pass for each function."""
    outputs = []
    for sample in range(num_samples):
        with torch.no_grad(), fb.fixed_sample(model, seed, sample=sample):
            outputs.append(model(x))
    return torch.stack(outputs)


@pytest.mark.parametrize("algorithm", ["direct", "library"])
def test_sample_s_is_the_function_of_fixed_sample(algorithm: str) -> None:
    model, x = _model().eval(), _images()
    with fb.algorithm(algorithm):
        got = fb.predict(model, x, 32, seed=3, keep_samples=True)
        expected = _separately(model, x, 32, seed=3).double().softmax(2)
    if algorithm == "direct":
        assert_same(got.samples, expected)
    assert_close(got.samples, expected, 1e-6, 1e-6)
    assert_close(got.mean, expected.mean(0), 1e-6, 1e-6)


def test_figures_are_those_of_the_definition() -> None:
    model, x = _model(), _images()
    got = fb.predict(model, x, 32, keep_samples=True)
    p = got.samples
    assert_close(got.mean, p.mean(0), 1e-12, 0)
    assert_close(got.variance, p.var(0, correction=0), 1e-9, 1e-15)
    entropy = -(p.mean(0) * p.mean(0).log()).sum(1)
    expected = -(p * p.log()).sum(2).mean(0)
    assert_close(got.entropy, entropy, 1e-12, 0)
    assert_close(got.expected_entropy, expected, 1e-12, 0)
    assert_close(got.mutual_information, entropy - expected, 1e-9, 1e-12)
    assert bool((got.mutual_information > 0).all())
    assert bool((got.entropy <= math.log(5)).all())
    assert got.aleatoric_variance is None
    assert fb.predict(model, x, 2).samples is None


def test_probabilities_are_averaged_and_never_logits() -> None:
    """The softmax of mean logits is overconfident: two functions that are sure of opposite classes
    make a coin."""
    layer = fb.BayesLinear(1, 2, bias=False)
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight_rho.fill_(50.0)
    got = fb.predict(layer, torch.ones(1, 1), 64)
    logits = _separately(layer, torch.ones(1, 1), 64).double()
    assert_close(got.mean, logits.softmax(2).mean(0), 1e-12, 0)
    assert got.entropy.item() > 0.5
    averaged = torch.special.entr(logits.mean(0).softmax(1)).sum()
    assert averaged.item() < 0.5 * got.entropy.item()


def test_segmentation_gives_maps() -> None:
    model, x = _segmentation(), _images(2)
    got = fb.predict(model, x, 4, keep_samples=True)
    assert got.mean.shape == got.variance.shape == (2, 4, 8, 8)
    assert got.entropy.shape == got.mutual_information.shape == (2, 8, 8)
    assert_close(got.mean.sum(1), torch.ones(2, 8, 8).double(), 1e-12, 0)
    pixel = torch.special.entr(got.mean[1, :, 2, 3]).sum()
    assert_close(got.entropy[1, 2, 3], pixel, 1e-12, 0)


def test_bernoulli() -> None:
    model, x = _model(1), _images()
    got = fb.predict(model, x, 16, likelihood="bernoulli", keep_samples=True)
    expected = _separately(model.eval(), x, 16).double().sigmoid()
    assert_close(got.mean, expected.mean(0), 1e-6, 1e-6)
    two = fb.predict(
        nn.Sequential(model, _WithZero()), x, 16, likelihood="categorical", keep_samples=True
    )
    assert_close(got.entropy[:, 0], two.entropy, 1e-9, 1e-12)
    assert_close(got.mutual_information[:, 0], two.mutual_information, 1e-9, 1e-12)


class _WithZero(nn.Module):
    """A logit as the pair of logits of the same distribution."""

    def forward(self, logit: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(logit), logit], 1)


class _Pair(nn.Module):
    """Mean and variance of a normal target."""

    def __init__(self) -> None:
        super().__init__()
        self.body = _model(2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = self.body(x).unbind(1)
        return mean, log_variance.exp()


def test_gaussian_variances_add_up() -> None:
    model, x = _Pair(), _images()
    got = fb.predict(model, x, 8, likelihood="gaussian", samples_per_pass=3)
    outputs = _separately(model.body.eval(), x, 8).double()
    means, variances = outputs[..., 0], outputs[..., 1].exp()
    assert_close(got.mean, means.mean(0), 1e-5, 1e-6)
    assert_close(got.aleatoric_variance, variances.mean(0), 1e-5, 1e-6)
    assert_close(got.epistemic_variance, means.var(0, correction=0), 1e-5, 1e-6)
    assert_same(got.variance, got.aleatoric_variance + got.epistemic_variance)
    assert got.entropy is None
    assert got.mutual_information is None


def test_a_function_as_likelihood() -> None:
    model, x = _model(), _images()
    seen = []

    def top(output: Tensor) -> Tensor:
        seen.append(tuple(output.shape))
        return output.argmax(1)

    got = fb.predict(model, x, 6, likelihood=top, samples_per_pass=4)
    votes = _separately(model.eval(), x, 6).argmax(2).double()
    assert seen == [(7, 5)] * 6  # one function at a time, whatever shares a pass
    assert_close(got.mean, votes.mean(0), 1e-12, 0)
    assert_close(got.variance, votes.var(0, correction=0), 1e-12, 1e-15)
    assert got.entropy is None


def test_variance_of_close_samples_does_not_cancel() -> None:
    """E[p^2] - E[p]^2 has no digits left where the functions nearly agree."""
    values = iter(1.0 + 1e-9 * s for s in range(4))
    got = fb.predict(
        fb.BayesLinear(1, 1), torch.ones(1, 1), 4, likelihood=lambda _: torch.tensor([next(values)])
    )
    assert got.variance.item() == 0.0  # float32 values: all one
    values = iter(torch.tensor([1.0 + 1e-9 * s], dtype=torch.float64) for s in range(4))
    got = fb.predict(fb.BayesLinear(1, 1), torch.ones(1, 1), 4, likelihood=lambda _: next(values))
    assert got.variance.item() == pytest.approx(1.25e-18, rel=1e-5)


# --- one set of functions -------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["direct", "winograd2"])
@pytest.mark.parametrize("make", [_model, _segmentation])
def test_bits_do_not_depend_on_how_the_work_is_cut(make, algorithm: str) -> None:
    model = make()
    if algorithm == "winograd2" and make is _model:
        model = nn.Sequential(*model[:-1])  # a linear map has no 3 x 3 filter
    x = _images()
    with fb.algorithm(algorithm):
        whole = fb.predict(model, x, 16, keep_samples=True)
        for batch_size, samples_per_pass in ((1, 16), (2, 5), (3, 1), (7, 3), (None, None)):
            options = {"batch_size": batch_size, "samples_per_pass": samples_per_pass}
            _same(fb.predict(model, x, 16, keep_samples=True, **options), whole)
        _same(fb.predict(model, x, 16, keep_samples=True, memory=1), whole)


def test_the_library_agrees_within_rounding() -> None:
    model, x = _model(), _images()
    with fb.algorithm("library"):
        whole = fb.predict(model, x, 16)
        cut = fb.predict(model, x, 16, batch_size=2, samples_per_pass=5)
    assert_close(cut.mean, whole.mean, 1e-6, 1e-6)


def test_ranks_predict_with_the_same_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = _model(), _images()
    first = fb.predict(model, x, 4)
    monkeypatch.setattr(noise, "rank_offset", lambda: 3 << 48)
    _same(fb.predict(model, x, 4), first)


def test_the_seed_is_the_only_source() -> None:
    model, x = _model(), _images()
    state = torch.get_rng_state()
    first = fb.predict(model, x, 4)
    assert_same(torch.get_rng_state(), state)
    torch.manual_seed(99)
    _same(fb.predict(model, x, 4), first)
    _same(fb.predict(model, x, 4, seed=torch.tensor([0, 0])), first)
    assert not torch.equal(fb.predict(model, x, 4, seed=1).mean, first.mean)
    # More samples begin with the same ones.
    more = fb.predict(model, x, 8, keep_samples=True)
    assert_close(more.samples[:4].mean(0), first.mean, 1e-12, 0)


def test_samples_are_different_functions() -> None:
    """The same noise for all samples: no uncertainty."""
    got = fb.predict(_model(), _images(), 16, keep_samples=True)
    assert torch.unique(got.samples.flatten(1), dim=0).shape[0] == 16
    assert bool((got.variance > 0).all())


@pytest.mark.parametrize("estimator", ["flipout", "local"])
def test_all_rows_see_the_same_functions_whatever_the_estimator(estimator: str) -> None:
    """A weight for every row, or noise for every pixel, is no function of the input."""
    model, plain = (
        nn.Sequential(fb.BayesConv2d(3, 4, 3, estimator=name), nn.Flatten())
        for name in (estimator, "reparameterization")
    )
    plain.load_state_dict(model.state_dict())
    x = _images(1).expand(4, -1, -1, -1)
    got = fb.predict(model, x, 3, keep_samples=True)
    _same(fb.predict(plain, x, 3, keep_samples=True), got)
    for row in range(1, 4):
        assert_close(got.samples[:, row], got.samples[:, 0], 1e-6, 1e-6)


def test_layers_of_the_other_face() -> None:
    layers = (fb.Convolution2DReparameterization(4, 3), fb.ChannelsLast(nn.AvgPool2d(2)))
    model = nn.Sequential(*layers, nn.Flatten(), fb.DenseFlipout(3))
    x = torch.randn(4, 8, 8, 2)
    model(x)
    with fb.algorithm("direct"):
        got = fb.predict(model, x, 5, samples_per_pass=2, keep_samples=True)
        expected = _separately(model.eval(), x, 5).double().softmax(2)
    assert_close(got.samples, expected, 1e-6, 1e-6)


def test_a_prediction_follows_the_parameters() -> None:
    """A frozen copy predicts with untrained values."""
    model, x = _model(), _images()
    before = fb.predict(model, x, 4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    assert not torch.equal(fb.predict(model, x, 4).mean, before.mean)
    assert_close(fb.predict(model.double(), x.double(), 4).mean, fb.predict(
        model.float(), x, 4).mean, 1e-4, 1e-5)  # fmt: skip


# --- inputs ---------------------------------------------------------------------------------------


def test_batches_are_joined() -> None:
    model, x = _model(), _images()
    labels = torch.arange(7)
    with fb.algorithm("direct"):
        whole = fb.predict(model, x, 4, keep_samples=True)
        loader = DataLoader(TensorDataset(x, labels), batch_size=3)
        _same(fb.predict(model, loader, 4, keep_samples=True), whole)
        _same(fb.predict(model, list(x.split(2)), 4, keep_samples=True), whole)
        generator = ((part, None) for part in x.split(5))
        _same(fb.predict(model, generator, 4, keep_samples=True), whole)


def test_integers_are_taken_as_they_are() -> None:
    model = nn.Sequential(nn.Embedding(10, 4), fb.BayesLinear(4, 3), nn.Flatten())
    assert fb.predict(model, torch.arange(6).reshape(3, 2), np.int64(4)).mean.shape == (3, 6)


def test_no_rows() -> None:
    got = fb.predict(_model(), _images(0), 4)
    assert got.mean.shape == (0, 5)
    assert got.entropy.shape == (0,)


@pytest.mark.parametrize(
    ("x", "options", "error", "message"),
    [
        ([], {}, ValueError, "x: expected at least one batch, got none"),
        ("images", {}, TypeError, "x: expected a tensor, or an iterable .* got str"),
        (3, {}, TypeError, "x: expected a tensor, or an iterable .* got int"),
        ([{"image": 1}], {}, TypeError, "got dict in it"),
        (torch.tensor(1.0), {}, ValueError, "x: expected rows"),
        ([torch.ones(2, 4)], {"batch_size": 2}, ValueError, "batch_size: expected None"),
        (torch.ones(2, 4), {"batch_size": 0}, ValueError, "batch_size: expected"),
        (torch.ones(2, 4), {"num_samples": 0}, ValueError, "num_samples: expected"),
        (torch.ones(2, 4), {"samples_per_pass": -1}, ValueError, "samples_per_pass: expected"),
        (torch.ones(2, 4), {"memory": 0}, ValueError, "memory: expected"),
        (torch.ones(2, 4), {"likelihood": "normal"}, ValueError, "likelihood: expected"),
        (torch.ones(2, 4), {"seed": 1.5}, TypeError, "seed: expected an int"),
    ],
)
def test_what_does_not_fit(x, options: dict, error: type[Exception], message: str) -> None:
    model = fb.BayesLinear(4, 3)
    with pytest.raises(error, match=message):
        fb.predict(model, x, **options)
    assert model.training


def test_a_model_that_mixes_rows_is_told_so() -> None:
    class Sum(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sum(0, keepdim=True)

    model = nn.Sequential(fb.BayesLinear(4, 3), Sum())
    with pytest.raises(ValueError, match=r"expected an output of 4 rows .* samples_per_pass=1"):
        fb.predict(model, torch.ones(2, 4), 2)


# --- the model is left as it was ------------------------------------------------------------------


def _flags(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def test_every_training_flag_is_put_back() -> None:
    """A model left in eval() trains on without dropout; one left in train() predicts with it."""
    model, x = _model(), _images()
    model[1].eval()  # frozen statistics in a model that trains
    before = _flags(model)
    inside = []
    model.register_forward_hook(lambda *_: inside.append(any(_flags(model))))
    fb.predict(model, x, 3)
    assert _flags(model) == before
    with pytest.raises(RuntimeError, match="broken"):
        fb.predict(model, x, 3, likelihood=_broken)
    assert _flags(model) == before
    assert not any(inside)
    assert [layer._fb_context for layer in models.bayesian_layers(model)] == [None] * 3
    assert not any(module._forward_pre_hooks for module in model.modules())


def _broken(output: Tensor) -> Tensor:
    raise RuntimeError("broken")


def test_batch_norm_is_not_updated() -> None:
    """Predicting in train() moves the running statistics."""
    model = _model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fb.predict(model, _images(), 8)
    for name, value in model.state_dict().items():
        assert_same(value, before[name], name)


def test_dropout_is_off() -> None:
    model = nn.Sequential(nn.Dropout(0.5), fb.BayesLinear(4, 3))
    x = torch.ones(2, 4)
    _same(fb.predict(model, x, 4), fb.predict(model[1], x, 4))


def test_eval_mode_mean_does_not_take_the_noise_away() -> None:
    layer = fb.BayesLinear(4, 3, eval_mode="mean")
    assert bool((fb.predict(layer, torch.ones(2, 4), 8).variance > 0).all())


def test_no_graph_is_kept() -> None:
    x = _images().requires_grad_()
    got = fb.predict(_model(), x, 4, keep_samples=True)
    assert not any(getattr(got, name).requires_grad for name in FIELDS)
    assert torch.is_grad_enabled()


def test_a_deterministic_model_is_one_function() -> None:
    calls = []
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    model.register_forward_hook(lambda *_: calls.append(1))
    got = fb.predict(model, _images(), 32, keep_samples=True, batch_size=7, samples_per_pass=32)
    assert len(calls) == 1
    assert got.samples.shape == (1, 7, 3)
    assert got.variance.abs().max().item() == 0.0
    assert got.mutual_information.abs().max().item() == 0.0


def test_inside_other_contexts() -> None:
    model, x = _model(), _images()
    expected = fb.predict(model, x, 4)
    with fb.mean_weights(model), fb.grouped(model):
        _same(fb.predict(model, x, 4), expected)
    with fb.weight_samples(model, 2), pytest.raises(ValueError, match="outside any other"):
        fb.predict(model, x, 4)


# --- memory and progress --------------------------------------------------------------------------


def _alive() -> int:
    """Bytes of all tensors that Python knows, each storage once."""
    import gc

    tensors = [value for value in gc.get_objects() if type(value) in (Tensor, nn.Parameter)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def test_memory_does_not_grow_with_the_number_of_samples() -> None:
    """Outputs of all samples kept until the end, or their graphs: memory linear in samples."""
    model, x = _segmentation(), _images(4)
    probabilities = likelihoods.Categorical()
    most = {}
    for num_samples in (8, 64):
        alive = []

        def note(output: Tensor, alive: list[int] = alive) -> Tensor:
            alive.append(_alive())
            return probabilities.moments(output).mean

        got = fb.predict(model, x, num_samples, likelihood=note, samples_per_pass=4)
        most[num_samples] = max(alive)
        assert len(alive) == num_samples
        rows = got.mean.numel()
        del got
    assert most[64] <= most[8]
    assert most[8] > 4 * rows * 4  # the count sees the output of a pass at least


def _passes(model: nn.Module, x: Tensor, **options) -> list[int]:
    """Rows of each pass, after the one over a single row."""
    rows: list[int] = []
    handle = model[-1].register_forward_hook(lambda _m, _i, output: rows.append(len(output)))
    fb.predict(model, x, 8, **options)
    handle.remove()
    return rows


def test_memory_decides_what_shares_a_pass() -> None:
    model, x = _segmentation(), _images(4)
    row = 8 * 8 * 8 * 4 * 4  # bytes of the largest output, four of them
    assert _passes(model, x) == [1, 32]
    assert _passes(model, x, memory=16 * row) == [1, 16, 16]
    assert _passes(model, x, memory=4 * row) == [1] + [4] * 8
    assert _passes(model, x, memory=2 * row) == [1] + [2] * 16
    assert _passes(model, x, memory=1) == [1] + [1] * 32
    assert _passes(model, x, batch_size=3, samples_per_pass=8) == [24, 8]


class _Bar:
    """Stands for tqdm: notes how it was made and how often it advanced."""

    made: list[_Bar] = []  # noqa: RUF012

    def __init__(self, **options) -> None:
        self.options, self.steps = options, 0
        self.made.append(self)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def update(self) -> None:
        self.steps += 1


def test_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", types.SimpleNamespace(tqdm=_Bar))
    monkeypatch.setattr(_Bar, "made", [])
    model, x = _model(), _images()
    fb.predict(model, x, 3, batch_size=4, progress=True)
    fb.predict(model, iter([x]), 3)
    fb.predict(model, x, 3, progress=False)
    shown, quiet = _Bar.made
    assert (shown.options["total"], shown.steps, shown.options["disable"]) == (6, 6, False)
    # By itself: on a terminal only, and not at once.
    assert (quiet.options["total"], quiet.steps, quiet.options["disable"]) == (None, 3, None)
    assert quiet.options["delay"] > 0
    monkeypatch.setitem(sys.modules, "tqdm", None)
    fb.predict(model, x, 3)
    with pytest.raises(ImportError, match="progress: expected tqdm"):
        fb.predict(model, x, 3, progress=True)
