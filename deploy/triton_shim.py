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
        self.device = torch.device(device)
        self.release = open_release(Path(parameters["release_folder"]))
        self.inputs = tensor_table(self.release.domain, self.release.ranker)
        (self.output,) = output_table(self.release.domain, self.release.ranker)
        self.model = load_model(self.release, device=device)
        for candidates in WARM_CANDIDATES:
            blank = blank_request(self.release.domain, self.release.ranker, candidates)
            self._run({name: torch.from_numpy(value) for name, value in blank.items()})

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answers each request. One that fails gets its error; the others are not touched."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        if request.is_cancelled():
            return pb_utils.InferenceResponse(error=pb_utils.TritonError("cancelled", pb_utils.TritonError.CANCELLED))
        try:
            given = {tensor.name: pb_utils.get_input_tensor_by_name(request, tensor.name) for tensor in self.inputs}
            tensors = {name: from_dlpack(value.to_dlpack()) for name, value in given.items()}
            probability = self._run(tensors)
            return pb_utils.InferenceResponse([pb_utils.Tensor.from_dlpack(self.output.name, probability)])
        except Exception as error:  # the caller sees it and answers from another tier; the instance must live on
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(f"{type(error).__name__}: {error}"))

    def _run(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.inference_mode():
            probability = self.model.probabilities({name: value.to(self.device) for name, value in tensors.items()})
        return probability.cpu().contiguous()
