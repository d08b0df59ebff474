"""Judges a run of mutmut over `asyncpool/_core`: are enough mutants killed, and is every other one accounted for?

`nox -s mutation` runs it. `mutants.toml` lists the mutants that no test can kill, with the reason. A mutant is named by
what it changes and not by mutmut's number for it, which is another one after every change of the function:

    machine.PoolMachine.take: now < slot.fresh_until → now <= slot.fresh_until
"""

from __future__ import annotations

import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

LIST = Path(__file__).with_suffix(".toml")
LEAST_RATE = 0.9
KILLED = ("killed", "timeout")


def mutmut(*arguments: str) -> list[str]:
    """The lines that this command of mutmut prints."""
    run = subprocess.run([sys.executable, "-m", "mutmut", *arguments], check=True, capture_output=True, text=True)
    return run.stdout.splitlines()


def outcomes() -> dict[str, str]:
    """What became of each mutant: killed, timeout, survived, no tests, …"""
    return dict(line.strip().split(": ", 1) for line in mutmut("results", "--all", "true"))


def changed_lines(name: str) -> tuple[list[str], list[str]]:
    """The lines that this mutant has instead of others, and those."""
    lines = [line for line in mutmut("show", name) if not line.startswith(("---", "+++"))]
    gone, come = ([line[1:].strip() for line in lines if line.startswith(sign)] for sign in "-+")
    return gone, come


def description(name: str) -> str:
    """What this mutant changes, and where."""
    # mutmut's names: asyncpool._core.policy.x_retirement__mutmut_1, asyncpool._core.slot.xǁSlotǁ__init____mutmut_12
    module, _, function = name.removeprefix("asyncpool._core.").partition("__mutmut_")[0].partition(".")
    where = function.removeprefix("x_").removeprefix("xǁ").replace("ǁ", ".")
    gone, come = changed_lines(name)
    return f"{module}.{where}: {' '.join(gone)} → {' '.join(come)}"


def listed() -> dict[str, str]:
    """The mutants that nothing can kill, and why."""
    groups = tomllib.loads(LIST.read_text())["equivalent"]
    return {mutant: group["why"] for group in groups for mutant in group["mutants"]}


def main() -> int:
    """Print the verdict; 1 if it is bad."""
    outcome = outcomes()
    counts = Counter(outcome.values())
    left = {description(name): f"{name}: {how}" for name, how in outcome.items() if how not in KILLED}
    known = listed()
    killed = sum(counts[how] for how in KILLED)
    rate = killed / len(outcome)
    unknown = left.keys() - known.keys()
    obsolete = known.keys() - left.keys()
    for mutant in sorted(unknown):
        print(f"neither killed nor listed: {mutant}\n    ({left[mutant]})")
    for mutant in sorted(obsolete):
        print(f"listed, but killed or no longer there: {mutant}")
    print(f"{len(outcome)} mutants, {killed} killed ({rate:.1%}), {len(left)} equivalent or alive:", dict(counts))
    return int(rate < LEAST_RATE or bool(unknown or obsolete))


if __name__ == "__main__":
    sys.exit(main())
