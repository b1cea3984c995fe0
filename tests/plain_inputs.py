"""What `inference.dataset` packs at once, one request after the other: the plain form to compare with."""

import numpy as np

from features.actions import EVENT_DTYPE
from features.pack import Column, RankInputs


def plain_inputs(domain, ranker_name, batch, history):
    """`RankInputs` of each request. history: `History`; None: of a served log."""
    wanted = {name: domain.features[name].side for name in domain.ranker[ranker_name].features if name in batch.features}

    def columns(side, low, high):
        return {name: _part(batch.features[name], low, high) for name, of_side in wanted.items() if of_side == side}

    for i in range(len(batch)):
        low, high = int(batch.starts[i]), int(batch.starts[i + 1])
        user_id, time_ms = int(batch.user_id[i]), int(batch.request_time_ms[i])
        if history is None:
            served = batch.served.table.slice(i, 1).to_pylist()[0]
            events, erased_before_ms = np.frombuffer(served["events"], EVENT_DTYPE), served["erased_before_ms"]
        else:
            events, erased_before_ms = history.before(user_id, time_ms)
        yield RankInputs(
            user_id=user_id,
            request_time_ms=time_ms,
            events=events,
            candidate_ids=batch.entity_id[low:high],
            candidate_kinds=batch.entity_kind[low:high],
            candidate_features=columns("candidate", low, high),
            request_features=columns("request", low, low + 1),
            erased_before_ms=erased_before_ms,
        )


def _part(column, low, high):
    if column.lengths is None:
        values = column.values[low:high]
        return Column(number=values) if values.dtype.kind == "f" else Column(category=values)
    first, last = int(column.lengths[:low].sum()), int(column.lengths[:high].sum())
    weights = None if column.weights is None else column.weights[first:last]
    return Column(category=column.values[first:last], lengths=column.lengths[low:high].astype(np.uint32), weights=weights)
