"""The label join against its naive oracle: retries, shadows, identities, no watermark, moves of the log, duplicates, retractions, skewed
clocks, late records, erasures, actions without a request id; and what may not matter: order, split by user, schedule of passes."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from features.actions import EVENT_DTYPE
from features.domain import parse_domain
from features.labels import OUTCOMES, Lists, Named, Rules, join, named
from features.labels_oracle import NaiveRanking, NaiveRecord, naive_join
from features.logs import LoggedActions

VIEW, CLICK, LIKE, UNLIKE, HIDE = 1, 2, 3, 4, 5
WINDOW_MS, GRACE_MS, LATE_MS = 20, 4, 12
RULES = Rules(
    window_ms=WINDOW_MS,
    grace_ms=GRACE_MS,
    late_ms=LATE_MS,
    impressions=(VIEW,),
    retracts=((UNLIKE, LIKE), (HIDE, LIKE)),
    unseen_max=2,
    future_tolerance_ms=6,
)
ITEMS = [(1, 1), (1, 2**64 - 1), (2, 1), (2, 7)]
USERS = [1, 2, 2**64 - 1]
END_MS = 10_000


def to_lists(rankings):
    """Candidates stand in reverse, so that only `position` tells the order."""

    def column(values, dtype):
        return np.array(list(values), dtype)

    rows = [(item, place) for one in rankings for place, item in reversed(list(enumerate(one.items)))]
    who = [entry for one in rankings for entry in one.who]
    return Lists(
        request_id=column((one.request_id for one in rankings), np.uint64),
        request_time_ms=column((one.request_time_ms for one in rankings), np.int64),
        served_time_ms=column((one.served_time_ms for one in rankings), np.int64),
        shadow=column((one.shadow for one in rankings), bool),
        partition=column((one.partition for one in rankings), np.int32),
        offset=column((one.offset for one in rankings), np.int64),
        starts=np.cumsum([0, *(len(one.items) for one in rankings)]),
        entity_kind=column((kind for (kind, _), _ in rows), np.uint8),
        entity_id=column((item for (_, item), _ in rows), np.uint64),
        position=column((place for _, place in rows), np.int32),
        who_starts=np.cumsum([0, *(len(one.who) for one in rankings)]),
        who=column((user for user, _, _ in who), np.uint64),
        log_epoch=column((epoch for _, epoch, _ in who), np.uint64),
        offset_read=column((read for _, _, read in who), np.int64),
    )


def to_actions(records):
    events = np.zeros(len(records), EVENT_DTYPE)
    for event, record in zip(events, records, strict=True):
        if not record.erase:
            event["entity_kind"], event["entity_id"] = record.item
            event["action"], event["request_id"] = record.action, record.request_id
            event["event_time_ms"] = record.event_time_ms
        event["event_id"] = record.event_id
    names = {
        "user": np.uint64,
        "append_time_ms": np.int64,
        "log_epoch": np.uint64,
        "partition": np.int32,
        "offset": np.int64,
        "erase": bool,
    }
    users, *rest = (np.array([getattr(record, name) for record in records], dtype) for name, dtype in names.items())
    return LoggedActions(users, events, *rest)


def by_list(lists, joined):
    """{(user, request id, place of the record): (final, rows as the oracle has them)}, in the order of the answer."""
    found = {}
    for i, one in enumerate(joined.lists.tolist()):
        rows = []
        for at in range(joined.starts[i], joined.starts[i + 1]):
            row = joined.rows[at]
            labels = tuple(joined.labels[joined.label_starts[at] : joined.label_starts[at + 1]].tolist())
            rows.append(((int(lists.entity_kind[row]), int(lists.entity_id[row])), bool(joined.seen[at]), labels))
        key = int(lists.user_id[one]), int(lists.request_id[one]), int(lists.partition[one]), int(lists.offset[one])
        found[key] = bool(joined.final[i]), rows
    return found


def expected_lists(rankings, lists):
    def key(one):
        return one.user_id, one.request_id, one.partition, one.offset

    return {key(rankings[one.ranking]): (one.final, one.rows) for one in lists}


@st.composite
def rankings_of(draw, steady, size=6):
    """`steady`: each user always with the same identities, and each ranking logged soon after its request."""
    found = []
    for offset in range(draw(st.integers(1, 3)) * size // 3):
        user = draw(st.sampled_from(USERS))
        identities = st.lists(st.sampled_from([other for other in USERS if other != user]), max_size=2, unique=True)
        others = ([USERS[2]] if user == USERS[0] else []) if steady else draw(st.one_of(st.just([]), identities))
        time_ms = draw(st.integers(100, 135))
        late_ms = draw(st.integers(0, LATE_MS - 1) if steady else st.integers(-8, 30))
        none = draw(st.integers(0, 6)) == 3
        epoch = draw(st.sampled_from([7, 7, 7, 8]))
        who = tuple((one, 0, -1) if none else (one, epoch, draw(st.integers(-1, 9))) for one in (user, *others))
        items = draw(st.lists(st.sampled_from(ITEMS), min_size=1, unique=True))
        shadow = draw(st.integers(0, 15)) == 7  # not 0, which is drawn too often
        request_id = draw(st.sampled_from([11, 2**64 - 1]))
        found.append(NaiveRanking(request_id, time_ms, time_ms + late_ms, draw(st.integers(0, 1)), offset, shadow, who, tuple(items)))
    return found


@st.composite
def worlds(draw, steady=False, erasures=True):
    """(rankings, records). `steady`: the append times of each partition never go back. Most actions answer one of the rankings."""
    rankings = draw(rankings_of(steady))
    records, clock_ms = [], {}
    for offset in range(draw(st.integers(0, 3)) * 8 + draw(st.integers(0, 7))):
        one = draw(st.sampled_from(rankings))
        user = draw(st.sampled_from([*(who for who, _, _ in one.who), *(USERS if draw(st.integers(0, 4)) == 3 else [])]))
        epoch, partition = draw(st.sampled_from([7, 7, 7, 8, 0])), user % 2
        append_ms = one.request_time_ms + draw(st.one_of(st.integers(-4, WINDOW_MS), st.integers(WINDOW_MS, WINDOW_MS + LATE_MS + 3)))
        if steady:
            append_ms = clock_ms[epoch, partition] = max(append_ms, clock_ms.get((epoch, partition), 0))
        place = {"user": user, "append_time_ms": append_ms, "log_epoch": epoch, "partition": partition, "offset": offset}
        if erasures and draw(st.integers(0, 29)) == 13:
            records.append(NaiveRecord(**place, erase=True, event_id=offset))
            continue
        action = NaiveRecord(
            **place,
            action=draw(st.sampled_from([VIEW, CLICK, LIKE, LIKE, UNLIKE, HIDE, 200])),
            item=draw(st.sampled_from([*one.items, *one.items, ITEMS[0]])),
            event_time_ms=append_ms - draw(st.sampled_from([0, 1, 12, 15, -3])),
            event_id=draw(st.sampled_from([offset, offset, offset, offset, max(0, offset - 2)])),
            request_id=draw(st.sampled_from([one.request_id, one.request_id, one.request_id, 0, 0, 99])),
        )
        records.append(action)
    return rankings, records


UNTIL = st.one_of(st.integers(90, 200), st.just(END_MS))
RULE_SETS = st.builds(
    lambda unseen_max, window_ms, without_id: replace(RULES, unseen_max=unseen_max, window_ms=window_ms, without_id=without_id),
    unseen_max=st.integers(0, 4),
    window_ms=st.sampled_from([0, 5, WINDOW_MS, WINDOW_MS]),
    without_id=st.sampled_from([True, True, True, False]),
)


@settings(max_examples=500, deadline=None)
@given(world=worlds(), rules=RULE_SETS, until_ms=UNTIL)
def test_join_is_what_the_rules_say(world, rules, until_ms):
    rankings, records = world
    lists = to_lists(rankings)
    joined = join(lists, to_actions(records), rules, until_ms)
    naive, outcomes, counts = naive_join(rankings, records, rules, until_ms)
    assert by_list(lists, joined) == expected_lists(rankings, naive)
    assert [lists.request_time_ms[i] for i in joined.lists] == [rankings[one.ranking].request_time_ms for one in naive]
    assert [OUTCOMES[number] for number in joined.outcome] == outcomes
    assert joined.counts == {name: counts[name] for name in joined.counts}
    assert not set(counts) - set(joined.counts)
    assert sum(joined.outcomes().values()) == len(records)


@settings(max_examples=100, deadline=None)
@given(world=worlds(), until_ms=UNTIL, data=st.data())
def test_the_order_of_arrival_does_not_matter(world, until_ms, data):
    rankings, records = world
    lists, actions = to_lists(rankings), to_actions(records)
    joined = join(lists, actions, RULES, until_ms)
    shuffled = data.draw(st.permutations(rankings))
    order = data.draw(st.permutations(range(len(records))))
    again = join(to_lists(shuffled), to_actions([records[i] for i in order]), RULES, until_ms)
    assert list(by_list(to_lists(shuffled), again).items()) == list(by_list(lists, joined).items())
    assert again.outcome.tolist() == joined.outcome[order].tolist()
    assert again.counts == joined.counts


@settings(max_examples=100, deadline=None)
@given(world=worlds(), until_ms=UNTIL, buckets=st.sampled_from([1, 3, 17]))
def test_users_may_be_joined_apart(world, until_ms, buckets):
    rankings, records = world
    parts = []
    for bucket in range(buckets):
        mine = [one for one in rankings if one.user_id % buckets == bucket]
        users = {who for one in mine for who, _, _ in one.who}
        parts.append((mine, [i for i, record in enumerate(records) if record.user in users]))
    inputs = [(to_lists(mine), to_actions([records[i] for i in chosen])) for mine, chosen in parts]
    others = Named(*map(np.concatenate, zip(*(named(*each, RULES) for each in inputs), strict=True)))
    found, counts, outcome = {}, {}, np.zeros(len(records), np.uint8)
    for (_, chosen), each in zip(parts, inputs, strict=True):
        joined = join(*each, RULES, until_ms, others)
        found |= by_list(each[0], joined)
        counts = {name: counts.get(name, 0) + number for name, number in joined.counts.items()}
        outcome[chosen] = np.maximum(outcome[chosen], joined.outcome)
    lists = to_lists(rankings)
    whole = join(lists, to_actions(records), RULES, until_ms)
    assert found == by_list(lists, whole)
    assert counts == whole.counts
    somewhere = sorted({i for _, chosen in parts for i in chosen})
    assert outcome[somewhere].tolist() == whole.outcome[somewhere].tolist()


def passes(rankings, records, rules, untils):
    """Final lists of passes that read what was logged before each `until`; a list that was final once is never looked at again."""
    kept = {}
    for until_ms in sorted(untils):
        known = [one for one in rankings if one.served_time_ms < until_ms]
        actions = to_actions([record for record in records if record.append_time_ms < until_ms])
        joined = join(to_lists(known), actions, rules, until_ms)
        for key, (final, rows) in by_list(to_lists(known), joined).items():
            if final:
                kept.setdefault(key, rows)
    return kept


@settings(max_examples=150, deadline=None)
@given(world=worlds(steady=True, erasures=False), untils=st.lists(st.integers(110, 200), max_size=5))
def test_the_schedule_of_passes_does_not_matter(world, untils):
    rankings, records = world
    assert passes(rankings, records, RULES, [*untils, END_MS]) == passes(rankings, records, RULES, [END_MS])


@settings(max_examples=150, deadline=None)
@given(world=worlds(steady=True), untils=st.lists(st.integers(110, 200), max_size=5))
def test_an_erasure_takes_final_lists_away_and_changes_no_other(world, untils):
    """Of actions with a request id: an erased list may have claimed one without."""
    rankings, records = world
    rules = replace(RULES, without_id=False)
    kept, whole = passes(rankings, records, rules, [*untils, END_MS]), passes(rankings, records, rules, [END_MS])
    assert {key: kept[key] for key in whole} == whole
    erased = {record.user: record.append_time_ms for record in records if record.erase}
    of = {(one.user_id, one.request_id, one.partition, one.offset): one for one in rankings}
    for key in kept.keys() - whole.keys():
        assert any(who in erased for who, _, _ in of[key].who)


@settings(max_examples=100, deadline=None)
@given(world=worlds(), until_ms=UNTIL)
def test_what_was_erased_leaves_no_trace(world, until_ms):
    """Logs from which the past was taken give what the logs with it give."""
    rankings, records = world
    lists = to_lists(rankings)
    joined = join(lists, to_actions(records), RULES, until_ms)
    living = [record for record, number in zip(records, joined.outcome, strict=True) if OUTCOMES[number] != "erased"]
    known = [one for one in rankings if join(to_lists([one]), to_actions(records), RULES, until_ms).counts["erased"] == 0]
    again = join(to_lists(known), to_actions(living), RULES, until_ms)
    assert by_list(to_lists(known), again) == by_list(lists, joined)


@settings(max_examples=150, deadline=None)
@given(world=worlds(), until_ms=UNTIL)
def test_what_must_always_hold(world, until_ms):
    rankings, records = world
    lists, actions = to_lists(rankings), to_actions(records)
    joined = join(lists, actions, RULES, until_ms)
    assert joined.seen[np.diff(joined.label_starts) > 0].all(), "a label on what nobody saw"
    assert VIEW not in joined.labels
    assert len(joined.lists) == joined.counts["written"]
    assert (np.diff(joined.starts) > 0).all(), "a list is whole, clicked or not"
    for i, one in enumerate(joined.lists):
        ranking = rankings[one]
        read = {who: (epoch, offset) for who, epoch, offset in ranking.who}
        for at in range(joined.starts[i], joined.starts[i + 1]):
            item = int(lists.entity_kind[joined.rows[at]]), int(lists.entity_id[joined.rows[at]])
            for label in joined.labels[joined.label_starts[at] : joined.label_starts[at + 1]]:
                assert any(
                    record.action == label
                    and record.item == item
                    and record.user in read
                    and not record.erase
                    and (record.log_epoch != read[record.user][0] or record.offset > read[record.user][1])
                    and record.request_id in (0, ranking.request_id)
                    for record in records
                ), "no action behind the watermark explains this label"


# Each rule by an example


def ranking(time_ms=100, user=1, request_id=11, *, identities=(), read=5, epoch=7, items=ITEMS[:3], offset=0, served_ms=None, shadow=False):
    who = tuple((one, epoch, read) for one in (user, *identities))
    return NaiveRanking(request_id, time_ms, time_ms + 1 if served_ms is None else served_ms, 0, offset, shadow, who, tuple(items))


def action(offset, what=CLICK, item=ITEMS[0], *, user=1, at=105, append=None, request_id=11, event_id=None, epoch=7, erase=False):
    append = at if append is None else append
    return NaiveRecord(user, append, epoch, 0, offset, erase, what, item, at, offset if event_id is None else event_id, request_id)


def outcome_and_labels(rankings, records, rules=RULES, until_ms=END_MS):
    lists = to_lists(rankings)
    joined = join(lists, to_actions(records), rules, until_ms)
    labels = [[row[2] for row in rows] for _, rows in by_list(lists, joined).values()]
    return [OUTCOMES[number] for number in joined.outcome], labels


@pytest.mark.parametrize(
    ("rankings", "records", "outcomes", "labels"),
    [
        pytest.param([ranking()], [], [], [[(), ()]], id="a list without an action stays, cut to unseen_max"),
        pytest.param([ranking()], [action(6)], ["joined"], [[(CLICK,), (), ()]], id="a click"),
        pytest.param([ranking()], [action(5)], ["not_behind"], [[(), ()]], id="what the ranking had read is no answer"),
        pytest.param([ranking()], [action(6, at=90, append=104)], ["joined"], [[(CLICK,), (), ()]], id="a clock behind"),
        pytest.param([ranking(epoch=0, read=-1)], [action(1, at=101)], ["joined"], [[(CLICK,), (), ()]], id="NONE: after by time"),
        pytest.param([ranking(epoch=0, read=-1)], [action(9, at=100)], ["not_behind"], [[(), ()]], id="NONE: at its time"),
        pytest.param([ranking()], [action(6, at=121)], ["after_window"], [[(), ()]], id="after the window"),
        pytest.param([ranking()], [action(6, at=120, append=133)], ["too_late"], [[(), ()]], id="too late"),
        pytest.param([ranking()], [action(6, user=2)], ["no_list"], [[(), ()]], id="somebody else's action"),
        pytest.param([ranking(identities=(2,))], [action(6, user=2)], ["joined"], [[(CLICK,), (), ()]], id="an identity's action"),
        pytest.param([ranking()], [action(4, event_id=1), action(6, event_id=1)], ["not_behind", "duplicate"], [[(), ()]], id="sent twice"),
        pytest.param([ranking()], [action(6, LIKE), action(7, UNLIKE)], ["joined"] * 2, [[(UNLIKE,), (), ()]], id="taken back"),
        pytest.param([ranking()], [action(6, UNLIKE), action(7, LIKE)], ["joined"] * 2, [[(LIKE,), (), ()]], id="and again"),
        pytest.param(
            [ranking(), ranking(103, offset=1, read=7)],
            [action(6), action(8, at=106)],
            ["superseded", "joined"],
            [[(CLICK,), (), ()]],
            id="a refresh under one id",
        ),
        pytest.param(
            [ranking(request_id=11), ranking(103, request_id=12, offset=1)],
            [action(8, request_id=0), action(9, request_id=0, at=102)],
            ["joined", "joined"],
            [[(CLICK,), (), ()], [(CLICK,), (), ()]],
            id="no request id: the last list before it",
        ),
        pytest.param(
            [ranking(user=1, identities=(3,)), ranking(user=2, identities=(3,), offset=1)],
            [action(8, user=3, request_id=0)],
            ["ambiguous"],
            [[(), ()], [(), ()]],
            id="a shared device without a request id",
        ),
        pytest.param(
            [ranking(), ranking(130, request_id=12, offset=1, read=9)],
            [action(6), action(8, at=110, erase=True), action(9, at=131, request_id=12)],
            ["erased", "erasure", "not_behind"],
            [[(), ()]],
            id="an erasure",
        ),
        pytest.param([ranking(shadow=True)], [action(6)], ["no_list"], [], id="a shadow"),
        pytest.param([ranking(served_ms=93)], [action(6)], ["no_list"], [], id="a request from the future"),
    ],
)
def test_examples(rankings, records, outcomes, labels):
    assert outcome_and_labels(rankings, records) == (outcomes, labels)


def test_a_request_id_used_again_after_the_window_is_another_list():
    for again_ms, written in ((100 + WINDOW_MS, 1), (100 + WINDOW_MS + 1, 2)):
        rankings = [ranking(), ranking(again_ms, offset=1, served_ms=again_ms)]
        assert join(to_lists(rankings), to_actions([]), RULES, END_MS).counts["written"] == written


def test_a_list_is_written_after_the_grace_and_final_after_the_late_time():
    lists, none = to_lists([ranking()]), to_actions([])
    ends_ms = 100 + WINDOW_MS
    for until_ms, written, final in (
        (ends_ms + GRACE_MS, 0, 0),
        (ends_ms + GRACE_MS + 1, 1, 0),
        (ends_ms + LATE_MS, 1, 0),
        (ends_ms + LATE_MS + 1, 1, 1),
    ):
        counts = join(lists, none, RULES, until_ms).counts
        assert (counts["written"], counts["final"], counts["waiting"]) == (written, final, 1 - written)


def test_no_ranking_and_no_action():
    joined = join(to_lists([]), to_actions([]), RULES, END_MS)
    assert not len(joined.lists)
    assert set(joined.counts.values()) == {0}
    assert joined.outcomes() == dict.fromkeys(OUTCOMES, 0)


def test_rules_come_from_the_domain_file_and_are_checked():
    domain = parse_domain(
        """
name = "shop"
future_tolerance_ms = 50
[entities]
product = 1
[actions]
view = { id = 1, kind = "impression" }
like = { id = 3, kind = "positive" }
unlike = { id = 4, kind = "negative", retracts = "like" }
[sequence.main]
id = 1
[ranker.home]
sequence = "main"
item_space = "items"
heads.like = { actions = ["like"] }
""",
        source="shop.toml",
    )
    rules = Rules.of(domain, window_ms=3, grace_ms=1, late_ms=2)
    assert rules == Rules(3, 1, 2, impressions=(1,), retracts=((4, 3),), future_tolerance_ms=50)
    for wrong in ({"window_ms": -1}, {"grace_ms": 3}, {"grace_ms": -1}, {"unseen_max": -1}):
        with pytest.raises(ValueError, match="_m"):
            replace(rules, **wrong)
