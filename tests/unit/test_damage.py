"""One flipped bit in any file of any artifact is noticed by whatever opens it, before a number is made of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from made_tokens import TINY

from mmpipe.artifacts import hashes, manifest
from mmpipe.artifacts.files import sha256, write_jsonl
from mmpipe.benchmarks.jsonl import read_document
from mmpipe.benchmarks.prepare import check_images, prepare, read_questions
from mmpipe.benchmarks.scoring import convert_files, score_files
from mmpipe.benchmarks.spec import BenchmarkEntry
from mmpipe.checkpoints import layouts
from mmpipe.checkpoints.load import build_model, load_tokenizer, open_checkpoint
from mmpipe.checkpoints.save import save_checkpoint
from mmpipe.cli import verify
from mmpipe.data.dataset import SupervisedDataset
from mmpipe.data.export import export_mixture, keep_in_place
from mmpipe.data.images import image_processor
from mmpipe.data.mixture import build_mixture
from mmpipe.data.record_table import RecordTable, read_digests
from mmpipe.data.spec import MixtureSourceSpec, MixtureSpec
from mmpipe.data.tokens import TokenTable
from mmpipe.demo.datasets import mmbench
from mmpipe.errors import ArtifactError
from mmpipe.models import projector
from mmpipe.models.settings import VisionLanguage
from mmpipe.stages.finetune import Finetune
from mmpipe.training import launch, worker
from mmpipe.training.precomputed import PAIRS, SHARDS, PrecomputedLogProbs
from mmpipe.training.run import run_stage

MODEL = VisionLanguage(vision="clip-tiny", language="qwen2-tiny")
HOW: dict[str, Any] = {"template": "qwen", "image_aspect": "pad"}
SHARD = f"{SHARDS}/00000-of-00001.arrow"
BACKBONES = Path("resources/backbones")
ENTRY = BenchmarkEntry(data="asked", task="mmbench")
OUT = Path("out")


@pytest.fixture(scope="module")
def artifacts(demo_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with an artifact of each kind."""
    root = tmp_path_factory.mktemp("damage") / "project"
    shutil.copytree(demo_files, root)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        model, processor = build_model(TINY, MODEL, seed=0, **HOW)
        save_checkpoint(model, processor, Path("model"))
        manifest.write(Path("model"), kind="model", spec="{}", inputs={}, checkpoint=HOW)
        Path("projector").mkdir()
        projector.save(model, Path("projector") / projector.FILE)
        facts = HOW | {"backbones": {role: path.as_posix() for role, path in TINY.items()}}
        spec = json.dumps({"model": MODEL.model_dump(mode="json", exclude_defaults=True)})
        manifest.write(Path("projector"), kind="projector", spec=spec, inputs={}, checkpoint=facts)
        shard = Path("teacher", SHARD)
        shard.parent.mkdir(parents=True)
        with pa.OSFile(str(shard), "wb") as file, pa.ipc.new_stream(file, PAIRS) as sink:
            rows = [{"index": index, "chosen": -1.0, "rejected": -2.0} for index in range(24)]
            sink.write_batch(pa.RecordBatch.from_pylist(rows, schema=PAIRS))
        facts = {"settings": {}, "vocabulary": 1, "tokenizer": "", "pixels": {}}
        manifest.write(Path("teacher"), kind="annotations", spec="{}", inputs={}, **facts)
        asked = Path("resources/datasets/asked")
        asked.mkdir()
        mmbench(asked, seed=1, questions=3)
        manifest.write(asked, kind="source", spec="{}", inputs={})
        prepare(ENTRY, asked, Path("benchmark"))
        manifest.write(Path("benchmark"), kind="benchmark", spec="{}", inputs={})
        write_jsonl(Path("answers.jsonl"), [{"question_id": q.id, "text": "A"} | q.extra for q in questions()])
    return root


@pytest.fixture(autouse=True)
def here(artifacts: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(artifacts)
    yield
    shutil.rmtree(OUT, ignore_errors=True)


def questions() -> list[Any]:
    return read_questions(Path("benchmark"))


def built() -> Any:
    return build_model(TINY, MODEL, seed=0, **HOW)


def mixed(dataset: str, annotations: str, format: str = "llava") -> None:
    part = MixtureSourceSpec(dataset=dataset, annotations=annotations, images=".", format=format)
    build_mixture(MixtureSpec(parts=[part]), {dataset: Path("resources/datasets", dataset)}, OUT, log=lambda _: None)


def scored(function: Callable[..., Any]) -> Any:
    out = {"out": Path("submission.xlsx")} if function is convert_files else {}
    return function("mmbench", [Path("benchmark/references.jsonl")], [Path("answers.jsonl")], **out)


def exported() -> None:
    OUT.mkdir()
    layouts.get("llava").write(Path("model"), OUT, language=None, tower="tower", binary=False)


def export_records() -> None:
    OUT.mkdir()
    export_mixture(Path("resources/mixtures/mix"), OUT / "mix.json", "llava", keep_in_place(Path()))


CHECKPOINT = ["config.json", "generation_config.json", "model.safetensors", "preprocessor_config.json"]
CHECKPOINT += ["processor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
READERS: dict[str, tuple[list[str], Callable[[], Any]]] = {
    "checkpoint": ([f"model/{name}" for name in CHECKPOINT], lambda: open_checkpoint(Path("model"))),
    "its tokenizer": (["model/tokenizer.json"], lambda: load_tokenizer({"checkpoint": Path("model")}, MODEL)),
    "its export": (["model/model.safetensors", "model/tokenizer.json"], exported),
    "projector": (
        [f"projector/{projector.FILE}", f"{BACKBONES}/clip-tiny/model.safetensors"],
        lambda: open_checkpoint(Path("projector")),
    ),
    "backbones": (
        [
            *(
                f"{BACKBONES}/clip-tiny/{name}"
                for name in ("config.json", "model.safetensors", "preprocessor_config.json")
            ),
            *(f"{BACKBONES}/qwen2-tiny/{name}" for name in ("config.json", "model.safetensors", "tokenizer.json")),
        ],
        built,
    ),
    "their tokenizer": (
        [f"{BACKBONES}/qwen2-tiny/tokenizer.json", f"{BACKBONES}/clip-tiny/config.json"],
        lambda: load_tokenizer(TINY, MODEL),
    ),
    "tokens": (
        [f"resources/tokens/mix/{SHARD}", "resources/tokens/mix/report.json"],
        lambda: TokenTable(Path("resources/tokens/mix")),
    ),
    "records": (
        ["resources/mixtures/mix/records.arrow"],
        lambda: RecordTable(Path("resources/mixtures/mix/records.arrow")),
    ),
    "exported records": (["resources/mixtures/mix/records.arrow"], export_records),
    "digests of images": (
        ["resources/mixtures/mix/images.arrow"],
        lambda: list(read_digests(Path("resources/mixtures/mix"))),
    ),
    "precomputed": ([f"teacher/{SHARD}"], lambda: PrecomputedLogProbs(Path("teacher"))),
    "annotations": (
        ["resources/datasets/shapes/llava_v1_5_mix665k.json", "resources/datasets/shapes/*/*/*.jpg"],
        lambda: mixed("shapes", "llava_v1_5_mix665k.json"),
    ),
    "pairs": (["resources/datasets/pairs/*.parquet"], lambda: mixed("pairs", "*.parquet", "rlaif_v")),
    "official files": (
        ["resources/datasets/asked/*.tsv"],
        lambda: prepare(ENTRY, Path("resources/datasets/asked"), OUT),
    ),
    "questions": (["benchmark/questions.jsonl", "benchmark/images/*.jpg"], questions),
    "references": (["benchmark/references.jsonl"], lambda: read_document(Path("benchmark/references.jsonl"))),
    "score": (["benchmark/references.jsonl"], lambda: scored(score_files)),
    "submission": (["benchmark/references.jsonl"], lambda: scored(convert_files)),
}
CASES = [(kind, pattern) for kind, (patterns, _) in READERS.items() for pattern in patterns]


@contextmanager
def damaged(pattern: str) -> Iterator[Path]:
    """A file with one flipped bit in its middle."""
    path = sorted(Path().glob(pattern))[0]
    content = path.read_bytes()
    at = len(content) // 2
    path.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
    try:
        yield path
    finally:
        path.write_bytes(content)


@pytest.mark.parametrize(("kind", "pattern"), CASES, ids=[f"{kind}: {pattern}" for kind, pattern in CASES])
def test_a_flipped_bit_is_named_by_whatever_reads_the_file(kind: str, pattern: str) -> None:
    read = READERS[kind][1]
    with damaged(pattern) as path, pytest.raises(ArtifactError) as error:
        read()
    found = str(error.value)
    assert found.startswith(f"{path}: damaged or changed")
    assert "lists" in found
    assert "restore the file" in found


@pytest.mark.parametrize("kind", READERS)
def test_whole_files_are_read(kind: str) -> None:
    READERS[kind][1]()


def test_both_hashes_are_in_the_message() -> None:
    expected = sha256(Path("model/config.json"))
    with damaged("model/config.json") as path, pytest.raises(ArtifactError) as error:
        open_checkpoint(Path("model"))
    assert expected in str(error.value)
    with damaged("model/config.json") as path:
        assert sha256(path) in str(error.value)


def test_weights_that_are_not_read_are_not_hashed() -> None:
    with damaged(f"{BACKBONES}/qwen2-tiny/model.safetensors"):
        load_tokenizer(TINY, MODEL)


def test_images_that_are_not_asked_about_are_not_hashed() -> None:
    asked = questions()
    name = asked[0].images[0]
    with damaged(name.as_posix()):
        check_images(Path("benchmark"), [q for q in asked if name not in q.images])
        assert read_questions(Path("benchmark"), images=False)


def test_a_backbone_in_a_subfolder_is_checked_by_the_manifest_above_it() -> None:
    shutil.copytree(BACKBONES / "qwen2-tiny", OUT / "inner")
    (OUT / "inner/manifest.json").unlink()
    manifest.write(OUT, kind="source", spec="{}", inputs={})
    parts = {**TINY, "language": OUT / "inner"}
    load_tokenizer(parts, MODEL)
    with damaged("out/inner/tokenizer.json"), pytest.raises(ArtifactError, match="damaged or changed"):
        load_tokenizer(parts, MODEL)


def test_data_sets_joined_by_links_are_checked_where_they_are() -> None:
    joined = OUT / "joined"
    joined.mkdir(parents=True)
    (joined / "all").symlink_to(Path("resources/datasets/pairs").absolute())
    inputs = manifest.input_hashes([Path("resources/datasets/pairs/manifest.json")])
    manifest.write(joined, kind="source", spec="{}", inputs=inputs, files={})
    manifest.check_all(joined)
    with damaged("resources/datasets/pairs/*.parquet"), pytest.raises(ArtifactError, match="damaged or changed"):
        manifest.check_all(joined)


def test_large_files_are_hashed_while_they_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashes, "SMALL", 0)
    with damaged("model/model.safetensors") as path, pytest.raises(ArtifactError, match=f"{path}: damaged or changed"):
        open_checkpoint(Path("model"))
    # a header that cannot be read is damage of the file, whatever else was said about it
    content = Path("model/model.safetensors").read_bytes()
    try:
        Path("model/model.safetensors").write_bytes(b"\xff" * 8 + content[8:])
        with pytest.raises(ArtifactError, match="damaged or changed"):
            open_checkpoint(Path("model"))
    finally:
        Path("model/model.safetensors").write_bytes(content)


def test_a_damaged_cache_does_not_condemn_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashes, "digest", lambda path, cache=True: "0" * 64 if cache else sha256(path))
    manifest.check(Path("model"))


def test_files_without_a_hash_are_checked_by_size() -> None:
    shutil.copytree("model", OUT)
    manifest.write(OUT, kind="model", spec="{}", inputs={}, hash_files=False)
    with damaged("out/config.json"):
        manifest.check(OUT)
        assert "8 by size alone" in str(verify.verify(OUT))
    (OUT / "config.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"config\.json: 2 bytes, but"):
        manifest.check(OUT)


def test_an_image_that_changed_after_it_was_verified_is_not_trained_on(artifacts: Path) -> None:
    tokens = OUT / "tokens"
    shutil.copytree("resources/tokens/mix", tokens)
    inputs = manifest.input_hashes([Path("resources/mixtures/mix/manifest.json")])
    manifest.write(tokens, kind="tokens", spec="{}", inputs=inputs)
    dataset = SupervisedDataset(TokenTable(tokens), image_processor(TINY["vision"], "pad"))
    row = next(row for row in dataset.tokens if row.images)
    assert dataset[row.place]["replaced"] == ()
    with damaged(row.images[0]) as path:
        (fault,) = dataset[row.place]["replaced"]
    assert f"{path}: damaged or changed: the content has the digest" in fault
    plain = SupervisedDataset(TokenTable(Path("resources/tokens/mix")), dataset.processor)
    assert torch.equal(plain[row.place]["pixel_values"][0], dataset[row.place]["pixel_values"][0])


@pytest.mark.parametrize("pattern", [f"resources/tokens/mix/{SHARD}", f"{BACKBONES}/qwen2-tiny/model.safetensors"])
def test_a_training_does_not_start_on_damaged_files(
    job: Callable[..., Any], artifacts: Path, pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = Finetune(data="mix", template="qwen", batch_size=8, max_steps=1)
    task = job()
    monkeypatch.chdir(artifacts)
    with damaged(pattern) as path, pytest.raises(ArtifactError, match=f"{path}: damaged"):
        run_stage(stage, task)
    assert not task.model_dir.exists()


def test_one_process_hashes_for_all_ranks(
    job: Callable[..., Any], artifacts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = Finetune(data="mix", template="qwen", batch_size=8, max_steps=1)
    manifests = [Path("resources/tokens/mix/manifest.json"), Path("projector/manifest.json")]
    task = replace(job(), manifests=tuple(manifests))
    monkeypatch.chdir(artifacts)
    monkeypatch.setattr(launch.subprocess, "Popen", lambda *_, **__: pytest.fail("a process was started"))
    for pattern in (f"resources/tokens/mix/{SHARD}", f"{BACKBONES}/clip-tiny/model.safetensors"):
        with damaged(pattern), pytest.raises(ArtifactError, match="damaged or changed"):
            launch.run_processes(stage, task, 2)
    monkeypatch.setattr(hashes, "_MARGIN", 0)
    manifest.check(Path("projector"))
    description = task.state_dir / "job.json"
    launch.write_description(description, stage, task)
    monkeypatch.setattr(hashes, "_known", {})
    monkeypatch.setattr(hashes, "_compute", lambda path: pytest.fail(f"{path} was hashed again"))
    worker.read_description(description)
    manifest.check(Path("projector"))


def test_verify_reports_every_damaged_artifact(capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.print_verified([Path("resources"), Path("model")])
    assert "resources/tokens/mix: OK (2 files hashed)" in capsys.readouterr().out
    with damaged("model/config.json"), damaged("model/tokenizer.json"), damaged("resources/mixtures/mix/records.arrow"):
        assert not verify.print_verified([Path("resources"), Path("model/manifest.json")])
    said = capsys.readouterr().out
    assert "model: DAMAGED\n  model/config.json: damaged" in said
    assert "  model/tokenizer.json: damaged" in said
    assert "resources/mixtures/mix: DAMAGED" in said
    assert said.endswith("2 damaged\n")
    with pytest.raises(ArtifactError, match="no manifest"):
        verify.print_verified([Path("teacher/shards")])


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"files": null}', '{"files": {"../../etc/passwd": {"size": 1}}}'])
def test_a_damaged_manifest_is_damage_of_its_artifact(content: str, capsys: pytest.CaptureFixture[str]) -> None:
    OUT.mkdir()
    (OUT / "manifest.json").write_text(content)
    assert not verify.print_verified([OUT])
    assert "out/manifest.json" in capsys.readouterr().out
    with pytest.raises(ArtifactError, match=r"out/manifest\.json"):
        open_checkpoint(OUT)
