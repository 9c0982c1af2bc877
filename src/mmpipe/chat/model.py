"""A checkpoint that answers, piece by piece."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from jinja2 import TemplateError
from torch import nn
from transformers import LlavaForConditionalGeneration, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from mmpipe.chat import memory
from mmpipe.chat.messages import ChatError, Message, Reply, Sampling
from mmpipe.chat.open import Opened
from mmpipe.chat.queue import Answer, Desk
from mmpipe.chat.stream import Detokenizer, TextStream
from mmpipe.inference.stopping import stop_ids
from mmpipe.models.moe.collect import collect_statistics, moe_layers
from mmpipe.models.sparsity.hooks import of_model
from mmpipe.models.sparsity.record import Record, recording


class ChatModel:
    """Answers conversations with an opened checkpoint, one at a time at its ``desk``."""

    def __init__(self, opened: Opened, desk: Desk) -> None:
        self.name = opened.name
        self.path = opened.path
        self.model = opened.model
        self.processor = opened.processor
        self.tokenizer = opened.processor.tokenizer
        self.desk = desk
        self.template = opened.template
        stop = opened.template.stop if opened.template else None
        self._ends = stop_ids(self.model, self.tokenizer, stop)
        is_token = stop is None or self.tokenizer.convert_tokens_to_ids(stop) in self._ends
        self._stop_texts = () if is_token or stop is None else (stop,)
        self._control = _control_tokens(self.tokenizer)

    @property
    def captions_only(self) -> bool:
        """Whether it was trained to describe images and reads no words (the stage that trains the projector)."""
        return self.template is not None and self.template.captions

    @property
    def sparsified(self) -> bool:
        """Whether it has predictors that say what of an image is kept."""
        return isinstance(self.model, LlavaForConditionalGeneration) and of_model(self.model) is not None

    def answer(self, messages: Sequence[Message], sampling: Sampling) -> Answer:
        """Have the last message answered. Raises ChatError when the conversation does not suit the checkpoint, or at once
        when too many are waiting."""
        if self.captions_only:
            messages = self._captioned(messages[-1])
        return self.desk.ask(lambda answer: self._make(messages, sampling, answer))

    def _captioned(self, message: Message) -> list[Message]:
        if not message.images:
            raise ChatError(
                f"{self.name} describes images and cannot be asked without one: it was trained on captions (template "
                f"'{self.template.name if self.template else ''}'); give an image, or take a later stage of the recipe"
            )
        return [Message("user", message.images)]

    # ---- in the desk's thread

    @torch.inference_mode()
    def _make(self, messages: Sequence[Message], sampling: Sampling, answer: Answer) -> Reply:
        inputs = self._encode(messages)
        length = inputs["input_ids"].shape[1]
        limit = self._limit(length, sampling.max_tokens)
        writer = _Writer(self.tokenizer, (*self._stop_texts, *sampling.stop), answer)
        if sampling.seed is not None:
            torch.manual_seed(sampling.seed)
        loads = _ExpertLoads(self.model)
        what = f"a conversation of {length} tokens and an answer of up to {limit}"
        hint = "clear the conversation, show fewer images, ask for fewer tokens, or load in fewer bits"
        with loads.counted(), self._recorded() as kept, memory.told(what, hint):
            self.model.generate(
                **inputs,
                generation_config=self._generation(sampling, limit),
                streamer=writer,
                stopping_criteria=StoppingCriteriaList([_Stop(answer, writer.stream)]),
            )
        finish = "stop" if writer.stream.ended or writer.last in self._ends else "length"
        return Reply(
            text=writer.stream.text.rstrip(),
            prompt_tokens=length,
            tokens=len(writer.tokens.ids),
            finish="stopped" if answer.is_stopped and finish != "stop" else finish,
            expert_loads=loads.shares(),
            keep_maps=[kept_map for done in kept.passes for kept_map in done.images],
        )

    def _encode(self, messages: Sequence[Message]) -> dict[str, Any]:
        chat = [Message(m.role, tuple(map(self._plain, m.parts))).to_chat() for m in messages]
        try:
            inputs = self.processor.apply_chat_template(
                chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
        except (TemplateError, ValueError) as error:
            raise ChatError(f"{self.name} cannot be asked this: {error}") from error
        device = self.model.device if self.model.device.type != "meta" else torch.device("cpu")
        return {
            name: tensor.to(device, self.model.dtype if tensor.is_floating_point() else None)
            for name, tensor in inputs.items()
        }

    def _plain(self, part: Any) -> Any:
        """A text whose control tokens are broken up: nobody but the template ends a turn or puts an image."""
        if not isinstance(part, str):
            return part
        whole = part.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # halves of characters
        return self._control.sub(lambda found: f"{found[0][0]} {found[0][1:]}", whole)

    def _recorded(self) -> AbstractContextManager[Record]:
        """Records what a sparsified model keeps; of another, nothing."""
        return recording(self.model) if self.sparsified else nullcontext(Record())

    def _limit(self, length: int, wanted: int) -> int:
        """How many tokens an answer may have. Raises ChatError when the conversation leaves no room."""
        text = self.model.config.get_text_config()
        known = getattr(text, "max_position_embeddings", None)
        rope = (getattr(text, "rope_parameters", None) or {}).get("rope_type", "default")
        if known is None or rope == "dynamic":
            return wanted
        if length >= known:
            raise ChatError(
                f"the conversation has {length} tokens and {self.name} takes {known}; clear it or show fewer images"
            )
        return min(wanted, known - length)

    def _generation(self, sampling: Sampling, limit: int) -> Any:
        config = copy.deepcopy(self.model.generation_config)
        sampled = sampling.temperature > 0
        config.update(
            do_sample=sampled,
            temperature=sampling.temperature if sampled else None,
            top_p=sampling.top_p if sampled else None,
            top_k=0 if sampled else None,
            num_beams=1,
            max_new_tokens=limit,
            max_length=None,
            use_cache=True,
            eos_token_id=sorted(self._ends),
            pad_token_id=min(self._ends) if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id,
        )
        return config


class _Writer(BaseStreamer):
    """Takes the tokens from ``generate`` and hands their text to the reader."""

    def __init__(self, tokenizer: Any, stops: Sequence[str], answer: Answer) -> None:
        self.tokens = Detokenizer(tokenizer)
        self.stream = TextStream(stops)
        self.last: int | None = None
        self._answer = answer
        self._prompt = True

    def put(self, value: torch.Tensor) -> None:
        if self._prompt:  # generate begins with the prompt
            self._prompt = False
            return
        self.last = int(value.item())
        self._say(self.stream.feed(self.tokens.feed(self.last)))

    def end(self) -> None:
        self._say(self.stream.feed(self.tokens.rest()))
        self._say(self.stream.rest())

    def _say(self, text: str) -> None:
        if text:
            self._answer.say(text)


class _Stop(StoppingCriteria):
    """Ends an answer that was stopped, or that met a stop text."""

    def __init__(self, answer: Answer, stream: TextStream) -> None:
        self._answer = answer
        self._stream = stream

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        end = self._answer.is_stopped or self._stream.ended
        return torch.full((len(input_ids),), end, dtype=torch.bool, device=input_ids.device)


class _ExpertLoads:
    """Counts which experts carry out an answer."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._counts: dict[str, torch.Tensor] = {}

    @contextmanager
    def counted(self) -> Iterator[None]:
        """While inside, every forward pass of the model is counted."""
        if not moe_layers(self._model):
            yield
            return
        handle = self._model.register_forward_hook(lambda *_: self._add())
        try:
            yield
        finally:
            handle.remove()

    def _add(self) -> None:
        for name, statistics in collect_statistics(self._model).items():
            load = statistics["load"]
            self._counts[name] = self._counts[name] + load if name in self._counts else load

    def shares(self) -> dict[str, list[float]]:
        """By layer, each expert's share of the choices carried out."""
        return {name: (load / load.sum().clamp(min=1)).tolist() for name, load in self._counts.items()}


def _control_tokens(tokenizer: Any) -> re.Pattern[str]:
    """What a text must not hold: the special tokens, but for those that are blanks."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    texts = sorted((text for text in special if text.strip()), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, texts)) or r"(?!)")
