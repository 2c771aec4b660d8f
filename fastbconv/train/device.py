"""Where a run computes: a name as the user gives it, and the device of one process."""

from __future__ import annotations

import os

import torch

from .settings import TrainError

_EXPECTED = "expected cpu, cuda, or one GPU, as in cuda:1"


def parse(text: str) -> str:
    """The name of a device, as ``Settings.device`` holds it.

    Raises:
        ValueError: it names none; whether it is there, ``find`` says.
    """
    try:
        device = torch.device(text)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"{_EXPECTED}, got {text!r}")
    return "cpu" if device.type == "cpu" else str(device)


def find(name: str, processes: int) -> torch.device:
    """The device of this process: under torchrun, the GPU of its number on this machine.

    Raises:
        TrainError: PyTorch sees no such GPU, or several processes are to share one.
    """
    device = torch.device(name)
    if device.type == "cpu":
        return device
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.index is not None and processes > 1:
        raise TrainError(
            f"--device: expected cuda without a number, since each of the {processes} processes "
            f"takes a GPU of its own, got {name}"
        )
    index, needed = device.index, (device.index or 0) + 1
    if index is None:  # every process of this machine asks for all of them: they fail alike
        index = int(os.environ.get("LOCAL_RANK", 0))
        needed = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if needed > count:
        raise TrainError(
            f"--device {name}: expected {needed} GPU{'s' * (needed > 1)} on this machine, got "
            f"{count} that PyTorch {torch.__version__} sees; --device cpu computes without"
        )
    return torch.device("cuda", index)


def synchronize(device: torch.device) -> None:
    """Waits until what was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def describe(device: torch.device) -> str:
    """For the report."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
