"""convert: which layers become Bayesian, and that nothing else changes."""

from __future__ import annotations

import copy
import doctest
import importlib
import pickle
from collections.abc import Callable

import pytest
import torch
from networks import BasicBlock, ResNet18, resnet18, small
from torch import nn
from torch.nn.utils import parametrizations, prune

import fastbconv as fb
from fastbconv._surgery import PAIRS
from fastbconv.testing import assert_close, assert_same

IMAGE = (2, 3, 6, 6)


def bayesian_names(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if getattr(m, "is_bayesian", False)]


def vanishing(model: nn.Module) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Moments of a posterior that is as good as a point."""
    return {
        name: (p.detach(), torch.full_like(p, 1e-12))
        for name, p in model.named_parameters()
        if p.ndim > 1
    }


@pytest.mark.parametrize(
    "module",
    ["convert", "deterministic", "summary", "prune", "models", "optimizers", "_surgery"],
)
def test_examples_of_the_docstrings_run(module: str) -> None:
    assert doctest.testmod(importlib.import_module(f"fastbconv.{module}")).failed == 0


# --- whole networks -------------------------------------------------------------------------------


def test_resnet18_with_vanishing_scale_gives_the_same_logits() -> None:
    model, x = resnet18(), torch.randn(2, 3, 32, 32)
    converted = fb.convert(model, init=vanishing(model))
    assert len(bayesian_names(converted)) == 21
    with torch.no_grad():
        assert_close(converted(x), model(x), 1e-4, 1e-4)
        assert_close(fb.convert(model, init="moped", delta=1e-6)(x), model(x), 1e-4, 1e-4)
        assert_close(fb.convert(model, eval_mode="mean")(x), model(x), 1e-4, 1e-4)


def test_a_converted_network_trains_with_the_tools_for_whole_models() -> None:
    model, x = fb.convert(ResNet18(8)), torch.randn(4, 3, 32, 32)
    optimizer = torch.optim.AdamW(fb.param_groups(model, 1e-3, weight_decay=0.01))
    assert fb.check_optimizer(optimizer, model) == []
    with fb.collect_kl(model) as kl:
        loss = model(x).logsumexp(1).mean()
    (loss + kl.sum() / 1000).backward()
    assert all(p.grad is not None for p in model.parameters())
    optimizer.step()
    with torch.no_grad(), fb.fixed_sample(model.eval(), seed=1):
        assert_same(model(x), model(x))


def test_conversion_draws_nothing_and_keeps_names_and_order() -> None:
    model, state = resnet18(8), torch.get_rng_state()
    converted = fb.convert(model)
    assert_same(torch.get_rng_state(), state)
    names = [name for name, _ in model.named_modules()]
    assert [name for name, _ in converted.named_modules()] == names
    kept = [name for name in converted.state_dict() if not name.endswith("_rho")]
    assert kept == list(model.state_dict())
    assert list(converted.buffers()) != []
    assert [n for n, _ in converted.named_buffers()] == [n for n, _ in model.named_buffers()]


def test_a_copy_by_default_and_the_same_objects_in_place() -> None:
    model = small()
    converted = fb.convert(model)
    assert bayesian_names(model) == []
    assert bayesian_names(converted) == ["0", "4"]
    assert converted[0].weight is not model[0].weight
    modules, parameters = list(model.modules()), list(model.parameters())
    assert fb.convert(model, inplace=True) is model
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert all(any(p is q for q in model.parameters()) for p in parameters)


def test_a_single_layer_is_a_model_too() -> None:
    layer = nn.Linear(4, 3)
    assert type(fb.convert(layer)) is fb.BayesLinear
    assert fb.convert(layer, inplace=True) is layer
    fb.convert(nn.Linear(4, 3), init={"weight": (torch.zeros(3, 4), torch.ones(3, 4))})


def test_converting_twice_changes_nothing() -> None:
    once = fb.convert(small(), prior=(0.0, 0.5))
    twice = fb.convert(once)
    assert repr(twice) == repr(once)
    for name, value in once.state_dict().items():
        assert_same(twice.state_dict()[name], value, name)


# --- what a layer keeps ---------------------------------------------------------------------------


def test_every_pair_is_registered() -> None:
    kinds = ("Conv1d", "Conv2d", "Conv3d", "ConvTranspose2d", "Linear")
    existing = {getattr(nn, k): getattr(fb, f"Bayes{k}") for k in kinds if hasattr(fb, f"Bayes{k}")}
    assert existing == PAIRS


def test_training_flags_and_requires_grad() -> None:
    model = small()
    model[0].eval()
    model[0].weight.requires_grad_(False)
    model[4].bias.requires_grad_(False)
    converted = fb.convert(model, bayesian_bias=True)
    assert [m.training for m in converted.modules()] == [m.training for m in model.modules()]
    grads = {name: p.requires_grad for name, p in converted.named_parameters()}
    assert not grads["0.weight"]
    assert not grads["0.weight_rho"]
    assert grads["0.bias"]
    assert grads["0.bias_rho"]
    assert not grads["4.bias_rho"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_device_and_memory_format(dtype: torch.dtype) -> None:
    model = small().to(dtype).to(memory_format=torch.channels_last)
    converted = fb.convert(model, prior=(torch.zeros(()), 1.0))
    assert {p.dtype for p in converted.parameters()} == {dtype}
    for name in ("weight", "weight_rho"):
        parameter = getattr(converted[0], name)
        assert parameter.is_contiguous(memory_format=torch.channels_last)
    assert converted[0].prior_loc.dtype == dtype
    with torch.no_grad():
        assert converted(torch.randn(IMAGE, dtype=dtype)).dtype == dtype
    with torch.device("meta"):
        meta = fb.convert(small(), init="moped")
    assert {t.device.type for t in meta.state_dict().values()} == {"meta"}


def test_hooks_run_and_their_handles_remove_them() -> None:
    model, calls = small(), []
    before = model[0].register_forward_pre_hook(lambda m, i: calls.append("pre"))
    after = model[0].register_forward_hook(lambda m, i, o: o + 100.0)
    model[0].register_full_backward_hook(lambda m, i, o: calls.append("backward"))
    x = torch.randn(IMAGE, requires_grad=True)
    fb.convert(model, inplace=True)
    assert model[0](x).mean() > 90.0
    model[0](x).sum().backward()
    assert calls == ["pre", "pre", "backward"]
    before.remove()
    after.remove()
    assert model[0](x).mean() < 90.0
    assert calls == ["pre", "pre", "backward"]


def test_references_outside_the_module_tree_see_the_conversion() -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.path = [self.first]  # not registered

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.path[0](x)

    converted = fb.convert(Listed())
    x = torch.randn(2, 4)
    assert not torch.equal(converted(x), converted(x))


def test_a_module_used_twice_stays_one() -> None:
    layer = nn.Linear(4, 4)
    converted = fb.convert(nn.ModuleDict({"a": layer, "b": nn.Sequential(layer)}))
    assert converted["a"] is converted["b"][0]
    assert_close(fb.kl_loss(converted), converted["a"].kl_loss(), 0, 0)


def test_tied_weights_stay_tied_and_share_their_rho() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4, bias=False))
    model[2].weight = model[0].weight
    converted = fb.convert(model)
    assert converted[2].weight is converted[0].weight
    assert converted[2].weight_rho is converted[0].weight_rho
    assert list(converted.state_dict()) == [
        *("0.weight", "0.bias", "0.weight_rho", "2.weight", "2.weight_rho")
    ]
    assert len(list(converted.parameters())) == 3


def test_attributes_of_the_users_own_survive() -> None:
    model = small()
    model[0].role = "stem"
    model[0].register_buffer("calls", torch.zeros(()))
    converted = fb.convert(model)
    assert converted[0].role == "stem"
    assert "0.calls" in converted.state_dict()
    back = fb.to_deterministic(converted)
    assert back[0].role == "stem"
    assert "0.calls" in back.state_dict()


def test_deepcopy_pickle_and_compile_of_a_converted_model() -> None:
    model, x = fb.convert(small(), init="moped").eval(), torch.randn(IMAGE)
    model(x).sum().backward()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad(), fb.fixed_sample(model, 1), fb.fixed_sample(other, 1):
            assert_same(other(x), model(x))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.manual_seed(7)
    expected = model(x)
    torch.manual_seed(7)
    assert_close(compiled(x), expected, 1e-5, 1e-5)


# --- include and exclude --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        ("fc", None, ["fc"]),
        ("layer4", None, ["layer4.0.conv1", "layer4.0.conv2", "layer4.0.shortcut.0"]),
        ("layer[34].1.*", None, ["layer3.1.conv1", "layer3.1.conv2"]),
        (nn.Linear, None, ["fc"]),
        ([nn.Linear, "conv1"], None, ["conv1", "fc"]),
        (None, [BasicBlock, "conv1"], ["fc"]),
        (None, (nn.Conv2d,), ["fc"]),
        ("layer3", "*.conv2", ["layer3.0.conv1", "layer3.0.shortcut.0", "layer3.1.conv1"]),
        (lambda name, module: getattr(module, "stride", 0) == (1, 1), BasicBlock, ["conv1"]),
        (lambda name, module: name.endswith("0.conv1"), "layer[123]", ["layer4.0.conv1"]),
    ],
)
def test_include_and_exclude(include, exclude, expected: list[str]) -> None:
    model = ResNet18(4)
    found = bayesian_names(fb.convert(model, include=include, exclude=exclude))
    assert found[: len(expected)] == expected
    if include == "layer4":
        assert found[3:] == ["layer4.1.conv1", "layer4.1.conv2"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"include": "fcc"}, ValueError, r"include: expected the name of a module.* got 'fcc'"),
        ({"exclude": ["4", "layer9.*"]}, ValueError, r"exclude: .* got 'layer9\.\*'"),
        ({"include": 3}, TypeError, r"include: expected name patterns, .* got 3"),
        ({"exclude": int}, TypeError, r"exclude: expected name patterns, .* got <class 'int'>"),
        ({"include": nn.BatchNorm2d}, ValueError, r"expected a layer to convert \(Conv.*Linear\)"),
        ({"include": "1"}, ValueError, r"among the selected modules, got none; include and"),
    ],
)
def test_selectors_that_select_nothing_are_errors(arguments, error, message: str) -> None:
    with pytest.raises(error, match=message):
        fb.convert(small(), **arguments)


# --- what is left, and what is refused ------------------------------------------------------------


class Standardised(nn.Conv2d):
    """A subclass with a forward of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


READ = ", whose weight the TransformerEncoderLayer around it reads by itself in its fast path"


def _replaced_forward() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.forward = lambda x: x
    return layer


@pytest.mark.parametrize(
    ("make", "left"),
    [
        (lambda: Standardised(3, 4, 3), r"'0' \(Standardised\)"),
        (lambda: nn.Embedding(5, 4), r"'0' \(Embedding\)"),
        (lambda: nn.LSTM(4, 4), r"'0' \(LSTM\)"),
        (lambda: nn.Bilinear(4, 4, 4), r"'0' \(Bilinear\)"),
        (
            lambda: nn.MultiheadAttention(4, 2),
            r"'0' \(MultiheadAttention\), '0.out_proj' \(NonDynamicallyQuantizableLinear\)",
        ),
        (
            lambda: nn.TransformerEncoderLayer(4, 2, 8),
            rf"'0.self_attn' .* '0.linear1' \(Linear{READ}\), '0.linear2' \(Linear{READ}\)",
        ),
        (_replaced_forward, r"'0' \(Linear, whose forward was replaced\)"),
    ],
)
def test_layers_without_counterpart_stay_and_are_named(make: Callable, left: str) -> None:
    model = nn.Sequential(make(), nn.Linear(4, 4))
    with pytest.warns(UserWarning, match=f"convert: weights without a posterior remain in {left};"):
        converted = fb.convert(model)
    assert bayesian_names(converted) == ["1"]
    assert type(converted[0]) is type(model[0])
    assert bayesian_names(fb.convert(model, exclude="0")) == ["1"]  # and no warning
    with pytest.raises(ValueError, match=f"model: expected a layer .* got none, only {left};"):
        fb.convert(model, include="0")


def test_a_transformer_layer_would_not_call_its_linear_layers() -> None:
    # The reason for leaving them: in eval mode the fast path reads the weights of linear1 and 2.
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).eval()
    called = []
    layer.linear1.forward = lambda x: called.append(1)
    with torch.no_grad():
        layer(torch.randn(1, 3, 4))
    assert called == []


def _lazy() -> nn.Module:
    return nn.LazyLinear(4)


def _parametrized() -> nn.Module:
    return parametrizations.weight_norm(nn.Linear(4, 4))


def _old_weight_norm() -> nn.Module:
    layer = nn.Linear(4, 4)
    return torch.nn.utils.spectral_norm(layer)


def _pruned() -> nn.Module:
    return prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_lazy, r"expected initialised .* '1' \(LazyLinear\).* call fastbconv.build"),
        (_parametrized, r"'1' \(ParametrizedLinear\), whose weight is computed .*remove_param"),
        (_old_weight_norm, r"'1' \(Linear\), whose weight is computed .*remove_spectral_norm"),
        (_pruned, r"'1' \(Linear\), whose weight is computed from others; .*prune.remove"),
    ],
)
def test_weights_that_are_no_parameters_are_refused(make: Callable, message: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), make())
    with pytest.raises(ValueError, match=message):
        fb.convert(model, inplace=True)
    assert bayesian_names(model) == []
    assert bayesian_names(fb.convert(model, exclude="1", inplace=True)) == ["0"]


def test_other_refusals_leave_the_model_as_it_was() -> None:
    model = small()
    model[4] = nn.Linear(64, 5, dtype=torch.complex64)
    with pytest.raises(TypeError, match=r"dtype: .* got torch.complex64 \(converting '4'\)"):
        fb.convert(model, inplace=True)
    with pytest.raises(ValueError, match=r"estimator: .* \(converting '0'\)"):
        fb.convert(model, estimator="dropout", inplace=True)
    assert bayesian_names(model) == []
    copied = nn.Sequential(nn.Linear(4, 4), _pruned())
    with pytest.raises(ValueError, match=r"model: expected one that copy.deepcopy copies; inplace"):
        fb.convert(copied, exclude="1")
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got list"):
        fb.convert([model])
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(small())
        with pytest.raises(ValueError, match=r"got DistributedDataParallel.* use model.module"):
            fb.convert(wrapped)
    finally:
        torch.distributed.destroy_process_group()
