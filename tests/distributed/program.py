"""Checks that two processes make, by torchrun: one file of results.

    torchrun --standalone --nproc-per-node 2 tests/distributed/program.py FOLDER

FOLDER/results.json: name of a check -> "" or what went wrong, of the first rank where it did. The
checks of ``test_distributed.py`` read it: starting two processes once serves them all.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastbconv as fb

N_DATA = 100
ROWS = 8
CHECKS: dict[str, Callable[[Path], None]] = {}


def check(function: Callable[[Path], None]) -> Callable[[Path], None]:
    CHECKS[function.__name__] = function
    return function


def make_model(estimator: str = "reparameterization") -> nn.Sequential:
    """The same values in every process. 7 filters do not halve into shards."""
    torch.manual_seed(0)
    return nn.Sequential(
        fb.BayesConv2d(3, 8, 3, padding=1, activation="relu", estimator=estimator),
        fb.BayesConv2d(8, 7, 3, stride=2, bayesian_bias=True, estimator=estimator),
        nn.Flatten(),
        fb.BayesLinear(63, 5, bayesian_bias=True),
    )


def make_batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 5, (ROWS,), generator=generator)
    return torch.randn(ROWS, 3, 8, 8, generator=generator), labels


def own_part(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    rank, world = dist.get_rank(), dist.get_world_size()
    return tuple(t[rank * ROWS // world : (rank + 1) * ROWS // world] for t in batch)


def loss_of(model: nn.Module, images: Tensor, labels: Tensor, *, collected: bool = True) -> Tensor:
    """Mean NLL of these rows + KL / number of examples, as every process of a run has it."""
    with fb.collect_kl(model) as kl:
        nll = nn.functional.cross_entropy(model(images), labels)
    return nll + (kl.sum() if collected else fb.kl_loss(model)) / N_DATA


def one_process() -> list[Tensor]:
    """The gradients of the whole batch, without any other process."""
    model = make_model()
    torch.manual_seed(2)
    loss_of(model, *make_batch()).backward()
    return [parameter.grad for parameter in model.parameters()]


def assert_same(got: list[Tensor], expected: list[Tensor]) -> None:
    """Up to 1e-6 of the largest gradient of each parameter."""
    for one, other in zip(got, expected, strict=True):
        error = (one - other).abs().max().item()
        assert error <= 1e-6 * other.abs().max().item(), f"{tuple(other.shape)}: {error}"


def gathered(value: Tensor) -> list[Tensor]:
    parts = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, value.detach().contiguous())
    return parts


def shard(model: nn.Module) -> nn.Module:
    for layer in fb.models.bayesian_layers(model):
        fully_shard(layer)
    return fully_shard(model)


@check
def ddp_with_shared_noise_has_the_gradients_of_one_process(folder: Path) -> None:
    model = DistributedDataParallel(make_model())
    with fb.noise.data_parallel_group(None):
        torch.manual_seed(2)
        loss_of(model, *own_part(make_batch())).backward()
        expected = one_process()
    assert_same([p.grad for p in model.parameters()], expected)


@check
def ddp_with_kl_on_access_counts_it_once(folder: Path) -> None:
    model = DistributedDataParallel(make_model())
    with fb.noise.data_parallel_group(None):
        torch.manual_seed(2)
        loss_of(model, *own_part(make_batch()), collected=False).backward()
        expected = one_process()
    assert_same([p.grad for p in model.parameters()], expected)


@check
def fsdp2_with_shared_noise_has_the_gradients_of_one_process(folder: Path) -> None:
    for collected in (True, False):
        model = shard(make_model())
        with fb.noise.data_parallel_group(None):
            torch.manual_seed(2)
            loss_of(model, *own_part(make_batch()), collected=collected).backward()
            expected = one_process()
        assert_same([p.grad.full_tensor() for p in model.parameters()], expected)


@check
def noise_differs_between_ranks_by_default(folder: Path) -> None:
    images, _ = make_batch()
    for estimator in fb.estimators.ESTIMATOR_ID:
        for wrap in (lambda m: m, DistributedDataParallel, shard):
            model = wrap(make_model(estimator))
            torch.manual_seed(2)
            first, second = gathered(model(images))
            assert not torch.equal(first, second), estimator
            with fb.noise.data_parallel_group(None):
                torch.manual_seed(2)
                shared = gathered(model(images))
            assert torch.equal(*shared), estimator
            assert torch.equal(shared[0], first), f"{estimator}: rank 0 is moved"


@check
def given_seeds_are_the_same_on_every_rank(folder: Path) -> None:
    images, _ = make_batch()
    model = make_model()
    with fb.fixed_sample(model, 5):
        assert torch.equal(*gathered(model(images)))
    assert torch.equal(*gathered(model[0](images, seed=3)))


@check
def parameters_stay_equal_over_training_steps(folder: Path) -> None:
    """Distinct noise, averaged gradients, no parameter unused."""
    model = DistributedDataParallel(make_model())
    optimizer = torch.optim.Adam(fb.param_groups(model, lr=1e-2))
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model, *own_part(make_batch())).backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(*gathered(parameter)), name


class WithKl(nn.Module):
    """Returns the KL with the output."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.model(images), fb.kl_loss(self.model)


@check
def a_trained_prior_is_no_unused_parameter(folder: Path) -> None:
    """docs/elbo.md: what find_unused_parameters=True takes for unused, and the two ways around."""
    for find_unused, inside in ((True, True), (False, False), (True, False)):  # the last one fails
        scale = nn.Parameter(torch.ones(()))
        model = fb.BayesLinear(4, 3, prior=(0.0, scale))
        ddp = DistributedDataParallel(
            WithKl(model) if inside else model, find_unused_parameters=find_unused
        )
        output, kl = ddp(torch.ones(2, 4)) if inside else (ddp(torch.ones(2, 4)), fb.kl_loss(model))
        loss = output.sum() + kl
        if find_unused and not inside:
            with pytest.raises(RuntimeError, match="mark a variable ready only once"):
                loss.backward()
        else:
            loss.backward()
            assert scale.grad != 0.0


@check
def a_shard_has_its_slice_of_the_noise(folder: Path) -> None:
    """Every rank convolves with its own filters: together they are the whole layer, bit for bit."""
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(3)
    images, weight, bias = torch.randn(2, 5, 6, 6), torch.randn(8, 5, 3, 3), torch.randn(8)
    rho, bias_rho = weight - 2.0, bias - 1.0
    own = slice(rank * 8 // world, (rank + 1) * 8 // world)
    with fb.algorithm("direct"):  # "auto" may take another kernel for fewer filters
        whole = fb.functional.bayes_conv2d(images, weight, rho, bias, bias_rho, seed=4)
        part = fb.functional.bayes_conv2d(
            images,
            *(t[own] for t in (weight, rho, bias, bias_rho)),
            seed=4,
            element_offset=(own.start * weight[0].numel(), own.start),
        )
    assert torch.equal(torch.cat(gathered(part), dim=1), whole)


@check
def a_sharded_checkpoint_is_written(folder: Path) -> None:
    """Read by one process in ``test_distributed.py``."""
    model = shard(make_model())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with fb.noise.data_parallel_group(None):
        torch.manual_seed(2)
        loss_of(model, *own_part(make_batch())).backward()
    optimizer.step()
    dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=folder / "checkpoint")


@check
def the_tfp_face_refuses_fsdp2(folder: Path) -> None:
    layer = fb.Convolution2DReparameterization(4, 3)
    fb.build(layer, (1, 8, 8, 3))
    with pytest.raises(NotImplementedError, match="contiguous"):
        fully_shard(layer)


def main() -> None:
    folder = Path(sys.argv[1])
    warnings.simplefilter("error", UserWarning)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results = {}
    for name, function in CHECKS.items():
        try:
            function(folder)
            problem = ""
        except Exception:
            problem = f"rank {dist.get_rank()}: {traceback.format_exc()}"
        problems: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(problems, problem)
        results[name] = next((text for text in problems if text), "")
    if dist.get_rank() == 0:
        (folder / "results.json").write_text(json.dumps(results, indent=2))
    dist.barrier()
    # FSDP2 on gloo aborts now and then while an interpreter ends, with torch's own layers too.
    os._exit(0)


if __name__ == "__main__":
    main()
