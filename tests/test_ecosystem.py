"""A Bayesian model among PyTorch's own tools: export, AOTInductor, scalers, averages, pruning."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fastbconv as fb

N_DATA = 100


class Net(nn.Module):
    """A convolution and a linear layer; ``seed`` goes to both of them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = fb.BayesConv2d(3, 6, 3, padding="same", stride=2, activation="silu")
        self.linear = fb.BayesLinear(96, 5, bayesian_bias=True)

    def forward(self, input: Tensor, seed: Tensor | None = None) -> Tensor:
        return self.linear(self.conv(input, seed).flatten(1), seed)


@pytest.fixture
def model() -> Net:
    torch.manual_seed(0)
    return Net()


def make_batch(rows: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    labels = torch.randint(0, 5, (rows,), generator=generator)
    return torch.randn(rows, 3, 8, 8, generator=generator), labels


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor], seed: Tensor | None = None) -> Tensor:
    images, labels = batch
    with fb.collect_kl(model) as kl:
        nll = nn.functional.cross_entropy(model(images, seed).float(), labels)
    return nll + kl.sum() / N_DATA


SEED = torch.tensor([5, 7])
BATCH = {0: torch.export.Dim("rows", min=2, max=64)}


def test_an_exported_program_takes_a_seed_and_any_batch(model: Net) -> None:
    images, _ = make_batch()
    program = torch.export.export(model, (images, SEED), dynamic_shapes=(BATCH, None)).module()
    for rows in (2, 4, 7):
        images, _ = make_batch(rows)
        for seed in (SEED, SEED + 1):
            assert torch.equal(program(images, seed), model(images, seed))


def test_an_exported_program_draws_anew_at_each_call(model: Net) -> None:
    images, _ = make_batch()
    program = torch.export.export(model, (images,)).module()
    torch.manual_seed(1)
    first, second = program(images), program(images)
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(program(images), first)
    torch.manual_seed(1)
    assert torch.equal(model(images), first)


@pytest.mark.filterwarnings("ignore")  # of the compiler's own modules
def test_aot_inductor_from_python(model: Net, tmp_path: Path) -> None:
    images, _ = make_batch()
    program = torch.export.export(model, (images, SEED), dynamic_shapes=(BATCH, None))
    path = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "model.pt2")
    )
    compiled = torch._inductor.aoti_load_package(path)
    for rows in (4, 7):
        images, _ = make_batch(rows)
        torch.testing.assert_close(compiled(images, SEED), model(images, SEED))


def test_a_training_step_compiles_whole(model: Net) -> None:
    """Forward, KL of the pass and NLL in one graph; other seeds and batches compile nothing new."""
    graphs = 0

    def counting(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        nonlocal graphs
        graphs += 1
        return graph

    compiled = torch.compile(loss_of, backend=counting, fullgraph=True, dynamic=True)
    for rows in (4, 6, 9):
        for seed in (SEED, SEED + 1):
            expected = loss_of(model, make_batch(rows), seed)
            torch.testing.assert_close(compiled(model, make_batch(rows), seed), expected)
    assert graphs == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_with_a_gradient_scaler(model: Net, dtype: torch.dtype) -> None:
    """The scaled loss has the KL in it; what the optimiser sees is the gradient of the loss."""
    images, labels = make_batch()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with torch.autocast("cpu", dtype=dtype):
        loss = loss_of(model, (images, labels), SEED)
    assert loss.dtype == torch.float32
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    got = [parameter.grad.clone() for parameter in model.parameters()]
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**10  # nothing overflowed
    model.zero_grad()
    loss_of(model, (images, labels), SEED).backward()
    for one, parameter in zip(got, model.parameters(), strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, parameter.grad, rtol=0.05, atol=0.01)


def test_averaged_models(model: Net) -> None:
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    ema.update_parameters(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    ema.update_parameters(model)
    for old, averaged in zip(before, ema.module.parameters(), strict=True):
        torch.testing.assert_close(averaged, old + 0.5)
    images, _ = make_batch()
    assert torch.isfinite(ema(images)).all()
    assert torch.equal(fb.kl_loss(ema), fb.kl_loss(ema.module))


class Clamp(nn.Module):
    def forward(self, rho: Tensor) -> Tensor:
        return rho.clamp(max=-4.0)


def test_a_parametrized_scale(model: Net) -> None:
    """What the layer reads is the parametrized value, in the pass and in the KL."""
    images, _ = make_batch()
    with torch.no_grad():
        model.conv.weight_rho.fill_(-3.0)
    parametrize.register_parametrization(model.conv, "weight_rho", Clamp())
    got, kl = model(images, SEED), fb.kl_loss(model)
    parametrize.remove_parametrizations(model.conv, "weight_rho")
    assert torch.equal(model(images, SEED), got)
    assert torch.equal(fb.kl_loss(model), kl)
    assert model.conv.weight_rho.max() == -4.0


def test_weight_norm_of_the_mean(model: Net) -> None:
    images, _ = make_batch()
    with fb.mean_weights(model):
        expected = model(images)
        parametrizations.weight_norm(model.linear)
        torch.testing.assert_close(model(images), expected)
    loss_of(model, make_batch()).backward()
    for parameter in model.linear.parametrizations.weight.parameters():
        assert parameter.grad.abs().sum() > 0


def test_pruned_means(model: Net) -> None:
    """torch.nn.utils.prune masks the means; the scales stay."""
    images, _ = make_batch()
    prune.l1_unstructured(model.conv, "weight", amount=0.5)
    assert (model.conv.weight == 0).float().mean() == pytest.approx(0.5, abs=0.01)
    with fb.mean_weights(model):
        pruned = model.conv(images)
    torch.testing.assert_close(
        pruned,
        fb.functional.bayes_conv2d(
            images,
            model.conv.weight_orig * model.conv.weight_mask,
            None,
            model.conv.bias,
            stride=2,
            padding="same",
            activation="silu",
        ),
    )
    loss_of(model, make_batch()).backward()
    assert (model.conv.weight_orig.grad == 0)[model.conv.weight_mask == 0].all()
    prune.remove(model.conv, "weight")
    assert isinstance(model.conv.weight, nn.Parameter)


def test_spectral_tools_see_the_posterior_means(model: Net) -> None:
    """Clipping by norm reaches every parameter, scales included."""
    loss_of(model, make_batch()).backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    total = sum(p.grad.square().sum() for p in model.parameters()).sqrt()
    assert norm > 0.1
    assert total == pytest.approx(0.1, rel=1e-4)


def _means(model: Net, images: Tensor) -> Tensor:
    with fb.mean_weights(model):
        return model(images)


def _fixed(model: Net, images: Tensor) -> Tensor:
    with fb.fixed_sample(model, SEED):
        return model(images)


def _collected(model: Net, images: Tensor) -> Tensor:
    with fb.fixed_sample(model, SEED), fb.collect_kl(model) as kl:
        output = model(images)
    return output.sum() + kl.sum()


@pytest.mark.parametrize("function", [_means, _fixed, _collected])
def test_contexts_inside_a_compiled_function(model: Net, function: Callable[..., Tensor]) -> None:
    images, _ = make_batch()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(compiled(model, images), function(model, images))
    assert model.conv._fb_context is None
    assert model.linear._fb_context is None
