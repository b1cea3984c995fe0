"""What reads a user's actions: the layer that TransAct is made of, and what its paper compares TransAct with.

`inference.transact.SequenceEncoder` makes the tokens and is TransAct itself; a form of this file takes its place behind the tokens where
the domain file asks for one (`[ranker.NAME.model]` encoder, fusion). Every form keeps the rules of the model: what is padded or masked
takes no part in anything, however long the other sequences of a batch are; without any action the output is zero, or the candidate's alone.

Paper: TransAct (KDD 2023, arXiv 2306.00248), sections 3.3 and 4. Where it does not say how a baseline looks, the form says what it is.

Symbols: R requests, N candidates, S places of the sequence, D item dimension, T width of a history token, E width of a token of the encoder
(T, or T + D where the candidate stands beside each action), K first tokens.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from features.domain import ModelSettings

MASKED = -1e9
AGE_BOUNDS_S = tuple(2**power for power in range(31))
"""Where one age of BST ends and the next begins, seconds."""


class EncoderLayer(nn.Module):
    """Post-norm transformer layer, written out: [N, S, E] to the same.

    `nn.TransformerEncoder` takes another path in eval without gradients, which zeroes padded rows before the max pool.
    """

    def __init__(self, width: int, heads: int, feedforward: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm_attention = nn.LayerNorm(width)
        self.wide = nn.Linear(width, feedforward)
        self.narrow = nn.Linear(feedforward, width)
        self.norm_feedforward = nn.LayerNorm(width)

    def forward(self, x: Tensor, qkv: Tensor, mask: Tensor) -> Tensor:
        """Attention over the S tokens of each candidate. `qkv` is `self.qkv(x)` [N, S, 3E]; `mask` [N, 1, 1, S] is added to the scores."""
        N, S, E = x.shape
        p = self.dropout if self.training else 0.0
        q, k, v = qkv.view(N, S, 3, self.heads, E // self.heads).permute(2, 0, 3, 1, 4)  # each [N, heads, S, E / heads]
        scores = (q @ k.transpose(-1, -2)) * (E // self.heads) ** -0.5 + mask  # [N, heads, S, S]
        attended = functional.dropout(scores.softmax(-1), p) @ v  # [N, heads, S, E / heads]
        attended = self.out(attended.transpose(1, 2).reshape(N, S, E))  # [N, S, E]
        x = self.norm_attention(x + functional.dropout(attended, p))
        inner = functional.dropout(functional.relu(self.wide(x)), p)  # [N, S, F]
        return self.norm_feedforward(x + functional.dropout(self.narrow(inner), p))  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """`layers` EncoderLayers: [N, S, E] to the same."""

    def __init__(self, width: int, settings: ModelSettings, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            EncoderLayer(width, settings.attention_heads, settings.feedforward, settings.dropout) for _ in range(layers)
        )

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        """`real` bool [N, S]: the other tokens are no keys."""
        mask = torch.zeros(real.shape, dtype=x.dtype, device=x.device).masked_fill(~real, MASKED)[:, None, None]  # [N, 1, 1, S]
        for layer in cast("list[EncoderLayer]", list(self.layers)):
            x = layer(x, layer.qkv(x), mask)
        return x


class Convolution(nn.Module):
    """`layers` convolutions over an action and its two neighbours in time, each added to its input: [N, S, E] to the same."""

    def __init__(self, width: int, settings: ModelSettings) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv1d(width, width, 3, padding=1) for _ in range(settings.layers))
        self.dropout = settings.dropout

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        """`real` bool [N, S]: the other tokens count as zero."""
        unreal = ~real.unsqueeze(-1)  # [N, S, 1]
        x = x.masked_fill(unreal, 0.0)
        for layer in self.layers:
            inner = functional.relu(layer(x.transpose(1, 2)).transpose(1, 2))  # [N, S, E]
            x = (x + functional.dropout(inner, self.dropout, self.training)).masked_fill(unreal, 0.0)
        return x


class Recurrent(nn.Module):
    """RNN (tanh) or LSTM of `layers` layers from the oldest action to the newest: [N, S, E], newest first, to the same.

    The output at the newest action has seen all of them, and stands among the first K.
    """

    def __init__(self, width: int, settings: ModelSettings) -> None:
        super().__init__()
        cell: Any = nn.LSTM if settings.encoder == "lstm" else nn.RNN
        between = settings.dropout if settings.layers > 1 else 0.0
        self.cell = cell(width, width, settings.layers, batch_first=True, dropout=between)

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        """`real` bool [N, S]: the other tokens are passed over."""
        N, S, E = x.shape
        if not N:
            return x
        places = torch.arange(S, device=x.device)
        # Real tokens first, the oldest of them, which is the last, at the beginning.
        order = torch.where(real, S - places, S + places + 1).argsort(1)[:, :, None].expand(-1, -1, E)
        packed = pack_padded_sequence(x.gather(1, order), real.sum(1).clamp(min=1).cpu(), batch_first=True, enforce_sorted=False)
        output, _ = pad_packed_sequence(self.cell(packed)[0], batch_first=True, total_length=S)
        return torch.zeros_like(x).scatter(1, order, output)


class CandidateToken(nn.Module):
    """The candidate [N, D] as a token [N, T]: its vector where the tokens of actions have theirs, plus a learned mark."""

    def __init__(self, token_width: int, place: int, item_width: int) -> None:
        super().__init__()
        self.padding = (place, token_width - place - item_width)
        self.mark = nn.Parameter(0.1 * torch.randn(token_width))

    def forward(self, candidate: Tensor) -> Tensor:
        """[N, T]."""
        return functional.pad(candidate, self.padding) + self.mark


class OtherForm(nn.Module):
    """A form other than TransAct's. `widths` are those of the parts of its output [N, sum of widths]."""

    widths: tuple[int, ...]

    def forward(self, history: Tensor, candidate: Tensor, valid: Tensor, age_ms: Tensor, request_row: Tensor) -> Tensor:
        """Compressed sequence of each candidate, [N, sum of widths].

        Args:
            history: tokens [R, S, T], zero where not valid.
            candidate: vectors [N, D].
            valid: bool [R, S].
            age_ms: int64 [R, S], milliseconds.
            request_row: int64 [N].
        """
        raise NotImplementedError


class Average(OtherForm):
    """Mean of the actions' tokens, the same for every candidate: [N, T]."""

    def __init__(self, token_width: int) -> None:
        super().__init__()
        self.widths = (token_width,)

    def forward(self, history: Tensor, candidate: Tensor, valid: Tensor, age_ms: Tensor, request_row: Tensor) -> Tensor:
        """See OtherForm."""
        del candidate, age_ms
        return (history.sum(1) / valid.sum(1, keepdim=True).clamp(min=1))[request_row]


class BehaviourTransformer(OtherForm):
    """BST: the candidate is a token among those of the actions, which say how old they are, and its own output is kept: [N, T].

    Paper: Behavior Sequence Transformer (DLP-KDD 2019, arXiv 1905.06874), sections 2.1 and 2.2.
    Deviates: ages are added to the tokens, in powers of two seconds; the layers are TransAct's (ReLU, norm behind each part).
    """

    def __init__(self, settings: ModelSettings, token_width: int, place: int, item_width: int) -> None:
        super().__init__()
        self.widths = (token_width,)
        self.candidate = CandidateToken(token_width, place, item_width)
        self.age = nn.Embedding(len(AGE_BOUNDS_S) + 1, token_width)
        self.mixer = Transformer(token_width, settings, settings.layers)
        self.register_buffer("bounds_ms", torch.tensor(AGE_BOUNDS_S) * 1000, persistent=False)

    def forward(self, history: Tensor, candidate: Tensor, valid: Tensor, age_ms: Tensor, request_row: Tensor) -> Tensor:
        """See OtherForm."""
        age = self.age(torch.bucketize(age_ms * valid, self.get_buffer("bounds_ms"), right=True))  # [R, S, T]
        history = history + age.masked_fill(~valid.unsqueeze(-1), 0.0)
        x = torch.cat([self.candidate(candidate)[:, None], history[request_row]], 1)  # [N, 1 + S, T]
        mixed: Tensor = self.mixer(x, functional.pad(valid[request_row], (1, 0), value=True))
        return mixed[:, 0]


class Fused(OtherForm):
    """TransAct's fusion and output around any encoder: [N, (K + 1) E], or only one of both parts of the output.

    Fusion by a token puts the candidate before the newest action; it is in the max pool, and not among the first K.
    """

    def __init__(self, settings: ModelSettings, token_width: int, place: int, item_width: int) -> None:
        super().__init__()
        self.first_k, self.output = settings.first_k, settings.output
        self.token = CandidateToken(token_width, place, item_width) if settings.fusion == "token" else None
        E = token_width if self.token is not None else token_width + item_width
        self.widths = output_widths(settings, E)
        mixers = {"transformer": Transformer, "cnn": Convolution, "rnn": Recurrent, "lstm": Recurrent}
        more = (settings.layers,) if settings.encoder == "transformer" else ()
        self.mixer = mixers[settings.encoder](E, settings, *more)

    def forward(self, history: Tensor, candidate: Tensor, valid: Tensor, age_ms: Tensor, request_row: Tensor) -> Tensor:
        """See OtherForm."""
        del age_ms
        S, real = history.shape[1], valid[request_row]  # real [N, S]
        if self.token is None:
            x = torch.cat([history[request_row], candidate[:, None].expand(-1, S, -1)], -1)  # [N, S, E]
            mixed = self.mixer(x, real)
            return compress(mixed, real, mixed, real, self.first_k, self.output)
        x = torch.cat([self.token(candidate)[:, None], history[request_row]], 1)  # [N, 1 + S, E]
        with_token = functional.pad(real, (1, 0), value=True)
        mixed = self.mixer(x, with_token)
        return compress(mixed[:, 1:], real, mixed, with_token, self.first_k, self.output)


def other_form(settings: ModelSettings, token_width: int, place: int, item_width: int) -> OtherForm | None:
    """The form that the settings ask for; None: TransAct's own. `place` is where in a token the item's vector begins."""
    if settings.encoder == "average":
        return Average(token_width)
    if settings.encoder == "bst":
        return BehaviourTransformer(settings, token_width, place, item_width)
    if settings.encoder == "transformer" and settings.fusion == "concatenate":
        return None
    return Fused(settings, token_width, place, item_width)


def output_widths(settings: ModelSettings, E: int) -> tuple[int, ...]:
    """Widths of what `compress` gives: the first K tokens and the max pool, each E wide."""
    return (E,) * ((settings.output != "pool") * settings.first_k + (settings.output != "first"))


def compress(first: Tensor, first_real: Tensor, pooled: Tensor, pooled_real: Tensor, first_k: int, output: str) -> Tensor:
    """The first K tokens of `first` [N, S, E] and the maximum over those of `pooled` [N, S', E], side by side.

    Zero where there is no real token (bool [N, S], [N, S']). `output`: "both", "first" or "pool".
    Paper: TransAct, section 3.3.
    """
    parts = []
    if output != "pool":
        kept = first[:, :first_k].masked_fill(~first_real[:, :first_k, None], 0.0)  # [N, min(K, S), E]
        parts.append(functional.pad(kept, (0, 0, 0, first_k - kept.shape[1])).flatten(1))  # [N, K E]
    if output != "first":
        greatest = pooled.masked_fill(~pooled_real.unsqueeze(-1), MASKED).amax(1)  # [N, E]
        parts.append(greatest.masked_fill(~pooled_real.any(1, keepdim=True), 0.0))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
