"""The server that is fuzzed, in a process of its own: a real RankingServer behind a real door.

Triton is away, so the embedding tier answers. It says its address in a line of JSON, and ends with its standard input.
"""

import asyncio
import json
import logging
import sys
from pathlib import Path

from serving_world import ImmediateSource, MemoryReader, make_events, write_ranker, write_tables

from deploy.door import door
from deploy.settings import load_settings
from inference.server import RankingServer, ServerConfig

from .mutated import TOKEN


class NewestSink:
    """A ranking log that keeps one record: what grows here must be the server's."""

    def __init__(self) -> None:
        self.record, self.records = b"", 0

    def put(self, _user_id: int, record: bytes) -> bool:
        self.record, self.records = record, self.records + 1
        return True

    def statistics(self) -> dict[str, float]:
        return {"sent": self.records}

    def close(self) -> None:
        pass


async def serve(folder: Path) -> None:
    settings = load_settings(home=folder, server_token=TOKEN)
    write_ranker(folder / "releases", write_tables(folder / "tables"), "home")
    reader = MemoryReader()
    for user in range(1, 51):
        reader.put(user, make_events(2 * user, seed=user))
    paths = {"releases": folder / "releases", "tables": folder / "tables", "repository": folder / "repository"}
    config = ServerConfig(
        **paths,
        triton="127.0.0.1:1",
        door=door(settings, "127.0.0.1"),
        message_bytes_max=settings.message_bytes_max,
        after_wait_s_max=0.01,
        timeout_s=5.0,
    )
    server = RankingServer(config, ImmediateSource(reader), NewestSink())
    print(json.dumps({"address": await server.start()}), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.stop()


if __name__ == "__main__":
    logging.basicConfig(level="INFO", format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    asyncio.run(serve(Path(sys.argv[1])))
