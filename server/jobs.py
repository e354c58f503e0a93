"""Functions in threads of their own, for work that is mostly waiting.

    jobs = Jobs()
    jobs.start(slow)        # 0
    jobs.start(fast)        # 1
    jobs.next()             # (1, what `fast` returned)

The threads are daemons: an exception or Ctrl-C ends the program without waiting for any of them.
"""
from queue import SimpleQueue
from threading import Thread
from typing import Any, Callable, Sequence

Function = Callable[[], Any]


class Jobs:
    """Functions that run side by side, and a queue of what they returned."""

    def __init__(self):
        self.started = 0
        self.running = 0  # started and not given out by `next` yet
        self.done: SimpleQueue[tuple[int, Any, BaseException | None]] = SimpleQueue()

    def start(self, function: Function) -> int:
        """Call the function in a thread. -> its number: 0, 1, 2, ... in the order of starting."""
        number = self.started
        self.started += 1
        self.running += 1
        Thread(target=self._call, args=(number, function), daemon=True).start()
        return number

    def _call(self, number: int, function: Function) -> None:
        try:
            self.done.put((number, function(), None))
        except BaseException as error:  # it is raised in the thread that waits for the result
            self.done.put((number, None, error))

    def next(self) -> tuple[int, Any]:
        """Wait for the next function that ends. -> its number and what it returned; raises what it raised."""
        number, result, error = self.done.get()
        self.running -= 1
        if error is not None:
            raise error
        return number, result


def side_by_side(functions: Sequence[Function], limit: int) -> list[Any]:
    """What each of the functions returns, in their order; at most `limit` of them run at a time."""
    jobs = Jobs()
    results = {}
    for function in functions:
        if jobs.running == limit:
            number, result = jobs.next()
            results[number] = result
        jobs.start(function)
    while jobs.running:
        number, result = jobs.next()
        results[number] = result
    return [results[number] for number in range(len(functions))]
