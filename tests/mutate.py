"""Break slab+ on purpose, one step at a time, and see whether the tests notice.

    python tests/mutate.py

Each mutation of `MUTATIONS` (in words: tests/mutations.md) replaces one piece of text in a copy of the package, and the
tests named beside it are run on that copy. They must fail on it, and pass on a copy in which nothing was changed. The
exit status is 1 if a mutation survives, if its text is no longer in the source exactly once, or if mutations.md does
not name its tests. It takes five to ten minutes.
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
        "fit_alphabet(weight, positive(inputs.gram.diagonal().sqrt()), bits)",
        "fit_alphabet(weight, torch.ones(weight.shape[1], device=weight.device), bits)",
        ("methods/test_slab_plus_steps.py::test_columns_count_by_the_norm_of_their_input",),
    ),
    Mutation(
        "2 scales are fitted without importance",
        "methods/symbols_fit.py",
        "scales = _quotient(products @ levels,",
        "products, shares = symbol_sums(weight * signs(codes), torch.ones_like(importance), codes, len(levels))\n"
        "        scales = _quotient(products @ levels,",
        ("methods/test_symbols_fit.py::test_rounds_come_to_rest_at_the_least_squares_scales",),
    ),
    Mutation(
        "3 levels are fitted without importance",
        "compression/cpu_sweep.py",
        "    places = codes.long()\n",
        "    places, importance = codes.long(), torch.ones_like(importance)\n",
        ("methods/test_symbols_fit.py::test_levels_are_the_least_squares_solution",),
    ),
    Mutation(
        "4 levels are fitted without the signs",
        "methods/symbols_fit.py",
        "symbol_sums(weight * signs(codes), importance",
        "symbol_sums(weight, importance",
        ("methods/test_symbols_fit.py::test_normal_weights_get_less_than_the_distortion_of_lloyd_and_max",),
    ),
    Mutation(
        "5 a level without entries breaks the order",
        "methods/symbols_fit.py",
        "return fitted.view(-1, 2).sort(dim=0).values.flatten()",
        "return fitted",
        ("methods/test_symbols_fit.py::test_levels_of_either_parity_are_ascending",),
    ),
    Mutation(
        "6 the levels begin as narrow as the entries",
        "methods/symbols_fit.py",
        "levels = 2 * torch.erfinv(",
        "levels = 2**0.5 * torch.erfinv(",
        ("methods/test_symbols_fit.py::test_normal_weights_get_less_than_the_distortion_of_lloyd_and_max",),
    ),
    Mutation(
        "7 scales do not follow the grid of the levels",
        "methods/symbols_fit.py",
        "stored_scales(scales * factor)",
        "stored_scales(scales)",
        ("methods/test_symbols_fit.py::test_normal_weights_get_less_than_the_distortion_of_lloyd_and_max",),
    ),
    Mutation(
        "8 the grid is always the finest",
        "methods/symbols.py",
        "torch.arange(_HALF_STEPS // 2 + 1, _HALF_STEPS, 2,",
        "torch.arange(_HALF_STEPS - 1, _HALF_STEPS, 2,",
        ("methods/test_symbols.py::test_of_all_grids_it_is_the_one_that_levels_lie_on",),
    ),
    Mutation(
        "9 half a step is lost, written and read",
        "methods/symbols.py",
        "(levels.float() + 0.5)",
        "levels.float()",
        ("methods/test_symbols.py::test_dense_is_the_definition_to_the_last_bit",),
    ),
    Mutation(
        "10 τ comes from the row below, written and read",
        "methods/symbols.py",
        "tiles.roll(1, dims=1)",
        "tiles.roll(-1, dims=1)",
        ("methods/test_symbols.py::test_the_symbols_of_a_tile_are_a_cycle",),
    ),
    Mutation(
        "11 the first row of a tile has no row above it",
        "methods/symbols.py",
        "tiles.roll(1, dims=1)",
        "functional.pad(tiles[:, :-1], (0, 0, 1, 0))",
        ("methods/test_symbols.py::test_the_symbols_of_a_tile_are_a_cycle",),
    ),
    Mutation(
        "12 tiles depend on each other",
        "methods/symbols.py",
        "tiles.roll(1, dims=1).reshape(-1, n)[:m]",
        "tiles.reshape(-1, n).roll(1, dims=0)[:m]",
        ("methods/test_symbols.py::test_the_symbols_of_a_tile_are_a_cycle",),
    ),
    Mutation(
        "13 τ is the parity of the own symbol",
        "methods/symbols.py",
        "(_above(codes) & 1)",
        "(codes & 1)",
        ("methods/test_symbols.py::test_the_symbols_of_a_tile_are_a_cycle",),
    ),
    Mutation(
        "14 the parity of the own symbol for that of the row above",
        "methods/trellis.py",
        "2 * parities.roll(1, dims=-1) + parities",
        "3 * parities",
        ("methods/test_trellis.py::test_no_symbols_of_a_tile_are_nearer",),
    ),
    Mutation(
        "15 the best symbol of either parity is the even one",
        "methods/trellis.py",
        "codes[above, parity] = 2 * index + parity",
        "codes[above, parity] = 2 * index",
        ("methods/test_trellis.py::test_no_symbols_of_a_tile_are_nearer",),
    ),
    Mutation(
        "16 the sign above does not count in the search",
        "methods/trellis.py",
        "torch.bucketize(sign * relative,",
        "torch.bucketize(relative,",
        ("methods/test_trellis.py::test_no_symbols_of_a_tile_are_nearer",),
    ),
    Mutation(
        "17 above the first row is an even symbol",
        "methods/trellis.py",
        "(row[0][d, a] +",
        "(row[0][0, a] +",
        ("methods/test_trellis.py::test_the_sign_of_the_first_row_comes_from_the_last",),
    ),
    Mutation(
        "18 symbols of missing rows are free",
        "methods/trellis.py",
        "distances[:, 1, ..., -1, m % TILE_ROWS :] = torch.inf\n",
        "pass\n",
        ("methods/test_trellis.py::test_above_a_row_alone_is_an_even_symbol",),
    ),
    Mutation(
        "19 columns and rows change places in one long column",
        "methods/symbols_fit.py",
        "scales[:whole].repeat(n)",
        "scales[:whole].repeat_interleave(n)",
        ("methods/test_symbols_fit.py::test_all_columns_at_once_are_each_by_itself",),
    ),
    Mutation(
        "20 the sweep goes from small inputs to large ones",
        "methods/sweep.py",
        "argsort(descending=True, stable=True)",
        "argsort(descending=False, stable=True)",
        ("methods/test_slab_plus_steps.py::test_the_sweep_goes_from_large_inputs_to_small_ones",),
    ),
    Mutation(
        "21 symbols stay in the order of the sweep",
        "methods/slab_plus.py",
        "coder.codes()[:, order.argsort()]",
        "coder.codes()",
        ("methods/test_slab_plus_steps.py::test_without_correlations_the_sweep_is_rounding",),
    ),
    Mutation(
        "22 scales are not refitted after the sweep",
        "methods/slab_plus.py",
        "codes, *refit(problem, codes, start.alphabet))",
        "codes, start.alphabet, refit(problem, codes, start.alphabet)[1])",
        ("methods/test_slab_plus.py::test_the_best_trial_is_the_result",),
    ),
    Mutation(
        "23 scales are not refitted in the descent",
        "methods/slab_plus.py",
        "            alphabet, residual = refit(self.problem, codes, alphabet)\n",
        "            residual = (self.problem.weight - alphabet.dense(codes)) @ self.problem.gram\n",
        ("methods/test_slab_plus.py::test_no_step_can_be_left_out",),
    ),
    Mutation(
        "24 scales are refitted as if inputs were independent",
        "methods/symbols_fit.py",
        "image = problem.pull - residual",
        "image = approximation * problem.gram.diagonal()",
        ("methods/test_symbols_fit.py::test_scales_are_the_least_squares_solution",),
    ),
    Mutation(
        "25 no descent",
        "methods/slab_plus.py",
        "DESCENTS = 4",
        "DESCENTS = 0",
        ("methods/test_slab_plus.py::test_no_step_can_be_left_out",),
    ),
    Mutation(
        "26 the refit and the descent do not know the damping",
        "methods/slab_plus.py",
        "Problem(start.weight, damped(start.inputs.gram, damping))",
        "Problem(start.weight, start.inputs.gram)",
        ("methods/test_slab_plus.py::test_the_best_trial_is_the_result",),
    ),
    Mutation(
        "27 the damping of the sweep is always the first",
        "methods/slab_plus.py",
        "feedback(start, damping)\n",
        "feedback(start, DAMPINGS[0])\n",
        ("methods/test_slab_plus.py::test_the_best_trial_is_the_result",),
    ),
    Mutation(
        "28 the descent forgets what is there",
        "methods/slab_plus.py",
        "descent_sweep(residual, alphabet.dense(codes), gram",
        "descent_sweep(residual, torch.zeros_like(residual), gram",
        ("methods/test_slab_plus_steps.py::test_descent_gives_every_column_its_best_symbols",),
    ),
    Mutation(
        "29 trials are judged on G",
        "methods/slab_plus.py",
        "Trial.of(start, damping).result().dense(), held_out)",
        "Trial.of(start, damping).result().dense(), gram)",
        (
            "methods/test_slab_plus.py::test_the_best_trial_is_the_result",
            "methods/test_slab_plus.py::test_dampings_are_judged_on_held_out_tokens",
        ),
    ),
    Mutation(
        "30 no trials",
        "methods/slab_plus.py",
        "if error < least:",
        "if False:",
        (
            "methods/test_slab_plus.py::test_the_best_trial_is_the_result",
            "methods/test_slab_plus.py::test_rotation_is_chosen_where_it_helps_and_not_where_it_does_not",
        ),
    ),
    Mutation(
        "31 trials look at the first rows",
        "methods/slab_plus.py",
        "sample = weight[trial_rows(m, config.seed).to(weight.device)]",
        "sample = weight[:64]",
        ("methods/test_slab_plus.py::test_the_rows_that_are_tried_decide",),
    ),
    Mutation(
        "32 feedback may do harm",
        "methods/slab_plus.py",
        "min(trial.descended(), trial.plain(), key",
        "min(trial.descended(), trial.descended(), key",
        ("methods/test_slab_plus.py::test_feedback_never_does_harm_on_held_out_tokens",),
    ),
    Mutation(
        "33 signs and transform change places",
        "methods/rotation.py",
        "hadamard(rows, self.block) * self.signs.to(rows)",
        "hadamard(rows * self.signs.to(rows), self.block)",
        ("methods/test_rotation.py::test_rotate_is_a_product_with_an_orthogonal_matrix",),
    ),
    Mutation(
        "34 the Gram matrix is rotated on one side",
        "methods/rotation.py",
        "rotated = self.rotate(self.rotate(gram).T)",
        "rotated = self.rotate(gram)",
        ("methods/test_rotation.py::test_rotated_gram_is_that_of_rotated_inputs",),
    ),
    Mutation(
        "35 the Gram matrix is not rotated",
        "methods/slab_plus.py",
        'gram = stats.once(("rotated", rotation), partial(rotation.rotate_gram, gram))',
        "pass",
        ("methods/test_slab_plus.py::test_the_best_trial_is_the_result",),
    ),
    Mutation(
        "36 a second bit gains as much as the first",
        "methods/allocation.py",
        "demand.importance - RATE * chosen[i] -",
        "demand.importance -",
        (
            "methods/test_allocation.py::test_a_bit_goes_where_it_helps_most",
            "methods/test_allocation.py::test_no_choice_is_better_for_layers_of_one_size",
        ),
    ),
    Mutation(
        "37 what a bit takes does not count",
        "methods/allocation.py",
        " - math.log2(cost(i) / demand.weights)",
        "",
        ("methods/test_allocation.py::test_a_bit_goes_where_it_takes_least",),
    ),
    Mutation(
        "38 the filling of tiles is free",
        "methods/budget.py",
        "-(-m // 4) * 4 * (-(-n // 64) * 64) * bits // 8",
        "m * (-(-n // 64) * 64) * bits // 8",
        ("methods/test_budget.py::test_symbols_take_the_bytes_of_a_file",),
    ),
    Mutation(
        "39 the top bit of 3 lies in front, written and read",
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
            print(f"{mutation.name:58s} {outcome} ({time.perf_counter() - start:.0f} s)", flush=True)
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
