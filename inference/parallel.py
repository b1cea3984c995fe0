"""Several processes that train one model, as `torchrun` starts them. One process alone is the usual case."""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar, cast

from torch import Tensor, distributed

T = TypeVar("T")
WAIT = timedelta(hours=24)
"""How long a process waits for the others: the first one packs and measures alone."""


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this is."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process packs, measures and writes."""
        return self.rank == 0

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` gives in the first process, in all of them."""
        if self.size == 1:
            return make()
        held = [make() if self.is_first else None]
        distributed.broadcast_object_list(held)
        return cast("T", held[0])

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.size > 1:
            distributed.all_reduce(values)
        return values


@contextlib.contextmanager
def joined() -> Iterator[Ranks]:
    """The processes that `torchrun` has started with this one (it names them in the environment); else this one alone."""
    if distributed.is_initialized():
        yield Ranks(distributed.get_rank(), distributed.get_world_size())
    elif int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ:
        yield Ranks()
    else:
        distributed.init_process_group("gloo", timeout=WAIT)
        try:
            yield Ranks(distributed.get_rank(), distributed.get_world_size())
            distributed.barrier()  # nobody closes a connection that another one still reads from
        finally:
            distributed.destroy_process_group()


def threads_each(threads: int) -> int:
    """Threads of this process where `threads` are for all that this machine runs."""
    return max(1, threads // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
