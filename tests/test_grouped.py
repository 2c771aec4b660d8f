"""grouped: the weights of a model drawn together are those of the layers called one by one."""

from __future__ import annotations

import pytest
import torch
from grouped_cases import (  # noqa: F401  fixtures too
    assert_gradients,
    each_backend,
    gradients,
    make_image,
    make_model,
    passes,
    taken,
)
from torch import nn
from torch.nn.utils import parametrize, prune

import fastbconv as fb
from fastbconv import models, noise
from fastbconv.testing import assert_close, assert_same

# ruff: noqa: F811  a fixture is named where it is imported and where it is used


# --- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("limit", "count"), [(8_000_000, [6]), (1, [1, 2, 2, 1]), (400, [3, 3])])
def test_the_same_as_the_layers_one_by_one(limit: int, count: list[int], passes) -> None:
    model, x = make_model(), make_image()
    with fb.grouped(model, seed=3, max_weights=limit), fb.collect_kl(model) as kl:
        y = model(x)
    got = gradients(model, y.square().sum() + kl.sum())
    assert passes == count
    with fb.fixed_sample(model, 3), fb.collect_kl(model) as expected_kl:
        expected = model(x)
    assert_close(y, expected, 1e-5, 1e-5)
    assert_close(kl.sum(), expected_kl.sum(), 1e-6, 0)
    assert_gradients(got, gradients(model, expected.square().sum() + expected_kl.sum()))
    assert passes == count


def test_one_node_for_each_group(each_backend, taken) -> None:
    if each_backend == "reference":
        return  # plain operations, and no node of its own
    model = make_model()
    for limit, nodes in ((8_000_000, 1), (1, 4), (400, 2)):
        del taken[:]
        with fb.grouped(model, max_weights=limit):
            model(make_image())
        assert len({weight.grad_fn for _, weight in taken}) == nodes


def test_the_same_bits_where_the_kernel_is_the_same() -> None:
    model, x = make_model(), make_image()
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

    one, other, x = make(), make(), make_image()
    with fb.grouped(one, seed=1), fb.collect_kl(one) as kl:
        y = one(x)
    with fb.fixed_sample(other, 1), fb.collect_kl(other) as expected:
        z = other(x)
    assert_gradients(gradients(one, y.sum() + kl.sum()), gradients(other, z.sum() + expected.sum()))
    assert passes == [3]
    assert one[0].prior_scale.grad is not None


def test_a_drawn_seed_follows_torch_and_changes_with_each_pass(passes) -> None:
    model, x = make_model(), make_image()
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
    model, x = make_model(), make_image()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with fb.grouped(model):
        for _ in range(3):
            with fb.collect_kl(model) as kl:
                loss = model(x).square().mean() + kl.sum() / 1000
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert passes == [6] * 3


# --- what a group cannot serve --------------------------------------------------------------------


def test_a_layer_that_runs_twice(passes) -> None:
    layer = fb.BayesLinear(4, 4)
    model, x = nn.Sequential(fb.BayesLinear(4, 4), layer, nn.Identity(), layer), torch.eye(4)
    with fb.grouped(model):
        model(x).sum().backward()
    assert passes == [2]
    with fb.grouped(model, seed=7):
        y = model(x)
    with fb.fixed_sample(model, 7):
        expected = model(x)
    assert_close(y, expected, 1e-5, 1e-6)
    assert_gradients(gradients(model, y.square().sum()), gradients(model, expected.square().sum()))


def test_calls_that_draw_for_themselves(passes) -> None:
    model, x = make_model(), make_image()
    generator = torch.Generator().manual_seed(1)
    expected = model[0](x, generator=torch.Generator().manual_seed(1))
    with fb.grouped(model):
        assert_same(model[0](x, generator=generator), expected)
    with fb.grouped(model, seed=2):
        assert_same(model[0](x, seed=9), model[0](x, seed=9))
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
    x = make_image()
    with fb.grouped(model, seed=3), fb.collect_kl(model) as kl:
        y = model(x)
    assert passes == [2]
    with fb.fixed_sample(model, 3), fb.collect_kl(model) as expected_kl:
        expected = model(x)
    assert_close(y, expected, 1e-5, 1e-5)
    assert_close(kl.sum(), expected_kl.sum(), 1e-5, 0)
    assert_gradients(gradients(model, y.sum()), gradients(model, expected.sum()))


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
    model, x = make_model(), make_image()
    with fb.grouped(model, seed=1):
        hidden = model[0](x)
        model[1].weight = nn.Parameter(torch.zeros_like(model[1].weight))
        got = model[1](hidden)
    assert_same(got, model[1](hidden, seed=noise.derive(1, 1)))


@pytest.mark.parametrize("limit", [1, 8_000_000])
@pytest.mark.parametrize("seed", [1, None])
def test_drawn_without_a_graph_used_with_one(seed: int | None, limit: int) -> None:
    model, x = make_model(), make_image()
    with fb.grouped(model, seed=seed, max_weights=limit):
        with torch.inference_mode():
            hidden = model[0](x)
        out = model[1](hidden.clone())
    out.sum().backward()
    assert model[1].weight_rho.grad is not None


def test_replicas_draw_for_themselves(passes) -> None:
    model, x = make_model(), make_image()
    with fb.grouped(model):
        replica = model[0]._replicate_for_data_parallel()
        replica._parameters.update(model[0]._parameters)
        replica(x)
    assert passes == []


def test_frozen_layers_get_no_gradient(taken) -> None:
    model, x = make_model(), make_image()
    model[1].requires_grad_(False)
    with fb.grouped(model, seed=1):
        y = model(x)
    got = gradients(model, y.square().sum())
    assert [weight.requires_grad for _, weight in taken] == [True, False, True, True]
    with fb.fixed_sample(model, 1):
        expected = model(x)
    assert_gradients(got, gradients(model, expected.square().sum()))
    model.requires_grad_(False)
    with fb.grouped(model, seed=1):
        assert not model(x).requires_grad


def test_layers_without_a_call_get_no_gradient(passes) -> None:
    model, x = make_model(), make_image()
    with fb.grouped(model, seed=1):
        model[0](x).sum().backward()
    assert passes == [6]
    assert model[0].weight_rho.grad is not None
    assert model[1].weight_rho.grad is None
    assert model[3].bias.grad is None
