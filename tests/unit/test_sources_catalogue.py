"""The catalogues that come with the project, and the way of a data set from a server to a mixture."""

from __future__ import annotations

import fnmatch
import json
import re
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import faulty_server as server
import pytest
import yaml
from PIL import Image
from source_entries import make_zip

from mmpipe.artifacts import manifest
from mmpipe.cli.data import print_catalogue
from mmpipe.errors import ConfigError
from mmpipe.plan.plan import Plan
from mmpipe.settings import read_mapping
from mmpipe.sources.transfer import download
from workflow.scripts import fetch as fetch_script
from workflow.scripts import mix as mix_script

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def plan() -> Plan:
    return Plan(read_mapping(ROOT / "config/config.yaml"), ROOT)


def sources(plan: Plan) -> list[tuple[str, Any]]:
    return [*plan.datasets.items(), *plan.backbones.items()]


def test_reading_them_stays_quick() -> None:
    config = read_mapping(ROOT / "config/config.yaml")
    start = time.process_time()
    Plan(config, ROOT)
    assert time.process_time() - start < 1.0


def test_every_entry_says_what_it_is_and_where_to_read_about_it(plan: Plan) -> None:
    for name, source in sources(plan):
        assert source.description, name
        if source.kind not in ("made", "joined"):
            assert source.homepage.startswith("https://"), name


def test_hub_entries_name_a_commit_or_the_main_branch(plan: Plan) -> None:
    for name, source in sources(plan):
        if source.kind == "hub":
            assert re.fullmatch(r"[0-9a-f]{40}|main", source.revision), name


def test_what_is_unpacked_is_what_is_fetched(plan: Plan) -> None:
    for name, source in sources(plan):
        for pattern in getattr(source, "unpack", {}):
            if source.kind == "hub":
                assert any(fnmatch.fnmatch(pattern, include) or pattern == include for include in source.include), name
            else:
                assert any(fnmatch.fnmatch(file.to, pattern) for file in source.files), name


def test_only_coco_is_fetched_without_encryption(plan: Plan) -> None:
    plain = {f.url for _, s in sources(plan) if s.kind == "url" for f in s.files if f.url.startswith("http://")}
    assert all(url.startswith("http://images.cocodataset.org/") for url in plain), plain


def test_no_file_is_fetched_by_two_entries(plan: Plan) -> None:
    urls = [f.url for _, s in sources(plan) if s.kind == "url" for f in s.files]
    doubled = {url for url in urls if urls.count(url) > 1}
    assert doubled <= {"https://vizwiz.cs.colorado.edu/VizWiz_final/vqa_data/Annotations.zip"}


@pytest.mark.parametrize(
    ("mixture", "expected"),
    [("llava-pretrain-558k", 558128), ("llava-mix665k", 665298), ("libmoe-mix332k", 332000), ("rlaif-v", 83132)],
)
def test_published_counts(plan: Plan, mixture: str, expected: int) -> None:
    assert sum(part.expected or 0 for part in plan.mixtures[mixture].parts) == expected


def test_published_counts_do_not_make_a_mixture_stale(plan: Plan) -> None:
    mixture = plan.mixtures["llava-mix665k"]
    other = mixture.model_copy(
        update={"description": "", "parts": tuple(part.model_copy(update={"expected": None}) for part in mixture.parts)}
    )
    assert mixture.spec() == other.spec()
    assert "image_position" in json.dumps(mixture.spec())


def test_llava_15_is_planned_with_its_published_settings() -> None:
    plan = Plan(read_mapping(ROOT / "config/llava-1.5.yaml"), ROOT)
    pretrain, finetune = plan.stages("llava-1.5-7b")
    common = {"max_length": 2048, "epochs": 1, "schedule": "cosine", "warmup_ratio": 0.03, "weight_decay": 0,
              "precision": "bfloat16"}  # fmt: skip
    for stage in (pretrain, finetune):
        assert common.items() <= stage.settings.model_dump().items()
    s = pretrain.settings
    assert (s.learning_rate, s.batch_size, s.template, s.image_aspect) == (1e-3, 256, "plain", "square")
    s = finetune.settings
    assert (s.learning_rate, s.batch_size, s.template, s.image_aspect) == (2e-5, 128, "vicuna_v1", "pad")
    assert s.grouping == "modality_length"


# --- what is there, how much, and why not ------------------------------------------------------------------------------


@pytest.fixture
def shown(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """What ``mmpipe data NAME...`` prints on a terminal of some width, in an empty project."""
    monkeypatch.chdir(tmp_path)

    def show(*names: str, width: int = 200) -> str:
        monkeypatch.setenv("COLUMNS", str(width))
        print_catalogue(plan, names)
        return capsys.readouterr().out

    return show


def here(name: str, size: int = 5000, kind: str = "datasets") -> None:
    place = Path("resources", kind, name)
    place.mkdir(parents=True)
    (place / "file").write_bytes(bytes(size))
    manifest.write(place, kind="source", spec="{}", inputs={})


def unfinished(name: str, size: int) -> None:
    files = Path("resources/datasets/.fetching", name, "files")
    files.mkdir(parents=True)
    (files / "a.zip.part").write_bytes(bytes(size))


def by_name(table: str) -> dict[str, str]:
    return {line.split()[0]: line for line in table.splitlines() if line.split()}


def test_the_table_shows_what_is_here_and_what_needs_a_person(shown: Callable[..., str]) -> None:
    here("mmstar")
    unfinished("coco-train2017", 2_000_000)
    lines = by_name(shown())
    assert re.search(r"mmstar +hub +fetched +5\.0 kB +1,500 not stated", lines["mmstar"])
    assert re.search(r"sam-570k +manual +manual +\? +570,000 ! SA-1B", lines["sam-570k"])
    assert re.search(r"coco-train2017 +url +partial +2\.0 MB of ~ 19\.0 GB +118,287", lines["coco-train2017"])
    assert re.search(r"joined +0 of 4 +> \d+\.\d GB +4 parts", lines["sharegpt4v-pretrain"])
    assert re.search(r"allava-pft +joined +0 of 2 +95\.\d GB", lines["allava-pft"])
    assert re.search(r"Data sets: \d+ entries, 1 of them here \(2\.0 MB\), \d+\.\d GB to fetch", lines["Data"])


@pytest.mark.parametrize("width", [80, 100, 120])
def test_names_and_numbers_stay_whole_on_a_narrow_terminal(shown: Callable[..., str], plan: Plan, width: int) -> None:
    table = shown(width=width)
    assert max(map(len, table.splitlines())) <= width
    lines = by_name(table)
    assert set(lines) >= {*plan.datasets, *plan.backbones}
    assert re.search(r"missing +~ 19\.0 GB +118,287 Flickr", lines["coco-train2017"])


def test_a_mixture_is_resolved_to_what_must_be_fetched(shown: Callable[..., str]) -> None:
    here("gqa-images")
    told = shown("llava-mix665k")
    for fact in (
        r"records +665,298 published",
        r"in all +6 entries, 1 of them here \(5\.0 kB\), \d\d\.\d GB to fetch",
        r"CC BY 4\.0: gqa-images, textvqa-images, visual-genome",
        r"not stated: ocr-vqa-images",
        r"in the way +nothing",
    ):
        assert re.search(fact, told), fact
    assert "llava-v1.5-images" not in told, "it is not fetched, but laid out from others"


def test_a_recipe_needs_what_its_teacher_needs(shown: Callable[..., str]) -> None:
    told = shown("llava-mod-qwen1.5-0.5b")
    lines = by_name(told)
    assert {"qwen1.5-0.5b", "qwen1.5-7b", "clip-vit-large-patch14-336", "rlaif-v", "allava-laion"} <= set(lines)
    assert re.search(r"sam-570k: a person has to fetch it: accept the licence on the homepage", told)
    assert re.search(r"restricted +.*non-commercial: .*sharegpt4v", told, re.DOTALL)
    assert "qwen1.5-7b" not in shown("llava-1.5-7b@pretrain")


def test_an_entry_tells_all_of_itself_and_what_is_in_the_way(shown: Callable[..., str]) -> None:
    told = shown("sam-570k", "svit", "llava-v1.5-mix665k")
    assert told.count("accept the licence on the homepage") == 1
    assert re.search(r"used by +sharegpt4v-pretrain", told)
    assert re.search(r"in the way +accept its terms at https://\S+ and set HF_TOKEN", told)
    assert re.search(r"used by +mixture llava-mix665k", told)
    assert re.search(r"in all +6 entries", told)


def test_a_mixture_called_as_a_data_set_is_shown_beside_it(shown: Callable[..., str]) -> None:
    told = shown("rlaif-v", "mmbench")
    assert "RLAIF-V preference pairs, images inside" in told
    assert "preference pairs for preference distillation" in told
    assert "benchmark mmbench" in told


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("llava-pretrian", "did you mean 'llava-pretrain'"),
        ("llava-mx665k", "did you mean 'llava-mix665k'"),
        ("coco", "; there is coco-annotations-2014, coco-test2015, coco-train2017, coco-val2014"),
        ("zzzz", "; list them: mmpipe data, mmpipe plan, mmpipe benchmarks$"),
    ],
)
def test_an_unknown_name_gets_a_short_hint(shown: Callable[..., str], name: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=hint) as told:
        shown(name)
    assert len(str(told.value)) < 300


@pytest.mark.parametrize("unpacked", [False, True])
def test_archives_that_are_unpacked_count_as_what_came(shown: Callable[..., str], unpacked: bool) -> None:
    unfinished("gqa-images", 0)
    files = Path("resources/datasets/.fetching/gqa-images/files")
    (files / ("1.jpg" if unpacked else "images.zip")).write_bytes(bytes(9_000_000 if unpacked else 3_000_000))
    done = {"downloads": {"images.zip": {"size": 3_000_000}}, "facts_brought": {}}
    (files.parent / "done.json").write_text(json.dumps(done))
    assert "3.0 MB of ~ 20.3 GB" in shown("gqa-images")


def test_restricted_licences_are_marked(plan: Plan) -> None:
    """The mark is a field of its own; no entry whose licence says so may lack it."""
    signs = {
        "NC": "non-commercial",
        "research": "research only",
        "academic": "research only",
        "non-commercial": "non-commercial",
    }
    for name, source in sources(plan):
        for sign, restriction in signs.items():
            if sign in source.licence:
                assert restriction in source.restricted, name


# --- from a server to a mixture ---------------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The project's own configuration, to which catalogue entries are added."""
    shutil.copytree(ROOT / "config", tmp_path / "config")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(download, "Patience", partial(download.Patience, pause=0.01))
    return tmp_path


def add(catalogue: str, **entries: Any) -> None:
    with Path("config", f"{catalogue}.yaml").open("a") as file:
        yaml.safe_dump({name.replace("_", "-"): entry for name, entry in entries.items()}, file)


def run(script: Any, spec: Any, output: dict[str, str], **wildcards: str) -> None:
    """Run a script as its rule does."""
    config = read_mapping(Path("config/config.yaml"))
    script(
        SimpleNamespace(
            config=config,
            wildcards=SimpleNamespace(items=wildcards.items, **wildcards),
            params={"spec": spec(Plan(config))},
            output=_Output(output),
            log=[f"logs/{'-'.join(wildcards.values())}.log"],
            threads=1,
            resources={},
            input=[],
        )
    )


class _Output(SimpleNamespace):
    """Named outputs that can be numbered too."""

    def __init__(self, named: dict[str, str]) -> None:
        super().__init__(**named)

    def __getitem__(self, index: int) -> str:
        return list(vars(self).values())[index]


def fetch(name: str) -> dict[str, Any]:
    out = f"resources/datasets/{name}/manifest.json"
    run(fetch_script.main, lambda plan: plan.source_spec(plan.datasets[name]), {"manifest": out}, dataset=name)
    return manifest.read(Path(out).parent)


def image(path: Path, seed: int) -> bytes:
    Image.new("RGB", (24, 16), (seed * 40 % 256, 80, 160)).save(path)
    return path.read_bytes()


def test_from_shared_images_on_a_server_to_a_verified_mixture(project: Path) -> None:
    """LLaVA's layout in small: images of two publishers, annotations of a third, one of them naming a lost image."""
    records = [
        {"id": str(n), "image": name, "conversations": [
            {"from": "human", "value": "What is it?\n<image>"}, {"from": "gpt", "value": f"colour {n}"}]}
        for n, name in enumerate(["coco/train2017/1.jpg", "vg/VG_100K/2.jpg", "vg/VG_100K_2/3.jpg", "coco/train2017/0.jpg"])
    ]  # fmt: skip
    zips = {
        "train2017": {"train2017/1.jpg": image(project / "1.jpg", 1)},
        "images": {"VG_100K/2.jpg": image(project / "2.jpg", 2)},
        "images2": {"VG_100K_2/3.jpg": image(project / "3.jpg", 3)},
    }
    with server.running() as host:
        for name, members in zips.items():
            body = make_zip(project / "made.zip", members).read_bytes()
            host.serve(f"/{name}.zip", server.truncated(body, len(body) // 2), server.content(body))
        host.serve("/mix.json", server.content(json.dumps(records).encode()))

        def url(*names: str) -> dict[str, Any]:
            files = [{"url": host.url(f"/{name}"), "to": name} for name in names]
            return {"source": "url", "files": files, "unpack": {n: "." for n in names if n.endswith(".zip")}}

        add(
            "datasets",
            small_coco=url("train2017.zip"),
            small_vg=url("images.zip", "images2.zip"),
            small_text=url("mix.json"),
            small_mix={"source": "joined", "parts": {".": "small-text", "coco": "small-coco", "vg": "small-vg"}},
        )
        part = {"dataset": "small-mix", "annotations": "mix.json", "image_position": "first", "expected": 5}
        add("mixtures", small={"max_bad": 0.3, "parts": [part]})
        for name in ("small-coco", "small-vg", "small-text", "small-mix"):
            facts = fetch(name)
    assert set(facts["inputs"]) == {f"resources/datasets/small-{name}/manifest.json" for name in ("coco", "vg", "text")}
    out = "resources/mixtures/small"
    outputs = {"records": f"{out}/records.arrow", "report": f"{out}/report.json", "manifest": f"{out}/manifest.json"}
    run(mix_script.main, lambda plan: plan.mixture_spec("small"), outputs, mixture="small")
    report = json.loads(Path(out, "report.json").read_text())
    assert (report["kept"], report["dropped"]) == (3, 1)
    assert report["parts"][0]["expected"] == 5
    assert report["parts"][0]["dropped"]["missing image"]["examples"] == [
        "3: there is no coco/train2017/0.jpg in resources/datasets/small-mix"
    ]


def test_a_fetch_that_fails_ends_the_job_with_a_message(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add("datasets", by_hand={"source": "manual", "files": [{"to": "a.zip"}], "how": "ask nicely"})
    with pytest.raises(SystemExit):
        fetch("by-hand")
    told = capsys.readouterr().err
    assert "mmpipe: by-hand: a person has to fetch this" in told
    assert "ask nicely" in told
    assert "ask nicely" in Path("logs/by-hand.log").read_text()


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"a": {"source": "joined", "parts": {".": "llava-pretrian"}}}, "did you mean 'llava-pretrain'"),
        ({"a": {"source": "joined", "parts": {".": "a"}}}, "'a': the data set is joined from itself"),
        (
            {"a": {"source": "joined", "parts": {".": "b"}}, "b": {"source": "joined", "parts": {".": "a/x"}}},
            "joined from itself",
        ),
    ],
)
def test_joined_data_sets_are_checked_before_any_job(project: Path, entries: dict[str, Any], message: str) -> None:
    add("datasets", **entries)
    with pytest.raises(ConfigError, match=message):
        Plan(read_mapping(Path("config/config.yaml")))


def test_a_backbone_cannot_be_joined(project: Path) -> None:
    add("backbones", a={"source": "joined", "parts": {".": "llava-pretrain"}})
    with pytest.raises(ConfigError, match=r"backbones.yaml, entry 'a': only data sets can be of the source 'joined'"):
        Plan(read_mapping(Path("config/config.yaml")))
