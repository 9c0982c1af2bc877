"""Control tokens in texts of the data stay text, when tokenising and when asking."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from data_records import IMAGE_TOKENS, char_tokenizer, encoder, in_tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mmpipe.data.control_tokens import GUARD, ControlTokens
from mmpipe.data.labels import IGNORE, encode
from mmpipe.data.record_table import write_records
from mmpipe.data.records import BadRecord, PreferenceRecord, Record, Turn
from mmpipe.data.templates import get_template, template_names
from mmpipe.data.tokens import TextEncoder
from mmpipe.errors import DataError
from mmpipe.models.llava import with_image_token
from mmpipe.report.pages import table_page

CONTROL = ["<|im_end|>", "<|im_start|>", "<|endoftext|>"]


def talk(*texts: str) -> tuple[Turn, ...]:
    return tuple(Turn("assistant" if i % 2 else "user", text) for i, text in enumerate(texts))


def record(*texts: str, images: tuple[str, ...] = ()) -> Record:
    return Record("r0", "made", images, talk(*texts))


@pytest.fixture(scope="module")
def qwen(demo_files: Path) -> Any:
    folder = demo_files / "resources/backbones/qwen2-tiny"
    return with_image_token(AutoTokenizer.from_pretrained(folder), folder)


@pytest.fixture(scope="module")
def merging() -> Any:
    """Byte pairs with Qwen2's rules for where words end, and runs of blanks and line breaks as tokens."""
    words = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    backend = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(words), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=[*CONTROL, "<image>"]
    )
    texts = ["a\n\nb", "a\n\n\nb", "a \nb", "a  b", ":\n", ":\n\n", "a\n b", "\t\n", ".\n"]
    backend.train_from_iterator(texts * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")


def chatml(tokenizer: Any, **changes: Any) -> TextEncoder:
    facts = {"template": get_template("chatml"), "tokenizer": tokenizer, "image_token": "<image>"}
    return TextEncoder(**{**facts, "tokens_per_image": IMAGE_TOKENS, **changes})


def special_tokens(tokenizer: Any, ids: list[int]) -> list[str]:
    return [tokenizer.convert_ids_to_tokens(i) for i in ids if i in tokenizer.added_tokens_decoder]


@pytest.mark.parametrize("token", [*CONTROL, "<image>"])
def test_control_tokens_in_an_answer_are_its_text(qwen: Any, token: str) -> None:
    answer = f"Write {token} and go on."
    encoded = chatml(qwen)(record("How does a turn end?", answer))
    plain = chatml(qwen)(record("How does a turn end?", "Write it and go on."))
    assert special_tokens(qwen, encoded.input_ids) == special_tokens(qwen, plain.input_ids)
    learnt = [label for label in encoded.labels if label != IGNORE]
    assert learnt.count(qwen.convert_tokens_to_ids("<|im_end|>")) == 1
    assert qwen.decode(learnt) == answer + "<|im_end|>"
    # as the tokenizer itself reads the text when told to split its special tokens
    assert learnt[:-1] == qwen(answer, split_special_tokens=True)["input_ids"]
    assert encoded.control == (token,)


def test_image_marks_in_questions_are_images_and_other_control_tokens_text(qwen: Any) -> None:
    encoded = chatml(qwen)(record("<image>\nWhat is <|im_end|>?", "See <image>.", images=("a.png",)))
    image_id = qwen.convert_tokens_to_ids("<image>")
    assert encoded.input_ids.count(image_id) == IMAGE_TOKENS
    text = qwen.decode([token for token in encoded.input_ids if token != image_id])
    assert "\nWhat is <|im_end|>?<|im_end|>\n" in text
    assert "See <image>.<|im_end|>" in text
    assert encoded.control == ("<|im_end|>", "<image>")


def test_html_snippets_keep_their_tags() -> None:
    encoded = encoder()(record("Fix <s>old</s> text.", "Use <del> for <s>."))
    tokens = char_tokenizer().convert_ids_to_tokens(encoded.input_ids)
    assert [token for token in tokens if len(token) > 1] == ["<s>", "</s>"]  # begin of text, end of the answer
    assert (tokens[0], tokens[-1], tokens.index("</s>")) == ("<s>", "</s>", len(tokens) - 1)
    assert "".join(tokens[1:-1]).endswith("Fix <s>old</s> text. ASSISTANT: Use <del> for <s>.")


@pytest.mark.parametrize("name", [name for name in template_names() if name != "tokenizer"])
@settings(max_examples=25, deadline=None)
@given(texts=st.lists(st.sampled_from([*CONTROL, "</s>", "a", " ", "\n", "é", "<|", "?"]), min_size=1, max_size=6))
def test_no_text_adds_a_control_token(qwen: Any, name: str, texts: list[str]) -> None:
    template = get_template(name)
    text = f"x{''.join(texts)}x"
    turns = [
        Turn(t.role, "<image>" + t.text if template.captions and t.role == "user" else t.text) for t in talk(text, text)
    ]
    control = ControlTokens(qwen)
    plain = encode(qwen, template.render([Turn(t.role, t.text.replace(text, "x")) for t in turns]), "<image>", 1)
    mixed = encode(qwen, template.render(control.guard_turns(turns)), "<image>", 1, control=control)
    assert special_tokens(qwen, mixed.input_ids) == special_tokens(qwen, plain.input_ids)
    assert qwen.decode(mixed.input_ids) == template.render(turns).text


@pytest.mark.parametrize("name", [name for name in template_names() if name != "tokenizer"])
@settings(max_examples=40, deadline=None)
@given(
    opening=st.text(st.sampled_from("\n \t\r\u00a0\u3000."), max_size=4),
    answer=st.sampled_from(["A cat.", "1", "(b)", "é", "<|im_end|>", "\u0301x"]),
)
def test_the_prompt_is_how_the_training_tokens_begin(merging: Any, name: str, opening: str, answer: str) -> None:
    template, control = get_template(name), ControlTokens(merging)
    for turns in (talk("<image>\nWhat?", opening + answer), talk("<image>\nA?", "b", "Sure?", opening + answer)):
        if template.captions and len(turns) > 2:
            continue
        guarded = control.guard_turns(turns)
        whole = encode(merging, template.render(guarded), "<image>", 1, control=control)
        asked = template.prompt(guarded[:-1])
        prompt = merging(asked)["input_ids"]
        assert whole.input_ids[: len(prompt)] == prompt
        # what follows the prompt is learnt
        assert whole.labels[len(prompt)] == whole.input_ids[len(prompt)]
        assert IGNORE in whole.labels[: len(prompt)] or not prompt


def test_an_answer_that_begins_with_a_line_break_is_learnt_from_its_beginning(merging: Any) -> None:
    assert len(merging("a\n\nb")["input_ids"]) == 3
    encoded = chatml(merging)(record("What?", "\nA cat."))
    assert merging.decode([label for label in encoded.labels if label != IGNORE]) == "\nA cat.<|im_end|>"


def test_control_tokens_kept_as_text_are_counted_and_named(tmp_path: Path) -> None:
    write_records(tmp_path / "records.arrow", [record("a", "b"), record("a <s> <s>", "</s>")])
    report = in_tokens(tmp_path / "records.arrow").report
    assert report["notes"] == {
        f"control token {token} kept as text": {"count": 1, "examples": ["made/r0"]} for token in ("</s>", "<s>")
    }
    table_page("tokens", tmp_path / "tokens/report.json", tmp_path / "page.html")
    assert "control token &lt;/s&gt; kept as text" in (tmp_path / "page.html").read_text()
    write_records(tmp_path / "records.arrow", [record("a", "b")])
    assert "notes" not in in_tokens(tmp_path / "records.arrow").report
    table_page("tokens", tmp_path / "tokens/report.json", tmp_path / "page.html")
    assert "Notes" not in (tmp_path / "page.html").read_text()


def test_the_code_point_of_the_guard_is_no_text() -> None:
    with pytest.raises(BadRecord, match=r"U\+FDD0"):
        encoder()(record("a", f"b{GUARD}"))


def test_a_text_longer_than_the_models_positions_is_dropped_counted_and_named(tmp_path: Path) -> None:
    write_records(tmp_path / "records.arrow", [record("a", "b"), record("a", "b" * 400)])
    table = in_tokens(tmp_path / "records.arrow", encoder(max_positions=300))
    assert [row.place for row in table] == [0]
    (fault,) = table.report["dropped"]["longer than the model's positions"]["examples"]
    assert "the language model has 300 positions" in fault
    with pytest.raises(DataError, match="longer than the model's positions: 1"):
        in_tokens(tmp_path / "records.arrow", encoder(max_positions=300), max_bad=0.1)
    # a text that is cut has positions enough
    assert len(in_tokens(tmp_path / "records.arrow", encoder(max_positions=300, max_length=300))) == 2


def test_pairs_that_are_equal_after_cutting_are_dropped_and_counted(tmp_path: Path) -> None:
    pairs = [
        PreferenceRecord(f"p{end}", "made", (), (Turn("user", "What?"),), "a" * 300 + end, "a" * 300 + "c")
        for end in ("b", "d" * 9)
    ]
    pairs.append(PreferenceRecord("short", "made", (), (Turn("user", "What?"),), "yes", "no"))
    write_records(tmp_path / "records.arrow", pairs)
    table = in_tokens(tmp_path / "records.arrow", encoder(max_length=300))
    assert [row.place for row in table] == [2]
    assert table.report["dropped"]["equal answers in tokens"]["count"] == 2
    assert len(in_tokens(tmp_path / "records.arrow", encoder(max_length=600))) == 3
