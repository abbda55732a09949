"""Measures nanodrift on this machine. ``python bench.py --help`` names the modes; the work is in nanodrift/bench/."""

import sys

if __name__ == "__main__":
    if sys.argv[1:2] == ["explain"]:  # these two need no torch, which the others import
        from nanodrift.bench import explain

        sys.exit(explain.main(sys.argv[2:]))
    if sys.argv[1:2] == ["sim"]:
        from nanodrift.bench import simulate

        sys.exit(simulate.main(sys.argv[2:]))
    from nanodrift.bench.cli import main

    sys.exit(main())
