"""Which of a request's Triton parameters are the client's own: the others Triton, its clients and its front ends add."""

from __future__ import annotations

from collections.abc import Container, Mapping

#: Keys that Triton's parameter extension reserves, and its prefix: HTTP and gRPC clients and perf_analyzer send them.
_RESERVED = ("sequence_id", "sequence_start", "sequence_end", "priority", "timeout", "headers", "binary_data_output")
_RESERVED_PREFIX = "triton_"
#: The usual headers of one word: W3C Trace Context and Baggage, and what gateways add.
_ONE_WORD_HEADERS = ("traceparent", "tracestate", "baggage", "authorization", "cookie", "forwarded", "host", "via")


def client_parameters(parameters: Mapping[str, object], known: Container[str]) -> dict[str, object]:
    """The parameters without what Triton adds, so that one that is not `known` among them is a mistake.

    Triton also hands on, as parameters, the headers of HTTP and gRPC that match --http-header-forward-pattern and
    --grpc-header-forward-pattern (its docs/protocol/extension_parameters.md). A key with a hyphen is taken for such a header,
    unless it is a known one but for that (`max-tokens`), and so are the few well-known headers without.
    """
    return {key: value for key, value in parameters.items() if key in known or not _is_tritons(key, known)}


def _is_tritons(key: str, known: Container[str]) -> bool:
    is_header = "-" in key and key.lower().replace("-", "_") not in known
    return is_header or key in _RESERVED or key.startswith(_RESERVED_PREFIX) or key.lower() in _ONE_WORD_HEADERS
