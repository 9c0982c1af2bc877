"""The conversation in the terminal, and what ``mmpipe chat`` prints."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import chat_models
import pytest
from chat_models import GREEDY, RED, talk

from mmpipe.chat.messages import Completion
from mmpipe.chat.queue import RequestQueue
from mmpipe.chat.terminal import Terminal

ENVIRONMENT = {**os.environ, "NO_COLOR": "1", "COLUMNS": "200"}


@pytest.fixture(scope="module")
def queue() -> Iterator[RequestQueue]:
    made = RequestQueue()
    yield made
    made.close()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_models.publish(tmp_path_factory.mktemp("tiny") / "model")


def typed(model: object, *lines: str, images: tuple = ()) -> tuple[str, Terminal]:
    """What a terminal shows when these lines are typed, and the terminal."""
    waiting, out = iter(lines), io.StringIO()

    def read(_: str) -> str:
        line = next(waiting, None)
        if line is None:
            raise EOFError
        return line

    terminal = Terminal(model, GREEDY, images, out=out, read=read)  # type: ignore[arg-type]
    terminal.run()
    return out.getvalue(), terminal


def test_a_conversation(tiny, queue, tmp_path):
    RED.save(tmp_path / "red.png")
    shown, terminal = typed(talk(tiny, queue), f"/image {tmp_path / 'red.png'}", "What?", "", "And?", "/exit", "no")
    assert "image 1 for the next question" in shown
    assert "[cut at 12 tokens" in shown
    assert [message.role for message in terminal.history] == ["user", "assistant"] * 2
    assert [len(message.images) for message in terminal.history] == [1, 0, 0, 0]


def test_commands(tiny, queue):
    model = talk(tiny, queue)
    shown, terminal = typed(model, "/help", "/set max_tokens 3", "Say.", "/retry", "/set seed 7", "/set", "/clear")
    assert all(f"/{name}" in shown for name in ("image", "clear", "retry", "set", "help", "exit"))
    assert "temperature=0 top_p=1.0 max_tokens=3 seed=7" in shown
    assert terminal.history == []
    assert shown.count("[cut at 3 tokens") == 2


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("/imag x", "did you mean 'image'"),
        ("/image", "needs a file"),
        ("/image none.png", "no such image"),
        ("/image http://127.0.0.1/x.png", "private network"),
        ("/set heat 1", "there is no setting 'heat'"),
        ("/set top_p much", "needs a number"),
        ("/set top_p 3", "at most 1"),
        ("/retry", "nothing was asked"),
        ("word " * 300, "takes 1024; clear it"),
    ],
)
def test_a_mistake_does_not_end_the_conversation(tiny, queue, line, why):
    shown, terminal = typed(talk(tiny, queue), line, "Say.")
    assert "! " in shown
    assert why in shown
    assert len(terminal.history) == 2


class Scripted:
    """A model that says what it is told to."""

    name, captions_only = "scripted", False

    def __init__(self, queue: RequestQueue, text: str) -> None:
        self.queue, self.text = queue, text

    def answer(self, messages: object, sampling: object) -> object:
        def make(answer: object) -> Completion:
            answer.put(self.text)  # type: ignore[attr-defined]
            return Completion(self.text, 1, 1, "stop")

        return self.queue.submit(make)


def test_escape_sequences_of_the_model_do_nothing(queue):
    shown, terminal = typed(Scripted(queue, "\x1b[2J\x1b]0;owned\x07hi"), "Say.")
    assert "\x1b" not in shown
    assert "␛[2J␛]0;owned␇hi" in shown
    assert terminal.history[1].text.startswith("\x1b")  # what the model said stays what it said


# Runs the command line, then says which of these modules were imported on the way.
WATCHED = """
import sys; from mmpipe.cli.main import main
try: main()
finally: print([m for m in {watched} if m in sys.modules], file=sys.stderr)
"""


def mmpipe(*arguments: str, watched: tuple[str, ...], **options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WATCHED.format(watched=watched), *arguments]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, **options)  # type: ignore[call-overload, no-any-return]


def test_one_question_for_scripts_imports_nothing_it_does_not_use(tiny, tmp_path):
    RED.save(tmp_path / "red.png")
    result = mmpipe(
        *("chat", str(tiny), "--image", str(tmp_path / "red.png"), "--image", str(tmp_path / "red.png")),
        *("--prompt", "-", "--json", "--temperature", "0", "--max-new-tokens", "4", "--conv-mode", "qwen"),
        input="What?\n",
        watched=(
            *("gradio", "fastapi", "datasets", "pandas", "sklearn", "matplotlib", "snakemake", "pyarrow"),
            *("peft", "deepspeed", "bitsandbytes", "tensorboard", "wandb"),
        ),
    )
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    assert (answer["checkpoint"], answer["template"], answer["prompt"]) == ("tiny@finetune", "qwen", "What?")
    assert (answer["images"], answer["tokens"], answer["finish"]) == (2, 4, "length")
    assert result.stderr == "[]\n"


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--image", "none.png"], "no such image"),
        (["--json"], "--json needs --prompt"),
        (["--load-4bit", "--load-8bit"], "choose one"),
        (["--temperature", "-1"], "temperature"),
    ],
)
def test_mistakes_are_one_line_and_found_before_torch_is_loaded(tiny, arguments, why):
    result = mmpipe("chat", str(tiny), *arguments, watched=("torch", "transformers"))
    assert result.returncode == 1
    assert result.stderr.startswith("[]\n") or result.stderr.endswith("[]\n")
    assert why in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def heeding_ctrl_c() -> None:
    """A process started in the background inherits that Ctrl-C is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_ends_the_answer_then_the_program(tiny):
    command = [sys.executable, "-m", "mmpipe.cli.main", "chat", str(tiny), "--max-tokens", "900", "--temperature", "1"]
    with subprocess.Popen(
        command,
        env=ENVIRONMENT,
        preexec_fn=heeding_ctrl_c,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
    ) as process:
        assert process.stdin
        assert process.stdout
        process.stdin.write(b"Say.\n")
        seen = b""
        while b"ends.\n> " not in seen or not seen.partition(b"ends.\n> ")[2]:
            seen += process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        while not seen.endswith(b"\n> "):
            seen += process.stdout.read(1)
        assert b" [stopped]" in seen
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=20)
        assert process.returncode == 0
        assert errors == b""
        assert out == b"\n"


def test_ctrl_c_in_a_script(tiny):
    command = [sys.executable, "-m", "mmpipe.cli.main", "chat", str(tiny), "--prompt", "Say.", "--temperature", "1"]
    with subprocess.Popen(
        command, env=ENVIRONMENT, preexec_fn=heeding_ctrl_c, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
    ) as process:
        assert process.stdout
        process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
        assert process.returncode == 130
        assert b"Traceback" not in errors
