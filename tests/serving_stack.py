"""A running ranking server with a real Triton, in this process: what the serving tests start."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

from serving_world import NOW_MS, VIDEO, ImmediateSource, ListSink, MemoryReader, make_events, write_ranker, write_tables

from deploy.triton_server import TritonServer
from inference.client import RankingClient
from inference.server import RankingServer, ServerConfig
from protos.v1.ranking_pb2 import RankingRecord

CANDIDATES = list(range(100, 200))
USER, STRANGER = 7, 999_999


@dataclass
class Stack:
    """A running server, and what it was given."""

    config: ServerConfig
    reader: MemoryReader
    sink: ListSink
    triton: TritonServer
    loop: asyncio.AbstractEventLoop
    server: RankingServer
    address: str
    generations: dict[str, str]

    def run(self, coroutine, timeout_s: float = 60.0):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(timeout_s)

    def client(self, **settings) -> RankingClient:
        return RankingClient(self.address, **{"timeout_s": 20.0, **settings})

    def rank(self, **changes):
        given = {"ranker": "home", "user_id": USER, "candidates": CANDIDATES, "kinds": VIDEO, "request_time_ms": NOW_MS} | changes
        with self.client() as client:
            return client.rank(**given)

    def logged(self) -> list[RankingRecord]:
        """Records of all rankings that were answered: a record is made behind its answer, in the loop's next round."""
        self.run(asyncio.sleep(0))
        return [RankingRecord.FromString(record) for record in self.sink.records]

    def record(self) -> RankingRecord:
        return self.logged()[-1]

    def eventually_tier(self, tier: str, timeout_s: float = 60.0):
        """Ranks until an answer is of this tier: the way back is nobody's doing."""
        until = time.monotonic() + timeout_s
        while (ranking := self.rank()).tier != tier:
            assert time.monotonic() < until, f"still {ranking.tier}"
            time.sleep(0.05)
        return ranking


@contextmanager
def serving(folder: Path, *, small: bytes | None = None, rankers: tuple[str, ...] = ("home", "related"), **given: Any) -> Iterator[Stack]:
    """Everything in `folder`; `given`: fields of the server's configuration; `small`: the small model of ranker home."""
    generations = write_tables(folder / "tables")
    for ranker in rankers:
        write_ranker(folder / "releases", generations, ranker, small=small if ranker == "home" else None)
    (folder / "repository").mkdir()
    loop = asyncio.new_event_loop()
    thread = Thread(target=loop.run_forever, daemon=True)
    thread.start()
    with TritonServer(folder / "triton", folder / "repository", threads=2) as triton:
        fields = {
            "timeout_s": 10.0,
            "after_reserve_s": 1.5,
            "after_wait_s_max": 5.0,
            "model_timeout_s": 10.0,
            "unload_delay_s": 0.0,
            "reflection": True,
            "inline_share": 0.5,
            "rankings_max": 8,
        }
        config = ServerConfig(
            releases=folder / "releases",
            tables=folder / "tables",
            repository=folder / "repository",
            triton=triton.grpc_url,
            **fields | given,
        )
        reader, sink = MemoryReader(), ListSink()
        reader.put(USER, make_events(100))
        server = RankingServer(config, ImmediateSource(reader), sink)
        stack = Stack(config, reader, sink, triton, loop, server, "", generations)
        stack.address = stack.run(server.start())
        stack.run(server.warm(), 120.0)
        yield stack
        stack.run(server.stop())
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()
