"""The three streams of a family against what its model says by itself, whole and in batches; all families in a table.

PYTHONPATH=.:tests python -m families.streams            # prints the table of srpo/README.md
"""

from __future__ import annotations

import sys
import warnings

import pytest
import transformers
from families import grids, others, tiles
from families.harness import FAMILIES, Rollout
from rollouts import assert_close, largest

from srpo.errors import SRPOError

TABLES = (grids, tiles, others)  # reading them fills FAMILIES
EXACT = {"rtol": 0, "atol": 5e-5}
# Positions that neither a module shows nor a probe finds are to be passed.
GIVEN = {"kosmos2": lambda rollout: {"position_ids": rollout.mask.cumsum(dim=1) * rollout.mask}}


def check_streams(name: str, images: tuple[int, ...] | None = None) -> None:
    """Compare the streams on the road of every family: pictures are corrupted, the processor runs again."""
    rollout = Rollout(FAMILIES[name], images)
    dark, given = rollout.without_pictures(), GIVEN[name](rollout) if name in GIVEN else {}
    whole = rollout.score(corrupted_inputs=dark, **given)
    assert_close(whole.logps, rollout.each_alone(), rollout.valid, **EXACT)
    assert_close(whole.corrupted_logps, rollout.whole(**dark), rollout.visual, **EXACT)
    assert_close(whole.ablated_logps, rollout.deleted(), rollout.reasoned, **EXACT)
    assert largest(whole.corrupted_logps, whole.logps, rollout.visual) > 1e-3
    assert largest(whole.ablated_logps, whole.logps, rollout.reasoned) > 1e-3
    for batch_size in (1, 2):
        for part, x in zip(rollout.score(corrupted_inputs=dark, batch_size=batch_size, **given), whole, strict=True):
            assert_close(part, x, rollout.valid, **EXACT)


def outcome(name: str) -> tuple[str, str]:
    """Say what became of a family, and why."""
    try:
        check_streams(name)
    except pytest.skip.Exception as missing:
        return "not built: its processor needs what is not installed", str(missing)
    except SRPOError as error:
        return "refused", str(error)
    except AssertionError as error:
        return "WRONG", str(error)
    except Exception as error:
        return "CRASHED", f"{type(error).__name__}: {error}"
    return "equal", ""


def main() -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    found: dict[str, list[str]] = {"equal": [], "refused": [], "WRONG": [], "CRASHED": []}
    for name in FAMILIES:
        what, why = outcome(name)
        found.setdefault(what, []).append(name)
        if why:
            print(f"{name}: {what}: {' '.join(why.split())}", file=sys.stderr)
    print(f"transformers {transformers.__version__}, {len(FAMILIES)} families\n")
    print("| three streams | families | which |\n|---|---|---|")
    for what, names in found.items():
        print(f"| {what} | {len(names)} | {', '.join(names) or '–'} |")


if __name__ == "__main__":
    main()
