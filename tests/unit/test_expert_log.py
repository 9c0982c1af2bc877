"""The log of experts: right whatever the batch, never padding, once for a shared image, whole after a kill."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tiny_llava import llava, processor

from mmpipe.analysis.expert_log import ExpertLog, merge, pieces, places, read_layer
from mmpipe.benchmarks.base import Question
from mmpipe.data.templates import get_template
from mmpipe.errors import ConfigError
from mmpipe.inference.chunks import answer_chunk
from mmpipe.inference.generate import Answerer
from mmpipe.models.moe.hooks import Place, without_first
from mmpipe.models.moe.spec import MoESettings
from mmpipe.models.moe.upcycle import upcycle
from mmpipe.models.vision_tower import enable_multi_scale, tiles

PARTS: dict[Any, MoESettings] = {
    "vision_tower": MoESettings(experts=3, top_k=2, placement="dense"),
    "multi_modal_projector": MoESettings(experts=3, top_k=2, placement="dense", router="cosine"),
    "language_model": MoESettings(experts=4, top_k=2, placement="sparse"),
}


def sparse(compat: str = "fixed", **changes: Any) -> Any:
    model = llava()
    model.config.image_seq_length = 4
    for part, settings in PARTS.items():
        upcycle(model, settings.model_copy(update={"compat": compat, **changes}), part=part, seed=1)
    torch.manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts" in name or "router" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.fixture(scope="module")
def model() -> Any:
    return sparse()


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> list[Question]:
    folder = tmp_path_factory.mktemp("images")
    images = [folder / f"{n}.png" for n in range(3)]
    for number, path in enumerate(images):
        Image.linear_gradient("L").rotate(90 * number).convert("RGB").save(path)
    asked = [
        Question(id=f"q{n // 2}", text="Is it?" + " Really" * (n % 3) + "!" * n, images=(images[n % 2],))
        for n in range(7)
    ]
    asked.append(Question(id="text", text="Two and two?"))
    asked.append(Question(id="two", text="<image> or <image>?", images=(images[2], images[0])))
    return asked


def logged(
    model: Any, questions: list[Question], folder: Path, layers: Any = None, **how: Any
) -> tuple[Path, list[Any]]:
    log = ExpertLog(model, folder / "pieces", questions, layers=layers)
    answerer = Answerer(model, processor(), get_template("qwen"))
    answers = list(answerer.answer(questions, max_new_tokens=5, log=log, **how))
    merge(pieces(folder / "pieces"), folder / "experts.parquet")
    return folder / "experts.parquet", answers


def rows(path: Path) -> list[dict[str, Any]]:
    return pq.read_table(path).to_pylist()


def computed(path: Path) -> Counter[Any]:
    """Every token a model without sharing would compute, however the log shares it."""
    result: Counter[Any] = Counter()
    for r in rows(path):
        if r["part"] != "language_model":
            # which question an image stands under depends on sharing; that it was computed does not
            r |= {"question": None}
        key = (r["part"], r["layer"], r["scale"], r["position"], r["kind"], tuple(r["experts"]))
        result[key] += r["shared_by"]
    return result


@pytest.fixture(scope="module")
def one_by_one(model: Any, questions: list[Question], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return logged(model, questions, tmp_path_factory.mktemp("one"), batch_size=1, share_prefix=False)[0]


def truth(model: Any, question: Question, answer: dict[str, Any]) -> dict[Place, Any]:
    """The choices for one question computed alone in one forward pass over prompt and answer."""
    answerer = Answerer(model, processor(), get_template("qwen"))
    ids = list(answerer._encode(question))
    seen: dict[int, Any] = {}
    handles = []
    for index, layer in enumerate(model.model.language_model.layers):
        if hasattr(layer.mlp, "router"):
            handles.append(
                layer.mlp.router.register_forward_hook(
                    lambda m, a, routing, index=index: seen.__setitem__(index, routing)
                )
            )
    with torch.inference_mode():
        model(input_ids=torch.tensor([ids]), pixel_values=answerer.inputs([question]).get("pixel_values"))
    for handle in handles:
        handle.remove()
    return {Place("language_model", i): r for i, r in seen.items()}


def test_the_log_holds_the_choices_of_the_layers(model: Any, questions: list[Question], one_by_one: Path) -> None:
    for number in (0, 7, 8):
        expected = truth(model, questions[number], {})
        for place, routing in expected.items():
            table = read_layer(one_by_one, place)
            assert table is not None
            mine = [r for r in table.to_pylist() if r["question"] == number and r["kind"] != "generated"]
            assert [r["position"] for r in mine] == list(range(len(routing.indices_TK)))
            assert [r["experts"] for r in mine] == routing.indices_TK.tolist()
            np.testing.assert_allclose([r["weights"] for r in mine], routing.weights_TK, atol=1e-3)
            assert {r["question_id"] for r in mine} == {str(questions[number].id)}


@pytest.mark.parametrize("share_prefix", [True, False])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_a_log_does_not_depend_on_the_batch(
    model: Any, questions: list[Question], one_by_one: Path, tmp_path: Path, batch_size: int, share_prefix: bool
) -> None:
    path, _ = logged(model, questions, tmp_path, batch_size=batch_size, share_prefix=share_prefix)
    assert computed(path) == computed(one_by_one)


def test_padding_that_is_routed_is_not_logged(questions: list[Question], tmp_path: Path) -> None:
    reference = sparse("reference")
    alone, _ = logged(reference, questions, tmp_path / "a", batch_size=1, share_prefix=False)
    for share_prefix in (True, False):
        path, _ = logged(reference, questions, tmp_path / f"b{share_prefix}", batch_size=16, share_prefix=share_prefix)
        assert computed(path) == computed(alone)


def test_answers_are_those_without_a_log_and_their_tokens_are_counted(
    model: Any, questions: list[Question], tmp_path: Path
) -> None:
    path, answers = logged(model, questions, tmp_path, batch_size=4)
    plain = list(Answerer(model, processor(), get_template("qwen")).answer(questions, max_new_tokens=5))
    assert sorted(a["answer_id"] + a["text"] for a in answers) == sorted(a["answer_id"] + a["text"] for a in plain)
    table = read_layer(path, Place("language_model", 0))
    assert table is not None
    generated = sum(r["kind"] == "generated" for r in table.to_pylist())
    # the last token of an answer never goes into the model
    assert generated == sum(a["metadata"]["tokens"] - 1 for a in answers)


def test_kinds_images_and_layers(model: Any, questions: list[Question], one_by_one: Path) -> None:
    assert places(one_by_one) == [
        Place("vision_tower", 0),
        Place("multi_modal_projector", 0),
        Place("language_model", 0),
        Place("language_model", 2),
    ]
    table = {r["position"]: r for r in rows(one_by_one) if r["question"] == 8 and r["layer"] == 2}
    assert sum(r["kind"] == "image" for r in table.values()) == 8
    tower = [r for r in rows(one_by_one) if r["part"] == "vision_tower" and r["question"] == 8]
    assert [r["position"] for r in tower] == list(range(2 * 5))  # two images of four patches and a class token
    assert {r["kind"] for r in tower} == {"image"}


def test_what_questions_of_an_image_share_is_logged_once(model: Any, questions: list[Question], tmp_path: Path) -> None:
    path, _ = logged(model, questions, tmp_path, batch_size=16)
    tower = [r for r in rows(path) if r["part"] == "vision_tower"]
    assert Counter(r["question"] for r in tower) == {0: 5, 3: 5, 8: 10}
    assert {r["question"]: r["shared_by"] for r in tower} == {0: 4, 3: 3, 8: 1}


def test_beams_log_prompts_alone(model: Any, questions: list[Question], one_by_one: Path, tmp_path: Path) -> None:
    path, _ = logged(model, questions, tmp_path, batch_size=4, num_beams=3)
    expected = Counter({key: n for key, n in computed(one_by_one).items() if key[4] != "generated"})
    assert computed(path) == expected


def test_layers_are_chosen_and_checked(model: Any, questions: list[Question], tmp_path: Path) -> None:
    path, _ = logged(model, questions, tmp_path, layers=(2,))
    assert places(path) == [Place("multi_modal_projector", 0), Place("language_model", 2)]
    with pytest.raises(ConfigError, match=r"\[1, 7\] have no experts; layers with experts: \[0, 2\]"):
        ExpertLog(model, tmp_path, questions, layers=(0, 1, 7))


def test_an_interrupted_chunk_asks_a_torn_batch_again(model: Any, questions: list[Question], tmp_path: Path) -> None:
    """The answers and the log of a chunk agree, whenever it was killed."""
    whole, _ = logged(model, questions, tmp_path / "whole", batch_size=3)
    state = tmp_path / "state"
    asked: list[int] = []

    def ask(dies_after: int) -> tuple[Callable[[list[Question]], Any], ExpertLog]:
        fresh = ExpertLog(sparse(), state / "experts", questions)
        answerer = Answerer(fresh.model, processor(), get_template("qwen"))

        def answers(left: list[Question]) -> Any:
            asked.append(len(left))
            replies = answerer.answer(left, batch_size=3, max_new_tokens=5, log=fresh)
            for number, reply in enumerate(replies):
                if number == dies_after:
                    raise KeyboardInterrupt
                yield reply

        return answers, fresh

    first, log = ask(dies_after=4)
    with pytest.raises(KeyboardInterrupt):
        answer_chunk(questions, first, state, tmp_path / "out.jsonl", keep=log.recover)
    again, log = ask(dies_after=99)
    answer_chunk(questions, again, state, tmp_path / "out.jsonl", keep=log.recover)
    assert asked[0] == len(questions)
    assert 0 < asked[1] < len(questions)
    merge(pieces(state / "experts"), tmp_path / "experts.parquet")
    assert computed(tmp_path / "experts.parquet") == computed(whole)


def test_scales_and_tiles_are_logged_separately(questions: list[Question], tmp_path: Path) -> None:
    model = llava()
    enable_multi_scale(model, (1, 3))
    upcycle(model, PARTS["vision_tower"], part="vision_tower")
    torch.nn.init.normal_(model.model.multi_modal_projector.linear_1.weight)
    torch.nn.init.zeros_(model.model.multi_modal_projector.linear_1.bias)
    path, _ = logged(model, questions, tmp_path, batch_size=16)
    table = [row for row in rows(path) if row["question"] == 8]  # two images
    assert Counter(r["scale"] for r in table) == {1: 2 * 5, 3: 2 * 9 * 5}
    assert sorted(r["position"] for r in table if r["scale"] == 3) == list(range(2 * 9 * 5))
    # the last tile of its first image alone gives what the log says of its tokens
    pixels = Answerer(model, processor(), get_template("qwen")).inputs([questions[8]])["pixel_values"]
    layer, seen = model.model.vision_tower.encoder.layers[0].mlp, []
    layer.router.register_forward_hook(lambda m, a, routing: seen.append(routing.indices_TK))
    with torch.inference_mode():
        model.model.vision_tower.scales = (1,)
        model.model.vision_tower(tiles(pixels[:1], 3)[8:])
    mine = [r["experts"] for r in table if r["scale"] == 3 and 8 * 5 <= r["position"] < 9 * 5]
    assert mine == seen[0].tolist()


@pytest.mark.parametrize(("router", "top_k"), [("topk", 2), ("topk", 1), ("cosine", 1), ("shared", 2)])
def test_without_the_first_expert(router: str, top_k: int) -> None:
    changed = sparse(router=router, top_k=top_k)
    layer = changed.model.language_model.layers[0].mlp
    x = torch.randn(6, 1, 32)
    with torch.inference_mode():
        routing = layer.router(x.flatten(0, 1))
        whole = layer(x)
        with without_first(changed):
            left = layer(x)
        assert torch.equal(layer(x), whole)
        second = routing.indices_TK[:, 1:]
        expected = layer.experts(x.flatten(0, 1), second, torch.ones_like(second).float())
    expected = expected if top_k > 1 else torch.zeros_like(expected)
    torch.testing.assert_close(left.flatten(0, 1), expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(left, whole)
