"""The client of Triton: raw tensors out and back, model control, typed errors."""

import asyncio
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from tritonclient.grpc import InferInput, InferRequestedOutput
from tritonclient.grpc.aio import InferenceServerClient
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

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


class TritonError(RuntimeError):
    """Triton gave no answer that can be used."""


class ModelUnavailableError(TritonError):
    """Triton cannot be reached, or the model is not loaded or failed. Another tier answers."""


class ModelTimeoutError(TritonError):
    """No answer within the time given. The call was cancelled in Triton too."""


class TritonModels:
    """All models of one Triton server. One for each process and event loop, for its whole life: re-creating the client leaks."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._client = InferenceServerClient(address, channel_args=_CHANNEL)

    async def infer(self, model: str, tensors: Tensors, outputs: Sequence[str], *, timeout_s: float) -> dict[str, npt.NDArray[np.generic]]:
        """Runs a model once on `tensors`; returns `outputs` by name.

        Raises:
            ModelTimeoutError: no answer within `timeout_s`.
            ModelUnavailableError: no Triton, no such model, or the model failed.
        """
        inputs = []
        for name, value in tensors.items():
            tensor = InferInput(name, value.shape, np_to_triton_dtype(value.dtype))
            tensor.set_data_from_numpy(value)
            inputs.append(tensor)
        wanted = [InferRequestedOutput(name) for name in outputs]
        try:
            # The client's own time-out leaves the work in Triton's queue; cancelling the task takes it out.
            async with asyncio.timeout(timeout_s):
                result = await self._client.infer(model, inputs, outputs=wanted, headers=dict(TRACE_HEADERS.get()))
        except TimeoutError as error:
            raise ModelTimeoutError(f"{model}: no answer within {timeout_s * 1e3:.0f} ms") from error
        except InferenceServerException as error:
            raise _unavailable(model, error) from error
        answer = {name: result.as_numpy(name) for name in outputs}
        for name, value in answer.items():
            if value is None:
                raise ModelUnavailableError(f"{model}: answered without {name}")
        return answer

    async def load(self, model: str, *, timeout_s: float) -> None:
        """Loads a model of the repository (explicit model control) and returns when it is ready.

        Raises:
            ModelUnavailableError: no Triton, or the model does not load; the message is Triton's.
            ModelTimeoutError: not ready within `timeout_s`.
        """
        try:
            async with asyncio.timeout(timeout_s):
                await self._client.load_model(model)
                if not await self._client.is_model_ready(model):
                    raise ModelUnavailableError(f"{model}: loaded, but not ready")
        except TimeoutError as error:
            raise ModelTimeoutError(f"{model}: not loaded within {timeout_s:.0f} s") from error
        except InferenceServerException as error:
            raise _unavailable(model, error) from error

    async def unload(self, model: str, *, timeout_s: float = 10.0) -> None:
        """Unloads a model. Raises as `load`."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._client.unload_model(model)
        except TimeoutError as error:
            raise ModelTimeoutError(f"{model}: not unloaded within {timeout_s:.0f} s") from error
        except InferenceServerException as error:
            raise _unavailable(model, error) from error

    async def ready(self, model: str, *, timeout_s: float = 1.0) -> bool:
        """Whether Triton is there and has the model ready."""
        try:
            async with asyncio.timeout(timeout_s):
                return bool(await self._client.is_model_ready(model))
        except (TimeoutError, InferenceServerException):
            return False

    async def close(self) -> None:
        """Closes the connection."""
        await self._client.close()


def _unavailable(model: str, error: InferenceServerException) -> ModelUnavailableError:
    return ModelUnavailableError(f"{model}: {error.status() or 'error'}: {error.message()}")
