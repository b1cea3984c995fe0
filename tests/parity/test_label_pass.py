"""`freshrank label` over both logs: what the oracle says of them, whatever the buckets and the schedule of passes; inputs proved by digest;
training that sees what was served; erasures."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from label_world import (
    CLICK,
    DAY_MS,
    END_MS,
    ERASED,
    HOUR_MS,
    LATE_MS,
    START_MS,
    WINDOW_MS,
    archived,
    domain_of,
    label_world,
    logged_lists,
    make_served,
    naive,
    options_of,
    parts_of,
    rules_of,
    until,
)
from plain_inputs import plain_inputs
from test_replay import USERS, MemoryLog

from deploy.demo_loop import compare_arms
from deploy.labelling import LabelError, label
from deploy.replay import ACTIONS
from features.actions import EVENT_DTYPE
from features.erasures import Erasure, append_lines
from features.log_erasure import drop_past
from features.logs import LogError, log_files, read_actions, read_requests, read_summary, write_summary
from features.pack import Column, Packer
from features.tables import TableSet
from inference.dataset import History, build_dataset, split_times
from inference.served_examples import served_requests
from protos.v1.ranking_pb2 import SEQUENCE_SOURCE_NONE
from streams.archive import ParquetLog
from streams.erasure import ErasureJob, run_job
from streams.kafka import Topics

SOME_BUCKETS, MANY_BUCKETS = 4 << 20, 1 << 20
WHOLE = {"unseen_max": 1_000}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_served(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def erasing(tmp_path_factory):
    return make_served(tmp_path_factory.mktemp("erasing"), seed=4, erase=True)


@pytest.fixture(scope="module")
def labelled(world, tmp_path_factory):
    """(report, folder) of one pass at the end."""
    return label_world(world, tmp_path_factory.mktemp("labelled"), rules=rules_of(domain_of(world), **WHOLE))


def test_the_log_is_what_the_oracle_says(world, labelled):
    report, folder = labelled
    lists, outcomes, counts = naive(world, rules_of(domain_of(world), **WHOLE), END_MS)
    assert logged_lists(folder, domain_of(world)) == lists
    assert report.ok, report.to_text()
    assert report.lists == report.new == counts["written"] == len(lists) > 200
    assert report.rows_rebuilt > 100
    assert report.rows_inline > 50
    assert report.shadows > 5
    assert {name: count for name, count in report.outcomes.items() if count} == {name: outcomes.count(name) for name in set(outcomes)}
    assert {"joined", "ambiguous", "not_a_candidate", "after_window", "too_late", "superseded", "duplicate", "no_list"} <= set(outcomes)
    assert report.join["late"] > 10
    assert report.join["retracted"] > 0
    assert 0 < report.join["not_seen"] < report.lists
    assert report.join["by_id"] > report.join["without_id"] > 0
    assert "LOOK" not in report.to_text()


@pytest.mark.parametrize("memory_bytes", [SOME_BUCKETS, MANY_BUCKETS])
def test_buckets_change_nothing(world, labelled, memory_bytes, tmp_path):
    whole, folder = labelled
    report, parts = label_world(world, tmp_path, rules=rules_of(domain_of(world), **WHOLE), memory_bytes=memory_bytes)
    assert report.buckets > 2
    assert parts_of(parts) == parts_of(folder)
    mine, theirs = report.as_json(), whole.as_json()
    assert {**mine, "buckets": 1} == theirs


@pytest.mark.parametrize("hours", [(30,), (5, 20, 21, 60), tuple(range(2, 90, 12))])
def test_the_schedule_of_passes_changes_nothing(world, tmp_path, hours):
    """Also labels: late actions are added by later passes, and nothing is rebuilt twice."""
    once, folder = label_world(world, tmp_path / "once")
    added = rebuilt = 0
    for hour in hours:
        report, again = label_world(world, tmp_path / "again", until_ms=START_MS + hour * HOUR_MS, memory_bytes=SOME_BUCKETS)
        assert report.ok, report.to_text()
        assert logged_lists(again, domain_of(world)) == _as_of(world, START_MS + hour * HOUR_MS)
        added, rebuilt = added + report.added, rebuilt + report.rows_rebuilt
    report, again = label_world(world, tmp_path / "again", until_ms=END_MS, memory_bytes=SOME_BUCKETS)
    assert parts_of(again) == parts_of(folder)
    assert rebuilt + report.rows_rebuilt == once.rows_rebuilt
    assert added + report.added > 0
    assert _actions(again, domain_of(world)) == _actions(folder, domain_of(world))
    assert not (again / ".label").exists()


def _as_of(world, until_ms):
    lists, _, _ = naive(until(world, until_ms), rules_of(domain_of(world)), until_ms)
    return lists


def _actions(folder, domain):
    found = []
    for batch in read_actions(folder, domain):
        found += zip(batch.partition.tolist(), batch.offset.tolist(), batch.users.tolist(), batch.events.tolist(), strict=True)
    return sorted(map(repr, found))


def test_a_late_action_is_added_by_a_second_pass(world, tmp_path):
    """Exactly the labels whose actions came between the two."""
    first_ms = START_MS + 20 * HOUR_MS
    before, folder = label_world(world, tmp_path, until_ms=first_ms)
    old = logged_lists(folder, domain_of(world))
    after, folder = label_world(world, tmp_path, until_ms=first_ms + LATE_MS)
    new = logged_lists(folder, domain_of(world))
    open_lists = [key for key in old if key[2] >= after.closed_before_ms]
    more = [sum(len(now[2]) - len(was[2]) for now, was in zip(new[key], old[key], strict=True)) for key in open_lists]
    assert before.added == 0
    assert after.added == sum(count for count in more if count > 0) > 0
    assert after.rows_known == len(open_lists) > 10


def test_every_list_is_packed_again_to_the_logged_digest(world, labelled):
    """What training packs: the events of the served table, the logged generations, the logged features."""
    _, folder = labelled
    domain, checked, differ = domain_of(world), 0, 0
    packers = {}
    history = History(domain, "home", folder)
    for batch in read_requests(folder, domain, batch_rows=200):
        for i, inputs in enumerate(plain_inputs(domain, "home", batch, None)):
            generations = batch.served.table["generations"][i].as_py()
            if generations not in packers:
                packers[generations] = Packer(domain, "home", TableSet.open(world.tables, domain, "home", json.loads(generations)))
            packer = packers[generations]
            served = batch.served.table["digest"][i].as_py()
            order = np.argsort(inputs.candidate_ids)  # the log has places as served, the digest the request's order
            record = _record(world, batch, i)
            ids = np.frombuffer(record.request.candidate_ids, "<u8")
            back = order[np.argsort(np.argsort(ids))]
            features = {name: reordered(column, back) for name, column in inputs.candidate_features.items()}
            asked = replace(
                inputs, candidate_ids=inputs.candidate_ids[back], candidate_kinds=inputs.candidate_kinds[back], candidate_features=features
            )
            assert packer.digest(packer.pack(asked).tensors) == served
            others, erased_before_ms = history.before(inputs.user_id, inputs.request_time_ms)
            rebuilt = packer.pack(replace(asked, events=others, erased_before_ms=erased_before_ms))
            differ += packer.digest(rebuilt.tensors) != served
            checked += 1
    assert checked > 200
    assert differ > 20, "the log of actions alone does not say what a request saw"


def reordered(column, order):
    if column.lengths is None:
        return Column(number=column.number[order]) if column.category is None else Column(category=column.category[order])
    ends, lengths = np.cumsum(column.lengths, dtype=np.int64), column.lengths.astype(np.int64)
    rows = np.concatenate([np.arange(ends[i] - lengths[i], ends[i]) for i in order])
    weights = None if column.weights is None else column.weights[rows]
    return Column(category=column.category[rows], lengths=column.lengths[order], weights=weights)


def _record(world, batch, i):
    key = int(batch.user_id[i]), int(batch.request_id[i]), int(batch.request_time_ms[i])
    return next(
        record
        for record in world.records()
        if (record.request.user_id, record.request.request_id, record.request.request_time_ms) == key and not record.shadow
    )


def test_training_takes_what_was_seen_of_its_own_ranker(world, labelled):
    _, folder = labelled
    domain = domain_of(world)
    rows = lists = 0
    for batch in read_requests(folder, domain):
        known = batch.served.column("sequence_source") != SEQUENCE_SOURCE_NONE
        seen = batch.seen & np.repeat(known, np.diff(batch.starts))
        rows += int(seen.sum())
        lists += len(np.unique(np.repeat(np.arange(len(batch)), np.diff(batch.starts))[seen]))
    dataset, tables = build_dataset(domain, "home", folder, world.tables)
    assert (len(dataset), len(dataset.labels)) == (lists, rows)
    assert 0 < dataset.labels[:, 0].sum() < rows
    validation_ms, test_ms = split_times(domain, "home", folder, (0.6, 0.2, 0.2))
    assert START_MS < validation_ms < test_ms
    packer, at = Packer(domain, "home", tables), 0
    for batch in served_requests(domain, "home", folder):
        for i, inputs in enumerate(plain_inputs(domain, "home", batch, None)):
            expected, found = packer.pack(inputs).tensors, dataset.request(at + i)
            count = int(expected["sequence_count"][0])
            for name, values in found.items():
                whole = expected[name][:count] if name.startswith("sequence_") and name != "sequence_count" else expected[name]
                assert values.tobytes() == whole.tobytes(), name
        at += len(batch)
    assert not list(served_requests(domain, "other", folder))
    assert not list(served_requests(domain, "home", folder, dict.fromkeys(np.unique(dataset.user_id).tolist(), END_MS)))


def test_a_record_that_does_not_agree_is_not_written(world, tmp_path):
    records = {partition: list(found) for partition, found in world.rankings.records.items()}
    damaged = replace(world, rankings=MemoryLog("rankings", 1, records))
    changed = 0
    for record in damaged.records():
        if not record.inline and not record.shadow and changed < 5:
            record.row_digest ^= 1
            changed += 1
    report, folder = label_world(damaged, tmp_path)
    assert not report.ok
    assert 0 < report.differs == report.unproved <= 5, "as far as they are not superseded"
    assert "not those that were served" in report.to_text()
    whole, _, _ = naive(world, rules_of(domain_of(world)), END_MS)
    assert len(logged_lists(folder, domain_of(world))) == len(whole) - report.differs


def test_retention_that_cut_what_inputs_come_from_is_said(world, tmp_path):
    domain = domain_of(world)
    cut = replace(world, actions=MemoryLog("actions", world.actions.log_epoch, world.actions.records, start=100))
    options = options_of(cut, tmp_path / "archive", tmp_path)
    archived(cut, tmp_path / "archive")
    report = label(options)
    assert not report.ok
    assert report.excluded["log_cut"] > 50
    assert report.lists > 0, "inline rows and lists without state need no log"
    lists = logged_lists(options.out, domain)
    assert sum(any(row[2] for row in rows) for rows in lists.values()) > 0


def test_rules_and_columns_of_a_log_stay(world, tmp_path):
    _, folder = label_world(world, tmp_path, until_ms=START_MS + DAY_MS)
    other = {"rules": rules_of(domain_of(world), window_ms=WINDOW_MS + 1)}
    with pytest.raises(LabelError, match="--rebuild"):
        label_world(world, tmp_path, **other)
    report, again = label_world(world, tmp_path, rebuild=True, **other)
    assert again == folder
    lists, _, _ = naive(world, other["rules"], END_MS)
    assert logged_lists(folder, domain_of(world)) == lists
    assert report.number == 2
    write_summary(folder, {"domain": "shop"})
    with pytest.raises(LabelError, match="imported log"):
        label_world(world, tmp_path)


def test_a_product_without_impressions(world, tmp_path):
    """Here an impression is an action like others, so that nothing says what was seen and left."""
    domain, rules = domain_of(world), replace(rules_of(domain_of(world)), impressions=())
    report, folder = label_world(world, tmp_path, rules=rules)
    assert report.lists > 200
    assert not report.ok
    assert "--all-seen" in report.to_text()
    with pytest.raises(LogError, match="what was seen is not known"):
        list(served_requests(domain, "home", folder))
    report, folder = label_world(world, tmp_path, rules=rules, all_seen=True, rebuild=True)
    assert all(batch.seen.all() for batch in read_requests(folder, domain))
    assert sum(map(len, served_requests(domain, "home", folder))) > 100


def test_an_erasure_leaves_no_list_that_names_the_user(erasing, tmp_path):
    """Once by the record in the log, and once by the job, of what had been labelled before it was asked for."""
    domain, rules = domain_of(erasing), rules_of(domain_of(erasing))
    report, folder = label_world(erasing, tmp_path / "after")
    lists, outcomes, counts = naive(erasing, rules, END_MS)
    assert report.join["erased"] == counts["erased"] > 10
    assert logged_lists(folder, domain) == lists
    assert {"erased", "erasure"} <= set(outcomes)

    erased_ms = next(
        ms for records in erasing.actions.records.values() for ms, _, value in records if len(value) < 40 and value != b"garbage"
    )
    _, folder = label_world(erasing, tmp_path / "before", until_ms=erased_ms)
    named = [key for key in logged_lists(folder, domain) if ERASED in _who(folder, domain)[key]]
    assert len(named) > 10
    archived(erasing, tmp_path / "before" / "archive")
    job = ErasureJob(home=tmp_path / "before", domain=domain, deadline_ms=1, topics=Topics(actions="actions", rankings="rankings"))
    summary = run_job(job, END_MS)
    assert summary.removed["canonical logs"] > 20
    left = _who(folder, domain)
    assert left
    assert not any(ERASED in who for who in left.values())
    for batch in read_actions(folder, domain):
        assert not (batch.users[~batch.erase] == ERASED).any()
    assert drop_past(folder, []) == 0


def _who(folder, domain):
    found = {}
    for batch in read_requests(folder, domain):
        for i, who in enumerate(batch.served.table["who"].to_pylist()):
            found[int(batch.user_id[i]), int(batch.request_id[i]), int(batch.request_time_ms[i])] = who
    return found


def test_an_erasure_reaches_lists_that_had_not_read_it(world, tmp_path):
    """A ranking served behind the erasure from a state before it; and a rewriting that was cut off between the two tables."""
    domain = domain_of(world)
    _, folder = label_world(world, tmp_path)
    rows = [row for path in log_files(folder, "served.parquet") for row in pq.read_table(path).to_pylist() if row["user_id"] == USERS[0]]
    row = min((row for row in rows if row["log_epoch"][0]), key=lambda row: row["offset_read"][0])
    behind = Erasure(USERS[0], 1, row["log_epoch"][0], 0, row["offset_read"][0] + 1, START_MS - DAY_MS)
    assert drop_past(folder, [replace(behind, offset=row["offset_read"][0])]) == 0
    before = logged_lists(folder, domain)
    impressions = {path: path.read_bytes() for path in log_files(folder, "impressions.parquet")}
    served = {path: path.read_bytes() for path in log_files(folder, "served.parquet")}
    assert drop_past(folder, [behind]) > 0
    after = logged_lists(folder, domain)
    gone = before.keys() - after.keys()
    assert (USERS[0], row["request_id"], row["request_time_ms"]) in gone
    assert {one[0] for one in gone} == {USERS[0]}
    for path, data in served.items():  # cut off behind the candidates
        path.write_bytes(data)
    assert logged_lists(folder, domain) == after
    assert drop_past(folder, [behind]) > 0
    for path, data in impressions.items():
        path.write_bytes(data)
    with pytest.raises(LogError, match="has no row in"):
        logged_lists(folder, domain)


def test_an_erasure_that_is_asked_for_during_a_pass_is_done_at_its_commit(world, tmp_path):
    domain, ledger = domain_of(world), tmp_path / "erasures.jsonl"

    def step(name):
        if name == "replace":
            append_lines(ledger, [Erasure(ERASED, 1, 1, 0, 5, END_MS).to_json()])

    report, folder = label_world(world, tmp_path, step=step)
    assert report.erased_rows > 10
    assert not any(ERASED in who for who in _who(folder, domain).values())


def test_arms_are_compared_by_what_users_did(world, labelled):
    _, folder = labelled
    domain, names = domain_of(world), {world.release_id: "one"}
    clicks = dict[int, list[int]]()
    for key, rows in logged_lists(folder, domain).items():
        if any(row[1] for row in rows):
            clicks.setdefault(key[0], []).append(sum(CLICK in row[2] for row in rows if row[1]))
    none, one = compare_arms(domain, "home", folder, names, from_ms=START_MS, control="none")
    assert (none.lists, one.lists, one.users) == (0, sum(map(len, clicks.values())), len(clicks))
    assert one.per_list["click"] == pytest.approx(np.mean([np.mean(of) for of in clicks.values()]))
    assert [found.lists for found in compare_arms(domain, "home", folder, names, from_ms=END_MS, control="one")] == [0]


def test_a_bucket_replays_as_the_whole_does(world, tmp_path):
    """Clocks of other users' records included: eviction takes events away by them."""
    seen = []

    def step(name):
        if name == "merge impressions.parquet":
            for folder in sorted((tmp_path / "logs" / "shop.served" / ".label").glob("bucket-*")):
                log = ParquetLog(folder / ACTIONS)
                seen.append(sum(len(records) for partition in log.partitions for records in log.read(partition)))

    report, _ = label_world(world, tmp_path, memory_bytes=MANY_BUCKETS, step=step)
    assert report.ok, report.to_text()
    total = sum(len(records) for records in world.actions.records.values())
    assert len(seen) == report.buckets
    assert total <= sum(seen) < 3 * total
    assert max(seen) < total


def test_parts_are_a_log_like_any_other(world, labelled):
    _, folder = labelled
    domain = domain_of(world)
    assert len(log_files(folder, "served.parquet")) >= 3, "several days"
    assert set(read_summary(folder)["parts"]) == {"actions.parquet", "impressions.parquet", "served.parquet"}
    times = np.concatenate([batch.request_time_ms for batch in read_requests(folder, domain, batch_rows=7)])
    assert (np.diff(times) >= 0).all()
    served = next(read_requests(folder, domain)).served
    events, starts, erased_before_ms = served.sequences()
    assert (events.dtype, starts[0], starts[-1]) == (EVENT_DTYPE, 0, len(events))
    assert len(starts) - 1 == len(erased_before_ms) == len(served.table)
    part = served.take(np.arange(2, 5)).sequences()[0]
    assert part.tobytes() == events[starts[2] : starts[5]].tobytes()
    assert CLICK in np.concatenate([batch.labels for batch in read_requests(folder, domain)])
    assert Path(folder, "summary.json").exists()
