"""From what the model says to an order: the same few lines in the server and in replay."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from features.domain import Ranker

F32 = npt.NDArray[np.float32]


def head_weights(ranker: Ranker, overrides: Mapping[str, float]) -> npt.NDArray[np.float64]:
    """Weight of each head in the final score, float64 [H]: the domain file's utilities, with the request's in place of those it names.

    Raises:
        KeyError: a head that the ranker does not have.
    """
    unknown = set(overrides) - set(ranker.heads)
    if unknown:
        raise KeyError(min(unknown))
    return np.array([overrides.get(name, head.utility) for name, head in ranker.heads.items()], np.float64)


def final_scores(probability: F32, weights: npt.NDArray[np.float64]) -> F32:
    """Sum over heads of weight x probability: [C, H] and [H] to float32 [C]. Summed in float64 and in the order of heads."""
    total = np.zeros(len(probability), np.float64)
    for head, weight in enumerate(weights):
        total += weight * probability[:, head]
    return total.astype(np.float32)


def embedding_scores(tensors: Mapping[str, npt.NDArray[np.generic]]) -> F32:
    """Dot product of the user's and the candidates' batch embeddings, float32 [C]: the tier without the model."""
    product: F32 = tensors["candidate_embedding"].astype(np.float32) @ tensors["user_embedding"].astype(np.float32)
    return product


def best_first(scores: F32) -> npt.NDArray[np.int64]:
    """Places of the candidates from best to worst, int64 [C]; equal scores keep the caller's order."""
    return np.argsort(-scores, kind="stable")
