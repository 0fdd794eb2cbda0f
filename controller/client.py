"""The control plane as the controller sees it: model `brownout` over gRPC."""

from __future__ import annotations

import json
from typing import Protocol

import tritonclient.grpc as grpc
from tritonclient.utils import InferenceServerException

MODEL = "brownout"
_HELD = "the settings are held by"
# A server that comes back is to be found within a second, not after gRPC's own backoff of up to two minutes.
_CHANNEL = [("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 1000)]


class Unreachable(Exception):
    """No answer: the server is away, starting, or without the model. Try again."""


class Held(Exception):
    """Another owner has the lease. Try again when it ends."""


class Refused(Exception):
    """The server will not do this however often it is asked: a wrong token, a value that is not allowed."""


class Plane(Protocol):
    """What the loop needs of the control plane."""

    def call(self, **parameters: float | int | str) -> dict: ...


class BrownoutClient:
    """Calls the model; `address` is HOST:PORT of Triton's gRPC service. Who does not answer in `timeout_s` is unreachable."""

    def __init__(self, address: str, token: str = "", timeout_s: float = 2.0) -> None:
        self._token, self._timeout_s = token, timeout_s
        self._client = grpc.InferenceServerClient(address, channel_args=_CHANNEL)

    def call(self, **parameters: float | int | str) -> dict:
        """Set what the parameters say (nothing without any); returns the status.

        Raises Unreachable, Held or Refused.
        """
        if parameters and self._token:
            parameters["token"] = self._token
        # As strings: gRPC request parameters know no floating-point numbers.
        texts = {key: value if isinstance(value, str) else repr(value) for key, value in parameters.items()}
        try:
            result = self._client.infer(MODEL, [], parameters=texts, client_timeout=self._timeout_s)
        except InferenceServerException as error:
            message = error.message() or ""
            if _HELD in message:
                raise Held(message) from None
            if error.status() == "StatusCode.INVALID_ARGUMENT":
                raise Refused(message) from None
            raise Unreachable(message) from None
        return json.loads(result.as_numpy("status")[0])

    def close(self) -> None:
        self._client.close()
