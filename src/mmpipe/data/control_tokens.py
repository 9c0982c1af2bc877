"""Control tokens (``<|im_end|>``, ``</s>``, ``<image>``) that occur in the texts of records and questions.

Only the template ends a turn and only an image mark places an image: in a text of the data the same characters are
tokenised as ordinary text. Texts are guarded before they enter a template, so that the two can be told apart behind it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from mmpipe.data.records import IMAGE_MARK, BadRecord, Turn

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

GUARD = "\ufdd0"
"""Stands after the first character of a guarded control token: a code point that Unicode reserves for internal use."""
_BREAK, _ALIAS, _RESERVED = "\ufdd1", "\ufdd2{}\ufdd2", re.compile("[\ufdd0-\ufdd2]")


class Tokens(NamedTuple):
    """A tokenised text: ids, character ranges, and whether a token is of the text (not added, as BOS is)."""

    ids: list[int]
    offsets: list[tuple[int, int]]
    from_text: list[bool]


class ControlTokens:
    """The special tokens of a tokenizer and ``stop``, the text that ends answers; blanks are none of them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: str = "") -> None:
        self._tokenizer = tokenizer
        self._added = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
        special = {*tokenizer.all_special_tokens, stop, *(text for text, token in self._added.items() if token.special)}
        self._names = sorted((text for text in special if text.strip() and text in self._added), key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, self._names)) or "(?!)")
        """Matches each of them."""
        self._in_data = re.compile("|".join(map(re.escape, dict.fromkeys([*self._names, IMAGE_MARK]))))

    def guard(self, text: str, *, images: bool = False) -> str:
        """``text`` with its control tokens guarded, image marks left as they are if ``images``. Raises BadRecord for
        code points that are reserved for this."""
        if found := _RESERVED.search(text):
            raise BadRecord("reserved character", f"U+{ord(found[0]):04X}, which Unicode keeps for internal use")

        def guarded(found: re.Match[str]) -> str:
            return found[0] if images and found[0] == IMAGE_MARK else f"{found[0][0]}{GUARD}{found[0][1:]}"

        return self._in_data.sub(guarded, text)

    def guard_turns(self, turns: Sequence[Turn]) -> tuple[Turn, ...]:
        """The turns guarded; image marks are places of images in what the user says."""
        return tuple(Turn(turn.role, self.guard(turn.text, images=turn.role == "user")) for turn in turns)

    def found(self, turns: Sequence[Turn]) -> list[str]:
        """The control tokens that are text in guarded turns, each once, in order."""
        texts = [turn.text for turn in turns if GUARD in turn.text]
        return [
            text.replace(GUARD, "") for text in dict.fromkeys(hit for t in texts for hit in self._guarded.findall(t))
        ]

    def tokenise(self, text: str, *, add_special_tokens: bool, breaks: Sequence[int] = ()) -> Tokens:
        """The tokens of a text with guards; no token goes across one of the positions ``breaks``."""
        aliased, places = self._aliased(text, breaks)
        plain = self._plain.encode(aliased, add_special_tokens=add_special_tokens)
        found = Tokens([], [], [])
        for token, (start, end), sequence in zip(plain.ids, plain.offsets, plain.sequence_ids, strict=True):
            if token != self._break:
                found.ids.append(self._originals.get(token, token))
                found.offsets.append((places[start], places[end]))
                found.from_text.append(sequence is not None)
        return found

    def _aliased(self, text: str, breaks: Sequence[int]) -> tuple[str, list[int]]:
        """The text without guards, aliases in place of control tokens, and each character's position in ``text``."""
        edits = [(found.start(), found.end(), self._aliases[found[0]]) for found in self.pattern.finditer(text)]
        edits += [(found.start(), found.end(), "") for found in re.finditer(GUARD, text)]
        edits += [(place, place, _BREAK) for place in breaks]
        made: list[str] = []
        places: list[int] = []
        at = 0
        for start, end, new in [*sorted(edits), (len(text), len(text), "")]:
            made += [text[at:start], new]
            places += [*range(at, start), *[start] * len(new)]
            at = end
        return "".join(made), [*places, len(text)]

    @cached_property
    def _guarded(self) -> re.Pattern[str]:
        texts = dict.fromkeys([*self._names, IMAGE_MARK])
        return re.compile("|".join(f"{re.escape(text[0])}{GUARD}{re.escape(text[1:])}" for text in texts))

    @cached_property
    def _aliases(self) -> dict[str, str]:
        return {text: _ALIAS.format(number) for number, text in enumerate(self._names)}

    @cached_property
    def _plain(self) -> Tokenizer:
        """The tokenizer with every control token read as text, and aliases that take their place."""
        from tokenizers import AddedToken, Tokenizer

        content = json.loads(self._tokenizer.backend_tokenizer.to_str())
        for token in content["added_tokens"]:
            token["special"] |= token["content"] in self._aliases
        plain = Tokenizer.from_str(json.dumps(content))
        plain.no_truncation()
        plain.no_padding()
        plain.encode_special_tokens = True
        for text, alias in self._aliases.items():
            strips = {"lstrip": self._added[text].lstrip, "rstrip": self._added[text].rstrip}
            plain.add_tokens([AddedToken(alias, normalized=False, special=False, **strips)])
        plain.add_tokens([AddedToken(_BREAK, normalized=False, special=False)])
        return plain

    @cached_property
    def _originals(self) -> dict[int | None, int]:
        ids: Any = self._tokenizer.convert_tokens_to_ids(self._names)
        return {self._plain.token_to_id(self._aliases[text]): id_ for text, id_ in zip(self._names, ids, strict=True)}

    @cached_property
    def _break(self) -> int | None:
        return self._plain.token_to_id(_BREAK)
