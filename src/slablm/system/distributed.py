"""Several processes that compress one model together: ranks of torch.distributed, started by ``torchrun``.

Compression has two kinds of work, and each is divided in its own way. A block is *run* window by window, so every
rank keeps a contiguous share of the calibration windows and runs the block on those. A block is *decomposed* matrix by
matrix, so every rank decomposes some of the matrices. After either there is one exchange: of statistics, each to the
ranks that own matrices of these inputs; and of packed weights, which every rank needs to run its windows through the
compressed block.

    read block  →  run own windows  →  deliver statistics  →  decompose own matrices  →  exchange packed weights  →
    run own windows through the result;  rank 0 writes the block into the journal

The numbers do not depend on the number of ranks. Windows never meet before their sums are formed, and the exchange
hands over sums that all ranks then add up as one process does: squares call by call in the order of the windows, XᵀX by
the nodes of a tree (`slablm.calibration.pairwise`). A matrix is decomposed by one rank as one process would. So the
result has the same bits (on the same kind of CPU or GPU and with the same number of threads, as ever).

When a rank ends too early, the others find their connection closed, or torchrun sends them SIGTERM. Either becomes a
`LostRankError`, and one of them says so.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from slablm.errors import SlabError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import Store  # type: ignore[attr-defined]

# A dead rank is noticed at once. This is for hosts that fall silent; the longest honest wait is for one huge matrix.
_PATIENCE = timedelta(hours=2)
_MEETING = timedelta(minutes=5)
# How long other ranks leave it to rank 0, which knows the journal, to say that a rank was lost.
_RANK_0_FIRST = timedelta(seconds=5)
_SAID = "said"


class LostRankError(SlabError):
    """Another rank has ended, or cannot be reached."""


@dataclass(frozen=True)
class World:
    """This process among those that compress one model; by default it is alone.

    Its exchanges are collective: every rank makes the same ones in the same order. Alone, they do nothing.

    Attributes:
        rank: number of this process.
        size: number of processes.
        device: where this rank computes, and where exchanged tensors are.
        restarted: whether torchrun has started the ranks anew after a failure; rank 0 always knows.
    """

    rank: int = 0
    size: int = 1
    device: str = "cpu"
    restarted: bool = False

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which alone writes and speaks."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """This rank's part of `count` things in a row. If they do not divide evenly, the last ranks have one more."""
        return range(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def tell(self, value: Any) -> Any:
        """What rank 0 calls this with, on every rank.

        Raises:
            LostRankError: another rank is gone.
        """
        if self.size == 1:
            return value
        import torch
        import torch.distributed as dist

        values = [value]
        with _connected():
            dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
        return values[0]

    def gather(self, notes: Any, tensors: Mapping[str, Tensor]) -> list[tuple[Any, dict[str, Tensor]]]:
        """What every rank calls this with, by rank, on every rank.

        Args:
            notes: anything small that can be pickled.
            tensors: tensors on `device`, of any types and shapes, by any names.

        Raises:
            LostRankError: another rank is gone.
        """
        if self.size == 1:
            return [(notes, dict(tensors))]
        import torch
        import torch.distributed as dist

        told: list[Any] = [None] * self.size
        gathered = []
        with _connected():
            dist.all_gather_object(told, (notes, {name: (t.shape, t.dtype) for name, t in tensors.items()}))
            for rank, (their_notes, forms) in enumerate(told):
                theirs = {}
                for name, (shape, dtype) in forms.items():
                    theirs[name] = torch.empty(shape, dtype=dtype, device=self.device)
                    if rank == self.rank:
                        theirs[name] = tensors[name].contiguous()
                    if theirs[name].numel():  # as bytes: backends do not know all types
                        dist.broadcast(theirs[name].reshape(-1).view(torch.uint8), src=rank)
                gathered.append((their_notes, theirs))
        return gathered

    def deliver(
        self, tensors: dict[str, Tensor], readers: Mapping[str, Collection[int]]
    ) -> Iterator[tuple[int, str, Tensor]]:
        """Hand tensors to the ranks that read them, one at a time, in the order of their names.

        Args:
            tensors: on `device`, of any types and shapes, by any names; used up, so that what nobody here reads is
                given back as soon as it is sent.
            readers: the ranks that read each.

        Yields:
            Of every tensor that this rank reads: the rank it comes from, its name, the tensor.

        Raises:
            LostRankError: another rank is gone.
        """
        if self.size == 1:
            for name in sorted(tensors):
                yield 0, name, tensors.pop(name)
            return
        import torch
        import torch.distributed as dist

        forms: list[Any] = [None] * self.size
        with _connected():
            mine = {name: (tensor.shape, tensor.dtype, sorted(readers[name])) for name, tensor in tensors.items()}
            dist.all_gather_object(forms, mine)
        parcels = sorted((name, rank) for rank, theirs in enumerate(forms) for name in theirs)
        for name, rank in parcels:  # all ranks go through one list, so nobody waits for a rank that waits for him
            shape, dtype, to = forms[rank][name]
            if rank != self.rank and self.rank not in to:
                continue
            value = (
                tensors.pop(name).contiguous()
                if rank == self.rank
                else torch.empty(shape, dtype=dtype, device=self.device)
            )
            as_bytes = value.reshape(-1).view(torch.uint8)  # backends do not know all types
            with _connected():
                for reader in to if rank == self.rank and len(as_bytes) else ():
                    if reader != rank:
                        dist.send(as_bytes, reader)
                if rank != self.rank and len(as_bytes):
                    dist.recv(as_bytes, rank)
            if self.rank in to:
                yield rank, name, value


ALONE = World()


def assign(costs: Mapping[str, float], size: int) -> dict[str, int]:
    """Divide tasks among ranks: the longest task first, always to the rank with the least to do so far.

    The busiest rank then has at most 4/3 of the shortest possible time (Graham 1969). Of equally busy ranks the last
    one gets the task: rank 0 also writes the journal.

    Args:
        costs: cost of every task by name, in any unit.
        size: number of ranks.

    Returns:
        The rank of every task.
    """
    loads, owners = [0.0] * size, {}
    for name in sorted(costs, key=lambda task: -costs[task]):
        owners[name] = min(reversed(range(size)), key=loads.__getitem__)
        loads[owners[name]] += costs[name]
    return owners


@contextmanager
def join(device: str) -> Iterator[World]:
    """Meet the other ranks, if this process was started by torchrun with others; otherwise be alone.

    When the ranks fail, one of them raises its error. The others leave by `SystemExit` with status 1.

    Args:
        device: ``cpu``, or ``cuda`` for one GPU per rank of this host.

    Raises:
        SlabError: the ranks cannot be reached, there are fewer GPUs than ranks; a rank was lost.
    """
    environment = os.environ
    restarted = int(environment.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    if int(environment.get("WORLD_SIZE", "1")) == 1 or "RANK" not in environment:
        yield World(device=device, restarted=restarted)
        return
    import torch.distributed as dist

    store, world = _meet(device, restarted)
    before = _raise_on_sigterm()
    try:
        yield world
    except Exception as error:
        if not _is_mine_to_say(store, world, error):
            raise SystemExit(1) from None
        if world.first or not isinstance(error, SlabError):
            raise
        raise SlabError(f"rank {world.rank} on {socket.gethostname()}: {error}") from error
    if before is not None:
        signal.signal(signal.SIGTERM, before)
    dist.destroy_process_group()


def _meet(device: str, restarted: bool) -> tuple[Store, World]:
    """Make the process group; also returns the store in which the ranks agree on who says what went wrong."""
    import torch
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    kind, _, number = device.partition(":")
    if number:
        raise SlabError(f"device {device!r} is one for all ranks: write {kind}, each rank takes the one of its number")
    if kind == "cuda":
        local, present = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= present:
            raise SlabError(
                f"rank {local} of this host has no GPU, there are {present}: use --nproc-per-node {present}"
            )
        device = f"cuda:{local}"
        torch.cuda.set_device(local)
    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
    try:
        store, rank, size = next(rendezvous("env://", timeout=_MEETING))
        restarted |= rank == 0 and store.add("slablm/starts", 1) > 1
        store = dist.PrefixStore(f"slablm/{_start_name(store, rank, size)}", store)  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_PATIENCE)
        # One that goes on and fails at once would be gone while others still connect to it.
        store.set(f"met/{rank}", "")
        store.wait([f"met/{other}" for other in range(size)], _MEETING)
    except (RuntimeError, ValueError) as error:
        raise SlabError(f"the other ranks cannot be reached ({_reason(error)}): see docs/distributed.md") from error
    return store, World(rank, size, device, restarted)


def _start_name(store: Store, rank: int, size: int) -> str:
    """A name for this start of the ranks, on which all agree and which no earlier start has had.

    torchrun keeps its store when it starts the ranks anew, and under the same keys gloo would find the addresses of
    dead ranks. (How often torchrun has done so differs between hosts.) So every rank knocks with a number of its own;
    rank 0 answers all knocks that it finds, those of the dead as well, until every rank has heard it.
    """
    mine = uuid.uuid4().hex
    if rank > 0:
        store.set(f"slablm/knock/{rank}", mine)
        name = store.get(f"slablm/answer/{mine}").decode()
        store.set(f"slablm/heard/{name}/{rank}", "")
        return name
    until, missing = time.monotonic() + _MEETING.total_seconds(), set(range(1, size))
    while missing:
        if time.monotonic() > until:
            raise RuntimeError(f"rank {min(missing)} has not come")
        for other in missing:
            if store.check([f"slablm/knock/{other}"]):
                store.set(f"slablm/answer/{store.get(f'slablm/knock/{other}').decode()}", mine)
        missing = {other for other in missing if not store.check([f"slablm/heard/{mine}/{other}"])}
        time.sleep(0.02)
    return mine


def _raise_on_sigterm() -> Any:
    """Let SIGTERM raise `LostRankError`: torchrun sends it when a rank has ended. Returns the handler before."""
    if threading.current_thread() is not threading.main_thread():
        return None

    def stop(number: int, frame: Any) -> None:
        raise _lost("SIGTERM from torchrun")

    return signal.signal(signal.SIGTERM, stop)


@contextmanager
def _connected() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # what backends raise has no better type in common
        raise _lost(_reason(error)) from error


def _lost(reason: str) -> LostRankError:
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it would say the same, in the middle of leaving
    return LostRankError(f"another rank has ended or cannot be reached ({reason})")


def _reason(error: Exception) -> str:
    """The first sentence of an error without the place in the C++ source in front."""
    first = (str(error).splitlines() or [type(error).__name__])[0]
    return first.split("] ", 1)[-1].split(". ", 1)[0]


def _is_mine_to_say(store: Store, world: World, error: Exception) -> bool:
    """Whether no other rank says what went wrong. A lost rank is for rank 0 to report, if it is alive."""
    if isinstance(error, LostRankError) and not world.first:
        try:
            store.wait([_SAID], _RANK_0_FIRST)
        except RuntimeError:  # nothing said, or the store has ended with its host
            return True
        return False
    try:
        return int(store.add(_SAID, 1)) == 1
    except RuntimeError:
        return True
