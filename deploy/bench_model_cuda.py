"""Benchmark `model --device cuda`: the ranking model in the paper's size on a GPU, in bf16.

Three forms of the sequence encoder over the same requests, on the device alone: the definition in float32, launched kernel by kernel; the
definition in bf16 as a CUDA graph; one kernel (`inference.transact_cuda`) as a CUDA graph. Then the whole model as Triton's backend calls
it, from tensors on the CPU to probabilities there.

Shares are of what the device reaches in the same run: a product of large bf16 matrices, a copy of a large array (bytes read and written).
What counts as arithmetic are the products of the form measured, without what its blocks add; as bytes, each input, weight and result once.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import cast

import torch
from rich.console import Console
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from deploy.paper_size import make_request, paper_domain
from features.domain import Domain
from inference.encoders import EncoderLayer
from inference.transact import TransActRanker
from inference.transact_cuda import BUCKETS, CudaRanker, of_fixed_shapes

CANDIDATES = (100, 1024)
ROUNDS = 30
"""Measurements of a run, each of REPLAYS calls."""
REPLAYS = 20
CALLS = 500
"""Whole rankings of a run."""
NOISES = (0.0, 0.03, 0.06)
"""Deviation of what is added to each weight where the forms' difference is measured: from nothing to what puts most probabilities near 0
or 1."""
SQUARE = 8192
COPY_BYTES = 1 << 30


def bench_model_cuda(runs: int, folder: Path, console: Console) -> list[dict[str, float]]:
    """Forms of the encoder, then the whole model.

    Raises:
        ValueError: this machine has no CUDA device.
    """
    del folder
    if not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch finds no CUDA device on this machine (torch.cuda.is_available())")
    console.print(f"  {torch.cuda.get_device_name()}, PyTorch {torch.__version__}, CUDA {torch.version.cuda}")
    domain = paper_domain()
    model = TransActRanker(domain, "home").eval()
    forms = {"plain": CudaRanker(model, domain, "home", fused=False), "fused": CudaRanker(model, domain, "home")}
    apart = {f"apart_noise_{noise}": _apart(domain, noise, console) for noise in NOISES}
    return [{**_run(domain, model, forms, console), **apart} for _ in range(runs)]


def _apart(domain: Domain, noise: float, console: Console) -> float:
    """Greatest difference of a probability from the definition's in float32 on the CPU."""
    torch.manual_seed(1)
    model = TransActRanker(domain, "home").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    count = BUCKETS[-1]
    tensors, row = make_request(domain, model, count), torch.zeros(count, dtype=torch.int64)
    wanted = model.probabilities(tensors, row)
    found = CudaRanker(model, domain, "home", buckets=(count,)).probabilities(tensors, row)
    differences = (found - wanted).abs()
    console.print(
        f"  weights with noise of {noise}: probabilities have a deviation of {float(wanted.std(0).max()):.2f} and differ by up to "
        f"{float(differences.max()):.1e}, on average {float(differences.mean()):.1e}"
    )
    return float(differences.max())


@torch.no_grad()
def _run(domain: Domain, model: TransActRanker, forms: dict[str, CudaRanker], console: Console) -> dict[str, float]:
    flops_peak, bytes_peak = _flops_peak(), _bytes_peak()
    figures = {"device_tflop_per_s": flops_peak / 1e12, "device_gb_per_s": bytes_peak / 1e9}
    for count in CANDIDATES:
        tensors, row = make_request(domain, model, count), torch.zeros(count, dtype=torch.int64)
        given = {name: value.cuda() for name, value in tensors.items()}
        plain = of_fixed_shapes(model, "cuda").float()
        found_us = {
            "plain_float32": _device_us(partial(_encode, plain, given, row.cuda())),
            **{f"{name}_bf16_graph": _graph_us(partial(form.encode, given, row.cuda())) for name, form in forms.items()},
        }
        for name, us in found_us.items():
            figures[f"encoder_{name}_{count}_us"] = us
        found_ms = _calls_ms(partial(forms["fused"].probabilities, tensors, row))
        figures[f"model_{count}_ms_p50"] = statistics.median(found_ms)
        figures[f"model_{count}_ms_p99"] = found_ms[int(len(found_ms) * 0.99)]
        figures[f"model_{count}_rankings_per_s"] = 1e3 / statistics.fmean(found_ms)
        figures[f"model_{count}_device_us"] = _graph_us(partial(forms["fused"].on_device, given, row.cuda()))
        figures[f"model_{count}_plain_device_us"] = _graph_us(partial(forms["plain"].on_device, given, row.cuda()))
        flops, moved = _encoder_work(model, count)
        seconds = found_us["fused_bf16_graph"] / 1e6
        figures |= {
            f"encoder_{count}_tflop_per_s": flops / seconds / 1e12,
            f"encoder_{count}_flops_share": flops / seconds / flops_peak,
            f"encoder_{count}_gb_per_s": moved / seconds / 1e9,
            f"encoder_{count}_bytes_share": moved / seconds / bytes_peak,
        }
        flops += _flops(partial(_behind, model, tensors, row))
        seconds = figures[f"model_{count}_device_us"] / 1e6
        figures[f"model_{count}_tflop_per_s"] = flops / seconds / 1e12
        figures[f"model_{count}_flops_share"] = flops / seconds / flops_peak
        console.print(
            f"  {count} candidates: encoder "
            + ", ".join(f"{name} {us:.0f} us" for name, us in found_us.items())
            + f"; whole model p50 {figures[f'model_{count}_ms_p50']:.3f} ms, p99 {figures[f'model_{count}_ms_p99']:.3f}, on the device "
            f"{figures[f'model_{count}_device_us']:.0f} us; {figures[f'encoder_{count}_tflop_per_s']:.0f} TFLOP/s"
        )
    figures["candidates_per_s"] = BUCKETS[-1] * 1e6 / _throughput_us(domain, model, forms["fused"])
    return figures


def _encode(model: TransActRanker, tensors: dict[str, Tensor], row: Tensor) -> Tensor:
    found: Tensor = model.sequence(tensors, model.candidate_vectors(tensors), row, None)
    return found


def _behind(model: TransActRanker, tensors: dict[str, Tensor], row: Tensor) -> Tensor:
    compressed = torch.zeros(len(row), model.sequence.width)
    return model.behind_sequence(tensors, model.candidate_vectors(tensors), row, compressed)


def _throughput_us(domain: Domain, model: TransActRanker, form: CudaRanker) -> float:
    """Mean time of a ranking of the largest bucket from CPU to CPU, one call after the other."""
    count = BUCKETS[-1]
    found_ms = _calls_ms(partial(form.probabilities, make_request(domain, model, count), torch.zeros(count, dtype=torch.int64)))
    return statistics.fmean(found_ms) * 1e3


def _encoder_work(model: TransActRanker, count: int) -> tuple[float, float]:
    """(floating point operations of the products, bytes) of the fused encoder."""
    layer = cast(EncoderLayer, model.sequence.layers[0])
    S, E, F, layers = model.sequence.length, layer.out.in_features, layer.wide.out_features, len(model.sequence.layers)
    flops = count * layers * 4.0 * S * E * (E + S + F)
    of_weights = layers * 2 * (2 * E * E + 2 * E * F)
    return flops, of_weights + 4.0 * count * (model.sequence.width + model.sequence.item_width)


def _flops(call: Callable[[], Tensor]) -> float:
    with FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops())


def _flops_peak() -> float:
    a, b = (torch.randn(SQUARE, SQUARE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2.0 * SQUARE**3 / (_device_us(partial(torch.mm, a, b)) / 1e6)


def _bytes_peak() -> float:
    source = torch.randint(0, 255, (COPY_BYTES,), device="cuda", dtype=torch.uint8)
    to = torch.empty_like(source)
    return 2.0 * COPY_BYTES / (_device_us(partial(to.copy_, source)) / 1e6)


def _graph_us(call: Callable[[], Tensor]) -> float:
    """Median time of a call as a CUDA graph, microseconds."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        kept = call()
    found_us = _device_us(graph.replay)
    del kept
    return found_us


def _device_us(call: Callable[[], object]) -> float:
    """Median time of a call on the device, microseconds: ROUNDS times REPLAYS calls in a row, between two events."""
    for _ in range(3):
        call()
    found_us = []
    for _ in range(ROUNDS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        for _ in range(REPLAYS):
            call()
        end.record()
        end.synchronize()
        found_us.append(begin.elapsed_time(end) * 1e3 / REPLAYS)
    return float(statistics.median(found_us))


def _calls_ms(call: Callable[[], object]) -> list[float]:
    """Times of CALLS calls, one after the other, ascending, milliseconds."""
    found_ms = []
    for i in range(CALLS + 20):
        begin_s = time.perf_counter()
        call()
        if i >= 20:
            found_ms.append((time.perf_counter() - begin_s) * 1e3)
    return sorted(found_ms)
