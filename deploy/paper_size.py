"""The simulator's ranker in the paper's size, and requests for it: what the benchmarks of the model measure."""

import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from features.domain import Domain, parse_domain
from inference.release import blank_request
from inference.transact import TransActRanker

SIMULATOR = Path(__file__).parents[1] / "domains" / "simulator.toml"
_PAPER_SIZE = ((r"sequence_length = 16\b", "sequence_length = 100"), (r", cross_rank = 64, first_k = 5", ""))


def paper_size(domain_toml: str) -> str:
    """The simulator's domain file with rankers in the paper's size. Raises ValueError: the file no longer says what is replaced."""
    for pattern, replacement in _PAPER_SIZE:
        domain_toml, count = re.subn(pattern, replacement, domain_toml)
        if not count:
            raise ValueError(f"{SIMULATOR}: {pattern} is not there any more; correct deploy/paper_size.py")
    return domain_toml


def make_request(domain: Domain, model: TransActRanker, candidates: int) -> dict[str, Tensor]:
    """Stacked tensors of one request with a full sequence of random items."""
    random = np.random.default_rng(1)
    tensors = {name: torch.from_numpy(value) for name, value in blank_request(domain, "home", candidates).items()}
    for name in ("sequence_embedding", "candidate_embedding"):
        vectors = random.standard_normal(tensors[name].shape) / np.sqrt(tensors[name].shape[-1])
        tensors[name] = torch.from_numpy(vectors.astype(np.float16))
    tensors["sequence_action"].random_(1, 4, generator=torch.Generator().manual_seed(1))
    return {name: value if model.per_candidate[name] else value[None] for name, value in tensors.items()}


def paper_domain(*, attributes: bool = True) -> Domain:
    """The simulator's domain in the paper's size; without attributes of actions a token is [action, item, candidate], 96 wide."""
    text = paper_size(SIMULATOR.read_text("utf-8"))
    if not attributes:
        text = re.sub(r"sequence_attributes = .*", "", text)
    return parse_domain(text, source=str(SIMULATOR))
