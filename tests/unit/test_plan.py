"""Recipes resolved: owners, paths, specs, and every mistake named with file, key and the nearest right name."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmpipe.benchmarks.spec import BenchmarkEntry
from mmpipe.data.spec import MixtureSpec
from mmpipe.errors import ConfigError
from mmpipe.models.moe.spec import RouterSettings
from mmpipe.plan.plan import Plan
from mmpipe.stages.base import Encoding, Hardware, TrainStage

CATALOGUES = {
    "backbones": {
        "eye": {"source": "made", "maker": "mmpipe.demo.backbones:clip_tiny"},
        "mouth": {"source": "made", "maker": "mmpipe.demo.backbones:qwen2_tiny"},
        "ear": {"source": "path", "path": "/somewhere"},
        "whole": {"source": "hub", "repo": "o/n", "subfolder": "llava"},
    },
    "datasets": {
        "captions": {"source": "made", "maker": "mmpipe.demo.datasets:captions"},
        "questions": {"source": "made", "maker": "mmpipe.demo.datasets:mmbench"},
    },
    "mixtures": {"mix": {"parts": [{"dataset": "captions", "annotations": "a.json"}]}},
    "benchmarks": {
        "mmbench": {"task": "mmbench", "data": "questions"},
        "mmbench_shuffled": {"task": "mmbench", "data": "questions", "control": "shuffle_images"},
    },
}
MODEL = {"vision": "eye", "language": "mouth"}
BASE = {"model": MODEL, "stages": {"pretrain": {"data": "mix"}, "finetune": {"data": "mix"}}}


@pytest.fixture
def project(tmp_path: Path):
    """Make a plan of the given recipes."""

    def make(files: dict[str, Any], catalogues: dict[str, Any] | None = None, **config: Any) -> Plan:
        folder = tmp_path / "config"
        (folder / "recipes").mkdir(parents=True, exist_ok=True)
        for name, content in {**CATALOGUES, **(catalogues or {})}.items():
            (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
        for name, recipe in files.items():
            text = recipe if isinstance(recipe, str) else yaml.safe_dump(recipe, sort_keys=False)
            (folder / "recipes" / f"{name}.yaml").write_text(text)
        chosen = {"recipes": [next(iter(files))], "benchmarks": ["mmbench"], **config}
        return Plan(chosen, tmp_path)

    return make


def ids(plan: Plan, recipe: str) -> list[str]:
    return [stage.id for stage in plan.stages(recipe)]


def test_a_recipe_owns_the_stages_it_declares(project):
    plan = project({"base": BASE, "more": {"extends": "base@pretrain", "stages": {"finetune": {"data": "mix"}}}})
    assert ids(plan, "base") == ["base@pretrain", "base@finetune"]
    assert ids(plan, "more") == ["base@pretrain", "more@finetune"]


def test_a_changed_stage_is_owned_with_everything_after_it(project):
    child = {"extends": "base", "stages": {"pretrain": {"learning_rate": 0.5}}}
    plan = project({"base": BASE, "child": child})
    assert ids(plan, "child") == ["child@pretrain", "child@finetune"]
    spec = json.loads(plan.spec(plan.stage("child", "pretrain")))
    assert spec["settings"] == {"data": "mix", "learning_rate": 0.5}
    assert json.loads(plan.spec(plan.stage("child", "finetune")))["parent"] == "child@pretrain"


def test_new_stages_take_the_defaults_of_the_recipe_they_extend(project):
    parent = BASE | {"defaults": {"template": "qwen"}, "hardware": {"cpus": 7}}
    child = {"extends": "base@pretrain", "stages": {"finetune": {"data": "mix"}}}
    settings = project({"base": parent, "child": child}).stage("child", "finetune").settings
    assert (settings.template, settings.hardware.cpus) == ("qwen", 7)


def test_another_backbone_changes_every_stage(project):
    plan = project({"base": BASE, "other": {"extends": "base", "model": {"vision": "ear", "language": "mouth"}}})
    assert ids(plan, "other") == ["other@pretrain", "other@finetune"]


def test_a_matrix_makes_one_recipe_a_combination(project):
    variant = {
        "matrix": {"rate": [0.1, 0.2], "seed": [0, 1]},
        "name": "v-{rate}-{seed}",
        "extends": "base@pretrain",
        "stages": {"finetune": {"data": "mix", "learning_rate": "{rate}", "seed": "{seed}"}},
    }
    plan = project({"base": BASE, "v": variant}, recipes=["v-*"])
    assert plan.chosen_recipes == ["v-0.1-0", "v-0.1-1", "v-0.2-0", "v-0.2-1"]
    assert plan.stage("v-0.2-1", "finetune").settings.learning_rate == 0.2
    assert [stage.id for stage in plan.chosen_stages()].count("base@pretrain") == 1
    assert [plan.family(name) for name in plan.chosen_recipes] == ["v-0.1-*"] * 2 + ["v-0.2-*"] * 2
    assert plan.family("v-0.1-1@finetune") == "v-0.1-*@finetune"
    assert plan.family("v-0.1-1@pretrain") == "v-0.1-1@pretrain", "the seeds share this checkpoint"
    assert plan.family("base") == "base"


def test_hardware_and_descriptions_are_no_part_of_the_spec(project):
    slow = json.loads(json.dumps(BASE)) | {"hardware": {"cpus": 8, "micro_batch": 1}, "description": "same"}
    plan = project({"base": BASE, "slow": slow})
    assert plan.spec(plan.stage("base", "pretrain")) == plan.spec(plan.stage("slow", "pretrain"))


def test_defaults_written_out_do_not_change_the_spec(project):
    explicit = json.loads(json.dumps(BASE))
    explicit["stages"]["pretrain"] |= {"learning_rate": 1e-3, "batch_size": 256}
    plan = project({"base": BASE, "explicit": explicit})
    assert plan.spec(plan.stage("base", "pretrain")) == plan.spec(plan.stage("explicit", "pretrain"))


@pytest.mark.parametrize("place", ["stages", "defaults"])
def test_the_former_name_of_a_setting_is_read_with_a_warning_and_stays_in_the_spec(project, place):
    def base(key: str) -> dict[str, Any]:
        stages = {"pretrain": {"data": "mix"}, "finetune": {"data": "mix"}}
        if place == "defaults":
            return {"model": MODEL, "defaults": {key: 0.5}, "stages": stages}
        stages["finetune"][key] = 0.5
        return {"model": MODEL, "stages": stages}

    with pytest.warns(FutureWarning, match="'minimum_supervised' is now called 'min_supervised_fraction'"):
        old = project({"base": base("minimum_supervised")})
    new = project({"base": base("min_supervised_fraction")})
    stages = [plan.stage("base", "finetune") for plan in (old, new)]
    assert [stage.settings.min_supervised_fraction for stage in stages] == [0.5, 0.5]
    assert old.spec(stages[0]) == new.spec(stages[1])
    assert '"minimum_supervised":0.5' in new.spec(stages[1])


@pytest.mark.parametrize("key", ["minimum_supervised", "min_supervised_fraction"])
def test_a_setting_is_overridden_under_either_name(project, key):
    base = {"model": MODEL, "defaults": {"min_supervised_fraction": 0.5}, "stages": {"finetune": {"data": "mix"}}}
    other = {"extends": "base", "defaults": {key: 0.2}, "stages": {"again": {"kind": "finetune", "data": "mix"}}}
    third = {"extends": "other", "stages": {"again": {key: 0.1}}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        plan = project({"base": base, "other": other, "third": third})
    found = [plan.stage(name, "again").settings.min_supervised_fraction for name in ("other", "third")]
    assert found == [0.2, 0.1]
    both = {
        "model": MODEL,
        "stages": {"finetune": {"data": "mix", "minimum_supervised": 1, "min_supervised_fraction": 1}},
    }
    with pytest.raises(
        ConfigError, match=r"stages.finetune: 'minimum_supervised' and 'min_supervised_fraction' are one setting"
    ):
        project({"base": both})


@pytest.mark.parametrize("key", ["learning_rate", "seed", "template", "image_aspect"])
def test_every_setting_that_changes_the_result_is_in_the_spec(project, key):
    other = {"learning_rate": 0.1, "seed": 3, "template": "phi3", "image_aspect": "pad"}[key]
    changed = json.loads(json.dumps(BASE))
    changed["stages"]["pretrain"][key] = other
    plan = project({"base": BASE, "changed": changed})
    assert plan.spec(plan.stage("base", "pretrain")) != plan.spec(plan.stage("changed", "pretrain"))


def test_scientific_notation_without_a_dot_is_a_number(project):
    text = "model: {vision: eye, language: mouth}\nstages:\n  pretrain: {data: mix, learning_rate: 2e-5}\n"
    plan = project({"base": text})
    assert plan.stage("base", "pretrain").settings.learning_rate == 2e-5


def test_checkpoints_are_named_by_recipe_and_stage(project):
    plan = project({"base": BASE}, recipes=["base@pretrain", "base"])
    assert plan.checkpoint("base").name == "finetune"
    assert plan.checkpoint("base@pretrain").name == "pretrain"
    assert plan.chosen_recipes == ["base@pretrain", "base"]  # the last one goes by the recipe


def test_patterns_leave_out_projectors_that_answer_no_questions(project):
    longer = {"extends": "base", "stages": {"upcycle": {}}}
    assert project({"base": BASE, "longer": longer}, recipes=["longer@*"]).chosen_recipes == [
        "longer@finetune",
        "longer",
    ]


def test_controls_stand_beside_their_benchmark(project):
    plan = project({"base": BASE}, benchmarks=["mmbench", "mmbench_shuffled"])
    assert plan.controls("mmbench") == ["mmbench_shuffled"]
    assert plan.score_files("results", "mmbench") == [
        "results/base/eval/mmbench/score.json",
        "results/base/eval/mmbench_shuffled/score.json",
    ]


def test_smoke_runs_have_a_place_and_limits_of_their_own(project):
    plan = project({"base": BASE}, smoke={"max_steps": 3, "questions": 5})
    job = plan.job(plan.stage("base", "finetune"), "results/smoke")
    assert job.max_steps == 3
    assert job.parent == Path("results/smoke/base/pretrain/model")
    assert plan.benchmark_entry("mmbench", smoke=True).limit == 5
    assert plan.benchmark_entry("mmbench").limit is None


WHOLE = {"model": {"checkpoint": "whole"}, "stages": {"finetune": {"data": "mix"}}}


def test_a_whole_checkpoint_is_constructed_first(project):
    plan = project({"base": WHOLE | {"hardware": {"gpus": 4, "memory_gb": 50}}})
    construct, finetune = plan.stages("base")
    assert (construct.kind, finetune.parent) == ("construct", construct)
    assert construct.settings.hardware.model_dump(include={"gpus", "memory_gb"}) == {"gpus": 0, "memory_gb": 50}
    assert [path.as_posix() for path in plan.inputs(construct).values()] == ["resources/backbones/whole/manifest.json"]
    assert plan.inputs(finetune).keys() == {"parent", "tokens"}
    assert plan.tokens_of(finetune).inputs()["checkpoint"] == plan.inputs(finetune)["parent"]
    job = plan.job(construct)
    assert job.backbones == {"checkpoint": Path("resources/backbones/whole/llava")}
    assert json.loads(job.spec)["subfolders"] == {"checkpoint": "llava"}


def test_stages_that_read_a_mixture_alike_share_its_tokens(project):
    other = {"extends": "base", "stages": {"finetune": {"learning_rate": 1.0}, "prefinetune": {"kind": "finetune"}}}
    other["stages"]["prefinetune"] |= {"data": "mix", "template": "chatml"}
    plan = project({"base": BASE, "more": other, "ear": {"extends": "base", "model": {**MODEL, "vision": "ear"}}})
    pretrain, finetune = map(plan.tokens_of, plan.stages("base"))
    assert pretrain.key != finetune.key, "captions have a template of their own"
    again, chatml = map(plan.tokens_of, plan.stages("more")[1:])
    assert again.key == finetune.key != chatml.key
    assert plan.tokens_of(plan.stages("ear")[1]).key != finetune.key, "another tower, other image tokens"
    assert set(finetune.inputs()) == {"mixture", "vision", "language"}
    assert plan.tokens.keys() >= {pretrain.key, finetune.key, chatml.key}
    assert f"{finetune.directory}/report.html" in plan.report_items()


def test_a_teacher_is_precomputed_on_its_own_tokens(project):
    student = {
        "model": {**MODEL, "vision": "ear"},
        "stages": {"distill_dense": {"data": "mix", "teacher": "base", "teacher_cache": {"k": 4}}},
    }
    plan = project({"base": BASE, "student": student})
    (annotation,) = plan.precomputations.values()
    assert plan.precomputation_tokens(annotation).directories["vision"] == Path("resources/backbones/eye")
    assert plan.tokens_of(plan.stages("student")[0]).directories["vision"] == Path("resources/backbones/ear")


def test_in_how_many_jobs_a_teacher_writes_changes_nothing_but_the_jobs(project):
    stages = {"distill_dense": {"data": "mix", "teacher": "base", "teacher_cache": {"k": 4}}}
    recipes = {"base": BASE, "student": {"model": MODEL, "stages": stages}}
    one = project(recipes)
    three = project(recipes | {"base": {**BASE, "answering": {"chunks": 3}}})
    (name,) = one.precomputations
    assert name in three.precomputations
    assert one.inputs(one.stages("student")[0]) == three.inputs(three.stages("student")[0])
    checkpoint, mixture, key = name.split("/")
    assert three.precomputation_chunks(three.precomputations[name], "results/smoke") == [
        f"resources/smoke/teacher/{checkpoint}/{mixture}/chunks/{key}/{n:04d}-of-0003.json" for n in range(3)
    ]


def test_a_whole_checkpoint_can_be_measured_as_it_is(project):
    plan = project({"base": {"model": {"checkpoint": "whole"}}, "more": {"extends": "base", **WHOLE}})
    assert ids(plan, "base") == ["base@construct"]
    assert ids(plan, "more") == ["base@construct", "more@finetune"]
    assert plan.chosen_recipes == ["base"]


def test_settings_of_the_construction_stand_where_they_are_written(project):
    stages = {"finetune": {"data": "mix"}, "construct": {"template": "chatml"}}
    plan = project({"base": WHOLE | {"stages": stages}})
    assert [stage.name for stage in plan.stages("base")] == ["construct", "finetune"]
    assert plan.stages("base")[0].settings.template == "chatml"


def test_another_layout_constructs_again_and_fetches_nothing(project):
    plan = project({"base": WHOLE})
    other = {"backbones": CATALOGUES["backbones"] | {"whole": CATALOGUES["backbones"]["whole"] | {"layout": "llava"}}}
    again = project({"base": WHOLE}, other)
    assert again.spec(again.stages("base")[0]) != plan.spec(plan.stages("base")[0])
    assert plan.source_spec(plan.backbones["whole"]) == again.source_spec(again.backbones["whole"])


def test_the_stock_layout_written_out_changes_nothing(project):
    plan = project({"base": WHOLE})
    other = {"backbones": CATALOGUES["backbones"] | {"whole": CATALOGUES["backbones"]["whole"] | {"layout": "stock"}}}
    same = project({"base": WHOLE}, other)
    assert same.spec(same.stages("base")[0]) == plan.spec(plan.stages("base")[0])
    assert plan.source_spec(plan.backbones["whole"]) == same.source_spec(same.backbones["whole"])


def test_equal_stages_of_two_recipes_are_pointed_out(project):
    plan = project({"base": BASE, "twin": BASE})
    assert any("twin@pretrain equals base@pretrain" in warning for warning in plan.warnings())


WRONG = {
    "unknown key": ({"base": BASE | {"stagse": {}}}, {}, ["base.yaml", "'stagse'", "did you mean 'stages'"]),
    "unknown setting": (
        {"base": {"model": MODEL, "stages": {"pretrain": {"data": "mix", "learnin_rate": 1}}}},
        {},
        ["base.yaml", "stages.pretrain", "'learnin_rate'", "did you mean 'learning_rate'"],
    ),
    "wrong type": (
        {"base": {"model": MODEL, "stages": {"pretrain": {"data": "mix", "batch_size": "many"}}}},
        {},
        ["base.yaml", "batch_size", "integer", "'many'"],
    ),
    "unknown value": (
        {"base": {"model": MODEL, "stages": {"pretrain": {"data": "mix", "schedule": "cosin"}}}},
        {},
        ["schedule", "'cosin'", "did you mean 'cosine'"],
    ),
    "unknown template": (
        {"base": {"model": MODEL, "stages": {"pretrain": {"data": "mix", "template": "vicuna_v2"}}}},
        {},
        ["base.yaml", "stages.pretrain", "template", "'vicuna_v2'", "did you mean 'vicuna_v1'"],
    ),
    "a batch that the devices cannot share": (
        {"base": {"model": MODEL, "stages": {"pretrain": {"data": "mix", "batch_size": 10, "hardware": {"gpus": 4}}}}},
        {},
        ["base.yaml", "stages.pretrain", "a batch of 10 cannot be shared evenly by 4 processes"],
    ),
    "unknown stage": (
        {"base": {"model": MODEL, "stages": {"pretrian": {"data": "mix"}}}},
        {},
        ["base.yaml", "'pretrian'", "did you mean 'pretrain'"],
    ),
    "missing parent": (
        {"base": BASE, "child": {"extends": "bsae", "stages": {"finetune": {}}}},
        {},
        ["child.yaml", "extends", "'bsae'", "did you mean 'base'"],
    ),
    "missing stage of the parent": (
        {"base": BASE, "child": {"extends": "base@finetun"}},
        {},
        ["child.yaml", "'finetun'", "did you mean 'finetune'"],
    ),
    "cycle": (
        {"a": {"extends": "b"}, "b": {"extends": "c"}, "c": {"extends": "a"}},
        {},
        ["extends", "circle", "a -> b -> c -> a"],
    ),
    "missing mixture": (
        {"base": {"model": MODEL, "stages": {"pretrain": {"data": "mxi"}}}},
        {},
        ["base.yaml", "stages.pretrain.data", "'mxi'", "did you mean 'mix'"],
    ),
    "missing backbone": (
        {"base": {"model": {"vision": "eyes", "language": "mouth"}, "stages": {"pretrain": {"data": "mix"}}}},
        {},
        ["model.vision", "'eyes'", "did you mean 'eye'"],
    ),
    "half a model": (
        {"base": BASE | {"model": {"vision": "eye"}}},
        {},
        ["base.yaml", "'language' is missing", "whole 'checkpoint'"],
    ),
    "missing checkpoint": (
        {"base": {"model": {"checkpoint": "whale"}}},
        {},
        ["model.checkpoint", "'whale'", "did you mean 'whole'"],
    ),
    "fact of the checkpoint": (
        {"base": {"model": {"checkpoint": "whole", "feature_layer": -1}}},
        {},
        ["'feature_layer'", "fact of the checkpoint 'whole'"],
    ),
    "no model": ({"base": {"stages": {"pretrain": {"data": "mix"}}}}, {}, ["base.yaml", "'model'"]),
    "name clash": ({"mmbench": BASE}, {}, ["mmbench.yaml", "taken"]),
    "clash of two files": (
        {"a": {**BASE, "name": "same"}, "b": {**BASE, "name": "same"}},
        {"recipes": ["same"]},
        ["b.yaml", "'same' already", "a.yaml"],
    ),
    "axis missing in the name": (
        {"a": {**BASE, "matrix": {"seed": [1, 2]}, "name": "one"}},
        {"recipes": ["one"]},
        ["a.yaml", "'{seed}'"],
    ),
    "chosen recipe": ({"base": BASE}, {"recipes": ["bass"]}, ["recipes", "'bass'", "did you mean 'base'"]),
    "chosen benchmark": ({"base": BASE}, {"benchmarks": ["mbench"]}, ["benchmarks", "'mbench'", "'mmbench'"]),
    "benchmark override": (
        {"base": BASE},
        {"benchmarks": [{"mmbench": {"dta": "questions"}}]},
        ["benchmarks.mmbench", "'dta'", "did you mean 'data'"],
    ),
    "key twice": (
        {"base": "model: {vision: eye, language: mouth}\nstages:\n  pretrain: {data: mix}\n  pretrain: {data: mix}\n"},
        {},
        ["base.yaml, line 4", "'pretrain'", "twice"],
    ),
    "not YAML": ({"base": "stages: [unclosed"}, {}, ["base.yaml", "not valid YAML"]),
    "unknown key of the configuration": ({"base": BASE}, {"recipe": []}, ["'recipe'", "did you mean 'recipes'"]),
    "default nobody knows": (
        {"base": BASE | {"defaults": {"learning_rat": 1}}},
        {},
        ["defaults.learning_rat", "did you mean 'learning_rate'"],
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_mistakes_are_named(project, name):
    recipes, config, expected = WRONG[name]
    with pytest.raises(ConfigError) as caught:
        project(recipes, **config).chosen_recipes  # noqa: B018
    for part in expected:
        assert part in str(caught.value)


@pytest.fixture
def fetched(demo_files, monkeypatch):
    """The backbones' files are there."""
    monkeypatch.chdir(demo_files)
    return {"vision": "clip-tiny", "language": "qwen2-tiny"}, {
        "backbones": {
            name: {"source": "made", "maker": f"mmpipe.demo.backbones:{name.replace('-', '_')}"}
            for name in ("clip-tiny", "qwen2-tiny")
        }
    }


@pytest.mark.parametrize(
    "settings",
    [
        {"trainable": ["language_modle.*"]},
        {"trainable": ["*", "language_model.layers.7.*"]},
        {"learning_rates": {"vision_tower.encoder.layer.*": 1e-3}},
        {"lora": {"rank": 2, "beside": ["multi_modal_projektor.*"]}},
    ],
)
def test_a_pattern_that_matches_no_parameter_is_found_once_the_backbones_are_fetched(project, fetched, settings):
    model, catalogues = fetched
    recipe = {"base": {"model": model, "stages": {"finetune": {"data": "mix", **settings}}}}
    with pytest.raises(ConfigError, match=r"base\.yaml: stages\.finetune\..*matches no parameter of.*did you mean"):
        project(recipe, catalogues)


def test_patterns_of_parameters_that_stages_add_are_not_looked_for_in_backbones(project, fetched):
    model, catalogues = fetched
    rates = {"language_model.layers.*.mlp.router.*": 1e-3, "language_model.sparsifier.*": 1e-3, "lm_head.*": 1e-4}
    patterns = ["language_model.layers.*_proj.weight", "vision_tower.encoder.*", "*.mlp.experts.0.*"]
    settings = {"data": "mix", "learning_rates": rates, "trainable": patterns}
    project({"base": {"model": model, "stages": {"finetune": settings}}}, catalogues)


def test_a_length_beyond_the_models_positions_is_pointed_out(project, fetched):
    model, catalogues = fetched
    stages = {"pretrain": {"data": "mix"}, "finetune": {"data": "mix", "max_length": 4096}}
    (warning,) = project({"base": {"model": model, "stages": stages}}, catalogues).warnings()
    assert warning.startswith("base@finetune: max_length is 4096, but the language model has 2048 positions")


def test_catalogue_mistakes_name_file_and_entry(project):
    wrong = {"backbones": {"eye": {"source": "mad", "maker": "x:y"}}}
    with pytest.raises(ConfigError, match=r"(?s)backbones\.yaml, entry 'eye'.*'mad'.*did you mean 'made'"):
        project({"base": BASE}, wrong)


def test_a_mixture_of_an_unknown_data_set_is_found(project):
    wrong = {"mixtures": {"mix": {"parts": [{"dataset": "caption", "annotations": "a.json"}]}}}
    with pytest.raises(ConfigError, match=r"mixture 'mix'.*'caption'.*did you mean 'captions'"):
        project({"base": BASE}, wrong)


def test_an_unknown_layout_is_found(project):
    wrong = {"backbones": CATALOGUES["backbones"] | {"ear": {"source": "path", "path": "/x", "layout": "llavva"}}}
    with pytest.raises(ConfigError, match=r"backbones\.yaml, entry 'ear'.*'llavva'.*did you mean 'llava'"):
        project({"base": BASE}, wrong)


def test_data_sets_have_no_layout(project):
    maker = {"source": "made", "maker": "m:f"}
    wrong = {"datasets": CATALOGUES["datasets"] | {"captions": maker | {"layout": "stock"}}}
    with pytest.raises(ConfigError, match=r"datasets\.yaml, entry 'captions'.*only backbones"):
        project({"base": BASE}, wrong)


SPARSE = {
    "base": BASE,
    "lean": {"extends": "base", "stages": {"sparsify": {"data": "mix"}}},
    "later": {"extends": "lean", "stages": {"prefer": {"data": "mix", "reference": "lean"}}},
}


def test_keep_rates_add_rows_of_sparsified_checkpoints(project):
    plan = project(SPARSE, recipes=["base", "lean", "later@sparsify", "later"], keep_rates=[0.5, 1.0])
    assert plan.chosen_recipes == [
        *("base", "lean", "lean+keep0.5", "lean+keep1"),
        *("later@sparsify", "later@sparsify+keep0.5", "later@sparsify+keep1"),
        *("later", "later+keep0.5", "later+keep1"),
    ]
    assert plan.checkpoint("lean+keep0.5") is plan.checkpoint("lean")
    assert "results/lean+keep0.5/eval/mmbench/score.json" in plan.score_files("results", "mmbench")
    assert not [file for file in plan.submissions() if "+" in file], "servers grade what was trained"


def test_variants_are_chosen_by_name(project):
    plan = project(SPARSE, recipes=["l*+whole", "later@sparsify+keep0.25"])
    assert plan.chosen_recipes == ["lean+whole", "later+whole", "later@sparsify+keep0.25"]
    assert [stage.id for stage in plan.chosen_stages()][-1] == "later@prefer"


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("base+keep0.5", "has no predictors that could keep more or less"),
        ("lean+keep0", "above 0 and at most 1"),
        ("lean+keep1.5", "above 0 and at most 1"),
        ("lean+kep0.5", r"'\+kep0\.5' is no variant; known: \+keep0\.5 \(any rate\), \+whole"),
        ("laen+keep0.5", "there is no recipe 'laen'; did you mean 'lean'"),
    ],
)
def test_variants_that_cannot_be(project, recipe, message):
    with pytest.raises(ConfigError, match=message):
        project(SPARSE, recipes=[recipe])


def test_variants_teach_nothing(project):
    learner = {"extends": "base@pretrain", "stages": {"distill_dense": {"data": "mix", "teacher": "lean+whole"}}}
    with pytest.raises(ConfigError, match="variants answer benchmarks only"):
        project({**SPARSE, "learner": learner})


def test_a_keep_rate_outside_its_range_is_found(project):
    with pytest.raises(ConfigError, match=r"keep_rates"):
        project(SPARSE, keep_rates=[0.0])
    wrong = {
        **SPARSE,
        "lean": {"extends": "base", "stages": {"sparsify": {"data": "mix", "sparsity": {"vision_keep_rate": 2}}}},
    }
    with pytest.raises(ConfigError, match=r"lean\.yaml: stages\.sparsify.*sparsity\.vision_keep_rate"):
        project(wrong)


def test_a_new_version_of_the_code_makes_mixtures_and_tokens_again(project, monkeypatch):
    """Rules are run again when their spec changes; the stages read other tokens then."""
    plan = project({"base": BASE})
    stage = plan.stage("base", "pretrain")
    mixture, tokens, read = plan.mixture_spec("mix"), plan.tokens_of(stage), plan.inputs(stage)
    old = tokens.spec()
    monkeypatch.setattr(MixtureSpec, "VERSION", MixtureSpec.VERSION + 1)
    monkeypatch.setattr(Encoding, "VERSION", Encoding.VERSION + 1)
    assert plan.mixture_spec("mix") != mixture
    assert plan.tokens_of(stage).spec() != old
    assert plan.inputs(stage)["tokens"] != read["tokens"]


def test_descriptions_of_a_mixture_are_not_in_its_spec(project):
    told = {"expected": 7, "known": "some vanish"}
    part = {"dataset": "captions", "annotations": "a.json"}
    specs = {
        project({"base": BASE}, {"mixtures": {"mix": {"parts": [part | more]}}}).mixture_spec("mix")
        for more in ({}, told)
    }
    assert len(specs) == 1


@pytest.fixture
def renamed(monkeypatch):
    """A release that renamed ``step_size`` of a stage and ``ram_gb`` of hardware."""
    monkeypatch.setattr(TrainStage, "FORMER_KEYS", {"step_size": "learning_rate"})
    monkeypatch.setattr(Hardware, "FORMER_KEYS", {"ram_gb": "memory_gb"})


@pytest.mark.parametrize(
    "written",
    [
        {"stages": {"finetune": {"data": "mix", "step_size": 0.5}}},
        {"stages": {"finetune": {"data": "mix"}}, "defaults": {"step_size": 0.5}},
    ],
    ids=["in a stage", "in the defaults"],
)
def test_a_former_key_is_renamed_before_recipes_are_merged(project, renamed, written):
    base = {"model": MODEL, "hardware": {"ram_gb": 7}, **written}
    child = {"extends": "base", "stages": {"finetune": {"learning_rate": 0.25, "hardware": {"memory_gb": 9}}}}
    with pytest.warns(FutureWarning) as warned:
        plan = project({"base": base, "child": child})
    before, after = (plan.stage(recipe, "finetune").settings for recipe in ("base", "child"))
    assert (before.learning_rate, before.hardware.memory_gb) == (0.5, 7)
    assert (after.learning_rate, after.hardware.memory_gb) == (0.25, 9)
    messages = [str(warning.message) for warning in warned]
    assert len(messages) == 2, "one a key"
    assert all("base.yaml: " in message for message in messages)
    assert {message.partition("the key ")[2] for message in messages} == {
        "'ram_gb' is now called 'memory_gb'",
        "'step_size' is now called 'learning_rate'",
    }


def test_a_child_may_use_the_former_key(project, renamed):
    child = {"extends": "base", "stages": {"finetune": {"step_size": 0.25, "hardware": {"ram_gb": 9}}}}
    with pytest.warns(FutureWarning, match=r"child\.yaml: stages\.finetune"):
        settings = project({"base": BASE, "child": child}).stage("child", "finetune").settings
    assert (settings.learning_rate, settings.hardware.memory_gb) == (0.25, 9)


def test_one_setting_under_both_names_is_a_mistake(project, renamed):
    both = {"model": MODEL, "stages": {"finetune": {"data": "mix", "step_size": 0.5, "learning_rate": 0.5}}}
    with pytest.raises(ConfigError, match=r"base\.yaml: stages\.finetune: 'step_size' and 'learning_rate' are one"):
        project({"base": both})


def test_an_override_of_a_benchmark_may_use_the_former_key(project, monkeypatch):
    monkeypatch.setattr(BenchmarkEntry, "FORMER_KEYS", {"longest": "max_new_tokens"})
    entry = {"mmbench": {"task": "mmbench", "data": "questions", "max_new_tokens": 9}}
    with pytest.warns(FutureWarning, match=r"config: benchmarks\.mmbench: the key 'longest'"):
        plan = project({"base": BASE}, {"benchmarks": entry}, benchmarks=[{"mmbench": {"longest": 7}}])
    assert plan.benchmarks["mmbench"].max_new_tokens == 7


def test_a_former_key_of_a_router_is_renamed_before_recipes_are_merged(project):
    (old, new) = next(iter(RouterSettings.FORMER_KEYS.items()))

    def upcycle(key: str) -> dict[str, Any]:
        return {"upcycle": {"moe": {"router_settings": {key: "reference"}}}}

    base = {"model": MODEL, "stages": {**BASE["stages"], **upcycle(new)}}
    with pytest.warns(FutureWarning, match="child"):
        plan = project({"base": base, "child": {"extends": "base", "stages": upcycle(old)}})
    assert plan.stage("child", "upcycle").settings.moe.router_settings == {new: "reference"}
