"""Two processes add one number each: whether this machine lets processes meet at all.

torchrun --standalone --nproc-per-node 2 tests/distributed/meet.py
"""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist

if __name__ == "__main__":
    dist.init_process_group("gloo")
    value = torch.ones(1)
    dist.all_reduce(value)
    met = value.item() == dist.get_world_size()
    sys.stdout.flush()
    os._exit(0 if met else 1)  # gloo's threads abort an interpreter that ends, now and then
