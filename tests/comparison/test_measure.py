"""The grid, the keys and the file of results."""

import json
import sys
import types
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from slablm import CompressionConfig, SlabError
from slablm.comparison import measure as measuring
from slablm.comparison.cells import Cell, Grid
from slablm.comparison.measure import Conditions, Tasks, cell_key, measure_cells, model_digest
from slablm.comparison.records import Record, ResultsFile
from slablm.evaluation import perplexity
from slablm.evaluation.divergence import DenseOutputs
from slablm.evaluation.drift import DenseStreams
from slablm.methods import METHODS

BASE = CompressionConfig("slab", calibration="builtin", num_samples=4, seq_len=32, iterations=4)


@pytest.fixture(scope="module")
def conditions(tiny_folder, tokenizer):
    def load():
        return AutoModelForCausalLM.from_pretrained(tiny_folder).eval()

    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(2, 258, (11, 32), generator=generator)
    texts = {"main": tokens[6:], "other": tokens[4:6]}
    return Conditions(
        load, tokenizer, model_digest(load()), BASE, drawing(tokens), texts, Tasks(), True, {"model": "tiny"}
    )


def drawing(tokens, windows=6):
    """Another draw for another seed."""
    return lambda config: tokens.roll(config.seed, dims=0)[:windows]


def measure(cells, conditions, results):
    """Records, and which of them were measured just now."""
    measured = []
    keys = {cell: cell_key(cell, conditions) for cell in cells}
    records = measure_cells(
        keys, conditions, results, lambda record, new: measured.append(new), lambda what, done, total: None
    )
    return records, measured


@pytest.fixture(scope="module")
def grid():
    return Grid(("slab", "sparsegpt", "gptq"), (0.5,), ("unstructured", "2:4"), (4,), (64,))


@pytest.fixture(scope="module")
def finished(conditions, grid, tmp_path_factory):
    """All cells of `grid`: (records, file)."""
    results = ResultsFile(tmp_path_factory.mktemp("finished") / "results.jsonl")
    return measure(grid.cells(BASE), conditions, results)[0], results.path


def test_the_default_grid_is_table_one():
    cells = Grid(("slab", "wanda", "sparsegpt")).cells(BASE)
    assert cells[0] == Cell(None)
    points = [(0.5, "unstructured"), (0.6, "unstructured"), (0.7, "unstructured"), (0.8, "unstructured")]
    points += [(0.5, "2:4"), (0.5, "4:8")]
    assert [(c.config.ratio, c.config.pattern, c.method) for c in cells[1:]] == [
        (ratio, pattern, method) for ratio, pattern in points for method in ("slab", "wanda", "sparsegpt")
    ]


def test_a_pattern_is_measured_at_its_own_ratio():
    cells = Grid(("wanda",), (0.6, 0.7), ("2:4", "1:4")).cells(BASE)
    assert [(c.config.ratio, c.config.pattern) for c in cells[1:]] == [(0.5, "2:4"), (0.75, "1:4")]


def test_quantizers_have_bits_and_groups_instead():
    cells = Grid(("wanda", "rtn"), (0.5,), ("unstructured",), (3, 8), (64, 128)).cells(BASE)
    assert [c.label for c in cells] == [
        "dense",
        "wanda 50 % unstructured",
        "rtn 3 bit, group 64",
        "rtn 3 bit, group 128",
        "rtn 8 bit, group 64",
        "rtn 8 bit, group 128",
    ]


def test_a_value_given_twice_is_one_cell():
    assert len(Grid(("wanda", "wanda"), (0.5, 0.5), ("unstructured",)).cells(BASE)) == 2


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (Grid(("magic",)), "unknown method 'magic'"),
        (Grid(()), "nothing to compare"),
        (Grid(("slab",), (), ("unstructured",)), "nothing to compare"),
        (Grid(("slab",), (1.5,)), "ratio must lie strictly between"),
        (Grid(("slab",), (0.5,), ("2;4",)), "pattern '2;4' is not understood"),
        (Grid(("rtn",), value_bits=(1,)), "value_bits must lie between 2 and 8"),
    ],
)
def test_grids_that_make_no_sense(grid, message):
    with pytest.raises(SlabError, match=message):
        grid.cells(BASE)


def test_a_cell_is_what_compressing_and_evaluating_gives(finished, conditions, grid):
    from slablm.api import compress_model
    from slablm.checkpoint.layer_report import size_summary
    from slablm.dense.targets import select_targets

    records, _ = finished
    slab = records[1]
    assert slab.cell == grid.cells(BASE)[1]
    model = conditions.load()
    reports = compress_model(model, select_targets(model, BASE), conditions.calibration(BASE), slab.cell.config)
    assert perplexity(model, conditions.texts["main"]) == slab.perplexity
    assert perplexity(model, conditions.texts["other"]) == slab.texts["other"].perplexity
    outputs = DenseOutputs.of(conditions.load(), conditions.texts)
    assert outputs.compare(model)["other"][1] == slab.texts["other"].divergence
    assert slab.drift == tuple(DenseStreams.of(conditions.load(), conditions.texts["main"][:2]).drift(model))
    assert slab.layer_errors == {report.name: report.output_error for report in reports}
    assert slab.unseen_errors == {report.name: report.unseen_error for report in reports}
    assert slab.unseen_errors.keys() == slab.layer_errors.keys()
    sizes = size_summary(reports)
    assert (slab.compression_ratio, slab.bits_per_weight) == (sizes["compression_ratio"], sizes["bits_per_weight"])
    others = sum(parameter.numel() for parameter in conditions.load().parameters()) - sizes["weights"]
    bits = sum(report.true_bits for report in reports) + 16 * others
    assert slab.model_bits_per_weight == pytest.approx(bits / (sizes["weights"] + others))
    assert slab.ratio_to_dense == slab.perplexity.value / records[0].perplexity.value


def test_the_dense_cell_is_the_untouched_model(finished, conditions):
    dense = finished[0][0]
    assert dense.perplexity == perplexity(conditions.load(), conditions.texts["main"])
    assert dense.main.divergence is None
    assert (dense.compression_ratio, dense.bits_per_weight, dense.ratio_to_dense) == (0, 16, 1)
    assert dense.model_bits_per_weight == 16
    assert dense.layer_errors == dense.unseen_errors == {}


def test_yardsticks_are_measured_too(finished):
    by_label = {record.cell.label: record for record in finished[0]}
    assert by_label["sparsegpt 50 % unstructured"].bits_per_weight == pytest.approx(9, abs=0.05)
    # 4-bit codes; a 16-bit scale and a 4-bit zero point per 64 columns, or per 96 − 64 in the one wider layer.
    assert 4.3 < by_label["gptq 4 bit, group 64"].bits_per_weight < 4.4
    assert all(len(record.layer_errors) == 14 for record in finished[0][1:])


def test_every_quantizer_is_measured(conditions, tmp_path):
    quantizers = tuple(name for name, method in METHODS.items() if method.quantizes)
    cells = Grid(quantizers, value_bits=(4,), group_sizes=(64,)).cells(BASE)
    records, measured = measure(cells, conditions, ResultsFile(tmp_path / "results.jsonl"))
    sizes = {record.cell.method: record.bits_per_weight for record in records[1:]}
    assert measured == [True] * 6
    assert sizes.keys() == {"rtn", "rtn-plain", "gptq", "gptq-plain", "awq"}
    assert sizes["awq"] > sizes["rtn"] == sizes["rtn-plain"] == sizes["gptq"] == sizes["gptq-plain"]
    assert all(not METHODS[name].packable for name in quantizers)


def test_every_cell_starts_from_the_dense_model(finished, conditions, grid, tmp_path):
    alone = [grid.cells(BASE)[0], grid.cells(BASE)[-1]]
    records, _ = measure(alone, conditions, ResultsFile(tmp_path / "results.jsonl"))
    assert records[1].perplexity == finished[0][-1].perplexity
    assert records[1].layer_errors == finished[0][-1].layer_errors


def test_finished_cells_are_not_measured_again(finished, conditions, grid):
    records, path = finished
    before = path.read_bytes()
    again, measured = measure(grid.cells(BASE), conditions, ResultsFile(path))
    assert again == records
    assert not any(measured)
    assert path.read_bytes() == before


def test_a_text_of_another_name_is_the_same_text(finished, conditions, grid):
    renamed = replace(conditions, texts=dict(zip(("a", "b"), conditions.texts.values(), strict=True)))
    records, measured = measure(grid.cells(BASE), renamed, ResultsFile(finished[1]))
    assert not any(measured)
    assert all(list(record.texts) == ["a", "b"] for record in records)


def test_only_what_is_missing_is_measured(finished, conditions, grid, tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_bytes(b"".join(finished[1].read_bytes().splitlines(keepends=True)[:2]))
    wider = replace(grid, methods=("slab", "sparsegpt", "gptq", "rtn"))
    _, measured = measure(wider.cells(BASE), conditions, ResultsFile(path))
    assert measured == [False, False, *[True] * 5]


def test_windows_that_calibrate_nothing_do_not_change_a_cell(conditions, grid, tmp_path):
    cell, without = (
        grid.cells(BASE)[1],
        replace(conditions, calibration=lambda config: conditions.calibration(config)[:4]),
    )
    (with_them,), (alone,) = (
        measure([cell], some, ResultsFile(tmp_path / f"{len(some.calibration(BASE))}.jsonl"))[0]
        for some in (conditions, without)
    )
    assert with_them.perplexity == alone.perplexity
    assert with_them.layer_errors == alone.layer_errors
    assert with_them.unseen_errors
    assert alone.unseen_errors == {}


def test_every_cell_is_measured_with_every_draw(conditions, tmp_path):
    cells = Grid(("wanda", "rtn"), (0.5,), ("unstructured",), (4,), draws=2).cells(replace(BASE, seed=7))
    assert [cell.config.seed for cell in cells[1:]] == [7, 8, 7, 8]
    records, _ = measure(cells, conditions, ResultsFile(tmp_path / "results.jsonl"))
    assert records[1].perplexity != records[2].perplexity
    assert len({record.cell.undrawn for record in records}) == 3


def test_records_survive_their_file(finished):
    records, path = finished
    for record, line in zip(records, path.read_text().splitlines(), strict=True):
        data = json.loads(line)
        assert Record.from_dict(data) == record
        assert data["texts"]["main"]["perplexity"] == record.perplexity.value
        assert data["texts"]["main"]["stderr"] == record.perplexity.stderr
        assert data["texts"]["other"]["tokens"] == 2 * 31
        assert set(data["versions"]) == {"slablm", "torch", "transformers", "python"}
    assert data["seed"] == 0


@pytest.mark.parametrize("cut", [1, 2, 100])
def test_a_torn_last_line_is_dropped(finished, tmp_path, cut):
    lines = finished[1].read_bytes().splitlines(keepends=True)
    path = tmp_path / "results.jsonl"
    path.write_bytes(b"".join(lines)[:-cut])
    results = ResultsFile(path)
    assert path.read_bytes() == b"".join(lines[:-1])
    assert results.get(finished[0][-1].key) is None
    results.append(finished[0][-1])
    assert path.read_bytes() == b"".join(lines)


def test_a_line_damaged_in_the_middle_is_reported(finished, tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_bytes(b"\x00garbage\n" + finished[1].read_bytes())
    with pytest.raises(SlabError, match=r"results\.jsonl: line 1 is damaged: delete the line"):
        ResultsFile(path)


def test_a_folder_that_cannot_be_written(finished, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SlabError, match="cannot be written"):
        ResultsFile(tmp_path / "file" / "results.jsonl").append(finished[0][0])


def test_one_window_has_no_standard_error_and_is_valid_json(finished, tmp_path):
    dense = finished[0][0]
    one = replace(dense.main, perplexity=replace(dense.perplexity, window_losses=(1.0,)))
    ResultsFile(tmp_path / "results.jsonl").append(replace(dense, texts={"main": one}))
    assert json.loads((tmp_path / "results.jsonl").read_text())["texts"]["main"]["stderr"] is None


def test_everything_that_changes_the_numbers_changes_the_key(conditions, monkeypatch, tmp_path):
    file = tmp_path / "task.jsonl"
    file.write_text("{}")
    cell = Cell(BASE)
    keys = [cell_key(cell, conditions)]
    keys += [
        cell_key(Cell(replace(BASE, **{name: value})), conditions)
        for name, value in {
            "method": "wanda",
            "ratio": 0.6,
            "pattern": "2:4",
            "seed": 1,
            "ignore": ("up_proj",),
            "bos": False,
        }.items()
    ]
    keys += [
        cell_key(cell, replace(conditions, **{name: value}))
        for name, value in {
            "model_digest": "other",
            "calibration": lambda config: conditions.calibration(config) + 1,
            "texts": {"main": conditions.texts["main"]},
        }.items()
    ]
    keys += [cell_key(cell, replace(conditions, tasks=t)) for t in (Tasks(("piqa",)), Tasks(("piqa",), limit=5))]
    keys.append(cell_key(cell, replace(conditions, tasks=Tasks(files=(file,)))))
    keys.append(cell_key(cell, replace(conditions, tasks=Tasks(files=(file,)), bos=False)))
    file.write_text("{ }")
    keys.append(cell_key(cell, replace(conditions, tasks=Tasks(files=(file,)))))
    monkeypatch.setattr(measuring, "NUMBERS_VERSION", measuring.NUMBERS_VERSION + 1)
    keys.append(cell_key(cell, conditions))
    assert len(set(keys)) == len(keys)


def test_names_do_not_change_the_key(conditions):
    texts = {f"another {name}": windows for name, windows in conditions.texts.items()}
    renamed = replace(conditions, description={"model": "elsewhere"}, texts=texts)
    moved = replace(BASE, calibration="/another/place.txt")
    assert cell_key(Cell(moved), renamed) == cell_key(Cell(BASE), conditions)
    other_text = replace(conditions, calibration=lambda config: conditions.calibration(config) + 1)
    assert cell_key(Cell(None), other_text) == cell_key(Cell(None), conditions)


def test_the_digest_sees_weights_and_settings_but_not_names(conditions):
    model = conditions.load()
    model.config._name_or_path = "elsewhere"
    assert model_digest(model) == conditions.model_digest
    model.config.rms_norm_eps = 1e-3
    assert model_digest(model) != conditions.model_digest
    model = conditions.load()
    model.model.norm.weight.data[0] += 1
    assert model_digest(model) != conditions.model_digest


def test_a_cell_that_cannot_be_computed_is_named(conditions, tmp_path):
    results = ResultsFile(tmp_path / "results.jsonl")
    cells = Grid(("slab",), (0.93,), ("unstructured",)).cells(BASE)
    with pytest.raises(SlabError, match=r"slab 93 % unstructured: .*q_proj: ratio 0\.93 keeps no entry.*are kept in"):
        measure(cells, conditions, results)
    assert len(results.path.read_text().splitlines()) == 1


def test_tasks_go_through_the_evaluation_module(conditions, monkeypatch, tmp_path):
    seen = []

    class Result:
        def to_dict(self):
            return {"acc": 0.5, "stderr": 0.5, "n": 2, "correct": [0, 1]}

    def evaluate_tasks(model, tokenizer, tasks, task_files, limit, *, bos):
        seen.append((type(model).__name__, tokenizer, tasks, task_files, limit, bos))
        return {"piqa": Result()}

    module = types.ModuleType("slablm.evaluation.zeroshot")
    module.evaluate_tasks = evaluate_tasks
    monkeypatch.setitem(sys.modules, "slablm.evaluation.zeroshot", module)
    asked = replace(conditions, tasks=Tasks(("piqa",), limit=2))
    results = ResultsFile(tmp_path / "results.jsonl")
    records, _ = measure([Cell(None)], asked, results)
    assert records[0].accuracies == {"piqa": {"acc": 0.5, "stderr": 0.5, "n": 2, "correct": [0, 1]}}
    assert seen == [("LlamaForCausalLM", conditions.tokenizer, ("piqa",), (), 2, True)]
    assert ResultsFile(results.path).get(records[0].key) == records[0]


def test_a_missing_task_file():
    from pathlib import Path

    with pytest.raises(SlabError, match=r"task file nowhere\.jsonl cannot be read"):
        Tasks(files=(Path("nowhere.jsonl"),)).identity()


def test_a_changed_method_is_measured_again_and_no_other(conditions, monkeypatch):
    cells = [Cell(replace(BASE, method="slab+", ratio=None)), Cell(BASE), Cell(None)]
    before = [cell_key(cell, conditions) for cell in cells]
    changed = replace(METHODS["slab+"], version=METHODS["slab+"].version + 1)
    monkeypatch.setitem(METHODS, "slab+", changed)
    after = [cell_key(cell, conditions) for cell in cells]
    assert before[0] != after[0]
    assert before[1:] == after[1:]
