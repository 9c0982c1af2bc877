"""One answer at a time, in the order of asking.

A model keeps its state in itself while it computes, and the random numbers belong to the whole process: two answers at once
would disturb each other. All models of a process share one desk, so one thread, which also keeps torch's thread pools few.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue

from mmpipe.chat.messages import ChatError, Reply


class Busy(ChatError):
    """Too many are waiting for an answer already."""


class Answer:
    """An answer being made: iterate over its pieces of text, then read ``reply``. Made by :meth:`Desk.ask`."""

    def __init__(self) -> None:
        self._pieces: SimpleQueue[str | None] = SimpleQueue()
        self._stopped = threading.Event()
        self._future: Future[Reply] = Future()

    def __iter__(self) -> Iterator[str]:
        while (piece := self._pieces.get()) is not None:
            yield piece
        self._future.result()

    @property
    def reply(self) -> Reply:
        """The whole answer; waits for it. Raises what went wrong."""
        return self._future.result()

    def stop(self) -> None:
        """Let it end after the token being computed; what was said so far stays."""
        self._stopped.set()

    @property
    def is_stopped(self) -> bool:
        """Whether :meth:`stop` was called."""
        return self._stopped.is_set()

    def say(self, piece: str) -> None:
        """Hand a piece to the reader."""
        self._pieces.put(piece)

    def follow(self, future: Future[Reply]) -> None:
        """End when ``future`` does, as it does."""
        self._future = future
        future.add_done_callback(lambda _: self._pieces.put(None))


class Desk:
    """Where answers are asked for; at most ``places`` are being made or waiting."""

    def __init__(self, places: int = 16) -> None:
        self._places = places
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="answers")
        self._open: set[Answer] = set()
        self._lock = threading.Lock()

    def ask(self, make: Callable[[Answer], Reply]) -> Answer:
        """Have ``make`` called when its turn comes. Raises Busy when all places are taken."""
        answer = Answer()
        with self._lock:
            if len(self._open) >= self._places:
                raise Busy(f"{self._places} answers are being waited for already; try again later")
            self._open.add(answer)
        future = self._worker.submit(_in_turn, make, answer)
        future.add_done_callback(lambda _: self._done(answer))
        answer.follow(future)
        return answer

    def _done(self, answer: Answer) -> None:
        with self._lock:
            self._open.discard(answer)

    def stop(self) -> None:
        """Stop every answer, those waiting too."""
        with self._lock:
            unfinished = list(self._open)
        for answer in unfinished:
            answer.stop()

    def close(self) -> None:
        """Stop every answer and wait for the one being made."""
        self.stop()
        self._worker.shutdown()


def _in_turn(make: Callable[[Answer], Reply], answer: Answer) -> Reply:
    if answer.is_stopped:
        raise ChatError("the answer was stopped before its turn came")
    return make(answer)
