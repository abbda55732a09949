"""Measures nanodrift on this machine. ``python bench.py --help`` names the modes; the work is in nanodrift/bench/."""

import sys

from nanodrift.bench.cli import main

if __name__ == "__main__":
    sys.exit(main())
