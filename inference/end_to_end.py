"""The end-to-end ranker's interaction: every feature is a token, and a transformer is what crosses them.

Paper: Rethinking Personalized Ranking at Pinterest (RecSys 2022, arXiv 2209.08435): all features become tokens beside a learned CLS, a
transformer encoder is the feature interaction, each task has an MLP of its own on the CLS; the realtime sequence comes in through a
self-attention branch, here `inference.transact.SequenceEncoder`, whose compressed tokens are tokens of this one.
Deviates: the paper gives no sizes; they are the domain file's.

Symbols: N candidates, P parts of the input, d token dimension, H heads.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from features.domain import ModelSettings
from inference.encoders import Transformer


class FeatureTransformer(nn.Module):
    """Logits [N, H] of the concatenated parts [N, sum of widths]."""

    def __init__(self, widths: Sequence[int], settings: ModelSettings, heads: int) -> None:
        super().__init__()
        d = settings.token_dimension
        self.widths = tuple(widths)
        self.tokens = nn.ModuleList(nn.Linear(width, d) for width in self.widths)
        self.cls = nn.Parameter(torch.randn(d))
        self.transformer = Transformer(d, settings, settings.cross_layers)
        self.heads = nn.ModuleList(_mlp((d, *settings.hidden)) for _ in range(heads))

    def forward(self, x0: Tensor) -> Tensor:
        """Float32 [N, H]."""
        parts = torch.split(x0, list(self.widths), 1)
        x = torch.stack([self.cls.expand(len(x0), -1), *(token(part) for token, part in zip(self.tokens, parts, strict=True))], 1)
        x = self.transformer(x, torch.ones(x.shape[:2], dtype=torch.bool, device=x.device))  # [N, 1 + P, d]
        return torch.cat([head(x[:, 0]) for head in self.heads], 1)  # [N, H]


def _mlp(sizes: tuple[int, ...]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for wide, narrow in pairwise(sizes):
        layers += [nn.Linear(wide, narrow), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], 1))
