"""grouped: the weights of a model drawn together are those of the layers called one by one."""

from __future__ import annotations

import copy
import pickle
import weakref

import pytest
import torch
import torch.utils.checkpoint
from torch import nn
from torch.nn.utils import parametrize, prune

import fastbconv as fb
from fastbconv import _call, models, noise
from fastbconv.testing import assert_close, assert_same


@pytest.fixture(params=["auto", "reference"], autouse=True)
def _backend(request):
    with fb.algorithm(request.param):
        yield request.param


def _model(**options) -> nn.Sequential:
    return nn.Sequential(
        fb.BayesConv2d(3, 4, 3, activation="relu", **options),
        fb.BayesConv2d(4, 4, 3, bayesian_bias=True, groups=2, **options),
        nn.Flatten(),
        fb.BayesLinear(64, 5, bayesian_bias=True, **options),
        fb.BayesLinear(5, 2, bias=False, **options),
    )


def _image() -> torch.Tensor:
    return torch.randn(2, 3, 8, 8)


@pytest.fixture
def passes(monkeypatch) -> list[int]:
    """How many posteriors each pass draws; negative: each pass of gradients."""
    seen: list[int] = []
    backend = _call.backend

    class Counted:
        def __init__(self, real):
            self.real = real

        def __getattr__(self, name):
            return getattr(self.real, name)

        def sample_posterior_list(self, loc, *rest, **options):
            seen.append(len(loc))
            return self.real.sample_posterior_list(loc, *rest, **options)

        def sample_posterior_list_backward(self, grad, *rest, **options):
            seen.append(-len(grad))
            return self.real.sample_posterior_list_backward(grad, *rest, **options)

    monkeypatch.setattr(_call, "backend", lambda tensor: Counted(backend(tensor)))
    return seen


def _gradients(model: nn.Module, loss: torch.Tensor) -> list[torch.Tensor | None]:
    model.zero_grad()
    loss.backward()
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def _assert_gradients(got, expected) -> None:
    for one, other in zip(got, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert_close(one, other, 1e-4, 1e-5)


# --- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("limit", "count"), [(8_000_000, [6]), (1, [1, 2, 2, 1]), (400, [3, 3])])
def test_the_same_as_the_layers_one_by_one(limit: int, count: list[int], passes) -> None:
    model, x = _model(), _image()
    with fb.grouped(model, seed=3, max_weights=limit), fb.collect_kl(model) as kl:
        y = model(x)
    gradients = _gradients(model, y.square().sum() + kl.sum())
    assert passes == [*count, *(-size for size in reversed(count))]
    del passes[:]
    with fb.fixed_sample(model, 3), fb.collect_kl(model) as expected_kl:
        expected = model(x)
    assert_close(y, expected, 1e-5, 1e-5)
    assert_close(kl.sum(), expected_kl.sum(), 1e-6, 0)
    _assert_gradients(gradients, _gradients(model, expected.square().sum() + expected_kl.sum()))
    assert passes == []


def test_the_same_bits_where_the_kernel_is_the_same() -> None:
    model, x = _model(), _image()
    with fb.algorithm("direct"):
        with fb.grouped(model, seed=3):
            y = model(x)
        for position, layer in enumerate(models.bayesian_layers(model)):
            if layer is model[3]:
                x = x.flatten(1)
            x = layer(x, seed=noise.derive(3, position))
    assert_same(y, x)


def test_double_precision_gradients() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(fb.BayesConv2d(2, 2, 2, bayesian_bias=True), fb.BayesConv2d(2, 1, 2))
    model = model.double()
    names = [name for name, _ in model.named_parameters()]
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64)

    def loss(*values):
        for name, value in zip(names, values, strict=True):
            module, leaf = model.get_submodule(name.rsplit(".", 1)[0]), name.rsplit(".", 1)[1]
            module._parameters[leaf] = value
        with fb.grouped(model, seed=5), fb.collect_kl(model) as kl:
            return model(x), kl.sum()

    values = [p.detach().clone().requires_grad_() for p in model.parameters()]
    assert torch.autograd.gradcheck(loss, values)


def test_trained_and_buffered_priors(passes) -> None:
    def make() -> nn.Sequential:
        torch.manual_seed(2)
        scale = nn.Parameter(torch.full((1, 1, 1, 1), 0.5))
        return nn.Sequential(
            fb.BayesConv2d(3, 4, 3, prior=(0.1, scale)),
            fb.BayesConv2d(4, 4, 3, prior=(torch.randn(4, 4, 3, 3), 1.0)),
            fb.BayesConv2d(4, 4, 3, prior=None),
        )

    one, other, x = make(), make(), _image()
    with fb.grouped(one, seed=1), fb.collect_kl(one) as kl:
        y = one(x)
    with fb.fixed_sample(other, 1), fb.collect_kl(other) as expected:
        z = other(x)
    _assert_gradients(
        _gradients(one, y.sum() + kl.sum()), _gradients(other, z.sum() + expected.sum())
    )
    assert passes == [3, -3]
    assert one[0].prior_scale.grad is not None


def test_a_drawn_seed_follows_torch_and_changes_with_each_pass(passes) -> None:
    model, x = _model(), _image()
    torch.manual_seed(4)
    with fb.grouped(model):
        first, second = model(x), model(x)
    torch.manual_seed(4)
    with fb.grouped(model, max_weights=1):
        assert_same(model(x), first)
    assert passes == [6, 6, 1, 2, 2, 1]
    assert not torch.equal(first, second)
    torch.manual_seed(4)
    with fb.fixed_sample(model, noise.draw_seed()):
        assert_close(model(x), first, 1e-5, 1e-5)


def test_training_steps_inside_one_block(passes) -> None:
    model, x = _model(), _image()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with fb.grouped(model):
        for _ in range(3):
            with fb.collect_kl(model) as kl:
                loss = model(x).square().mean() + kl.sum() / 1000
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert passes == [6, -6] * 3


# --- what a group cannot serve --------------------------------------------------------------------


def test_a_layer_that_runs_twice(passes) -> None:
    layer = fb.BayesLinear(4, 4)
    model, x = nn.Sequential(fb.BayesLinear(4, 4), layer, nn.Identity(), layer), torch.eye(4)
    with fb.grouped(model):
        model(x).sum().backward()
    assert passes == [2, -2]
    with fb.grouped(model, seed=7):
        y = model(x)
    with fb.fixed_sample(model, 7):
        expected = model(x)
    assert_close(y, expected, 1e-5, 1e-6)
    _assert_gradients(_gradients(model, y.square().sum()), _gradients(model, expected.square().sum()))


def test_calls_that_draw_for_themselves(passes) -> None:
    model, x = _model(), _image()
    generator = torch.Generator().manual_seed(1)
    expected = model[0](x, generator=torch.Generator().manual_seed(1))
    with fb.grouped(model, seed=2):
        assert_same(model[0](x, seed=9), model[0](x, seed=9))
        assert_same(model[0](x, generator=generator), expected)
        assert passes == []
        several = model[0](x, num_samples=2)
        assert passes == []
    assert_same(several, model[0](x, seed=noise.derive(2, 0), num_samples=2))


def test_layers_that_draw_for_themselves(passes) -> None:
    normal = lambda: torch.distributions.Normal(0.0, 1.0)  # noqa: E731
    pruned = fb.BayesConv2d(4, 4, 1)
    prune.l1_unstructured(pruned, "weight", 0.5)
    doubled = fb.BayesConv2d(4, 4, 1)
    parametrize.register_parametrization(doubled, "weight", nn.Softplus())
    model = nn.Sequential(
        fb.BayesConv2d(3, 4, 3),
        fb.BayesConv2d(4, 4, 1, prior=fb.ScaleMixture(0.5, 1.0, 0.1)),
        fb.BayesConv2d(4, 4, 1, prior=normal),
        pruned,
        doubled,
        fb.BayesConv2d(4, 4, 1, eval_mode="mean").eval(),
        fb.BayesConv2d(4, 2, 1),
    )
    x = _image()
    with fb.grouped(model, seed=3), fb.collect_kl(model) as kl:
        y = model(x)
    assert passes == [2]
    with fb.fixed_sample(model, 3), fb.collect_kl(model) as expected_kl:
        expected = model(x)
    assert_close(y, expected, 1e-5, 1e-5)
    assert_close(kl.sum(), expected_kl.sum(), 1e-5, 0)
    _assert_gradients(_gradients(model, y.sum()), _gradients(model, expected.sum()))


def test_mixed_and_low_precision(passes) -> None:
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.wide = fb.BayesLinear(3, 3, dtype=torch.float64)
            self.single = fb.BayesLinear(3, 3)
            self.low = fb.BayesLinear(3, 3, dtype=torch.bfloat16)

        def forward(self, x):
            return self.low(self.single(self.wide(x).float()).bfloat16())

    model, x = Two().requires_grad_(False), torch.eye(3, dtype=torch.float64)
    with fb.grouped(model, seed=1):
        y = model(x)
    assert passes == [1, 1]
    with fb.fixed_sample(model, 1):
        assert_close(y, model(x), 1e-2, 1e-2)
    with fb.grouped(model), pytest.raises(TypeError, match="weight: expected float32"):
        model.wide(x.float())


def test_parameters_replaced_between_draw_and_call() -> None:
    model, x = _model(), _image()
    with fb.grouped(model, seed=1):
        hidden = model[0](x)
        model[1].weight = nn.Parameter(torch.zeros_like(model[1].weight))
        got = model[1](hidden)
    assert_same(got, model[1](hidden, seed=noise.derive(1, 1)))


def test_drawn_without_a_graph_used_with_one() -> None:
    model, x = _model(), _image()
    with fb.grouped(model, seed=1):
        with torch.inference_mode():
            hidden = model[0](x)
        out = model[1](hidden.clone())
    out.sum().backward()
    assert model[1].weight_rho.grad is not None


def test_frozen_layers_get_no_gradient(passes) -> None:
    model, x = _model(), _image()
    model[1].requires_grad_(False)
    shapes = []
    with fb.grouped(model, seed=1):
        group = model[1]._fb_context.group
        take = group.take

        def spy(layer, *rest):
            found = take(layer, *rest)
            shapes.append((layer, found.weight.requires_grad))
            return found

        group.take = spy
        y = model(x)
    gradients = _gradients(model, y.square().sum())
    assert [wanted for layer, wanted in shapes if layer is model[1]] == [False]
    with fb.fixed_sample(model, 1):
        expected = model(x)
    _assert_gradients(gradients, _gradients(model, expected.square().sum()))
    model.requires_grad_(False)
    with fb.grouped(model, seed=1):
        assert not model(x).requires_grad


def test_layers_without_a_call_get_no_gradient(passes) -> None:
    model, x = _model(), _image()
    with fb.grouped(model, seed=1):
        model[0](x).sum().backward()
    assert passes == [6, -6]
    assert model[0].weight_rho.grad is not None
    assert model[1].weight_rho.grad is None
    assert model[3].bias.grad is None


# --- other contexts -------------------------------------------------------------------------------


def test_autocast_draws_in_the_compute_dtype() -> None:
    model, x = _model(), _image()
    with fb.grouped(model, seed=3), fb.collect_kl(model) as kl:
        with torch.autocast("cpu", torch.bfloat16):
            low = model[:2](x)
        high = model[3](low.float().flatten(1))  # another dtype than the group's
    assert (low.dtype, high.dtype) == (torch.bfloat16, torch.float32)
    with fb.fixed_sample(model, 3), fb.collect_kl(model) as expected_kl:
        with torch.autocast("cpu", torch.bfloat16):
            expected = model[:2](x)
        expected_high = model[3](low.float().flatten(1))
    assert_close(low.float(), expected.float(), 2e-2, 2e-2)
    assert_same(high, expected_high)
    assert_close(kl.sum(), expected_kl.sum(), 1e-6, 0)
    got = _gradients(model, low.float().square().sum())
    for one, other in zip(got, _gradients(model, expected.float().square().sum()), strict=True):
        if one is not None:
            assert one.dtype == torch.float32
            assert_close(one, other, 5e-2, 5e-2 * float(other.abs().max()))


def test_bfloat16_input() -> None:
    layer = fb.BayesConv2d(3, 4, 3, bayesian_bias=True)
    x = _image().bfloat16().requires_grad_()
    with fb.grouped(layer, seed=3):
        y = layer(x)
    assert_close(y.float(), layer(x, seed=noise.derive(3, 0)).float(), 2e-2, 2e-2)
    y.float().sum().backward()
    assert x.grad.dtype == torch.bfloat16
    assert layer.weight.grad.dtype == layer.bias_rho.grad.dtype == torch.float32


@pytest.mark.parametrize("first", ["grouped", "other"])
def test_nests_with_means_and_fixed_samples(first: str, passes) -> None:
    model, x = _model(), _image()
    for make in (lambda: fb.mean_weights(model), lambda: fb.fixed_sample(model, 5)):
        with make():
            expected = model(x)
        order = [lambda: fb.grouped(model), make]
        outer, inner = order if first == "grouped" else order[::-1]
        with outer(), inner():
            assert_close(model(x), expected, 1e-5, 1e-5)
    assert passes == [6]
    with fb.grouped(model, seed=1), fb.grouped(model, seed=5):
        assert_close(model(x), expected, 1e-5, 1e-5)


def test_a_fixed_sample_that_begins_after_the_draw() -> None:
    model, x = _model(), _image()
    with fb.grouped(model):
        hidden = model[0](x)
        with fb.fixed_sample(model, 5):
            got = model[1](hidden)
    assert_same(got, model[1](hidden, seed=noise.derive(5, 1)))


def test_collected_kl_in_any_order() -> None:
    model, x = _model(), _image()
    with fb.collect_kl(model) as outer, fb.grouped(model), fb.collect_kl(model[1]) as inner:
        model(x)
    assert_close(outer.sum(), fb.kl_loss(model), 1e-6, 0)
    assert_close(inner.sum(), model[1].kl_loss(), 1e-6, 0)
    with fb.grouped(model):
        hidden = model[0](x)
        with fb.collect_kl(model) as late:  # after the draw
            model[1](hidden)
    assert_close(late.sum(), model[1].kl_loss(), 1e-6, 0)


def test_tfp_face(passes) -> None:
    def make() -> nn.Sequential:
        torch.manual_seed(3)
        trained = fb.default_mean_field_normal_fn()
        model = nn.Sequential(
            fb.Convolution2DReparameterization(4, 3, activation="relu"),
            fb.Convolution2DReparameterization(
                4, 3, bias_posterior_fn=fb.default_mean_field_normal_fn(),
                bias_prior_fn=fb.default_multivariate_normal_fn, kernel_prior_fn=trained,
            ),
            fb.Convolution2DReparameterization(4, 1, kernel_posterior_tensor_fn=lambda d: d.sample()),
            nn.Flatten(),
            fb.DenseReparameterization(2, bias_posterior_fn=None),
        )  # fmt: skip
        return fb.build(model, (None, 8, 8, 3))

    one, other, x = make(), make(), torch.randn(2, 8, 8, 3)
    with fb.grouped(one, seed=3), fb.collect_kl(one) as kl:
        y = one(x)
    assert passes == [4]
    with fb.fixed_sample(other, 3), fb.collect_kl(other) as expected_kl:
        expected = other(x)
    assert_close(y, expected, 1e-5, 1e-5)
    assert_close(kl.sum(), expected_kl.sum(), 1e-6, 0)
    assert_close(one[1].kernel_posterior_tensor, other[1].kernel_posterior_tensor, 0, 0)
    assert_close(sum(fb.losses(one)), sum(fb.losses(other)), 1e-6, 0)
    _assert_gradients(
        _gradients(one, y.square().sum() + kl.sum()),
        _gradients(other, expected.square().sum() + expected_kl.sum()),
    )


def test_lazy_layers_draw_for_themselves_once(passes) -> None:
    model = nn.Sequential(fb.DenseReparameterization(4), fb.DenseReparameterization(2))
    with fb.grouped(model, seed=1):
        model(torch.randn(2, 3))
        assert passes == [1, 1]
    with fb.grouped(model, seed=1):
        model(torch.randn(2, 3))
    assert passes == [1, 1, 2]


# --- compile, torch.func, checkpointing -----------------------------------------------------------


def test_compiled_models_draw_for_themselves(passes) -> None:
    torch._dynamo.reset()
    model, x = _model(), _image()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in (1, 2):
            with fb.grouped(model, seed=seed), fb.collect_kl(model) as kl:
                y = compiled(x)
            with fb.fixed_sample(model, seed):
                assert_close(y, model(x), 1e-5, 1e-5)
            assert_close(kl.sum(), fb.kl_loss(model), 1e-6, 0)
    assert passes == []


def test_transforms_draw_for_themselves(passes) -> None:
    model, x = _model(), _image()
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(values):
        return torch.func.functional_call(model, values, (x,)).sum()

    with fb.grouped(model, seed=1):
        gradients = torch.func.grad(loss)(parameters)
    assert passes == []
    with fb.fixed_sample(model, 1):
        model(x).sum().backward()
    for name, parameter in model.named_parameters():
        assert_close(gradients[name], parameter.grad, 1e-4, 1e-5)


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_layers_draw_for_themselves(use_reentrant: bool, inside: bool, passes) -> None:
    model, x = _model(), _image().requires_grad_()

    def run(body) -> list[torch.Tensor]:
        torch.manual_seed(6)
        hidden = body(model[:2], x)
        return _gradients(model, model[2:](hidden).square().sum()), hidden

    def checkpointed(part, value):
        return torch.utils.checkpoint.checkpoint(part, value, use_reentrant=use_reentrant)

    torch.manual_seed(6)
    expected = model[:2](x)
    with fb.grouped(model):
        torch.manual_seed(6)
        hidden = checkpointed(model[:2], x)
        loss = hidden.square().sum()
        if inside:
            got = _gradients(model, loss)
    got = got if inside else _gradients(model, loss)
    assert passes == []
    assert_same(hidden, expected)
    _assert_gradients(got, _gradients(model, expected.square().sum()))
    del run


def test_a_group_beside_a_checkpoint(passes) -> None:
    model, x = _model(), _image()
    with fb.grouped(model):
        hidden = model[0](x)
        hidden = torch.utils.checkpoint.checkpoint(model[1], hidden, use_reentrant=False)
        model[2:](hidden).sum().backward()
    assert passes == [6, -6]
    assert all(p.grad is not None for p in model.parameters())


# --- what is left behind --------------------------------------------------------------------------


def test_nothing_is_left_behind() -> None:
    model, x = _model(), _image()
    with fb.grouped(model, seed=1), fb.collect_kl(model):
        model[0](x)
        state = set(model.state_dict())
        twin, thawed = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        group = weakref.ref(model[0]._fb_context.group)
    with pytest.raises(RuntimeError, match="broken"), fb.grouped(model):
        model[0](x)
        raise RuntimeError("broken")
    assert state == set(_model().state_dict())
    for one in (model, twin, thawed):
        assert [layer._fb_context for layer in models.bayesian_layers(one)] == [None] * 4
    assert group() is None
    assert set(vars(model[0])) == set(vars(_model()[0]))


def test_weights_are_gone_after_backward() -> None:
    model, x = _model(), _image()
    kept = []
    with fb.grouped(model):
        take = model[0]._fb_context.group.take

        def spy(*arguments):
            found = take(*arguments)
            kept.append(weakref.ref(found.weight))
            return found

        model[0]._fb_context.group.take = spy
        model(x).sum().backward()
        assert len(kept) == 4
        assert not any(reference() is not None for reference in kept)


def test_second_backward_is_refused() -> None:
    model, x = _model(), _image()
    with fb.grouped(model):
        y = model(x)
    y.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()


def test_argument_and_empty_model() -> None:
    with pytest.raises(ValueError, match="max_weights: expected a positive integer, got 0"):
        fb.grouped(_model(), max_weights=0).__enter__()
    with fb.grouped(nn.Linear(2, 2)):
        pass
