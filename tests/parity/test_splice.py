"""Images among the tokens of a batch, against LLaVA-MoD's splice: which feature stands where, padding, cutting.

The reference takes embeddings apart and puts features between them. Here an image has as many placeholders among the
tokens, and its features replace their embeddings. A token's embedding is its number, so both can be read off.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from reference_tokenizers import numbers, vectors

from mmpipe.data.dataset import Batch, Collator, Sample
from mmpipe.data.labels import IGNORE, Encoded, Rendered, encode
from mmpipe.data.records import BadRecord
from mmpipe.inference.generate import Answerer
from mmpipe.models.llava import hidden_states

CASE = vectors("llava_mod/10_image_splice.json")
REFERENCE_IMAGE = -200
PATCHES = 3
# the reference's four images; the second is the dummy that its text-only sample uses up, and that we do not have
IMAGES = (0, 2, 3)
TOKENIZER = numbers(100)
IMAGE = TOKENIZER.convert_tokens_to_ids("<image>")


def sample(row: int, max_length: int | None = None) -> Encoded:
    """A row of the reference, padding left out, as we encode it."""
    text, spans = "", []
    for token, label, real in zip(
        *(CASE["inputs"][k][row] for k in ("input_ids", "labels", "attention_mask")), strict=True
    ):
        word = "<image>" if token == REFERENCE_IMAGE else f"t{token}"
        if real:
            spans += [(len(text), len(text) + len(word))] if label != IGNORE else []
            text += f"{word} "
    return encode(TOKENIZER, Rendered(text, tuple(spans)), "<image>", PATCHES, max_length)


def collated(rows: list[Encoded]) -> Batch:
    images = iter(torch.full((3, 2, 2), float(number)) for number in IMAGES)
    samples = [
        Sample(
            id="",
            index=number,
            replaced=(),
            input_ids=torch.tensor(row.input_ids),
            labels=torch.tensor(row.labels),
            pixel_values=[next(images) for _ in range(row.input_ids.count(IMAGE) // PATCHES)],
        )
        for number, row in enumerate(rows)
    ]
    return Collator(0, (2, 2))(samples)


class Body:
    """A model whose tower says which image it saw, and whose layers do nothing."""

    def get_image_features(self, pixel_values: torch.Tensor, **_: Any) -> Any:
        patches = torch.arange(PATCHES)
        return SimpleNamespace(pooler_output=[1000 * (image[0, 0, 0] + 1) + patches[:, None] for image in pixel_values])

    def get_input_embeddings(self) -> Any:
        return lambda ids: ids[..., None].float()

    def __call__(self, inputs_embeds: torch.Tensor, **_: Any) -> Any:
        return SimpleNamespace(last_hidden_state=inputs_embeds)


def embedded(batch: Any) -> list[list[float]]:
    model = SimpleNamespace(model=Body(), config=SimpleNamespace(image_token_id=IMAGE))
    return hidden_states(model, batch)[..., 0].tolist()


def test_features_labels_and_padding_of_a_batch() -> None:
    expected = CASE["expected"]["right"]
    batch = collated([sample(row) for row in range(3)])
    assert embedded(batch) == expected["embeds_first_channel"]
    assert batch["labels"].tolist() == expected["labels"]
    assert batch["attention_mask"].bool().tolist() == expected["attention_mask"]


def test_the_order_of_a_batch_moves_no_image_to_another_sample() -> None:
    whole = CASE["expected"]["right"]["embeds_first_channel"]
    # the text-only sample in front: nothing is used up by it
    batch = collated([sample(row) for row in (1, 0, 2)])
    assert embedded(batch) == [whole[row] for row in (1, 0, 2)]


def test_generation_is_padded_on_the_left() -> None:
    expected = CASE["expected"]["left"]
    answerer: Any = SimpleNamespace(pad_id=0, model=SimpleNamespace(device="cpu"))
    ids, mask = Answerer._pad(answerer, [sample(row).input_ids for row in range(3)])
    right = collated([sample(row) for row in range(3)])
    assert embedded({**right, "input_ids": ids}) == expected["embeds_first_channel"]
    assert mask.bool().tolist() == expected["attention_mask"]


def test_a_cut_keeps_images_whole() -> None:
    """The reference, told a length, cuts wherever it falls; LLaVA-MoD never tells it one."""
    expected = CASE["expected"]["right_max_len_6"]
    assert [sample(row, 6).labels for row in (0, 1)] == expected["labels"][:2]
    assert expected["embeds_first_channel"][2][-2:] == [32, 4000], "one patch of three"
    with pytest.raises(BadRecord, match="too long for its images"):
        sample(2, 6)
