"""Greedy answers to questions: batched, sorted by length, with a shared prefix cache per image.

Questions about one image have a common prefix: the template's first words, the image, often some text. It is run
through the model once; its keys and values are then repeated for each question (all questions of an image are in one
batch, with images of similar length). Every row has its own positions and mask, so an answer does not depend on
the other rows.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mmpipe.data.control_tokens import GUARD, ControlTokens
from mmpipe.data.images import open_image
from mmpipe.data.labels import encode
from mmpipe.data.records import IMAGE_MARK, Turn
from mmpipe.data.templates import Rendered, Template
from mmpipe.errors import DataError
from mmpipe.inference.question import Answer, ChoiceLog, Owner, Question
from mmpipe.models.sparsity.hooks import prompt_retention, shares_prompts

if TYPE_CHECKING:
    from PIL import Image
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class EncodedQuestion:
    """A tokenised question."""

    question: Question
    ids: tuple[int, ...]
    """Token ids of the prompt, every image as so many image tokens."""


@dataclass(frozen=True)
class PrefixGroup:
    """Questions with the same images and a common prefix of ``shared`` tokens, which holds all the images."""

    rows: tuple[EncodedQuestion, ...]
    shared: int


@dataclass(frozen=True)
class GeneratedAnswer:
    """Generated tokens without the end token, and whether it was reached within the limit."""

    ids: list[int]
    ended: bool


class Answerer:
    """Answers questions with a checkpoint.

    ``model`` and ``processor`` behave like ``LlavaForConditionalGeneration`` and ``LlavaProcessor``;
    ``template`` defines the prompt and the stop text. ``model_id`` is recorded with every answer.
    """

    def __init__(self, model: Any, processor: Any, template: Template, *, model_id: str = "") -> None:
        self.model = model.eval()
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.template = template
        self._control = ControlTokens(self.tokenizer, template.stop)
        self.model_id = model_id
        self.image_token: str = getattr(processor, "image_token", IMAGE_MARK)
        self.image_id = int(self.tokenizer.convert_tokens_to_ids(self.image_token))
        self.stop_ids = stop_ids(model, self.tokenizer, template.stop)
        pad = self.tokenizer.pad_token_id
        self.pad_id = int(min(self.stop_ids) if pad is None else pad)

    def answer(
        self,
        questions: Sequence[Question],
        *,
        batch_size: int = 16,
        max_new_tokens: int = 128,
        num_beams: int = 1,
        share_prefix: bool = True,
        log: ChoiceLog | None = None,
    ) -> Iterator[Answer]:
        """Yield one answer record a question, in the order they are finished.

        The records have LLaVA's fields (``question_id, prompt, text, answer_id, model_id, metadata``) and the
        question's own. Decoding is greedy, or by beam search with ``num_beams`` > 1. ``share_prefix=False`` hands whole
        prompts to the model's own ``generate``; the answers are the same (a model that drops tokens of questions never
        shares). ``log`` gets the choices of experts, of a batch before its answers are yielded. Raises DataError for a
        question whose images and image marks do not agree.
        """
        rows = [EncodedQuestion(question, self._encode(question)) for question in questions]
        plain = num_beams > 1 or not share_prefix or not shares_prompts(self.model)
        groups = [PrefixGroup((row,), len(row.ids) - 1) for row in rows] if plain else self._groups(rows)
        for batch in _batches(groups, batch_size):
            asked = [row for group in batch for row in group.rows]
            replies = (
                self._generate(asked, max_new_tokens, num_beams, log)
                if plain
                else self._greedy(batch, max_new_tokens, batch_size, log)
            )
            if log is not None:
                log.write(row.question for row in asked)
            for row, reply in zip(asked, replies, strict=True):
                yield self._record(row.question, reply)

    @torch.inference_mode()
    def likelihood(
        self, pairs: Sequence[tuple[Question, str]], *, batch_size: int = 16
    ) -> Iterator[tuple[float, bool]]:
        """For each continuation after its question's prompt: the sum of its tokens' log-probabilities, and whether
        greedy decoding would give it (0 and True for an empty one).

        Prompt and continuation are tokenised together; the tokens that differ from the prompt alone are the
        continuation.
        """
        for start in range(0, len(pairs), batch_size):
            part = pairs[start : start + batch_size]
            whole = [self._encode(question, text) for question, text in part]
            lengths = [
                len(ids) - _agreeing(ids, self._encode(question))
                for ids, (question, _) in zip(whole, part, strict=True)
            ]
            given = self._inputs(whole, [question for question, _ in part])
            # (B, longest + 1, vocabulary)
            logits = self.model(**given, use_cache=False, logits_to_keep=max(lengths) + 1).logits
            for row, length in enumerate(lengths):
                wanted = given["input_ids"][row, given["input_ids"].shape[1] - length :]
                scores = logits[row, logits.shape[1] - 1 - length : -1].float().log_softmax(dim=-1)
                said = scores.gather(1, wanted[:, None]).sum()
                yield float(said), bool((scores.argmax(dim=-1) == wanted).all())

    # ---- prompts

    def inputs(self, questions: Sequence[Question]) -> dict[str, torch.Tensor]:
        """The model's inputs for a batch of whole prompts, padded on the left."""
        return self._inputs([self._encode(question) for question in questions], questions)

    def _inputs(self, prompts: Sequence[Sequence[int]], questions: Sequence[Question]) -> dict[str, torch.Tensor]:
        """The model's inputs for token ids of prompts that hold the images of ``questions`` (none: no pixels)."""
        ids, mask = self._pad(prompts)
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": _positions(mask)}
        images = [_open(image) for question in questions for image in question.images]
        if not images:
            return given
        pixels = self.processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
        return given | {"pixel_values": pixels.to(device=self.model.device, dtype=self.model.dtype)}

    def prompt(self, question: Question) -> str:
        """The text the model continues, with image marks."""
        return self._guarded_prompt(question).replace(GUARD, "")

    def _guarded_prompt(self, question: Question) -> str:
        if self.template.captions:
            raise DataError(
                f"the checkpoint {self.model_id} was trained on captions (template '{self.template.name}') and cannot "
                "be asked questions; evaluate a later stage of the recipe"
            )
        text = question.text
        if IMAGE_MARK not in text:
            text = f"{IMAGE_MARK}\n" * len(question.images) + text
        marks, images = text.count(IMAGE_MARK), len(question.images)
        if marks != images:
            raise DataError(f"question {question.id}: {marks} image marks for {images} images")
        return self.template.prompt(self._control.guard_turns([Turn("user", text)]))

    def _encode(self, question: Question, continuation: str = "") -> tuple[int, ...]:
        per_image = int(self.model.config.image_seq_length)
        text = Rendered(self._guarded_prompt(question) + self._control.guard(continuation), ())
        return tuple(encode(self.tokenizer, text, self.image_token, per_image, control=self._control).input_ids)

    def _groups(self, rows: Sequence[EncodedQuestion]) -> list[PrefixGroup]:
        """Rows by their images and the text before and between them; without images each is alone."""
        together: dict[Any, list[EncodedQuestion]] = {}
        for row in rows:
            end = max((place + 1 for place, token in enumerate(row.ids) if token == self.image_id), default=0)
            opening = row.ids[:end]
            together.setdefault((row.question.images, opening) if opening else len(together), []).append(row)
        return [
            PrefixGroup(tuple(sorted(members, key=lambda row: len(row.ids))), _common(members))
            for members in together.values()
        ]

    # ---- running the model

    @torch.inference_mode()
    def _greedy(
        self, groups: Sequence[PrefixGroup], max_new_tokens: int, batch_size: int, log: ChoiceLog | None
    ) -> list[GeneratedAnswer]:
        """Greedy decoding of groups, one reply a row, at most ``batch_size`` rows at a time."""
        first = [group.rows[0] for group in groups]
        prefixes = [row.ids[: group.shared] for row, group in zip(first, groups, strict=True)]
        given = self._inputs(prefixes, [row.question for row in first])
        mask = given["attention_mask"]
        out = self.model(**given, use_cache=True, logits_to_keep=1, **prompt_retention(self.model))
        if log is not None:
            shared = [(row.question, len(group.rows)) for row, group in zip(first, groups, strict=True)]
            log.prompts(shared, given["input_ids"], mask, given["position_ids"])
        rows = [(owner, row) for owner, group in enumerate(groups) for row in group.rows]
        parts = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
        replies: list[GeneratedAnswer] = []
        for number, part in enumerate(parts, start=1):
            cache = out.past_key_values if number == len(parts) else copy.deepcopy(out.past_key_values)
            owners = torch.tensor([owner for owner, _ in part], device=self.model.device)
            cache.batch_select_indices(owners)
            ids, own_mask = self._pad([row.ids[groups[owner].shared :] for owner, row in part])
            whole_mask = torch.cat([mask[owners], own_mask], dim=1)
            asked = [(row.question, 1) for _, row in part]
            replies += self._decode(ids, whole_mask, cache, max_new_tokens, asked, log)
        return replies

    def _decode(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor,
        cache: Any,
        max_new_tokens: int,
        asked: Sequence[Owner],
        log: ChoiceLog | None,
    ) -> list[GeneratedAnswer]:
        """Continue rows ``ids`` (B, S) on ``cache``; ``mask`` (B, P + S) covers what is cached and ``ids``."""
        width = ids.shape[1]
        generated: list[list[int]] = [[] for _ in ids]
        ended = [False] * len(ids)
        position = _positions(mask)[:, -width:]
        given = prompt_retention(self.model)
        for step in range(max_new_tokens):
            given |= {"input_ids": ids, "attention_mask": mask, "position_ids": position, "past_key_values": cache}
            out = self.model(**given, use_cache=True, logits_to_keep=1)
            if log is not None and step == 0:
                log.prompts(asked, ids, mask[:, -width:], position)
            elif log is not None:
                log.generated(asked, [not end for end in ended], position)
            ids = out.logits[:, -1].argmax(dim=-1, keepdim=True)  # (B, 1)
            for row, token in enumerate(ids[:, 0].tolist()):
                if not ended[row]:
                    generated[row].append(token)
                    ended[row] = self._stopped(generated[row])
            if all(ended):
                break
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            position = position[:, -1:] + 1
            given = {}
        return [GeneratedAnswer(tokens, end) for tokens, end in zip(generated, ended, strict=True)]

    @torch.inference_mode()
    def _generate(
        self, rows: Sequence[EncodedQuestion], max_new_tokens: int, num_beams: int, log: ChoiceLog | None
    ) -> list[GeneratedAnswer]:
        """The same through ``model.generate``, which also does beam search."""
        given = self._inputs([row.ids for row in rows], [row.question for row in rows])
        del given["position_ids"]  # its own
        width = given["input_ids"].shape[1]

        def stopped(sequences: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            rows = [self._stopped(row) for row in sequences[:, width:].tolist()]
            return torch.tensor(rows, device=sequences.device)

        out = self.model.generate(
            **given,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=num_beams,
            eos_token_id=sorted(self.stop_ids),
            pad_token_id=self.pad_id,
            **({} if self._stops_by_token else {"stopping_criteria": [stopped]}),
        )
        replies = []
        for tokens in out[:, width:].tolist():
            end = next((end for end in range(1, len(tokens) + 1) if self._stopped(tokens[:end])), None)
            replies.append(GeneratedAnswer(tokens[:end], end is not None))
        if log is not None:
            lengths = [len(reply.ids) for reply in replies]
            log.generate([(row.question, 1) for row in rows], given["input_ids"], given["attention_mask"], lengths)
        return replies

    @property
    def _stops_by_token(self) -> bool:
        return self.tokenizer.convert_tokens_to_ids(self.template.stop) in self.stop_ids

    def _stopped(self, tokens: Sequence[int]) -> bool:
        if tokens and tokens[-1] in self.stop_ids:
            return True
        return not self._stops_by_token and self.template.stop in self.tokenizer.decode(tokens)

    def _pad(self, sequences: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and mask (B, longest), padded on the left."""
        width = max(map(len, sequences))
        ids = [[self.pad_id] * (width - len(s)) + list(s) for s in sequences]
        mask = [[0] * (width - len(s)) + [1] * len(s) for s in sequences]
        device = self.model.device
        return torch.tensor(ids, device=device), torch.tensor(mask, device=device)

    # ---- answers

    def _record(self, question: Question, reply: GeneratedAnswer) -> Answer:
        text = self.tokenizer.decode(reply.ids, skip_special_tokens=True)
        if not self._stops_by_token:
            text = text.split(self.template.stop)[0]
        return {
            "question_id": question.id,
            "prompt": question.recorded_prompt,
            "text": text.strip(),
            **question.extra,
            "answer_id": _answer_id(self.model_id, question),
            "model_id": self.model_id,
            "metadata": {"tokens": len(reply.ids), "ended": reply.ended},
        }


def _batches(groups: Sequence[PrefixGroup], batch_size: int) -> Iterator[list[PrefixGroup]]:
    """Batches of prefix groups, by length, of at most ``batch_size`` rows; a larger group is alone."""
    batch: list[PrefixGroup] = []
    for group in sorted(groups, key=lambda group: (max(len(row.ids) for row in group.rows), group.shared)):
        if batch and sum(len(member.rows) for member in batch) + len(group.rows) > batch_size:
            yield batch
            batch = []
        batch.append(group)
    if batch:
        yield batch


def _common(rows: Sequence[EncodedQuestion]) -> int:
    """Length of the rows' common prefix, shorter than every row."""
    shortest = min(len(row.ids) for row in rows) - 1
    return min(shortest, *(_agreeing(rows[0].ids, row.ids) for row in rows))


def _agreeing(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the common prefix of two sequences."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def _positions(mask: torch.Tensor) -> torch.Tensor:
    """Positions (B, L) that count real tokens only; padding has position 0 and is masked."""
    return (mask.cumsum(dim=1) - 1).clamp(min=0)


def _open(image: bytes | Path) -> Image.Image:
    if isinstance(image, bytes):
        raise DataError("images must be files; prepare the benchmark first (mmpipe.benchmarks.prepare)")
    return open_image(image).image


def _answer_id(model_id: str, question: Question) -> str:
    """An answer id, a pure function of its arguments."""
    text = f"{model_id}\x00{question.id}\x00{question.recorded_prompt}"
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:22]


def stop_ids(model: Any, tokenizer: PreTrainedTokenizerBase, stop: str | None) -> frozenset[int]:
    """The tokens that end an answer: the model's own, the tokenizer's end of text, and ``stop`` where it is a token."""
    configured = model.generation_config.eos_token_id
    ids = set(configured if isinstance(configured, list) else [configured])
    ids.add(tokenizer.eos_token_id)
    if stop is not None:
        token = tokenizer.convert_tokens_to_ids(stop)
        if token != tokenizer.unk_token_id:
            ids.add(token)
    return frozenset(int(i) for i in ids if i is not None)
