from __future__ import annotations

import json
import shutil
from pathlib import Path

from data_records import data_set, entry, image, mix

from mmpipe.benchmarks.contamination import contamination


def prepared(folder: Path, questions: dict[str, list[Path]]) -> Path:
    """A prepared benchmark that asks about these images."""
    (folder / "images").mkdir(parents=True)
    rows = []
    for number, images in questions.items():
        for path in images:
            shutil.copyfile(path, folder / "images" / f"{number}-{path.name}")
        names = [f"images/{number}-{path.name}" for path in images]
        rows.append({"question_id": number, "text": "What?", "images": names})
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_an_image_trained_on_is_found_under_another_name(tmp_path: Path) -> None:
    source = data_set(tmp_path / "made", [entry(i, f"{i}.png") for i in range(3)])
    mix(source, tmp_path / "mixture")
    trained, fresh = tmp_path / "made/img/1.png", image(tmp_path / "fresh.png", seed=99)
    both = prepared(tmp_path / "both", {"a": [fresh], "b": [fresh, trained], "c": [trained], "d": []})
    clean = prepared(tmp_path / "clean", {"a": [fresh]})
    found = contamination(tmp_path / "mixture", {"both": both, "clean": clean})
    assert found["images"] == 3
    assert found["benchmarks"]["clean"]["shared_images"] == 0
    shared = found["benchmarks"]["both"]
    assert (shared["shared_images"], shared["touched_questions"], shared["questions"]) == (2, 2, 4)
    assert shared["examples"][0].startswith("b-1.png is ")
    assert shared["examples"][0].endswith("1.png")


def test_images_of_dropped_records_do_not_count(tmp_path: Path) -> None:
    entries = [entry(0, "0.png"), entry(1, ["1.png", "gone.png"])]
    source = data_set(tmp_path / "made", entries)
    (tmp_path / "made/img/gone.png").unlink(missing_ok=True)
    mix(source, tmp_path / "mixture", max_bad=0.9)
    asked = prepared(tmp_path / "b", {"a": [tmp_path / "made/img/1.png"]})
    assert contamination(tmp_path / "mixture", {"b": asked})["benchmarks"]["b"]["shared_images"] == 0
