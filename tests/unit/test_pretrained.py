"""Code that comes with a model never runs."""

from __future__ import annotations

import ast
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

from mmpipe.checkpoints import layouts
from mmpipe.data.images import image_processor
from mmpipe.errors import ArtifactError
from mmpipe.models.llava import vision_tower
from mmpipe.pretrained import load_pretrained

REPOSITORY = Path(__file__).parents[2]
LOADERS = {"from_pretrained", "from_config", "_from_config"}
EVIL = """
from pathlib import Path
Path({marker!r}).touch()
from transformers import PreTrainedConfig, Qwen2ForCausalLM, Qwen2Tokenizer
class C(PreTrainedConfig): model_type = "evilkind"
class M(Qwen2ForCausalLM): pass
class T(Qwen2Tokenizer): pass
"""


@pytest.fixture
def evil(demo_files, tmp_path, monkeypatch):
    """Make a copy of a backbone whose ``file`` names code of its own; the answer to every prompt is yes."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setitem(sys.modules, "transformers_modules", None)

    def make(backbone: str, file: str, auto_map: dict[str, object], **changes: object) -> tuple[Path, Path]:
        marker, folder = tmp_path / "ran", tmp_path / "backbone"
        shutil.copytree(demo_files / "resources/backbones" / backbone, folder)
        (folder / "evil.py").write_text(EVIL.format(marker=str(marker)))
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(content | {"auto_map": auto_map} | changes))
        return folder, marker

    return make


def test_a_language_model_with_code_of_its_own_is_refused(evil):
    code = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
    folder, marker = evil("qwen2-tiny", "config.json", code, model_type="evilkind")
    with pytest.raises(ArtifactError, match=r"backbone: .* never run .*config\.json: AutoConfig: evil\.C") as caught:
        layouts.get("hf").language(folder, torch.float32)
    assert "AutoModelForCausalLM: evil.M" in str(caught.value)
    assert not marker.exists()


def test_a_tokenizer_with_code_of_its_own_is_refused(evil):
    code = {"AutoTokenizer": ["evil.T", None]}
    folder, marker = evil("qwen2-tiny", "tokenizer_config.json", code, tokenizer_class="EvilTokenizer")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "evilkind"}))
    with pytest.raises(ArtifactError, match=r"backbone: .*tokenizer_config\.json: AutoTokenizer: \['evil\.T', None\]"):
        layouts.get("hf").tokenizer(folder)
    assert not marker.exists()


def test_a_vision_tower_and_its_images_with_code_of_their_own_are_refused(evil):
    code = {"AutoConfig": "evil.C", "AutoModel": "evil.M"}
    folder, marker = evil("clip-tiny", "config.json", code, model_type="evilkind")
    with pytest.raises(ArtifactError, match=r"config\.json: AutoConfig: evil\.C, AutoModel: evil\.M"):
        vision_tower(folder)
    file = next(name for name in ("preprocessor_config.json", "processor_config.json") if (folder / name).is_file())
    kind = {"image_processor_type": "Evil", "auto_map": {"AutoImageProcessor": "evil.I"}}
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | kind))
    with pytest.raises(ArtifactError, match=r"AutoImageProcessor: evil\.I"):
        image_processor(folder, "pad")
    assert not marker.exists()


def test_a_model_that_transformers_knows_opens_without_the_code_that_comes_with_it(evil):
    folder, marker = evil("qwen2-tiny", "config.json", {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"})
    model = layouts.get("hf").language(folder, torch.float32)
    assert type(model).__name__ == "Qwen2ForCausalLM"
    tokenizer = load_pretrained(AutoTokenizer, folder)
    tokenizer.save_pretrained(folder / "saved")
    assert "trust_remote_code" not in (folder / "saved/tokenizer_config.json").read_text()
    assert not marker.exists()


def test_other_faults_of_a_directory_stay_what_they_are(evil):
    folder, _ = evil("qwen2-tiny", "config.json", {"AutoConfig": "evil.C"})
    (folder / "config.json").write_text("{")
    with pytest.raises((OSError, ValueError), match="config"):
        load_pretrained(AutoConfig, folder)
    with pytest.raises(OSError, match="connect"):  # never looked for on the hub
        load_pretrained(AutoConfig, Path("nobody/nothing"))


def unguarded(tree: ast.AST) -> Iterator[int]:
    """Lines that load or build a model of transformers without saying that its code must not run."""
    guarded = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in LOADERS:
            given = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
            local = node.func.attr != "from_pretrained" or given.get("local_files_only") is True
            if given.get("trust_remote_code") is False and local:
                guarded.add(node.func)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in LOADERS and node not in guarded:
            yield node.lineno  # also where it is only named, to be called elsewhere
        if isinstance(node, ast.Constant) and node.value in LOADERS:
            yield node.lineno
        if (
            isinstance(node, ast.keyword)
            and node.arg == "trust_remote_code"
            and getattr(node.value, "value", 1) is not False
        ):
            yield node.lineno
        if isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) == "pipeline":
            yield node.lineno


def test_no_model_is_loaded_in_a_way_that_could_run_its_code():
    assert list(unguarded(ast.parse("AutoModel.from_pretrained(path)"))) == [1]
    assert list(unguarded(ast.parse("load = AutoModel.from_pretrained"))) == [1]
    assert list(unguarded(ast.parse("getattr(AutoModel, 'from_pretrained')(path)"))) == [1]
    assert list(unguarded(ast.parse("load_pretrained(AutoModel, path, trust_remote_code=True)"))) == [1]
    files = [file for folder in ("src", "workflow", "perf") for file in sorted((REPOSITORY / folder).rglob("*.py"))]
    assert len(files) > 200
    found = {str(file.relative_to(REPOSITORY)): list(unguarded(ast.parse(file.read_text()))) for file in files}
    assert {file: lines for file, lines in found.items() if lines} == {}
