"""The sequence encoder of `inference.transact` for training: the same function of the same weights with less arithmetic, with gradients.

`SequenceEncoder` stays the definition; tests compare outputs and gradients with it. Equal in real numbers, so up to rounding, by what
`inference.transact_fast` says of scores and values (its points 1 to 3), for one head:
1. In layer 1 queries, keys and values are a request's; a candidate adds one vector to the scores of its tokens and one to their values.
2. Value and output projection are one matrix; in later layers so are query and key, and the keys are the tokens themselves.
3. The bias of the keys, and in layer 1 all that a candidate adds to them, cancels in the softmax: its gradient is zero here as it is there.
Dropout is that of the layers, on weights, outputs and inner values; what it leaves of a token's weights does not add up to 1, so biases of
values stand with the values.

Symbols are those of `inference.transact`.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from inference.encoders import EncoderLayer
    from inference.transact import SequenceEncoder

MASKED = -1e9
DRAWS = 1 << 16


class TrainEncoder:
    """A `SequenceEncoder` in training."""

    def __init__(self, encoder: "SequenceEncoder") -> None:
        self._encoder = encoder
        self.applies = encoder.has_fast and cast("EncoderLayer", encoder.layers[0]).heads == 1
        """Whether the encoder has TransAct's own form, and one head; what is saved here needs that."""

    def __call__(self, tensors: Mapping[str, Tensor], candidate: Tensor, request_row: Tensor, window_ms: Tensor | None) -> Tensor:
        """Compressed sequence of each candidate, float32 [N, (K + 1) E]: `SequenceEncoder.forward`."""
        encoder = self._encoder
        valid = encoder.valid(tensors)  # [R, S]
        skipped = None
        if window_ms is not None:
            tensors, skipped = _behind_windows(tensors, valid, window_ms)
            valid = encoder.valid(tensors)
        history = encoder.tokens(tensors, valid)  # [R, S, E - D]
        hidden = torch.zeros(valid.shape, device=valid.device).masked_fill_(~valid, MASKED)[:, None]  # [R, 1, S]
        first, *later = cast("list[EncoderLayer]", list(encoder.layers))
        x = _first(first, history, candidate, request_row, hidden)
        padded = not bool(valid.all())
        for layer in later:
            x = _later(layer, x, hidden[request_row] if padded else None)
        real = valid[request_row].unsqueeze(-1)  # [N, S, 1]
        pooled = x
        if padded:
            pooled = x.masked_fill(~real, MASKED)
        pooled = pooled.max(1).values  # [N, E]
        if padded:
            pooled = pooled.masked_fill(~real.any(1), 0.0)
        first_k = _first_k(x, real, encoder.first_k, None if skipped is None else skipped[request_row])
        return torch.cat([first_k.flatten(1), pooled], 1)


def _behind_windows(tensors: Mapping[str, Tensor], valid: Tensor, window_ms: Tensor) -> tuple[dict[str, Tensor], Tensor | None]:
    """The request's tensors without the actions younger than `window_ms` [R, 1], and how many those are: int64 [R, 1]; None: nowhere any.

    Actions come newest first, so they are the first ones: what is masked takes no part in anything, and costs nothing here.
    """
    S = valid.shape[1]
    skipped = (valid & (tensors["sequence_age_ms"][:, :S] < window_ms)).sum(1, keepdim=True)  # [R, 1]
    if not bool(skipped.any()):
        return dict(tensors), None
    count = tensors["sequence_count"].reshape(-1, 1) - skipped
    places = (torch.arange(max(1, int(count.max())), device=count.device) + skipped).clamp(max=S - 1)  # [R, S']
    rows = torch.arange(len(places), device=count.device)[:, None]
    cut = {name: value[rows, places] for name, value in tensors.items() if name.startswith("sequence_") and name != "sequence_count"}
    return {**tensors, **cut, "sequence_count": count}, skipped


def _first_k(x: Tensor, real: Tensor, K: int, skipped: Tensor | None) -> Tensor:
    """The tokens of the first K places, float32 [N, K, E]: zero where a place is padding or was `skipped` [N, 1]."""
    S = x.shape[1]
    if skipped is None:
        kept = x[:, :K].masked_fill(~real[:, :K], 0.0)
        return functional.pad(kept, (0, 0, 0, K - kept.shape[1]))
    place = torch.arange(K, device=x.device) - skipped  # [N, K]
    there = ((place >= 0) & (place < S)).unsqueeze(-1)
    place = place.clamp(0, S - 1).unsqueeze(-1)  # [N, K, 1]
    return x.gather(1, place.expand(-1, -1, x.shape[2])).masked_fill(~(there & real.gather(1, place)), 0.0)


def _first(layer: "EncoderLayer", history: Tensor, candidate: Tensor, request_row: Tensor, hidden: Tensor) -> Tensor:
    """Layer 1: history [R, S, E - D], candidate [N, D] to [N, S, E]."""
    E, shared = layer.out.in_features, history.shape[-1]
    q, k, v = layer.qkv.weight.view(3, E, E)
    q_bias, _, v_bias = layer.qkv.bias.view(3, E)
    out, scale = layer.out.weight / _kept(layer), E**-0.5
    query = functional.linear(history, q[:, :shared], q_bias)  # [R, S, E]
    key = functional.linear(history, k[:, :shared]) * scale  # [R, S, E]
    of_history = query @ key.transpose(1, 2) + hidden  # [R, S, S]
    of_candidate = key.index_select(0, request_row) @ functional.linear(candidate, q[:, shared:]).unsqueeze(-1)  # [N, S, 1]
    scores = of_history.index_select(0, request_row) + of_candidate.transpose(1, 2)  # [N, S, S]
    both = out @ v  # [E, E]
    added = functional.linear(candidate, both[:, shared:], out @ v_bias)  # [N, E]
    value = functional.linear(history, both[:, :shared]).index_select(0, request_row) + added[:, None]  # [N, S, E]
    x = torch.cat([history.index_select(0, request_row), candidate[:, None].expand(-1, history.shape[1], -1)], -1)  # [N, S, E]
    return _behind(layer, x, scores, value)


def _later(layer: "EncoderLayer", x: Tensor, mask: Tensor | None) -> Tensor:
    """Another layer: [N, S, E] to the same; `mask` [N, 1, S] is added to the scores."""
    E = layer.out.in_features
    q, k, v = layer.qkv.weight.view(3, E, E)
    q_bias, _, v_bias = layer.qkv.bias.view(3, E)
    out, scale = layer.out.weight / _kept(layer), E**-0.5
    weight = torch.cat([k.T @ q * scale, out @ v])  # [2 E, E]
    bias = torch.cat([q_bias @ k * scale, out @ v_bias])
    query, value = functional.linear(x, weight, bias).tensor_split(2, -1)  # each [N, S, E]
    scores = query @ x.transpose(1, 2)  # [N, S, S]
    return _behind(layer, x, scores if mask is None else scores + mask, value)


def _behind(layer: "EncoderLayer", x: Tensor, scores: Tensor, value: Tensor) -> Tensor:
    """What attention and feedforward add to the tokens: [N, S, E]. `value` has been through the output projection, but for its bias."""
    kept = _kept(layer)
    x = layer.norm_attention(_added(x, torch.baddbmm(layer.out.bias, _dropped(scores.softmax(-1), kept), value), kept))
    inner = _dropped(functional.relu(layer.wide(x)), kept)  # [N, S, F]
    x = _added(x, functional.linear(inner, layer.narrow.weight / kept, layer.narrow.bias), kept)
    return layer.norm_feedforward(x)  # type: ignore[no-any-return]


def _kept(layer: "EncoderLayer") -> float:
    """The share that dropout keeps. What is kept is divided by it: in the matrices behind, where they are, which costs nothing."""
    return round((1.0 - layer.dropout) * DRAWS) / DRAWS if layer.training else 1.0


def _keeps(like: Tensor, kept: float) -> Tensor:
    """1 with probability `kept`, else 0, in the shape of `like`: four draws of 16 bits from each of the generator's numbers.

    `bernoulli_` takes six times as long and would be a seventh of the whole step; so would a comparison, which clamping stands for.
    """
    n = like.numel()
    drawn = torch.empty(-(-n // 4), dtype=torch.int64, device=like.device).random_(-(2**63), None).view(torch.int16)[:n]
    # Whole numbers from -DRAWS / 2 to DRAWS / 2 - 1, moved so that those above 0 are the share `kept`.
    return drawn.float().sub_(DRAWS // 2 - round(kept * DRAWS) - 1).clamp_(0.0, 1.0).to(like.dtype).view(like.shape)


def _dropped(x: Tensor, kept: float) -> Tensor:
    """Dropout, but for the division."""
    return x if kept == 1.0 else x * _keeps(x, kept)


def _added(x: Tensor, y: Tensor, kept: float) -> Tensor:
    """x + dropout(y)."""
    return x + y if kept == 1.0 else torch.addcmul(x, y, _keeps(y, kept), value=1.0 / kept)
