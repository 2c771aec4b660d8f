"""How ``predict`` cuts its work: the same functions and bits, bounded memory, a progress bar."""

from __future__ import annotations

import gc
import sys
import types

import pytest
import torch
from prediction_models import (
    assert_same_prediction,
    convolutional,
    images,
    segmentation,
    separately,
)
from torch import Tensor, nn

import fastbconv as fb
from fastbconv import likelihoods, noise
from fastbconv.testing import assert_close, assert_same

# --- one set of functions -------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["direct", "winograd2", "winograd2x4"])
@pytest.mark.parametrize("make", [convolutional, segmentation])
def test_bits_do_not_depend_on_how_the_work_is_cut(make, algorithm: str) -> None:
    model = make()
    if algorithm != "direct" and make is convolutional:
        model = nn.Sequential(*model[:-1])  # a linear map has no 3 x 3 filter
    x = images()
    with fb.algorithm(algorithm):
        whole = fb.predict(model, x, 16, keep_samples=True)
        for batch_size, samples_per_pass in ((1, 16), (2, 5), (3, 1), (7, 3), (None, None)):
            options = {"batch_size": batch_size, "samples_per_pass": samples_per_pass}
            assert_same_prediction(fb.predict(model, x, 16, keep_samples=True, **options), whole)
        assert_same_prediction(fb.predict(model, x, 16, keep_samples=True, memory=1), whole)


def test_the_library_agrees_within_rounding() -> None:
    model, x = convolutional(), images()
    with fb.algorithm("library"):
        whole = fb.predict(model, x, 16)
        cut = fb.predict(model, x, 16, batch_size=2, samples_per_pass=5)
    assert_close(cut.mean, whole.mean, 1e-6, 1e-6)


def test_ranks_predict_with_the_same_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = convolutional(), images()
    first = fb.predict(model, x, 4)
    monkeypatch.setattr(noise, "rank_offset", lambda: 3 << 48)
    assert_same_prediction(fb.predict(model, x, 4), first)


def test_the_seed_is_the_only_source() -> None:
    model, x = convolutional(), images()
    state = torch.get_rng_state()
    first = fb.predict(model, x, 4)
    assert_same(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert_same_prediction(fb.predict(model, x, 4), first)
    assert_same_prediction(fb.predict(model, x, 4, seed=torch.tensor([0, 0])), first)
    assert not torch.equal(fb.predict(model, x, 4, seed=1).mean, first.mean)
    # More samples begin with the same ones.
    more = fb.predict(model, x, 8, keep_samples=True)
    assert_close(more.samples[:4].mean(0), first.mean, 1e-12, 0)


def test_samples_are_different_functions() -> None:
    """The same noise for all samples: no uncertainty."""
    got = fb.predict(convolutional(), images(), 16, keep_samples=True)
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
    x = images(1).expand(4, -1, -1, -1)
    got = fb.predict(model, x, 3, keep_samples=True)
    assert_same_prediction(fb.predict(plain, x, 3, keep_samples=True), got)
    for row in range(1, 4):
        assert_close(got.samples[:, row], got.samples[:, 0], 1e-6, 1e-6)


def test_layers_of_the_other_face() -> None:
    layers = (fb.Convolution2DReparameterization(4, 3), fb.ChannelsLast(nn.AvgPool2d(2)))
    model = nn.Sequential(*layers, nn.Flatten(), fb.DenseFlipout(3))
    x = torch.randn(4, 8, 8, 2)
    model(x)
    with fb.algorithm("direct"):
        got = fb.predict(model, x, 5, samples_per_pass=2, keep_samples=True)
        expected = separately(model.eval(), x, 5).double().softmax(2)
    assert_close(got.samples, expected, 1e-6, 1e-6)


def test_a_prediction_follows_the_parameters() -> None:
    """A frozen copy predicts with untrained values."""
    model, x = convolutional(), images()
    before = fb.predict(model, x, 4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    assert not torch.equal(fb.predict(model, x, 4).mean, before.mean)
    assert_close(fb.predict(model.double(), x.double(), 4).mean, fb.predict(
        model.float(), x, 4).mean, 1e-4, 1e-5)  # fmt: skip


# --- memory and progress --------------------------------------------------------------------------


def _alive() -> int:
    """Bytes of all tensors that Python knows, each storage once.

    What torch.func has left of other tests (in the frames of expected errors) has no storage.
    """
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    found = [value for value in gc.get_objects() if type(value) in (Tensor, nn.Parameter)]
    tensors = [value for value in found if not wrapped(value)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def test_memory_does_not_grow_with_the_number_of_samples() -> None:
    """Outputs of all samples kept until the end, or their graphs: memory linear in samples."""
    model, x = segmentation(), images(4)
    probabilities = likelihoods.Categorical()
    most = {}
    for num_samples in (8, 32):
        alive = []

        def note(output: Tensor, alive: list[int] = alive) -> Tensor:
            alive.append(_alive())
            return probabilities.moments(output).mean

        got = fb.predict(model, x, num_samples, likelihood=note, samples_per_pass=4)
        most[num_samples] = max(alive)
        assert len(alive) == num_samples
        rows = got.mean.numel()
        del got
    assert most[32] <= most[8]
    assert most[8] > 4 * rows * 4  # the count sees the output of a pass at least


def _passes(model: nn.Module, x: Tensor, num_samples: int = 8, **options) -> list[int]:
    """Rows of each pass: over a single row, what tries whether work can be cut, and the work."""
    rows: list[int] = []
    handle = model[-1].register_forward_hook(lambda _m, _i, output: rows.append(len(output)))
    fb.predict(model, x, num_samples, **options)
    handle.remove()
    return rows


def test_memory_decides_what_shares_a_pass() -> None:
    model, x = segmentation(), images(4)
    row = 8 * 8 * 8 * 4 * 4  # bytes of the largest output, four of them
    assert _passes(model, x) == [1, 4, 4, 32]
    assert _passes(model, x, memory=64 * row) == [1, 4, 4, 32]
    # Fewer than 16 functions: on a CPU larger tensors cost more than fewer passes save.
    assert _passes(model, x, memory=63 * row) == [1] + [4] * 8
    assert _passes(model, x, memory=4 * row) == [1] + [4] * 8
    assert _passes(model, x, memory=2 * row) == [1, 2, 1, 1] + [2] * 16
    assert _passes(model, x, memory=1) == [1, 2, 1, 1] + [1] * 32
    assert _passes(model, x, batch_size=3, samples_per_pass=8) == [3, 3, 24, 8]


def test_functions_are_spread_evenly_over_passes() -> None:
    """A compiled model is compiled for each number of functions: 8 = 5 + 3 would be two."""
    model, x = segmentation(), images(4)
    row = 8 * 8 * 8 * 4 * 4
    assert _passes(model, x, samples_per_pass=5) == [1, 4, 4, 16, 16]
    assert _passes(model, x, 26, memory=80 * row) == [1, 4, 4, 52, 52]
    assert _passes(model, x, batch_size=4, samples_per_pass=3) == [4, 4, 12, 12, 8]


def test_a_compiled_model_is_cut_alike() -> None:
    model, x = convolutional(), images(2)
    compiled = torch.compile(model, backend="eager")
    rows: dict[nn.Module, list[int]] = {model: [], compiled: []}
    means = []
    for module, seen in rows.items():
        handle = module.register_forward_hook(lambda _m, _i, y, seen=seen: seen.append(len(y)))
        means.append(fb.predict(module, x, 4, samples_per_pass=2).mean)
        means.append(fb.predict(module, x, 4).mean)
        handle.remove()
    for mean in means[1:]:
        assert_close(mean, means[0], 1e-6, 1e-6)
    assert rows[model] == [*(1, 2, 2, 4, 4), *(1, 2, 2, 8)]
    assert rows[compiled] == [*(2, 2, 4, 4), *(2, 2, 8)]  # the first pass is not a compiled one


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
    model, x = convolutional(), images()
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


@pytest.mark.parametrize("kind", ["bfloat16", "equal ends"])
def test_memory_holds_where_rows_are_close(kind: str) -> None:
    """Rows that differ little beside bfloat16's rounding, or ends that are equal, told nothing: all
    rows became one pass, whatever the memory."""
    model, x = segmentation(), torch.rand(40, *images(1).shape[1:])
    if kind == "bfloat16":
        model, x = model.to(torch.bfloat16), x.to(torch.bfloat16)
    else:
        x[-1] = x[0]
    assert max(_passes(model, x, memory=1 << 17)) <= 32


def test_functions_of_a_narrow_posterior_share_passes_in_bfloat16() -> None:
    model, x = fb.BayesLinear(16, 4).to(torch.bfloat16), torch.randn(8, 16, dtype=torch.bfloat16)
    nn.init.constant_(model.weight_rho, -5.0)
    rows: list[int] = []
    handle = model.register_forward_hook(lambda _m, _i, y: rows.append(len(y)))
    fb.predict(model, x, 32)
    handle.remove()
    assert max(rows) == 256
