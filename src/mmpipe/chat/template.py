"""The template a checkpoint was trained with: asking in another one is the commonest reason for a model that babbles."""

from __future__ import annotations

from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from mmpipe.data.records import IMAGE_MARK, Turn
from mmpipe.data.templates import Template, TokenizerTemplate, get_template, template_names, to_messages
from mmpipe.errors import ArtifactError, DataError

# With and without image, first and later round, so that no two templates look the same.
_PROBE = to_messages(
    [Turn("user", f"{IMAGE_MARK}\nfirst question"), Turn("assistant", "answer"), Turn("user", "second question")]
)


def settle(processor: Any, name: str, *, asked: str | None, noted: str | None) -> Template | None:
    """The template of the checkpoint ``name``; None when its own chat template is none that has a name here.

    ``noted`` is what its manifest says, ``asked`` what the user wants. A checkpoint without a chat template gets the one asked
    for. Raises ArtifactError when it has another, or none and none is asked for.
    """
    tokenizer = processor.tokenizer
    wanted = get_template(asked, tokenizer) if asked else None
    own = processor.chat_template
    if own is None:
        if wanted is None:
            raise ArtifactError(
                f"{name} brings no chat template; name the one it was trained with: --template, "
                f"one of {', '.join(template_names())}"
            )
        wanted.check(tokenizer)
        processor.chat_template = wanted.jinja()
        return wanted
    if wanted is not None and not _alike(own, wanted.jinja(), tokenizer):
        same = _same_as(own, tokenizer)
        known = noted or (same.name if same else "one without a name here")
        raise ArtifactError(
            f"{name} was trained with another template than '{asked}' (its own: {known}), and would answer badly; "
            "leave --template out"
        )
    if wanted is not None:
        return wanted
    return get_template(noted, tokenizer) if noted else _same_as(own, tokenizer)


def _same_as(own: str, tokenizer: Any) -> Template | None:
    """A named template that writes what ``own`` writes; the tokenizer's own only when no other does."""
    for name in sorted(template_names(), key=lambda name: name == TokenizerTemplate.name):
        try:
            template = get_template(name, tokenizer)
        except DataError:  # the tokenizer brings none that could be trained with
            continue
        if _alike(own, template.jinja(), tokenizer):
            return template
    return None


def _alike(one: str, other: str, tokenizer: Any) -> bool:
    return _written(one, tokenizer) == _written(other, tokenizer)


def _written(jinja: str, tokenizer: Any) -> str:
    rendered: Any = render_jinja_template(
        [_PROBE], chat_template=jinja, add_generation_prompt=True, **tokenizer.special_tokens_map
    )
    return str(rendered[0][0])
