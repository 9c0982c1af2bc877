"""The model class that lmms-eval runs: its requests become questions, answered as in our own benchmarks.

lmms-eval owns data sets, prompts and scores; template, images and decoding are the checkpoint's, so an answer is the
one that ``snakemake results/...`` would give to the same prompt.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lmms_eval.api.model import lmms
from PIL import Image

from mmpipe.analysis.expert_log import ExpertLog, merge, pieces
from mmpipe.artifacts.files import store_by_content
from mmpipe.data.images import encode_image, on_white
from mmpipe.data.records import IMAGE_MARK
from mmpipe.errors import ConfigError, DataError
from mmpipe.inference.open_answerer import open_answerer
from mmpipe.inference.question import Question

_DTYPES = ("float32", "bfloat16", "float16")
_MOST_TOKENS = 1024
"""Of a reply where the task names no limit, as in lmms-eval's other models."""


class Mmpipe(lmms):
    """A checkpoint of mmpipe: ``--model_args pretrained=results/demo/finetune/model``.

    ``experts=experts.parquet`` logs the experts of each token (``mmpipe.analysis.expert_log``; a question's
    id is ``task/document#request``), one file a process. ``dtype`` is ``float32``, ``bfloat16`` or ``float16``; without
    it bfloat16 on a GPU and float32 elsewhere. Under ``accelerate launch`` every process answers its share. Decoding is
    greedy or by beams; a task that samples is refused.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 16,
        device: str | None = None,
        dtype: str | None = None,
        max_batch_size: int | None = None,
        experts: str | None = None,
    ) -> None:
        super().__init__()
        self.batch_size = _batch_size(batch_size, max_batch_size)
        self.device = torch.device(self._processes(device))
        if dtype is not None and dtype not in _DTYPES:
            raise ConfigError(f"dtype={dtype}: one of {', '.join(_DTYPES)}")
        self._experts = Path(experts) if experts else None
        kind = getattr(torch, dtype) if dtype else None
        self.answerer = open_answerer(Path(pretrained), str(self.device), dtype=kind, model_id=pretrained)

    def _processes(self, device: str | None) -> str:
        """Join the processes of ``accelerate launch``; returns this one's device."""
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from accelerate import Accelerator

            self.accelerator = Accelerator()
            self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
            return str(self.accelerator.device)
        return device or ("cuda" if torch.cuda.is_available() else "cpu")

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The reply to every request, cut at the first of the task's stop texts.

        Raises ConfigError for a task that samples, DataError for one with videos or sounds.
        """
        groups: dict[tuple[int, int], list[int]] = {}
        for place, request in enumerate(requests):
            groups.setdefault(_settings(request.args[1]), []).append(place)
        replies = [""] * len(requests)
        with TemporaryDirectory(prefix="mmpipe-lmms-") as folder:
            questions = [
                self._question(_name(place, request), request.args[0], request.args[2:], Path(folder))
                for place, request in enumerate(requests)
            ]
            place_of = {question.id: place for place, question in enumerate(questions)}
            log = self._log(questions, Path(folder, "experts"))
            for (tokens, beams), places in groups.items():
                for answer in self.answerer.answer(
                    [questions[place] for place in places],
                    batch_size=self.batch_size,
                    max_new_tokens=tokens,
                    num_beams=beams,
                    log=log,
                ):
                    place = place_of[answer["question_id"]]
                    replies[place] = _cut(answer["text"], requests[place].args[1].get("until"))
                    hook = (requests[place].args[0], requests[place].args[1])
                    self.cache_hook.add_partial("generate_until", hook, replies[place])
            if log is not None and self._experts is not None:
                merge(pieces(log.folder), self._experts)
        return replies

    def _log(self, questions: Sequence[Question], folder: Path) -> ExpertLog | None:
        """The log of experts, if one is wanted. Raises ConfigError when its file is there."""
        if self._experts is None:
            return None
        if self._rank:
            self._experts = self._experts.with_name(f"{self._experts.stem}-{self._rank}{self._experts.suffix}")
        if self._experts.exists():
            raise ConfigError(f"experts={self._experts}: the file is there; name another one or move it away")
        return ExpertLog(self.answerer.model, folder, questions)

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Log-probability of every continuation, and whether greedy decoding would give it."""
        with TemporaryDirectory(prefix="mmpipe-lmms-") as folder:
            pairs = []
            for place, request in enumerate(requests):
                context, wanted, *rest = request.args
                text = wanted(self._doc(rest)) if callable(wanted) else wanted
                pairs.append((self._question(str(place), context, rest, Path(folder)), str(text)))
            return list(self.answerer.likelihood(pairs, batch_size=self.batch_size))

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not supported: our checkpoints answer single questions."""
        raise NotImplementedError("mmpipe: tasks of several rounds are not supported")

    def _doc(self, rest: Sequence[Any]) -> Any:
        _, number, task, split = rest[:4]
        return self.task_dict[task][split][number]

    def _question(self, name: str, context: str, rest: Sequence[Any], folder: Path) -> Question:
        """A request as a question; equal images are stored once, so that their part of the prompt is shared."""
        to_images = rest[0]
        images = tuple(_stored(p, folder) for p in _flat(to_images(self._doc(rest)) if to_images else ()))
        # where marks and images do not agree, the images come first
        text = context if context.count(IMAGE_MARK) == len(images) else context.replace(IMAGE_MARK, "")
        return Question(id=name, text=text, images=images)


def _name(place: int, request: Any) -> str:
    """A name for a request that is unique among all: a document may be asked several times."""
    _, _, _, number, task, *_ = request.args
    return f"{task}/{number}#{place}"


def _settings(asked: Mapping[str, Any]) -> tuple[int, int]:
    """Longest reply in tokens and number of beams. Raises ConfigError for sampling."""
    if asked.get("do_sample") and float(asked.get("temperature") or 0) > 0:
        raise ConfigError(
            "mmpipe answers greedily or by beams: give the task --gen_kwargs do_sample=False,temperature=0"
        )
    return int(asked.get("max_new_tokens", _MOST_TOKENS)), int(asked.get("num_beams", 1))


_FILLED_IN = ["\n\n"]
"""The stop texts that lmms-eval gives to a task which names none (``TaskConfig``, the delimiter of its few shots): none
of the models that lmms-eval brings cuts there, where a reply of several paragraphs only begins."""


def _cut(reply: str, until: str | Sequence[str] | None) -> str:
    if until == _FILLED_IN:
        return reply.strip()
    for stop in [until] if isinstance(until, str) else until or ():
        if stop:
            reply = reply.split(stop)[0]
    return reply.strip()


def _flat(images: Any) -> Iterable[Any]:
    """Images of a document, which tasks pass as one, a list, a list of lists, or None."""
    if isinstance(images, list | tuple):
        return [one for some in images for one in _flat(some)]
    return [] if images is None else [images]


def _stored(image: Any, folder: Path) -> Path:
    """The image as a file without loss, named by its content. Raises DataError for what is no image."""
    if not isinstance(image, Image.Image):
        raise DataError(f"lmms-eval hands over a {type(image).__name__}; mmpipe's checkpoints see images only")
    return folder / store_by_content(encode_image(on_white(image)[0], "PNG", compress_level=1), folder, ".png")


def _batch_size(wanted: int | str, most: int | None) -> int:
    try:
        return min(int(wanted), int(most)) if most else int(wanted)
    except ValueError:
        raise ConfigError(f"--batch_size {wanted}: give a number; mmpipe does not search for one") from None
