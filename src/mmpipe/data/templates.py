"""Conversation templates: from turns to one text with supervised spans.

One description gives three things: ``render`` the training text, ``prompt`` the text to
generate from, and ``jinja`` the chat template stored with a checkpoint, which renders the same characters anywhere.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from mmpipe.data.labels import Rendered, single_token
from mmpipe.data.records import IMAGE_MARK, BadRecord, Turn, check_turns
from mmpipe.data.rendering import render_chat
from mmpipe.errors import ConfigError, DataError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Template(ABC):
    """A text format of conversations."""

    name: str
    """Its name in recipes."""
    stop: str
    """The text that ends an answer: generation stops here."""
    stop_is_token: bool = True
    """Whether ``stop`` must be one token of the tokenizer; otherwise the model would learn to spell it."""
    captions: bool = False
    """Whether only images precede an answer."""

    def render(self, turns: Sequence[Turn]) -> Rendered:
        """The text of a whole conversation. Raises BadRecord for turns in an odd order or without text."""
        check_turns(turns)
        return self._rendered(turns)

    def prompt(self, turns: Sequence[Turn]) -> str:
        """The text up to where the next answer begins; ``turns`` end with the user's."""
        check_turns((*turns, Turn("assistant", "?")))
        return self._rendered(turns, prompt=True).text

    @abstractmethod
    def jinja(self) -> str:
        """The same as a chat template with ``{% generation %}`` marks; messages have text and image parts."""

    @abstractmethod
    def check(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise DataError if the template cannot be used with this tokenizer."""

    @abstractmethod
    def _rendered(self, turns: Sequence[Turn], *, prompt: bool = False) -> Rendered:
        """The text, up to the next answer if ``prompt``, and its spans to supervise."""


@dataclass(frozen=True, kw_only=True)
class TextTemplate(Template):
    """A template of fixed strings around the texts of the turns."""

    name: str
    stop: str
    stop_is_token: bool = True
    default_system: str = ""
    """The system message of a conversation without one; empty: no system message."""
    system_before: str = ""
    system_after: str = ""
    user_before: str = ""
    user_after: str = ""
    first_user_before: str | None = None
    """In place of ``user_before`` in the first round, where that differs."""
    answer_before: str = ""
    """Belongs to the prompt: not supervised."""
    answer_lead: str = ""
    """Supervised, as the answer and ``answer_end`` are: a space that tokenizers join with the first word."""
    answer_end: str
    answer_after: str = ""
    """Not supervised: what separates an answer from the next question."""
    captions: bool = False
    """The user's text is left out but for its images."""

    def jinja(self) -> str:
        strings = {name: getattr(self, name) for name in _JINJA_STRINGS} | {
            "default_system": self._default_system,
            "first_user_before": self._first_user_before,
        }
        literals = "".join(f"{{%- set {name} = {json.dumps(text)} -%}}\n" for name, text in strings.items())
        return literals + _flattening(captions=self.captions) + _DIALOGUE

    def check(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if self.stop_is_token and single_token(tokenizer, self.stop) is None:
            pieces = tokenizer.tokenize(self.stop)
            raise DataError(
                f"the template '{self.name}' ends answers with '{self.stop}', which is no token of the "
                f"tokenizer {tokenizer.name_or_path} (it reads {pieces}); choose the template that the model "
                "was made with"
            )

    @property
    def _default_system(self) -> str:
        return self.system_before + self.default_system + self.system_after if self.default_system else ""

    @property
    def _first_user_before(self) -> str:
        return self.user_before if self.first_user_before is None else self.first_user_before

    def _rendered(self, turns: Sequence[Turn], *, prompt: bool = False) -> Rendered:
        text = "" if turns[0].role == "system" else self._default_system
        spans: list[tuple[int, int]] = []
        before = self._first_user_before
        for turn in turns:
            if turn.role == "system":
                text += self.system_before + turn.text + self.system_after
            elif turn.role == "user":
                text += before + self._shown(turn.text) + self.user_after
                before = self.user_before
            else:
                text += self.answer_before
                spans.append((len(text), len(text + self.answer_lead + turn.text + self.answer_end)))
                text += self.answer_lead + turn.text + self.answer_end + self.answer_after
        return Rendered(text + self.answer_before * prompt, tuple(spans))

    def _shown(self, question: str) -> str:
        if not self.captions:
            return break_after_images(question)
        marks = question.count(IMAGE_MARK)
        if not marks:
            raise BadRecord("no image", f"the template '{self.name}' trains captions and shows images alone")
        return IMAGE_MARK * marks


class TokenizerTemplate(Template):
    """The chat template of a tokenizer. Its ``{% generation %}`` blocks are the supervised spans. Raises DataError
    when it has none, when they leave out the end of the answer, or when its generation prompt is not how its training
    text begins."""

    name = "tokenizer"

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        template = _with_marks(tokenizer.chat_template)
        where = f"the tokenizer {tokenizer.name_or_path}"
        named = ", ".join(sorted(_TEMPLATES))
        if not isinstance(template, str):
            raise DataError(f"{where} has no chat template; name one of {named}")
        if not re.search(r"\{%-?\s*generation\s*-?%\}", template):
            raise DataError(
                f"the chat template of {where} has no {{% generation %}} marks around what the assistant "
                f"says, so what to supervise is not known; add the marks or name one of {named}"
            )
        self._template, self._where = template, where
        self._special_tokens: dict[str, Any] = dict(tokenizer.special_tokens_map)
        probe = (Turn("user", "question"), Turn("assistant", "answer"))
        rendered = self.render(probe)
        supervised = "".join(rendered.text[start:end] for start, end in rendered.spans)
        self.stop = supervised.partition("answer")[2].strip()
        if not self.stop:
            raise DataError(f"the {{% generation %}} marks of {where} leave out the token that ends an answer")
        if not rendered.text.startswith(self.prompt(probe[:1])):
            raise DataError(f"the chat template of {where} prompts for an answer with another text than it trains on")

    def jinja(self) -> str:
        return _flattening(captions=False) + "{%- set messages = flat.messages -%}\n" + self._template

    def check(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if _with_marks(tokenizer.chat_template) != self._template:
            raise DataError(f"the tokenizer {tokenizer.name_or_path} has another chat template than this one")

    def _rendered(self, turns: Sequence[Turn], *, prompt: bool = False) -> Rendered:
        messages = [
            {"role": turn.role, "content": break_after_images(turn.text) if turn.role == "user" else turn.text}
            for turn in turns
        ]
        options: dict[str, Any] = {"return_assistant_tokens_mask": True, "add_generation_prompt": prompt}
        text, spans = render_chat(self._template, messages, self._where, **options, **self._special_tokens)
        return Rendered(text, tuple(spans))


def get_template(name: str, tokenizer: PreTrainedTokenizerBase | None = None) -> Template:
    """The template called ``name``; ``tokenizer`` is the given tokenizer's own chat template. Raises
    ConfigError for an unknown name."""
    if name == TokenizerTemplate.name:
        if tokenizer is None:
            raise ConfigError("the template 'tokenizer' can only be used where the tokenizer is at hand")
        return TokenizerTemplate(tokenizer)
    try:
        return _TEMPLATES[name]
    except KeyError:
        hint = did_you_mean(name, template_names())
        raise ConfigError(f"there is no conversation template '{name}'{hint}") from None


@cache
def own_jinja() -> frozenset[str]:
    """The chat templates that this project writes; any other is a stranger's program."""
    marked = [template.jinja() for template in _TEMPLATES.values()]
    return frozenset([*marked, *map(published, marked)])


def render_jinja(jinja: str, messages: Sequence[Any], where: str, **options: Any) -> tuple[str, list[tuple[int, int]]]:
    """A conversation in a chat template of ours, or in a stranger's within its limits: see :func:`render_chat`."""
    if jinja not in own_jinja():
        return render_chat(jinja, messages, where, **options)
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered: Any = render_jinja_template([list(messages)], chat_template=jinja, **options)
    return str(rendered[0][0]), []


def template_names() -> list[str]:
    """The names ``get_template`` knows."""
    return sorted([*_TEMPLATES, TokenizerTemplate.name])


def published(jinja: str) -> str:
    """A chat template as checkpoints store it: ``{% generation %}``, a tag of transformers alone, is a comment, so that
    every engine of Jinja templates renders it. Templates with the comments are read as if these were tags."""
    return re.sub(r"\{%(-?\s*(?:end)?generation\s*-?)%\}", r"{#\1#}", jinja)


def _with_marks(jinja: Any) -> Any:
    """The inverse of :func:`published`; what is no text stays."""
    return re.sub(r"\{#(-?\s*(?:end)?generation\s*-?)#\}", r"{%\1%}", jinja) if isinstance(jinja, str) else jinja


def to_messages(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """Turns as chat messages of text and image parts, the images themselves left out."""

    def parts(text: str) -> Iterator[dict[str, str]]:
        for number, piece in enumerate(text.split(IMAGE_MARK)):
            if number:
                yield {"type": "image"}
            if piece:
                yield {"type": "text", "text": piece}

    return [{"role": turn.role, "content": list(parts(turn.text))} for turn in turns]


def break_after_images(text: str) -> str:
    """Begin a new line after images at the head of a message: LLaVA's prompts read ``<image>\\nquestion``. Chat
    messages carry an image and a text as two parts with nothing between: they become the same text."""
    body = text
    while body.startswith(IMAGE_MARK):
        body = body.removeprefix(IMAGE_MARK)
    if len(body) == len(text) or not body or body[0].isspace():
        return text
    return text.removesuffix(body) + "\n" + body


def _flattening(*, captions: bool) -> str:
    """Jinja that puts the messages, their content as plain text, into ``flat.messages``."""
    return _FLATTEN.replace("USER_TEXT", _CAPTION_TEXT if captions else _BREAK_AFTER_IMAGES)


_JINJA_STRINGS: tuple[str, ...] = ("system_before", "system_after", "default_system", "first_user_before")
_JINJA_STRINGS += ("user_before", "user_after", "answer_before", "answer_lead", "answer_end", "answer_after")

# `set` inside a loop affects the outside only through a namespace.
_FLATTEN = """\
{%- set flat = namespace(messages=[]) -%}
{%- for message in messages -%}
  {%- set content = namespace(text='') -%}
  {%- if message.content is string -%}
    {%- set content.text = message.content -%}
  {%- else -%}
    {#- when all texts precede all images, the images go first, as in training -#}
    {%- set order = namespace(images='', texts='', before=true) -%}
    {%- for part in message.content -%}
      {%- if part.type != 'image' -%}
        {%- set order.before = order.before and not order.images -%}
        {%- set order.texts = order.texts + part.text -%}
      {%- else -%}
        {%- set order.images = order.images + '<image>' -%}
      {%- endif -%}
      {%- set content.text = content.text + ('<image>' if part.type == 'image' else part.text) -%}
    {%- endfor -%}
    {%- if order.before -%}
      {%- set content.text = order.images + order.texts -%}
    {%- endif -%}
  {%- endif -%}
  {%- if message.role == 'user' and '<image>' in content.text -%}
    {%- set pieces = content.text.split('<image>') -%}
USER_TEXT
  {%- endif -%}
  {%- set flat.messages = flat.messages + [dict(message, content=content.text)] -%}
{%- endfor -%}
"""

_BREAK_AFTER_IMAGES = """\
    {%- set head = namespace(text='', body='') -%}
    {%- for piece in pieces -%}
      {%- if not head.body and piece -%}
        {%- set head.body = piece -%}
      {%- elif not head.body and not loop.last -%}
        {%- set head.text = head.text + '<image>' -%}
      {%- endif -%}
    {%- endfor -%}
    {%- if head.body and not pieces[0] and head.body[0] | trim -%}
      {%- set content.text = head.text + '\\n' + content.text[head.text | length:] -%}
    {%- endif -%}"""

_CAPTION_TEXT = """\
    {%- set content.text = '<image>' * (pieces | length - 1) -%}"""

_DIALOGUE = """\
{%- set dialogue = flat.messages -%}
{%- if dialogue[0].role == 'system' -%}
  {{- system_before + dialogue[0].content + system_after -}}
  {%- set dialogue = dialogue[1:] -%}
{%- else -%}
  {{- default_system -}}
{%- endif -%}
{%- for message in dialogue -%}
  {%- if message.role == 'user' -%}
    {{- (first_user_before if loop.first else user_before) + message.content + user_after -}}
  {%- elif message.role == 'assistant' -%}
    {{- answer_before -}}
    {%- generation -%}
      {{- answer_lead + message.content + answer_end -}}
    {%- endgeneration -%}
    {{- answer_after -}}
  {%- else -%}
    {{- raise_exception("a message is spoken by '" + message.role + "', expected user or assistant") -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- answer_before -}}
{%- endif -%}
"""

_VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


_VICUNA = TextTemplate(
    name="vicuna_v1",
    default_system=_VICUNA_SYSTEM,
    system_after=" ",
    user_before="USER: ",
    user_after=" ",
    answer_before="ASSISTANT:",
    answer_lead=" ",
    answer_end="</s>",
    stop="</s>",
)
_LLAMA_2 = TextTemplate(
    name="llava_llama_2",
    default_system=(
        "You are a helpful language and vision assistant. "
        "You are able to understand the visual content that the user provides, "
        "and assist the user with a variety of tasks using natural language."
    ),
    system_before="[INST] <<SYS>>\n",
    system_after="\n<</SYS>>\n\n",
    first_user_before="",
    user_before="<s>[INST] ",
    user_after=" [/INST]",
    answer_lead=" ",
    answer_end=" </s>",
    stop="</s>",
)
_PHI = TextTemplate(
    name="phi3",
    system_before="<|system|>\n",
    system_after="<|end|>\n",
    user_before="<|user|>\n",
    user_after="<|end|>\n",
    answer_before="<|assistant|>\n",
    answer_end="<|end|>\n",
    stop="<|end|>",
)


def _chatml(name: str, system: str, separator: str) -> TextTemplate:
    return TextTemplate(
        name=name,
        default_system=system,
        system_before="<|im_start|>system\n",
        system_after="<|im_end|>" + separator,
        user_before="<|im_start|>user\n",
        user_after="<|im_end|>" + separator,
        answer_before="<|im_start|>assistant\n",
        answer_end="<|im_end|>",
        answer_after=separator,
        stop="<|im_end|>",
    )


_MPT_SYSTEM = (
    "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."
)
_TEMPLATES = {
    template.name: template
    for template in (
        # LLaVA's conversation.py, where `vicuna_v1` is also called `v1` and `mpt` has no line breaks.
        TextTemplate(name="plain", captions=True, answer_end="\n", stop="\n", stop_is_token=False),
        _VICUNA,
        _LLAMA_2,
        _chatml("mpt", _MPT_SYSTEM, separator=""),
        _chatml("chatml_direct", "Answer the questions.", separator=""),
        # LLaVA-MoD: Vicuna's words, Qwen's end of text.
        replace(_VICUNA, name="qwen", answer_end="<|endoftext|>", stop="<|endoftext|>"),
        # LibMoE, after the model cards of Phi-3 and Phi-3.5.
        _PHI,
        replace(_PHI, name="phi35", default_system="You are a helpful assistant."),
        # The chat template of Qwen2 and Qwen2.5, whose own file lacks generation marks.
        _chatml("chatml", "You are a helpful assistant.", separator="\n"),
    )
}
