"""``python -m fastbconv env | train | bench | keras-weights``."""

from __future__ import annotations

import difflib
import importlib
import sys
import warnings
from collections.abc import Sequence

_USAGE = """usage: python -m fastbconv COMMAND [options]

  env            versions, compiler, instruction set, threads, how the native library was built
  train          train a Bayesian CNN and report its calibration   (train --help)
  bench          time the layers against their deterministic peers (bench --help)
  keras-weights  list or convert a weight file of Keras            (keras-weights --help)"""
_COMMANDS = ("env", "train", "bench", "keras-weights")


def env() -> int:
    """Prints what is running; compiles the native library if it is not there yet."""
    from . import _native

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the table below says it too
        info = _native.build_info()
    attempts = info.pop("attempts")
    info["cuda"] = f"{'yes' if info['cuda'] else 'no'} ({info.pop('cuda_reason')})"
    width = max(map(len, info))
    for name, value in info.items():
        print(f"{name.replace('_', ' '):<{width}}  {_plain(value)}")
    for attempt in attempts:
        print(f"{'tried':<{width}}  {attempt}")
    return 0


def _plain(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "-"
    if value is None or isinstance(value, bool):
        return {None: "-", True: "yes", False: "no"}[value]
    return str(value)


def _delegate(module: str, function: str, extra: str, arguments: Sequence[str]) -> int:
    try:
        command = getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("fastbconv"):
            raise
        print(
            f"{error.name} is not installed, and this command needs it: "
            f"pip install 'fastbconv[{extra}]'",
            file=sys.stderr,
        )
        return 2
    return command(list(arguments)) or 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = arguments.pop(0) if arguments else "--help"
    if command == "env":
        if arguments:
            print(f"env: expected no arguments, got {' '.join(arguments)}", file=sys.stderr)
            return 2
        return env()
    if command == "train":
        return _delegate("fastbconv.train.cli", "main", "train", arguments)
    if command == "bench":
        return _delegate("fastbconv.bench", "main", "bench", arguments)
    if command == "keras-weights":
        return _delegate("fastbconv.keras_weights.cli", "main", "keras", arguments)
    if command in ("-h", "--help", "help"):
        print(_USAGE)
        return 0
    close = difflib.get_close_matches(command, _COMMANDS, 1)
    meant = f" (did you mean {close[0]}?)" if close else ""
    print(
        f"unknown command {command!r}{meant}: expected one of {', '.join(_COMMANDS)}\n\n{_USAGE}",
        file=sys.stderr,
    )
    return 2


if __name__ == "__main__":
    sys.exit(main())
