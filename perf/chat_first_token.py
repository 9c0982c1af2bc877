"""Time to the first words of an answer in chat, against the bare prefill of transformers.

    python perf/chat_first_token.py                          # the demo's checkpoint
    python perf/chat_first_token.py owner/name --repeats 20  # another, as mmpipe chat takes it

Bare is what is left without chat: the processor's chat template, one image, ``generate`` of one token. Chat is the whole way
from a question to the first piece of text, through queue, thread and streaming. Repetitions are interleaved; the table gives
medians in milliseconds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import closing

import torch
from PIL import Image

from mmpipe.chat.find import find
from mmpipe.chat.messages import Completion, Message, user_message
from mmpipe.chat.model import ChatModel
from mmpipe.chat.options import LoadOptions, SamplingOptions
from mmpipe.chat.queue import RequestQueue
from mmpipe.chat.run import open_model

TARGET = 1.3
"""Chat may take so many times as long."""


def bare(chat: ChatModel, question: Message) -> None:
    """Template, image, prefill, one token."""
    inputs = chat.processor.apply_chat_template(
        [question.to_chat()], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    ).to(chat.model.device, chat.model.dtype)
    with torch.inference_mode():
        chat.model.generate(**inputs, max_new_tokens=1, do_sample=False, use_cache=True)


def first_words(chat: ChatModel, question: Message) -> None:
    """Until the first piece of text; the rest of the answer is waited for outside the clock."""
    answer = chat.answer([question], SamplingOptions(temperature=0, max_tokens=4))
    next(iter(answer), None)
    answer.cancel()


def timed(work: Callable[[ChatModel, Message], None], chat: ChatModel, question: Message) -> float:
    """Milliseconds of one call."""
    start = time.perf_counter()
    work(chat, question)
    return 1000 * (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoint", nargs="?", default="demo")
    parser.add_argument("--repeats", type=int, default=60)
    arguments = parser.parse_args()
    question = user_message("What is in this image?", [Image.effect_noise((640, 480), 80).convert("RGB")])
    times: dict[str, list[float]] = {"bare": [], "chat": []}
    with closing(RequestQueue()) as queue:
        chat = open_model(find(arguments.checkpoint), LoadOptions(), queue)
        for repeat in range(arguments.repeats + 3):
            for name, work in (("bare", bare), ("chat", first_words)):
                taken = timed(work, chat, question)
                queue.submit(lambda _: Completion("", 0, 0, "stop")).completion  # noqa: B018 - the answer before has ended
                if repeat >= 3:
                    times[name].append(taken)
    medians = {name: round(statistics.median(values), 2) for name, values in times.items()}
    ratio = round(medians["chat"] / medians["bare"], 3)
    print(json.dumps({"checkpoint": chat.name, **medians, "ratio": ratio, "good": ratio <= TARGET}))


if __name__ == "__main__":
    main()
