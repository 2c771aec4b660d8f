"""Training in several processes, started by torchrun: whose rows are whose, and who speaks.

Every process takes its share of each batch, and DistributedDataParallel averages the gradients: a
step is that of one process with the whole batch. The KL is in every process's loss and so in the
average once. Weight noise differs between processes, as several draws for one batch; with
``shared_noise`` all draw the same, and the run has the numbers of one process up to rounding.
Only the first process prints, saves and measures.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fastbconv as fb

from .settings import TrainError

_TIMEOUT = timedelta(hours=12)  # the others wait while the first measures


@dataclass(frozen=True)
class Processes:
    """This process among those of the run.

    Attributes:
        rank: its number.
        count: how many there are.
    """

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the one that prints and saves."""
        return self.rank == 0

    def share(self, batch: Tensor) -> tuple[Tensor, float]:
        """This process's part of the indices of a batch, and the weight of its mean NLL: the
        weighted NLLs, averaged over the processes, are the mean over the batch.

        A batch with fewer examples than processes is everybody's.
        """
        if len(batch) < self.count:
            return batch, 1.0
        own = batch[self.rank :: self.count]
        return own, len(own) * self.count / len(batch)

    def mean(self, values: Tensor) -> Tensor:
        """The mean over the processes; the same everywhere."""
        if self.count == 1:
            return values
        dist.all_reduce(values)
        return values / self.count

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model whose backward averages gradients; ``model`` itself in one process."""
        return model if self.count == 1 else DistributedDataParallel(model)

    def first(self, action: Callable[[], None]) -> None:
        """Lets the first process act; what goes wrong there is raised in all of them."""
        problem: list[Exception | None] = [None]
        if self.is_first:
            try:
                action()
            except (TrainError, OSError) as error:
                problem = [error]
        if self.count > 1:
            dist.broadcast_object_list(problem, src=0)
        if problem[0] is not None:
            raise problem[0]


ALONE = Processes()


@contextmanager
def started() -> Iterator[Processes]:
    """The processes of torchrun, connected by gloo, their GPUs by nccl; else this one alone."""
    if not dist.is_torchelastic_launched():
        yield ALONE
        return
    has_nccl = torch.cuda.is_available() and dist.is_nccl_available()
    dist.init_process_group("cpu:gloo,cuda:nccl" if has_nccl else "gloo", timeout=_TIMEOUT)
    try:
        yield Processes(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


@contextmanager
def noise(shared: bool) -> Iterator[None]:
    """Weight noise of its own for every process, or the same for all."""
    with fb.noise.data_parallel_group(None if shared else "world"):
        yield


def leave(status: int) -> NoReturn:
    """Ends a process of torchrun without taking the interpreter down: gloo's threads abort that now
    and then, after the work is done, and torchrun reports a failure."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
