"""Several sweeps one after another on one engine that is loaded once: a file with the options of a sweep a line.

    python bench.py campaign results/h200/campaign.txt --model llama-3.1-8b --load-format dummy --time-limit-s 1500

Options behind the file hold for every line; ``#`` begins a comment. Each line names the folder of its sweep with
``--output DIR``. What is there already is kept: the same command goes on where it was cut, and several lines may fill
one folder. Knows nothing of what a sweep measures (sweep.py).
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
import time
from dataclasses import fields
from pathlib import Path

from rich.console import Console

from nanodrift.bench import sweep
from nanodrift.bench.options import positive
from nanodrift.bench.targets import SETTINGS, target_of
from nanodrift.config import ConfigError, EngineConfig

OF_A_LINE = {"policy", "seed", *SETTINGS}  # all other options of the engine are one for all lines


def commands(text: str, common: list[str]) -> list[list[str]]:
    """The options of each sweep, those for every line first."""
    lines = (shlex.split(line, comments=True) for line in text.splitlines())
    return [[*common, *line] for line in lines if line]


def read(all_options: list[list[str]]) -> list[dict]:
    """What each says. Raises ValueError if one has no folder, or if they ask for different engines."""
    parsed = [vars(sweep.build_parser().parse_args(options)) for options in all_options]
    if not parsed:
        raise ValueError("the file names no sweep: a line each, as behind `bench.py sweep`")
    names = {"model", "device", *(field.name for field in fields(EngineConfig))} - OF_A_LINE - {"slo"}
    for number, options in enumerate(parsed, 1):
        options["resume"] = options["resume"] or options["output"]
        if options["resume"] is None:
            raise ValueError(f"sweep {number} would be lost: give it --output DIR")
        other = [name for name in sorted(names) if options.get(name) != parsed[0].get(name)]
        if other:
            raise ValueError(f"sweep {number} asks for another {', '.join(other)}: one engine serves all of a file")
    return parsed


def main(argv: list[str] | None = None) -> int:
    """0; 1 if a cell failed, 2 for options that cannot be, 130 if it was cut short. Later sweeps then do not begin."""
    parser = argparse.ArgumentParser(
        prog="bench.py campaign", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="the options of a sweep a line")
    parser.add_argument("--time-limit-s", type=positive, default=math.inf, metavar="S", help="begin no point later")
    options, common = parser.parse_known_args(argv)
    console = Console(stderr=True)
    try:
        return run(commands(options.file.read_text(), common), options.time_limit_s, console)
    except (ConfigError, ValueError, OSError) as error:
        print(f"bench.py campaign: {error}", file=sys.stderr)
        return 2


def run(lines: list[list[str]], time_limit_s: float, console: Console) -> int:
    started_s, parsed = time.monotonic(), read(lines)
    specs = [spec for options in parsed for spec in sweep.Sweep(options, console).specs]  # folders are looked at too
    target = target_of(parsed[0], specs)
    try:
        for number, (line, options) in enumerate(zip(lines, parsed, strict=True), 1):
            console.print(f"sweep {number} of {len(lines)}: {shlex.join(line)}", highlight=False, soft_wrap=True)
            options["time_limit_s"] = max(1e-9, time_limit_s - (time.monotonic() - started_s))
            if not target.is_simulated:  # its conditions name the sweep's own command
                target.about["argv"] = ["sweep", *line]
            if code := sweep.Sweep(options, console).run(target):  # an earlier line may have filled its folder
                return code
    finally:
        target.close()
    return 0
