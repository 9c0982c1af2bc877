"""The made backbones are ordinary checkpoints, the same for the same seed, and the tower can see."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from transformers import (
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionModel,
    PreTrainedTokenizerBase,
    Qwen2ForCausalLM,
)

from mmpipe.demo.backbones import caption_dialogues, clip_tiny, qwen2_tiny
from mmpipe.demo.datasets import INSTRUCTIONS
from mmpipe.demo.moss2 import moss2_tiny
from mmpipe.demo.scenes import ATTRIBUTES, LETTERS, PIXELS, QUESTIONS, Scene, scenes
from mmpipe.errors import ConfigError


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("clip-tiny")
    clip_tiny(out)
    return out


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("qwen2-tiny")
    qwen2_tiny(out)
    return out


@pytest.fixture(scope="module")
def tokenizer(language: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(language)


@pytest.mark.parametrize(("maker", "options"), [(clip_tiny, {"training_steps": 3}), (qwen2_tiny, {}), (moss2_tiny, {})])
def test_the_same_seed_writes_the_same_bytes(tmp_path: Path, maker: Callable[..., None], options: Any) -> None:
    def made(name: str, seed: int) -> dict[str, bytes]:
        out = tmp_path / name
        maker(out, seed=seed, **options)
        return {path.name: path.read_bytes() for path in sorted(out.iterdir())}

    first = made("first", 0)
    torch.rand(3)  # the state of the global generator must not matter
    assert made("again", 0) == first
    assert made("other", 1) != first


def test_makers_leave_the_global_generator_and_threads_alone(tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected, threads = torch.rand(1), torch.get_num_threads()
    torch.manual_seed(5)
    clip_tiny(tmp_path / "tower", training_steps=0)
    qwen2_tiny(tmp_path / "language")
    assert torch.equal(torch.rand(1), expected)
    assert torch.get_num_threads() == threads


def test_the_tower_loads_with_stock_classes(tower: Path) -> None:
    processor = AutoImageProcessor.from_pretrained(tower, backend="pil")
    assert isinstance(processor, CLIPImageProcessorPil)
    model = CLIPVisionModel.from_pretrained(tower)
    assert model.config.hidden_size % 8 == 0
    pixels = processor([next(scenes(0)).draw()], return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, PIXELS, PIXELS)
    assert model(pixels).last_hidden_state.shape == (1, 1 + 9, 64)


def test_patch_features_determine_every_attribute_of_held_out_images(tower: Path) -> None:
    model = CLIPVisionModel.from_pretrained(tower)
    processor = CLIPImageProcessorPil.from_pretrained(tower)

    def features(drawn: list[Scene]) -> np.ndarray:
        """Patches of the last layer but one, side by side (N, patches x width): a language model sees each in its place."""
        pixels = processor([scene.draw() for scene in drawn], return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            return model(pixels, output_hidden_states=True).hidden_states[-2][:, 1:].flatten(1).numpy()

    seen, unseen = list(islice(scenes(11), 1000)), list(islice(scenes(12, held_out=True), 400))
    seen_features, unseen_features = features(seen), features(unseen)
    for name in ATTRIBUTES:
        probe = LogisticRegression(max_iter=1000).fit(seen_features, [scene.value(name) for scene in seen])
        right = probe.score(unseen_features, [scene.value(name) for scene in unseen])
        assert right > 0.95, f"{name}: {right:.3f}"


def test_the_language_model_loads_with_stock_classes(language: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    model = AutoModelForCausalLM.from_pretrained(language)
    assert isinstance(model, Qwen2ForCausalLM)
    sizes = (model.config.hidden_size, model.config.intermediate_size, model.config.vocab_size)
    assert all(size % 8 == 0 for size in sizes)
    assert model.generation_config.eos_token_id == [
        tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        tokenizer.convert_tokens_to_ids("<|im_end|>"),
    ]
    assert tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)


def test_an_image_token_fits_without_resizing(language: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(language)
    before = len(tokenizer)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    vocab_size = AutoModelForCausalLM.from_pretrained(language).config.vocab_size
    assert before < len(tokenizer) <= vocab_size
    assert len(tokenizer("<image>\nWhat")["input_ids"]) == 3


def test_every_word_of_the_demo_is_one_token(tokenizer: PreTrainedTokenizerBase) -> None:
    values = [value for values in ATTRIBUTES.values() for value in values]
    asked = [f" {word}" for question in QUESTIONS.values() for word in question.strip("?").split()[1:]]
    answers = [*LETTERS, *values, *(f" {answer}" for answer in (*LETTERS, *values))]
    assert [word for word in asked + answers if len(tokenizer.tokenize(word)) != 1] == []


@pytest.mark.parametrize("text", ["an unseen Wörd, 図 and 🙂", "tabs\tand\n\nlines  ", "<|im_end|>"])
def test_any_text_survives_the_tokenizer(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_chat_template_marks_assistant_text(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [{"role": "user", "content": "What color is drawn?"}, {"role": "assistant", "content": "red"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == (
        "<|im_start|>user\nWhat color is drawn?<|im_end|>\n<|im_start|>assistant\nred<|im_end|>\n"
    )
    encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    marked = [i for i, mark in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mark]
    assert tokenizer.decode(marked) == "red<|im_end|>"
    prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert prompt.endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_what_a_language_model_reads_is_true_of_the_caption_before_it() -> None:
    kinds = set()
    for question, answer in islice(caption_dialogues(0), 200):
        caption, asked, *rest = question.split("\n")
        if asked in INSTRUCTIONS:
            kinds.add("caption")
            assert answer == caption
        elif answer in ("Yes", "No"):
            kinds.add("yes or no")
            color, shape = re.fullmatch(r"Is there a (\w+) (\w+) in the image\?", asked).groups()
            assert (f" {color} {shape}" in caption) == (answer == "Yes")
        else:
            options = dict(line.split(". ") for line in rest[:-1])
            kinds.add("letter" if options else "word")
            assert options.get(answer, answer) in re.sub(r"(circle|square|triangle|cross)e?s", r"\1", caption)
    assert kinds == {"caption", "yes or no", "letter", "word"}


def test_reading_lowers_the_loss_of_what_is_read(tmp_path: Path) -> None:
    def loss(steps: int) -> float:
        out = tmp_path / str(steps)
        qwen2_tiny(out, hidden_size=32, layers=2, training_steps=steps)
        model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
        texts = [f"{question}\n{answer}" for question, answer in islice(caption_dialogues(7), 8)]
        ids = [tokenizer(text, return_tensors="pt")["input_ids"] for text in texts]
        with torch.no_grad():
            return sum(float(model(input_ids=row, labels=row).loss) for row in ids) / len(ids)

    assert loss(30) < 0.9 * loss(0)


def test_a_width_that_heads_do_not_fill_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"hidden_size.*\b100\b.*\b32\b.*\b96\b"):
        qwen2_tiny(tmp_path, hidden_size=100)
