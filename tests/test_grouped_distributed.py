"""grouped under DistributedDataParallel and FSDP2, in one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from grouped_cases import (  # noqa: F401  fixtures too
    assert_gradients,
    gradients,
    make_image,
    make_model,
    passes,
)
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastbconv as fb

# ruff: noqa: F811  a fixture is named where it is imported and where it is used


@pytest.fixture(autouse=True)
def one_process():
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _expected(x: torch.Tensor) -> list[torch.Tensor | None]:
    torch.manual_seed(1)
    model = make_model()
    with fb.fixed_sample(model, 3), fb.collect_kl(model) as kl:
        y = model(x)
    return gradients(model, y.square().sum() + kl.sum())


def test_buckets_get_the_gradients_of_the_groups(passes) -> None:
    x = make_image()
    torch.manual_seed(1)
    model = make_model()
    wrapped = DistributedDataParallel(model, bucket_cap_mb=1)
    for _ in range(2):  # the buckets are rebuilt after the first step
        with fb.grouped(wrapped, seed=3, max_weights=400), fb.collect_kl(wrapped) as kl:
            y = wrapped(x)
        got = gradients(model, y.square().sum() + kl.sum())
    assert passes == [3, 3] * 2
    assert_gradients(got, _expected(x))


def test_sharded_layers_draw_for_themselves() -> None:
    x = make_image()
    torch.manual_seed(1)
    model = make_model()
    for layer in fb.models.bayesian_layers(model):
        fully_shard(layer)
    fully_shard(model)
    with fb.grouped(model, seed=3), fb.collect_kl(model) as kl:
        y = model(x)
    (y.square().sum() + kl.sum()).backward()
    got = [parameter.grad.full_tensor() for parameter in model.parameters()]
    assert_gradients(got, _expected(x))
