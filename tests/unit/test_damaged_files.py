"""YAML and manifests that are damaged or hostile are refused with a sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmpipe.artifacts import manifest
from mmpipe.artifacts.files import read_json, read_object
from mmpipe.chat.find import find
from mmpipe.cli.inventory import InventoryItem
from mmpipe.errors import ArtifactError, ConfigError
from mmpipe.plan.configfile import read_plainly
from mmpipe.report.pages import settings_page
from mmpipe.settings import read_mapping, read_yaml
from mmpipe.sources.transfer.lock import locked

BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join([f'*{chr(97 + n)}'] * 10)}]\n" for n in range(8)
)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[" * 100_000, "nested more than 100 deep"),
        ("{" * 100_000, "nested more than 100 deep"),
        ("- " * 100_000 + "a", "nested more than 100 deep"),
        ("".join(" " * n + "a:\n" for n in range(3000)), "nested more than 100 deep"),
        (BOMB, "more than 1000000 values"),
        ("? [a, b]\n: 1\n", "line 1: not valid YAML: a key is a list, not a text"),
        ("x:\n  {a: 1}: 2\n", "line 2: not valid YAML: a key is a dict, not a text"),
        ("a: 2020-99-99", "a value cannot be read (month must be in 1..12)"),
        ("a: !!bool maybe", "a value cannot be read"),
        ("a: !!timestamp hello", "a value cannot be read"),
        ("a: 1" + "0" * 5000, "a value cannot be read"),
        ("a: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("a: \x00", "control characters are not allowed"),
        ("- a", "expected 'name: value' lines, found a list"),
        ("1: a", "the key 1 is not a text"),
    ],
)
def test_yaml_that_cannot_be_read_is_refused_in_a_sentence(tmp_path, text, problem):
    path = tmp_path / "hostile.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"hostile\.yaml") as caught:
        read_mapping(path)
    assert problem in str(caught.value)


def test_yaml_of_the_allowed_depth_is_read(tmp_path):
    path = tmp_path / "deep.yaml"
    path.write_text("[" * 100 + "]" * 100)
    assert read_yaml(path)


@pytest.fixture
def snakemake_loader(monkeypatch):
    """Snakemake's loader of configurations, put back afterwards."""
    from snakemake.common import configfile

    monkeypatch.setattr(configfile, "_load_configfile", configfile._load_configfile)
    return configfile.load_configfile


@pytest.mark.parametrize(
    "head",
    [
        "__use_yte__: true",
        '"\\x5f_use_yte__": 1',
        "__use_yte__: false",
        "{__use_yte__: true, a: 1}",
        "!!map {__use_yte__: x}",
    ],
)
def test_snakemake_refuses_configurations_with_expressions(tmp_path, snakemake_loader, head):
    from snakemake.exceptions import WorkflowError

    marker = tmp_path / "ran"
    path = tmp_path / "evil.yaml"
    body = "" if head[0] in "{!" else f"\nrecipes: ?open({str(marker)!r}, 'w')\n"
    path.write_text(head + body)
    read_plainly()
    read_plainly()  # the profile and the Snakefile both do
    with pytest.raises(WorkflowError, match=r"evil\.yaml: '__use_yte__' lets Snakemake run expressions"):
        snakemake_loader(path)
    with pytest.raises(WorkflowError, match="holds values alone"):
        read_plainly([path])
    assert not marker.exists()


def test_snakemake_reads_other_configurations_as_before(tmp_path, snakemake_loader):
    from snakemake.exceptions import WorkflowError

    plain, expression, deep = (tmp_path / name for name in ("plain.json", "expression.yaml", "deep.yaml"))
    plain.write_text('{"recipes": ["a"],\n\t"rate": 0.5}')
    expression.write_text("recipes: ['?1 + 1']")
    deep.write_text("[" * 100_000)
    read_plainly()
    assert snakemake_loader(plain) == {"recipes": ["a"], "rate": 0.5}
    assert snakemake_loader(expression) == {"recipes": ["?1 + 1"]}
    with pytest.raises(WorkflowError, match="nested more than 100 deep"):
        snakemake_loader(deep)


@pytest.mark.parametrize("text", ["", "{", '{"a": 1', "[" * 100_000, b"\xff\xfe\x00", "1" * 5000])
def test_json_that_cannot_be_read_is_refused_in_a_sentence(tmp_path, text):
    path = tmp_path / "damaged.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ArtifactError, match=r"damaged\.json: not JSON"):
        read_json(path)
    path.write_text("[]")
    with pytest.raises(ArtifactError, match="expected a JSON object, found a list"):
        read_object(path)


@pytest.mark.parametrize("content", [[], "x", {"datasets": []}, {"datasets": {"shapes": "a"}}])
def test_a_damaged_lock_is_refused_in_a_sentence(tmp_path, content):
    path = tmp_path / "lock.json"
    path.write_text(json.dumps(content))
    with pytest.raises((ArtifactError, ConfigError), match=r"lock\.json: "):
        locked("datasets", "shapes", path)


GOOD = {"schema": 1, "kind": "model", "spec": {}, "inputs": {}, "files": {}, "libraries": {}}
ODD = {
    "a list": [],
    "a text": "manifest",
    "a number": 3,
    "null": None,
    "empty": {},
    "files a list": GOOD | {"files": []},
    "files of texts": GOOD | {"files": {"a": "b"}},
    "a size that is a text": GOOD | {"files": {"a": {"size": "many"}}},
    "a negative size": GOOD | {"files": {"a": {"size": -1}}},
    "a file outside": GOOD | {"files": {"../a": {"size": 1}}},
    "a spec that is a list": GOOD | {"spec": [1]},
    "inputs that are a text": GOOD | {"inputs": "x"},
    "a kind that is a list": GOOD | {"kind": []},
    "a recipe that is an object": GOOD | {"recipe": {}, "stage": 3},
    "a checkpoint that is a list": GOOD | {"checkpoint": [1]},
    "a checkpoint without facts": GOOD | {"checkpoint": {}},
    "an unpacked archive without size": GOOD | {"unpacked": {"a": {}}},
    "nothing but brackets": None,
}


@pytest.mark.parametrize("name", ODD)
def test_every_reader_of_manifests_names_a_damaged_one(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    folder = Path("resources/datasets/shapes")
    folder.mkdir(parents=True)
    text = "[" * 100_000 if name == "nothing but brackets" else json.dumps(ODD[name])
    (folder / manifest.NAME).write_text(text)
    item = InventoryItem("datasets", "shapes", None)  # type: ignore[arg-type]
    readers = {
        "read": lambda: manifest.read(folder),
        "chat": lambda: find(str(folder)),
        "inventory": lambda: item.bytes_here,
        "report": lambda: settings_page(folder / manifest.NAME, tmp_path / "page.html"),
    }
    for reader in readers.values():
        with pytest.raises(ArtifactError, match=r"shapes/manifest\.json"):
            reader()
