"""How fast models read and write, side by side.

Three quantities per run, for a prompt of p tokens and w new ones:

    prefill      p / time of one forward pass over the prompt (logits of the last token only, as `generate` does)
    first token  time from the call of `model.generate` to its first token
    decode       (w − 1) / time from the first token to the last, in that same call

`generate` is greedy and cannot stop early. The document case is the total time of one more call: read 512 tokens,
write 128. Where the machine has a counter (`slablm.evaluation.energy`), the energy of the last of these calls is told.

A machine's speed drifts by more than what is to be compared. So the contenders take turns: in every round each runs
once, and what is compared is the median over rounds of the ratio *within* a round, where the drift cancels.

Prompts are pseudo-random tokens: speed does not depend on what they say.
"""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from slablm.errors import SlabError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from slablm.evaluation.energy import RaplMeter

DOCUMENT_TOKENS = 512
SUMMARY_TOKENS = 128

Clock = Callable[[], float]


@dataclass(frozen=True)
class Workload:
    """What every contender does in every round.

    Attributes:
        prompt_tokens: tokens to read, 1 or more.
        new_tokens: tokens to write, 2 or more.
        document: also read `DOCUMENT_TOKENS` and write `SUMMARY_TOKENS`.

    Raises:
        SlabError: too few tokens.
    """

    prompt_tokens: int = 512
    new_tokens: int = 32
    document: bool = False

    def __post_init__(self) -> None:
        if self.prompt_tokens < 1:
            raise SlabError(f"a prompt needs at least 1 token, got {self.prompt_tokens}")
        if self.new_tokens < 2:
            raise SlabError(f"decode speed needs at least 2 new tokens, got {self.new_tokens}")

    def check(self, name: str, model: PreTrainedModel) -> None:
        """Refuse a workload that is longer than the model's position range.

        Raises:
            SlabError: naming the model and the longest prompt.
        """
        longest = getattr(model.config, "max_position_embeddings", None)
        if longest is None:
            return
        if self.prompt_tokens + self.new_tokens > longest:
            raise SlabError(
                f"{name}: {self.prompt_tokens} prompt tokens and {self.new_tokens} new ones are more than the model's "
                f"{longest} positions: use at most {longest - self.new_tokens} prompt tokens"
            )
        if self.document and longest < DOCUMENT_TOKENS + SUMMARY_TOKENS:
            raise SlabError(
                f"{name}: a document of {DOCUMENT_TOKENS} tokens and {SUMMARY_TOKENS} new ones are more than the "
                f"model's {longest} positions: leave the document out"
            )


@dataclass(frozen=True)
class Samples:
    """One quantity, measured once per round.

    Attributes:
        values: one per round, in order.
    """

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median over rounds."""
        return statistics.median(self.values)

    @property
    def spread(self) -> float | None:
        """Interquartile range; None for a single round."""
        if len(self.values) < 2:
            return None
        low, _, high = statistics.quantiles(self.values, n=4, method="inclusive")
        return high - low

    def ratio_to(self, other: Samples) -> float:
        """Median over rounds of the ratio within a round."""
        return statistics.median(mine / its for mine, its in zip(self.values, other.values, strict=True))


@dataclass(frozen=True)
class Speed:
    """What was measured for one contender.

    Attributes:
        contender: its name.
        threads: threads of torch and of the kernels.
        prefill: tokens per second.
        first_token: seconds; None where it was not measured.
        decode: tokens per second.
        document: seconds; None if it was not asked for.
        energy: joules of the document case, or else of the prompt and the new tokens; None without a meter.
    """

    contender: str
    threads: int
    prefill: Samples
    first_token: Samples | None
    decode: Samples
    document: Samples | None
    energy: Samples | None


@dataclass(frozen=True)
class Run:
    """One round of one contender; attributes as those of `Speed`."""

    prefill: float
    first_token: float | None
    decode: float
    document: float | None
    energy: float | None


class Program(Protocol):
    """A contender that is no model of transformers, and measures itself."""

    def run(self, workload: Workload, threads: int) -> Run:
        """Measure once."""


class _TokenTimes:
    """A transformers streamer that notes when tokens come; the first call of `put` is the prompt."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.times = clock, list[float]()

    def put(self, tokens: Tensor) -> None:
        self.times.append(self.clock())

    def end(self) -> None:
        pass


def measure_speed(
    contenders: Mapping[str, PreTrainedModel | Program],
    workload: Workload,
    rounds: int,
    threads: Sequence[int],
    *,
    clock: Clock = time.perf_counter,
    meter: RaplMeter | None = None,
    on_run: Callable[[int, int], None] | None = None,
) -> list[Speed]:
    """Measure the contenders in turns: for each thread count, for each round, each contender once.

    Before the first round of a thread count, each contender runs once unmeasured.

    Args:
        contenders: name → model in eval mode, on the CPU; or another program.
        workload: what each does.
        rounds: how often, 1 or more.
        threads: thread counts, each 1 or more; the present one is restored afterwards.
        clock: seconds.
        meter: the machine's energy counter.
        on_run: called after each run, the unmeasured ones included, with (runs done, runs in all).

    Returns:
        One entry per thread count and contender, in that order.

    Raises:
        SlabError: no rounds, no threads, or a workload too long for a model.
    """
    if rounds < 1:
        raise SlabError(f"at least 1 round is needed, got {rounds}")
    if not threads or min(threads) < 1:
        raise SlabError(f"thread counts must be 1 or more, got {', '.join(map(str, threads)) or 'none'}")
    for name, contender in contenders.items():
        if isinstance(contender, nn.Module):
            workload.check(name, contender)
    speeds, done, total = [], 0, len(threads) * (rounds + 1) * len(contenders)
    for count in threads:
        runs: dict[str, list[Run]] = {name: [] for name in contenders}
        with _threads(count):
            for _ in range(rounds + 1):
                for name, contender in contenders.items():
                    if isinstance(contender, nn.Module):
                        runs[name].append(_run(contender, workload, clock, meter))
                    else:
                        runs[name].append(contender.run(workload, count))
                    done += 1
                    if on_run is not None:
                        on_run(done, total)
        speeds += [_summary(name, count, runs[name][1:]) for name in contenders]
    return speeds


def prompt(model: PreTrainedModel, tokens: int) -> Tensor:
    """Pseudo-random token ids, always the same, [1, tokens] int64."""
    embedding: Any = model.get_input_embeddings()
    return torch.randint(embedding.num_embeddings, (1, tokens), generator=torch.Generator().manual_seed(0))


def write(model: PreTrainedModel, tokens: Tensor, new_tokens: int, streamer: Any = None) -> Tensor:
    """Greedy continuation of exactly `new_tokens` tokens.

    Args:
        model: in eval mode.
        tokens: the prompt, [1, p] int64.
        new_tokens: how many to write.
        streamer: told about every token.

    Returns:
        Prompt and continuation, [1, p + new_tokens] int64.
    """
    output: Tensor = model.generate(  # type: ignore[operator]
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=0,
        streamer=streamer,
    )
    return output


def weight_bytes(model: nn.Module) -> int:
    """Bytes that a model's weights take in memory.

    Parameters and buffers; memory that several share (tied embeddings) is counted once.
    """
    storages = [tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers())]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _run(model: PreTrainedModel, workload: Workload, clock: Clock, meter: RaplMeter | None) -> Run:
    tokens = prompt(model, workload.prompt_tokens)
    start = clock()
    _read(model, tokens)
    prefill = workload.prompt_tokens / (clock() - start)
    streamer = _TokenTimes(clock)
    joules = meter.start() if meter else None
    start = clock()
    write(model, tokens, workload.new_tokens, streamer)
    _, first, *_, last = streamer.times
    document = None
    if workload.document:
        tokens = prompt(model, DOCUMENT_TOKENS)
        joules = meter.start() if meter else None
        begin = clock()
        write(model, tokens, SUMMARY_TOKENS)
        document = clock() - begin
    energy = joules() if joules else None
    return Run(prefill, first - start, (workload.new_tokens - 1) / (last - first), document, energy)


@torch.no_grad()
def _read(model: PreTrainedModel, tokens: Tensor) -> None:
    keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
    model(input_ids=tokens, use_cache=True, **({"logits_to_keep": 1} if keeps else {}))


def _summary(name: str, threads: int, runs: Sequence[Run]) -> Speed:
    def samples(quantity: str) -> Samples | None:
        values = tuple(getattr(run, quantity) for run in runs)
        return None if None in values else Samples(values)

    prefill, decode = (Samples(tuple(values)) for values in zip(*((r.prefill, r.decode) for r in runs), strict=True))
    others = {quantity: samples(quantity) for quantity in ("first_token", "document", "energy")}
    return Speed(contender=name, threads=threads, prefill=prefill, decode=decode, **others)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
