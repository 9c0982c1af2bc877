"""The page in the browser: a conversation with one checkpoint, or the same questions to two side by side.

Built from gradio's Blocks: ChatInterface has one conversation only; this page has one for each checkpoint, with HTML of
its own below it, and a button that ends the answers of this browser alone.
"""

from __future__ import annotations

import html
import os
import urllib.parse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
from fastapi import FastAPI

from mmpipe.chat import uploads
from mmpipe.chat.guard import PageCalls
from mmpipe.chat.images import EncodedImage
from mmpipe.chat.messages import Message, assistant_message, user_message
from mmpipe.chat.options import SamplingOptions
from mmpipe.chat.visualise import visualise
from mmpipe.errors import MmpipeError
from mmpipe.escapes import printable

if TYPE_CHECKING:
    from mmpipe.chat.model import ChatModel
    from mmpipe.chat.queue import AnswerStream

# System fonts: no requests to other servers.
_THEME = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"], primary_hue="blue")
_CSS = """
.gradio-container { max-width: 1280px !important; margin: 0 auto !important; }
footer, [aria-label="Share"], [title="Share"] { display: none !important; }
.experts :is(table, tr, th, td) { border: none !important; }
"""
_Column = list[dict[str, Any]]
"""The messages that a gr.Chatbot shows."""


def mount(app: FastAPI, models: Sequence[ChatModel], sampling: SamplingOptions) -> PageCalls:
    """Put the page at the root of ``app``. Returns what it may call."""
    os.environ["GRADIO_TEMP_DIR"] = str(uploads.folder())
    blocks, question = _blocks(models, sampling)
    gr.mount_gradio_app(
        app, blocks, path="/", theme=_THEME, css=_CSS, max_file_size=uploads.MAX_FILE, footer_links=[], ssr_mode=False
    )
    # Only `launch` sets it; without it gradio copies any path that a request names into its cache.
    blocks.has_launched = True
    sessions = blocks._queue.pending_messages_per_session
    others = [number for number, call in blocks.fns.items() if not call.inputs]
    return PageCalls(question, others, lambda session: session in sessions)


def _blocks(models: Sequence[ChatModel], sampling: SamplingOptions) -> tuple[gr.Blocks, int]:
    """The page, and the number of the function that takes a question."""
    page = _Page(models)
    private: dict[str, Any] = {"concurrency_limit": None, "api_visibility": "private"}
    with gr.Blocks(title="mmpipe", analytics_enabled=False) as blocks:
        histories = gr.State([[] for _ in models])
        with gr.Row():
            chats, notes = zip(*map(_column, models), strict=True)
        box = gr.MultimodalTextbox(
            file_types=["image"],
            file_count="multiple",
            sources=["upload"],
            placeholder="Drop images here and ask about them",
            show_label=False,
            autofocus=True,
            elem_id="question",
        )
        with gr.Row():
            stop = gr.Button("Stop", variant="stop", size="sm", elem_id="stop")
            clear = gr.Button("Clear", size="sm", elem_id="clear")
        with gr.Accordion("How tokens are chosen", open=False), gr.Row():
            longest = sampling.max_tokens
            settings = [
                gr.Slider(0, 2, sampling.temperature, step=0.05, label="Temperature (0: the most probable token)"),
                gr.Slider(0.05, 1, sampling.top_p, step=0.05, label="Top p"),
                gr.Slider(1, max(2048, longest), longest, step=1, label="Longest answer, tokens"),
                gr.Number(sampling.seed, label="Seed (empty: other draws each time)", precision=0),
            ]
        outputs = [box, histories, *chats, *notes]
        # The conversations shown are no inputs: a client could put any file into them.
        inputs = [box, histories, *settings]
        box.submit(page.submit, inputs, outputs, concurrency_limit=8, api_visibility="private")
        stop.click(page.stop, None, None, **private)
        blocks.unload(page.stop)
        empty: list[Any] = [None, [[] for _ in models], *([[]] * len(models)), *([""] * len(models))]
        gr.on([clear.click, *(chat.clear for chat in chats)], lambda: empty, None, outputs, **private)
    blocks.queue(max_size=64)
    blocks.state_session_capacity = 100
    return blocks, next(n for n, call in blocks.fns.items() if call.inputs)


def _column(model: ChatModel) -> tuple[gr.Chatbot, gr.HTML]:
    """A conversation, and below it the visualisation of the last answer."""
    with gr.Column():
        notice = " describes images, reads no words" if model.captions_only else ""
        chat = gr.Chatbot(
            label=f"{model.name}{notice}",
            height=460,
            render_markdown=False,
            sanitize_html=True,
            buttons=["copy"],
            placeholder="",
            feedback_options=None,
        )
        return chat, gr.HTML()


class _Page:
    """The page's events. Pending answers are stored by browser session, to be cancelled."""

    def __init__(self, models: Sequence[ChatModel]) -> None:
        self.models = models
        self._current: dict[str, AnswerStream] = {}

    def submit(
        self,
        request: gr.Request,
        box: dict[str, Any],
        histories: list[list[Message]],
        temperature: float,
        top_p: float,
        max_tokens: float,
        seed: float | None,
    ) -> Iterator[list[Any]]:
        """Query every checkpoint in turn; yields the page's contents as the answers grow."""
        text, files = (box.get("text") or "").strip(), box.get("files") or []
        if not text and not files:
            raise gr.Error("Write a question or drop an image.", print_exception=False)
        sampling = SamplingOptions(temperature, top_p, int(max_tokens), None if seed is None else int(seed))
        question = user_message(text, [EncodedImage(Path(file), Path(file).name) for file in files])
        columns = [[*_shown(history), *_shown([question])] for history in histories]
        notes = [""] * len(columns)
        try:
            for place, (model, column, history) in enumerate(zip(self.models, columns, histories, strict=True)):
                column.append({"role": "assistant", "content": ""})
                answer = model.answer([*history, question], sampling)
                for piece in self._pieces(answer, str(request.session_hash)):
                    column[-1]["content"] += _escape(piece)
                    yield [None, histories, *columns, *notes]
                done = answer.completion
                column[-1]["content"] = _escape(done.text) or "(no words)"
                history += [question, assistant_message(done.text)]
                notes[place] = visualise(model, done, history)
                yield [None, histories, *columns, *notes]
        except MmpipeError as error:
            raise gr.Error(html.escape(str(error)), print_exception=False) from error

    def _pieces(self, answer: AnswerStream, session: str) -> Iterator[str]:
        """The text of an answer, cancelled by :meth:`stop` or when the browser disconnects."""
        self._current[session] = answer
        try:
            yield from answer
        finally:
            answer.cancel()
            self._current.pop(session, None)

    def stop(self, request: gr.Request) -> None:
        """Cancel the answer being generated for this browser."""
        answer = self._current.get(str(request.session_hash))
        if answer is not None:
            answer.cancel()


def _shown(history: Sequence[Message]) -> _Column:
    """Messages as the page shows them; images by the address of their file."""
    return [
        {"role": message.role, "content": _escape(part) or "(no words)" if isinstance(part, str) else _image(part)}
        for message in history
        for part in message.parts
    ]


def _image(image: Any) -> str:
    address = urllib.parse.quote(f"gradio_api/file={image.content}", safe="/=")
    return f"<img src='{html.escape(address)}' alt='' style='max-width:200px;max-height:200px'>"


def _escape(text: str) -> str:
    """``text`` as it is: gradio reads HTML even where it renders no Markdown."""
    return html.escape(printable(text), quote=False)
