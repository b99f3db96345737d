"""Compile cases for targets in a process of its own, and print what was found as JSON.

python -m compiled.survey --targets sm_90 gfx942 [--cases precomputed live] [--runs] [--mutants]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict

from compiled import mutants
from compiled.cases import CASES, RUNS, SHAPES_OF_A_RUN, Case
from compiled.contract import broken_rules
from compiled.dry_launch import TARGETS, Launch, dry_launch
from compiled.machine_code import MachineCode, read

_codes: dict[str, MachineCode] = {}  # by hash: the disassembler takes a quarter of a second to start


def survey(cases: dict[str, Case], targets: list[str]) -> tuple[list[dict], list[dict]]:
    """Return one row for every kernel that a case launches on a target, and the cases that do not compile."""
    rows, failures = [], []
    for target in targets:
        for name, case in cases.items():
            try:
                launches = launches_of(case.run, target)
            except Exception as error:  # Triton's and ptxas' errors share no base class
                failures.append({"case": name, "target": target, "error": f"does not compile: {error}"})
                continue
            rows += [row(name, target, launch, case.streams) for launch in launches]
    return rows, failures


def launches_of(call: Callable[[], None], target: str) -> list[Launch]:
    """Return what a call launches on a target."""
    with dry_launch(TARGETS[target]) as launches:
        call()
    return launches


def row(case: str, target: str, launch: Launch, streams: str | None) -> dict:
    """Return everything known about a launch, fit for JSON."""
    variant = launch.compiled.hash
    if variant not in _codes:
        _codes[variant] = read(launch)
    code = _codes[variant]
    return {
        "case": case,
        "target": target,
        "kernel": launch.kernel,
        "variant": variant,
        "flags": launch.flags,
        "warps": launch.compiled.metadata.num_warps,
        **asdict(code),
        "broken": broken_rules(launch, code, streams),
    }


def count_variants(target: str) -> dict[str, dict[str, int]]:
    """Return, for each run of twenty shapes, how many machine codes each kernel and flag set has."""
    counts = {}
    for name, call in RUNS.items():
        found: dict[str, set[str]] = {}
        for shape in SHAPES_OF_A_RUN:
            for launch in launches_of(lambda call=call, shape=shape: call(shape), target):
                found.setdefault(f"{launch.kernel} {launch.flags}", set()).add(launch.compiled.hash)
        counts[name] = {kernel: len(hashes) for kernel, hashes in found.items()}
    return counts


def survey_mutants(target: str) -> dict[str, list[str]]:
    """Return the broken rules of each mutant."""
    found = {}
    for name, mutant in mutants.COMPILED.items():
        with tempfile.TemporaryDirectory() as folder, mutants.installed(mutant, folder):
            rows, failures = survey({c: CASES[c] for c in mutant.cases}, [target])
        found[name] = [f"{row['kernel']}: {rule}" for row in rows for rule in row["broken"]]
        found[name] += [failure["error"] for failure in failures]
    return found


def main() -> None:
    """Parse the command line and print the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--runs", action="store_true", help="also count variants over twenty shapes")
    parser.add_argument("--mutants", action="store_true", help="also compile the mutants, for the first target")
    options = parser.parse_args()
    rows, failures = survey({name: CASES[name] for name in options.cases}, options.targets)
    result: dict = {"rows": rows, "failures": failures}
    if options.runs:
        result["variants"] = count_variants(options.targets[0])
    if options.mutants:
        result["mutants"] = survey_mutants(options.targets[0])
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main()
