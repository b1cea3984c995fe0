"""TransAct: the hybrid ranker over a user's latest actions. The file reads from the input tensors down to the heads.

Paper: TransAct (KDD 2023, arXiv 2306.00248), section 3.
Deviates: padded and masked rows take no part in the max pool, are zero in the first K, and never meet a softmax of nothing; the newest
action can be masked by the time window; an id above the known ones is an embedding of its own, 0 alone is padding. The public module does
otherwise, which makes train, eval and no-grad outputs differ.

Symbols: R requests, N candidates of all of them, L the ranker's sequence length, S <= L the longest sequence of the batch,
D item dimension, E token width (action + attributes + D + D: the paper's 96), K first tokens, X width of the crossing, H heads.

The domain file may ask for another form ([ranker.NAME.model], docs/quality.md): other encoders are in `inference.encoders`, the interaction
by a transformer in `inference.end_to_end`, corrected probabilities in `inference.calibration`.
"""

import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from features.domain import Domain, Feature
from features.tensors import SIDES, feature_names, tensor_table
from inference.calibration import Calibration
from inference.encoders import MASKED, EncoderLayer, compress, other_form, output_widths
from inference.end_to_end import FeatureTransformer
from inference.similarities import Similarities
from inference.transact_fast import FastEncoder
from inference.transact_train import TrainEncoder

HOUR_MS = 3_600_000
SURFACE_DIMENSION = 8
KIND_DIMENSION = 4
NORMALISED_MAX = 10.0
RAW_MAX = 1000.0
POSITION_DIMENSION = 8
CANDIDATES_AT_ONCE = 128
Encode = Callable[[Mapping[str, Tensor], Tensor, Tensor], Tensor]
"""Stacked tensors, candidates [N, D] and `request_row` [N] to the compressed sequences, [N, (K + 1) E]."""


class TransActRanker(nn.Module):
    """One logit a head and candidate. Input: the tensors of `features.tensors.tensor_table`, one request or several.

    `use_sequence=False` is the same model without the realtime sequence: what `evaluate` compares with.
    """

    name = "transact"

    def __init__(self, domain: Domain, ranker_name: str, *, use_sequence: bool = True) -> None:
        super().__init__()
        ranker = domain.ranker[ranker_name]
        settings = ranker.model
        self.head_names = tuple(ranker.heads)
        self.per_candidate = {tensor.name: tensor.per_candidate for tensor in tensor_table(domain, ranker_name)} | {"position": True}
        self.use_sequence = use_sequence and settings.encoder != "none"
        self.use_user = settings.user_embedding and ranker.user_space is not None
        D = ranker.embedding_dimension
        self.vector_scale = vector_scale(D)
        widths = [D] * (1 + self.use_user)  # in the order of `behind_sequence`
        if self.use_sequence:
            self.sequence = SequenceEncoder(domain, ranker_name)
            self.fast_sequence, self.train_sequence = FastEncoder(self.sequence), TrainEncoder(self.sequence)
        if len(domain.entities) > 1:
            self.kind = nn.Embedding(max(domain.entities.values()) + 1, KIND_DIMENSION)
            widths.append(KIND_DIMENSION)
        self.features = nn.ModuleDict({side: SideFeatures(domain, ranker_name, side) for side in SIDES})
        widths += [width for side in self._sides() for width in side.widths]
        self.position_served = settings.position_served
        self.position = nn.Embedding(settings.position_max + 1, POSITION_DIMENSION) if settings.position_max else None
        widths += [POSITION_DIMENSION] * (self.position is not None)
        self.similarities = (
            Similarities(domain, ranker_name, user=self.use_user, sequence=self.use_sequence) if settings.similarities else None
        )
        widths += () if self.similarities is None else self.similarities.widths
        widths += self.sequence.widths if self.use_sequence else ()
        self.calibration = Calibration(settings.calibration, len(self.head_names)) if settings.calibration != "none" else None
        self.interaction = FeatureTransformer(widths, settings, len(self.head_names)) if settings.interaction == "transformer" else None
        if self.interaction is not None:
            return
        width = sum(widths)
        self.crosses = nn.ModuleList(Cross(width, settings.cross_rank) for _ in range(settings.cross_layers))
        sizes = (width, *settings.hidden)
        self.hidden = nn.ModuleList(nn.Linear(wide, narrow) for wide, narrow in pairwise(sizes))
        self.heads = nn.Linear(sizes[-1], len(self.head_names))

    def forward(
        self,
        tensors: Mapping[str, Tensor],
        request_row: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
        window_ms: Tensor | None = None,
    ) -> Tensor:
        """Logits, float32 [N, H].

        Args:
            tensors: the table's tensors. With `request_row`, those of the request are stacked [R, ...] and those of candidates concatenated
                [N, ...]; without, they are one request's, exactly as the table shapes them. Where the place in the list is a feature,
                training needs `position` too, int32 [N] from 0, -1 unknown.
            request_row: int64 [N], the request of each candidate.
            generator: source of the random time windows, one a request. They are drawn in training mode only; None: no window.
            window_ms: windows that have been drawn, float64 [R, 1], in place of `generator`.
        """
        if request_row is None:
            tensors, request_row = self.stacked(tensors)
        candidate = self.candidate_vectors(tensors)
        compressed = None
        if self.use_sequence:
            if self.training and window_ms is None:
                window_ms = self.sequence.draw_window_ms(tensors["sequence_count"].shape[0], generator)
            encode = self.train_sequence if self.training and self.train_sequence.applies else self.sequence
            compressed = encode(tensors, candidate, request_row, window_ms)
        return self.behind_sequence(tensors, candidate, request_row, compressed, window_ms)

    def logits(self, tensors: Mapping[str, Tensor], request_row: Tensor, encode: Encode) -> Tensor:
        """Logits as `forward` gives them, float32 [N, H], with another form of the sequence encoder."""
        candidate = self.candidate_vectors(tensors)
        compressed = encode(tensors, candidate, request_row) if self.use_sequence else None
        return self.behind_sequence(tensors, candidate, request_row, compressed)

    def calibrated(self, logits: Tensor) -> Tensor:
        """Probabilities, float32 [N, H]."""
        return torch.sigmoid(logits if self.calibration is None else self.calibration(logits))

    def stacked(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """One request's tensors as a stack of one, and the `request_row` of its candidates."""
        stacked = {name: value if self.per_candidate[name] else value[None] for name, value in tensors.items()}
        return stacked, torch.zeros_like(stacked["candidate_embedding"][:, 0], dtype=torch.int64)

    def candidate_vectors(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """As the model takes them, float32 [N, D]."""
        return tensors["candidate_embedding"].float() * self.vector_scale  # [N, D]

    def behind_sequence(
        self,
        tensors: Mapping[str, Tensor],
        candidate: Tensor,
        request_row: Tensor,
        compressed: Tensor | None,
        window_ms: Tensor | None = None,
    ) -> Tensor:
        """Everything behind the sequence encoder, whose output is `compressed` [N, (K + 1) E]; None: without the sequence.

        `window_ms` [R, 1] is the one that the encoder had.
        """
        parts = [candidate]
        if self.use_user:
            parts.append((tensors["user_embedding"].float() * self.vector_scale)[request_row])  # [N, D]
        if "candidate_kind" in tensors:
            parts.append(self.kind(tensors["candidate_kind"].clamp(0, self.kind.num_embeddings - 1)))  # [N, 4]
        for side in self._sides():
            if side.width:
                values = side(tensors)  # [R or N, width]
                parts.append(values if side.per_candidate else values[request_row])  # [N, width]
        if self.position is not None:
            parts.append(self.position(self._place(tensors)))  # [N, 8]
        if self.similarities is not None:
            valid = self.sequence.visible(tensors, window_ms) if self.use_sequence else None  # [R, S]
            parts.append(self.similarities(tensors, request_row, valid))  # [N, width]
        if compressed is not None:
            parts.append(compressed)
        x0 = torch.cat(parts, 1)  # [N, X]
        if self.interaction is not None:
            return self.interaction(x0)  # type: ignore[no-any-return]  # [N, H]
        x = x0
        for cross in self.crosses:
            x = cross(x0, x)  # [N, X]
        for layer in self.hidden:
            x = functional.relu(layer(x))  # [N, 256], [N, 64]
        return self.heads(x)  # type: ignore[no-any-return]  # [N, H]

    def _place(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Row of the position table, int64 [N]; 0 is unknown. What stood first was clicked more: serving puts all at one place."""
        assert self.position is not None
        if not self.training:
            return torch.full_like(tensors["candidate_embedding"][:, 0], self.position_served + 1, dtype=torch.int64)
        return (tensors["position"].long() + 1).clamp(0, self.position.num_embeddings - 1)

    @torch.no_grad()
    def probabilities(self, tensors: Mapping[str, Tensor], request_row: Tensor | None = None) -> Tensor:
        """Probability of each head's label, float32 [N, H], in pieces of candidates that fit a CPU's cache.

        `request_row` int64 [N] ascends: a piece computes only the requests that its candidates belong to. In eval mode on a CPU the
        sequence goes through `FastEncoder` where that pays.
        """
        if request_row is None:
            tensors, request_row = self.stacked(tensors)
        count = tensors["candidate_embedding"].shape[0]
        on_cpu = tensors["candidate_embedding"].device.type == "cpu"
        fast = self.use_sequence and self.sequence.has_fast and not self.training and on_cpu
        pieces = []
        for start in range(0, count, CANDIDATES_AT_ONCE):
            piece = slice(start, start + CANDIDATES_AT_ONCE)
            rows = request_row[piece]
            first = int(rows[0])
            requests, rows = slice(first, int(rows[-1]) + 1), rows - first
            part = {name: value[piece if self.per_candidate[name] else requests] for name, value in tensors.items()}
            quick = fast and self.fast_sequence.pays(part, rows)
            pieces.append(self.calibrated(self.logits(part, rows, self.fast_sequence) if quick else self(part, rows)))
        return torch.cat(pieces) if pieces else torch.zeros(0, len(self.head_names), device=tensors["candidate_embedding"].device)

    @torch.no_grad()
    def fit_normalisation(self, tensors: Mapping[str, Tensor]) -> None:
        """Mean and deviation of each number feature, from the rows given (the training part); NaN rows are left out."""
        for side in self._sides():
            side.fit(tensors)

    def _sides(self) -> list["SideFeatures"]:
        return [self.features[side] for side in SIDES]  # type: ignore[misc]


def vector_scale(dimension: int) -> float:
    """What vectors of about unit length are multiplied with, so that their components are as large as those of the learned tables.

    Deviates: the paper does not say. Without it the action table outweighs the items, and attention learns to match them much later.
    """
    return math.sqrt(dimension)


class NoopRanker(nn.Module):
    """Says one half for every head and candidate: what a ranking costs without its model (`freshrank bench service`)."""

    name = "noop"
    use_sequence = False

    def __init__(self, domain: Domain, ranker_name: str) -> None:
        super().__init__()
        self.heads = len(domain.ranker[ranker_name].heads)

    def probabilities(self, tensors: Mapping[str, Tensor], request_row: Tensor | None = None) -> Tensor:
        """Float32 [N, H]."""
        del request_row
        return torch.full((len(tensors["candidate_embedding"]), self.heads), 0.5)


class SequenceEncoder(nn.Module):
    """Early fusion, two post-norm transformer layers without positions, first K and max pool: [N, (K + 1) E].

    Paper: sections 3.2 and 3.3; the concatenation is its best early fusion. Where the domain file asks for another form (`other`), the
    tokens are made here and the rest is that form's. `widths` are those of the parts of the output. `whole`: S is L, whatever the batch
    holds, so that shapes do not depend on it.
    """

    def __init__(self, domain: Domain, ranker_name: str) -> None:
        super().__init__()
        ranker = domain.ranker[ranker_name]
        settings = ranker.model
        self.length, self.first_k, self.output = ranker.sequence_length, settings.first_k, settings.output
        self.whole = False
        self.window_ms_max = settings.time_window_hours_max * HOUR_MS
        history_width = ranker.embedding_dimension
        self.has_action = settings.action_types
        if self.has_action:
            self.action = nn.Embedding(256, settings.action_dimension, padding_idx=0)
            history_width += settings.action_dimension
        self.has_kind = len(domain.entities) > 1
        if self.has_kind:
            self.kind = nn.Embedding(max(domain.entities.values()) + 1, KIND_DIMENSION)
            history_width += KIND_DIMENSION
        self.has_surface = "surface" in ranker.sequence_attributes
        self.has_value = "value" in ranker.sequence_attributes
        if self.has_surface:
            self.surface = nn.Embedding(max(domain.surfaces.values(), default=0) + 1, SURFACE_DIMENSION)
            history_width += SURFACE_DIMENSION
        if self.has_value:
            history_width += 2
        self.vector_scale = vector_scale(ranker.embedding_dimension)
        self.item_width = D = ranker.embedding_dimension
        E = history_width + (D if settings.fusion == "concatenate" and settings.encoder != "bst" else 0)
        # Heads of equal width need a token width that they divide; the rest is a constant zero.
        self.pad = -E % settings.attention_heads
        E += self.pad
        self.other = other_form(settings, history_width + self.pad, self.pad + self.has_action * settings.action_dimension, D)
        self.widths = output_widths(settings, E) if self.other is None else self.other.widths
        self.width = sum(self.widths)
        self.layers = nn.ModuleList(
            EncoderLayer(E, settings.attention_heads, settings.feedforward, settings.dropout)
            for _ in range(settings.layers if self.other is None else 0)
        )

    @property
    def has_fast(self) -> bool:
        """Whether `FastEncoder` computes the same."""
        return self.other is None and self.output == "both"

    def draw_window_ms(self, requests: int, generator: torch.Generator | None) -> Tensor | None:
        """One window a request, uniform from 0 to the maximum, milliseconds: float64 [R]; None: no window."""
        if generator is None or self.window_ms_max == 0:
            return None
        return torch.rand(requests, 1, generator=generator, dtype=torch.float64, device=generator.device) * self.window_ms_max

    def valid(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Which of the S first places hold an action, bool [R, S]; S is at least 1."""
        count = tensors["sequence_count"].reshape(-1, 1)  # [R, 1]
        # Rows behind the longest sequence are padding in every request and cost as much as real ones.
        S = self.length if self.whole else max(1, int(count.max())) if count.numel() else 1
        return torch.arange(S, device=count.device) < count

    def visible(self, tensors: Mapping[str, Tensor], window_ms: Tensor | None) -> Tensor:
        """`valid` without the actions younger than `window_ms` [R, 1], bool [R, S]."""
        valid = self.valid(tensors)
        return valid if window_ms is None else valid & (tensors["sequence_age_ms"][:, : valid.shape[1]] >= window_ms)

    def tokens(self, tensors: Mapping[str, Tensor], valid: Tensor) -> Tensor:
        """The part of each token that all candidates of a request share, float32 [R, S, E - D]; zero where `valid` [R, S] is not."""
        S = valid.shape[1]
        # Padding contents are replaced, not multiplied: NaN times zero is NaN.
        parts = [self.action(tensors["sequence_action"][:, :S] * valid)] if self.has_action else []
        parts.append(tensors["sequence_embedding"][:, :S].float() * self.vector_scale)
        if self.has_kind:
            parts.append(self.kind(tensors["sequence_kind"][:, :S] * valid))  # pack() leaves out kinds that the domain does not name
        if self.has_surface:
            number = tensors["sequence_surface"][:, :S]
            parts.append(self.surface(number * ((number >= 0) & (number < self.surface.num_embeddings))))  # 0: a surface not in the domain
        if self.has_value:
            value = tensors["sequence_value"][:, :S].float()  # NaN: none
            parts.append(torch.stack([torch.log1p(value.nan_to_num(0.0).clamp(0, 1e9)), value.isnan().float()], -1))
        return functional.pad(torch.cat(parts, -1), (self.pad, 0)).masked_fill(~valid.unsqueeze(-1), 0.0)

    def forward(self, tensors: Mapping[str, Tensor], candidate: Tensor, request_row: Tensor, window_ms: Tensor | None) -> Tensor:
        """Compressed sequence of each candidate, float32 [N, (K + 1) E]. Actions younger than `window_ms` [R, 1] are masked."""
        valid = self.visible(tensors, window_ms)  # [R, S]
        S = valid.shape[1]
        history = self.tokens(tensors, valid)  # [R, S, E - D]
        if self.other is not None:
            return self.other(history, candidate, valid, tensors["sequence_age_ms"][:, :S], request_row)  # type: ignore[no-any-return]
        x = torch.cat([history[request_row], candidate[:, None].expand(-1, S, -1)], -1)  # [N, S, E]
        # Additive mask of the keys. Where nothing is valid all keys count alike; such rows are dropped below.
        mask = torch.zeros(valid.shape, device=x.device).masked_fill(~valid, MASKED)[request_row][:, None, None]  # [N, 1, 1, S]
        layers = cast("list[EncoderLayer]", list(self.layers))
        # A layer-1 input is [history, candidate], so its projection is a part a request plus one row a candidate: exact, and cheaper.
        of_history, of_candidate = layers[0].qkv.weight.tensor_split([history.shape[-1]], 1)
        qkv = functional.linear(history, of_history, layers[0].qkv.bias)[request_row]  # [N, S, 3E]
        qkv = qkv + functional.linear(candidate, of_candidate)[:, None]
        for depth, layer in enumerate(layers):
            x = layer(x, qkv if depth == 0 else layer.qkv(x), mask)  # [N, S, E]
        real = valid[request_row]  # [N, S]
        return compress(x, real, x, real, self.first_k, self.output)  # [N, (K + 1) E]


class Cross(nn.Module):
    """One DCN v2 crossing: x0 * (W x + b) + x, [N, X]; W of full rank, or a product of two thin matrices.

    Paper: DCN V2 (WWW 2021, arXiv 2008.13535), equations 1 and 2.
    """

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, rank, bias=False) if rank else None
        self.weight = nn.Linear(rank or width, width)

    def forward(self, x0: Tensor, x: Tensor) -> Tensor:
        """Float32 [N, X]."""
        inner = x if self.down is None else self.down(x)  # [N, rank]
        return torch.addcmul(x, x0, self.weight(inner))  # [N, X]


class SideFeatures(nn.Module):
    """The features of one side (user, item, request, candidate) as one vector a row: [R or N, width].

    Numbers are normalised by what `fit` found, a missing one is the feature's `missing`. A category is a learned row, code 0 (missing) too.
    A list is the mean of its rows, weighted by its weights (up to RAW_MAX) where it has some; an empty one, or one of weight 0, is row 0.
    A vector is taken as it is, up to RAW_MAX; what stands for a missing one is learned.
    """

    mean: Tensor
    deviation: Tensor
    logarithmic: Tensor
    bound: Tensor
    missing: Tensor

    def __init__(self, domain: Domain, ranker_name: str, side: str) -> None:
        super().__init__()
        self.side = side
        self.per_candidate = side in ("item", "candidate")

        def of_kind(kind: str) -> dict[str, Feature]:
            return {name: domain.features[name] for name in feature_names(domain, ranker_name, side, kind)}

        numbers, categories, lists = list(of_kind("number").values()), of_kind("category"), of_kind("list") | of_kind("weighted_list")
        self.weighted, vectors = frozenset(of_kind("weighted_list")), of_kind("vector")
        self.numbers = len(numbers)
        self.scaled = [number.normalise != "none" for number in numbers]
        self.register_buffer("mean", torch.zeros(len(numbers)))
        self.register_buffer("deviation", torch.ones(len(numbers)))
        self.register_buffer(
            "logarithmic", torch.tensor([number.normalise == "log" for number in numbers], dtype=torch.bool), persistent=False
        )
        bounds = torch.tensor([NORMALISED_MAX if scaled else RAW_MAX for scaled in self.scaled], dtype=torch.float32)
        self.register_buffer("bound", bounds, persistent=False)
        self.register_buffer("missing", torch.tensor([number.missing for number in numbers], dtype=torch.float32), persistent=False)
        self.categories = nn.ModuleList(nn.Embedding(feature.cardinality, feature.dimension) for feature in categories.values())
        self.lists = nn.ModuleDict({name: nn.Embedding(feature.cardinality, feature.dimension) for name, feature in lists.items()})
        self.absent = nn.ParameterDict({name: nn.Parameter(torch.zeros(feature.dimension)) for name, feature in vectors.items()})
        tabled = (*categories.values(), *lists.values(), *vectors.values())  # in the order of `forward`
        self.widths = (*(1 for _ in numbers), *(feature.dimension for feature in tabled))
        self.width = sum(self.widths)

    def forward(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Float32 [R or N, width]."""
        parts = []
        if self.numbers:
            raw = self._unscaled(tensors)  # [., numbers]
            scaled = ((raw - self.mean) / self.deviation).maximum(-self.bound).minimum(self.bound)
            parts.append(torch.where(raw.isnan(), self.missing, scaled))
        parts += [table(tensors[f"{self.side}_category"][:, column]) for column, table in enumerate(self.categories)]  # each [., dimension]
        for name, table in self.lists.items():
            codes = tensors[f"{self.side}_list_{name}"]  # [., length_max]
            if name in self.weighted:
                parts.append(self._weighted_mean(table, codes, tensors[f"{self.side}_weight_{name}"]))
                continue
            used = (codes != 0).unsqueeze(-1)
            used[:, 0] |= ~used.any(1)
            parts.append((table(codes) * used).sum(1) / used.sum(1))  # [., dimension]
        for name, absent in self.absent.items():
            vector = tensors[f"{self.side}_vector_{name}"].float()  # [., dimension]
            parts.append(torch.where(vector.isnan(), absent, vector.clamp(-RAW_MAX, RAW_MAX)))
        return torch.cat(parts, 1)

    @staticmethod
    def _weighted_mean(table: nn.Module, codes: Tensor, weights: Tensor) -> Tensor:
        """[., dimension]; row 0 where the weights are all 0."""
        weights = weights.float().clamp(max=RAW_MAX) * (codes != 0)
        total = weights.sum(1, keepdim=True)
        mean = (table(codes) * (weights / total.clamp(min=torch.finfo(torch.float32).tiny)).unsqueeze(-1)).sum(1)
        return torch.where(total > 0, mean, table(torch.zeros_like(codes[:, 0])))

    def fit(self, tensors: Mapping[str, Tensor]) -> None:
        """Sets mean and deviation from the rows of `tensors`."""
        if not self.numbers:
            return
        raw = self._unscaled(tensors).double()
        for column, scaled in enumerate(self.scaled):
            known = raw[:, column][raw[:, column].isfinite()]
            if scaled and known.numel():
                self.mean[column] = known.mean()
                # A constant feature stays a constant: dividing by its rounding error would blow it up.
                deviation = known.std(correction=0)
                self.deviation[column] = deviation if deviation > 1e-6 * max(1.0, float(known.abs().max())) else 1.0

    def _unscaled(self, tensors: Mapping[str, Tensor]) -> Tensor:
        raw = tensors[f"{self.side}_number"].float()
        return torch.where(self.logarithmic, torch.log1p(raw.clamp(min=0)), raw)
