"""Many functions of one model in one pass, each the function that ``fixed_sample`` gives."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Independent, Laplace
from torch.utils.checkpoint import CheckpointError, checkpoint

import fastbconv as fb
from fastbconv import models
from fastbconv.testing import assert_close, assert_same

DRAWS = 3


class Residual(nn.Module):
    """A skip connection: the input meets what a layer has made of it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = fb.BayesConv2d(3, 3, 3, padding=1, activation="relu")
        self.norm = nn.BatchNorm2d(3)
        self.head = fb.BayesLinear(3, 4, bayesian_bias=True)

    def forward(self, x: Tensor, scale: Tensor | float = 1.0) -> Tensor:
        return self.head((x + self.norm(self.first(x)) * scale).mean((2, 3)))


class Tied(nn.Module):
    """One layer, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = fb.BayesConv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x).relu())


def _laplace(dtype, shape, name, trainable, add_variable_fn):
    """A posterior of the user's own."""
    loc = add_variable_fn(f"{name}_loc", shape, "zeros", None, None, dtype, trainable)
    return Independent(Laplace(loc, torch.full_like(loc, 0.1)), len(shape))


def _tfp(**options) -> nn.Sequential:
    layers = (
        fb.Convolution2DReparameterization(4, (2, 3), activation="relu", **options),
        fb.ChannelsLast(nn.MaxPool2d(2)),
        nn.Flatten(),
        fb.DenseReparameterization(5, **options),
    )
    return fb.build(nn.Sequential(nn.Identity(), *layers), (None, 3, 8, 8)).eval()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "layer": lambda: fb.BayesConv2d(3, 4, 3),
    "sequence": lambda: nn.Sequential(
        nn.Sequential(fb.BayesConv2d(3, 4, 3), nn.ReLU()), nn.Flatten(), fb.BayesLinear(144, 5)
    ),
    "deterministic-first": lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), fb.BayesLinear(144, 5)
    ),
    "residual": Residual,
    "residual-inside": lambda: nn.Sequential(nn.Conv2d(3, 3, 1), Residual()),
    "tied": Tied,
    "twice-in-a-sequence": lambda: nn.Sequential(*[fb.BayesConv2d(3, 3, 3)] * 2),
    "padded": lambda: fb.BayesConv2d(3, 4, 3, padding=1, padding_mode="circular"),
    "other-ranks": lambda: nn.Sequential(
        nn.Flatten(2),
        fb.BayesConv1d(3, 4, 3, bayesian_bias=True),
        nn.Unflatten(2, (2, 31, 1)),
        fb.BayesConv3d(4, 2, (1, 3, 1)),
    ),
    "transposed": lambda: nn.Sequential(
        fb.BayesConv2d(3, 4, 3), fb.BayesConvTranspose2d(4, 2, 2, stride=2)
    ),
    "lazy": lambda: nn.Sequential(fb.LazyBayesConv2d(4, 3), nn.Flatten(), fb.LazyBayesLinear(5)),
    "flipout": lambda: nn.Sequential(
        fb.BayesConv2d(3, 4, 3, estimator="flipout"), fb.BayesConv2d(4, 2, 3, estimator="local")
    ),
    "tfp": _tfp,
    "tfp-functions": lambda: _tfp(kernel_posterior_fn=_laplace),
    "tfp-flipout": lambda: nn.Sequential(
        fb.Convolution2DFlipout(4, 3), nn.Flatten(), fb.DenseLocalReparameterization(3)
    ),
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    made = MODELS[request.param]()
    made(_image())  # what is lazy is built
    return made.eval()


def _image(n: int = 2) -> Tensor:
    # Channels are second on the torch face and last on the other: both have three or eight.
    return torch.randn(n, 3, 8, 8)


def _one_by_one(model: nn.Module, x: Tensor, seed: int) -> Tensor:
    outputs = []
    for sample in range(DRAWS):
        with fb.fixed_sample(model, seed, sample=sample):
            outputs.append(model(x))
    return torch.cat(outputs)


def test_group_s_is_function_s(model: nn.Module) -> None:
    x = _image()
    with torch.no_grad():
        expected = _one_by_one(model, x, 5)
        with fb.fixed_sample(model, 5), fb.weight_samples(model, DRAWS):
            inside = model(x)
        with fb.weight_samples(model, DRAWS), fb.fixed_sample(model, 5):
            outside = model(x)
    assert_close(inside, expected, 1e-5, 1e-6)
    assert_same(outside, inside)
    groups = inside.unflatten(0, (DRAWS, 2))
    assert not torch.equal(groups[0], groups[1])


def test_bits_are_those_of_separate_passes() -> None:
    model, x = MODELS["sequence"](), _image()
    for name in ("direct", "winograd2", "winograd2x4"):
        layers = model if name == "direct" else model[0]
        with torch.no_grad(), fb.algorithm(name):
            with fb.fixed_sample(layers, 5), fb.weight_samples(layers, DRAWS):
                got = layers(x)
            assert_same(got, _one_by_one(layers, x, 5))


def test_gradients_are_the_sum_over_the_functions(model: nn.Module) -> None:
    x = _image()
    _one_by_one(model, x, 5).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    with fb.fixed_sample(model, 5), fb.weight_samples(model, DRAWS):
        model(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, expected[name], 1e-4, 1e-4, name)


def test_every_call_draws_anew_without_a_seed() -> None:
    """The same noise for all samples makes every one of them the same function."""
    model, x = MODELS["residual"]().eval(), _image()
    with torch.no_grad(), fb.weight_samples(model, DRAWS):
        torch.manual_seed(1)
        first, second = model(x), model(x)
        torch.manual_seed(1)
        assert_same(model(x), first)
    rows = torch.cat([first, second]).unflatten(0, (2 * DRAWS, 2)).flatten(1)
    assert torch.unique(rows, dim=0).shape[0] == 2 * DRAWS


# --- where rows are repeated ----------------------------------------------------------------------


def _rows_seen(modules: list[nn.Module]) -> list[list[int]]:
    seen: list[list[int]] = [[] for _ in modules]
    for module, rows in zip(modules, seen, strict=True):
        module.register_forward_hook(lambda _m, given, _o, rows=rows: rows.append(len(given[0])))
    return seen


def test_what_lies_before_the_first_bayesian_layer_runs_once() -> None:
    model = MODELS["deterministic-first"]().eval()
    seen = _rows_seen(list(model))
    with fb.weight_samples(model, DRAWS):
        assert model(_image()).shape == (2 * DRAWS, 5)
    assert seen == [[2], [2], [2], [2]]  # and the layer itself reads two rows


def test_a_forward_of_ones_own_gets_repeated_rows() -> None:
    """Behind a skip connection nobody can tell which rows have been repeated."""
    model = nn.Sequential(nn.Conv2d(3, 3, 1), Residual()).eval()
    seen = _rows_seen([model[0], model[1].first, model[1].head])
    with fb.weight_samples(model, DRAWS):
        model(_image())
    assert seen == [[2], [2 * DRAWS], [2 * DRAWS]]


def test_keywords_and_numbers() -> None:
    model, x = Residual().eval(), _image()
    scale = torch.rand(2, 1, 1, 1)
    for given in (scale, torch.tensor(0.5), torch.full((1, 1, 1), 0.5), 0.5):
        with torch.no_grad(), fb.fixed_sample(model, 1), fb.algorithm("direct"):
            expected = model(x=x, scale=given)
            with fb.weight_samples(model, DRAWS):
                got = model(x=x, scale=given)
        assert_close(got[:2], expected, 1e-5, 1e-6)


def test_memory_format_is_kept() -> None:
    model = nn.Sequential(Tied()).to(memory_format=torch.channels_last)
    x = _image().to(memory_format=torch.channels_last)
    with fb.weight_samples(model, DRAWS):
        assert model(x).is_contiguous(memory_format=torch.channels_last)


def test_a_module_called_by_itself_takes_groups_of_rows() -> None:
    model, x = Residual().eval(), torch.randn(6, 3)
    with torch.no_grad(), fb.fixed_sample(model, 1), fb.weight_samples(model, DRAWS):
        got = model.head(x)
    for sample in range(DRAWS):
        with torch.no_grad(), fb.fixed_sample(model, 1, sample=sample):
            rows = slice(2 * sample, 2 * sample + 2)
            assert_close(got[rows], model.head(x[rows]), 1e-6, 1e-6)
    with fb.weight_samples(model, 4), pytest.raises(ValueError, match="divisor of the 6 input"):
        model.head(x)


# --- what it nests with ---------------------------------------------------------------------------


def test_the_kl_counts_once(model: nn.Module) -> None:
    with fb.collect_kl(model) as kl, fb.fixed_sample(model, 2), fb.weight_samples(model, DRAWS):
        model(_image())
    if not any("Laplace" in repr(getattr(m, "kernel_posterior", "")) for m in model.modules()):
        assert_close(kl.sum(), fb.kl_loss(model), 1e-6, 0)
    assert kl.sum().requires_grad


def test_a_divergence_of_the_sample_is_averaged_over_draws() -> None:
    seen = []

    def divergence(posterior, prior, sample):
        seen.append(sample)
        return sample.sum()

    layer = fb.DenseReparameterization(2, kernel_divergence_fn=divergence)
    layer.build((None, 3))
    with fb.collect_kl(layer) as kl, fb.fixed_sample(layer, 2), fb.weight_samples(layer, DRAWS):
        layer(torch.eye(3))
    assert len(seen) == DRAWS
    assert_close(kl.sum(), torch.stack(seen).sum() / DRAWS, 1e-6, 1e-6)
    assert not torch.equal(seen[0], seen[1])
    assert_same(layer.kernel_posterior_tensor, seen[0])


def test_means_stay_means() -> None:
    model, x = Residual().eval(), _image()
    with torch.no_grad(), fb.mean_weights(model), fb.algorithm("direct"):
        expected = model(x)
        with fb.weight_samples(model, DRAWS):
            got = model(x)
    for group in got.split(2):
        assert_same(group, expected)


def test_a_group_of_draws_does_not_stand_in_the_way() -> None:
    model, x = Residual().eval(), _image()
    with torch.no_grad(), fb.algorithm("direct"):
        with fb.grouped(model, seed=4), fb.weight_samples(model, DRAWS):
            got = model(x)
        assert_close(got, _one_by_one(model, x, 4), 1e-5, 1e-6)


def test_what_the_call_says_comes_first() -> None:
    layer, x = fb.BayesLinear(3, 2), torch.randn(4, 3)
    with torch.no_grad(), fb.weight_samples(layer, DRAWS):
        assert_same(layer(x, 7, num_samples=2), layer(x, 7, num_samples=2))
        assert layer(x, num_samples=2).shape == (4, 2)
        assert layer(x, 7).shape == (4 * DRAWS, 2)  # draws of the seed that is given


def _settings(model: nn.Module) -> list[object]:
    hooks = [module._forward_pre_hooks for module in model.modules()]
    return [layer._fb_context for layer in models.bayesian_layers(model)] + [*filter(None, hooks)]


def test_nothing_is_left_after_an_exception_or_another_order_of_ends() -> None:
    model = Residual()
    with pytest.raises(RuntimeError, match="broken"), fb.weight_samples(model, DRAWS):
        raise RuntimeError("broken")
    assert _settings(model) == [None, None]
    first, second = fb.fixed_sample(model, 1), fb.weight_samples(model, DRAWS)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert model.eval()(_image()).shape == (2 * DRAWS, 4)
    second.__exit__(None, None, None)
    assert _settings(model) == [None, None]
    assert copy.deepcopy(model)(_image()).shape == (2, 4)


def test_a_block_inside_a_block_is_an_error() -> None:
    model = Residual()
    outer = fb.weight_samples(model, 2)
    with outer, pytest.raises(ValueError, match="outside any other weight_samples block"):
        fb.weight_samples(model.head, 3).__enter__()
    assert _settings(model) == [None, None]


@pytest.mark.parametrize("seed", [None, 7])
@pytest.mark.parametrize("make", [lambda: fb.BayesLinear(3, 2), lambda: fb.DenseFlipout(2)])
def test_a_checkpoint_is_repeated_with_as_many_draws(make, seed: int | None) -> None:
    """Outside of the block one draw would serve all rows, with gradients of the same shapes."""
    layer, x = make(), torch.randn(6, 3)
    layer(x)
    model = nn.ModuleList([layer])  # whose layer takes groups of rows

    def gradients(inside: bool) -> list[Tensor]:
        torch.manual_seed(5)
        layer.zero_grad()
        with fb.weight_samples(model, DRAWS):
            y = checkpoint(lambda rows: layer(rows, seed=seed), x, use_reentrant=False)
            if inside:
                y.square().sum().backward()
        if not inside:
            y.square().sum().backward()
        return [p.grad.clone() for p in layer.parameters()]

    torch.manual_seed(5)
    with fb.weight_samples(model, DRAWS):
        expected = torch.autograd.grad(layer(x, seed=seed).square().sum(), layer.parameters())
    for one, other in zip(gradients(True), expected, strict=True):
        assert_close(one, other, 1e-5, 1e-5)
    with pytest.raises(CheckpointError, match="different"):
        gradients(False)


# --- batch norm -----------------------------------------------------------------------------------


def test_batch_norm_in_training_mode_is_an_error() -> None:
    """Statistics of the batch would mix the functions, and be updated by all of them."""
    model = Residual()
    with fb.weight_samples(model, DRAWS):
        with pytest.raises(ValueError, match="running statistics, got 'norm' in training mode"):
            model(_image())
        model.eval()
        model(_image())
        model.norm.train()
        with pytest.raises(ValueError, match=r"model.eval\(\)"):
            model(_image())
    assert model.norm.num_batches_tracked.item() == 0
    model.norm = nn.BatchNorm2d(3, track_running_stats=False).eval()
    with (
        fb.weight_samples(model, DRAWS),
        pytest.raises(ValueError, match="without running statistics"),
    ):
        model(_image())


def test_one_draw_is_an_ordinary_pass() -> None:
    model, x = Residual(), _image()
    with fb.fixed_sample(model, 1):
        expected = model(x)
        with fb.weight_samples(model, 1):
            assert_same(model(x), expected)


# --- numbers of draws -----------------------------------------------------------------------------


def test_sample_is_the_offset_of_every_seed() -> None:
    layer, x = fb.BayesLinear(3, 2), torch.randn(4, 3)
    child = fb.noise.derive(9, 0)
    with torch.no_grad(), fb.fixed_sample(layer, 9, sample=4):
        assert_same(layer(x), layer(x, child + torch.tensor([0, 4])))
    with pytest.raises(ValueError, match="sample: expected"):
        fb.fixed_sample(layer, 9, sample=-1).__enter__()


@pytest.mark.parametrize(("n", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError)])
def test_a_wrong_number_of_draws(n, error: type[Exception]) -> None:
    with pytest.raises(error, match="n: expected"):
        fb.weight_samples(fb.BayesLinear(2, 2), n).__enter__()


def test_a_compiled_model() -> None:
    model, x = Residual().eval(), _image()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad(), fb.algorithm("direct"), fb.fixed_sample(model, 5):
        with fb.weight_samples(model, DRAWS):
            expected = model(x)
        with fb.weight_samples(compiled, DRAWS):
            got = compiled(x)
    assert_close(got, expected, 1e-5, 1e-6)
