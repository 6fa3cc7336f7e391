"""Break slab+ on purpose, one step at a time, and see whether the tests notice.

    python tests/mutate.py

Each mutation of `MUTATIONS` (in words: tests/mutations.md) replaces one piece of text in a copy of the package, and the
tests named beside it are run on that copy. They must fail on it, and pass on a copy in which nothing was changed. The
exit status is 1 if a mutation survives, if its text is no longer in the source exactly once, or if mutations.md does
not name its tests. It takes two to three minutes.
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
TESTS = ROOT / "tests"
TABLE = ROOT / "tests" / "mutations.md"

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
        source: the file, from the package on.
        old: text that is in the source once.
        new: what takes its place.
        tests: those that must fail, each as file and function, from the folder tests on.
    """

    name: str
    source: str
    old: str
    new: str
    tests: tuple[str, ...]


MUTATIONS = (
    Mutation(
        "1 the alphabet counts all columns alike",
        "methods/slab_plus.py",
        "fit_alphabet(weight, positive(gram.diagonal().sqrt()), way.bits",
        "fit_alphabet(weight, torch.ones(len(gram), device=gram.device), way.bits",
        ("methods/test_slab_plus_steps.py::test_columns_count_by_the_norm_of_their_input",),
    ),
    Mutation(
        "2 scales are fitted without importance",
        "methods/alphabet_fit.py",
        "weighted = levels * importance",
        "weighted = levels",
        (
            "methods/test_alphabet_fit.py::test_each_part_is_the_least_squares_solution",
            "methods/test_alphabet_fit.py::test_no_part_of_a_round_raises_the_error",
        ),
    ),
    Mutation(
        "3 the sweep goes from small inputs to large ones",
        "methods/slab_plus.py",
        "argsort(descending=True, stable=True)",
        "argsort(descending=False, stable=True)",
        ("methods/test_slab_plus_steps.py::test_the_sweep_goes_from_large_inputs_to_small_ones",),
    ),
    Mutation(
        "4 v is that of the unsorted columns",
        "methods/slab_plus.py",
        "alphabet.right[order]",
        "alphabet.right",
        ("methods/test_slab_plus_steps.py::test_without_correlations_the_sweep_is_rounding",),
    ),
    Mutation(
        "5 v is never solved",
        "methods/alphabet_refit.py",
        "fitted_rows(problem, fitted_right(problem, draft))",
        "fitted_rows(problem, draft)",
        ("methods/test_alphabet_refit.py::test_numbers_that_are_off_are_found_again",),
    ),
    Mutation(
        "6 u is solved apart from the scales",
        "methods/alphabet_refit.py",
        "    system[:, groups, :groups] = system[:, :groups, groups] = per_group(image * kept)\n",
        "",
        ("methods/test_alphabet_refit.py::test_rows_are_the_least_squares_solution",),
    ),
    Mutation(
        "7 a minus of v is lost",
        "methods/alphabet_refit.py",
        "flipped(draft.signs, inside & (right < 0))",
        "draft.signs",
        ("methods/test_alphabet_refit.py::test_right_is_the_least_squares_solution",),
    ),
    Mutation(
        "8 no descent",
        "methods/slab_plus.py",
        "DESCENTS = 4",
        "DESCENTS = 0",
        ("methods/test_slab_plus.py::test_no_step_can_be_left_out",),
    ),
    Mutation(
        "9 trials are judged on G",
        "methods/slab_plus.py",
        "trial.result(trial.draft).dense(), held_out)",
        "trial.result(trial.draft).dense(), gram)",
        (
            "methods/test_slab_plus.py::test_the_best_trial_is_the_result",
            "methods/test_slab_plus.py::test_dampings_are_judged_on_held_out_tokens",
        ),
    ),
    Mutation(
        "10 no trials",
        "methods/slab_plus.py",
        "min(_ways(n, bits, config), key=tried)",
        "_ways(n, bits, config)[0]",
        (
            "methods/test_slab_plus.py::test_the_best_trial_is_the_result",
            "methods/test_slab_plus.py::test_rotation_is_chosen_where_it_helps_and_not_where_it_does_not",
        ),
    ),
    Mutation(
        "11 trials look at the first rows",
        "methods/slab_plus.py",
        "sample = weight[trial_rows(m, config.seed).to(weight.device)]",
        "sample = weight[:64]",
        ("methods/test_slab_plus.py::test_the_rows_that_are_tried_decide",),
    ),
    Mutation(
        "12 feedback may do harm",
        "methods/slab_plus.py",
        "min(best.descended(), best.plain(), key",
        "min(best.descended(), best.descended(), key",
        ("methods/test_slab_plus.py::test_feedback_never_does_harm_on_held_out_tokens",),
    ),
    Mutation(
        "13 signs and transform change places",
        "methods/rotation.py",
        "hadamard(rows, self.block) * self.signs.to(rows)",
        "hadamard(rows * self.signs.to(rows), self.block)",
        ("methods/test_rotation.py::test_rotate_is_a_product_with_an_orthogonal_matrix",),
    ),
    Mutation(
        "14 the Gram matrix is rotated on one side",
        "methods/rotation.py",
        "rotated = self.rotate(self.rotate(gram).T)",
        "rotated = self.rotate(gram)",
        ("methods/test_rotation.py::test_rotated_gram_is_that_of_rotated_inputs",),
    ),
    Mutation(
        "15 a second bit gains as much as the first",
        "methods/allocation.py",
        "demand.importance - RATE * chosen[i] -",
        "demand.importance -",
        (
            "methods/test_allocation.py::test_a_bit_goes_where_it_helps_most",
            "methods/test_allocation.py::test_no_choice_is_better_for_layers_of_one_size",
        ),
    ),
    Mutation(
        "16 what a bit takes does not count",
        "methods/allocation.py",
        " - math.log2(cost(i) / demand.weights)",
        "",
        ("methods/test_allocation.py::test_a_bit_goes_where_it_takes_least",),
    ),
    Mutation(
        "17 the filling of tiles is free",
        "methods/budget.py",
        "-(-m // 4) * 4 * (-(-n // 64) * 64) * bits // 8",
        "m * (-(-n // 64) * 64) * bits // 8",
        ("methods/test_budget.py::test_symbols_take_the_bytes_of_a_file",),
    ),
    Mutation(
        "18 the top bit of 3 lies in front, written and read",
        "packing/tiles.py",
        "3: (2, 1)",
        "3: (1, 2)",
        ("packing/test_symbols.py::test_tiles_lie_as_the_format_says",),
    ),
)


def main() -> int:
    """Try all; see the module's text."""
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
            outcome = verdict(mutation, copy, table)
            good &= outcome == "killed"
            print(f"{mutation.name:50s} {outcome} ({time.perf_counter() - start:.0f} s)", flush=True)
    return 0 if good else 1


def verdict(mutation: Mutation, copy: Path, table: str) -> str:
    """``killed`` if each of the tests fails on the mutated source, else what is wrong.

    Args:
        mutation: what to try.
        copy: folder of the package's copy.
        table: text of mutations.md.
    """
    file = copy / mutation.source
    source = file.read_text(encoding="utf-8")
    if source.count(mutation.old) != 1:
        return "NOT APPLIED: its text is not in the source exactly once"
    if missing := [test for test in mutation.tests if test.split("::")[1] not in table]:
        return f"NOT IN mutations.md: {missing[0]}"
    file.write_text(source.replace(mutation.old, mutation.new), encoding="utf-8")
    outcomes = {test: status(copy, (test,)) for test in mutation.tests}
    file.write_text(source, encoding="utf-8")
    for test, outcome in outcomes.items():
        if outcome != FAILED:
            return f"SURVIVED {test}" if outcome == PASSED else f"ERROR {outcome} of pytest in {test}"
    return "killed"


def status(copy: Path, tests: tuple[str, ...]) -> int:
    """Exit status of pytest for these tests on the copy."""
    command = [sys.executable, "-B", "-c", RUN, str(copy.parent), "-q", "-x", "--no-header", "-p", "no:cacheprovider"]
    command += [f"{TESTS}/{test}" for test in tests]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
