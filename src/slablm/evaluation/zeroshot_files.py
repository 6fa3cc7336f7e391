"""Zero-shot questions from local JSON-lines files, made into tasks of lm-eval.

One JSON object per line, all lines of a file of one kind:

- ``query``, ``choices``, ``gold``: multiple choice. Every choice is scored as the continuation of the query.
- ``context_options``, ``continuation``, ``gold``: partial-context scoring, as WinoGrande is done. The continuation
  is scored after every context.

``gold`` is the index of the right choice or context, from 0.

**What the model reads.** Context, one blank, continuation, as in lm-eval. A query that begins with ``Question:`` and
does not end with ``Answer:`` gets a last line ``Answer:``. That is the prompt of lm-eval's own ``arc_easy`` and
``piqa``, so the same questions give the same number from a file and from the hub. Every other text is used as it is.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from slablm.errors import SlabError

MULTIPLE_CHOICE = ("query", "choices", "gold")
PARTIAL_CONTEXT = ("context_options", "continuation", "gold")


def local_task(path: Path) -> Any:
    """A task of lm-eval (``ConfigurableTask``) named after the file, without its suffix.

    The questions are held in memory: `datasets` writes no cache, and an edited file is never mistaken for the old one.

    Raises:
        SlabError: as in `read_questions`.
    """
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    questions = read_questions(path)
    partial = "continuation" in questions[0]
    # A name of a column stands for its value. With an integer as its text, lm-eval takes the choices as contexts, the
    # target as the continuation, and the integer as the index of the right one.
    columns = ("gold", "context_options", "continuation") if partial else ("query", "choices", "gold")
    return ConfigurableTask(
        config={
            "task": path.stem,
            "custom_dataset": lambda **_: {"test": Dataset.from_list(questions)},
            "test_split": "test",
            "output_type": "multiple_choice",
            **dict(zip(("doc_to_text", "doc_to_choice", "doc_to_target"), columns, strict=True)),
            # Contexts are no answers whose length could be divided out.
            "metric_list": [
                {"metric": metric, "aggregation": "mean", "higher_is_better": True}
                for metric in (("acc",) if partial else ("acc", "acc_norm"))
            ],
        }
    )


def read_questions(path: Path) -> list[dict[str, Any]]:
    """Read and check a task file; blank lines are skipped.

    Returns:
        One dict per question with the fields of its kind and no others; queries are prompts already.

    Raises:
        SlabError: the file is missing, empty or no UTF-8, or a line is malformed (named by its number).
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise SlabError(f"task file {str(path)!r} cannot be read: {reason}") from error
    questions: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            question = _parse(line)
            if questions and question.keys() != questions[0].keys():
                raise SlabError(f"not the same kind as the lines before it, which have {', '.join(questions[0])}")
        except SlabError as error:
            raise SlabError(f"task file {str(path)!r}, line {number}: {error}") from error
        questions.append(question)
    if not questions:
        raise SlabError(f"task file {str(path)!r} holds no questions: one JSON object per line is expected")
    return questions


def _parse(line: str) -> dict[str, Any]:
    """One checked question; the caller adds file and line to the error."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise SlabError(f"not valid JSON ({error})") from error
    if not isinstance(row, dict):
        raise SlabError(f"must be a JSON object, got {type(row).__name__}")
    fields = PARTIAL_CONTEXT if "context_options" in row or "continuation" in row else MULTIPLE_CHOICE
    missing = [field for field in fields if field not in row]
    if missing:
        raise SlabError(
            f"{', '.join(missing)} missing: a question has {', '.join(MULTIPLE_CHOICE)} or {', '.join(PARTIAL_CONTEXT)}"
        )
    text, options = ("continuation", "context_options") if fields is PARTIAL_CONTEXT else ("query", "choices")
    question = {field: row[field] for field in fields}
    _check(question, text, options)
    if text == "query":
        question["query"] = _prompt(question["query"])
    return question


def _check(question: dict[str, Any], text: str, options: str) -> None:
    if not _is_text(question[text]):
        raise SlabError(f"{text} must be a text that is not blank, got {question[text]!r}")
    candidates, gold = question[options], question["gold"]
    if not isinstance(candidates, list) or len(candidates) < 2 or not all(map(_is_text, candidates)):
        raise SlabError(f"{options} must be a list of at least 2 texts that are not blank, got {candidates!r}")
    if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < len(candidates):
        raise SlabError(f"gold must be an index from 0 to {len(candidates) - 1}, got {gold!r}")


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _prompt(query: str) -> str:
    """The query with lm-eval's answer line, see the module's docstring."""
    if not query.startswith("Question:") or query.rstrip().endswith("Answer:"):
        return query
    return f"{query.rstrip()}\nAnswer:"
