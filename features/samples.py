"""A file of sampled requests, with which a starting server warms its models: serialized RankRequests, each behind its length.

It holds user ids. So who writes it leaves erased users out, and the erasure job takes them out, both under one lock: whichever comes last
knows of the erasure, since the ledger is written before the job comes here.
"""

import fcntl
import io
import os
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from google.protobuf.message import DecodeError
from google.protobuf.proto import parse_length_prefixed, serialize_length_prefixed

from protos.v1.ranking_pb2 import RankRequest

WARM = "warm"
"""Folder of these files below the home folder: RANKER.pb."""


def read_samples(path: Path) -> list[RankRequest]:
    """The requests of a file, in its order; none where there is no file. What a damaged file has behind the damage is left out."""
    found: list[RankRequest] = []
    try:
        stream = io.BytesIO(path.read_bytes())
    except OSError:
        return found
    try:
        while (request := parse_length_prefixed(RankRequest, stream)) is not None:
            found.append(request)
    except (DecodeError, ValueError):
        pass
    return found


def write_samples(path: Path, requests: Iterable[RankRequest]) -> None:
    """Writes a file in one step; nobody else may read it. Call it under `locked`."""
    stream = io.BytesIO()
    for request in requests:
        serialize_length_prefixed(request, stream)
    partial = path.with_name(f".{path.name}.part")
    partial.touch(mode=0o600)
    partial.write_bytes(stream.getvalue())
    partial.replace(path)


def names_any(request: RankRequest, users: Collection[int]) -> bool:
    """Whether a request is for one of the users, or for a person who has one of them as a further identity."""
    return request.user_id in users or any(user in users for user in request.identities)


def drop_samples(folder: Path, users: Collection[int]) -> int:
    """Takes every request of these users out of the folder's files; returns how many there were."""
    dropped = 0
    with locked(folder):
        for path in folder.glob(".*.part"):  # of a killed server
            path.unlink()
        for path in sorted(folder.glob("*.pb")):
            requests = read_samples(path)
            kept = [request for request in requests if not names_any(request, users)]
            if len(kept) < len(requests):
                write_samples(path, kept)
                dropped += len(requests) - len(kept)
    return dropped


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other writers of the folder out until the block ends; makes the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / "lock", os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
