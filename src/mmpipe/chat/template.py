"""The template a checkpoint was trained with. A prompt in another one is the commonest reason for senseless answers."""

from __future__ import annotations

from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from mmpipe.data.records import IMAGE_MARK, Turn
from mmpipe.data.templates import Template, TokenizerTemplate, get_template, template_names, to_messages
from mmpipe.errors import ArtifactError, DataError

# With and without image, first and later round, so that no two templates look the same.
_CONVERSATION = to_messages(
    [Turn("user", f"{IMAGE_MARK}\nfirst question"), Turn("assistant", "answer"), Turn("user", "second question")]
)


def resolve_template(processor: Any, name: str, *, wanted: str | None, trained: str | None) -> Template | None:
    """The template of the checkpoint ``name``; None when its own chat template has no name here.

    ``trained`` is the one in its manifest, ``wanted`` the user's. A checkpoint without a chat template is given the
    wanted one. Raises ArtifactError when it has another, or has none and none is wanted.
    """
    tokenizer = processor.tokenizer
    own = processor.chat_template
    template = get_template(wanted, tokenizer) if wanted else None
    if own is None:
        if template is None:
            raise ArtifactError(
                f"{name} brings no chat template; name the one it was trained with: --template, "
                f"one of {', '.join(template_names())}"
            )
        template.check(tokenizer)
        processor.chat_template = template.jinja()
        return template
    if template is None:
        return get_template(trained, tokenizer) if trained else _recognise(own, tokenizer)
    if _render(own, tokenizer) != _render(template.jinja(), tokenizer):
        same = _recognise(own, tokenizer)
        known = trained or (same.name if same else "one without a name here")
        raise ArtifactError(
            f"{name} was trained with another template than '{wanted}' (its own: {known}), and would answer badly; "
            "leave --template out"
        )
    return template


def _recognise(jinja: str, tokenizer: Any) -> Template | None:
    """A named template that renders as ``jinja`` does; the tokenizer's own only when no other does."""
    for name in sorted(template_names(), key=lambda name: name == TokenizerTemplate.name):
        try:
            template = get_template(name, tokenizer)
        except DataError:  # the tokenizer brings none that could be trained with
            continue
        if _render(jinja, tokenizer) == _render(template.jinja(), tokenizer):
            return template
    return None


def _render(jinja: str, tokenizer: Any) -> str:
    rendered: Any = render_jinja_template(
        [_CONVERSATION], chat_template=jinja, add_generation_prompt=True, **tokenizer.special_tokens_map
    )
    return str(rendered[0][0])
