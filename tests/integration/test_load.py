"""The load generators against a real gRPC server: what they send, when, and what they make of the answers."""

import os
import shutil
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
import numpy as np
import pytest

from deploy import ghz
from deploy.load import Load, Outcome, closed_loop, run_load
from protos.v1.ranking_pb2 import TIER_EMBEDDING, TIER_SMALL, RankRequest, RankResponse
from protos.v1.ranking_pb2_grpc import RankingServicer, add_RankingServicer_to_server


class Slow(RankingServicer):
    """Holds the first call for `hold_s`, refuses users with odd numbers, and keeps what it was asked."""

    def __init__(self, hold_s=0.0):
        self.hold_s, self.asked, self.metadata, self.lock = hold_s, [], [], threading.Lock()

    def Rank(self, request, context):  # noqa: N802 - the name of the service's method
        with self.lock:
            first = not self.asked
            self.asked.append(request)
            self.metadata.append(dict(context.invocation_metadata()))
        if first:
            time.sleep(self.hold_s)
        if request.user_id % 2:
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "odd")
        return RankResponse(request_id=request.request_id, tier=TIER_SMALL if request.user_id else TIER_EMBEDDING)


@contextmanager
def serving(servicer, threads):
    server = grpc.server(ThreadPoolExecutor(threads))
    add_RankingServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


def needs_ghz():
    """.ci/run installs it."""
    if shutil.which("ghz") is None:
        assert os.environ.get("CI") != "true", "ghz is required where CI=true"
        pytest.skip("ghz is not installed")


def requests(*users):
    return tuple(RankRequest(user_id=user, candidate_ids=bytes(8)).SerializeToString() for user in users)


def test_a_server_that_stands_still_is_not_asked_less_and_its_calls_count_from_when_they_were_due():
    """One thread answers, and is held for 0.4 s of a load of 0.5 s: the calls behind it waited for what was left of that."""
    servicer = Slow(hold_s=0.4)
    with serving(servicer, 1) as address:
        outcome = run_load(Load(address, requests(2, 0), 100, 0.5, "constant", timeout_s=10.0))
    assert len(servicer.asked) == outcome.count("OK") == 50
    assert outcome.tiers == {TIER_SMALL: 25, TIER_EMBEDDING: 25}
    latency_ms = np.array(outcome.latency_ms["OK"])[np.argsort(outcome.due_s["OK"])]
    assert (latency_ms[:20] > 400 - 10 * np.arange(20)).all()
    assert outcome.percentile("OK", 50) > 100
    assert outcome.seconds == pytest.approx(0.5, abs=1e-6)
    assert 0 < outcome.cpu_s < 5


def test_failures_are_counted_apart_and_a_closed_loop_asks_as_fast_as_it_is_answered():
    servicer = Slow()
    with serving(servicer, 4) as address:
        outcome = closed_loop(Load(address, requests(1, 2), 0, 0.3), 2)
    assert set(outcome.latency_ms) == {"OK", "RESOURCE_EXHAUSTED"}
    assert outcome.count("OK") + outcome.count("RESOURCE_EXHAUSTED") == len(servicer.asked) > 10
    assert outcome.answered_per_s == pytest.approx(outcome.count("OK") / outcome.seconds)


def test_answers_after_the_end_of_a_load_are_no_goodput():
    outcome = Outcome({"OK": [100.0, 100.0, 900.0]}, {"OK": [0.1, 1.5, 1.5]}, seconds=2.0)
    assert outcome.answered_per_s == 1.0
    later = outcome.since(1.0)
    assert (later.count("OK"), later.seconds, later.answered_per_s) == (2, 1.0, 1.0)


@pytest.mark.parametrize("arrivals", ["constant", "poisson", "bursts"])
def test_arrivals_have_the_rate_that_was_asked_for(arrivals):
    due_s = Load("", (), 100, 200.0, arrivals, seed=3).due_s()
    assert len(due_s) == 20_000
    assert (np.diff(due_s) >= 0).all()
    assert due_s[-1] == pytest.approx(200, rel=0.05)
    sizes = Counter(Counter(due_s.tolist()).values())
    assert set(sizes) <= ({*range(4, 17)} | {int(due_s.tolist().count(due_s[-1]))} if arrivals == "bursts" else {1})


def test_ghz_sends_a_request_at_a_rate_and_says_what_became_of_it():
    needs_ghz()
    servicer = Slow()
    with serving(servicer, 4) as address:
        found = ghz.run_ghz(address, *requests(2), calls_per_s=100, seconds=0.5, token="secret")
        refused = ghz.run_ghz(address, *requests(1), calls_per_s=100, seconds=0.1)
    assert (found.count, refused.count) == ({"OK": 50}, {"ResourceExhausted": 10})
    assert 0 < found.p50_ms <= found.p99_ms < 1000
    assert found.calls_per_s == pytest.approx(100, rel=0.3)
    assert [request.user_id for request in servicer.asked] == [2] * 50 + [1] * 10
    assert [metadata.get("authorization") for metadata in servicer.metadata] == ["Bearer secret"] * 50 + [None] * 10


def test_ghz_that_cannot_run_says_so():
    needs_ghz()
    with pytest.raises(ghz.GhzError, match=r"ghz ended with 1: no data"):
        ghz.run_ghz("127.0.0.1:1", b"", calls_per_s=10, seconds=0.1)


def test_without_ghz_and_go_the_message_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ghz.GhzError, match=r"ghz is not on the PATH.* install ghz, or Go"):
        ghz.ghz_command()
