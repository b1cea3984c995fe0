"""What tests of a worker's figures share: batches as the hot path observes them, and a scrape read back."""

import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from features.actions import ACTION, EVENT_DTYPE, REJECTED, Batch
from streams.core import Applied

Samples = dict[str, dict[tuple[tuple[str, str], ...], float]]


def applied(append_times_ms: list[int], partition: int = 0, rows: int = 1, reasons: dict[int, str] | None = None) -> Applied:
    """A batch of accepted records, but for those with a reason."""
    n = len(append_times_ms)
    verdict = np.full(n, ACTION, np.uint8)
    verdict[list(reasons or ())] = REJECTED
    times = np.array(append_times_ms, np.int64)
    batch = Batch(1, partition, np.arange(n), times, verdict, np.ones(n, np.uint64), np.zeros(n, EVENT_DTYPE), reasons or {})
    return Applied(partition, batch, rows, 0, {"decode": 0.1, "fold": 0.2, "store": 0.3, "view": 0.4})


def scraped(text: str) -> tuple[Samples, dict[str, str]]:
    """Samples of an exposition by name and labels, and the type of each family by name."""
    samples: Samples = {}
    types = {}
    for family in text_string_to_metric_families(text):
        types[family.name] = family.type
        assert family.documentation, family.name
        for sample in family.samples:
            samples.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return samples, types
