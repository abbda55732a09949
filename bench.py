"""Measures nanodrift on this machine. ``python bench.py --help`` names the modes; the work is in nanodrift/bench/."""

import importlib
import sys

OWN_COMMAND_LINES = {  # modes with a parser of their own; explain, sim and a simulated sweep need no torch
    "explain": "explain",
    "timeline": "timeline",
    "sim": "simulate",
    "sweep": "sweep",
    "peers": "peers",
    "versus": "versus",
    "calibrate": "calibrate",
    "map": "map",
    "kernels": "kernels",
}

if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in OWN_COMMAND_LINES:
        mode = importlib.import_module(f"nanodrift.bench.{OWN_COMMAND_LINES[sys.argv[1]]}")
        sys.exit(mode.main(sys.argv[2:]))
    from nanodrift.bench.cli import main

    sys.exit(main())
