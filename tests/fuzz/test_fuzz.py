"""A short run of the fuzzer; the long one is a command: see `fuzz.run`."""

import asyncio

from fuzz.mutated import KINDS, fuzzed
from fuzz.run import fuzz, replay_alone

REQUESTS, SEED = 2_000, 5


def test_no_request_does_more_than_be_refused(tmp_path):
    outcome = asyncio.run(fuzz(tmp_path, REQUESTS, SEED))
    assert not outcome.failures, "\n".join(f"{number}: {text}; {replay_alone(SEED, number)}" for number, text in outcome.failures.items())
    assert outcome.requests == REQUESTS
    assert {kind for kind, _ in outcome.statuses} == set(KINDS)
    for kind in ("fields", "wire", "bytes"):  # both sides of the line are exercised
        assert outcome.statuses[kind, "OK"] > 20
        assert outcome.statuses[kind, "INVALID_ARGUMENT"] > 20
    assert outcome.statuses["fields", "FAILED_PRECONDITION"] > 0


def test_a_seed_and_a_number_are_one_request():
    assert [fuzzed(1, i) for i in range(50)] == [fuzzed(1, i) for i in range(50)]
    assert fuzzed(1, 0) != fuzzed(2, 0)
