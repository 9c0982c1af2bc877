"""A loaded checkpoint that answers conversations, streaming the text.

TextIteratorStreamer of transformers is not used: it shows a word only once the next begins, and drops a blank after
every line break with tokenizers like Llama's. DecodeStream of tokenizers raises on bytes that are no text.
``stop_strings`` of transformers finds a stop text too, but counts the end of the prompt, and cannot hide a stop text's
beginning; cancelling needs a stopping criterion in any case.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from jinja2 import TemplateError
from torch import nn
from transformers import GenerationConfig, LlavaForConditionalGeneration, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from mmpipe.chat.find import LocalCheckpoint
from mmpipe.chat.images import EncodedImage, require_few_pixels
from mmpipe.chat.memory import report_out_of_memory
from mmpipe.chat.messages import ChatError, Completion, Message, images_first
from mmpipe.chat.options import SamplingOptions
from mmpipe.chat.queue import AnswerStream, RequestQueue
from mmpipe.data.control_tokens import ControlTokens
from mmpipe.data.templates import Template, render_jinja
from mmpipe.errors import DataError
from mmpipe.inference.generate import stop_ids
from mmpipe.models.llava import max_positions
from mmpipe.models.moe.collect import collect_statistics, moe_layers
from mmpipe.models.sparsity.hooks import get_sparsifier
from mmpipe.models.sparsity.record import KeepRecord, recording

ANSWER_SECONDS = 600
"""A longer answer is cut: one conversation must not keep the queue for hours."""
_MAX_TEXT = 4_000_000  # characters of a conversation, for models that name no longest context
_PIECE = 1 << 15
_LEAST_TEMPERATURE = 1e-3  # below it, logits divided by the temperature leave the range of numbers: as 0


class ChatModel:
    """Answers conversations with a loaded checkpoint, one at a time in the order of ``queue``."""

    def __init__(
        self, checkpoint: LocalCheckpoint, model: Any, processor: Any, template: Template | None, queue: RequestQueue
    ) -> None:
        self.name = checkpoint.name
        self.path = checkpoint.path
        self.model = model
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.queue = queue
        self.template = template
        stop = template.stop if template else None
        self._stop_ids = stop_ids(model, self.tokenizer, stop)
        is_token = stop is None or self.tokenizer.convert_tokens_to_ids(stop) in self._stop_ids
        self._stop_texts = () if is_token or stop is None else (stop,)
        self._control = ControlTokens(self.tokenizer, template.stop if template else "")
        self._longest_token = max(map(len, self.tokenizer.get_vocab()), default=1)

    @property
    def captions_only(self) -> bool:
        """Whether it was trained on captions only and ignores questions (the stage that trains the projector)."""
        return self.template is not None and self.template.captions

    @property
    def sparsified(self) -> bool:
        """Whether it has predictors that choose the image tokens to retain."""
        return isinstance(self.model, LlavaForConditionalGeneration) and get_sparsifier(self.model) is not None

    def answer(
        self, messages: Sequence[Message], sampling: SamplingOptions, place: AnswerStream | None = None
    ) -> AnswerStream:
        """Answer the last message, in its ``place`` in the queue. Raises ChatError when the checkpoint cannot be asked
        this, QueueFull."""
        if self.captions_only:
            if not messages[-1].images:
                raise ChatError(
                    f"{self.name} describes images and cannot be asked without one: it was trained on captions "
                    f"(template '{self.template.name if self.template else ''}'); give an image, or take a later stage "
                    "of the recipe"
                )
            messages = [Message("user", messages[-1].images)]
        self._require_room(messages)
        return self.queue.submit(lambda answer: self._generate(messages, sampling, answer), place)

    def _require_room(self, messages: Sequence[Message]) -> None:
        """Raise ChatError when a conversation cannot fit, by its characters and images: a token has only so many
        characters, and nothing is tokenised or decoded."""
        window, characters = self._window(), sum(len(message.text) for message in messages)
        images = sum(len(message.images) for message in messages)
        each = getattr(self.model.config, "image_seq_length", None) or 1
        least = characters // self._longest_token + images * each
        if characters > _MAX_TEXT or (window is not None and least >= window):
            raise ChatError(self._too_long(f"at least {least}"))

    def _window(self) -> int | None:
        return max_positions(self.model.config.get_text_config())

    def _too_long(self, length: str) -> str:
        has = f"the conversation has {length} tokens and {self.name} takes {self._window() or _MAX_TEXT}"
        return f"{has}; clear it or show fewer images"

    # ---- in the queue's thread

    @torch.inference_mode()
    def _generate(self, messages: Sequence[Message], sampling: SamplingOptions, answer: AnswerStream) -> Completion:
        inputs = self._encode(self._decoded(messages))
        length = inputs["input_ids"].shape[1]
        config = self._generation_config(sampling, length)
        streamer = TokenStreamer(self.tokenizer, (*self._stop_texts, *sampling.stop), answer.put)

        latest = time.monotonic() + ANSWER_SECONDS

        def ended(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            done = answer.is_cancelled or streamer.ended or time.monotonic() > latest
            return torch.full((len(ids),), done, device=ids.device)

        if sampling.seed is not None:
            torch.manual_seed(sampling.seed)
        what = f"a conversation of {length} tokens and an answer of up to {config.max_new_tokens}"
        hint = "clear the conversation, show fewer images, ask for fewer tokens, or load in fewer bits"
        with _count_expert_loads(self.model) as loads, self._recorded() as record, report_out_of_memory(what, hint):
            self.model.generate(**inputs, generation_config=config, streamer=streamer, stopping_criteria=[ended])
        finish = "stop" if streamer.ended or self._stop_ids.intersection(streamer.ids[-1:]) else "length"
        return Completion(
            text=streamer.text.rstrip(),
            prompt_tokens=length,
            tokens=len(streamer.ids),
            finish="stopped" if answer.is_cancelled and finish != "stop" else finish,
            expert_loads={name: (load / load.sum().clamp(min=1)).tolist() for name, load in loads.items()},
            retention_maps=[retained for done in record.passes for retained in done.images],
        )

    def _decoded(self, messages: Sequence[Message]) -> list[Message]:
        """The messages with their images decoded. Raises ChatError, before, when the texts alone are too long."""
        window, tokens = self._window(), 0
        for text in (message.text for message in messages):
            # Pieces of a long text have a few tokens more than the whole.
            for start in range(0, len(text) if window and len(text) > _PIECE else 0, _PIECE):
                piece = text[start : start + _PIECE].encode("utf-8", "replace").decode()
                tokens += max(0, len(self.tokenizer(piece, add_special_tokens=False)["input_ids"]) - 8)
                if window is not None and tokens >= window:
                    raise ChatError(self._too_long(f"more than {tokens}"))
        require_few_pixels([image for message in messages for image in message.images])
        return [
            Message(m.role, tuple(p.decode() if isinstance(p, EncodedImage) else p for p in m.parts)) for m in messages
        ]

    def _encode(self, messages: Sequence[Message]) -> dict[str, Any]:
        trained = images_first if self.template is not None else tuple[Any, ...]
        chat = [Message(m.role, trained(map(self._plain, m.parts))).to_chat() for m in messages]
        try:
            special_tokens = self.processor.tokenizer.special_tokens_map
            # the processor renders in this process, so a stranger's template must first prove to end
            render_jinja(self.processor.chat_template, chat, self.name, add_generation_prompt=True, **special_tokens)
            inputs = self.processor.apply_chat_template(
                chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
        except (DataError, TemplateError, ValueError) as error:
            raise ChatError(f"{self.name} cannot be asked this: {error}") from error
        device = self.model.device if self.model.device.type != "meta" else torch.device("cpu")
        return {
            name: tensor.to(device, self.model.dtype if tensor.is_floating_point() else None)
            for name, tensor in inputs.items()
        }

    def _plain(self, part: Any) -> Any:
        """A text with its control tokens split: only the template ends a turn or places an image."""
        if not isinstance(part, str):
            return part
        whole = part.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # lone surrogates
        return self._control.pattern.sub(lambda found: f"{found[0][0]} {found[0][1:]}", whole)

    def _recorded(self) -> AbstractContextManager[KeepRecord]:
        """Records the retained image tokens of a sparsified model; an empty record for others."""
        return recording(self.model) if self.sparsified else nullcontext(KeepRecord())

    def _generation_config(self, sampling: SamplingOptions, length: int) -> GenerationConfig:
        """Raises ChatError when the conversation, of ``length`` tokens, leaves no room for an answer."""
        limit, window = sampling.max_tokens, self._window()
        if window is not None:
            if length >= window:
                raise ChatError(self._too_long(str(length)))
            limit = min(limit, window - length)
        config: GenerationConfig = copy.deepcopy(self.model.generation_config)
        sampled = sampling.temperature >= _LEAST_TEMPERATURE
        config.update(
            do_sample=sampled,
            temperature=sampling.temperature if sampled else None,
            top_p=sampling.top_p if sampled else None,
            top_k=0 if sampled else None,
            num_beams=1,
            max_new_tokens=limit,
            max_length=None,
            use_cache=True,
            eos_token_id=sorted(self._stop_ids),
            pad_token_id=min(self._stop_ids) if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id,
        )
        return config


class TokenStreamer(BaseStreamer):
    """Passes the text of generated tokens to ``send``, without leading blanks, and ends before a stop text.

    All tokens are decoded together each time (1 ms for 2,000), because a token alone has no text: blanks depend on the
    token before it, and a character can take several tokens. Unfinished characters, and what may be the beginning of
    a stop text, are held back.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stop_texts: Sequence[str], send: Callable[[str], None]
    ) -> None:
        self._tokenizer = tokenizer
        self._stop_texts = [text for text in stop_texts if text]
        self._send = send
        self._in_prompt = True
        self.ids: list[int] = []
        self.text = ""
        """What was sent."""
        self.ended = False
        """Whether a stop text was found."""

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt's ids, then each new token."""
        if self._in_prompt:
            self._in_prompt = False
            return
        self.ids.append(int(value.item()))
        text = self._decode()
        if not text.endswith("\ufffd"):  # bytes that are no character yet
            self._show(text, max((_overlap(text, stop) for stop in self._stop_texts), default=0))

    def end(self) -> None:
        """Send the text held back."""
        self._show(self._decode(), 0)

    def _show(self, text: str, held: int) -> None:
        found = [place for stop in self._stop_texts if (place := text.find(stop)) >= 0]
        self.ended = bool(found)
        new = text[: min(found, default=len(text) - held)].lstrip()[len(self.text) :]
        if new:
            self.text += new
            self._send(new)

    def _decode(self) -> str:
        return str(self._tokenizer.decode(self.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop``."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


@contextmanager
def _count_expert_loads(model: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """Per MoE layer, the token assignments each expert computes (experts,), summed over the forward passes inside."""
    counts: dict[str, torch.Tensor] = {}
    if not moe_layers(model):
        yield counts
        return

    def add(*_: Any) -> None:
        for name, statistics in collect_statistics(model).items():
            counts[name] = counts[name] + statistics["load"] if name in counts else statistics["load"]

    handle = model.register_forward_hook(add)
    try:
        yield counts
    finally:
        handle.remove()
