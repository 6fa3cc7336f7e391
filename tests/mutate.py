"""Break slab+ on purpose, one step at a time, and see whether the tests notice.

    python tests/mutate.py

Each mutation of `MUTATIONS` (in words: tests/mutations.md) replaces one piece of text in a copy of the package, and the
tests named beside it are run on that copy. They must fail on it, and pass on a copy in which nothing was changed. The
exit status is 1 if a mutation survives, if its text is no longer in the source exactly once, or if mutations.md does
not name its tests. It takes one to two minutes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "slablm"
TESTS = ROOT / "tests" / "methods" / "test_slab_plus_steps.py"
TABLE = ROOT / "tests" / "mutations.md"
SOURCE = Path("methods") / "slab_plus.py"

# An editable install puts a finder in front of every path; the copy must win.
RUN = """
import sys
sys.path.insert(0, sys.argv[1])
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in type(finder).__module__]
import pytest, slablm
assert slablm.__file__.startswith(sys.argv[1]), slablm.__file__
sys.exit(pytest.main(sys.argv[2:]))
"""
PASSED, FAILED = 0, 1


@dataclass(frozen=True)
class Mutation:
    """One way to break slab+.

    Attributes:
        name: as in mutations.md.
        old: text that is in the source once.
        new: what takes its place.
        tests: those that must fail.
    """

    name: str
    old: str
    new: str
    tests: tuple[str, ...]


MUTATIONS = (
    Mutation(
        "1 v is never solved",
        "    right = torch.linalg.solve(system, (parts * wanted).sum(dim=0))\n",
        "",
        ("test_refit_is_stationary_in_u_and_v", "test_refit_lowers_the_output_error"),
    ),
    Mutation(
        "2 the sweep goes from small inputs to large ones",
        "argsort(descending=True, stable=True)\n    background, mask",
        "argsort(descending=False, stable=True)\n    background, mask",
        ("test_the_sweep_goes_from_large_inputs_to_small_ones",),
    ),
    Mutation(
        "3 trials are judged on G",
        "return output_error(sample, result, held_out)",
        "return output_error(sample, result, gram)",
        ("test_dampings_are_judged_on_held_out_tokens", "test_forms_are_judged_on_held_out_tokens"),
    ),
    Mutation(
        "4 no trials",
        "form, damping = _best_trial(sample, gram, held_out, config, forms)",
        "form, damping = forms[0], DAMPINGS[0]",
        ("test_the_best_trial_is_the_result",),
    ),
    Mutation(
        "5 no descent",
        "DESCENTS = 4",
        "DESCENTS = 0",
        ("test_four_descents_lower_the_output_error", "test_no_step_can_be_left_out"),
    ),
    Mutation(
        "6 positions are never chosen anew",
        "        if choose:\n",
        "        if False:\n",
        ("test_positions_are_chosen_anew",),
    ),
    Mutation(
        "6b slab_plus does not ask for it",
        "best = fed(weight, gram, plain, damping, choose=config.n_of_m is None)",
        "best = fed(weight, gram, plain, damping, choose=False)",
        ("test_no_step_can_be_left_out",),
    ),
    Mutation(
        "7 the grid is fitted without norms",
        "fit_grid(start.dense(), start.mask, norms, form.bits",
        "fit_grid(start.dense(), start.mask, torch.ones_like(norms), form.bits",
        ("test_the_grid_is_fitted_where_the_inputs_are_large",),
    ),
    Mutation(
        "8 factors are fitted without norms",
        "    basis = start_basis(weight * norms, 1)\n",
        "    norms = torch.ones_like(norms)\n    basis = start_basis(weight * norms, 1)\n",
        ("test_factors_are_fitted_where_the_inputs_are_large",),
    ),
    Mutation(
        "9 the choice ignores U_jj",
        "gain = (lost - kept) / block.diagonal.square()",
        "gain = lost - kept",
        (
            "test_the_choice_counts_what_an_error_costs_in_its_column",
            "test_the_choice_counts_what_later_columns_make_up_for",
        ),
    ),
)


def main() -> int:
    """Try all; see the module's text."""
    source = (PACKAGE / SOURCE).read_text(encoding="utf-8")
    table = TABLE.read_text(encoding="utf-8")
    every_test = tuple(dict.fromkeys(test for mutation in MUTATIONS for test in mutation.tests))
    good = True
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "slablm"
        shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
        if status(copy, every_test) != PASSED:
            print("the tests fail on the source as it is")
            return 1
        for mutation in MUTATIONS:
            start = time.perf_counter()
            outcome = verdict(mutation, copy, source, table)
            good &= outcome == "killed"
            print(f"{mutation.name:50s} {outcome} ({time.perf_counter() - start:.0f} s)", flush=True)
    return 0 if good else 1


def verdict(mutation: Mutation, copy: Path, source: str, table: str) -> str:
    """``killed`` if each of the tests fails on the mutated source, else what is wrong.

    Args:
        mutation: what to try.
        copy: folder of the package's copy.
        source: text of the file to change.
        table: text of mutations.md.
    """
    if source.count(mutation.old) != 1:
        return "NOT APPLIED: its text is not in the source exactly once"
    if missing := [test for test in mutation.tests if test not in table]:
        return f"NOT IN mutations.md: {missing[0]}"
    (copy / SOURCE).write_text(source.replace(mutation.old, mutation.new), encoding="utf-8")
    outcomes = {test: status(copy, (test,)) for test in mutation.tests}
    (copy / SOURCE).write_text(source, encoding="utf-8")
    for test, outcome in outcomes.items():
        if outcome != FAILED:
            return f"SURVIVED {test}" if outcome == PASSED else f"ERROR {outcome} of pytest in {test}"
    return "killed"


def status(copy: Path, tests: tuple[str, ...]) -> int:
    """Exit status of pytest for these tests on the copy."""
    command = [sys.executable, "-B", "-c", RUN, str(copy.parent), "-q", "-x", "--no-header", "-p", "no:cacheprovider"]
    command += [f"{TESTS}::{test}" for test in tests]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
