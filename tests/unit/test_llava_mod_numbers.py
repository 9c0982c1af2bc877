"""Every hyper-parameter that LLaVA-MoD publishes, against what its recipes resolve to and what the ledger says."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import yaml
from ledger import entries
from project_fixtures import REPOSITORY

from mmpipe.plan.plan import Plan, StagePlan

TABLE = yaml.safe_load((REPOSITORY / "tests/fixtures/published/llava_mod.yaml").read_text())
RECIPES = {
    "llava-mod-qwen2-0.5b": "llava-mod-teacher-qwen2-7b",
    "llava-mod-qwen2-1.5b": "llava-mod-teacher-qwen2-7b",
    "llava-mod-qwen1.5-0.5b": "llava-mod-teacher-qwen1.5-7b",
    "llava-mod-qwen1.5-1.8b": "llava-mod-teacher-qwen1.5-7b",
}
STUDENT = [*RECIPES]
TEACHER = sorted(set(RECIPES.values()))
STAGES = {
    "student": ["pretrain", "distill_dense", "upcycle", "distill_sparse", "prefer"],
    "teacher": ["pretrain", "finetune"],
}


@cache
def plan() -> Plan:
    return Plan({"recipes": ["llava-mod-*"], "benchmarks": ["pope"]}, REPOSITORY)


def followed(sources: dict[str, Any]) -> Any:
    """The value the recipes take; sources that agree need no word about it."""
    if "follow" in sources:
        return sources[sources["follow"]]
    values = list(sources.values())
    assert all(value == values[0] for value in values), f"whom to follow? {sources}"
    return values[0]


def published(role: str) -> Iterator[tuple[str, str, Any]]:
    """Stage, setting and value; what holds for all trainings is told of each."""
    table = TABLE[role]
    for stage, settings in table.items():
        if stage == "all":
            continue
        trains = "data" in settings
        for setting, sources in {**(table["all"] if trains else {}), **settings}.items():
            yield stage, setting, followed(sources)


def resolved(stage: StagePlan, setting: str) -> Any:
    """What a stage of the plan has under a dotted name."""
    place, _, name = setting.rpartition(".")
    if place == "mixture":
        (value,) = {getattr(part, name) for part in plan().mixtures[stage.settings.mixture()].parts}
        return value
    holder = stage.vision_language if place == "model" else stage.settings
    if place not in ("", "model"):
        holder = getattr(holder, place)
    value = getattr(holder, name)
    return list(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize(("role", "recipe"), [("student", r) for r in STUDENT] + [("teacher", r) for r in TEACHER])
def test_every_published_number_is_in_the_recipe(role: str, recipe: str) -> None:
    stages = {stage.name: stage for stage in plan().stages(recipe)}
    assert list(stages) == STAGES[role]
    wrong = [
        f"{stage}: {setting} is {found}, published {value}"
        for stage, setting, value in published(role)
        if (found := resolved(stages[stage], setting)) != value
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(("student", "teacher"), RECIPES.items())
def test_students_learn_from_the_teacher_of_their_family(student: str, teacher: str) -> None:
    by_name = {stage.name: stage.settings for stage in plan().stages(student)}
    assert by_name["distill_dense"].teacher == by_name["distill_sparse"].teacher == teacher
    assert by_name["prefer"].reference == teacher
    assert plan().checkpoint(teacher).name == "finetune"
    language = plan().stages(student)[0].vision_language.language
    assert language == student.removeprefix("llava-mod-")
    assert plan().stages(teacher)[0].vision_language.language == teacher.removeprefix("llava-mod-teacher-")


def shown(value: Any) -> str:
    """A value as the ledger writes it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(f"`{one}`" if isinstance(one, str) else shown(one) for one in value)
    return f"{value:g}".replace("e-0", "e-") if isinstance(value, float) else str(value)


# the ledger's tables: head of the first column -> whose settings, in which stages
TABLES = {
    "every training of a student": ("student", ["all"]),
    "student": ("student", ["pretrain", "distill_dense", "distill_sparse", "prefer"]),
    "experts": ("student", ["upcycle"]),
    "both trainings of a teacher": ("teacher", ["all"]),
    "teacher": ("teacher", ["pretrain", "finetune"]),
}


@pytest.mark.parametrize("head", TABLES)
def test_the_ledger_has_these_numbers_and_where_sources_disagree(head: str) -> None:
    role, columns = TABLES[head]
    page = (REPOSITORY / "docs/parity/llava-mod.md").read_text()
    written = {
        entry.term.strip("`"): list(entry.facts.values()) for entry in entries(page) if entry.heading.lower() == head
    }
    wanted = list(dict.fromkeys(setting for stage in columns for setting in TABLE[role][stage]))
    assert sorted(written) == sorted(wanted)
    for setting, (*values, source) in written.items():
        found = [TABLE[role][stage].get(setting) for stage in columns]
        assert values == ["–" if entry is None else shown(followed(entry)) for entry in found], setting
        for entry in filter(None, found):
            others = [shown(value) for name, value in entry.items() if value != followed(entry) and name != "follow"]
            assert all(other in source for other in others), f"{setting}: {others} of {entry} are not told"
