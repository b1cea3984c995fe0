"""Cosines of the candidate's batch vector with the user's and with those of the sequence, as inputs of the ranker.

Deviates: TransAct (KDD 2023) has none; its encoder can learn them from components. Where a log is short, or vectors are made anew every
hour, a cosine is there from the first step, and does not change when the vectors turn (docs/quality.md has the comparison).

Vectors have to be of the time before each request (`[ranker.NAME.refresh]`): those that are factorised from the whole training part
know some of its answers, and a model trusts a cosine on sight.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from features.domain import Domain


class Similarities(nn.Module):
    """Cosines times sqrt(D), which makes them about as large as the other inputs; 0 where one of both has no vector. No weights.

    Columns: with the user; with the newest action that has a vector; then, for each action that the sequence may hold (if the model sees
    actions, and there are several) and for all together, the mean and the greatest.
    """

    def __init__(self, domain: Domain, ranker_name: str, *, user: bool, sequence: bool) -> None:
        """`user`, `sequence`: whether the model has them."""
        super().__init__()
        ranker = domain.ranker[ranker_name]
        self.user = user
        self.scale = ranker.embedding_dimension**0.5
        numbers = [action.id for action in domain.seen_actions(ranker_name).values() if action.retracts is None]
        self.actions = numbers if ranker.model.action_types and len(numbers) > 1 else []
        self.widths = (1,) * user + (1, *(2,) * (len(self.actions) + 1)) * sequence
        """Of the user's, the newest, and each group of actions."""

    @torch.no_grad()
    def forward(self, tensors: Mapping[str, Tensor], request_row: Tensor, valid: Tensor | None) -> Tensor:
        """Float32 [N, sum(widths)]; `valid` bool [R, S] says which actions are seen, None without the sequence."""
        with torch.autocast(request_row.device.type, enabled=False):  # bf16 has too few digits for the order of neighbours
            candidate = _unit(tensors["candidate_embedding"])  # [N, D]
            found = []
            if self.user:
                found.append((_unit(tensors["user_embedding"])[request_row] * candidate).sum(1))
            if valid is not None:
                found += self._of_sequence(tensors, candidate, request_row, valid)
            return torch.stack(found, 1) * self.scale if found else candidate[:, :0]

    def _of_sequence(self, tensors: Mapping[str, Tensor], candidate: Tensor, request_row: Tensor, valid: Tensor) -> list[Tensor]:
        S = valid.shape[1]
        action = _unit(tensors["sequence_embedding"][:, :S].masked_fill(~valid.unsqueeze(-1), 0.0))  # [R, S, D]
        has = valid & (action != 0).any(-1)
        one = len(valid) == 1
        cosines = candidate @ action[0].T if one else torch.bmm(action[request_row], candidate.unsqueeze(-1)).squeeze(-1)  # [N, S]
        seen = has[request_row]  # [N, S]
        newest = seen & (seen.cumsum(1) == 1)  # one place at most
        found = [cosines.masked_fill(~newest, 0.0).sum(1)]
        for number in (*self.actions, None):
            of = seen if number is None else (has & (tensors["sequence_action"][:, :S] == number))[request_row]
            count = of.sum(1)
            found.append(cosines.masked_fill(~of, 0.0).sum(1) / count.clamp(min=1))
            found.append(cosines.masked_fill(~of, -1.0).amax(1).masked_fill(count == 0, 0.0))
        return found


def _unit(vectors: Tensor) -> Tensor:
    """Of length 1, float32; zero where there is no vector."""
    return functional.normalize(vectors.float(), dim=-1, eps=1e-12)
