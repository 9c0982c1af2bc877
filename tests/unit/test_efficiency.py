"""What dropping context saves: the formulas, what is measured, and what is called a gain."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_llava import llava, processor

from mmpipe.analysis import efficiency
from mmpipe.analysis.retention_maps import grid, retention_maps, seen
from mmpipe.benchmarks.base import Question
from mmpipe.data.templates import get_template
from mmpipe.errors import ConfigError
from mmpipe.inference.generate import Answerer
from mmpipe.models.moe.spec import MoESettings
from mmpipe.models.moe.upcycle import upcycle
from mmpipe.models.sparsity.cost import cache_bytes, paper_flops, paper_image_flops
from mmpipe.models.sparsity.hooks import get_sparsifier, sparsify
from mmpipe.models.sparsity.record import recording
from mmpipe.models.sparsity.sparsifier import retained_tokens
from mmpipe.models.sparsity.spec import SparsitySettings
from mmpipe.report.figures import draw_efficiency
from mmpipe.report.pages import covered, efficiency_page, in_units, retention_maps_page

VECTORS = Path(__file__).parents[1] / "fixtures" / "vectors" / "dynamic_llava"
SETTINGS = {"d_model": 16, "nhead": 4, "dim_feedforward": 32, "vision_keep_rate": 0.5}


@pytest.mark.parametrize("row", json.loads((VECTORS / "dyn_flops.json").read_text())["rows"])
def test_the_papers_count(row) -> None:
    layers, width, kept = row["layers"], row["C"], retained_tokens(576, row["keep_rate"])
    assert kept == row["kept"]
    flops = (
        paper_flops(layers, 576, width)
        if row["sparse_layer"] is None
        else paper_image_flops(layers, width, 576, kept, row["sparse_layer"])
    )
    assert flops / 1e12 == pytest.approx(row["tflops"], rel=1e-12)
    assert flops / paper_flops(layers, 576, width) == pytest.approx(row["ratio"], rel=1e-12)


@pytest.fixture(scope="module")
def asked(tmp_path_factory) -> list[Question]:
    folder = tmp_path_factory.mktemp("images")
    questions = [Question(0, "no image", ())]
    for n, text in enumerate(["What is it?", "And this, which is longer?"], start=1):
        Image.new("RGB", (28, 28), (80 * n, 30, 60)).save(folder / f"{n}.png")
        questions.append(Question(n, text, (folder / f"{n}.png",)))
    return questions


def answerer(**changes) -> Answerer:
    model, reads = llava(), processor()
    sparsify(model, SparsitySettings(**{**SETTINGS, **changes}))
    return Answerer(model, reads, get_template("chatml", reads.tokenizer))


@pytest.fixture(scope="module")
def rows(asked):
    of = answerer()
    before = get_sparsifier(of.model).settings
    measured = efficiency.measure(of, asked, [0.25, 1.0])
    assert get_sparsifier(of.model).settings == before
    assert get_sparsifier(of.model).enabled
    return {(row["batch"], row["keep"], row["measure"]): row for row in measured}


def test_every_rate_is_measured_beside_the_dense_model(rows) -> None:
    assert {key[:2] for key in rows} == {(b, k) for b in (1, 16) for k in (None, 0.25, 0.5, 1.0)}
    assert all(row["value"] is not None for row in rows.values())
    assert all((row["ratio"] is None) == (key[1] is None) for key, row in rows.items())
    assert rows[1, 0.5, "token_seconds"]["repeats"] == efficiency.REPEATS


@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("keep", [None, 0.25, 0.5, 1.0])
def test_the_cache_is_as_large_as_predicted(rows, batch, keep) -> None:
    held, predicted = rows[batch, keep, "cache_bytes"], rows[batch, keep, "predicted_cache_bytes"]
    assert held["value"] == predicted["value"]


def test_fewer_tokens_are_fewer_operations(rows) -> None:
    for batch in (1, 16):
        quarter, half = rows[batch, 0.25, "cache_bytes"], rows[batch, 0.5, "cache_bytes"]
        assert quarter["gain"]
        assert quarter["ratio"] > half["ratio"] > 1
        assert rows[batch, 0.25, "prompt_flops"]["value"] < rows[batch, 0.5, "prompt_flops"]["value"]
        same = {rows[batch, keep, "image_flops"]["value"] for keep in (None, 0.25, 0.5, 1.0)}
        assert len(same) == 1, "the tower sees everything"
        assert not rows[batch, 1.0, "paper_flops"]["gain"]


def test_cache_bytes_by_hand() -> None:
    text = llava().config.text_config  # 4 layers, 2 heads of 8 for keys and values
    assert cache_bytes(text, 3, 10, 4, 2, 4) == 3 * (2 * 10 + 2 * 4) * 2 * 2 * 8 * 4


def test_a_gain_must_show_nearly_always() -> None:
    faster = efficiency.summary([1.0] * 10, [2.0] * 10)
    assert (faster["ratio"], faster["gain"]) == (2.0, True)
    assert efficiency.summary([1.0] * 10, [2.0] * 9 + [0.5])["gain"]
    noisy = efficiency.summary([1.0] * 10, [2.0] * 8 + [0.5] * 2)
    assert (noisy["ratio"], noisy["gain"]) == (2.0, False)
    assert efficiency.summary([2.0] * 10, [1.0] * 10)["gain"] is False
    busy = efficiency.summary([1.0, 9.0, 9.0], [2.0, 18.0, 18.0])
    assert (busy["ratio"], busy["gain"]) == (2.0, True), "what slows a pair does not change it"
    assert efficiency.summary([1.0], [1.0])["gain"] is False
    assert efficiency.summary([], [1.0])["value"] is None


def test_operations_of_experts_are_counted(asked) -> None:
    dense, grown = answerer(), answerer()
    upcycle(grown.model, MoESettings(placement="dense", experts=4, top_k=2))
    text = grown.model.config.text_config
    inputs = dense.inputs(asked[1:2])
    counted = [efficiency._counted(of.model, inputs)["token_flops"][0] for of in (dense, grown)]
    layers, width, inner = text.num_hidden_layers, text.hidden_size, text.intermediate_size
    expert, router, joining = 2 * 3 * width * inner, 2 * width * 4, 2 * 2 * width
    assert counted[1] - counted[0] == layers * (expert + router + joining), "a second expert"


def test_a_variant_without_enough_memory_is_reported(asked, monkeypatch) -> None:
    of = answerer()
    plain = efficiency._counted

    def counted(model, inputs):
        if not get_sparsifier(model).enabled and len(inputs["input_ids"]) > 1:
            raise torch.OutOfMemoryError("too large")
        return plain(model, inputs)

    monkeypatch.setattr(efficiency, "_counted", counted)
    monkeypatch.setattr(efficiency, "REPEATS", 1)
    rows = efficiency.measure(of, asked, [])
    dense = [row for row in rows if row["keep"] is None and row["batch"] == 16]
    sparse = [row for row in rows if row["keep"] == 0.5 and row["batch"] == 16]
    assert {row["value"] for row in dense} == {None}
    assert all(row["value"] is not None and row["ratio"] is None for row in sparse)


def test_a_checkpoint_that_keeps_images_whole(asked, monkeypatch) -> None:
    monkeypatch.setattr(efficiency, "REPEATS", 1)
    of = answerer(use_vision_predictor=False)
    assert {row["keep"] for row in efficiency.measure(of, asked, [0.25])} == {None, 1.0}


def test_prompts_have_images(asked) -> None:
    assert [q.id for q in efficiency.prompts(asked, 5)] == [1, 2, 1, 2, 1]
    with pytest.raises(ConfigError, match="the first one has no images"):
        efficiency.prompts(asked[:1], 2)


# ---- maps


def test_a_map_is_what_the_model_decided(asked) -> None:
    of = answerer()
    maps = retention_maps(of, asked[1:], [0.25, 1.0])
    assert [(m["question_id"], m["image"]) for m in maps] == [(1, 0), (2, 0)]
    for row in maps:
        assert {rate: kept.count("1") for rate, kept in row["kept"].items()} == {"0.25": 1, "0.5": 2}
        best, two = row["kept"].values()
        assert int(best, 2) & int(two, 2) == int(best, 2), "the best one is among the best two"
    inputs = of.inputs(asked[1:2])
    with recording(of.model) as record:
        of.model(**inputs)
    assert maps[0]["kept"]["0.5"] == "".join(str(int(kept)) for kept in record.passes[0].images[0])


def test_images_are_shown_as_the_tower_gets_them(asked) -> None:
    (image,) = seen(answerer(), asked[1])
    assert image.size == (28, 28)
    assert max(abs(a - b) for a, b in zip(image.getpixel((5, 5)), (80, 30, 60), strict=True)) <= 1


@pytest.mark.parametrize(("tokens", "places"), [(576, (0, 24)), (577, (1, 24)), (9, (0, 3)), (70, None), (1, (0, 1))])
def test_where_tokens_are_in_an_image(tokens, places) -> None:
    assert grid(tokens) == places


def test_what_is_dropped_is_pale() -> None:
    red = Image.new("RGB", (40, 40), (255, 0, 0))
    image = covered(red, "0001", (0, 2))
    high = image.height
    assert image.getpixel((high - 9, high - 9)) == (255, 0, 0)
    for corner in ((9, 9), (9, high - 9), (high - 9, 9)):
        r, g, b = image.getpixel(corner)
        assert r == g == b > 200
    assert covered(red, "10001", (1, 2)).getpixel((high - 9, high - 9)) == (255, 0, 0), "class token first"


# ---- pages


def page_of(tmp_path, rows, **changes) -> tuple[str, str]:
    content = {
        "checkpoint": "run", "benchmark": "b", "layers": 4, "sparse_layer": 2, "image_tokens": 4, "trained_rate": 0.5,
        "prompt_tokens": {"1": 30, "16": 40}, "new_tokens": 16, "dtype": "float32", "weights_bytes": 1000, "device": "cpu",
        "threads": 1, "system": "s", "memory": "m", "libraries": {"torch": "2"}, "rows": rows,
    } | changes  # fmt: skip
    path = tmp_path / "measured.json"
    path.write_text(json.dumps(content))
    efficiency_page(path, tmp_path / "table.html")
    draw_efficiency(path, tmp_path / "figure.svg")
    return (tmp_path / "table.html").read_text(), (tmp_path / "figure.svg").read_text()


def test_the_page_marks_settings_without_gain(rows, tmp_path) -> None:
    page, figure = page_of(tmp_path, list(rows.values()), benchmark="<script>x</script>")
    assert "<script>" not in page
    assert "</svg>" in figure
    formula = page[page.index("paper") :].split("</tr>")[0]
    assert formula.count('class="right"') == 2
    assert formula.count("no gain") == 1, "at a rate of one"
    none = [row | {"value": None, "ratio": None, "gain": None} for row in rows.values()]
    assert "–" in page_of(tmp_path, none)[0]


def test_words_around_maps_are_escaped(tmp_path) -> None:
    row = {"question_id": "<b>", "prompt": "<script>alert(1)</script>", "image": 0, "kept": {"0.5": "0011"}}
    image = Image.new("RGB", (28, 28))
    for places in ((0, 2), None):
        retention_maps_page("<i>", [row], [image], places, tmp_path / "kept.html")
        page = (tmp_path / "kept.html").read_text()
        assert "2 of 4" in page
        assert not [mark for mark in ("<script>", "<b>", "<i>") if mark in page]
        assert page.count("data:image") == (2 if places else 1)


def test_numbers_have_three_digits() -> None:
    assert [in_units(x, "B") for x in (0, 7, 999, 1234, 12_345, 123_456, 5e12)] == [
        "0 B", "7.00 B", "999 B", "1.23 kB", "12.3 kB", "123 kB", "5.00 TB",
    ]  # fmt: skip
    assert in_units(0.00234, "s") == "2.34 ms"
