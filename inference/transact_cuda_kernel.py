"""TransAct's sequence encoder on a GPU as one kernel: a program takes one candidate from its tokens to the compressed sequence.

Unfused, the activations of [N, S, E] go through the device's memory some thirty times: 734 MB for 1,024 candidates in the paper's size, at
least 171 us on an H200, while the arithmetic takes 32. Here they stay in registers and shared memory; what is read is a user's tokens, a
candidate's vector and the weights, what is written is [N, (K + 1) E].

The function is the plain one, with the weights folded as `inference.transact_fast` folds those of a later layer: the keys are the tokens
themselves, and value and output projection are one matrix. What is
multiplied is LOW, which is bf16, with float32 sums; residuals, norms and softmax are float32. (Triton's interpreter multiplies no bf16, so
the tests that run without a GPU take float32.)

Symbols are those of `inference.transact`. The sizes of a program, S_, E_ and F_, are powers of two not below S, E and F.
"""

import triton
import triton.language as tl

SIZE_MAX = 128
"""Largest S_, E_ and F_: tokens [S_, E_] and scores [S_, S_] in float32 take half of the registers that a program of WARPS has."""
SIZE_MIN = 64
"""Smallest: with fewer columns a product of WARPS read beyond its shared memory (Triton 3.6, H200)."""
WARPS = 8
HIDDEN = tl.constexpr(-1e30)
"""Score of a token that is none. Finite, so that a sequence without any gives numbers."""


@triton.jit
def _normalised(y, inside, width, epsilon, weight, bias):  # type: ignore[no-untyped-def]
    """Layer norm of the rows of `y` [S_, E_], whose columns outside are zero and stay so."""
    centred = tl.where(inside[None, :], y - (tl.sum(y, 1) / width)[:, None], 0.0)
    deviation = tl.sqrt(tl.sum(centred * centred, 1) / width + epsilon)
    return centred / deviation[:, None] * weight[None, :] + bias[None, :]


@triton.jit  # type: ignore[untyped-decorator]
def encode_candidates(  # type: ignore[no-untyped-def]
    found,  # float32 [N, (K + 1) E]
    history,  # float32 [R, S, T]: the tokens without the candidate
    candidate,  # float32 [N, D]
    length,  # int32 [R]: actions of each request
    request_row,  # int32 [N]
    square,  # LOW [layers, 2, E_, E_]: query times key, value times output
    wide,  # LOW [layers, E_, F_]
    narrow,  # LOW [layers, F_, E_]
    vector,  # float32 [layers, 7, E_]: biases of query and output, norm and bias, bias of the feedforward, norm and bias
    epsilon,
    S,
    T,
    D,
    K,
    LAYERS: tl.constexpr,
    S_: tl.constexpr,
    E_: tl.constexpr,
    F_: tl.constexpr,
    LOW: tl.constexpr,
):
    """Writes row n of `found`, n the number of the program."""
    n = tl.program_id(0).to(tl.int64)
    r = tl.load(request_row + n).to(tl.int64)
    t, e, f = tl.arange(0, S_), tl.arange(0, E_), tl.arange(0, F_)
    width = T + D
    count = tl.minimum(tl.load(length + r), S)
    real, inside = t < count, e < width
    tokens = history + r * S * T + t[:, None] * T + e[None, :]
    x = tl.load(tokens, mask=real[:, None] & (e < T)[None, :], other=0.0)
    x += tl.load(candidate + n * D + e - T, mask=(e >= T) & inside, other=0.0)[None, :]
    for layer in tl.static_range(LAYERS):
        matrix = square + layer * 2 * E_ * E_ + e[:, None] * E_ + e[None, :]
        row = vector + layer * 7 * E_
        low = x.to(LOW)
        query = tl.dot(low, tl.load(matrix)) + tl.load(row + e)[None, :]
        scores = tl.where(real[None, :], tl.dot(query.to(LOW), tl.trans(low)), HIDDEN)
        weight = tl.exp(scores - tl.max(scores, 1)[:, None])
        weight = weight / tl.sum(weight, 1)[:, None]
        attended = tl.dot(weight.to(LOW), low)
        x += tl.dot(attended.to(LOW), tl.load(matrix + E_ * E_)) + tl.load(row + E_ + e)[None, :]
        x = _normalised(x, inside, width, epsilon, tl.load(row + 2 * E_ + e), tl.load(row + 3 * E_ + e))
        inner = tl.dot(x.to(LOW), tl.load(wide + layer * E_ * F_ + e[:, None] * F_ + f[None, :]))
        inner = tl.maximum(inner + tl.load(row + 4 * E_ + f)[None, :], 0.0)
        x += tl.dot(inner.to(LOW), tl.load(narrow + layer * F_ * E_ + f[:, None] * E_ + e[None, :]))
        x = _normalised(x, inside, width, epsilon, tl.load(row + 5 * E_ + e), tl.load(row + 6 * E_ + e))
    to = found + n * (K + 1) * width + e
    tl.store(to[None, :] + t[:, None] * width, tl.where(real[:, None], x, 0.0), mask=(t < K)[:, None] & inside[None, :])
    most = tl.max(tl.where(real[:, None], x, HIDDEN), 0)
    tl.store(to + K * width, tl.where(count > 0, most, 0.0), mask=inside)
