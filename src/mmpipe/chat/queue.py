"""One answer at a time, in the order of the requests.

A model keeps state while it computes, and the random number generator belongs to the process: two answers at once would
disturb each other. All models of a process share one queue with one thread, which also keeps torch's thread pools few.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue

from mmpipe.chat.messages import ChatError, Completion


class QueueFull(ChatError):
    """Too many requests are waiting already."""


class AnswerStream:
    """An answer being generated: iterate over its pieces of text, then read ``completion``."""

    def __init__(self) -> None:
        self._pieces: SimpleQueue[str | None] = SimpleQueue()
        self.future: Future[Completion] = Future()
        self.is_cancelled = False

    def __iter__(self) -> Iterator[str]:
        while (piece := self._pieces.get()) is not None:
            yield piece
        self.future.result()

    @property
    def completion(self) -> Completion:
        """The whole answer; waits for it. Raises the error that ended it."""
        return self.future.result()

    def cancel(self) -> None:
        """End the answer after the token being computed; the text so far stays."""
        self.is_cancelled = True

    def put(self, piece: str | None) -> None:
        """Pass a piece of text to the reader; None is the end."""
        self._pieces.put(piece)


class RequestQueue:
    """Generates answers in one thread; at most ``size`` requests are prepared, waiting or being answered."""

    def __init__(self, size: int = 16) -> None:
        self._size = size
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="answers")
        self._open: set[AnswerStream] = set()
        self._lock = threading.Lock()
        self.totals = dict.fromkeys(("answers", "failed", "prompt_tokens", "tokens", "seconds"), 0.0)
        """Of all answers so far."""

    def __len__(self) -> int:
        return len(self._open)

    def take_place(self) -> AnswerStream:
        """A place in the queue, to be submitted or left. Raises QueueFull."""
        place = AnswerStream()
        with self._lock:
            if len(self._open) >= self._size:
                raise QueueFull(f"{self._size} answers are being waited for already; try again later")
            self._open.add(place)
        return place

    def leave(self, place: AnswerStream) -> None:
        """Give up a place that is not submitted."""
        self._open.discard(place)

    def submit(self, generate: Callable[[AnswerStream], Completion], place: AnswerStream | None = None) -> AnswerStream:
        """Call ``generate`` when its turn comes. Raises QueueFull."""
        answer = place or self.take_place()

        def in_turn() -> Completion:
            if answer.is_cancelled:
                raise ChatError("the answer was stopped before its turn came")
            start = time.monotonic()
            try:
                done = generate(answer)
            except BaseException:
                self.totals["failed"] += 1
                raise
            finally:
                self.totals["seconds"] += time.monotonic() - start
            self.totals["answers"] += 1
            self.totals["prompt_tokens"] += done.prompt_tokens
            self.totals["tokens"] += done.tokens
            return done

        answer.future = self._worker.submit(in_turn)
        answer.future.add_done_callback(lambda _: self._open.discard(answer))
        answer.future.add_done_callback(lambda _: answer.put(None))
        return answer

    def cancel_all(self) -> None:
        """Cancel every request, those waiting too."""
        for answer in self._open.copy():
            answer.cancel()

    def close(self) -> None:
        """Cancel every request and wait for the one being answered."""
        self.cancel_all()
        self._worker.shutdown()
