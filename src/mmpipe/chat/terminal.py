"""A conversation in the terminal."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from mmpipe.chat import images
from mmpipe.chat.escape import visible
from mmpipe.chat.messages import ChatError, Message, Reply, Sampling, ask, said
from mmpipe.errors import MmpipeError, did_you_mean

if TYPE_CHECKING:
    from PIL import Image

    from mmpipe.chat.model import ChatModel
    from mmpipe.chat.queue import Answer

_PROMPT = "> "
_SETTINGS = {"temperature": float, "top_p": float, "max_tokens": int, "seed": int}


class Terminal:
    """Reads questions and commands, writes answers. The first question is asked about ``images``."""

    def __init__(
        self,
        model: ChatModel,
        sampling: Sampling,
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

    def run(self) -> None:
        """Until /exit, the end of the input, or Ctrl-C at the prompt; Ctrl-C during an answer ends the answer alone."""
        _edit_lines()
        self._say(f"{self.model.name}. /help shows the commands, Ctrl-D ends.\n")
        if self.model.captions_only:
            self._say("It was trained on captions: it describes images, and does not read what is asked.\n")
        while True:
            try:
                line = self._read(_PROMPT).strip()
            except (EOFError, KeyboardInterrupt):
                self._say("\n")
                return
            try:
                self._take(line)
            except _Exit:
                return
            except MmpipeError as error:
                self._say(f"! {error}\n")

    def _take(self, line: str) -> None:
        if line.startswith("/"):
            name, _, argument = line[1:].partition(" ")
            command = getattr(self, f"do_{name}", None)
            if command is None:
                raise ChatError(f"there is no command /{name}{did_you_mean(name, _commands())}")
            command(argument.strip())
        elif line or (self.pending and self.model.captions_only):
            self._ask(ask(line, self.pending))

    def _ask(self, question: Message) -> None:
        text = self._write(self.model.answer([*self.history, question], self.sampling))
        self.history += [question, said(text)]
        self.pending = []

    def _write(self, answer: Answer) -> str:
        try:
            for piece in answer:
                self._say(visible(piece))
        except KeyboardInterrupt:
            answer.stop()
            for piece in answer:
                self._say(visible(piece))
            self._say(" [stopped]")
        self._say("\n")
        if answer.reply.finish == "length":
            self._say(f"[cut at {answer.reply.tokens} tokens; /set max_tokens gives it more]\n")
        return answer.reply.text

    # ---- commands: a method each, its first line is its help

    def do_image(self, where: str) -> None:
        """/image FILE or ADDRESS: show an image with the next question; several are possible"""
        if not where:
            raise ChatError("/image needs a file or an address")
        image = images.from_anywhere(where)
        self.pending.append(image)
        self._say(f"image {len(self.pending)} for the next question: {where} ({image.width} x {image.height})\n")

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
        self._say(" ".join(f"{key}={getattr(self.sampling, key)}" for key in _SETTINGS) + "\n")

    def do_help(self, _: str) -> None:
        """/help: show this"""
        for name in _commands():
            text = getattr(self, f"do_{name}").__doc__
            self._say(f"  {text}\n")

    def do_exit(self, _: str) -> None:
        """/exit: end"""
        raise _Exit

    do_quit = do_exit

    def _say(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()


class _Exit(Exception):
    pass


def _commands() -> list[str]:
    return [name.removeprefix("do_") for name in vars(Terminal) if name.startswith("do_")]


def _edit_lines() -> None:
    """Line editing and recall at the prompt, where the platform has it."""
    if sys.stdin.isatty():
        try:
            import readline  # noqa: F401
        except ImportError:
            return


def once(model: ChatModel, prompt: str, images: Sequence[Image.Image], sampling: Sampling) -> dict[str, Any]:
    """Ask one question and return everything about the answer, for scripts."""
    reply = _heard(model.answer([ask(prompt, images)], sampling), lambda piece: None)
    return {
        "checkpoint": model.name,
        "path": str(model.path),
        "template": model.template.name if model.template else None,
        "prompt": prompt,
        "images": len(images),
        "text": reply.text,
        "finish": reply.finish,
        "prompt_tokens": reply.prompt_tokens,
        "tokens": reply.tokens,
        "expert_loads": reply.expert_loads,
        "keep_maps": reply.keep_maps,
        "sampling": dataclasses.asdict(sampling),
    }


def aloud(model: ChatModel, prompt: str, images: Sequence[Image.Image], sampling: Sampling) -> None:
    """Ask one question and write the answer as it comes."""
    answer = model.answer([ask(prompt, images)], sampling)
    _heard(answer, lambda piece: print(visible(piece), end="", flush=True))
    print()


def _heard(answer: Answer, hear: Callable[[str], None]) -> Reply:
    """Listen to the end; Ctrl-C stops the answer and goes on up."""
    try:
        for piece in answer:
            hear(piece)
    except KeyboardInterrupt:
        answer.stop()
        raise
    return answer.reply
