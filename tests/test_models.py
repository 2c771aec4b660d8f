"""Whole models: KL, losses, contexts, parameter groups."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastbconv as fb
from fastbconv import models, noise
from fastbconv.testing import assert_close, assert_same


def _model() -> nn.Sequential:
    return nn.Sequential(
        fb.BayesConv2d(3, 4, 3, activation="relu"),
        nn.BatchNorm2d(4),
        fb.BayesConv2d(4, 4, 3),
        nn.Flatten(),
        fb.BayesLinear(64, 5, bayesian_bias=True),
    )


def _image() -> torch.Tensor:
    return torch.randn(2, 3, 8, 8)


def _contexts(model: nn.Module) -> list[object]:
    return [layer._fb_context for layer in models.bayesian_layers(model)]


def test_kl_loss_is_the_plain_sum_over_distinct_layers() -> None:
    model = _model()
    expected = model[0].kl_loss() + model[2].kl_loss() + model[4].kl_loss()
    assert_close(fb.kl_loss(model), expected, 1e-6, 0)
    assert_close(fb.kl_loss(model, n_data=50), expected / 50, 1e-6, 0)
    assert_close(fb.kl_loss(model, 50, beta=0.1), expected / 500, 1e-6, 0)
    twice = nn.ModuleList([model[0], nn.Sequential(model[0])])
    assert_close(fb.kl_loss(twice), model[0].kl_loss(), 0, 0)
    assert fb.kl_loss(nn.Linear(2, 2)).item() == 0.0


def test_kl_does_not_depend_on_forwards_or_batch() -> None:
    model = _model()
    before = fb.kl_loss(model)
    for _ in range(3):
        model(_image())
    assert_same(fb.kl_loss(model), before)


def test_losses_and_regularization_loss() -> None:
    model = _model()
    assert len(fb.losses(model)) == 3
    assert_close(sum(fb.losses(model)), fb.kl_loss(model), 1e-6, 0)
    assert fb.regularization_loss(model).item() == 0.0


def test_collect_kl_is_the_kl_of_the_fused_passes() -> None:
    model = _model()
    with fb.collect_kl(model) as kl:
        with pytest.warns(RuntimeWarning, match="none of its 3 Bayesian layers was: this KL is 0"):
            assert kl.sum().item() == 0.0
        model(_image())
        model(_image())
    assert_close(kl.sum(), fb.kl_loss(model), 1e-6, 0)
    kl.sum().backward()
    fused = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    fb.kl_loss(model).backward()
    separate = [p.grad for p in model.parameters() if p.grad is not None]
    for got, expected in zip(fused, separate, strict=True):
        assert_close(got, expected, 1e-5, 1e-6)
    assert _contexts(model) == [None] * 3


def test_collect_kl_nests_and_holds_nothing_on_modules() -> None:
    model = _model()
    with fb.collect_kl(model) as outer:
        with fb.collect_kl(model[0]) as inner:
            model(_image())
        assert_close(inner.sum(), model[0].kl_loss(), 1e-6, 0)
    assert_close(outer.sum(), fb.kl_loss(model), 1e-6, 0)
    for layer in models.bayesian_layers(model):
        extra = set(vars(layer)) - set(vars(type(layer)(4, 4, *([3] * (layer.weight.ndim > 2)))))
        assert not extra


def test_collect_kl_under_mean_weights() -> None:
    model = _model()
    with fb.collect_kl(model) as kl, fb.mean_weights(model):
        model(_image())
    assert_close(kl.sum(), fb.kl_loss(model), 1e-6, 0)


def test_fixed_sample_is_one_function() -> None:
    model, x = _model().eval(), _image()
    with fb.fixed_sample(model, 3):
        first = model(x)
        assert_same(model(x), first)
        assert_close(model(x[:1]), first[:1], 1e-5, 1e-5)
        explicit = model[0](x, seed=9)
    with fb.fixed_sample(model, torch.tensor([3, 0])):
        assert_same(model(x), first)
    with fb.fixed_sample(model, 4):
        assert not torch.equal(model(x), first)
    assert_same(explicit, model[0](x, seed=9))
    assert_same(first, _by_hand(model, x, 3))


def _by_hand(model: nn.Sequential, x: torch.Tensor, seed: int) -> torch.Tensor:
    """Layer l draws from derive(seed, l)."""
    position = 0
    for module in model:
        if getattr(module, "is_bayesian", False):
            x = module(x, seed=noise.derive(seed, position))
            position += 1
        else:
            x = module(x)
    return x


def test_equal_shapes_under_fixed_sample_are_uncorrelated() -> None:
    model = nn.Sequential(*(fb.BayesConv2d(32, 32, 3) for _ in range(4)))
    with fb.fixed_sample(model, 1):
        eps = torch.stack(
            [noise.weight_eps(m._fb_context.seed, m.weight.shape).flatten() for m in model]
        )
    correlation = torch.corrcoef(eps) - torch.eye(4)
    assert correlation.abs().max() < 5 / eps.shape[1] ** 0.5


def test_a_layer_used_twice_keeps_its_weights_under_fixed_sample() -> None:
    layer = fb.BayesLinear(4, 4)
    model = nn.Sequential(layer, nn.Identity(), layer)
    x = torch.eye(4)
    with fb.fixed_sample(model, 1):
        sampled = layer(x)
        assert_close(model(x), layer(sampled), 1e-6, 1e-6)


def test_mean_weights_and_nesting() -> None:
    model, x = _model().eval(), _image()
    with fb.mean_weights(model):
        mean = model(x)
        with fb.fixed_sample(model, 1):
            inside = model(x)
        assert_same(model(x), mean)
    with fb.fixed_sample(model, 1):
        assert_same(model(x), inside)
    assert not torch.equal(mean, inside)


def test_contexts_survive_an_exception() -> None:
    model = _model()
    with pytest.raises(RuntimeError, match="broken"), fb.fixed_sample(model, 1):
        raise RuntimeError("broken")
    assert _contexts(model) == [None] * 3


def test_derive_is_philox_of_stream_15() -> None:
    parent = torch.tensor([5, -7])
    counter = torch.tensor([3, 15 << 28, (-7) & 0xFFFFFFFF, 0xFFFFFFFF])
    word = noise.philox4x32_10(counter, torch.tensor([5, 0])).tolist()
    expected = [word[0] | word[1] << 32, word[2] | word[3] << 32]
    got = [value % 2**64 for value in noise.derive(parent, 3).tolist()]
    assert got == expected
    children = torch.stack([noise.derive(parent, index) for index in range(64)])
    assert len(children[:, 0].unique()) == 64


def test_param_groups_never_decay_a_posterior() -> None:
    model = _model()
    groups = {g["name"]: g for g in fb.param_groups(model, 1e-3, rho_lr=1e-2, weight_decay=0.1)}
    assert set(groups) == {"posterior", "rho", "other"}
    assert {id(p) for p in groups["rho"]["params"]} == {
        id(p) for name, p in model.named_parameters() if name.endswith("rho")
    }
    assert [groups[n]["weight_decay"] for n in ("posterior", "rho", "other")] == [0.0, 0.0, 0.1]
    assert [groups[n]["lr"] for n in ("posterior", "rho", "other")] == [1e-3, 1e-2, 1e-3]
    every = [p for g in groups.values() for p in g["params"]]
    assert len(every) == len({id(p) for p in every}) == len(list(model.parameters()))
    torch.optim.AdamW(list(groups.values()))


def test_build_leaves_no_trace() -> None:
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.BatchNorm2d(4), fb.BayesConv2d(4, 2, 3))
    assert fb.build(model, (None, 3, 8, 8)) is model
    assert model[0].weight.shape == (4, 3, 3, 3)
    assert model.training
    assert model[1].training
    assert model[1].num_batches_tracked.item() == 0
    state = torch.get_rng_state()
    fb.build(model, (None, 3, 8, 8))  # nothing is lazy any more, so nothing is drawn
    assert_same(torch.get_rng_state(), state)


def test_training_reduces_the_loss() -> None:
    model = nn.Sequential(
        fb.BayesConv2d(1, 4, 3, activation="relu"), nn.Flatten(), fb.BayesLinear(144, 2)
    )
    x = torch.randn(64, 1, 8, 8)
    target = (x.mean((1, 2, 3)) > 0).long()
    optimiser = torch.optim.Adam(fb.param_groups(model, 1e-2))
    history = []
    for _ in range(40):
        loss = nn.functional.cross_entropy(model(x), target) + fb.kl_loss(model, 10000)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        history.append(loss.item())
    assert sum(history[-5:]) < 0.7 * sum(history[:5])
