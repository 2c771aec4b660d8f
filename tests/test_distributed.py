"""DistributedDataParallel, FSDP2 and sharded checkpoints in two processes, and back in one."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torchrun import torchrun

import fastbconv as fb

PROGRAM = Path(__file__).parent / "distributed" / "program.py"


def _checks() -> list[str]:
    """The functions of the program that are marked as checks, without importing it."""
    tree = ast.parse(PROGRAM.read_text())
    return [
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
        and any(isinstance(d, ast.Name) and d.id == "check" for d in node.decorator_list)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes have left their results."""
    found = tmp_path_factory.mktemp("distributed")
    done = torchrun(PROGRAM, str(found), seconds=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return found


@pytest.mark.parametrize("name", _checks())
def test_two_processes(folder: Path, name: str) -> None:
    problem = json.loads((folder / "results.json").read_text())[name]
    assert not problem, problem


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_one_process_reads_what_two_have_written(folder: Path) -> None:
    """The checkpoint is the model after one step of SGD, as one process takes it."""
    sys.path.insert(0, str(PROGRAM.parent))
    try:
        import program
    finally:
        sys.path.pop(0)
    expected, model = program.make_model(), program.make_model()
    torch.manual_seed(2)
    program.loss_of(expected, *program.make_batch()).backward()
    torch.optim.SGD(expected.parameters(), lr=0.1).step()
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    state = {"model": model.state_dict()}
    dcp.load(state, checkpoint_id=folder / "checkpoint")
    model.load_state_dict(state["model"])
    for (name, got), wanted in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-7, msg=name)


def test_outputs_are_no_views() -> None:
    """Of a layer's output another shape: in-place functions and FSDP2's hooks work on it."""
    layer = fb.BayesLinear(3, 2)
    for output in (layer(torch.ones(4, 3)), layer(torch.ones(2, 2, 3)), layer(torch.ones(3))):
        assert not output._is_view()
        output += 1.0
        output.sum().backward()
    assert not fb.functional.bayes_conv1d(
        torch.ones(2, 3, 5), torch.ones(4, 3, 2), torch.ones(4, 3, 2)
    )._is_view()
