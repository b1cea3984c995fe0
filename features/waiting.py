"""Waiting until a state includes positions: one loop for the ranking server, its source and the reader service."""

from collections.abc import Awaitable, Callable
from collections.abc import Sequence as Seq
from typing import TypeVar

from features.ports import Position

PAUSE_S_MIN, PAUSE_S_MAX = 0.001, 0.008
"""Pauses between two looks at a state in memory: they double from the first to the second."""

Answer = TypeVar("Answer")


def includes(watermarks: Seq[Position], after: Seq[Position]) -> bool:
    """Whether the watermarks include every position of `after` that one of them can be compared with.

    A log_epoch of 0 in `after` is the watermark's own. Positions of another log or partition say nothing here: whoever asks judges them.
    """
    offsets = {(at.partition, at.log_epoch): at.offset for at in watermarks} | {(at.partition, 0): at.offset for at in watermarks}
    return all(offsets.get((wanted.partition, wanted.log_epoch), wanted.offset) >= wanted.offset for wanted in after)


async def ask_until(
    ask: Callable[[], Awaitable[Answer]],
    is_enough: Callable[[Answer], bool],
    until_s: float,
    *,
    clock: Callable[[], float],
    sleep: Callable[[float], Awaitable[object]],
) -> Answer:
    """Asks, with growing pauses, until an answer is enough or the clock (seconds) has reached `until_s`; returns the last answer."""
    pause_s = PAUSE_S_MIN
    while True:
        answer = await ask()
        left_s = until_s - clock()
        if is_enough(answer) or left_s <= 0:
            return answer
        await sleep(min(pause_s, left_s))
        pause_s = min(2 * pause_s, PAUSE_S_MAX)
