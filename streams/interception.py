"""What stands around every method of a gRPC server: the door (`deploy/door.py`), and who counts a reader's calls."""

import inspect
from abc import abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc

Call = Callable[[Any, Any], Awaitable[Any]]
Stream = Callable[[Any, Any], AsyncIterator[Any]]


class Around(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """An interceptor that sees the whole of a call, not only its begin: each method's behaviour is put into another one, once."""

    def __init__(self) -> None:
        self._made: dict[str, tuple[Any, Any]] = {}

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
        """The method's handler with the behaviour around it; None where there is no such method (UNIMPLEMENTED)."""
        handler = await continuation(details)
        if handler is None:
            return None
        known = self._made.get(details.method)
        if known is None or known[0] is not handler:
            known = self._made[details.method] = (handler, self._around(details.method, handler))
        return known[1]

    @abstractmethod
    def call(self, method: str, behaviour: Call) -> Call:
        """What a method with one answer does instead; `method` is its path."""

    @abstractmethod
    def stream(self, method: str, behaviour: Stream) -> Stream:
        """What a method with many answers does instead."""

    def _around(self, method: str, handler: Any) -> Any:
        name = f"{'stream' if handler.request_streaming else 'unary'}_{'stream' if handler.response_streaming else 'unary'}"
        behaviour = getattr(handler, name)
        inside = self.stream(method, behaviour) if inspect.isasyncgenfunction(behaviour) else self.call(method, behaviour)
        make = getattr(grpc, f"{name}_rpc_method_handler")
        return make(inside, request_deserializer=handler.request_deserializer, response_serializer=handler.response_serializer)
