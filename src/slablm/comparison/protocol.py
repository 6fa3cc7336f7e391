"""By what models are judged: which windows calibrate, on which ones choices were made, and on which claims rest.

The three are disjoint, or nothing is measured. A text that was fitted to, or by which methods and settings were chosen,
makes what was chosen look better than it is. Calibration windows are drawn at random (`slablm.calibration.windows`);
several draws tell how much of a difference is their chance. The development windows are only named, so that the results
say which they were. All that belongs to the protocol goes into every record: texts, windows, tokens, and whether
windows begin with a BOS token. Cells that were measured otherwise have another key and are never mixed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from slablm.calibration.windows import (
    EvaluationText,
    adds_bos,
    calibration_pool,
    calibration_windows,
    check_disjoint,
    check_length,
    draw,
)
from slablm.comparison.measure import Conditions, Tasks, model_digest
from slablm.config import CompressionConfig, Excerpt
from slablm.errors import SlabError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Court:
    """What models are judged by.

    Attributes:
        texts: to evaluate on, perhaps with ranges of windows; the main one first.
        development: windows of texts on which choices were made.
        max_windows: only the first windows of each text; None for all.
        seq_len: tokens per evaluation window.
        tasks: zero-shot tasks.
    """

    texts: tuple[str, ...]
    development: tuple[str, ...]
    max_windows: int | None
    seq_len: int
    tasks: Tasks

    def read(self) -> Hearing:
        """Read what there is to read before a model is loaded.

        Raises:
            SlabError: a text or a task file cannot be read, or two texts have one name.
        """
        names = [Excerpt.parse(text).name for text in self.texts]
        for index, name in enumerate(names):
            if name in names[:index]:
                raise SlabError(f"two evaluation texts are called {name}: give each once, in a file of its own name")
        self.tasks.identity()
        texts = {
            name: EvaluationText.read(text, self.seq_len, self.max_windows)
            for name, text in zip(names, self.texts, strict=True)
        }
        return Hearing(self, texts, [EvaluationText.read(text, self.seq_len) for text in self.development])


@dataclass(frozen=True)
class Hearing:
    """A court with its texts at hand.

    Attributes:
        court: the court.
        texts: what to evaluate on, by its name without folders: a file that has moved is the same text.
        development: the texts on which choices were made; several may have one name.
    """

    court: Court
    texts: dict[str, EvaluationText]
    development: list[EvaluationText]

    def conditions(
        self, source: str, config: CompressionConfig, draws: int, load_options: dict[str, Any]
    ) -> Conditions:
        """Load the model once to check it, to read its digest and to cut the texts.

        Args:
            source: the dense model, as for `slablm.dense.loading.load`.
            config: calibration text, number and length of its windows, first seed, targets and BOS.
            draws: how often calibration windows will be drawn.
            load_options: dtype, device and so on for `slablm.dense.loading.load`.

        Raises:
            SlabError: the model cannot be used, a text is too short, or windows overlap.
        """
        from slablm.compression.preparation import check_model
        from slablm.dense import loading
        from slablm.dense.targets import select_targets

        model, tokenizer = loading.load(source, **load_options)
        check_model(model)
        select_targets(model, config)
        check_length(model, self.court.seq_len)
        texts, calibration = self._cut(model, tokenizer, config, draws)
        return Conditions(
            load=lambda: loading.load(source, **load_options)[0],
            tokenizer=tokenizer,
            model_digest=model_digest(model),
            base=config,
            calibration=calibration,
            texts=texts,
            tasks=self.court.tasks,
            bos=config.bos,
            description={
                "model": source,
                "dtype": str(model.dtype).removeprefix("torch."),
                "device": model.device.type,
                **self._words(tokenizer, config, draws, texts),
            },
        )

    def _cut(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: CompressionConfig, draws: int
    ) -> tuple[dict[str, Tensor], Any]:
        """Evaluation windows by text, and what gives the windows of a draw."""
        seq_len, bos = self.court.seq_len, config.bos
        texts = {name: text.cut(tokenizer, seq_len, bos=bos) for name, text in self.texts.items()}
        named = [(f"evaluation on {name}", windows) for name, windows in texts.items()]
        development = [(text.excerpt.name, text.cut(tokenizer, seq_len, bos=bos)) for text in self.development]
        named += [(f"development on {name}", windows) for name, windows in development]
        every = [replace(config, seed=config.seed + i) for i in range(draws)]
        if config.calibration == "self":
            check_disjoint(named)
            drawn = {each.seed: calibration_windows(model, tokenizer, each) for each in every}
        else:
            pool = calibration_pool(tokenizer, config)
            check_length(model, config.seq_len)
            check_disjoint([(f"calibration on {config.calibration}", pool), *named])
            drawn = {each.seed: draw(pool.ids, each) for each in every}
        return {name: windows.ids for name, windows in texts.items()}, lambda asked: drawn[asked.seed]

    def _words(
        self, tokenizer: PreTrainedTokenizerBase, config: CompressionConfig, draws: int, texts: dict[str, Tensor]
    ) -> dict[str, Any]:
        """The protocol in words."""
        seq_len, tasks = self.court.seq_len, self.court.tasks
        words = {
            "calibration": Excerpt.parse(config.calibration).name,
            "calibration windows": f"{config.num_samples} of {config.seq_len} tokens, drawn by seed"
            + (f", {draws} draws" if draws > 1 else ""),
            "evaluation": ", ".join(self.texts),
            "evaluation windows": ", ".join(f"{len(windows)} of {seq_len} tokens" for windows in texts.values()),
            "development windows": ", ".join(text.excerpt.name for text in self.development) or "not named",
        }
        if not adds_bos(tokenizer):
            words["BOS"] = "none: the tokenizer adds none"
        else:
            words["BOS"] = "begins each window" if config.bos else "none but the text's own"
        if tasks:
            words["tasks"] = ", ".join((*tasks.names, *(file.name for file in tasks.files)))
            words["questions per task"] = "all" if tasks.limit is None else f"the first {tasks.limit}"
        return words
