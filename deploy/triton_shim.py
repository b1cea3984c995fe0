"""What Triton's Python backend runs: one release, one instance of its model.

Triton's wheel predates NumPy 2, so tensors come and go by dlpack, never as NumPy arrays.
"""

import json
from pathlib import Path
from typing import Any

import torch
import triton_python_backend_utils as pb_utils
from torch.utils.dlpack import from_dlpack

from features.tensors import output_table, tensor_table
from inference.release import blank_request, load_model, open_release
from inference.transact import TransActRanker

WARM_CANDIDATES = (1, 100, 129)
"""Candidate counts of the warm-up: one, a usual request, and one that is cut in two."""


class TritonPythonModel:
    """The model of one release; Triton makes one for each instance, in a process of its own."""

    def initialize(self, args: dict[str, str]) -> None:
        """Reads and verifies the release that config.pbtxt names, builds the model and warms it."""
        parameters = {key: value["string_value"] for key, value in json.loads(args["model_config"])["parameters"].items()}
        torch.set_num_threads(int(parameters["threads"]))
        device = parameters["device"]
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.release = open_release(Path(parameters["release_folder"]))
        self.inputs = tensor_table(self.release.domain, self.release.ranker)
        (self.output,) = output_table(self.release.domain, self.release.ranker)
        self.model, self.device = self._served(device, int(json.loads(args["model_config"])["max_batch_size"]))
        for candidates in WARM_CANDIDATES:
            blank = blank_request(self.release.domain, self.release.ranker, candidates)
            self._run([{name: torch.from_numpy(value)[None] for name, value in blank.items()}])

    def _served(self, device: str, requests_max: int) -> tuple[Any, str]:
        """The model, and where its tensors are expected."""
        model = load_model(self.release)
        if device == "cpu":
            return model, device
        from inference.transact_cuda import CudaRanker  # needs Triton, the language, which only a machine with a GPU is sure to have

        if isinstance(model, TransActRanker) and CudaRanker.serves(model, device):
            return CudaRanker(model, self.release.domain, self.release.ranker, requests_max=max(1, requests_max), device=device), "cpu"
        return model.to(device), device

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answers the requests that Triton has joined, all at once. One that fails gets its error; the others are not touched."""
        answers: list[Any] = [None] * len(requests)
        batch: dict[int, dict[str, torch.Tensor]] = {}
        for i, request in enumerate(requests):
            if request.is_cancelled():
                answers[i] = _failed("cancelled", pb_utils.TritonError.CANCELLED)
                continue
            try:
                batch[i] = self._tensors(request)
            except Exception as error:
                answers[i] = _failed(f"{type(error).__name__}: {error}")
        for i, answer in self._answer(batch).items():
            answers[i] = answer
        return answers

    def _tensors(self, request: Any) -> dict[str, torch.Tensor]:
        """The table's tensors of one request, each with a leading 1."""
        return {tensor.name: from_dlpack(pb_utils.get_input_tensor_by_name(request, tensor.name).to_dlpack()) for tensor in self.inputs}

    def _answer(self, batch: dict[int, dict[str, torch.Tensor]]) -> dict[int, Any]:
        try:
            found = self._run(list(batch.values())) if batch else []
        except Exception as error:  # the caller sees it and answers from another tier; the instance must live on
            if len(batch) == 1:
                return dict.fromkeys(batch, _failed(f"{type(error).__name__}: {error}"))
            return {i: self._answer({i: tensors})[i] for i, tensors in batch.items()}
        return {
            i: pb_utils.InferenceResponse([pb_utils.Tensor.from_dlpack(self.output.name, probability[None])])
            for i, probability in zip(batch, found, strict=True)
        }

    def _run(self, requests: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
        """Probabilities of each request, float32 [C, H]: the user's tensors are stacked, those of candidates concatenated."""
        counts = [request["candidate_embedding"].shape[1] for request in requests]
        tensors = {}
        for tensor in self.inputs:
            parts = [request[tensor.name][0] if tensor.per_candidate else request[tensor.name] for request in requests]
            tensors[tensor.name] = (parts[0] if len(parts) == 1 else torch.cat(parts)).to(self.device)
        request_row = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).to(self.device)
        with torch.inference_mode():
            probability = self.model.probabilities(tensors, request_row)
        return [part.contiguous() for part in torch.split(probability.cpu(), counts)]


def _failed(message: str, code: int | None = None) -> Any:
    error = pb_utils.TritonError(message) if code is None else pb_utils.TritonError(message, code)
    return pb_utils.InferenceResponse(error=error)
