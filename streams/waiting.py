"""Waiting on a view until it includes positions: the same for the reader service and for a ranking server's local view."""

import asyncio
import time
from collections.abc import Sequence as Seq

from features.ports import Position, SequenceReader
from features.waiting import ask_until, includes


async def wait_for_positions(reader: SequenceReader, user_ids: Seq[int], after: Seq[Position], wait_s: float) -> bool:
    """Waits until the state of the users' partitions includes `after`, `wait_s` at most; whether it does. Raises as `reader.position`."""
    if not after:
        return True
    of_partition: dict[int, int] = {reader.position(user_id).partition: user_id for user_id in user_ids}
    watched = [user for partition, user in of_partition.items() if any(at.partition == partition for at in after)]

    async def ask() -> list[Position]:
        return [reader.position(user_id) for user_id in watched]

    found = await ask_until(ask, lambda at: includes(at, after), time.monotonic() + wait_s, clock=time.monotonic, sleep=asyncio.sleep)
    return includes(found, after)
