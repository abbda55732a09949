"""Measures nanodrift on this machine. ``python bench.py --help`` names the modes; the work is in nanodrift/bench/."""

import importlib
import os
import sys

OWN_COMMAND_LINES = {  # modes with a parser of their own; explain, sim and a simulated sweep need no torch
    "explain": "explain",
    "timeline": "timeline",
    "sim": "simulate",
    "sweep": "sweep",
    "campaign": "campaign",
    "peers": "peers",
    "versus": "versus",
    "calibrate": "calibrate",
    "map": "map",
    "kernels": "kernels",
}


def main() -> int:
    if sys.argv[1:2] and sys.argv[1] in OWN_COMMAND_LINES:
        mode = importlib.import_module(f"nanodrift.bench.{OWN_COMMAND_LINES[sys.argv[1]]}")
        return mode.main(sys.argv[2:])
    from nanodrift.bench import cli

    return cli.main()


if __name__ == "__main__":
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read it has seen enough: `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    sys.exit(status)
