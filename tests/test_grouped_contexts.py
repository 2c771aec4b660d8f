"""grouped with other contexts and dtypes, the TFP face, compile, torch.func, checkpointing."""

from __future__ import annotations

import copy
import pickle
import weakref

import pytest
import torch
import torch.utils.checkpoint
from grouped_cases import (  # noqa: F401  fixtures too
    assert_gradients,
    each_backend,
    gradients,
    group_module,
    make_image,
    make_model,
    passes,
)
from torch import nn

import fastbconv as fb
from fastbconv import models, noise
from fastbconv.testing import assert_close, assert_same

# ruff: noqa: F811  a fixture is named where it is imported and where it is used


# --- other contexts -------------------------------------------------------------------------------


def test_autocast_draws_in_the_compute_dtype() -> None:
    model, x = make_model(), make_image()
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
    got = gradients(model, low.float().square().sum())
    for one, other in zip(got, gradients(model, expected.float().square().sum()), strict=True):
        if one is not None:
            assert one.dtype == torch.float32
            assert_close(one, other, 5e-2, 5e-2 * float(other.abs().max()))


def test_bfloat16_input() -> None:
    layer = fb.BayesConv2d(3, 4, 3, bayesian_bias=True)
    x = make_image().bfloat16().requires_grad_()
    with fb.grouped(layer, seed=3):
        y = layer(x)
    assert_close(y.float(), layer(x, seed=noise.derive(3, 0)).float(), 2e-2, 2e-2)
    y.float().sum().backward()
    assert x.grad.dtype == torch.bfloat16
    assert layer.weight.grad.dtype == layer.bias_rho.grad.dtype == torch.float32


@pytest.mark.parametrize("first", ["grouped", "other"])
def test_nests_with_means_and_fixed_samples(first: str, passes) -> None:
    model, x = make_model(), make_image()
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
    model, x = make_model(), make_image()
    with fb.grouped(model):
        hidden = model[0](x)
        with fb.fixed_sample(model, 5):
            got = model[1](hidden)
    assert_same(got, model[1](hidden, seed=noise.derive(5, 1)))


def test_collected_kl_in_any_order() -> None:
    model, x = make_model(), make_image()
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
            fb.Convolution2DReparameterization(
                4, 1, kernel_posterior_tensor_fn=lambda d: d.sample()
            ),
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
    assert_gradients(
        gradients(one, y.square().sum() + kl.sum()),
        gradients(other, expected.square().sum() + expected_kl.sum()),
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
    model, x = make_model(), make_image()
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
    model, x = make_model(), make_image()
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
    model, x = make_model(), make_image().requires_grad_()
    torch.manual_seed(6)
    expected = model[:2](x)
    with fb.grouped(model):
        torch.manual_seed(6)
        hidden = torch.utils.checkpoint.checkpoint(model[:2], x, use_reentrant=use_reentrant)
        if inside:
            got = gradients(model, hidden.square().sum())
    if not inside:
        got = gradients(model, hidden.square().sum())
    assert passes == []
    assert_same(hidden, expected)
    assert_gradients(got, gradients(model, expected.square().sum()))


def test_a_group_beside_a_checkpoint(passes) -> None:
    model, x = make_model(), make_image()
    with fb.grouped(model):
        hidden = model[0](x)
        hidden = torch.utils.checkpoint.checkpoint(model[1], hidden, use_reentrant=False)
        model[2:](hidden).sum().backward()
    assert passes == [6]
    assert all(p.grad is not None for p in model.parameters())


# --- what is left behind --------------------------------------------------------------------------


def test_nothing_is_left_behind() -> None:
    model, x = make_model(), make_image()
    with fb.grouped(model, seed=1), fb.collect_kl(model):
        model[0](x)
        state = set(model.state_dict())
        twin, thawed = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        group = weakref.ref(model[0]._fb_context.group)
    with pytest.raises(ValueError, match="input"), fb.grouped(model):
        model(x[:, :2])
    assert state == set(make_model().state_dict())
    for one in (model, twin, thawed):
        assert [layer._fb_context for layer in models.bayesian_layers(one)] == [None] * 4
    assert group() is None
    assert set(vars(model[0])) == set(vars(make_model()[0]))


def test_weights_are_gone_after_backward(monkeypatch) -> None:
    model, x, kept = make_model(), make_image(), []
    take = group_module._Group.take

    def spy(*arguments):
        found = take(*arguments)
        kept.append(weakref.ref(found.weight))
        return found

    monkeypatch.setattr(group_module._Group, "take", spy)
    with fb.grouped(model):
        model(x).sum().backward()
        assert len(kept) == 4
        assert not any(reference() is not None for reference in kept)


def test_second_backward_is_refused() -> None:
    model, x = make_model(), make_image()
    with fb.grouped(model):
        y = model(x)
    y.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()


def test_argument_and_empty_model() -> None:
    with pytest.raises(ValueError, match="max_weights: expected a positive integer, got 0"):
        fb.grouped(make_model(), max_weights=0).__enter__()
    with fb.grouped(nn.Linear(2, 2)):
        pass
