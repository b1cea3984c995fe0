"""The sequence encoder of `inference.transact` for ranking on a CPU: the same function of the same weights with less arithmetic.

`SequenceEncoder` stays the definition: it is trained, it runs on other devices, and tests compare with it. Nothing here has a gradient.

Equal in real numbers, so up to rounding (layer 1: Paper of the model, section 3.2, early fusion by concatenation):
1. A token of layer 1 is [history[t]; candidate[n]]. Of its scores (qh[t] + qc[n]) . (kh[s] + kc[n]) each term with kc[n] is the same for
   all keys s and cancels in the softmax. What is left is A[t, s] = qh[t] . kh[s], once a request, plus B[n, s] = qc[n] . kh[s].
2. The weights of a token's attention add up to 1, so what all values have in common passes through: the candidate's value becomes one row
   a candidate, and the biases of values and output projection become one.
3. A value is projected twice in a row; the product of both matrices does it at once: for each head of layer 1, where values are a
   request's, and in later layers with one head. There queries and keys take one matrix as well, and the keys are the tokens themselves.
4. Requests go one by one, cut to their own length: no padding is computed and nothing is masked.

Deviates from the usual form of 1, (exp(A) (exp(B) v)) / (exp(A) exp(B)). That saves one exponential of [S, S] a candidate, which is within
the noise of the whole, and underflows where A and B peak at keys that lie some 80 nats apart. The softmax of the sum needs no guard.
Later layers are a candidate's own, and the max pool needs all of their rows: nothing of them is left out.

Symbols are those of `inference.transact`; n candidates of a piece, h attention heads, F feedforward width. Matrices are as in `x @ matrix`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from inference.encoders import EncoderLayer
    from inference.transact import SequenceEncoder

TOKENS_AT_ONCE = 3_200
"""Tokens of a piece: 32 candidates with 100 actions each. An array of them takes 1.2 MB, so the arrays of a piece stay in the cache."""

REQUEST_TOKENS_MIN = 256
"""Fewest tokens of a request, on average of a batch, with which going request by request costs less than the plain form. Measured by CPU
time, 128 candidates: 16 actions pay from 16 candidates a request on, 100 actions from about one on."""


@dataclass(frozen=True)
class _First:
    """Attention of layer 1."""

    query: Tensor  # [E - D, E], scaled
    query_bias: Tensor  # [E], scaled
    query_candidate: Tensor  # [D, E], scaled
    key: Tensor  # [E - D, E]; its bias cancels
    value: Tensor  # [E - D, h E]: what each head adds to the token
    bias: Tensor  # [E]
    candidate: Tensor  # [D, E]: the candidate's part of its tokens, plus what its value adds to them


@dataclass(frozen=True)
class _Later:
    """Attention of another layer. One head: [query, value] and no output projection. Several: [query, key, value] and one."""

    project: Tensor  # [E, 2 E] or [E, 3 E], the query scaled
    project_bias: Tensor  # [2 E] or [3 E]
    out: Tensor  # [E, E], several heads only
    out_bias: Tensor  # [E], several heads only


@dataclass(frozen=True)
class _Behind:
    """A layer behind its attention. The bias of the feedforward's output is in that of the norm before it, which its input makes good."""

    epsilon: float
    norm: Tensor  # [E]
    norm_bias: Tensor  # [E]
    wide: Tensor  # [E, F]
    wide_bias: Tensor  # [F]
    narrow: Tensor  # [F, E]
    last: Tensor  # [E]
    last_bias: Tensor  # [E]


@dataclass(frozen=True)
class _Folded:
    """Weights as the arithmetic takes them, and which they were made of."""

    heads: int
    first: _First
    later: list[_Later]
    behind: list[_Behind]
    weights: list[Tensor]
    state: list[tuple[int, int, torch.dtype]] | None


class FastEncoder:
    """A `SequenceEncoder` without gradients and dropout, with the weights that it has at the time of a call.

    They are folded again when one has changed: trained on, loaded, converted. A write through `.data` is not seen, PyTorch counts none.
    """

    def __init__(self, encoder: "SequenceEncoder") -> None:
        self._encoder = encoder
        self._folded: _Folded | None = None

    def pays(self, tensors: Mapping[str, Tensor], request_row: Tensor) -> bool:
        """Whether it is faster than the plain encoder: evaluation has many requests of few candidates, ranking has few of many."""
        count = tensors["sequence_count"]
        return request_row.numel() * int(count.max()) >= REQUEST_TOKENS_MIN * count.shape[0]

    @torch.no_grad()
    def __call__(self, tensors: Mapping[str, Tensor], candidate: Tensor, request_row: Tensor) -> Tensor:
        """Compressed sequence of each candidate, [N, (K + 1) E] in the dtype of the weights: what `SequenceEncoder` gives without a window.

        `tensors` are stacked [R, ...]; `candidate` [N, D]; `request_row` int64 [N] ascends.
        """
        encoder, folded = self._encoder, self._fold()
        history = encoder.tokens(tensors, encoder.valid(tensors))  # [R, S, E - D]
        lengths = tensors["sequence_count"].reshape(-1).tolist()
        found = history.new_zeros(candidate.shape[0], encoder.width)
        counts = torch.bincount(request_row, minlength=len(lengths)).tolist()
        end = 0
        for tokens, length, count in zip(history, lengths, counts, strict=True):
            begin, end = end, end + count
            if length > 0 and count:
                _encode(folded, tokens[:length], candidate[begin:end], found[begin:end], encoder.first_k)
        return found

    def _fold(self) -> _Folded:
        weights = list(self._encoder.layers.parameters())
        # Kept with the weights: while their memory is held here, no other tensor can have its address.
        counted = not any(weight.is_inference() for weight in weights)
        state = [(weight.data_ptr(), weight._version, weight.dtype) for weight in weights] if counted else None
        if self._folded is None or state is None or self._folded.state != state:
            layers = cast("list[EncoderLayer]", list(self._encoder.layers))
            self._folded = _Folded(
                layers[0].heads,
                _fold_first(layers[0], self._encoder.item_width),
                [fold_later(layer) for layer in layers[1:]],
                [fold_behind(layer) for layer in layers],
                [weight.detach() for weight in weights],
                state,
            )
        return self._folded


def _encode(folded: _Folded, history: Tensor, candidate: Tensor, found: Tensor, first_k: int) -> None:
    """Writes `found` [N, (K + 1) E] for the candidates [N, D] of one request with `history` [S, E - D]; what is not written stays zero."""
    first, h = folded.first, folded.heads
    S, E = history.shape[0], first.key.shape[1]
    query = torch.addmm(first.query_bias, history, first.query).view(S, h, -1)
    query_candidate = (candidate @ first.query_candidate).view(-1, h, E // h)
    key = (history @ first.key).view(S, h, -1)
    A = torch.einsum("thd,shd->ths", query, key)  # [S, h, S]
    B = torch.einsum("nhd,shd->nhs", query_candidate, key)  # [N, h, S]
    value = (history @ first.value).view(S, h, E).transpose(0, 1).reshape(h * S, E)
    of_history = functional.pad(history, (0, E - history.shape[1])) + first.bias  # [S, E]
    of_candidate = candidate @ first.candidate  # [N, E]
    K = min(S, first_k)
    step = max(1, TOKENS_AT_ONCE // S)
    for start in range(0, candidate.shape[0], step):
        piece = slice(start, start + step)
        weight = (A + B[piece, None]).softmax(-1)  # [n, S, h, S]
        x = (of_history + of_candidate[piece, None]).view(-1, E)  # [n S, E]
        x = x.addmm_(weight.view(-1, h * S), value).view(-1, S, E)
        x = _behind(folded.behind[0], x)
        for later, behind in zip(folded.later, folded.behind[1:], strict=True):
            x = _behind(behind, _attend(later, x, h))
        found[piece, : K * E] = x[:, :K].flatten(1)
        found[piece, -E:] = x.amax(1)


def _attend(layer: _Later, x: Tensor, h: int) -> Tensor:
    """Tokens plus attention, [n, S, E], in the memory of `x`."""
    n, S, E = x.shape
    projected = torch.addmm(layer.project_bias, x.view(-1, E), layer.project)  # [n S, 2 E] or [n S, 3 E]
    if h == 1:
        query, value = projected.view(n, S, 2, E).unbind(2)  # each [n, S, E]
        weight = torch.bmm(query, x.transpose(1, 2)).softmax(-1)  # [n, S, S]
        return x.baddbmm_(weight, value)
    query, key, value = projected.view(n, S, 3, h, E // h).permute(2, 0, 3, 1, 4)  # each [n, h, S, E / h]
    attended = functional.scaled_dot_product_attention(query, key, value, scale=1.0).transpose(1, 2).reshape(-1, E)
    return x.add_(layer.out_bias).view(-1, E).addmm_(attended, layer.out).view(n, S, E)


def _behind(layer: _Behind, x: Tensor) -> Tensor:
    """Norm, feedforward, norm: [n, S, E] to the same."""
    n, S, E = x.shape
    x = functional.layer_norm(x, (E,), layer.norm, layer.norm_bias, layer.epsilon).view(-1, E)
    inner = torch.addmm(layer.wide_bias, x, layer.wide).relu_()  # [n S, F]
    return functional.layer_norm(x.addmm_(inner, layer.narrow), (E,), layer.last, layer.last_bias, layer.epsilon).view(n, S, E)


def _fold_first(layer: "EncoderLayer", D: int) -> _First:
    h, E = layer.heads, layer.out.in_features
    (q, k, v), (q_bias, _, v_bias), scale = *_parts(layer), (E // h) ** -0.5
    out, dtype = layer.out.weight.double(), layer.out.weight.dtype
    value = torch.einsum("hdi,ohd->iho", v[:, : E - D].reshape(h, E // h, E - D), out.view(E, h, E // h)).reshape(E - D, h * E)
    candidate = (out @ v[:, E - D :]).T  # [D, E]
    candidate[:, E - D :] += torch.eye(D)
    return _First(
        *_as(dtype, q[:, : E - D].T * scale, q_bias * scale, q[:, E - D :].T * scale, k[:, : E - D].T),
        *_as(dtype, value, out @ v_bias + layer.out.bias.double(), candidate),
    )


def fold_later(layer: "EncoderLayer") -> _Later:
    """Attention of a layer as it is computed here."""
    h, E = layer.heads, layer.out.in_features
    (q, k, v), (q_bias, _, v_bias), scale = *_parts(layer), (E // h) ** -0.5
    out, dtype = layer.out.weight.double(), layer.out.weight.dtype
    out_bias = out @ v_bias + layer.out.bias.double()
    if h == 1:
        project, bias = torch.cat([q.T @ k * scale, (out @ v).T], 1), torch.cat([q_bias @ k * scale, out_bias])
    else:
        project, bias = torch.cat([q * scale, k, v]).T, torch.cat([q_bias * scale, torch.zeros(2 * E)])
    return _Later(*_as(dtype, project, bias, out.T, out_bias))


def fold_behind(layer: "EncoderLayer") -> _Behind:
    """What stands behind the attention of a layer."""
    norm, last, dtype = layer.norm_attention, layer.norm_feedforward, layer.out.weight.dtype
    wide, bias = layer.wide.weight.double(), layer.narrow.bias.double()
    return _Behind(
        norm.eps,
        *_as(dtype, norm.weight, norm.bias + bias, wide.T, layer.wide.bias - wide @ bias),
        *_as(dtype, layer.narrow.weight.T, last.weight, last.bias),
    )


def _parts(layer: "EncoderLayer") -> tuple[Tensor, Tensor]:
    """Weights [3, E, E] and biases [3, E] of queries, keys and values, float64: products of matrices are rounded once."""
    E = layer.out.in_features
    return layer.qkv.weight.double().view(3, E, E), layer.qkv.bias.double().view(3, E)


def _as(dtype: torch.dtype, *weights: Tensor) -> list[Tensor]:
    """Copies, contiguous."""
    return [weight.to(dtype, copy=True).contiguous() for weight in weights]
