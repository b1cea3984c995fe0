"""Benchmark `model`: the ranking model on a CPU, two threads, float32, in eval mode without gradients.

The sequence encoder in the paper's size (E = 96, two layers, one head, F = 32, 100 actions) against the one that anybody would write:
`nn.TransformerEncoder` over [N, L, E], the candidate beside each action. Same weights, same requests, calls in turn, medians; sequences are
full, so that nothing is won by leaving padding out. Then the whole model over the simulator's domain, in this process and through Triton.
"""

import multiprocessing
import re
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from torch import Tensor, nn

from deploy.bench import CANDIDATES, world
from deploy.bench_service import WARM_S, Measured, answered, measured_server, requests_of
from deploy.load import Load, closed_loop
from deploy.paper_size import make_request, paper_domain
from inference.encoders import EncoderLayer
from inference.transact import SequenceEncoder, TransActRanker

THREADS = 2
ROUNDS = {128: 41, 512: 15}
"""Calls of each encoder in a run, by number of candidates."""
CANDIDATES_MANY = 2_000
MODEL_ROUNDS = 41
TRITON_S = 10.0
TOLERANCE = 1e-5


class PlainEncoder(nn.Module):
    """TransAct's sequence encoder as its authors publish it: concatenate, `nn.TransformerEncoder` with a padding mask, first K, max pool.

    Deviates: padded rows take no part in the max pool, as in `SequenceEncoder`, so that both give the same; an action's token is embedded
    once a request, not once a candidate, which costs this side less.
    """

    def __init__(self, encoder: SequenceEncoder) -> None:
        super().__init__()
        self.encoder = encoder
        layers = cast("list[EncoderLayer]", list(encoder.layers))
        width, heads, feedforward = layers[0].out.in_features, layers[0].heads, layers[0].wide.out_features
        layer = nn.TransformerEncoderLayer(width, heads, feedforward, batch_first=True)
        self.transformer = nn.TransformerEncoder(layer, len(layers), enable_nested_tensor=False)
        for mine, theirs in zip(self.transformer.layers, layers, strict=True):
            mine.load_state_dict(dict(zip(LIBRARY_NAMES, theirs.state_dict().values(), strict=True)))

    def forward(self, tensors: Mapping[str, Tensor], candidate: Tensor) -> Tensor:
        """Compressed sequence of the candidates [N, D] of one request, float32 [N, (K + 1) E]."""
        N, K = candidate.shape[0], self.encoder.first_k
        valid = self.encoder.valid(tensors)  # [1, L]
        history = self.encoder.tokens(tensors, valid)  # [1, L, E - D]
        L = valid.shape[1]
        x = torch.cat([history.expand(N, -1, -1), candidate[:, None].expand(-1, L, -1)], -1)  # [N, L, E]
        x = self.transformer(x, src_key_padding_mask=~valid.expand(N, -1))
        x = x.masked_fill(~valid[..., None], -1e9)
        return torch.cat([x[:, :K].flatten(1), x.amax(1)], 1)


LIBRARY_NAMES = (
    "self_attn.in_proj_weight",
    "self_attn.in_proj_bias",
    "self_attn.out_proj.weight",
    "self_attn.out_proj.bias",
    *(f"{part}.{kind}" for part in ("norm1", "linear1", "linear2", "norm2") for kind in ("weight", "bias")),
)
"""Names of a library layer's weights in the order of `EncoderLayer`'s."""


def bench_model(runs: int, folder: Path, console: Console) -> list[dict[str, float]]:
    """Encoders, memory, the whole model in this process, the whole model through Triton.

    Raises:
        RuntimeError: the two encoders do not agree.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        with torch.no_grad():
            found = [_encoders(console) | _in_process(console) for _ in range(runs)]
    finally:
        torch.set_num_threads(before)
    for figures in found:
        figures["resident_mb_2000"] = _resident_mb(console)
    with world(folder, ("worker",), torch_threads=THREADS) as running, measured_server(running.settings, "local") as server:
        load = Load(server.address, requests_of(running, CANDIDATES), 0.0, WARM_S, timeout_s=5.0)
        answered(closed_loop(load, 1))
        load = replace(load, seconds=TRITON_S)
        for figures in found:
            figures["model_100_ms_p50"] = _through_triton(server, load)
            console.print(
                f"  whole model, {CANDIDATES} candidates, one call at a time through Triton: p50 {figures['model_100_ms_p50']:.1f} ms"
            )
    return found


def _encoders(console: Console) -> dict[str, float]:
    """Speedups, by number of candidates."""
    domain = paper_domain(attributes=False)
    model = TransActRanker(domain, "home").eval()
    plain = PlainEncoder(model.sequence).eval()
    figures = {}
    for count, rounds in ROUNDS.items():
        tensors = make_request(domain, model, count)
        candidate = model.candidate_vectors(tensors)
        row = torch.zeros(count, dtype=torch.int64)
        calls: dict[str, Callable[[], Tensor]] = {
            "plain": partial(plain, tensors, candidate),
            "fast": partial(model.fast_sequence, tensors, candidate, row),
        }
        apart = float((calls["plain"]() - calls["fast"]()).abs().max())
        if not apart <= TOLERANCE:
            raise RuntimeError(f"the encoders do not agree: {apart:.2g} apart, allowed {TOLERANCE}")
        found_ms = in_turn(calls, rounds)
        figures[f"encoder_speedup_{count}"] = found_ms["plain"] / found_ms["fast"]
        console.print(
            f"  encoder, {count} candidates: plain {found_ms['plain']:.1f} ms, fast {found_ms['fast']:.1f} ms, "
            f"{figures[f'encoder_speedup_{count}']:.2f} times; {apart:.1g} apart"
        )
    return figures


def _in_process(console: Console) -> dict[str, float]:
    """The whole model, CANDIDATES candidates of one request."""
    domain = paper_domain()
    model = TransActRanker(domain, "home").eval()
    tensors = make_request(domain, model, CANDIDATES)
    candidate = model.candidate_vectors(tensors)
    row = torch.zeros(CANDIDATES, dtype=torch.int64)
    x = model.fast_sequence(tensors, candidate, row)
    calls: dict[str, Callable[[], Tensor]] = {
        "whole": partial(model.probabilities, tensors, row),
        "sequence": partial(model.fast_sequence, tensors, candidate, row),
        "crossing and heads": partial(model.behind_sequence, tensors, candidate, row, x),
    }
    found_ms = in_turn(calls, MODEL_ROUNDS)
    console.print(
        f"  whole model, {CANDIDATES} candidates, in process: " + ", ".join(f"{name} {ms:.1f} ms" for name, ms in found_ms.items())
    )
    return {"model_100_inprocess_ms_p50": found_ms["whole"]}


def _resident_mb(console: Console) -> float:
    """Most memory of a process that does nothing but rank CANDIDATES_MANY candidates."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        before_mb, most_mb = pool.submit(_rank_many).result()
    console.print(f"  whole model, {CANDIDATES_MANY:,} candidates: {most_mb:.0f} MB resident at most, {before_mb:.0f} before")
    return most_mb


def _rank_many() -> tuple[float, float]:
    torch.set_num_threads(THREADS)
    domain = paper_domain()
    model = TransActRanker(domain, "home").eval()
    tensors = make_request(domain, model, CANDIDATES_MANY)
    before_mb = _memory_mb("VmRSS")
    model.probabilities(tensors, torch.zeros(CANDIDATES_MANY, dtype=torch.int64))
    return before_mb, _memory_mb("VmHWM")


def _memory_mb(row: str) -> float:
    """A row of this process's status. Not getrusage: its maximum is that of the program before exec too."""
    return float(re.findall(rf"{row}:\s*(\d+) kB", Path("/proc/self/status").read_text("utf-8"))[0]) / 1e3


def _through_triton(server: Measured, load: Load) -> float:
    """Median of the ranking server's stage `triton`, one call at a time, ms."""
    server.begin()
    answered(closed_loop(load, 1))
    return float(server.end()["triton_ms_p50"])


def in_turn(calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median of each call's time, ms; calls take turns, so what else the machine does meets all of them."""
    found_ms: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds + 2):
        for name, call in calls.items():
            begin_s = time.perf_counter()
            call()
            if i >= 2:  # the first two warm up
                found_ms[name].append((time.perf_counter() - begin_s) * 1e3)
    return {name: statistics.median(values) for name, values in found_ms.items()}
