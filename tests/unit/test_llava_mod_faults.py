"""Faults of LLaVA-MoD's code that no other test is about and that cannot happen here; the ledger lists them all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from data_records import char_tokenizer, encoder, in_tokens
from PIL import Image
from tiny_llava import llava, processor
from transformers import Qwen2Config, SiglipVisionConfig

from mmpipe.benchmarks.base import Question
from mmpipe.checkpoints.save import load_checkpoint, save_checkpoint
from mmpipe.data.images import image_processor
from mmpipe.data.labels import IGNORE
from mmpipe.data.record_table import write_records
from mmpipe.data.records import PreferenceRecord, Turn
from mmpipe.data.templates import get_template
from mmpipe.errors import ConfigError
from mmpipe.inference.generate import Answerer
from mmpipe.models.llava import joined_config
from mmpipe.settings import validate
from mmpipe.stages.distill_sparse import DistillSparse
from mmpipe.stages.prefer import Prefer


@pytest.mark.parametrize(("stage", "who"), [(DistillSparse, "teacher"), (Prefer, "reference")])
def test_a_loss_that_does_not_exist_is_refused(stage: type, who: str) -> None:
    """There, any other name of a distillation means kd_lm, the trainer's own default among them."""
    wrong = "sigmoid" if stage is DistillSparse else "only_kd"
    with pytest.raises(ConfigError, match=r"stages\.it.*loss_type"):
        validate(stage, {"data": "some", who: "one", "loss_type": wrong}, "recipe: stages.it")


def test_both_answers_of_a_pair_are_cut_to_the_length(tmp_path: Path) -> None:
    """There, preferences are never cut."""
    question, limit = (Turn("user", "What?"),), len(encoder().template.prompt([Turn("user", "What?")])) + 6
    pair = PreferenceRecord("p", "made", (), question, "one long answer", "a longer answer still")
    write_records(tmp_path / "records.arrow", [pair])
    (both,) = in_tokens(tmp_path / "records.arrow", encoder(max_length=limit))
    assert [len(one.input_ids) for one in both.conversations] == [limit, limit]
    learnt = [char_tokenizer().decode([label for label in one.labels if label != IGNORE]) for one in both.conversations]
    assert learnt == [" one ", " a lo"]


def test_a_tower_without_class_token_loses_no_piece() -> None:
    """There, SigLIP's first piece is dropped as if it were CLIP's class token."""
    tower = SiglipVisionConfig(image_size=28, patch_size=14)

    def joined(select: str) -> int:
        config = joined_config(tower, Qwen2Config(), image_id=1, feature_layer=-2, feature_select=select)  # type: ignore[arg-type]
        return config.image_seq_length

    assert joined("full") == 4
    with pytest.raises(ConfigError, match=r"'siglip_vision_model' has none: .*feature_select: full"):
        joined("patch")


@pytest.mark.parametrize("aspect", ["pad", "square"])
def test_questions_show_images_as_training_did(aspect: str, tmp_path: Path) -> None:
    """There, three evaluations crop what training padded. Here the checkpoint knows, and nobody else is asked."""
    made = processor()
    made.image_processor.save_pretrained(tmp_path / "tower")
    made.image_processor = image_processor(tmp_path / "tower", aspect)  # type: ignore[arg-type]
    save_checkpoint(llava(layers=2), made, tmp_path / "model")
    _, loaded = load_checkpoint(tmp_path / "model")
    wide = Image.fromarray(np.arange(40 * 90 * 3, dtype=np.uint8).reshape(40, 90, 3))
    pixels = [one.image_processor(wide, return_tensors="np")["pixel_values"] for one in (made, loaded)]
    np.testing.assert_array_equal(*pixels)
    other = image_processor(tmp_path / "tower", "square" if aspect == "pad" else "pad")
    assert not np.array_equal(pixels[0], other(wide, return_tensors="np")["pixel_values"])
    # what answers questions shows these pixels to the model
    wide.save(tmp_path / "wide.png")
    model, template = llava(layers=2), get_template("vicuna_v1")
    seen = []
    model.model.vision_tower.register_forward_pre_hook(
        lambda tower, args, kwargs: seen.append((*args, *kwargs.values())[0]), with_kwargs=True
    )
    question = Question(id=1, text="<image>What?", images=(tmp_path / "wide.png",))
    list(Answerer(model, loaded, template).answer([question], max_new_tokens=1))
    np.testing.assert_array_equal(seen[0].numpy(), pixels[0])
