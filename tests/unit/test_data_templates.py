from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jinja2.sandbox  # noqa: F401
import pytest
from data_records import IMAGE_TOKENS, char_tokenizer, image, processor
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import LlavaProcessor, PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from mmpipe.data.labels import IGNORE, Rendered, encode
from mmpipe.data.records import BadRecord, PreferenceRecord, Record, Turn, check_record
from mmpipe.data.templates import Template, break_after_images, get_template, published, template_names, to_messages
from mmpipe.errors import ConfigError, DataError

FIXED = [name for name in template_names() if name != "tokenizer"]
MARKED = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}</s>{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def with_template(chat_template: str | None) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=char_tokenizer().backend_tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def template(name: str) -> Template:
    return get_template(name, with_template(MARKED))


def talk(*texts: str) -> list[Turn]:
    return [Turn("assistant" if i % 2 else "user", text) for i, text in enumerate(texts)]


def run_jinja(
    source: str, messages: list[dict[str, Any]], *, prompt: bool = False
) -> tuple[str, list[tuple[int, int]]]:
    texts, spans = render_jinja_template(  # type: ignore[misc]
        [messages],
        chat_template=source,
        return_assistant_tokens_mask=True,
        add_generation_prompt=prompt,
        bos_token="<s>",
    )
    return texts[0], [tuple(span) for span in spans[0]]


def images_first(turns: list[Turn]) -> list[Turn]:
    """The turns as parts of messages give them: images after all of the text stand before it."""

    def moved(text: str) -> str:
        body = text
        while body.endswith("<image>"):
            body = body.removesuffix("<image>")
        return text if "<image>" in body else text.removeprefix(body) + body

    return [Turn(turn.role, moved(turn.text)) for turn in turns]


words = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(str.strip)
pieces = st.lists(
    words | st.just("<image>") | st.sampled_from([" ", "\n", '"', "\\n", "{{ x }}", "{% y %}"]), min_size=1
)
questions = pieces.map("".join).filter(str.strip)
answers = words.filter(lambda text: "<image>" not in text)


@pytest.mark.parametrize("name", template_names())
@settings(max_examples=40, deadline=None)
@given(rounds=st.lists(st.tuples(questions, answers), min_size=1, max_size=3), system=st.none() | words)
def test_the_chat_template_renders_the_same_characters(
    name: str, rounds: list[tuple[str, str]], system: str | None
) -> None:
    chosen = template(name)
    turns = talk(*(text for pair in rounds for text in pair))
    if chosen.captions:
        turns = [Turn(t.role, t.text + "<image>" if t.role == "user" else t.text) for t in turns]
    if system:
        turns = [Turn("system", system), *turns]
    strings = [{"role": turn.role, "content": turn.text} for turn in turns]
    for messages, same in ((to_messages(turns), images_first(turns)), (strings, turns)):
        rendered = chosen.render(same)
        assert run_jinja(chosen.jinja(), messages) == (rendered.text, list(rendered.spans))
        assert run_jinja(chosen.jinja(), messages[:-1], prompt=True)[0] == chosen.prompt(same[:-1])


@pytest.mark.parametrize("name", template_names())
def test_the_prompt_is_how_the_training_text_begins(name: str) -> None:
    turns = talk("<image>\nWhat?", "A cat.", "<image>Sure?", "Yes.")
    rendered = template(name).render(turns)
    for answered in (1, 3):
        assert rendered.text.startswith(template(name).prompt(turns[:answered]))
    # What is supervised begins exactly where generation begins, and ends with what stops it.
    assert rendered.spans[1][0] == len(template(name).prompt(turns[:3]))
    learnt = [rendered.text[start:end] for start, end in rendered.spans]
    assert [text.strip() for text in learnt] == [
        (answer + text.partition(answer)[2]).strip() for answer, text in zip(("A cat.", "Yes."), learnt, strict=True)
    ]
    assert all(template(name).stop in text for text in learnt)


@pytest.mark.parametrize("name", FIXED)
def test_text_before_the_images_gives_the_prompt_with_the_images_first(name: str) -> None:
    def content(*parts: str) -> list[dict[str, str]]:
        return [{"type": "image"} if part == "<image>" else {"type": "text", "text": part} for part in parts]

    def prompt(*parts: str) -> str:
        return run_jinja(template(name).jinja(), [{"role": "user", "content": content(*parts)}], prompt=True)[0]

    first = template(name).prompt(talk("<image>\nWhat is it?"))
    assert prompt("What is it?", "<image>") == prompt("<image>", "What is it?") == first
    two = template(name).prompt(talk("<image><image>\nWhich of both?"))
    assert prompt("Which", " of both?", "<image>", "<image>") == two
    between = template(name).prompt(talk("In <image> or <image>?"))
    assert prompt("In ", "<image>", " or ", "<image>", "?") == between


@pytest.mark.parametrize("name", template_names())
@pytest.mark.parametrize("engine", ["jinja2", "minijinja"])
def test_stored_chat_templates_render_without_transformers(name: str, engine: str) -> None:
    stored = published(template(name).jinja())
    turns = [*talk("<image>\nWhat?", "A cat.", "Where <image>?", "There."), Turn("user", "<image>\nSure?")]
    chat = {"messages": to_messages(turns), "add_generation_prompt": True, "bos_token": "<s>"}
    module = pytest.importorskip(engine)
    if engine == "jinja2":
        rendered = module.sandbox.ImmutableSandboxedEnvironment().from_string(stored).render(**chat)
    else:
        rendered = module.Environment().render_str(stored, **chat)
    assert rendered == template(name).prompt(turns)


@pytest.mark.parametrize("name", template_names())
@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([], "no conversation"),
        ([Turn("system", "x")], "no conversation"),
        (talk("a"), "odd turn order"),
        (talk("a", "b", "c"), "odd turn order"),
        ([Turn("assistant", "a"), Turn("user", "b")], "odd turn order"),
        ([Turn("user", "a"), Turn("system", "s"), Turn("assistant", "b")], "odd turn order"),
        (talk("a", ""), "empty answer"),
        (talk("a", " \n"), "empty answer"),
        (talk(" ", "b"), "empty question"),
        ([Turn("system", ""), *talk("a", "b")], "empty system message"),
        ([Turn("cat", "a")], "unknown role"),  # type: ignore[arg-type]
    ],
)
def test_malformed_conversations_are_refused(name: str, turns: list[Turn], reason: str) -> None:
    with pytest.raises(BadRecord) as error:
        template(name).render(turns)
    assert error.value.reason == reason


def test_a_role_marker_in_an_answer_is_supervised_like_the_rest() -> None:
    turns = talk("Say it.", "USER: x ASSISTANT: y", "Again.", "z")
    rendered = get_template("vicuna_v1").render(turns)
    assert [rendered.text[start:end] for start, end in rendered.spans] == [" USER: x ASSISTANT: y</s>", " z</s>"]


def test_a_system_message_takes_the_place_of_the_default() -> None:
    turns = [Turn("system", "Be brief."), *talk("a", "b")]
    assert get_template("vicuna_v1").render(turns).text == "Be brief. USER: a ASSISTANT: b</s>"
    assert get_template("llava_llama_2").prompt(turns[:2]) == "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\na [/INST]"


def test_plain_shows_images_alone_and_supervises_caption_and_line_break() -> None:
    rendered = get_template("plain").render(talk("Describe it.\n<image>", "A cat."))
    assert rendered == Rendered("<image>A cat.\n", ((7, 14),))
    with pytest.raises(BadRecord, match="no image"):
        get_template("plain").render(talk("Describe it.", "A cat."))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<image>What?", "<image>\nWhat?"),
        ("<image><image>What?", "<image><image>\nWhat?"),
        ("<image>\nWhat?", "<image>\nWhat?"),
        ("<image> What?", "<image> What?"),
        ("<image>", "<image>"),
        ("In <image>it", "In <image>it"),
        ("What?", "What?"),
    ],
)
def test_a_line_break_follows_images_at_the_head(text: str, expected: str) -> None:
    assert break_after_images(text) == expected


def test_an_unknown_template_is_named_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'vicuna_v1'"):
        get_template("vicuna_v2")
    with pytest.raises(ConfigError, match="tokenizer is at hand"):
        get_template("tokenizer")


@pytest.mark.parametrize(
    ("chat_template", "message"),
    [
        (None, "has no chat template"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "no {% generation %} marks"),
        (
            MARKED.replace("</s>{% endgeneration %}", "{% endgeneration %}</s>"),
            "leave out the token that ends an answer",
        ),
        (MARKED.replace("%}[assistant]{%", "%}[model]{%"), "another text than it trains on"),
        (MARKED + "{{ 1 / 0 }}", "cannot be used: ZeroDivisionError"),
        (MARKED + "{{ 'x' * 2000000000 }}", "cannot be used: it takes more than 1024 MiB of memory"),
        ("{% generation %}{% endfor %}", "cannot be used: TemplateSyntaxError"),
    ],
)
def test_a_tokenizers_template_must_mark_supervised_text(chat_template: str | None, message: str) -> None:
    with pytest.raises(DataError) as error:
        get_template("tokenizer", with_template(chat_template))
    assert message in str(error.value)


def test_a_tokenizers_template_is_used_as_it_is() -> None:
    chosen = template("tokenizer")
    rendered = chosen.render(talk("<image>hi", "yo"))
    assert rendered.text == "<s>[user]<image>\nhi[assistant]yo</s>"
    assert chosen.stop == "</s>"
    ids = encode(char_tokenizer(), rendered, "<image>", 1).input_ids
    assert ids.count(char_tokenizer().bos_token_id) == 1


def test_the_template_must_belong_to_the_tokenizer() -> None:
    for name in ("vicuna_v1", "qwen", "chatml", "plain"):
        get_template(name).check(char_tokenizer())
    with pytest.raises(DataError, match="ends answers with '</s>', which is no token of the tokenizer there"):
        get_template("vicuna_v1").check(_without_end_token())


def _without_end_token() -> PreTrainedTokenizerFast:
    description = json.loads(char_tokenizer().backend_tokenizer.to_str())
    description["added_tokens"] = [t for t in description["added_tokens"] if t["content"] != "</s>"]
    backend = Tokenizer.from_str(json.dumps(description))
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", name_or_path="there")


@pytest.mark.parametrize("name", FIXED)
def test_the_processor_of_a_checkpoint_gives_the_same_tokens_mask_and_pixels(name: str, tmp_path: Path) -> None:
    """What is trained on is what anybody gets who loads the checkpoint with transformers."""
    chosen, tokenizer = get_template(name), char_tokenizer()
    path = str(image(tmp_path / "a.png"))
    turns = talk("<image>What?", "A cat.", "Where <image>?", "There.")
    hf = LlavaProcessor(
        processor(),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chosen.jinja(),
    )
    messages = to_messages(turns)
    for message in messages:
        message["content"] = [p | {"path": path} if p["type"] == "image" else p for p in message["content"]]
    theirs = hf.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt"
    )
    ours = encode(tokenizer, chosen.render(turns), "<image>", IMAGE_TOKENS)
    assert theirs["input_ids"][0].tolist() == ours.input_ids
    assert [label != IGNORE for label in ours.labels] == theirs["assistant_masks"][0].bool().tolist()


# Encoding ------------------------------------------------------------------------------------------------


def encoded(text: str, *spans: tuple[int, int], **options: Any) -> tuple[list[str], list[str]]:
    tokenizer = options.pop("tokenizer", char_tokenizer())
    made = encode(tokenizer, Rendered(text, spans), options.pop("image_token", "<image>"), 2, **options)
    assert len(made.input_ids) == len(made.labels)
    learnt = [label for label in made.labels if label != IGNORE]
    assert made.supervised == len(learnt)
    return tokenizer.convert_ids_to_tokens(made.input_ids), tokenizer.convert_ids_to_tokens(learnt)


def test_each_mark_becomes_so_many_image_tokens() -> None:
    tokens, learnt = encoded("a<image>b<image>c", (0, 1), (8, 9))
    assert tokens == ["<s>", "a", "<image>", "<image>", "b", "<image>", "<image>", "c"]
    assert learnt == ["a", "b"]


def test_image_tokens_and_bos_are_never_supervised() -> None:
    tokens, learnt = encoded("a<image>b", (0, 9))
    assert tokens[0] == "<s>"
    assert learnt == ["a", "b"]


def test_bos_is_not_doubled() -> None:
    assert encoded("<s>a")[0] == ["<s>", "a"]
    assert encoded("a", tokenizer=char_tokenizer(bos=False))[0] == ["a"]


def test_another_image_token_moves_the_spans() -> None:
    tokens, learnt = encoded("<image>a<image>bc", (7, 8), (16, 17), image_token="<|im_start|>")
    assert tokens == ["<s>", *["<|im_start|>"] * 2, "a", *["<|im_start|>"] * 2, "b", "c"]
    assert learnt == ["a", "c"]


def test_an_image_token_in_the_text_is_not_taken_for_an_image() -> None:
    with pytest.raises(BadRecord, match="the text itself contains"):
        encoded("<image>a<|im_start|>", (7, 8), image_token="<|im_start|>")


def test_text_is_cut_from_the_right() -> None:
    tokens, learnt = encoded("<image>abcdef", (7, 13), max_length=5)
    assert tokens == ["<s>", "<image>", "<image>", "a", "b"]
    assert learnt == ["a", "b"]
    assert encoded("ab", (1, 2), max_length=3)[0] == ["<s>", "a", "b"]


@pytest.mark.parametrize("max_length", [4, 5, 6])
def test_an_image_is_never_cut(max_length: int) -> None:
    with pytest.raises(BadRecord, match="would lose part of an image") as error:
        encoded("abcd<image>e", (0, 1), max_length=max_length)
    assert error.value.reason == "too long for its images"
    assert encoded("abcd<image>e", (0, 1), max_length=7)[0][-2:] == ["<image>", "<image>"]


def test_a_sample_without_anything_to_learn_is_refused() -> None:
    with pytest.raises(BadRecord, match="nothing of the answer is left"):
        encoded("abcdef", (4, 6), max_length=4)


def test_a_tokenizer_without_image_token_is_named() -> None:
    with pytest.raises(DataError, match="has no token '<photo>'"):
        encoded("a", image_token="<photo>")


def test_records_count_their_marks() -> None:
    def record(*texts: str, images: int = 1) -> Record:
        return Record("a", "b", tuple("i" * images), tuple(talk(*texts)))

    check_record(record("<image>a", "b"))
    check_record(record("a <image>", "b", "<image>", "c", images=2))
    for bad in (record("a", "b"), record("<image>a", "b", images=0), record("<image>a", "<image>", images=2)):
        with pytest.raises(BadRecord):
            check_record(bad)
    for same in ("x", "x ", "\nx"):
        with pytest.raises(BadRecord, match="equal answers"):
            check_record(PreferenceRecord("a", "b", (), tuple(talk("q")), "x", same))
    with pytest.raises(BadRecord, match="empty answer"):
        check_record(PreferenceRecord("a", "b", (), tuple(talk("q")), "x", " "))
