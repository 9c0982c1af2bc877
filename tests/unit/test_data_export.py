"""Exported mixtures: read back by the mixture builder, by plain JSON and by ``datasets``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from data_records import data_set, entry, mix, said
from typer.testing import CliRunner

from mmpipe.artifacts import manifest
from mmpipe.cli.main import app
from mmpipe.data import export
from mmpipe.data.export import export_mixture, keep_in_place, place_in_folder
from mmpipe.data.record_table import RecordTable
from mmpipe.errors import ArtifactError, ConfigError, DataError

TALKS = [
    entry(0, "0.png"),
    entry(1, conversations=said("a", "b", "ü\n", "d"), system="Be brief."),
    entry(2, ["1.png", "2.png"]),
]
PAIRS = [
    {
        "id": f"p{number}",
        "image": f"{number}.png",
        "chosen": said("<image>\nWhat?", "a cat", "Sure?", "yes"),
        "rejected": said("<image>\nWhat?", "a cat", "Sure?", "no"),
    }
    for number in range(2)
]


def published(folder: Path, entries: list[Any], **part: Any) -> Path:
    """A mixture with its manifest."""
    out = folder / "mixture"
    mix(data_set(folder / "made", entries), out, log=lambda line: None, **part)
    manifest.write(out, kind="mixture", spec="{}", inputs={})
    return out


def facts(mixture: Path, root: Path) -> list[Any]:
    """What must survive: all but where the images lie."""
    return [
        (
            record.id,
            [(conversation.turns) for conversation in record.conversations],
            [Path(root, image).read_bytes() for image in record.images],
        )
        for record in RecordTable(mixture / "records.arrow")
    ]


@pytest.mark.parametrize(
    ("entries", "read", "layout", "format_name", "embed"),
    [
        (TALKS, "llava", "llava", "llava", False),
        (TALKS, "llava", "messages", "messages", False),
        (TALKS, "llava", "messages", "messages", True),
        (PAIRS, "preference", "preference", "preference", False),
        (PAIRS, "preference", "messages", "preference", False),
        (PAIRS, "preference", "messages", "preference", True),
    ],
)
@pytest.mark.parametrize("place", ["where they are", "links", "copies"])
def test_what_is_exported_makes_the_same_mixture(
    entries: list[Any],
    read: str,
    layout: str,
    format_name: str,
    embed: bool,
    place: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    mixture = published(Path("first"), entries, format=read)
    placement = {
        "where they are": keep_in_place(Path("first")),
        "links": place_in_folder(Path("put")),
        "copies": place_in_folder(Path("put"), copy=True),
    }[place]
    out = Path("again/data.json")
    assert export_mixture(mixture, out, layout, placement, embed=embed) == len(entries)
    if not embed:
        Path("again/img").symlink_to(tmp_path / ("first" if place == "where they are" else "put"))
    images = "." if embed else "img"
    mix(Path("again"), Path("second"), format=format_name, images=images, log=lambda line: None)
    assert facts(Path("second"), tmp_path) == facts(mixture, tmp_path)
    if place == "copies" and not embed:
        assert not any(path.is_symlink() for path in Path("put").rglob("*"))


def test_the_schema_is_llavas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    mixture = published(Path("first"), TALKS)
    export_mixture(mixture, Path("out.json"), "llava", keep_in_place(Path("first/made")))
    one, two, three = json.loads(Path("out.json").read_text())
    assert one == {
        "id": "r0",
        "source": "made",
        "image": "img/0.png",
        "conversations": said("<image>\nWhat is 0?", "It is 0."),
    }
    assert "image" not in two
    assert (two["system"], two["conversations"][2]["value"]) == ("Be brief.", "ü\n")
    assert three["image"] == ["img/1.png", "img/2.png"]


def test_the_schema_is_llava_mods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    mixture = published(Path("first"), PAIRS, format="preference")
    export_mixture(mixture, Path("out.json"), "preference", keep_in_place(Path("first/made/img")))
    rows = json.loads(Path("out.json").read_text())
    assert [{key: row[key] for key in row if key != "source"} for row in rows] == PAIRS


@pytest.mark.parametrize("embed", [True, False])
def test_datasets_sees_messages_and_images(embed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(export, "_ROWS", 2)
    mixture = published(Path("first"), TALKS)
    export_mixture(mixture, Path("out.parquet"), "messages", keep_in_place(Path()), embed=embed)
    table = datasets.Dataset.from_parquet("out.parquet", cache_dir=str(tmp_path / "cache"))
    assert table[0]["messages"] == [
        {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "\nWhat is 0?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "It is 0."}]},
    ]
    assert [[image.size for image in row["images"]] for row in table] == [[(30, 20)], [], [(30, 20)] * 2]


def test_what_cannot_be_exported_is_named_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    talks, pairs = published(Path("a"), TALKS), published(Path("b"), PAIRS, format="preference")
    out, here = Path("out.json"), keep_in_place(Path())
    with pytest.raises(ConfigError, match="did you mean 'messages'"):
        export_mixture(talks, out, "message", here)
    with pytest.raises(ConfigError, match="made/r0 is no record of this layout"):
        export_mixture(talks, out, "preference", here)
    with pytest.raises(ConfigError, match="made/p0 is no record of this layout"):
        export_mixture(pairs, out, "llava", here)
    with pytest.raises(ConfigError, match="only 'messages' can hold them"):
        export_mixture(talks, out, "llava", here, embed=True)
    with pytest.raises(DataError, match=r"0\.png: lies outside of"):
        export_mixture(talks, out, "llava", keep_in_place(Path("elsewhere")))
    with pytest.raises(ArtifactError, match="no published mixture"):
        export_mixture(Path("nowhere"), out, "llava", here)
    Path("a/made/img/2.png").unlink()
    with pytest.raises(DataError, match=r"2\.png: the image cannot be read"):
        export_mixture(talks, out, "messages", here, embed=True)
    assert not list(tmp_path.glob("*out.json*"))
    out.touch()
    with pytest.raises(ConfigError, match="exists"):
        export_mixture(talks, out, "llava", here)


def test_the_command_finds_a_mixture_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    mixture = published(Path("first"), PAIRS, format="preference")
    Path("resources/mixtures").mkdir(parents=True)
    Path("resources/mixtures/pairs").symlink_to(mixture.resolve())
    command = ["export-mixture", "pairs", "out.json", "--as", "preference", "--images", "images"]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.output == "out.json: 2 records\n"
    assert all(Path("images", row["image"]).is_file() for row in json.loads(Path("out.json").read_text()))
