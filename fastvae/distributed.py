"""Many processes that train as one: `torchrun --nproc-per-node=N -m fastvae train ...`, on one node or many.

Rank r of N takes examples [r B/N, (r+1) B/N) of every batch of B, and a contiguous part of the test set. Order and
noise go by the index of an example in its batch, gradients and metrics are averaged over the ranks, so N ranks train as
one up to the rounding of that average. Rank 0 alone reads and writes the run directory; the data must be on every node.

Ranks take every decision together: what only one of them can know (a bad file, a signal) is told to all before any
acts on it, because a rank that left alone would leave the others waiting for it.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import os
import secrets
import socket
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastvae.errors import FastvaeError, RankLost, Stopped, one_line

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

__all__ = ["ALONE", "Meetings", "Ranks", "Replica", "join", "torchrun_job"]

T = TypeVar("T")

MEETING_SECONDS = 1.0
"""About how often ranks ask each other whether a signal has come: much below the 30 s that torchrun leaves them."""


@dataclass(frozen=True)
class Ranks:
    """Who this process is among those that train together, and how they talk; with one rank everything is at once."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that writes and prints."""
        return self.rank == 0

    def part(self, count: int) -> tuple[int, int]:
        """Start and end of this rank's contiguous part of `count` things; the parts differ by one at most."""
        return self.rank * count // self.size, (self.rank + 1) * count // self.size

    def sum(self, values: Tensor) -> Tensor:
        """`values`, added up in place over the ranks."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def mean(self, values: Tensor) -> Tensor:
        """`values`, averaged in place over the ranks."""
        return self.sum(values).div_(self.size)

    def together(self, work: Callable[[], T]) -> T:
        """The result of `work`, done on every rank; a FastvaeError on any of them is raised on all.

        The first rank of each node goes before the others, which then find in the cache what it has downloaded.
        """
        if self.size == 1:
            return work()
        result: list[T] = []
        for my_turn in (self.local_rank == 0, self.local_rank != 0):
            error = None
            if my_turn:
                try:
                    result.append(work())
                except FastvaeError as raised:
                    error = str(raised)
            for said in self._gather(error):
                if said is not None:
                    raise FastvaeError(said)
        return result[0]

    def from_main(self, work: Callable[[], T]) -> T:
        """The result of `work`, done on rank 0 alone and sent to all; its FastvaeError is raised on all."""
        if self.size == 1:
            return work()
        message: list[Any] = [None, None]
        if self.is_main:
            try:
                message[0] = work()
            except FastvaeError as raised:
                message[1] = str(raised)
        dist.broadcast_object_list(message)
        if message[1] is not None:
            raise FastvaeError(message[1])
        result: T = message[0]
        return result

    def check_same(self, facts: Mapping[str, object]) -> None:
        """Raises: FastvaeError, which names the first of `facts` that is not equal on all ranks."""
        if self.size == 1:
            return
        everyones: list[dict[str, object]] = self._gather(dict(facts))
        for name, first in everyones[0].items():
            for rank, others in enumerate(everyones):
                if others[name] != first:
                    raise FastvaeError(f"{name} is {first} on rank 0 and {others[name]} on rank {rank}")

    def _gather(self, value: object) -> list[Any]:
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values


ALONE = Ranks()

_LEFT: list[dist.ProcessGroup | None] = []
"""Groups that an error has left; they live as long as the process."""


@contextlib.contextmanager
def join() -> Iterator[Ranks]:
    """The ranks that `torchrun` has started, connected; `ALONE` without it. A group that exists already is used.

    Raises: RankLost where another rank has left, for whatever reason.
    """
    if dist.is_available() and dist.is_initialized():
        yield Ranks(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", dist.get_rank())))
        return
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ALONE
        return
    # DistributedDataParallel imports it; its functions keep, as a default argument, a group that is there by then
    import torch.distributed.nn
    from torch.distributed.rendezvous import rendezvous

    # what ranks tell each other goes through host memory, gradients on a GPU through NCCL
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    store, rank, size = next(rendezvous("env://"))
    dist.init_process_group(backend, store=_met(store, rank, size), rank=rank, world_size=size)
    ranks = Ranks(rank, size, int(os.environ["LOCAL_RANK"]))
    stopped = None
    try:
        try:
            yield ranks
        except Stopped as raised:
            stopped = raised
            traceback.clear_frames(raised.__traceback__)
        # nobody leaves before rank 0 has written the last file
        ranks.sum(torch.zeros(1))
        # gloo's threads end with the group, if nothing else holds it: one of them that lets go of a tensor while Python
        # shuts down aborts the process
        gc.collect()
    except BaseException as error:
        # the frames of the error hold a reducer, which must not be the last to hold the group: it would wait for those
        # threads, and have the lock of Python that they wait for
        _LEFT.append(dist.group.WORLD)
        if isinstance(error, RuntimeError) and (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise RankLost(f"rank {ranks.rank} has lost another: {one_line(error)}") from error
        raise
    finally:
        # waits for no other rank, and tells whoever waits for this one
        dist.destroy_process_group()
    if stopped is not None:
        raise stopped


def _met(store: Store, rank: int, size: int) -> Store:
    """The part of `store` that this start of all ranks has to itself; returns when all of them are there.

    torchrun keeps one store through all its restarts: the first rank to come back would find the addresses that the
    others had before, and wait in vain. Each rank says a word that is new, and what words it sees of the others. What
    equals a list with the own word in it was said in this start, and once all say the same list nobody waits for more.
    """
    from torch.distributed.distributed_c10d import PrefixStore

    store.set(f"here/{rank}", secrets.token_hex(8))
    while True:
        words = b" ".join(store.multi_get([f"here/{other}" for other in range(size)])).decode()
        store.set(f"seen/{rank}", words)
        if all(seen.decode() == words for seen in store.multi_get([f"seen/{other}" for other in range(size)])):
            return PrefixStore(hashlib.sha256(words.encode()).hexdigest(), store)
        time.sleep(0.02)


class Meetings:
    """How ranks stop after the same step, though a signal may have reached only one of them.

    About once a second they take the largest of their signal numbers. Rank 0's clock decides after how many steps they
    meet again, as part of what they exchange. Host memory alone is involved: a CUDA device is not waited for.
    """

    def __init__(self, ranks: Ranks, done: int) -> None:
        self.ranks, self.interval = ranks, 1
        self.met, self.next = time.monotonic(), done + 1

    def __call__(self, done: int, signum: int) -> int:
        """The signal to obey after `done` steps, 0 for none, the same on every rank."""
        if self.ranks.size == 1:
            return signum
        if done < self.next:
            return 0
        now = time.monotonic()
        per_second = self.interval / (now - self.met)
        # at most doubled: the first steps are slower than the rest
        interval = min(2 * self.interval, max(1, int(MEETING_SECONDS * per_second)))
        exchanged = torch.tensor([signum, interval if self.ranks.is_main else 0])
        dist.all_reduce(exchanged, dist.ReduceOp.MAX)
        signum, self.interval = exchanged.tolist()
        self.met, self.next = now, done + self.interval
        return signum


class Replica(nn.Module):
    """A loss module under DistributedDataParallel, with metrics that are averaged along with the gradients.

    `metrics` is a parameter of zeros that is multiplied with (loss, nll, kl) and added to the loss: the loss is
    unchanged, the gradient of `metrics` is those numbers, and DistributedDataParallel averages it over the ranks in the
    same message as all other gradients.
    """

    def __init__(self, model: nn.Module, ranks: Ranks) -> None:
        super().__init__()
        self.model, self.ranks = model, ranks
        device = next(model.parameters()).device
        self.metrics = nn.Parameter(torch.zeros(3, device=device))

    def forward(self, x: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        loss, nll, kl = self.model(x, **options, mean_over_ranks=self.ranks.mean)
        with torch.no_grad():
            row = torch.stack([loss.sum(), nll.mean(), kl.mean()])
        return loss + (self.metrics * row).sum(), nll, kl

    def take_metrics(self) -> Tensor:
        """(loss, nll, kl) of the last backward, means over all ranks, float32 `[3]`."""
        grad, self.metrics.grad = self.metrics.grad, None
        assert grad is not None
        return grad

    def distributed(self, example: Tensor, **options: Any) -> nn.parallel.DistributedDataParallel:
        """Itself under DistributedDataParallel, all weights rank 0's, for batches like `example` and these options."""
        module = nn.parallel.DistributedDataParallel(self, gradient_as_bucket_view=True, static_graph=True)
        # after its first backward the order in which it adds gradients up changes to that of their arrival: now, so
        # that the first step of a resumed run adds as the uninterrupted run did
        seed = torch.zeros(1, dtype=torch.int64, device=example.device)
        module(example, seed=seed, **options)[0].sum().backward()
        module.zero_grad(set_to_none=True)
        return module


def torchrun_job() -> str | None:
    """What all (re)starts of the workers of one `torchrun` job have in common, and no other job has; None without one.

    That is `--rdzv-id` where there is one (`--standalone` makes one up), and else the `torchrun` process.
    """
    job = os.environ.get("TORCHELASTIC_RUN_ID")
    if job not in (None, "none"):
        return job
    if job is None:
        return None
    parent = os.getppid()
    try:
        # the start time, because process numbers are used again
        started = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        started = ""
    return f"{socket.gethostname()} {parent} {started}".strip()
