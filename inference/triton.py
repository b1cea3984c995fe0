"""The client of Triton: raw tensors out and back, model control, typed errors."""

import asyncio
import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import grpc
import grpc.aio
import numpy as np
import numpy.typing as npt
from tritonclient.grpc.service_pb2 import (
    ModelInferRequest,
    ModelInferResponse,
    ModelReadyRequest,
    RepositoryModelLoadRequest,
    RepositoryModelUnloadRequest,
)
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub
from tritonclient.utils import np_to_triton_dtype, triton_to_np_dtype

from features.request_context import TRACE_HEADERS

Tensors = Mapping[str, npt.NDArray[np.generic]]

# gRPC's own reconnection waits up to two minutes; a Triton that is back should be found within half a second.
_CHANNEL = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 2_000),
]


_INFER = "/inference.GRPCInferenceService/ModelInfer"
_HEADS_MAX = 1024
"""One for each number of candidates and model: about a kilobyte."""


class TritonError(RuntimeError):
    """Triton gave no answer that can be used."""


class ModelUnavailableError(TritonError):
    """Triton cannot be reached, or the model is not loaded or failed. Another tier answers."""


class ModelTimeoutError(TritonError):
    """No answer within the time given. The call was cancelled in Triton too."""


class TritonModels:
    """All models of one Triton server. One for each process and event loop, for its whole life.

    The messages are Triton's own, without its client's objects for each tensor: tensors go out as raw bytes, one request is a batch of one,
    and Triton joins requests that come together (`config_pbtxt`). What a request says beside the bytes is serialized once for all of the
    same shapes.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self._channel = grpc.aio.insecure_channel(address, options=_CHANNEL)
        self._stub = GRPCInferenceServiceStub(self._channel)
        self._infer = self._channel.unary_unary(_INFER, response_deserializer=ModelInferResponse.FromString)

    async def infer(self, model: str, tensors: Tensors, output: str, *, timeout_s: float) -> npt.NDArray[np.generic]:
        """Runs a model once on the `tensors` of one request, as the tensor table shapes them; returns the tensor `output`.

        Raises:
            ModelTimeoutError: no answer within `timeout_s`.
            ModelUnavailableError: no Triton, no such model, or the model failed.
        """
        head = _head(model, output, tuple([(name, value.dtype, value.shape) for name, value in tensors.items()]))
        contents = ModelInferRequest(raw_input_contents=[value.tobytes() for value in tensors.values()])
        request = head + contents.SerializeToString()  # two messages in a row are one with the fields of both
        try:
            # A deadline of the call leaves the work in Triton's queue; cancelling the task takes it out.
            async with asyncio.timeout(timeout_s):
                answer = await self._infer(request, metadata=TRACE_HEADERS.get() or None)
        except TimeoutError as error:
            raise ModelTimeoutError(f"{model}: no answer within {timeout_s * 1e3:.0f} ms") from error
        except grpc.RpcError as error:
            raise _unavailable(model, error) from error
        if len(answer.outputs) != 1 or answer.outputs[0].name != output or len(answer.raw_output_contents) != 1:
            raise ModelUnavailableError(f"{model}: answered without {output}")
        found = np.frombuffer(answer.raw_output_contents[0], triton_to_np_dtype(answer.outputs[0].datatype))
        shape = tuple(answer.outputs[0].shape)[1:]
        if found.size != math.prod(shape):
            raise ModelUnavailableError(f"{model}: answered {found.size} numbers for {output} of shape {list(shape)}")
        return found.reshape(shape)

    async def load(self, model: str, *, timeout_s: float) -> None:
        """Loads a model of the repository (explicit model control) and returns when it is ready.

        Raises:
            ModelUnavailableError: no Triton, or the model does not load; the message is Triton's.
            ModelTimeoutError: not ready within `timeout_s`.
        """
        try:
            async with asyncio.timeout(timeout_s):
                await self._stub.RepositoryModelLoad(RepositoryModelLoadRequest(model_name=model))
                if not (await self._stub.ModelReady(ModelReadyRequest(name=model))).ready:
                    raise ModelUnavailableError(f"{model}: loaded, but not ready")
        except TimeoutError as error:
            raise ModelTimeoutError(f"{model}: not loaded within {timeout_s:.0f} s") from error
        except grpc.RpcError as error:
            raise _unavailable(model, error) from error

    async def unload(self, model: str, *, timeout_s: float = 10.0) -> None:
        """Unloads a model. Raises as `load`."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._stub.RepositoryModelUnload(RepositoryModelUnloadRequest(model_name=model))
        except TimeoutError as error:
            raise ModelTimeoutError(f"{model}: not unloaded within {timeout_s:.0f} s") from error
        except grpc.RpcError as error:
            raise _unavailable(model, error) from error

    async def ready(self, model: str, *, timeout_s: float = 1.0) -> bool:
        """Whether Triton is there and has the model ready."""
        try:
            async with asyncio.timeout(timeout_s):
                return bool((await self._stub.ModelReady(ModelReadyRequest(name=model))).ready)
        except (TimeoutError, grpc.RpcError):
            return False

    async def close(self) -> None:
        """Closes the connection."""
        await self._channel.close()


@lru_cache(_HEADS_MAX)
def _head(model: str, output: str, inputs: tuple[tuple[str, np.dtype[Any], tuple[int, ...]], ...]) -> bytes:
    """A serialized request without the tensors' bytes; `inputs`: name, dtype and shape of each."""
    request = ModelInferRequest(model_name=model)
    for name, dtype, shape in inputs:
        request.inputs.add(name=name, datatype=np_to_triton_dtype(dtype), shape=(1, *shape))
    request.outputs.add(name=output)
    return bytes(request.SerializeToString())


def _unavailable(model: str, error: grpc.RpcError) -> ModelUnavailableError:
    return ModelUnavailableError(f"{model}: {error.code().name}: {error.details()}")
