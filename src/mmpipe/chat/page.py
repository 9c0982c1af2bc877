"""The page in the browser: one conversation with one checkpoint, or the same with two side by side."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
from fastapi import FastAPI

from mmpipe.chat import images
from mmpipe.chat.escape import visible
from mmpipe.chat.messages import Message, Reply, Sampling, ask, said
from mmpipe.chat.visualise import expert_bars, kept_image, kept_images
from mmpipe.errors import MmpipeError

if TYPE_CHECKING:
    from mmpipe.chat.model import ChatModel
    from mmpipe.chat.queue import Answer

UPLOAD = 20 << 20
"""Bytes of an uploaded file at most."""
_HOUR = 3600
# Fonts of the system: nothing is fetched from elsewhere.
_THEME = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"], primary_hue="blue")
_CSS = """
.gradio-container { max-width: 1280px !important; margin: 0 auto !important; }
footer, [aria-label="Share"], [title="Share"] { display: none !important; }
.experts :is(table, tr, th, td) { border: none !important; }
"""


def mount(app: FastAPI, models: Sequence[ChatModel], sampling: Sampling) -> FastAPI:
    """Put the page at the root of ``app``."""
    return gr.mount_gradio_app(
        app,
        _blocks(models, sampling),
        path="/",
        theme=_THEME,
        css=_CSS,
        max_file_size=UPLOAD,
        footer_links=[],
        ssr_mode=False,
    )


class _Talk:
    """What the page does; answers being made are kept by browser session, to be stopped."""

    def __init__(self, models: Sequence[ChatModel]) -> None:
        self.models = models
        self._current: dict[str, Answer] = {}

    def ask(
        self,
        box: dict[str, Any],
        histories: list[list[Message]],
        shown: list[list[dict[str, Any]]],
        sampling: Sampling,
        session: str,
    ) -> Iterator[tuple[list[list[dict[str, Any]]], list[Reply | None]]]:
        """Ask every checkpoint in turn; yields what each conversation shows and the replies there are so far."""
        text, files = (box.get("text") or "").strip(), box.get("files") or []
        question = ask(text, [images.from_bytes(Path(file).read_bytes(), Path(file).name) for file in files])
        for column in shown:
            column += [{"role": "user", "content": {"path": file}} for file in files]
            column += [{"role": "user", "content": _shown(text)}] if text else []
        replies: list[Reply | None] = [None] * len(self.models)
        for place, model in enumerate(self.models):
            answer = self._current[session] = model.answer([*histories[place], question], sampling)
            column = shown[place]
            column.append({"role": "assistant", "content": ""})
            try:
                for piece in answer:
                    column[-1]["content"] += _shown(piece)
                    yield shown, replies
            finally:
                answer.stop()
                self._current.pop(session, None)
            reply = replies[place] = answer.reply
            column[-1]["content"] = _shown(reply.text) or "(no words)"
            histories[place] += [question, said(reply.text)]
            yield shown, replies

    def stop(self, session: str) -> None:
        """Stop what is being said to this browser."""
        answer = self._current.get(session)
        if answer is not None:
            answer.stop()


def _blocks(models: Sequence[ChatModel], sampling: Sampling) -> gr.Blocks:
    talk = _Talk(models)
    with gr.Blocks(title="mmpipe", analytics_enabled=False, delete_cache=(_HOUR, _HOUR)) as blocks:
        histories = gr.State([[] for _ in models])
        with gr.Row():
            columns = [_column(model) for model in models]
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
        with gr.Accordion("How words are chosen", open=False), gr.Row():
            settings = [
                gr.Slider(0, 2, sampling.temperature, step=0.05, label="Temperature (0: the likeliest word)"),
                gr.Slider(0.05, 1, sampling.top_p, step=0.05, label="Top p"),
                gr.Slider(
                    1, max(2048, sampling.max_tokens), sampling.max_tokens, step=1, label="Longest answer, tokens"
                ),
            ]
        chats, insides = zip(*columns, strict=True)
        outputs = [box, histories, *chats, *insides]

        def submit(
            request: gr.Request,
            box: dict[str, Any],
            histories: list[list[Message]],
            temperature: float,
            top_p: float,
            max_tokens: float,
            *shown: list[dict[str, Any]],
        ) -> Iterator[list[Any]]:
            if not (box.get("text") or "").strip() and not box.get("files"):
                raise gr.Error("Write a question or drop an image.", print_exception=False)
            chosen = Sampling(temperature, top_p, int(max_tokens))
            try:
                session = str(request.session_hash)
                for columns, replies in talk.ask(box, histories, [list(c) for c in shown], chosen, session):
                    yield [None, histories, *columns, *map(_inside, models, replies, histories)]
            except MmpipeError as error:
                raise gr.Error(html.escape(str(error)), print_exception=False) from error

        box.submit(submit, [box, histories, *settings, *chats], outputs, concurrency_limit=8, api_visibility="private")
        stop.click(_stopper(talk), None, None, queue=False, api_visibility="private")
        blocks.unload(_stopper(talk))
        fresh: list[Any] = [None, [[] for _ in models], *([[]] * len(models)), *([""] * len(models))]
        gr.on(
            [clear.click, *(chat.clear for chat in chats)],
            lambda: fresh,
            None,
            outputs,
            queue=False,
            api_visibility="private",
        )
    return blocks


def _column(model: ChatModel) -> tuple[gr.Chatbot, gr.HTML]:
    """A conversation, and below it what went on inside."""
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


def _shown(text: str) -> str:
    """Words of anybody, as they are: gradio takes markup for markup even where it renders no Markdown."""
    return html.escape(visible(text), quote=False)


def _inside(model: ChatModel, reply: Reply | None, history: Sequence[Message]) -> str:
    """What went on inside a checkpoint during its last answer, as HTML."""
    if reply is None:
        return ""
    images = [image for message in history for image in message.images]
    kept = [kept_image(model, image, kept) for image, kept in zip(images, reply.keep_maps, strict=False)]
    return expert_bars(reply.expert_loads) + kept_images(kept)


def _stopper(talk: _Talk) -> Any:
    def stop(request: gr.Request) -> None:
        talk.stop(str(request.session_hash))

    return stop
