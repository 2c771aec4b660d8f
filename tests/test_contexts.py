"""Contexts of a whole model: ends in any order, threads, activation checkpointing."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.utils.checkpoint
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointError, checkpoint

import fastbconv as fb
from fastbconv import contexts, models, noise
from fastbconv.testing import assert_close, assert_same


def _model() -> nn.Sequential:
    return nn.Sequential(
        fb.BayesConv2d(3, 4, 3, activation="relu"),
        fb.BayesConv2d(4, 4, 3, bias=False),
        fb.BayesConv2d(4, 2, 1),
    )


def _tfp() -> nn.Sequential:
    model = nn.Sequential(
        fb.Convolution2DReparameterization(4, 3, data_format="channels_first"),
        fb.Convolution2DReparameterization(2, 3, data_format="channels_first"),
    )
    return fb.build(model, (None, 3, 8, 8))


def _image() -> torch.Tensor:
    return torch.randn(2, 3, 8, 8)


def _settings(model: nn.Module) -> list[object]:
    return [layer._fb_context for layer in models.bayesian_layers(model)]


# --- ends -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 0, 1), (0, 2, 1)])
def test_contexts_end_in_any_order(order: tuple[int, ...]) -> None:
    model, x = _model(), _image()
    made = [fb.fixed_sample(model, 1), fb.collect_kl(model), fb.mean_weights(model[0])]
    entered = [context.__enter__() for context in made]
    for number in order[:2]:
        made[number].__exit__(None, None, None)
    left = order[2]
    y = model(x)
    assert_same(
        y if left != 1 else entered[1].sum(),
        {0: lambda: _fixed(model, x), 1: entered[1].sum, 2: lambda: y}[left](),
    )
    if left == 1:
        assert_close(entered[1].sum(), fb.kl_loss(model), 1e-6, 0)
    if left == 2:
        assert_same(model[0](x), model[0](x))
        assert model[1]._fb_context is None
    made[left].__exit__(None, None, None)
    assert _settings(model) == [None] * 3


def _fixed(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    for position, layer in enumerate(models.bayesian_layers(model)):
        x = layer(x, seed=noise.derive(1, position))
    return x


def test_the_innermost_setting_is_in_force_whatever_ended() -> None:
    model, x = _model(), _image()
    outer, middle, inner = (fb.fixed_sample(model, seed) for seed in (1, 2, 3))
    for context in (outer, middle, inner):
        context.__enter__()
    last = model(x)
    middle.__exit__(None, None, None)
    assert_same(model(x), last)
    inner.__exit__(None, None, None)
    assert_same(model(x), _fixed(model, x))
    outer.__exit__(None, None, None)
    assert _settings(model) == [None] * 3


def test_threads_leave_nothing_behind() -> None:
    model = _model()
    problems = []

    def work(seed: int) -> None:
        try:
            for _ in range(200):
                with fb.fixed_sample(model, seed), fb.collect_kl(model):
                    pass
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert _settings(model) == [None] * 3


def test_seeds_lie_on_the_device_of_the_layer() -> None:
    model = nn.Sequential(fb.BayesLinear(2, 2), fb.BayesLinear(2, 2, device="meta"))
    with fb.fixed_sample(model, 5):
        first, second = (layer._fb_context.seed for layer in model)
    assert_same(first, noise.derive(5, 0))
    assert second.shape == (2,)
    assert_same(noise.derive_range(5, 2, 3)[1], noise.derive(5, 3))
    seeds = torch.stack([noise.derive(5, index) for index in range(2, 5)])
    assert_same(noise.mirror_derive_seeds(noise.seed_tensor(5), 2, 3), seeds)
    assert noise.seed_tensor(-3, "meta").shape == (2,)


class HostCopies(TorchDispatchMode):
    """Refuses what would make the host and a device wait for one another."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        every = tree_leaves((arguments, options, result))
        devices = {value.device.type for value in every if isinstance(value, torch.Tensor)}
        assert devices <= {"meta"}, f"{function} on {devices}"
        assert "_local_scalar_dense" not in str(function)
        return result


@pytest.mark.parametrize("make", [_model, _tfp])
@pytest.mark.parametrize("rank", [0, 3])
def test_layers_copy_nothing_from_the_host(rank: int, make, monkeypatch) -> None:
    """The meta device stands for any that is not the host."""
    model, x = make().to("meta"), _image().to("meta")
    monkeypatch.setattr(noise, "rank_offset", lambda: rank << 48)
    seed = torch.empty(2, dtype=torch.int64, device="meta")
    with HostCopies():
        for given in (None, 5, seed):
            model[0](x, seed=given).sum().backward()
        for entered in (fb.fixed_sample(model, 5), fb.grouped(model), fb.grouped(model, seed=5)):
            with entered, fb.collect_kl(model) as kl:
                (model(x).sum() + kl.sum()).backward()
        sum(fb.losses(model)).backward()
        fb.functional.sample_posterior(x, x, seed=1).sum()


def test_sum_of_terms_of_several_dtypes() -> None:
    collector = contexts.KlCollector({0: torch.tensor(1.0), 1: torch.tensor(2.0).double()})
    assert collector.sum().item() == 3.0
    assert contexts.KlCollector().sum().item() == 0.0


# --- activation checkpointing ---------------------------------------------------------------------


def _gradients(model: nn.Module, loss: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("make", [_model, _tfp])
@pytest.mark.parametrize("name", ["fixed_sample", "mean_weights"])
def test_a_checkpoint_inside_the_block(name: str, make, use_reentrant: bool) -> None:
    model, x = make(), _image().requires_grad_()
    arguments = (model, 3) if name == "fixed_sample" else (model,)
    with getattr(fb, name)(*arguments):
        expected = _gradients(model, model(x).square().sum())
        y = checkpoint(model, x, use_reentrant=use_reentrant)
        got = _gradients(model, y.square().sum())
    for one, other in zip(got, expected, strict=True):
        assert_close(one, other, 1e-5, 1e-5)


@pytest.mark.parametrize("make", [_model, _tfp])
@pytest.mark.parametrize("part", [slice(0, 1), slice(0, 3)])
@pytest.mark.parametrize("name", ["fixed_sample", "mean_weights"])
def test_backward_outside_the_block_is_an_error(name: str, part: slice, make) -> None:
    model, x = make(), _image()
    arguments = (model, 3) if name == "fixed_sample" else (model,)
    with getattr(fb, name)(*arguments):
        y = checkpoint(model[part], x, use_reentrant=False)
    with pytest.raises(CheckpointError, match="different"):
        y.sum().backward()


def test_a_seed_given_to_the_layer_is_repeated_anywhere() -> None:
    model, x = _model(), _image()
    with fb.fixed_sample(model, 3):
        y = checkpoint(model[0], x, 7, use_reentrant=False)
    got = _gradients(model, y.sum())
    for one, other in zip(got, _gradients(model, model[0](x, 7).sum()), strict=True):
        assert_close(one, other, 1e-5, 1e-5)


def test_where_checkpointing_is_seen() -> None:
    seen = []

    class Probe(nn.Module):
        def forward(self, x):
            seen.append(contexts.in_checkpoint())
            return x * x

    probe, x = Probe(), torch.ones(2, requires_grad=True)
    probe(x)
    with torch.no_grad():
        probe(x)
    with torch.autograd.graph.save_on_cpu():
        probe(x)
    assert seen == [False] * 3
    del seen[:]
    for use_reentrant in (True, False):
        checkpoint(probe, x, use_reentrant=use_reentrant).sum().backward()
    with torch.autograd.graph.save_on_cpu():
        checkpoint(probe, x, use_reentrant=False).sum().backward()
    assert seen == [True] * len(seen)
    assert len(seen) >= 5


@pytest.mark.parametrize("context", [fb.collect_kl, fb.mean_weights, fb.grouped])
@pytest.mark.parametrize(
    "wrong", [None, [nn.Linear(2, 2)], nn.Linear], ids=["none", "list", "class"]
)
def test_a_context_of_something_else_says_what_it_wants(context, wrong: object) -> None:
    with pytest.raises(TypeError, match="model: expected a torch"), context(wrong):
        pass


def test_kl_loss_says_what_it_wants() -> None:
    with pytest.raises(TypeError, match="n_data: expected a number of examples, got '5'"):
        fb.kl_loss(fb.BayesLinear(2, 2), "5")


def test_a_generator_of_the_call_comes_before_the_seed_of_a_context() -> None:
    layer, x = fb.BayesLinear(4, 4), torch.ones(1, 4)
    alone = layer(x, generator=torch.Generator().manual_seed(3))
    for context in (fb.fixed_sample(layer, 1), fb.grouped(layer, seed=1)):
        with context:
            torch.testing.assert_close(layer(x, generator=torch.Generator().manual_seed(3)), alone)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


@pytest.mark.parametrize("rank", [2, 1], ids=["linear", "convolution"])
def test_a_generator_of_the_call_draws_where_the_means_would_be_used(rank: int) -> None:
    """As a seed does: in a context of means, and in a layer that uses them in eval mode."""
    layer = fb.BayesLinear(4, 4) if rank == 2 else fb.BayesConv1d(3, 4, 2)
    x = torch.randn(3, 4)
    given, drawn = layer(x, seed=3), layer(x, generator=_generator())
    with fb.mean_weights(layer):
        mean = layer(x)
        assert_same(layer(x, generator=_generator()), drawn)
        with fb.collect_kl(layer) as kl:
            assert_same(layer(x, generator=_generator()), drawn)
        torch.testing.assert_close(kl.sum(), fb.kl_loss(layer))
    layer.eval()
    layer.eval_mode = "mean"
    assert_same(layer(x), mean)
    assert_same(layer(x, seed=3), given)
    assert_same(layer(x, generator=_generator()), drawn)
    assert not torch.equal(drawn, mean)


def test_a_reentrant_checkpoint_leaves_the_kl_without_gradient_and_says_so() -> None:
    layer, x = fb.BayesLinear(4, 4), torch.ones(1, 4, requires_grad=True)
    with fb.collect_kl(layer) as kl, pytest.warns(RuntimeWarning, match="use_reentrant=False"):
        checkpoint(layer, x, use_reentrant=True)
    assert not kl.sum().requires_grad
    with fb.collect_kl(layer) as kl:
        checkpoint(layer, x, use_reentrant=False)
    assert kl.sum().requires_grad


def test_a_collector_of_a_lazy_model_is_zero_before_the_first_call() -> None:
    """PyTorch's own error said that the parameter is uninitialised."""
    layer = fb.LazyBayesLinear(3, dtype=torch.float64)
    with fb.collect_kl(layer) as kl:
        with pytest.warns(RuntimeWarning, match="collect_kl: expected the model to be called insi"):
            assert kl.sum().dtype == torch.float64
        with pytest.warns(RuntimeWarning, match="none of its 1 Bayesian layers was"):
            assert kl.sum().item() == 0.0
        assert "0 layers, sum 0 nats" in repr(kl)
        layer(torch.ones(2, 4, dtype=torch.float64))
    assert_close(kl.sum(), fb.kl_loss(layer), 1e-6, 0)


def test_a_collector_prints_its_sum() -> None:
    layer = fb.BayesLinear(4, 4)
    with fb.collect_kl(layer) as kl:
        layer(torch.ones(1, 4))
    assert repr(kl) == f"KlCollector(1 layers, sum {kl.sum().item():.6g} nats)"


def test_no_tensor_at_all_is_named() -> None:
    for mode in ("zeros", "circular"):
        with pytest.raises(TypeError, match="input: expected a tensor, got NoneType"):
            fb.BayesConv2d(3, 4, 3, padding=1, padding_mode=mode)(None)
