"""Prints what this machine can do, and the least time of every row of the table."""

import sys

from fastbconv.bench.roofline import main

if __name__ == "__main__":
    sys.exit(main())
