"""What the worker does when its hot path fails."""

import asyncio

import pytest

from streams.errors import StateError
from streams.worker import HotPath


class Loop:
    """A batch loop that ends with an error."""

    def __init__(self, error):
        self.error = error

    def run(self):
        raise self.error


@pytest.mark.parametrize("error", [StateError("the log lost records"), ValueError("a bug")])
def test_a_crash_starts_the_deadline_for_the_services(error):
    told = []

    async def crash():
        path = HotPath(Loop(error), None, None, lambda: told.append("crash"))
        await HotPath._run.fun(path)

    with pytest.raises(type(error)):
        asyncio.run(crash())
    assert told == ["crash"]
