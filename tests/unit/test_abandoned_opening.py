"""A partition that is taken away while a thread opens it."""

from concurrent.futures import Future

import pytest

from deploy.bench_ingest import DOMAIN
from features.domain import parse_domain
from streams.batch_loop import BatchLoop, WorkerConfig
from streams.errors import FencedError
from streams.kafka import KafkaConfig, Topics
from streams.memory import MemoryStore
from streams.state import definitions
from streams.view import PartitionView


def test_its_view_stays_the_new_owners(tmp_path):
    domain = parse_domain(DOMAIN, source="test")
    config = WorkerConfig(KafkaConfig("127.0.0.1:1"), Topics(), domain, tmp_path / "state", tmp_path / "view", view_map_bytes=1 << 20)
    loop = BatchLoop(config, store=MemoryStore(definitions(domain)))
    opening: Future = Future()
    loop._abandoned[0] = opening
    owner = PartitionView(tmp_path / "view", 0, map_bytes=1 << 20)
    with pytest.raises(FencedError, match="taken away while it was opened"):
        loop._open_view(0)
    owner.beat(1)  # nobody has taken it over
    owner.close()
    opening.set_result(None)
    loop._open_view(0).close()
