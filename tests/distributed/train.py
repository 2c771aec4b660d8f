"""``python -m fastbconv train`` for torchrun, its step times taken once only."""

from __future__ import annotations

import sys

from fastbconv.train import cli, steptime

steptime._SECONDS = 0.0
sys.exit(cli.main(sys.argv[1:]))
