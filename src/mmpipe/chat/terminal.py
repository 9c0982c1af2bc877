"""A conversation in the terminal."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TextIO

from mmpipe.chat import images
from mmpipe.chat.messages import ChatError, Message, assistant_message, user_message
from mmpipe.chat.options import SamplingOptions
from mmpipe.errors import MmpipeError, did_you_mean
from mmpipe.escapes import message, printable, redacted

if TYPE_CHECKING:
    from PIL import Image

    from mmpipe.chat.model import ChatModel
    from mmpipe.chat.queue import AnswerStream

_PROMPT = "> "
_SETTINGS = {"temperature": float, "top_p": float, "max_tokens": int, "seed": int}


class Terminal:
    """Reads questions and commands, writes answers. The first question is asked about ``images``."""

    def __init__(
        self,
        model: ChatModel,
        sampling: SamplingOptions,
        images: Sequence[Image.Image] = (),
        out: TextIO = sys.stdout,
        read: Callable[[str], str] = input,
    ) -> None:
        self.model = model
        self.sampling = sampling
        self.history: list[Message] = []
        self.pending = list(images)
        self._out = out
        self._read = read
        self._ended = False

    def run(self) -> None:
        """Until /exit, the end of the input, or Ctrl-C at the prompt; Ctrl-C during an answer cancels only the answer."""
        if sys.stdin.isatty():
            with contextlib.suppress(ImportError):  # line editing and recall, where the platform has it
                import readline  # noqa: F401
        self._write(f"{self.model.name}. /help shows the commands, Ctrl-D ends.\n")
        if self.model.captions_only:
            self._write("It was trained on captions: it describes images, and does not read what is asked.\n")
        while not self._ended:
            try:
                line = self._read(_PROMPT).strip()
            except (EOFError, KeyboardInterrupt):
                self._write("\n")
                return
            try:
                self._take(line)
            except MmpipeError as error:
                self._write(f"! {message(error)}\n")

    def _take(self, line: str) -> None:
        if line.startswith("/"):
            name, _, argument = line[1:].partition(" ")
            command = getattr(self, f"do_{name}", None)
            if command is None:
                raise ChatError(f"there is no command /{name}{did_you_mean(name, _commands())}")
            command(argument.strip())
        elif line or (self.pending and self.model.captions_only):
            self._ask(user_message(line, self.pending))

    def _ask(self, question: Message) -> None:
        answer = self.model.answer([*self.history, question], self.sampling)
        try:
            self._stream(answer)
        except KeyboardInterrupt:
            answer.cancel()
            self._stream(answer)
            self._write(" [stopped]")
        self._write("\n")
        done = answer.completion
        if done.finish == "length":
            self._write(f"[cut at {done.tokens} tokens; /set max_tokens gives it more]\n")
        self.history += [question, assistant_message(done.text)]
        self.pending = []

    def _stream(self, answer: AnswerStream) -> None:
        for piece in answer:
            self._write(piece)

    def _write(self, text: str) -> None:
        # a prompt can make a model write terminal escape sequences
        self._out.write(printable(text))
        self._out.flush()

    # ---- commands: a method each, its docstring is its help

    def do_image(self, where: str) -> None:
        """/image FILE or ADDRESS: show an image with the next question; several are possible"""
        if not where:
            raise ChatError("/image needs a file or an address")
        image = images.from_anywhere(where)
        self.pending.append(image)
        self._write(
            f"image {len(self.pending)} for the next question: {redacted(where)} ({image.width} x {image.height})\n"
        )

    def do_clear(self, _: str) -> None:
        """/clear: forget the conversation and its images"""
        self.history, self.pending = [], []

    def do_retry(self, _: str) -> None:
        """/retry: answer the last question again"""
        if not self.history:
            raise ChatError("nothing was asked yet")
        question = self.history[-2]
        self.history = self.history[:-2]
        self._ask(question)

    def do_set(self, argument: str) -> None:
        """/set NAME VALUE: change temperature, top_p, max_tokens or seed; alone, show them"""
        name, _, value = argument.partition(" ")
        if name:
            if name not in _SETTINGS:
                raise ChatError(f"there is no setting '{name}'{did_you_mean(name, _SETTINGS)}")
            try:
                self.sampling = dataclasses.replace(self.sampling, **{name: _SETTINGS[name](value)})
            except ValueError as error:
                raise ChatError(f"/set {name} needs a number, not '{value}'") from error
        self._write(" ".join(f"{key}={getattr(self.sampling, key)}" for key in _SETTINGS) + "\n")

    def do_help(self, _: str) -> None:
        """/help: show this"""
        for name in _commands():
            self._write(f"  {getattr(self, f'do_{name}').__doc__}\n")

    def do_exit(self, _: str) -> None:
        """/exit: end"""
        self._ended = True

    do_quit = do_exit


def _commands() -> list[str]:
    return [name.removeprefix("do_") for name in vars(Terminal) if name.startswith("do_")]
