"""The open-loop load of the benchmarks: when what is due, and that every process computes the same."""

from dataclasses import replace

import numpy as np

from deploy.bench_live import Load


def test_events_are_due_at_the_begin_of_their_tick():
    load = Load(events_per_s=5_000, seconds=0.1, seed=3, begin_s=100.0)
    assert (load.count, load.per_tick) == (500, 10)
    due_s = [load.due_s(i) for i in range(load.count)]
    assert due_s[:10] == [100.0] * 10
    np.testing.assert_allclose(due_s[10::10], 100.0 + 0.002 * np.arange(1, 50))
    assert Load(events_per_s=100, seconds=1.0, seed=3, begin_s=0.0).per_tick == 1


def test_every_process_computes_the_same_load_and_no_two_loads_are_one():
    load = Load(events_per_s=5_000, seconds=0.1, seed=3, begin_s=100.0)
    users, events = load.events()
    again, same = replace(load, begin_s=5.0).events()
    np.testing.assert_array_equal(users, again)
    np.testing.assert_array_equal(events["event_id"], same["event_id"])
    _, other = replace(load, seed=4).events()
    assert not np.intersect1d(events["event_id"], other["event_id"]).size
