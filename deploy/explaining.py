"""Explains a logged ranking: its inputs as replay rebuilds them, its scores as the release's own weights give them."""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from deploy.replay import Rebuilt, ReplayOptions, replay
from features.domain import Domain
from features.parity import EXCLUSIONS, Report
from inference.experiments import Choice
from inference.explain import explanation, variants
from protos.v1.ranking_pb2 import TIER_MODEL, Explanation, RankingRecord, RankResponse


class NotExplainedError(ValueError):
    """The ranking is not in the log, or cannot be rebuilt; says why."""


@dataclass(frozen=True)
class Explained:
    """An explanation of a record, and in words how far what it was made from is what was served: `warnings` where it is not."""

    domain: Domain
    record: RankingRecord
    explanation: Explanation
    notes: tuple[str, ...]
    warnings: tuple[str, ...]


def explain_logged(options: ReplayOptions, request_id: int, *, shadow_release: str = "") -> Explained:
    """Explains the ranking of this request_id, or what `shadow_release` scored in its shadow; of several the one that was served last.

    Raises:
        NotExplainedError: it is not in the log, or its inputs cannot be rebuilt.
        ArchiveError, StreamError: a log cannot be read.
    """

    def wanted(record: RankingRecord) -> bool:
        of_shadow = not record.shadow if not shadow_release else record.shadow and record.release_id == shadow_release
        return record.request.request_id == request_id and of_shadow

    found: list[Rebuilt] = []
    report = replay(replace(options, score_sample=0, users_share=1.0, only=wanted, on_rebuilt=found.append))
    if not found:
        raise NotExplainedError(_why_not(report, request_id))
    rebuilt = max(found, key=lambda one: one.record.served_time_ms)
    notes, warnings = list[str](), list[str]()
    if len(found) > 1:
        notes.append(f"{len(found)} rankings have this request id; this is the one that was served last")
    if rebuilt.agree:
        notes.append("the rebuilt inputs are those that were served, byte for byte")
    else:
        warnings.append(_difference(report))
    message = _explained(rebuilt, options, notes, warnings)
    return Explained(rebuilt.release.domain, rebuilt.record, message, tuple(notes), tuple(warnings))


def _why_not(report: Report, request_id: int) -> str:
    reasons = [*report.excluded, *report.shadows_excluded]
    if not reasons:
        return f"request_id {request_id}: the ranking log has no such ranking; it may have been dropped, or be older than the log"
    examples = [str(example["why"]) for example in report.examples if "why" in example]
    return f"request_id {request_id}: cannot be rebuilt: {EXCLUSIONS[reasons[0]]}" + (f" ({examples[0]})" if examples else "")


def _difference(report: Report) -> str:
    what = [f"tensor {name}" for name in sorted(report.tensors_different)] + ["the row"] * bool(report.rows_different)
    return f"the rebuilt inputs differ from those that were served ({', '.join(what)}): what follows is about the rebuilt ones"


def _explained(rebuilt: Rebuilt, options: ReplayOptions, notes: list[str], warnings: list[str]) -> Explanation:
    """The message; what is to be said of its scores goes to `notes` or `warnings`."""
    from inference.rescore import Rescorer  # PyTorch takes seconds

    record, request = rebuilt.record, rebuilt.record.request
    served = np.frombuffer(record.scores, "<f4")
    order = Choice(shuffle_bound=record.shuffle_bound).order(served, request.request_id)
    response = _response(rebuilt, order)
    if record.tier != TIER_MODEL:
        notes.append("a tier without the whole model answered: no action had an effect that could be measured")
        return explanation(rebuilt.packer, rebuilt.inputs, rebuilt.packed, served, {}, response, order)
    rescorer = Rescorer(rebuilt.release, device=options.device, served_on=options.served_on)
    by = dict(request.head_weights), record.score_formula
    scores, allowed = rescorer.scores(rebuilt.packed.tensors, *by)[""]
    without = {
        variant.place: rescorer.scores(rebuilt.packer.pack(variant.inputs).tensors, *by)[""][0]
        for variant in variants(rebuilt.packer, rebuilt.inputs)
    }
    difference = float(np.abs(scores - served).max(initial=0.0)) if len(scores) == len(served) else float("nan")
    if difference <= allowed:
        notes.append(f"final scores from the release's weights are within {difference:.1e} of the served ones")
    else:
        warnings.append(f"final scores from the release's weights differ from the served ones by up to {difference:.1e}, not {allowed:.0e}")
    return explanation(rebuilt.packer, rebuilt.inputs, rebuilt.packed, scores, without, response, order)


def _response(rebuilt: Rebuilt, order: npt.NDArray[np.int64]) -> RankResponse:
    """The answer as it was given, from the log."""
    record, inputs = rebuilt.record, rebuilt.inputs
    return RankResponse(
        request_id=record.request.request_id,
        ranked_ids=inputs.candidate_ids[order].tobytes(),
        ranked_kinds=inputs.candidate_kinds[order].tobytes(),
        scores=np.frombuffer(record.scores, "<f4")[order].tobytes(),
        head_scores={name: np.frombuffer(data, "<f4")[order].tobytes() for name, data in record.head_scores.items()},
        tier=record.tier,
        release_id=record.release_id,
        generations=record.generations,
        watermark=record.watermark,
        sequence_age_ms=rebuilt.packed.sequence_age_ms,
        sequence_count=rebuilt.packed.sequence_count,
        cold_start=bool(record.watermark) and not len(inputs.events),
        after_reached=record.after_reached,
        sequence_source=record.sequence_source,
        state_age_ms=record.state_age_ms,
        experiment=record.experiment,
        arm=record.arm,
    )
