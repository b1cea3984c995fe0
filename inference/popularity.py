"""Popularity of items: the tier for users of whom nothing is known, and what a cold item is compared with.

A space of its own, `popularity`, with one number an item: its positive actions, each counting half as much every HALF_LIFE_DAYS, as
log1p. Servers take the newest generation; a job may write one every hour.
"""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from features.domain import DAY_MS, Domain
from features.erasures import NOBODY, Erased
from features.ids import U64
from features.tables import Generation, Member, generation_names, item_member, open_generation, write_generation

SPACE = "popularity"
HALF_LIFE_DAYS = 7.0
_COLUMN = "popularity"


class Popularity:
    """A mapped generation. Safe to share between threads."""

    def __init__(self, generation: Generation, domain: Domain) -> None:
        self.generation = generation
        self._members = {number: item_member(name) for name, number in domain.entities.items()}

    def scores(self, kinds: npt.NDArray[np.uint8], ids: U64) -> npt.NDArray[np.float32]:
        """Popularity of items, kinds uint8 [n] and ids uint64 [n]: float32 [n], 0 for those that it does not know."""
        found = np.zeros(len(ids), np.float32)
        for kind, member in self._members.items():
            table, where = self.generation.column(member, _COLUMN), np.flatnonzero(kinds == kind)
            if table is not None and len(where):
                found[where] = np.nan_to_num(table.take(self.generation.rows(member, ids[where]), mode="clip"))
        return found


def open_popularity(root: str | Path, domain: Domain) -> Popularity | None:
    """The newest generation below `root`; None: there is none. Raises TableError: it is damaged."""
    if not generation_names(root, SPACE):
        return None
    return Popularity(open_generation(root, SPACE, verify=True), domain)


def publish_popularity(domain: Domain, log: str | Path, root: str | Path, *, until_ms: int, erased: Erased = NOBODY) -> Path:
    """Writes a generation from the canonical log's positive actions before `until_ms`. Raises EmbeddingError: there are none."""
    from inference.embeddings import positive_actions  # brings PyTorch along, which a ranking server need not load

    positives = positive_actions(domain, log, until_ms, erased)
    weight = 0.5 ** ((until_ms - positives.append_time_ms) / (HALF_LIFE_DAYS * DAY_MS))
    members = {}
    for name, kind in domain.entities.items():
        of = positives.kinds == kind
        ids, row = np.unique(positives.ids[of], return_inverse=True)
        counts = np.bincount(row.reshape(-1), weight[of], minlength=len(ids))
        members[item_member(name)] = Member(ids, features={_COLUMN: np.log1p(counts).astype(np.float32)})
    return write_generation(root, SPACE, until_ms, members)
