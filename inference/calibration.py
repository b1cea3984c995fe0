"""Calibration: a correction of each head's logit, so that of the candidates given p a share p has the label.

Weights of the loss and negatives that were drawn move a model's probabilities away from the rates of the log. What is fitted here, on the
validation part and without weights, brings them back, and is kept with the weights of the model. It always ascends, so the order of the
candidates by one head stays what it was.

platt: slope x logit + offset (Platt 1999, with his targets for few examples). isotonic: the rates of a monotone regression (pool adjacent
violators, Barlow et al. 1972), joined by straight lines between logits.

Symbols: N candidates, H heads, K knots.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from inference.metrics import bin_of, calibration_error, reliability

KNOTS = 64
SLOPE_MIN = 1e-3
"""Least rise of an isotonic fit, so that no two different scores become one."""
_P_MIN = 1e-7
F64 = npt.NDArray[np.float64]


class Calibration(nn.Module):
    """Corrects logits [N, H] in place of a head's sigmoid alone; as it is made it changes nothing. `kind`: "platt" or "isotonic"."""

    def __init__(self, kind: str, heads: int) -> None:
        super().__init__()
        self.kind = kind
        if kind == "platt":
            self.register_buffer("slope", torch.ones(heads))
            self.register_buffer("offset", torch.zeros(heads))
        else:
            places = torch.arange(KNOTS, dtype=torch.float32) - KNOTS / 2
            self.register_buffer("logit", places.repeat(heads, 1))
            self.register_buffer("corrected", places.repeat(heads, 1))

    def forward(self, logits: Tensor) -> Tensor:
        """Float32 [N, H]."""
        if self.kind == "platt":
            return logits * self.get_buffer("slope") + self.get_buffer("offset")
        x, y = self.get_buffer("logit"), self.get_buffer("corrected")  # [H, K]
        of_head = logits.T.contiguous()  # [H, N]
        right = torch.searchsorted(x, of_head).clamp(1, KNOTS - 1)
        left_x, right_x, left_y, right_y = x.gather(1, right - 1), x.gather(1, right), y.gather(1, right - 1), y.gather(1, right)
        inside = left_y + (right_y - left_y) * ((of_head - left_x) / (right_x - left_x).clamp(min=1e-12)).clamp(0, 1)
        # Beyond the outermost knots the logit is moved, not flattened.
        beyond = (of_head - x[:, -1:]).clamp(min=0) + (of_head - x[:, :1]).clamp(max=0)
        return (inside + beyond).T

    def fit(self, probabilities: npt.NDArray[np.float32], labels: npt.NDArray[np.bool_]) -> None:
        """Fits to what the model says without correction, float32 [N, H], and what happened, bool [N, H].

        A head without a label, or with nothing else, is left as it is.
        """
        logits = logit(probabilities)
        for head in range(labels.shape[1]):
            label = labels[:, head]
            if not label.any() or label.all():
                continue
            if self.kind == "platt":
                slope, offset = fit_platt(logits[:, head], label)
                self.get_buffer("slope")[head], self.get_buffer("offset")[head] = slope, offset
            else:
                x, y = fit_isotonic(logits[:, head], label)
                self.get_buffer("logit")[head] = torch.from_numpy(x.astype(np.float32))
                self.get_buffer("corrected")[head] = torch.from_numpy(y.astype(np.float32))

    @torch.no_grad()
    def corrected_probabilities(self, probabilities: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """What `forward` makes of probabilities instead of logits: float32 [N, H]."""
        found: npt.NDArray[np.float32] = torch.sigmoid(self(torch.from_numpy(logit(probabilities).astype(np.float32)))).numpy()
        return found


def logit(probabilities: npt.NDArray[np.generic]) -> F64:
    """log(p / (1 - p)), float64; p is kept 1e-7 away from 0 and 1."""
    p = np.clip(probabilities.astype(np.float64), _P_MIN, 1 - _P_MIN)
    return np.asarray(np.log(p) - np.log1p(-p), np.float64)


def fit_platt(logits: F64, labels: npt.NDArray[np.bool_]) -> tuple[float, float]:
    """Slope (at least SLOPE_MIN) and offset of the logistic regression of `labels` [N] on `logits` [N], by Newton's method."""
    positives = int(labels.sum())
    negatives = len(labels) - positives
    target = np.where(labels, (positives + 1) / (positives + 2), 1 / (negatives + 2))
    inputs = np.stack([logits, np.ones_like(logits)], 1)
    weights = np.array([1.0, 0.0])
    loss = _log_loss(inputs @ weights, target)
    for _ in range(100):
        p = 1 / (1 + np.exp(-(inputs @ weights)))
        gradient = inputs.T @ (p - target)
        curvature = (inputs * (p * (1 - p))[:, None]).T @ inputs + 1e-9 * np.eye(2)
        step = np.linalg.solve(curvature, gradient)
        size = 1.0
        while size > 1e-6 and _log_loss(inputs @ (weights - size * step), target) > loss:
            size /= 2
        weights = weights - size * step
        found = _log_loss(inputs @ weights, target)
        if abs(loss - found) < 1e-12 * max(1.0, loss):
            break
        loss = found
    if weights[0] < SLOPE_MIN:  # worse than chance: every score says about the mean
        rate = float(target.mean())
        return SLOPE_MIN, float(np.log(rate) - np.log1p(-rate) - SLOPE_MIN * logits.mean())
    return float(weights[0]), float(weights[1])


def fit_isotonic(logits: F64, labels: npt.NDArray[np.bool_]) -> tuple[F64, F64]:
    """Knots of the corrected logit over the logit, both ascending, float64 [K]."""
    of_bin = bin_of(logits, KNOTS)
    count = np.bincount(of_bin).astype(np.float64)
    used = count > 0
    x = (np.bincount(of_bin, logits)[used] / count[used]).tolist()
    blocks: list[list[float]] = []  # each: positives, examples, sum of logits x examples
    for place, labelled, n in zip(x, np.bincount(of_bin, labels)[used].tolist(), count[used].tolist(), strict=True):
        blocks.append([labelled, n, place * n])
        while len(blocks) > 1 and blocks[-2][0] * blocks[-1][1] >= blocks[-1][0] * blocks[-2][1]:
            last = blocks.pop()
            blocks[-1] = [a + b for a, b in zip(blocks[-1], last, strict=True)]
    positives, examples, total = np.array(blocks).T
    rate = (positives + 0.5) / (examples + 1)
    places, values = total / examples, np.log(rate) - np.log1p(-rate)
    # The half example above may have turned two neighbours of different size round.
    risen = np.maximum.accumulate(values - SLOPE_MIN * places) + SLOPE_MIN * places
    more = np.arange(1, KNOTS - len(places) + 1)
    return np.concatenate([places, places[-1] + more]), np.concatenate([risen, risen[-1] + more])


def calibrate(
    calibration: Calibration,
    heads: Sequence[str],
    validation: tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]],
    test: tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]],
) -> dict[str, Any]:
    """Fits on the validation part and measures on the test part; probabilities [N, H], still uncorrected, and labels [N, H] of each.

    Returns, by head, calibration error and reliability curve on the test part before and after, as `plots.plot_reliability` takes it.
    """
    calibration.fit(*validation)
    sides = {"before": test[0], "after": calibration.corrected_probabilities(test[0])}
    return {
        head: {
            side: {
                "error": calibration_error(p[:, i], test[1][:, i]),
                "curve": [part.tolist() for part in reliability(p[:, i], test[1][:, i])],
            }
            for side, p in sides.items()
        }
        for i, head in enumerate(heads)
    }


def _log_loss(logits: F64, target: F64) -> float:
    return float(np.logaddexp(0, logits).sum() - (target * logits).sum())
