"""The model class for lmms-eval: against a base class of the same interface, and against the real one where it is installed."""

from __future__ import annotations

import abc
import importlib
import sys
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from mmpipe.benchmarks.base import Question
from mmpipe.errors import ConfigError, DataError

REAL = importlib.util.find_spec("lmms_eval") is not None


class StandIn(abc.ABC):
    """What ``lmms_eval.api.model.lmms`` asks of its subclasses and gives them (0.7.3)."""

    is_simple = True

    def __init__(self) -> None:
        self._rank, self._world_size = 0, 1
        self.cache_hook = SimpleNamespace(add_partial=lambda *_: None)
        self.task_dict: dict[str, Any] = {}

    @classmethod
    def create_from_arg_string(cls, text: str, more: dict[str, Any]) -> Any:
        pairs = dict(part.split("=") for part in text.split(","))
        return cls(**pairs, **{name: value for name, value in more.items() if value is not None})

    @abc.abstractmethod
    def loglikelihood(self, requests: Any) -> Any: ...

    @abc.abstractmethod
    def generate_until(self, requests: Any) -> Any: ...

    @abc.abstractmethod
    def generate_until_multi_round(self, requests: Any) -> Any: ...


def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the stand-in where lmms-eval would be."""
    for name in ("lmms_eval", "lmms_eval.api", "lmms_eval.api.model"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["lmms_eval.api.model"].lmms = StandIn
    monkeypatch.delitem(sys.modules, "mmpipe.lmms_eval.model", raising=False)


@pytest.fixture(params=["stand-in", pytest.param("real", marks=pytest.mark.lmms)])
def kind(request, monkeypatch) -> Any:
    if request.param == "stand-in":
        stand_in(monkeypatch)
    elif not REAL:
        pytest.skip("lmms-eval is not installed")
    else:
        monkeypatch.delitem(sys.modules, "mmpipe.lmms_eval.model", raising=False)
    yield importlib.import_module("mmpipe.lmms_eval.model").Mmpipe
    sys.modules.pop("mmpipe.lmms_eval.model", None)


@pytest.fixture(scope="session")
def published(demo_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as a stage publishes it, of untrained weights."""
    import json

    import torch

    from mmpipe.artifacts import manifest
    from mmpipe.checkpoints.load import build_model
    from mmpipe.checkpoints.save import save_checkpoint
    from mmpipe.models.settings import VisionLanguage

    out = tmp_path_factory.mktemp("published") / "model"
    backbones = {
        "vision": demo_files / "resources/backbones/clip-tiny",
        "language": demo_files / "resources/backbones/qwen2-tiny",
    }
    model, processor = build_model(
        backbones,
        VisionLanguage(vision="clip-tiny", language="qwen2-tiny"),
        template="qwen",
        image_aspect="pad",
        seed=0,
    )
    torch.manual_seed(0)
    out.mkdir(parents=True)
    save_checkpoint(model, processor, out)
    facts = {"template": "qwen", "image_aspect": "pad"}
    manifest.write(out, kind="model", spec=json.dumps({}), inputs={}, checkpoint=facts)
    return out


def request(context: str, settings: Any, images: Any, number: int = 0) -> Any:
    """What lmms-eval hands over for one question."""
    arguments = (context, settings, lambda doc: doc["images"], number, "task", "test")
    return SimpleNamespace(args=arguments, images=images)


def make(kind: Any, published: Path, requests: list[Any], **more: Any) -> Any:
    model = kind.create_from_arg_string(f"pretrained={published}", {"batch_size": 4, "device": "cpu", **more})
    model.task_dict = {"task": {"test": [{"images": r.images} for r in requests]}}
    return model


def shade(value: int) -> Image.Image:
    return Image.new("RGB", (40, 30), (value, 255 - value, 90))


def asked() -> list[Any]:
    rows = [("What is it?", [shade(10)]), ("Which colour?", [shade(10)]), ("<image> What?", [shade(200)])]
    rows += [("Two and two?", []), ("<image 1>? <image>", [[shade(1), shade(2)]]), ("And now?", shade(3))]
    return [
        request(text, {"max_new_tokens": 5 + n % 2, "until": ["\n\n"]}, images, n)
        for n, (text, images) in enumerate(rows)
    ]


def test_replies_are_those_of_our_own_benchmarks(kind, published, tmp_path):
    requests = asked()
    model = make(kind, published, requests)
    replies = model.generate_until(requests)
    assert len(replies) == len(requests)
    assert all(isinstance(reply, str) for reply in replies)
    shade(10).save(tmp_path / "p.png")
    for place in (0, 1):
        question = Question(id=0, text=requests[place].args[0], images=(tmp_path / "p.png",))
        own = next(model.answerer.answer([question], max_new_tokens=5 + place))
        assert replies[place] == own["text"]
    assert replies == make(kind, published, requests, batch_size=1).generate_until(requests)
    assert replies[::-1] == model.generate_until(requests[::-1])


@pytest.mark.parametrize(
    ("until", "reply"),
    [
        (["\n\n"], "Twice three is six.\n\nAnswer: 6"),  # what lmms-eval fills in for a task that names none
        (None, "Twice three is six.\n\nAnswer: 6"),
        ("\n\n", "Twice three is six."),
        (["\n\n", "Q:"], "Twice three is six."),
        (["Answer"], "Twice three is six."),
    ],
)
def test_a_reply_is_cut_at_a_blank_line_only_where_the_task_says_so(monkeypatch, published, until, reply):
    stand_in(monkeypatch)
    model = importlib.import_module("mmpipe.lmms_eval.model").Mmpipe
    asking = [request("2 x 3?", {"max_new_tokens": 4, "until": until}, [shade(10)], 0)]
    made = make(model, published, asking)
    own = made.answerer.answer
    paragraphs = "Twice three is six.\n\nAnswer: 6"
    made.answerer.answer = lambda questions, **how: ({**a, "text": paragraphs} for a in own(questions, **how))
    assert made.generate_until(asking) == [reply]
    sys.modules.pop("mmpipe.lmms_eval.model", None)


def test_likelihoods_mark_the_greedy_reply(kind, published):
    requests = asked()[:3]
    model = make(kind, published, requests)
    replies = model.generate_until(requests)
    pairs = [request(r.args[0], text, r.images, n) for n, r in enumerate(requests) for text in (replies[n], " zebra")]
    scores = model.loglikelihood(pairs)
    assert all(score < 0 for score, _ in scores)
    assert not any(greedy for _, greedy in scores[1::2])
    assert [s for s, _ in scores[::2]] > [s for s, _ in scores[1::2]] or not all(replies)
    one = make(kind, published, requests, batch_size=1).loglikelihood(pairs)
    assert [s for s, _ in one] == pytest.approx([s for s, _ in scores], abs=1e-4)


def test_stop_texts_cut(kind, published):
    from mmpipe.lmms_eval.model import _cut

    assert _cut("Yes.\n\nASSISTANT: no", ["ASSISTANT:", "\n\n"]) == "Yes."
    assert _cut(" Yes ", None) == "Yes"


@pytest.mark.parametrize(
    ("settings", "images", "error", "message"),
    [
        ({"do_sample": True, "temperature": 0.7}, [], ConfigError, "greedily or by beams"),
        ({}, ["clip.mp4"], DataError, "hands over a str"),
    ],
)
def test_unsupported_requests_are_errors(kind, published, settings, images, error, message):
    requests = [request("?", settings, images)]
    with pytest.raises(error, match=message):
        make(kind, published, requests).generate_until(requests)


def test_wrong_arguments_are_named(kind, published):
    with pytest.raises(ConfigError, match="dtype=int8"):
        kind(pretrained=str(published), dtype="int8", device="cpu")
    with pytest.raises(ConfigError, match="--batch_size auto"):
        kind(pretrained=str(published), batch_size="auto", device="cpu")
    with pytest.raises(NotImplementedError):
        kind(pretrained=str(published), device="cpu").generate_until_multi_round([])


def test_the_entry_point_names_the_class():
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert '[project.entry-points."lmms_eval.models"]\nmmpipe = "mmpipe.lmms_eval:manifest"' in text
    for found in entry_points(group="lmms_eval.models", name="mmpipe"):
        assert found.value == "mmpipe.lmms_eval:manifest"


@pytest.mark.lmms
@pytest.mark.skipif(not REAL, reason="lmms-eval is not installed")
def test_the_real_registry_takes_it():
    from lmms_eval.models.registry_v2 import ModelRegistryV2

    from mmpipe.lmms_eval import manifest

    registry = ModelRegistryV2()
    registry.register_manifest(manifest())
    assert registry.get_model_class("mmpipe").__name__ == "Mmpipe"


def test_a_log_of_experts_needs_experts(kind, published, tmp_path):
    requests = asked()
    model = make(kind, published, requests, experts=str(tmp_path / "experts.parquet"))
    with pytest.raises(ConfigError, match="has no experts"):
        model.generate_until(requests)
    (tmp_path / "experts.parquet").write_text("")
    with pytest.raises(ConfigError, match="the file is there"):
        model.generate_until(requests)


def test_experts_are_logged_by_task_and_document(kind, published, tmp_path):
    import pyarrow.parquet as pq
    from tiny_llava import llava, processor

    from mmpipe.data.templates import get_template
    from mmpipe.inference.generate import Answerer
    from mmpipe.models.moe.spec import MoESettings
    from mmpipe.models.moe.upcycle import upcycle

    requests = asked()
    model = make(kind, published, requests, experts=str(tmp_path / "experts.parquet"))
    sparse = llava()
    sparse.config.image_seq_length = 4
    upcycle(sparse, MoESettings(experts=4, top_k=2, placement="sparse"), part="language_model", seed=1)
    model.answerer = Answerer(sparse, processor(), get_template("qwen"))
    replies = model.generate_until(requests)
    assert len(replies) == len(requests)
    table = pq.read_table(tmp_path / "experts.parquet").to_pydict()
    assert {name.partition("#")[0] for name in table["question_id"]} <= {f"task/{n}" for n in range(len(requests))}
    assert all(len(chosen) == 2 for chosen in table["experts"])


def test_transparent_images_are_put_on_white(kind, tmp_path):
    stored = sys.modules[kind.__module__]._stored(Image.new("RGBA", (2, 2), (0, 0, 0, 0)), tmp_path)
    assert Image.open(stored).getcolors() == [(4, (255, 255, 255))]
