from __future__ import annotations

import logging
import pickle
from pathlib import Path

import pytest
import torch
from data_records import (
    IMAGE_TOKENS,
    SIDE,
    Entry,
    char_tokenizer,
    data_set,
    entry,
    image,
    in_tokens,
    mix,
    processor,
    said,
)
from torch.utils.data import DataLoader

from mmpipe.data.dataset import Collator, PreferenceCollator, PreferenceDataset, SupervisedDataset
from mmpipe.data.images import open_image
from mmpipe.data.labels import IGNORE
from mmpipe.data.record_table import write_records
from mmpipe.data.records import PreferenceRecord, Record, Turn
from mmpipe.data.sampler import BatchPlan
from mmpipe.data.tokens import TextEncoder
from mmpipe.errors import DataError

COLLATE = Collator(char_tokenizer().pad_token_id, (SIDE, SIDE))


def made(tmp_path: Path, entries: list[Entry], with_encoder: TextEncoder | None = None) -> SupervisedDataset:
    mix(data_set(tmp_path / "made", entries), tmp_path / "out")
    return SupervisedDataset(in_tokens(tmp_path / "out" / "records.arrow", with_encoder), processor())


def stored(tmp_path: Path, records: list[Record], with_encoder: TextEncoder | None = None) -> SupervisedDataset:
    """Without the verification of a mixture."""
    write_records(tmp_path / "records.arrow", records)
    return SupervisedDataset(in_tokens(tmp_path / "records.arrow", with_encoder), processor())


def record(number: int, question: str = "What?", answer: str = "That.", images: tuple[str, ...] = ()) -> Record:
    return Record(f"r{number}", "made", images, (Turn("user", question), Turn("assistant", answer)))


def mixed() -> list[Entry]:
    return [entry(0, "0.png"), entry(1), entry(2, ["1.png", "2.png"])]


def test_a_sample_holds_tokens_labels_and_images(tmp_path: Path) -> None:
    dataset = made(tmp_path, mixed())
    sample = dataset[2]
    assert sample["id"] == "made/r2"
    assert sample["replaced"] == ()
    tokenizer = char_tokenizer()
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    assert (sample["input_ids"] == image_id).sum() == 2 * IMAGE_TOKENS
    learnt = sample["labels"][sample["labels"] != IGNORE]
    assert tokenizer.decode(learnt) == " It is 2.</s>"
    expected = [open_image(tmp_path / "made/img" / name).image for name in ("1.png", "2.png")]
    for pixels, opened in zip(sample["pixel_values"], expected, strict=True):
        assert torch.equal(pixels, processor()(opened, return_tensors="pt")["pixel_values"][0])


def test_a_batch_is_padded_on_the_right_and_images_follow_the_samples(tmp_path: Path) -> None:
    dataset = made(tmp_path, mixed())
    samples = [dataset[i] for i in range(3)]
    batch = COLLATE(samples)
    assert batch["ids"] == ["made/r0", "made/r1", "made/r2"]
    assert batch["dummy_image"] is False
    assert torch.equal(batch["pixel_values"], torch.stack([p for sample in samples for p in sample["pixel_values"]]))
    for row, sample in enumerate(samples):
        length = len(sample["input_ids"])
        assert torch.equal(batch["input_ids"][row, :length], sample["input_ids"])
        assert torch.equal(batch["labels"][row, :length], sample["labels"])
        assert (batch["labels"][row, length:] == IGNORE).all()
        assert (batch["input_ids"][row, length:] == COLLATE.pad_token_id).all()
        assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (len(batch["labels"][row]) - length)
    for name in ("input_ids", "labels", "attention_mask"):
        assert batch[name].dtype == torch.int64  # type: ignore[literal-required]


def test_a_batch_without_images_has_one_of_zeros(tmp_path: Path) -> None:
    dataset = made(tmp_path, mixed())
    batch = COLLATE([dataset[1], dataset[1]])
    assert batch["dummy_image"] is True
    assert batch["pixel_values"].shape == (1, 3, SIDE, SIDE)
    assert not batch["pixel_values"].any()
    assert batch["pixel_values"].dtype == dataset[0]["pixel_values"][0].dtype


def test_the_padded_length_may_be_a_multiple(tmp_path: Path) -> None:
    batch = Collator(0, (SIDE, SIDE), multiple_of=64)([made(tmp_path, mixed())[1]])
    assert batch["input_ids"].shape[1] % 64 == 0


def test_padding_with_the_end_token_masks_no_end_token(tmp_path: Path) -> None:
    """Padding is told from the length, not from the token."""
    dataset = made(tmp_path, [entry(0), entry(1, conversations=said("a", "a much longer answer"))])
    batch = Collator(char_tokenizer().eos_token_id, (SIDE, SIDE))([dataset[0], dataset[1]])
    ends = batch["input_ids"] == char_tokenizer().eos_token_id
    assert ((batch["labels"] == char_tokenizer().eos_token_id).sum(dim=1) == 1).all()
    assert (ends & batch["attention_mask"].bool()).sum(dim=1).tolist() == [1, 1]


def test_an_image_gone_since_is_replaced_by_the_next_record(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dataset = made(tmp_path, [entry(i, f"{i}.png") for i in range(4)])
    (tmp_path / "made/img/1.png").unlink()
    (tmp_path / "made/img/3.png").write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        samples = [dataset[i] for i in range(4)]
    assert [sample["id"] for sample in samples] == ["made/r0", "made/r2", "made/r2", "made/r0"]
    batch = COLLATE(samples)
    assert len(batch["replaced"]) == 2
    assert "made/r1" in batch["replaced"][0]
    assert "1.png: the image cannot be read" in batch["replaced"][0]
    assert "empty file" in batch["replaced"][1]
    assert caplog.text.count("replaced by the next record") == 2
    assert dataset[1]["id"] == "made/r2"


def test_when_nothing_can_be_read_training_stops(tmp_path: Path) -> None:
    dataset = stored(tmp_path, [record(i, "<image>?", images=("gone.png",)) for i in range(3)])
    with pytest.raises(DataError, match=r"3 records.*made/r1.*gone\.png"):
        dataset[1]


def test_workers_and_pickling_change_nothing(tmp_path: Path) -> None:
    dataset = made(tmp_path, mixed() * 3)
    plan = BatchPlan(lengths=dataset.lengths, has_image=dataset.has_image, micro_batch=2, grouping="length")
    batches = [
        list(DataLoader(source, batch_sampler=plan.batches(0), collate_fn=COLLATE, num_workers=workers))
        for source, workers in ((dataset, 0), (dataset, 2), (pickle.loads(pickle.dumps(dataset)), 0))  # noqa: S301
    ]
    for other in batches[1:]:
        for one, two in zip(batches[0], other, strict=True):
            assert one["ids"] == two["ids"]
            assert torch.equal(one["input_ids"], two["input_ids"])
            assert torch.equal(one["pixel_values"], two["pixel_values"])


def preferences(tmp_path: Path) -> PreferenceDataset:
    def pair(number: int, name: str | None, chosen: str, rejected: str) -> PreferenceRecord:
        question = Turn("user", "<image>\nWhat?" if name else "What?")
        return PreferenceRecord(f"p{number}", "made", (name,) if name else (), (question,), chosen, rejected)

    paths = [str(image(tmp_path / f"{i}.png", seed=i)) for i in range(2)]
    records = [pair(0, paths[0], "a cat", "a"), pair(1, None, "b", "a dog"), pair(2, paths[1], "c", "d")]
    write_records(tmp_path / "records.arrow", records)
    return PreferenceDataset(in_tokens(tmp_path / "records.arrow"), processor())


def test_pairs_share_their_images(tmp_path: Path) -> None:
    dataset = preferences(tmp_path)
    pairs = [dataset[i] for i in range(3)]
    batch = PreferenceCollator(char_tokenizer().pad_token_id, (SIDE, SIDE))(pairs)
    assert batch["ids"] == ["made/p0", "made/p1", "made/p2"]
    learnt = [char_tokenizer().decode(row[row != IGNORE]) for row in batch["labels"]]
    assert learnt == [f" {text}</s>" for text in ("a cat", "b", "c", "a", "a dog", "d")]
    assert torch.equal(batch["pixel_values"], torch.stack([pairs[0]["pixel_values"][0], pairs[2]["pixel_values"][0]]))
    image_id = char_tokenizer().convert_tokens_to_ids("<image>")
    assert (batch["input_ids"] == image_id).sum() == 2 * 2 * IMAGE_TOKENS


def test_a_dataset_refuses_records_of_the_other_kind(tmp_path: Path) -> None:
    pairs, conversations = preferences(tmp_path), made(tmp_path, mixed())
    with pytest.raises(DataError, match="holds preferences, but the stage trains on conversations"):
        SupervisedDataset(pairs.tokens, processor())
    with pytest.raises(DataError, match="holds conversations, but the stage trains on preferences"):
        PreferenceDataset(conversations.tokens, processor())
