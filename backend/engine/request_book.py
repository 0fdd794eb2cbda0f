"""The requests that an engine has taken and that have not ended: who waits, who has a deadline, how fast they end."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterator

from backend.engine.admission import queue_full
from backend.engine.lazy_heap import LazyHeap
from backend.engine.request import Request
from backend.errors import InvalidRequestError, UnavailableError

#: Ended requests from which the rate is taken, for retry hints.
_RATE_WINDOW = 64


class RequestBook:
    """Every request from `add` to `ended`; between them `started` says that its prompt is being computed."""

    def __init__(self, max_waiting: int) -> None:
        self.max_waiting = max_waiting
        #: Requests that have not started, by id, in the order of their arrival here.
        self.waiting: dict[object, Request] = {}
        #: Their prompt tokens.
        self.waiting_tokens = 0
        #: How many there are of each priority, with whether they may be browned out; none that is 0.
        self.waiting_classes: Counter[tuple[int, bool]] = Counter()
        self._requests: dict[object, Request] = {}
        self._deadlines = LazyHeap()
        self._end_times: deque[float] = deque(maxlen=_RATE_WINDOW)

    def __len__(self) -> int:
        return len(self._requests)

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._requests

    def get(self, request_id: object) -> Request | None:
        return self._requests.get(request_id)

    @property
    def has_room(self) -> bool:
        """Whether `add` would take one more request."""
        return len(self.waiting) < self.max_waiting

    @property
    def oldest_waiting_s(self) -> float:
        """For how long the first of those that have not started has waited; 0 if there is none."""
        oldest = next(iter(self.waiting.values()), None)
        return 0.0 if oldest is None else max(0.0, time.monotonic() - oldest.arrival)

    @property
    def request_s(self) -> float | None:
        """Seconds from one request's end to the next one's, lately; None before two have ended."""
        if len(self._end_times) < 2:
            return None
        return (time.monotonic() - self._end_times[0]) / len(self._end_times)

    def check_new(self, request: Request) -> None:
        """Raise InvalidRequestError if the id is in use."""
        if request.request_id in self._requests:
            raise InvalidRequestError(f"request id {request.request_id!r} is already in use")

    def add(self, request: Request) -> None:
        """Raises UnavailableError when max_waiting requests already wait."""
        if not self.has_room:
            raise UnavailableError(queue_full(self.max_waiting, len(self.waiting), self.request_s))
        self._requests[request.request_id] = request
        self.waiting[request.request_id] = request
        self.waiting_tokens += len(request.prompt_ids)
        self.waiting_classes[_class_of(request)] += 1
        if request.deadline is not None:
            self._deadlines.push((request.deadline, request.number), request)

    def started(self, request: Request) -> None:
        """Its prompt is being computed; may be said again."""
        if self.waiting.pop(request.request_id, None) is not None:
            self.waiting_tokens -= len(request.prompt_ids)
            kind = _class_of(request)
            self.waiting_classes[kind] -= 1
            if not self.waiting_classes[kind]:
                del self.waiting_classes[kind]

    def ended(self, request: Request) -> None:
        """All its sequences have finished; may be said again."""
        if self._requests.pop(request.request_id, None) is None:
            return
        self.started(request)
        request.end()
        self._end_times.append(time.monotonic())
        if request.deadline is not None:
            self._deadlines.ended()

    def expired(self) -> Iterator[Request]:
        """Requests whose deadline has passed; the caller ends each before it takes the next."""
        now = time.monotonic()
        while (first := self._deadlines.first()) is not None and first[0][0] <= now:
            yield first[1]


def _class_of(request: Request) -> tuple[int, bool]:
    return request.params.priority, request.params.brownout != "never"
