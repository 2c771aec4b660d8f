"""Programs in several processes of this machine, started by torchrun."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

MEET = Path(__file__).parent / "distributed" / "meet.py"

# The workers meet at the loopback address, and gloo talks over its interface: a machine whose own
# name does not resolve, or resolves to an interface without a route, has them too.
_COMMAND = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
_COMMAND += ["--local-addr", "127.0.0.1", "--nproc-per-node", "2"]
_LOOPBACK = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
_ENVIRONMENT = {"OMP_NUM_THREADS": "1"}
if _LOOPBACK:
    _ENVIRONMENT["GLOO_SOCKET_IFNAME"] = _LOOPBACK[0]


def torchrun(program: Path, *arguments: str, seconds: float) -> subprocess.CompletedProcess[str]:
    """What two processes of one thread each have printed; those that hang are killed, all of them.

    Skips the test on a machine where two processes of PyTorch alone do not meet.

    Raises:
        AssertionError: they took longer than ``seconds``; with what they had printed.
    """
    problem = _what_keeps_processes_apart()
    if problem:
        pytest.skip(f"two processes do not meet on this machine: {problem[-2000:]}")
    return _run(program, *arguments, seconds=seconds)


@cache
def _what_keeps_processes_apart() -> str:
    """Of two processes that know nothing of this package; empty: nothing."""
    try:
        done = _run(MEET, seconds=120)
    except AssertionError as error:
        return str(error)
    return "" if done.returncode == 0 else done.stdout + done.stderr


def _run(program: Path, *arguments: str, seconds: float) -> subprocess.CompletedProcess[str]:
    command = [*_COMMAND, str(program), *arguments]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **_ENVIRONMENT},
    ) as process:
        try:
            out, err = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun takes its workers along, by force after 30 seconds
            try:
                out, err = process.communicate(timeout=60)
            finally:
                process.kill()
            raise AssertionError(f"{command} took over {seconds} s\n{out}\n{err}") from None
    return subprocess.CompletedProcess(command, process.returncode, out, err)
