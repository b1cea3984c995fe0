"""The erasure job where the log holds actions and erasures in JSON."""

from google.protobuf.json_format import MessageToJson
from test_replay import DOMAIN, EPOCH, ERASED, PARTITIONS, START_MS, MemoryLog

from deploy.replay import ACTIONS
from features.actions import encode_action, encode_erase
from features.domain import DAY_MS, parse_domain
from features.erasures import LEDGER, read_ledger
from features.ids import partition_of, user_key
from protos.v1.actions_pb2 import Action
from streams.archive import ParquetLog, write_archive
from streams.erasure import ErasureJob, run_job
from streams.kafka import Topics


def test_erasures_and_actions_as_json_are_found_and_forgotten(tmp_path):
    partition = partition_of(user_key(ERASED), PARTITIONS)
    said = encode_action(user_id=ERASED, entity_kind=1, entity_id=1, action=1, event_time_ms=START_MS, event_id=5)
    erasure = encode_erase(user_id=ERASED, event_id=6, reason="asked")
    said, erasure = (MessageToJson(Action.FromString(value)).encode() for value in (said, erasure))
    records = [(START_MS, user_key(ERASED), said), (START_MS + 1, b"0123456789abcdef", said), (START_MS + 2, user_key(ERASED), erasure)]
    write_archive(MemoryLog("actions", EPOCH, {partition: records, 1 - partition: []}), tmp_path / "archive" / ACTIONS)
    domain = parse_domain(f'encodings = ["json"]\n{DOMAIN}', source="test")
    run_job(ErasureJob(home=tmp_path, domain=domain, deadline_ms=30 * DAY_MS, topics=Topics(actions="actions")), START_MS + DAY_MS)
    (found,) = read_ledger(tmp_path / LEDGER)
    assert (found.user_id, found.event_id, found.partition, found.offset, found.reason) == (ERASED, 6, partition, 2, "asked")
    log = ParquetLog(tmp_path / "archive" / ACTIONS)
    (left,) = log.read(partition)
    log.close()
    assert left.values == [None, None, erasure]
