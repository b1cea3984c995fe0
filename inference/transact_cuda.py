"""TransAct on a GPU: bf16 products, the sequence encoder as one kernel, everything of a request as one copy and one CUDA graph.

A CUDA graph has fixed shapes, so there is one for each of BUCKETS of candidates, with a buffer of its own on the device, and a ranking
takes the smallest that it fits. The buffer's twin in pinned memory is filled with a batch of requests and copied at once: candidates come
first, then a slot for each request with all that is the user's, sent once whatever the number of candidates. What a bucket has beyond the
batch holds what was there before, of the same tensor; rows depend on nothing but themselves and their request, so nobody sees it.

`inference.transact` stays the definition. Residuals, norms, softmax, features and the last layer are float32, all other products bf16;
`inference.rescore.TOLERANCE` says how far probabilities may be from the definition's.
"""

import copy
import math
from bisect import bisect_left
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import torch
import triton.language as tl
from torch import Tensor, nn

from features.domain import Domain
from features.tensors import DYNAMIC, tensor_table
from inference import transact_cuda_kernel as kernel
from inference.encoders import EncoderLayer
from inference.transact import SequenceEncoder, TransActRanker
from inference.transact_fast import fold_behind, fold_later

BUCKETS = (16, 64, 128, 256, 512, 1024, 2048)
"""Candidates of the graphs, ascending. More than the last are ranked in pieces."""
WARM_UPS = 3
ALIGNMENT_BYTES = 16


class CudaRanker:
    """A trained ranker that answers on a GPU. Ask `serves` first. One caller at a time."""

    def __init__(
        self,
        model: TransActRanker,
        domain: Domain,
        ranker: str,
        *,
        requests_max: int = 8,
        buckets: tuple[int, ...] = BUCKETS,
        fused: bool = True,
        device: str = "cuda",
    ) -> None:
        """Copies the weights to the device, captures a graph for each bucket and runs each once.

        Args:
            model: in eval mode, on the CPU.
            domain: the model's.
            ranker: the model's.
            requests_max: most requests of one graph; more in a batch are ranked in pieces.
            buckets: candidates of the graphs, ascending.
            fused: whether the sequence encoder may be one kernel; it is where `FusedEncoder.applies`.
            device: a CUDA device.

        Raises:
            RuntimeError: there is no such device.
        """
        self.buckets = buckets
        self._model = of_fixed_shapes(model, device)
        self.per_candidate = model.per_candidate
        self.fused = fused and model.use_sequence and FusedEncoder.applies(model.sequence)
        self._encode = FusedEncoder(model.sequence, device) if self.fused else self._plain
        self._layouts = {bucket: Layout(domain, ranker, bucket, requests_max) for bucket in buckets}
        sizes = {bucket: layout.bytes(requests_max) for bucket, layout in self._layouts.items()}
        self._pinned = {bucket: torch.zeros(size, dtype=torch.uint8).pin_memory() for bucket, size in sizes.items()}
        self._buffers = {bucket: torch.zeros(size, dtype=torch.uint8, device=device) for bucket, size in sizes.items()}
        self._places = {bucket: layout.views(self._pinned[bucket]) for bucket, layout in self._layouts.items()}
        self._answer = torch.zeros(buckets[-1], len(model.head_names)).pin_memory()
        self._requests_max = requests_max
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream(device))  # which filled buffers and weights
        pool: Any = torch.cuda.graph_pool_handle()
        # The largest first: the smaller ones find their memory in its pool. They never run at once, and answers are copied before the next.
        self._graphs = {bucket: self._captured(bucket, pool) for bucket in reversed(buckets)}

    @staticmethod
    def serves(model: TransActRanker, device: str = "cuda") -> bool:
        """Whether there is a GPU form: of TransAct's own form and of a ranker without sequence, both behind DCN v2, on a device that
        multiplies bf16.
        """
        if torch.cuda.get_device_capability(device) < (8, 0):
            return False
        return model.interaction is None and (not model.use_sequence or model.sequence.other is None)

    @torch.no_grad()
    def probabilities(self, tensors: Mapping[str, Tensor], request_row: Tensor | None = None) -> Tensor:
        """Probability of each head's label, float32 [N, H] on the CPU: `TransActRanker.probabilities`, from tensors on the CPU."""
        if request_row is None:
            tensors, request_row = self._model.stacked(tensors)
        rows = request_row.tolist()
        pieces, start = [], 0
        while start < len(rows):
            end = min(start + self.buckets[-1], bisect_left(rows, rows[start] + self._requests_max))
            pieces.append(self._piece(tensors, slice(start, end), slice(rows[start], rows[end - 1] + 1), request_row))
            start = end
        return torch.cat(pieces) if pieces else torch.zeros(0, self._answer.shape[1])

    def _piece(self, tensors: Mapping[str, Tensor], candidates: slice, requests: slice, request_row: Tensor) -> Tensor:
        count, request_count = candidates.stop - candidates.start, requests.stop - requests.start
        bucket = self.buckets[bisect_left(self.buckets, count)]
        graph, answer = self._graphs[bucket]
        for name, place in self._places[bucket].items():
            if name == REQUEST_ROW:
                torch.sub(request_row[candidates], requests.start, out=place[:count])
            elif self.per_candidate[name]:
                place[:count] = tensors[name][candidates]
            else:
                place[:request_count] = tensors[name][requests]
        used = self._layouts[bucket].bytes(request_count)
        with torch.cuda.stream(self._stream):
            self._buffers[bucket][:used].copy_(self._pinned[bucket][:used], non_blocking=True)
            graph.replay()
            self._answer[:count].copy_(answer[:count], non_blocking=True)
        self._stream.synchronize()
        return self._answer[:count].clone()

    @torch.no_grad()
    def _captured(self, bucket: int, pool: Any) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """The graph of a bucket, and where its answer is: float32 [bucket, H]."""
        tensors = self._layouts[bucket].views(self._buffers[bucket])
        request_row = tensors.pop(REQUEST_ROW)
        with torch.cuda.stream(self._stream):
            for _ in range(WARM_UPS):
                self.on_device(tensors, request_row)
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=self._stream):
            answer = self.on_device(tensors, request_row)
        with torch.cuda.stream(self._stream):
            graph.replay()
        self._stream.synchronize()
        return graph, answer

    def on_device(self, tensors: Mapping[str, Tensor], request_row: Tensor) -> Tensor:
        """`probabilities`, from tensors on the device to one there, without graph and copies; nothing waits for the device."""
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            return self._model.calibrated(self._model.logits(tensors, request_row, self._encode))

    def encode(self, tensors: Mapping[str, Tensor], request_row: Tensor) -> Tensor:
        """The compressed sequences alone, float32 or bf16 [N, (K + 1) E]: as `on_device`."""
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            return self._encode(tensors, self._model.candidate_vectors(tensors), request_row)

    def _plain(self, tensors: Mapping[str, Tensor], candidate: Tensor, request_row: Tensor) -> Tensor:
        return cast(Tensor, self._model.sequence(tensors, candidate, request_row, None))


class FusedEncoder:
    """A `SequenceEncoder` as one kernel (`inference.transact_cuda_kernel`), with the weights that it has now. Nothing has a gradient."""

    def __init__(self, encoder: SequenceEncoder, device: str, dtype: torch.dtype = torch.bfloat16) -> None:
        """Folds the weights of `encoder`, which is on the CPU, and copies them; `dtype`: of what is multiplied, float32 or bf16."""
        self._low = tl.float32 if dtype == torch.float32 else tl.bfloat16
        self._encoder = of_fixed_shapes(encoder, device)
        layers = _layers(encoder)
        self._S, self._E, self._F = _sizes(encoder)
        later, behind = [fold_later(layer) for layer in layers], [fold_behind(layer) for layer in layers]
        E, (E_, F_) = layers[0].out.in_features, (self._E, self._F)
        squares = [torch.stack([_padded(part, E_, E_) for part in each.project.tensor_split([E], 1)]) for each in later]
        vectors = [
            [*first.project_bias.tensor_split([E]), rest.norm, rest.norm_bias, rest.wide_bias, rest.last, rest.last_bias]
            for first, rest in zip(later, behind, strict=True)
        ]
        self._square = torch.stack(squares).to(device, dtype)
        self._wide = torch.stack([_padded(each.wide, E_, F_) for each in behind]).to(device, dtype)
        self._narrow = torch.stack([_padded(each.narrow, F_, E_) for each in behind]).to(device, dtype)
        self._vector = torch.stack([torch.stack([_padded(row, E_) for row in rows]) for rows in vectors]).to(device)
        self._epsilon = behind[0].epsilon

    @staticmethod
    def applies(encoder: SequenceEncoder) -> bool:
        """Whether the kernel computes this form, in the sizes that fit a program."""
        if not encoder.has_fast or not encoder.layers or _layers(encoder)[0].heads != 1:
            return False
        sizes = _sizes(encoder)
        return max(sizes) <= kernel.SIZE_MAX and sizes[2] <= sizes[1]  # the bias of the feedforward lies in a row of E_

    @torch.no_grad()
    def __call__(self, tensors: Mapping[str, Tensor], candidate: Tensor, request_row: Tensor) -> Tensor:
        """Compressed sequence of each candidate, float32 [N, (K + 1) E]: `SequenceEncoder.forward` without a window.

        `tensors` are stacked [R, ...]; `candidate` float32 [N, D]; `request_row` [N].
        """
        encoder = self._encoder
        history = encoder.tokens(tensors, encoder.valid(tensors)).float().contiguous()  # [R, S, T]
        found = candidate.new_empty(candidate.shape[0], encoder.width)
        kernel.encode_candidates[(candidate.shape[0],)](
            found,
            history,
            candidate.contiguous(),
            tensors["sequence_count"].reshape(-1).int().contiguous(),
            request_row.int(),
            self._square,
            self._wide,
            self._narrow,
            self._vector,
            self._epsilon,
            *history.shape[1:],
            encoder.item_width,
            encoder.first_k,
            LAYERS=len(encoder.layers),
            S_=self._S,
            E_=self._E,
            F_=self._F,
            LOW=self._low,
            num_warps=kernel.WARPS,
        )
        return found


Module = TypeVar("Module", TransActRanker, SequenceEncoder)
REQUEST_ROW = "request_row"


class Layout:
    """Where each tensor of a bucket lies in the buffer: `request_row` and the tensors of candidates, then a slot for each request."""

    def __init__(self, domain: Domain, ranker: str, candidates: int, requests: int) -> None:
        self._candidates, self._requests = candidates, requests
        self._of_candidates: list[_Place] = []
        self._of_requests: list[_Place] = []
        at = self._add(self._of_candidates, REQUEST_ROW, np.dtype(np.int32), (candidates,), 0)
        slot = 0
        for tensor in tensor_table(domain, ranker):
            if tensor.per_candidate:
                shape = tuple(candidates if size == DYNAMIC else size for size in tensor.shape)
                at = self._add(self._of_candidates, tensor.name, tensor.dtype, shape, at)
            else:
                slot = self._add(self._of_requests, tensor.name, tensor.dtype, tensor.shape, slot)
        self._slots_at, self._slot_bytes = at, slot

    @staticmethod
    def _add(places: "list[_Place]", name: str, dtype: np.dtype[Any], shape: tuple[int, ...], at: int) -> int:
        """The first free place behind the tensor."""
        count = math.prod(shape) * dtype.itemsize
        places.append(_Place(name, torch.from_numpy(np.empty(0, dtype)).dtype, tuple(shape), slice(at, at + count)))
        return at + count + -count % ALIGNMENT_BYTES

    def bytes(self, requests: int) -> int:
        """How much of the buffer a batch of so many requests takes."""
        return self._slots_at + requests * self._slot_bytes

    def views(self, buffer: Tensor) -> dict[str, Tensor]:
        """Each tensor in uint8 `buffer`: stacked [requests, ...], or [candidates, ...]."""
        found = {place.name: buffer[place.bytes].view(place.dtype).view(place.shape) for place in self._of_candidates}
        slots = buffer[self._slots_at : self.bytes(self._requests)].view(self._requests, -1)
        for place in self._of_requests:
            found[place.name] = slots[:, place.bytes].view(place.dtype).view(self._requests, *place.shape)
        return found


class _Place(NamedTuple):
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    bytes: slice


class _Float32(nn.Module):
    """A layer outside of autocast: what a bf16 result would round away is the order of many candidates."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return cast(Tensor, self.layer(x.float()))


def of_fixed_shapes(module: Module, device: str) -> Module:
    """A copy that a graph can capture: no shape depends on contents. Weights of inner layers are bf16."""
    found = copy.deepcopy(module).to(device).eval()
    encoder = found.sequence if isinstance(found, TransActRanker) and found.use_sequence else found
    if isinstance(encoder, SequenceEncoder):
        encoder.whole = True
        _halve(encoder.layers)
    if isinstance(found, TransActRanker):
        _halve(found.crosses)
        _halve(found.hidden)
        found.heads = _Float32(found.heads)  # type: ignore[assignment]
    return found


def _halve(modules: nn.ModuleList) -> None:
    for module in modules.modules():
        if isinstance(module, nn.Linear):
            module.to(torch.bfloat16)


def _layers(encoder: SequenceEncoder) -> list[EncoderLayer]:
    return cast("list[EncoderLayer]", list(encoder.layers))


def _sizes(encoder: SequenceEncoder) -> tuple[int, int, int]:
    """S_, E_, F_ of the kernel."""
    layer = _layers(encoder)[0]
    needed = (max(encoder.length, encoder.first_k), layer.out.in_features, layer.wide.out_features)
    S, E, F = (max(kernel.SIZE_MIN, 1 << (size - 1).bit_length()) for size in needed)
    return S, E, F


def _padded(weights: Tensor, *shape: int) -> Tensor:
    found = weights.new_zeros(shape)
    found[tuple(slice(size) for size in weights.shape)] = weights
    return found
