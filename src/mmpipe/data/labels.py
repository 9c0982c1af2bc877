"""Token ids and labels from text with supervised spans.

The text is tokenised once and labels come from the tokenizer's character offsets, never from counting the
tokens of separately tokenised pieces: they hold for any tokenizer, and for answers with role markers.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mmpipe.data.control_tokens import GUARD, ControlTokens, Tokens
from mmpipe.data.records import IMAGE_MARK, BadRecord
from mmpipe.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE = -100
"""The label of a position that is not supervised."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as text; ``spans`` are the character ranges [start, end) to supervise, in order."""

    text: str
    spans: tuple[tuple[int, int], ...]

    def with_image_token(self, token: str) -> Rendered:
        """The same with ``token`` in place of every image mark, the spans moved along."""
        if token == IMAGE_MARK:
            return self
        growth = len(token) - len(IMAGE_MARK)
        moved = [[end + growth * self.text.count(IMAGE_MARK, 0, end) for end in span] for span in self.spans]
        return Rendered(self.text.replace(IMAGE_MARK, token), tuple((start, end) for start, end in moved))


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids and labels of equal length; -100 where nothing is supervised."""

    input_ids: list[int]
    labels: list[int]
    cut: int = 0
    """Tokens cut off on the right."""
    control: tuple[str, ...] = ()
    """Control tokens in the record's texts, which are text."""

    @property
    def supervised(self) -> int:
        """Number of supervised positions."""
        return len(self.labels) - self.labels.count(IGNORE)


def single_token(tokenizer: PreTrainedTokenizerBase, text: str) -> int | None:
    """The id of ``text`` if it is one token of the tokenizer's vocabulary, else None."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    return ids[0] if len(ids) == 1 and tokenizer.convert_ids_to_tokens(ids[0]) == text else None


def encode(
    tokenizer: PreTrainedTokenizerBase,
    rendered: Rendered,
    image_token: str,
    tokens_per_image: int,
    max_length: int | None = None,
    control: ControlTokens | None = None,
) -> Encoded:
    """Tokenise a conversation and label the tokens that begin inside a supervised span.

    Every image mark becomes ``tokens_per_image`` times the id of ``image_token``, never supervised.
    A token the tokenizer adds (BOS) is retained, not supervised, and not added to a text that begins with
    BOS: the rule of a processor's ``apply_chat_template``. No token goes across the beginning of an answer, where a
    prompt ends. Control tokens that ``control`` has guarded are text.

    With ``max_length``, text is cut from the right. Raises BadRecord if that would cut an image or leave
    nothing to learn; DataError if the tokenizer cannot be used.
    """
    if not tokenizer.is_fast:
        raise DataError(f"{_name(tokenizer)} gives no character offsets; use a tokenizer with a tokenizer.json")
    image_id = single_token(tokenizer, image_token)
    if image_id is None:
        raise DataError(f"{_name(tokenizer)} has no token '{image_token}'; add it before encoding")
    marks = rendered.text.count(IMAGE_MARK)
    rendered = rendered.with_image_token(image_token)
    tokens = _tokenised(tokenizer, rendered, control)
    if tokens.ids.count(image_id) != marks:
        raise BadRecord("image token in the text", f"the text itself contains '{image_token}'")
    supervised = _inside(rendered.spans, [start for start, _ in tokens.offsets], tokens.from_text)

    input_ids: list[int] = []
    labels: list[int] = []
    for token_id, learn in zip(tokens.ids, supervised, strict=True):
        if token_id == image_id:
            input_ids += [image_id] * tokens_per_image
            labels += [IGNORE] * tokens_per_image
        else:
            input_ids.append(token_id)
            labels.append(token_id if learn else IGNORE)
    if max_length is not None and len(input_ids) > max_length:
        return _cut(Encoded(input_ids, labels), max_length, image_id)
    return Encoded(input_ids, labels)


def _tokenised(tokenizer: PreTrainedTokenizerBase, rendered: Rendered, control: ControlTokens | None) -> Tokens:
    text, bos = rendered.text, tokenizer.bos_token
    add_bos = not (bos and text.startswith(bos))
    if GUARD in text:
        tokens = (control or ControlTokens(tokenizer)).tokenise(text, add_special_tokens=add_bos)
    else:
        found = tokenizer(
            text, add_special_tokens=add_bos, return_offsets_mapping=True, truncation=False, verbose=False
        )
        from_text = [sequence is not None for sequence in found.sequence_ids(0)]
        tokens = Tokens(found["input_ids"], found["offset_mapping"], from_text)
    if breaks := _crossed(rendered.spans, tokens):
        control = control or ControlTokens(tokenizer)
        tokens = control.tokenise(text, add_special_tokens=add_bos, breaks=breaks)
    return tokens


def _crossed(spans: Sequence[tuple[int, int]], tokens: Tokens) -> list[int]:
    """The beginnings of spans that lie inside a token: answers that begin with a line break, most often."""
    ranges = [offset for offset, of_text in zip(tokens.offsets, tokens.from_text, strict=True) if of_text]
    befores = ((start, bisect_left(ranges, (start, start)) - 1) for start, _ in spans)
    return [start for start, before in befores if before >= 0 and ranges[before][1] > start]


def _inside(spans: Sequence[tuple[int, int]], starts: Sequence[int], from_text: Sequence[bool]) -> Iterator[bool]:
    """Whether each token is of the text and begins in a span; tokens and spans are in the text's order."""
    span = 0
    for start, of_text in zip(starts, from_text, strict=True):
        while span < len(spans) and of_text and start >= spans[span][1]:
            span += 1
        yield of_text and span < len(spans) and start >= spans[span][0]


def _cut(encoded: Encoded, max_length: int, image_id: int) -> Encoded:
    if image_id in encoded.input_ids[max_length:]:
        raise BadRecord(
            "too long for its images",
            f"cut to {max_length} tokens, the {len(encoded.input_ids)} tokens would lose part of an image; "
            "raise max_length or leave the record out",
        )
    lost = len(encoded.input_ids) - max_length
    cut = Encoded(encoded.input_ids[:max_length], encoded.labels[:max_length], lost)
    if encoded.supervised and not cut.supervised:
        raise BadRecord(
            "question too long",
            f"cut to {max_length} tokens, nothing of the answer is left; raise max_length or leave the record out",
        )
    return cut


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return f"the tokenizer {tokenizer.name_or_path or type(tokenizer).__name__}"
