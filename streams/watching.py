"""Watches of users' sequences: the streaming half of the reader service."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress

from features.ports import Reading, SequenceReader, SequenceUnavailableError

LOOK_S = 0.02
"""Time between two looks at a view: a change is told within it, and many changes within it are told as one."""


class WatchesFullError(RuntimeError):
    """As many watches as allowed are open."""


class Watches:
    """Follows users on a reader that answers from memory; `watches_max` at once, until `drain`."""

    def __init__(self, reader: SequenceReader, watches_max: int) -> None:
        self._reader, self._watches_max = reader, watches_max
        self._draining = asyncio.Event()
        self.open = 0

    def drain(self) -> None:
        """Ends every watch, and every later one at once."""
        self._draining.set()

    async def follow(self, sequence: str, user_id: int) -> AsyncGenerator[Reading, None]:
        """The user's present reading, and one for each change of the row that is there when it looks; ends with `drain`.

        A state that cannot be read for a while (a view that is made anew) is waited for, but not at the beginning.

        Raises:
            WatchesFullError: as many are open as allowed.
            SequenceUnavailableError, SequenceCorruptError: see `features.ports.SequenceReader.read`.
        """
        if self.open >= self._watches_max:
            raise WatchesFullError(f"{self.open} watches are open, which is the most: try again later, or another reader")
        self.open += 1
        try:
            (shown,) = self._reader.read(sequence, [user_id])
            yield shown
            at = shown.watermark
            while not self._draining.is_set():
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._draining.wait(), LOOK_S)
                with suppress(SequenceUnavailableError):
                    if self._reader.position(user_id) == at:
                        continue
                    (reading,) = self._reader.read(sequence, [user_id])
                    at = reading.watermark
                    if reading.row != shown.row:
                        shown = reading
                        yield shown
        finally:
            self.open -= 1
