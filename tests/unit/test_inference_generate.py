"""Answers do not depend on batch size, on sharing the image's cache, or on neighbours."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from mmpipe.benchmarks.base import Question
from mmpipe.data.templates import get_template
from mmpipe.errors import DataError
from mmpipe.inference.generate import Answerer, EncodedQuestion, _batches, _common

PATCHES = 16


class Images:
    """Stands for an image processor: 32 x 32 pixels, scaled to [-1, 1]."""

    def __call__(self, images: list[Image.Image], return_tensors: str) -> dict[str, torch.Tensor]:
        pixels = [torch.tensor(list(i.resize((32, 32)).tobytes())).view(32, 32, 3) for i in images]
        return {"pixel_values": torch.stack(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1}


def make_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<image>", "<|im_start|>", "<|im_end|>"],
    )


@pytest.fixture(scope="module")
def checkpoint():
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, Qwen2Config

    tokenizer = make_tokenizer()
    torch.manual_seed(3)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            patch_size=8,
        ),
        text_config=Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=PATCHES,
    )
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # far from uniform: a wrong mask or position changes the answers
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    processor = SimpleNamespace(tokenizer=tokenizer, image_processor=Images(), image_token="<image>")
    return model, processor


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    images = [tmp_path_factory.mktemp("images") / "p.png" for _ in range(3)]
    for number, path in enumerate(images):
        Image.linear_gradient("L").rotate(90 * number).convert("RGB").save(path)
    asked = [
        Question(id=n, text="What is it?" + " Really" * (n % 4) + "!" * n, images=(images[n % 3],)) for n in range(14)
    ]
    asked.append(Question(id="text", text="Two and two?"))
    asked.append(Question(id="two", text="<image> or <image>?", images=(images[0], images[1])))
    asked.append(Question(id="late", text="Look here first: <image>", images=(images[0],)))
    return asked


def texts(answerer, questions, **settings):
    return {a["question_id"]: a for a in answerer.answer(questions, max_new_tokens=12, **settings)}


@pytest.fixture(scope="module")
def one_by_one(checkpoint, questions):
    answerer = Answerer(*checkpoint, get_template("qwen"), model_id="m")
    return texts(answerer, questions, batch_size=1, share_prefix=False)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize("share_prefix", [True, False])
def test_answers_do_not_depend_on_the_batch(checkpoint, questions, one_by_one, batch_size, share_prefix):
    answerer = Answerer(*checkpoint, get_template("qwen"), model_id="m")
    assert texts(answerer, questions, batch_size=batch_size, share_prefix=share_prefix) == one_by_one


def test_answers_depend_on_image_and_text(one_by_one):
    assert len({a["text"] for a in one_by_one.values()}) > len(one_by_one) // 2


def test_answer_record_is_llava_s_and_deterministic(checkpoint, questions):
    answerer = Answerer(*checkpoint, get_template("qwen"), model_id="run/finetune")
    asked = Question(
        id=7, text="Q\nsuffix", images=questions[0].images, prompt="Q", extra={"round_id": 0, "options": ["x"]}
    )
    first, second = (next(answerer.answer([asked], max_new_tokens=3)) for _ in range(2))
    assert first == second
    assert list(first) == [
        "question_id", "prompt", "text", "round_id", "options", "answer_id", "model_id", "metadata",
    ]  # fmt: skip
    assert (first["prompt"], first["model_id"], len(first["answer_id"])) == ("Q", "run/finetune", 22)
    other = Answerer(*checkpoint, get_template("qwen"), model_id="other")
    assert next(other.answer([asked], max_new_tokens=3))["answer_id"] != first["answer_id"]


def test_generation_stops_at_the_end_token(checkpoint, questions):
    model, processor = checkpoint
    answerer = Answerer(model, processor, get_template("qwen"))
    reply = answerer._greedy(
        answerer._groups([EncodedQuestion(questions[0], answerer._encode(questions[0]))]), 12, 4, None
    )[0]
    assert (reply.ended, len(reply.ids)) == (False, 12)
    answerer.stop_ids = frozenset({reply.ids[4]})
    cut = texts(answerer, questions[:1])[0]
    assert cut["metadata"] == {"tokens": reply.ids.index(reply.ids[4]) + 1, "ended": True}


def test_stop_text_that_is_no_token_cuts_the_answer(checkpoint, questions):
    model, processor = checkpoint
    plain = Answerer(model, processor, get_template("plain"))
    assert not plain._stops_by_token
    newline = processor.tokenizer("a\nb", add_special_tokens=False)["input_ids"]
    assert [plain._stopped(newline[:n]) for n in (1, 2)] == [False, True]


def test_stop_text_works_in_every_way_of_generating(checkpoint, questions):
    """The reply is cut where the stop text begins, whichever engine runs."""
    answerer = Answerer(*checkpoint, get_template("qwen"))
    free = texts(answerer, questions[:4])[0]["text"]
    cut_at = free[3:5]

    class Stopping:
        stop = cut_at
        captions = False

        def prompt(self, turns):
            return get_template("qwen").prompt(turns)

    for settings in ({}, {"share_prefix": False}, {"batch_size": 2}):
        stopping = Answerer(*checkpoint, Stopping())
        assert not stopping._stops_by_token
        found = texts(stopping, questions[:4], **settings)[0]
        assert found["text"] == free[: free.index(cut_at)].strip()
        assert found["metadata"]["ended"]


def test_a_checkpoint_of_captions_is_asked_nothing(checkpoint, questions):
    answerer = Answerer(*checkpoint, get_template("plain"), model_id="demo@pretrain")
    with pytest.raises(DataError, match=r"demo@pretrain.*captions.*later stage"):
        list(answerer.answer(questions[:1]))


def test_marks_and_images_must_agree(checkpoint, questions):
    answerer = Answerer(*checkpoint, get_template("qwen"))
    wrong = Question(id=5, text="<image> <image>", images=questions[0].images)
    with pytest.raises(DataError, match="question 5: 2 image marks for 1 images"):
        list(answerer.answer([wrong]))


def test_unreadable_image_is_named(checkpoint, tmp_path):
    bad = tmp_path / "broken.jpg"
    bad.write_bytes(b"\xff\xd8\xff not an image")
    answerer = Answerer(*checkpoint, get_template("qwen"))
    with pytest.raises(DataError, match=r"broken\.jpg"):
        list(answerer.answer([Question(id=1, text="?", images=(bad,))]))


def test_beams_are_searched(checkpoint, questions, one_by_one):
    answerer = Answerer(*checkpoint, get_template("qwen"))
    beams = texts(answerer, questions[:3], num_beams=3, batch_size=1)
    assert any(beams[i]["text"] != one_by_one[i]["text"] for i in beams)


def test_batches_keep_groups_together(checkpoint, questions):
    answerer = Answerer(*checkpoint, get_template("qwen"))
    groups = answerer._groups([EncodedQuestion(q, answerer._encode(q)) for q in questions])
    assert sorted(len(f.rows) for f in groups) == [1, 1, 1, 4, 5, 5]
    for size in (1, 4, 9, 100):
        batches = list(_batches(groups, size))
        assert all(len(batch) == 1 or sum(len(f.rows) for f in batch) <= size for batch in batches)
        asked = [str(r.question.id) for b in batches for f in b for r in f.rows]
        assert sorted(asked) == sorted(str(q.id) for q in questions)


def test_common_beginning_leaves_every_row_a_token():
    row = Question(id=0, text="")
    assert _common([EncodedQuestion(row, (1, 2, 3)), EncodedQuestion(row, (1, 2, 3))]) == 2
    assert _common([EncodedQuestion(row, (1, 2)), EncodedQuestion(row, (1, 2, 3))]) == 1
    assert _common([EncodedQuestion(row, (1, 5, 3)), EncodedQuestion(row, (1, 2, 3))]) == 1


def test_likelihood_is_that_of_the_tokens_one_by_one(checkpoint, questions):
    model, _ = checkpoint
    answerer = Answerer(*checkpoint, get_template("qwen"))
    pairs = [(question, text) for question in questions[:4] for text in (" Yes", " A longer one", "")]
    expected = []
    for question, text in pairs:
        ids = list(answerer._encode(question))
        said, greedy = 0.0, True
        for token in answerer.tokenizer(text, add_special_tokens=False)["input_ids"]:
            with torch.inference_mode():
                out = model(input_ids=torch.tensor([ids]), pixel_values=answerer.inputs([question]).get("pixel_values"))
            scores = out.logits[0, -1].log_softmax(-1)
            said, greedy = said + float(scores[token]), greedy and int(scores.argmax()) == token
            ids.append(token)
        expected.append((pytest.approx(said, abs=1e-3), greedy))
    assert list(answerer.likelihood(pairs, batch_size=5)) == expected
    assert list(answerer.likelihood(pairs, batch_size=1)) == expected
    best = [(question, answerer.tokenizer.decode([_greedy_token(answerer, question)])) for question in questions[:3]]
    likely = list(answerer.likelihood(best))
    assert all(greedy for (_, text), (_, greedy) in zip(best, likely, strict=True) if "\ufffd" not in text)


def _greedy_token(answerer, question):
    with torch.inference_mode():
        return int(answerer.model(**answerer.inputs([question])).logits[0, -1].argmax())
