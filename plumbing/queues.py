"""Requests are pushed, and answered as their answers are complete.

    request_id = worker.add(request)               # 0, 1, 2, ...
    while worker.busy:
        for request_id, answer in worker.step():
            ...
"""
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any


class Queue:
    """The requests that wait for an engine, which answers them in batches.

    A subclass has `max_rows` and generate(requests) -> their answers. A request takes as many rows as it has
    seeds.
    """

    max_rows: int

    def restart(self) -> None:
        """Forget all requests; request ids count from 0 again."""
        self.waiting: deque[tuple[int, Any]] = deque()
        self.next_id = 0

    def add(self, request: Any) -> int:
        """Take a request in. -> its request id: 0, 1, 2, ..."""
        request_id = self.next_id
        self.waiting.append((request_id, request))
        self.next_id += 1
        return request_id

    @property
    def has_room(self) -> bool:
        """Would one more request be in the next batch?"""
        rows = sum(len(request.seeds) for _, request in self.waiting)
        return not self.waiting or rows + len(self.waiting[0][1].seeds) <= self.max_rows

    @property
    def busy(self) -> bool:
        """Is any request not answered yet?"""
        return bool(self.waiting)

    def step(self) -> list[tuple[int, Any]]:
        """Answer a batch of the waiting requests. -> (request id, answer) of each."""
        batch = [self.waiting.popleft()]
        rows = len(batch[0][1].seeds)
        while self.waiting and rows + len(self.waiting[0][1].seeds) <= self.max_rows:
            batch.append(self.waiting.popleft())
            rows += len(batch[-1][1].seeds)
        request_ids, requests = zip(*batch, strict=True)
        return list(zip(request_ids, self.generate(list(requests)), strict=True))


class Relay:
    """A queue before another one, its `engine`: an item comes in, its request goes on, the answer comes back.

    A subclass has `engine`, request_of(item) -> the request, or None where there is nothing to ask, and
    answer_of(request, the engine's answer) -> the item's answer. An item without a request is answered [].
    """

    engine: Any

    def restart(self) -> None:
        """Forget all items, and what the engine has of them; request ids count from 0 again."""
        self.engine.restart()
        self.next_id = 0
        self.unasked: list[int] = []  # request ids of items without a request
        self.requests: dict[int, tuple[int, Any]] = {}  # the engine's request id -> ours, the request

    def add(self, item: Any) -> int:
        """Take an item in. -> its request id: 0, 1, 2, ..."""
        request_id = self.next_id
        self.next_id += 1
        request = self.request_of(item)
        if request is None:
            self.unasked.append(request_id)
        else:
            self.requests[self.engine.add(request)] = request_id, request
        return request_id

    @property
    def has_room(self) -> bool:
        """Would another item be worked on now?"""
        return self.engine.has_room

    @property
    def busy(self) -> bool:
        """Is any item not answered yet?"""
        return bool(self.requests or self.unasked)

    def step(self) -> list[tuple[int, Any]]:
        """Work on. -> (request id, answer) of the items that are complete, mostly none."""
        if self.unasked:
            return [(self.unasked.pop(), [])]
        found = []
        for engine_id, answer in self.engine.step():
            request_id, request = self.requests.pop(engine_id)
            found.append((request_id, self.answer_of(request, answer)))
        return found


def answers_of(worker: Any, items: Iterable) -> Iterator[tuple[int, Any]]:
    """(index of the item, its answer), as they are completed. `items` is read as the worker finds room.

    worker: an engine or a sampler, with restart, add, has_room, busy and step
    """
    numbered = enumerate(items)
    index_of: dict[int, int] = {}  # request id -> index of the item
    worker.restart()
    while True:
        while worker.has_room and (new := next(numbered, None)) is not None:
            index, item = new
            index_of[worker.add(item)] = index
        if not worker.busy:
            return
        for request_id, answer in worker.step():
            yield index_of.pop(request_id), answer
