"""Releases beside the served ones: those that arms and shadows of experiments name.

One takes part while its model is loaded, warm and in use. Loading is tried again until it succeeds or the release is no longer named.
"""

import asyncio
import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from features.tables import TableError
from inference.release import ReleaseError
from inference.triton import TritonError

if TYPE_CHECKING:
    from inference.served import Served

log = logging.getLogger(__name__)

RETRY_S_MIN, RETRY_S_MAX = 1.0, 30.0
Key = tuple[str, str]
"""(ranker, release id)."""


class Beside:
    """Holds what experiments name. Used on the event loop.

    Args:
        prepare: opens a release with its newest tables; called in a thread. Raises ReleaseError, TableError.
        retire: takes what nobody uses any more; its model is unloaded there.
    """

    def __init__(self, prepare: "Callable[[str, str], Served]", retire: "Callable[[Served], None]") -> None:
        self._prepare, self._retire = prepare, retire
        self._held: dict[Key, Served] = {}
        self._named: dict[Key, asyncio.Task[None]] = {}
        self.failures = 0

    def name(self, ranker: str, release_ids: set[str]) -> None:
        """From now on these releases of a ranker are wanted, and no others."""
        for key in [key for key in self._named if key[0] == ranker and key[1] not in release_ids]:
            self._named.pop(key).cancel()
            self._drop(key)
        for release_id in sorted(release_ids):
            key = (ranker, release_id)
            if key not in self._named:
                self._named[key] = asyncio.create_task(self._load(key), name=f"load {release_id} beside")

    def refresh(self, ranker: str) -> None:
        """Opens the newest tables of this ranker's releases: called when the served release got others. The old ones serve meanwhile."""
        for key in [key for key in self._named if key[0] == ranker]:
            self._named[key].cancel()
            self._named[key] = asyncio.create_task(self._load(key), name=f"load {key[1]} beside")

    def find(self, ranker: str, release_id: str) -> "Served | None":
        """A release that is in use; None: not (yet)."""
        served = self._held.get((ranker, release_id))
        return served if served is not None and served.gate.open else None

    def holds(self, served: "Served") -> bool:
        """Whether it is still what a request may get."""
        return any(other is served for other in self._held.values())

    def __iter__(self) -> "Iterator[Served]":
        return iter(list(self._held.values()))

    async def close(self) -> None:
        """Ends loading and probing. Models stay loaded: other servers may use them."""
        for task in self._named.values():
            task.cancel()
        await asyncio.gather(*self._named.values(), return_exceptions=True)
        for served in self._held.values():
            await served.gate.close()

    def statistics(self) -> dict[str, float]:
        """beside: releases that experiments name; beside_in_use: those that are loaded and warm; failures to load since start."""
        return {
            "beside": len(self._named),
            "beside_in_use": sum(served.gate.open for served in self._held.values()),
            "beside_failures": self.failures,
        }

    async def _load(self, key: Key) -> None:
        delay_s = RETRY_S_MIN
        while True:
            try:
                served = await asyncio.to_thread(self._prepare, *key)
                old = self._held.get(key)
                if old is not None:
                    served.gate = old.gate
                # Held before its model is loaded: so an unloading that is under way sees that the model is wanted.
                self._held[key] = served
                if old is not None and not old.in_flight:
                    self._retire(old)
                if not served.gate.open:
                    await served.gate.bring_up()
            except (ReleaseError, TableError, TritonError, OSError) as error:
                self.failures += 1
                log.warning("ranker %s: %s is not loaded beside, trying again in %.0f s: %s", *key, delay_s, error)
                await asyncio.sleep(delay_s)
                delay_s = min(2 * delay_s, RETRY_S_MAX)
            else:
                log.info("ranker %s: %s takes part in the experiment with %s", *key, dict(served.generations))
                return

    def _drop(self, key: Key) -> None:
        served = self._held.pop(key, None)
        if served is not None and not served.in_flight:
            self._retire(served)
