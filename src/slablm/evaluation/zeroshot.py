"""Zero-shot accuracy, measured by lm-eval (EleutherAI's lm-evaluation-harness).

A question has a context c and answers a₁ … aₙ, none of which the model has to write. It answers with the one that it
finds most likely:

    answer = argmax over i of  Σₜ log p(token t of aᵢ | c, tokens of aᵢ before t)

The accuracy ``acc`` is the fraction of questions answered right. It is the headline here for every task, as in the
pruning literature. ``acc_norm`` divides each sum by the answer's length in characters first; it is reported beside it
where the task defines it. The standard error is s / √questions, with s the standard deviation of the 0/1 scores.

Two models that answered the same questions are best compared question by question, so the scores are kept.

Prompts, tokenisation and scoring are lm-eval's own, for tasks from the hub and for local files alike. A text begins
with a BOS token where the tokenizer says so, or, without `bos`, never. The one departure: log-probabilities are
taken in float32 whatever the model's dtype. In bfloat16, lm-eval's default, they have 8 bits and answers tie.
"""

from __future__ import annotations

import copy
import difflib
import functools
import importlib.util
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slablm.errors import SlabError
from slablm.system.float32 import fast_float32

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SLAB_PAPER = "slab-paper"
# The seven tasks of the pruning literature (Wanda, Sun et al. 2023). The SLaB paper reports a mean over zero-shot
# tasks in that tradition; that its list is exactly this one could not be confirmed.
SLAB_PAPER_TASKS = ("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")

# Tasks that define few-shot examples of their own draw the same ones in every run.
FEWSHOT_SEED = 1234


@dataclass(frozen=True)
class TaskResult:
    """Answers to the questions of one task.

    Attributes:
        correct: per question 1 (right) or 0, in the task's order; of several models, the mean.
        correct_norm: the same when log-likelihoods are divided by the answers' lengths; None where the task does not
            define it.
    """

    correct: tuple[float, ...]
    correct_norm: tuple[int, ...] | None = None

    @property
    def accuracy(self) -> float:
        """Fraction answered right (``acc``)."""
        return _mean(self.correct)

    @property
    def stderr(self) -> float:
        """Standard error of `accuracy`; NaN for a single question."""
        return _stderr(self.correct)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form: acc, stderr, n, correct, and the same with ``_norm`` where the task has it.

        A standard error that does not exist is None.
        """
        result = {"acc": self.accuracy, "stderr": _or_none(self.stderr), "n": len(self.correct)}
        if self.correct_norm is None:
            return {**result, "correct": list(self.correct)}
        return {
            **result,
            "acc_norm": _mean(self.correct_norm),
            "stderr_norm": _or_none(_stderr(self.correct_norm)),
            "correct": list(self.correct),
            "correct_norm": list(self.correct_norm),
        }


@fast_float32()
def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    task_files: Sequence[Path],
    limit: int | None = None,
    *,
    bos: bool = True,
) -> dict[str, TaskResult]:
    """Measure a model's accuracy on tasks from the hub and on local files.

    Args:
        model: any causal language model, dense or compressed.
        tokenizer: its tokenizer; it is not changed.
        tasks: names that lm-eval knows, or ``slab-paper``.
        task_files: JSON-lines files, see `slablm.evaluation.zeroshot_files`.
        limit: use only the first questions of every task.
        bos: as for `score_tasks`.

    Returns:
        Task name → result. A local task has its file's name without the suffix; a group has its members.

    Raises:
        SlabError: as in `load_tasks` and `score_tasks`.
    """
    check_limit(limit)
    return score_tasks(model, tokenizer, load_tasks(tasks, task_files), limit, bos=bos)


def load_tasks(tasks: Sequence[str], task_files: Sequence[Path]) -> dict[str, Any]:
    """Find tasks and read their questions, before any model is loaded. Local files need no network.

    Args:
        tasks: names that lm-eval knows, or ``slab-paper``.
        task_files: JSON-lines files.

    Returns:
        Name → task of lm-eval, files last.

    Raises:
        SlabError: lm-eval is not installed, a name is unknown, double or has no accuracy, a dataset cannot be
            fetched, a file is missing or malformed.
    """
    if not tasks and not task_files:
        raise SlabError("no tasks to evaluate: name some with --tasks, or give --task-file")
    if importlib.util.find_spec("lm_eval") is None:
        raise SlabError("zero-shot tasks need lm-eval: pip install 'slablm[eval]'")
    from slablm.evaluation.zeroshot_files import local_task

    names = [name for task in tasks for name in (SLAB_PAPER_TASKS if task == SLAB_PAPER else (task,))]
    with _only_errors():
        # Files first: reading them is quick, fetching datasets is not.
        local = [{file.stem: local_task(file)} for file in task_files]
        hub = [_hub_tasks(name) for name in names]
    found: dict[str, Any] = {}
    for name, task in ((name, task) for group in hub + local for name, task in group.items()):
        if name in found:
            raise SlabError(f"two tasks are called {name!r} (a file's task has the file's name): drop or rename one")
        found[name] = task
    return found


def score_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Mapping[str, Any],
    limit: int | None = None,
    batch_size: int = 1,
    *,
    bos: bool = True,
) -> dict[str, TaskResult]:
    """Let a model answer the questions of loaded tasks.

    Args:
        model: any causal language model.
        tokenizer: its tokenizer; it is not changed.
        tasks: as `load_tasks` returns them; they can be scored again with another model.
        limit: use only the first questions of every task.
        batch_size: answers scored at a time. Larger is faster on GPUs and takes batch_size · tokens · vocabulary
            floats of memory.
        bos: whether a text begins with a BOS token, where the tokenizer begins texts with one.

    Returns:
        Task name → result.

    Raises:
        SlabError: the limit is below 1, the model yields NaN, or an answer does not fit the model's context.
    """
    check_limit(limit)
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    for task in tasks.values():
        task.set_fewshot_seed(FEWSHOT_SEED)
    with _only_errors():
        lm = HFLM(
            pretrained=model,
            tokenizer=copy.deepcopy(tokenizer),  # it is given a padding token where it has none
            batch_size=batch_size,
            softmax_dtype="float32",
            add_bos_token=None if bos else False,  # None: as the tokenizer has it
        )
    try:
        answers = evaluate(lm=lm, task_dict={"tasks": dict(tasks)}, limit=limit, bootstrap_iters=0, log_samples=True)
    except AssertionError as error:
        raise SlabError(f"an answer has no tokens, or more than the {lm.max_length} the model can read") from error
    return {name: _result(name, answers["samples"][name]) for name in tasks}


def check_limit(limit: int | None) -> None:
    """Refuse a limit that leaves no question.

    Raises:
        SlabError: it is below 1.
    """
    if limit is not None and limit < 1:
        raise SlabError(f"limit counts questions and must be at least 1, got {limit}")


def _hub_tasks(name: str) -> dict[str, Any]:
    """The tasks behind a name of lm-eval: itself, or the members of a group."""
    from datasets.exceptions import DatasetsError

    manager = _task_manager()
    if name not in manager.all_tasks:
        near = difflib.get_close_matches(name, manager.all_tasks, n=3)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "`lm-eval ls tasks` lists them"
        raise SlabError(f"lm-eval knows no task {name!r}: {hint}")
    try:
        found: dict[str, Any] = manager.load([name])["tasks"]
    except ConnectionError as error:
        raise SlabError(
            f"the data of task {name!r} cannot be fetched ({_one_line(error)}): go online once, or give --task-file"
        ) from error
    except (DatasetsError, OSError, ValueError, RuntimeError, ImportError, KeyError) as error:
        raise SlabError(f"task {name!r} cannot be loaded: {_one_line(error)}") from error
    for member, task in found.items():
        metrics = sorted(task.aggregation())
        if "acc" not in metrics:
            raise SlabError(f"task {member!r} has no accuracy, it is measured by {', '.join(metrics)}: leave it out")
    return found


@functools.cache
def _task_manager() -> Any:
    """The list of lm-eval's tasks: seconds to build, so it is built once."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _result(name: str, samples: list[dict[str, Any]]) -> TaskResult:
    """The 0/1 scores in what lm-eval logged."""
    # A task may post-process answers in several ways; the first is the task's own.
    samples = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
    for index, sample in enumerate(samples):
        # Pairs (log-likelihood, whether it is what greedy decoding would write).
        scores = [response[0] for response in sample["filtered_resps"] if isinstance(response, tuple)]
        if any(math.isnan(score) for score in scores):
            raise SlabError(
                f"task {name!r}, question {index}: a log-likelihood is NaN: the model's numbers overflow, try "
                "--dtype float32"
            )
        if sample["acc"] not in (0, 1):
            raise SlabError(f"task {name!r} scores questions other than by 0 or 1 ({sample['acc']!r}): leave it out")
    norm = tuple(int(sample["acc_norm"]) for sample in samples) if "acc_norm" in samples[0] else None
    return TaskResult(tuple(int(sample["acc"]) for sample in samples), norm)


@contextmanager
def _only_errors() -> Iterator[None]:
    """Silence lm-eval's notices about its own defaults; those about cut texts, later on, are heard."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _mean(scores: Sequence[float]) -> float:
    return sum(scores) / len(scores)


def _stderr(scores: Sequence[float]) -> float:
    count, mean = len(scores), _mean(scores)
    if count < 2:
        return math.nan
    return math.sqrt(sum((score - mean) ** 2 for score in scores) / (count - 1) / count)


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
