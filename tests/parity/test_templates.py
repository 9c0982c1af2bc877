"""Prompts, token ids and labels against those of LLaVA, LLaVA-MoD and LibMoE."""

from __future__ import annotations

from typing import Any

import pytest
from reference_tokenizers import numbers, tokenizer, toy_qwen, vectors

from mmpipe.data.dataset import Collator, Sample
from mmpipe.data.labels import IGNORE, Rendered, encode
from mmpipe.data.records import BadRecord, Turn
from mmpipe.data.templates import get_template
from mmpipe.data.verify import images_first

REFERENCE_IMAGE = -200
NAMES = {"v1": "vicuna_v1"}
LABELS = vectors("llava/labels.json")["cases"]
# The reference masks these samples completely: an answer that contains its separator, and whole classes of
# tokenizers whose pieces it miscounts. We supervise them; the ids stay equal.
MASKED_BY_MISTAKE = [case for case in LABELS if case["warning"] and case["case"] != "empty_answer"]
EMPTY = [case for case in LABELS if case["case"] == "empty_answer"]
TRUNCATED = [case for case in LABELS if "maxlen" in case["case"]]
WELL_FORMED = [case for case in LABELS if not case["warning"] and case not in EMPTY + TRUNCATED]
# Tokenised in pieces, the text after an image begins with a space of its own; tokenised at once it does not,
# unless the tokenizer is a legacy one. One pass is what every processor does when the model is used.
SPACE_AFTER_IMAGE = [case for case in WELL_FORMED if case["tokenizer"] == "sp_nonlegacy"]
EXACT = [case for case in WELL_FORMED if case not in SPACE_AFTER_IMAGE]


def name(case: dict[str, Any]) -> str:
    return f"{case['version']}-{case['tokenizer']}-{case['case']}"


def turns(messages: list[dict[str, str]]) -> tuple[Turn, ...]:
    """The reference drops an answer before the first question, as the reader of its format does."""
    read = [Turn("user" if m["from"] == "human" else "assistant", m["value"]) for m in messages]
    return tuple(read[1:] if read[0].role == "assistant" else read)


def ours(case: dict[str, Any]) -> tuple[list[int], list[int]]:
    uses = tokenizer(case["tokenizer"])
    template = get_template(NAMES.get(case["version"], case["version"]))
    rendered = template.render(turns(case["after_preprocess_multimodal"]))
    encoded = encode(uses, rendered, "<image>", 1)
    image_id = uses.convert_tokens_to_ids("<image>")
    return [REFERENCE_IMAGE if i == image_id else i for i in encoded.input_ids], encoded.labels


@pytest.mark.parametrize("case", EXACT, ids=name)
def test_labels_equal_llava(case: dict[str, Any]) -> None:
    assert ours(case) == (case["input_ids"], case["labels"])


@pytest.mark.parametrize("case", SPACE_AFTER_IMAGE, ids=name)
def test_labels_equal_llava_but_for_the_space_after_an_image(case: dict[str, Any]) -> None:
    ids, labels = list(case["input_ids"]), list(case["labels"])
    if REFERENCE_IMAGE in ids:
        after = ids.index(REFERENCE_IMAGE) + 1
        piece = tokenizer("sp_nonlegacy").convert_ids_to_tokens(ids[after])
        assert piece.startswith("▁")
        if piece == "▁":
            del ids[after], labels[after]
        else:
            ids[after] = tokenizer("sp_nonlegacy").convert_tokens_to_ids(piece.removeprefix("▁"))
            labels[after] = IGNORE if labels[after] == IGNORE else ids[after]
    assert ours(case) == (ids, labels)


@pytest.mark.parametrize("case", MASKED_BY_MISTAKE, ids=name)
def test_supervises_what_llava_masks_by_mistake(case: dict[str, Any]) -> None:
    assert all(label == IGNORE for label in case["labels"])
    ids, labels = ours(case)
    assert ids == case["input_ids"]
    learnt = tokenizer(case["tokenizer"]).decode([label for label in labels if label != IGNORE])
    for turn in turns(case["after_preprocess_multimodal"]):
        assert (turn.role == "assistant") == (turn.text in learnt)


@pytest.mark.parametrize("case", EMPTY, ids=name)
def test_refuses_an_empty_answer(case: dict[str, Any]) -> None:
    with pytest.raises(BadRecord, match="empty answer"):
        ours(case)


def test_cuts_text_where_llava_cuts_it() -> None:
    (case,) = [case for case in TRUNCATED if case["case"].startswith("two_text")]
    rendered = get_template("vicuna_v1").render(turns(case["after_preprocess_multimodal"]))
    cut = encode(tokenizer(case["tokenizer"]), rendered, "<image>", 1, case["model_max_length"])
    assert (cut.input_ids, cut.labels) == (case["input_ids"], case["labels"])


@pytest.mark.parametrize("case", vectors("llava/prompts.json"), ids=lambda c: f"{c['template']}-{c['case']}")
def test_prompts_equal_llava(case: dict[str, Any]) -> None:
    template = get_template(case["template"])
    said = [Turn("user" if who == "U" else "assistant", text) for who, text in case["messages"] if text]
    is_open = case["messages"][-1][1] is None
    assert (template.prompt(said) if is_open else template.render(said).text) == case["prompt"]


@pytest.mark.parametrize("template", ["phi3", "phi35"])
def test_prompts_equal_libmoe(template: str) -> None:
    expected = vectors("libmoe/prompts.json")[template]
    question = Turn("user", "<image>\nWhat is this?")
    dialogue = (question, Turn("assistant", "A cat."), Turn("user", "Colour?"), Turn("assistant", "Black."))
    assert get_template(template).prompt([question]) == expected["generation_prompt"]
    assert get_template(template).render(dialogue).text == expected["training_prompt_two_turns"]


def test_libmoe_supervises_the_answer_and_its_end() -> None:
    rendered = get_template("phi3").render([Turn("user", "What?"), Turn("assistant", "A cat.")])
    assert [rendered.text[start:end] for start, end in rendered.spans] == ["A cat.<|end|>\n"]


LLAVA_MOD = vectors("llava_mod/11_prompt_and_label_mask.json")


@pytest.mark.parametrize("case", LLAVA_MOD["expected"])
def test_labels_equal_llava_mod(case: str) -> None:
    expected = LLAVA_MOD["expected"][case]
    rendered = get_template("qwen").render(turns(expected["conversation"]))
    assert rendered.text == expected["prompt"]
    toy = toy_qwen(expected["pieces"], LLAVA_MOD["toy_tokenizer_regex"])
    encoded = encode(toy, rendered, "<image>", 1)
    assert toy.convert_ids_to_tokens(encoded.input_ids) == expected["pieces"]
    positions = [i for i, label in enumerate(encoded.labels) if label != IGNORE]
    if expected["warning"]:
        assert expected["supervised_positions"] == []
        assert toy.convert_ids_to_tokens([encoded.labels[i] for i in positions]) == expected["pieces"][-5:-1] + [
            "<|endoftext|>"
        ]
    else:
        assert positions == expected["supervised_positions"]


def test_inference_prompt_equals_llava_mod() -> None:
    question = "<image>\nIs there a dog in the image?\nAnswer the question using a single word or phrase."
    assert get_template("qwen").prompt([Turn("user", question)]) == LLAVA_MOD["inference_prompt"]


@pytest.mark.parametrize("case", vectors("llava/preprocess_multimodal.json"), ids=lambda c: repr(c["value"]))
def test_images_first_equals_llava(case: dict[str, Any]) -> None:
    if case["value"].count("<image>") > 1:
        # The reference leaves one mark for two images, whose features then go astray.
        assert images_first(case["value"]) == "<image>" + case["out"]
    else:
        assert images_first(case["value"]) == case["out"]


SPLICE = vectors("llava/splice.json")["cases"]


@pytest.mark.parametrize(
    "case",
    [c for c in SPLICE if c["padding_side"] == "right" and c["labels"] and not c["tokenizer_model_max_length"]],
    ids=lambda c: c["name"],
)
def test_expansion_and_padding_equal_llavas_splice(case: dict[str, Any]) -> None:
    """The reference puts features between embeddings; we put as many placeholders between tokens."""
    toy = numbers(30000)
    image_id = toy.convert_tokens_to_ids("<image>")
    samples = []
    for ids, labels in zip(case["input_ids"], case["labels"], strict=True):
        encoded = encode(toy, _numbered_text(ids, labels), "<image>", 4)
        samples.append(
            Sample(
                id="",
                input_ids=_tensor(encoded.input_ids),
                labels=_tensor(encoded.labels),
                pixel_values=[],
                index=len(samples),
                replaced=(),
            )
        )
    batch = Collator(0, (2, 2))(samples)
    expected_ids = [[image_id if value < 0 else value for value in row] for row in case["embeds"]]
    assert batch["input_ids"].tolist() == expected_ids
    assert batch["labels"].tolist() == case["labels_out"]
    assert batch["attention_mask"].tolist() == case["attention_mask"]


def test_cuts_after_expansion_as_llavas_splice() -> None:
    (case,) = [c for c in SPLICE if c["tokenizer_model_max_length"]]
    toy, limit = numbers(30000), case["tokenizer_model_max_length"]
    asking_only, answering = map(_numbered_text, case["input_ids"], case["labels"])
    cut = encode(toy, answering, "<image>", 4, limit)
    assert cut.labels == case["labels_out"][1]
    # Nothing of the first sample's answer is left: the reference trains on it for nothing.
    assert all(label == IGNORE for label in case["labels_out"][0])
    with pytest.raises(BadRecord, match="question too long"):
        encode(toy, asking_only, "<image>", 4, limit)


def _numbered_text(ids: list[int], labels: list[int]) -> Rendered:
    text, spans = "", []
    for token, label in zip(ids, labels, strict=True):
        word = "<image>" if token == REFERENCE_IMAGE else f"t{token}"
        if label != IGNORE:
            spans.append((len(text), len(text) + len(word)))
        text += word + " "
    return Rendered(text, tuple(spans))


def _tensor(values: list[int]) -> Any:
    import torch

    return torch.tensor(values)
