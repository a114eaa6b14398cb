"""Processes that wait in simulated time: generators that yield what they wait for.

    def opening() -> Process:
        yield 0.005                   # seconds
        yield signal                  # until it is set
        results = yield [one(), two()]  # until all have ended; their results

Runs are deterministic: what happens at the same time happens in the order in which it was scheduled.
"""

import heapq
from collections.abc import Callable, Generator
from itertools import count
from typing import Any, TypeAlias

Process: TypeAlias = Generator[Any, Any, Any]


class Signal:
    """Something that processes wait for; it is set once."""

    def __init__(self) -> None:
        self._waiting: list[Callable[[], None]] = []

    def set(self) -> None:
        """Let all that wait go on."""
        waiting, self._waiting = self._waiting, []
        for resume in waiting:
            resume()


class Clock:
    """Simulated time and the processes that wait in it. now_s: the time, in seconds from the start."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()

    def at(self, time_s: float, call: Callable[[], None]) -> None:
        """Call a function at a time."""
        heapq.heappush(self._events, (time_s, next(self._order), call))

    def start(self, process: Process, then: Callable[[Any], None] = lambda _: None) -> None:
        """Start a process now. then: called with its result."""
        self.at(self.now_s, lambda: self._resume(process, None, then))

    def run(self, until_s: float) -> None:
        """Let time pass."""
        while self._events and self._events[0][0] <= until_s:
            self.now_s, _, call = heapq.heappop(self._events)
            call()
        self.now_s = until_s

    def _resume(self, process: Process, value: Any, then: Callable[[Any], None]) -> None:
        try:
            waits_for = process.send(value)
        except StopIteration as end:
            then(end.value)
            return
        if isinstance(waits_for, Signal):
            waits_for._waiting.append(lambda: self.at(self.now_s, lambda: self._resume(process, None, then)))
        elif isinstance(waits_for, list):
            self._join(waits_for, lambda results: self._resume(process, results, then))
        else:
            self.at(self.now_s + waits_for, lambda: self._resume(process, None, then))

    def _join(self, processes: list[Process], then: Callable[[list[Any]], None]) -> None:
        """Start processes, and call a function with their results once all have ended."""
        results: list[Any] = [None] * len(processes)
        remaining = len(processes)

        def ended(place: int, result: Any) -> None:
            nonlocal remaining
            results[place], remaining = result, remaining - 1
            if not remaining:
                then(results)

        for place, process in enumerate(processes):
            self.start(process, lambda result, place=place: ended(place, result))  # type: ignore[misc]
