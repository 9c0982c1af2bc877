"""Options of ``mmpipe chat`` and ``mmpipe serve``: loading and sampling. No torch here."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_type_hints

from typer import Option

from mmpipe.chat.messages import ChatError

Bits = Literal[4, 8]
MAX_TOKENS = 1 << 20
MAX_STOP = 256
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class LoadOptions:
    """Loading options of a checkpoint. Raises ChatError for options that exclude each other."""

    template: Annotated[
        str | None, Option("--template", "--conv-mode", help="Checked against the checkpoint's own.")
    ] = None
    dtype: Annotated[str, Option(help="Of the weights: auto (as stored), float32, bfloat16, float16.")] = "auto"
    device: Annotated[str, Option(help="auto (a GPU if there is one), cpu, cuda:1, ...")] = "auto"
    device_map: Annotated[str | None, Option(help="auto spreads the layers over all GPUs, then CPU RAM.")] = None
    load_4bit: Annotated[bool, Option("--load-4bit", help="The language model in 4 bits (bitsandbytes).")] = False
    load_8bit: Annotated[bool, Option("--load-8bit", help="The language model in 8 bits (bitsandbytes).")] = False
    sparsity: Annotated[
        str | None, Option(help="Of a sparsified model: the share of an image to retain (0.2), or off.")
    ] = None

    def __post_init__(self) -> None:
        if self.load_4bit and self.load_8bit:
            raise ChatError("choose one of --load-4bit and --load-8bit")

    @property
    def bits(self) -> Bits | None:
        """Bits a weight of the language model; None: as stored."""
        return 4 if self.load_4bit else 8 if self.load_8bit else None


@dataclass(frozen=True)
class SamplingOptions:
    """Sampling options. Raises ChatError for impossible values."""

    temperature: Annotated[float, Option(help="0 always takes the most probable token.")] = 0.2
    top_p: Annotated[float, Option(help="Sample from the most probable tokens of this total probability.")] = 1.0
    max_tokens: Annotated[int, Option("--max-tokens", "--max-new-tokens", help="Longest answer.")] = 512
    seed: Annotated[int | None, Option(help="The same draws every time.")] = None
    stop: tuple[str, ...] = ()
    """The answer ends before any of these texts."""

    def __post_init__(self) -> None:
        for name, good, allowed in (
            ("temperature", 0 <= self.temperature <= 10, "0 (always the most probable token) to 10"),
            ("top_p", 0 < self.top_p <= 1, "more than 0, at most 1"),
            ("max_tokens", 1 <= self.max_tokens <= MAX_TOKENS, f"1 to {MAX_TOKENS}"),
            ("seed", self.seed is None or -(1 << 63) <= self.seed < 1 << 63, "an integer of 64 bits"),
            ("stop", len(self.stop) <= 4, "4 texts at most"),
            ("stop", all(len(text) <= MAX_STOP for text in self.stop), f"texts of {MAX_STOP} characters at most"),
        ):
            if not good:
                raise ChatError(f"{name} cannot be {str(getattr(self, name))[:40]}: {allowed}")


def takes_options(command: Callable[..., None]) -> Callable[..., None]:
    """Let a typer command take dataclasses: each field annotated with an ``Option`` is an option of the command line."""
    signature = inspect.signature(command, eval_str=True)
    groups: dict[str, tuple[Any, list[str]]] = {}
    parameters: list[inspect.Parameter] = []
    for name, parameter in signature.parameters.items():
        group, keyword = parameter.annotation, parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        if not dataclasses.is_dataclass(group):
            parameters.append(keyword)
            continue
        hints = {k: h for k, h in get_type_hints(group, include_extras=True).items() if hasattr(h, "__metadata__")}
        groups[name] = (group, list(hints))
        parameters += [
            keyword.replace(name=k, default=getattr(group, k, keyword.empty), annotation=h) for k, h in hints.items()
        ]

    @functools.wraps(command)
    def call(**values: Any) -> None:
        for name, (group, keys) in groups.items():
            values[name] = group(**{key: values.pop(key) for key in keys})
        command(**values)

    call.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return call
