"""Makers of the demo's backbones: checkpoints of a few hundred kilobytes for the classes of transformers.

A maker writes one checkpoint into a directory: ``maker(out, *, seed, **options)``. The same seed and options write
the same bytes on the same machine. All sizes are multiples of 8, as grouped matrix products on CPUs need.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mmpipe.demo.datasets import DIGITS, INSTRUCTIONS
from mmpipe.demo.presence import yes_no
from mmpipe.demo.scenes import ATTRIBUTES, LETTER_ANSWER, LETTERS, PIXELS, QUESTIONS, SHORT_ANSWER, ask, scenes
from mmpipe.errors import ConfigError

if TYPE_CHECKING:
    from transformers import CLIPImageProcessorPil, CLIPVisionModel, PreTrainedTokenizerBase, Qwen2ForCausalLM

INITIALIZER_RANGE = 0.15
"""Near ``hidden_size ** -0.5``. With the 0.02 of large models, attention starts so uniform that a narrow one stays for
a thousand steps on a plateau, with the words but not the letters of the options learnt."""

EOS = "<|endoftext|>"
PAD = "<|pad|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"

MAX_POSITIONS = 2048
SPARE_ROWS = 8
"""Rows of the vocabulary left free, so that special tokens such as ``<image>`` fit without resizing."""

CHATML = (
    "{% for message in messages %}"
    "{{ '" + TURN_START + "' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '" + TURN_END + "' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '" + TURN_END + "' }}{% endif %}"
    "{{ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '" + TURN_START + "assistant\\n' }}{% endif %}"
)
"""Qwen's chat format; what the assistant says, up to its end mark, is marked for supervision."""

PROMPT_WORDS = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: ASSISTANT:",
    "You are a helpful assistant.",
    *("system\n", "user\n", "assistant\n", "USER", "ASSISTANT"),
)
"""Text of chat templates, so that the tokenizer knows their words."""


def clip_tiny(
    out: Path, *, seed: int = 0, hidden_size: int = 64, layers: int = 3, patch_size: int = 16, training_steps: int = 600
) -> None:
    """A CLIP vision tower for the synthetic images, with its preprocessor. It is first trained for ``training_steps``
    (0 for none) to classify the attributes of scenes, in place of contrastive pretraining: ten seconds on one core."""
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

    require_whole_heads(hidden_size)
    config = CLIPVisionConfig(
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 16,
        projection_dim=hidden_size,
        image_size=PIXELS,
        patch_size=patch_size,
    )
    processor = CLIPImageProcessorPil(size={"shortest_edge": PIXELS}, crop_size={"height": PIXELS, "width": PIXELS})
    with _one_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tower = CLIPVisionModel(config)
        if training_steps:
            _pretrain_vision(tower, processor, seed=seed, steps=training_steps)
    tower.save_pretrained(out)
    processor.save_pretrained(out)


def qwen2_tiny(out: Path, *, seed: int = 0, hidden_size: int = 64, layers: int = 3, training_steps: int = 0) -> None:
    """A Qwen2 language model and a byte-level BPE tokenizer for the demo's text. Its weights are random, or trained for
    ``training_steps`` to answer questions about captions, in place of pretraining on text; 600 steps take a minute and
    a half on one core."""
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

    require_whole_heads(hidden_size)
    tokenizer = _tokenizer()
    vocab_size = -(-(len(tokenizer) + SPARE_ROWS) // 8) * 8
    config = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 16,
        num_key_value_heads=hidden_size // 32,
        max_position_embeddings=MAX_POSITIONS,
        initializer_range=INITIALIZER_RANGE,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with _one_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config)
        if training_steps:
            _pretrain_text(model, tokenizer, seed=seed, steps=training_steps)
    stops = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(TURN_END)]
    model.generation_config = GenerationConfig(eos_token_id=stops, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _pretrain_vision(
    tower: CLIPVisionModel, processor: CLIPImageProcessorPil, *, seed: int, steps: int, batch_size: int = 64
) -> None:
    """Train the tower to classify every attribute of a scene, from its pooled output and from its mean patch in the
    last layer but one, which LLaVA uses."""
    sizes = [len(values) for values in ATTRIBUTES.values()]
    heads = torch.nn.ModuleList(torch.nn.Linear(tower.config.hidden_size, sum(sizes)) for _ in range(2))
    stream = scenes(seed)

    def loss() -> torch.Tensor:
        batch = list(islice(stream, batch_size))
        pixels = processor([scene.draw() for scene in batch], return_tensors="pt")["pixel_values"]
        answers = [
            torch.tensor([values.index(scene.value(attribute)) for scene in batch])
            for attribute, values in ATTRIBUTES.items()
        ]
        seen = tower(pixels, output_hidden_states=True)
        pooled = (seen.pooler_output, seen.hidden_states[-2][:, 1:].mean(dim=1))
        return torch.stack([
            torch.nn.functional.cross_entropy(logits, answer)
            for head, features in zip(heads, pooled, strict=True)
            for logits, answer in zip(head(features).split(sizes, dim=1), answers, strict=True)
        ]).sum()  # fmt: skip

    _train([*tower.parameters(), *heads.parameters()], loss, steps, learning_rate=2e-3)


def _pretrain_text(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, *, seed: int, steps: int, batch_size: int = 64
) -> None:
    """Train the model to answer the demo's questions about images from captions."""
    stream = caption_dialogues(seed)

    def loss() -> torch.Tensor:
        ids, labels = _batch(tokenizer, list(islice(stream, batch_size)))
        mask = (ids != tokenizer.pad_token_id).long()
        found: torch.Tensor = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        return found

    _train(list(model.parameters()), loss, steps, learning_rate=3e-3, betas=(0.9, 0.95))


def _train(
    parameters: list[torch.nn.Parameter],
    loss: Callable[[], torch.Tensor],
    steps: int,
    *,
    learning_rate: float,
    betas: tuple[float, float] = (0.9, 0.999),
) -> None:
    """Adam with one warm-up and one decay; ``loss`` computes that of the next batch."""
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=betas, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        loss().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def caption_dialogues(seed: int) -> Iterator[tuple[str, str]]:
    """Endless questions about captions, and their answers; the held-out scenes are not among them."""
    rng = random.Random(seed)
    for scene in scenes(rng.getrandbits(32)):
        attribute = rng.choice(list(ATTRIBUTES))
        kind = rng.choices(("letter", "caption", "word", "yes or no"), (8, 5, 4, 3))[0]
        if kind == "letter":
            choice = ask(attribute, scene.value(attribute), rng)
            question, answer = f"{choice.text}\n{LETTER_ANSWER}", choice.letter
        elif kind == "caption":
            question, answer = rng.choice(INSTRUCTIONS), scene.caption
        elif kind == "word":
            question, answer = f"{QUESTIONS[attribute]}\n{SHORT_ANSWER}", scene.value(attribute)
        else:
            question, answer = yes_no(scene, rng.random() < 0.5, rng)
            question += f"\n{SHORT_ANSWER}"
        yield f"{scene.caption}\n{question}", answer


def _batch(tokenizer: PreTrainedTokenizerBase, dialogues: list[tuple[str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels (B, L) in the chat format; the answers, with their end mark, are supervised."""
    rows, labels = [], []
    for question, answer in dialogues:
        said = [{"role": "user", "content": question}]
        asked = tokenizer(tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True))["input_ids"]
        answered = tokenizer(answer + TURN_END)["input_ids"]
        rows.append(torch.tensor([*asked, *answered]))
        labels.append(torch.tensor([-100] * len(asked) + answered))
    pad = torch.nn.utils.rnn.pad_sequence
    return (
        pad(rows, batch_first=True, padding_value=tokenizer.pad_token_id),
        pad(labels, batch_first=True, padding_value=-100),
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one thread, so that sums are taken in the same order whatever machine this is."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _tokenizer() -> PreTrainedTokenizerBase:
    """A Qwen2 tokenizer with one token for each word of the demo; any other text is split into pieces."""
    from tokenizers import pre_tokenizers
    from tokenizers.trainers import BpeTrainer
    from transformers import Qwen2Tokenizer

    trainer = BpeTrainer(
        vocab_size=4096,  # more than the text can fill, so every word becomes one token
        min_frequency=1,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    backend = Qwen2Tokenizer().backend_tokenizer
    backend.train_from_iterator(texts(), trainer)
    learned = json.loads(backend.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=learned["vocab"],
        merges=[tuple(pair) for pair in learned["merges"]],  # type: ignore[misc]  # hinted as text, taken as pairs
        eos_token=EOS,
        unk_token=EOS,
        pad_token=PAD,
        extra_special_tokens=[TURN_START, TURN_END],
        model_max_length=MAX_POSITIONS,
        chat_template=CHATML,
    )


def texts() -> Iterator[str]:
    """All words of the demo and of the chat templates, with the punctuation next to them."""
    yield from PROMPT_WORDS
    yield from INSTRUCTIONS
    yield from (f"{question}\n{SHORT_ANSWER}\n{LETTER_ANSWER}\n" for question in QUESTIONS.values())
    yield from (f"{letter}.\n {letter}\n" for letter in LETTERS)
    yield from (f"{word}\n {word}\n" for words in (*ATTRIBUTES.values(), DIGITS) for word in words)
    yield from (scene.caption for scene in islice(scenes(0), 200))
    yield from ("What digit is written?\n", "Is there a in the image?\n", "Yes Yes\n", "No No\n")


def require_whole_heads(hidden_size: int) -> None:
    """Raise ConfigError unless heads of 16, two query heads to a key-value head, fill ``hidden_size``."""
    if hidden_size % 32 or hidden_size <= 0:
        near = max(32, round(hidden_size / 32) * 32)
        raise ConfigError(f"hidden_size = {hidden_size} is not a positive multiple of 32; {near} is the nearest one")
