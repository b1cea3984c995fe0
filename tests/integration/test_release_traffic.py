"""Releases and generations change under traffic: no request fails and no ranking is made of two of them, as its own scores prove."""

import itertools
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from serving_stack import serving
from serving_world import DOMAIN, DOMAIN_TOML, ITEMS, NOW_MS, VIDEO

from deploy.bench_release import Proof, distinct_model, some_requests
from deploy.load import Load, run_load
from features.tables import Member, write_generation
from inference.release import write_release
from protos.v1.ranking_pb2 import TIER_MODEL, RankingRecord

pytestmark = pytest.mark.servers
RANKER, SPACE = "related", "related_items"
CALLS_PER_S, SECONDS = 50.0, 4.0


def test_no_request_fails_and_no_ranking_is_mixed(tmp_path):
    with serving(tmp_path, rankers=(), unload_delay_s=600.0, inline_share=0.0) as stack:
        vectors = np.random.default_rng(7).normal(size=(ITEMS, 16)).astype(np.float16)
        items = {f"item.{kind}": Member(np.arange(1, ITEMS + 1, dtype=np.uint64), vectors) for kind in ("video", "product")}
        generations = [stack.generations[SPACE], write_generation(stack.config.tables, SPACE, NOW_MS + 1000, items).name]
        releases = [
            write_release(
                stack.config.releases,
                model=distinct_model(DOMAIN, RANKER, seed),
                domain_toml=DOMAIN_TOML,
                ranker=RANKER,
                created_ms=NOW_MS + seed * 1000,
                generations=stack.generations,
                metrics={},
            ).release_id
            for seed in (0, 1)
        ]
        requests = some_requests(np.random.default_rng(3), ITEMS, NOW_MS, 8)
        for request in requests:
            request.ranker, request.candidate_kind = RANKER, VIDEO
        pairs = list(itertools.product(releases, generations))
        proof = Proof(stack.config.releases, stack.config.tables, SPACE, pairs, requests)
        for release in reversed(releases):  # both are loaded before the load, which is short; loading under one: test_server.py
            stack.run(stack.server.switch(RANKER, release, {SPACE: generations[0]}), 120)
        data = tuple(request.SerializeToString() for request in requests)
        with ThreadPoolExecutor(1) as pool:
            loading = pool.submit(run_load, Load(stack.address, data, CALLS_PER_S, SECONDS, "constant", timeout_s=10.0))
            until = len(stack.sink.records)
            # Each switch begins when the one before has answered: the log says so, no clock.
            for release, generation in itertools.cycle((pairs[1], pairs[0], pairs[2], pairs[3], pairs[1], pairs[0])):
                while len(stack.sink.records) < until and not loading.done():
                    time.sleep(0.02)
                if loading.done():
                    break
                stack.run(stack.server.switch(RANKER, release, {SPACE: generation}), 120)
                until = len(stack.sink.records) + 10
            outcome = loading.result()
        records = [RankingRecord.FromString(data) for data in stack.sink.records]
        of_model = [record for record in records if record.tier == TIER_MODEL]
    assert {status: len(times) for status, times in outcome.latency_ms.items()} == {"OK": len(records)}
    assert len(of_model) > len(records) / 2
    made_of = {(record.release_id, record.generations[SPACE]) for record in of_model}
    assert {release for release, _ in made_of} == set(releases), "the load met both releases"
    assert {generation for _, generation in made_of} == set(generations), "and both generations"
    assert all(proof.holds(record) for record in of_model)
    # The proof sees a record that names one and holds the other.
    for field, other in (("release_id", dict(zip(releases, reversed(releases), strict=True))), ("generations", None)):
        mixed = RankingRecord.FromString(of_model[0].SerializeToString())
        if other is not None:
            mixed.release_id = other[mixed.release_id]
        else:
            mixed.generations[SPACE] = next(name for name in generations if name != mixed.generations[SPACE])
        assert not proof.holds(mixed), field
