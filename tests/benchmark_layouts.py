"""A few records of every benchmark in the exact layout of its official files, and of the other forms it comes in."""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from mmpipe.benchmarks.mme import COGNITION, PERCEPTION


def jpeg(shade: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 255 - shade, shade // 2)).save(out, "JPEG")
    return out.getvalue()


def text64(shade: int) -> str:
    return base64.b64encode(jpeg(shade)).decode()


def images(folder: Path, *files: str) -> None:
    for shade, name in enumerate(files):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(10 + shade))


def dump(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in records))


def parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def hub(shade: int) -> dict[str, Any]:
    return {"bytes": jpeg(shade), "path": "x.jpg"}


def mmbench(root: Path) -> list[str]:
    head = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image"]
    head += ["source", "l2-category", "comment", "split"]
    rows = []
    for index in (1, 2):
        cell = text64(index)
        options = ["cat", "dog"]
        rows.append([index, "What?", "", *options, "", "nan", "A", "c", cell, "s", "l", "", "dev"])
        rows.append(
            [index + 10**6, "What?", "Look.", *options[::-1], "", "", "B", "c", str(index), "s", "l", "", "dev"]
        )
    with (root / "mmbench_dev_en_20231003.tsv").open("w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([head, *rows])
    return ["A", "B", "A", "B"]


def pope(root: Path) -> list[str]:
    images(root / "val2014", "a.jpg", "b.jpg")
    for category in ("adversarial", "popular", "random"):
        lines(
            root / f"coco/coco_pope_{category}.json",
            [
                {"question_id": 1, "image": "a.jpg", "text": "Is there a cat?", "label": "yes"},
                {"question_id": 2, "image": "b.jpg", "text": "Is there a cat?", "label": "no"},
            ],
        )
    return ["Yes", "No"] * 3


def mme(root: Path) -> list[str]:
    for shade, category in enumerate((*PERCEPTION, *COGNITION)):
        nested = category in ("posters", "celebrity", "scene", "landmark", "artwork")
        folder = root / "MME_Benchmark_release_version" / category
        image = folder / "images" if nested else folder
        text = folder / "questions_answers_YN" if nested else folder
        image.mkdir(parents=True)
        text.mkdir(exist_ok=True)
        (image / "0001.png").write_bytes(jpeg(shade))
        (text / "0001.txt").write_text(
            "Is it red? Please answer yes or no.\tYes\nIs it blue?  Please answer yes or no.\tNo\n"
        )
    return ["Yes", "No"] * 14


def textvqa(root: Path) -> list[str]:
    images(root / "train_images", "i1.jpg")
    data = [
        {"question_id": n, "image_id": "i1", "question": f"What Brand {n}?", "answers": ["nokia"] * 10} for n in (7, 8)
    ]
    dump(root / "TextVQA_0.5.1_val.json", {"data": data})
    dump(root / "TextVQA_Rosetta_OCR_v0.2_val.json", {"data": [{"image_id": "i1", "ocr_tokens": ["NOKIA", "3310"]}]})
    return ["Nokia.", "nokia"]


def vizwiz(root: Path) -> list[str]:
    images(root / "val", "VizWiz_val_00000000.jpg")
    answers = [{"answer": "can", "answer_confidence": "yes"}] * 10
    dump(
        root / "val.json",
        [{"image": "VizWiz_val_00000000.jpg", "question": "What is this?", "answers": answers, "answerable": 1}],
    )
    return ["A can."]


def scienceqa(root: Path) -> list[str]:
    images(root / "test/5", "image.png")
    problem = {"question": "Which?", "choices": ["a", "b"], "answer": 1, "hint": "", "image": None}
    dump(
        root / "problems.json",
        {"4": problem, "5": {**problem, "hint": "Look.", "image": "image.png"}, "6": {**problem, "split": "train"}},
    )
    dump(root / "pid_splits.json", {"test": ["5", "4"], "train": ["6"]})
    return ["B", "B"]


def gqa(root: Path) -> list[str]:
    images(root / "images", "n1.jpg")
    dump(
        root / "testdev_balanced_questions.json",
        {"201": {"question": "Is it red?", "answer": "yes", "imageId": "n1", "isBalanced": True}},
    )
    return ["Yes."]


def vqav2(root: Path) -> list[str]:
    images(root / "val2014", "COCO_val2014_000000000042.jpg")
    question = {"question_id": 420, "image_id": 42, "question": "Cat?"}
    answers = [{"answer": "yes", "answer_confidence": "yes", "answer_id": n} for n in range(1, 11)]
    dump(root / "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": [question]})
    dump(
        root / "v2_mscoco_val2014_annotations.json",
        {"annotations": [{**question, "question_type": "is", "answer_type": "yes/no", "answers": answers}]},
    )
    return ["Yes"]


def ai2d(root: Path) -> list[str]:
    row = {"question": "Which?", "options": ["leaf", "stem"], "answer": "1", "image": hub(3)}
    parquet(root / "data/test-00000-of-00002.parquet", [row])
    parquet(root / "data/test-00001-of-00002.parquet", [row])
    return ["B", "b."]


def mmstar(root: Path) -> list[str]:
    row = {"index": 0, "question": "<image 1>\nWhich?\nOptions: A: a, B: b", "answer": "B", "image": jpeg(4)}
    parquet(root / "mmstar.parquet", [{**row, "category": "math", "l2_category": "geometry"}])
    return ["b"]


def chartqa(root: Path) -> list[str]:
    images(root / "png", "1.png", "2.png")
    dump(root / "test_human.json", [{"imgname": "1.png", "query": "How many?", "label": "14"}])
    dump(root / "test_augmented.json", [{"imgname": "2.png", "query": "Which?", "label": "Yes"}])
    return ["14.5", "yes"]


def mmmu(root: Path) -> list[str]:
    row = {
        "id": "validation_Art_1", "question": "What is <image 1>?", "options": "['one', '<image 2>']", "answer": "B",
        "question_type": "multiple-choice", "image_1": hub(5), "image_2": hub(6),
    }  # fmt: skip
    parquet(root / "Art/validation-00000-of-00001.parquet", [row])
    parquet(root / "Art/test-00000-of-00001.parquet", [{**row, "id": "test_Art_1"}])
    open_row = {**row, "id": "validation_Math_1", "options": "[]", "answer": "['3', '4']", "question_type": "open"}
    parquet(root / "Math/validation-00000-of-00001.parquet", [open_row])
    return ["(B)", "It is 4"]


def mathvista(root: Path) -> list[str]:
    images(root / "images", "1.jpg")
    record = {
        "question": "How many?", "image": "images/1.jpg", "choices": None, "unit": None, "precision": None,
        "answer": "3", "question_type": "free_form", "answer_type": "integer", "query": "Hint: x\nQuestion: How many?",
        "metadata": {"skills": ["a"]},
    }  # fmt: skip
    dump(root / "testmini.json", {"1": record})
    return ["3"]


def hallusionbench(root: Path) -> list[str]:
    images(root / "hallusion_bench", "VD/chart/0_0.png")
    record = {
        "category": "VD", "subcategory": "chart", "visual_input": "1", "set_id": "0", "figure_id": "0",
        "question_id": "0", "question": "Is it?", "gt_answer_details": "Yes.", "gt_answer": "1",
        "filename": "./VD/chart/0_0.png",
    }  # fmt: skip
    unseen = {"category": "VS", "visual_input": "0", "filename": None}
    dump(root / "HallusionBench.json", [record, {**record, **unseen}])
    return ["Yes", "Maybe"]


def mmhal(root: Path) -> list[str]:
    record = {"question": "What?", "gt_answer": "A cat.", "image_content": ["Cat"], "image": text64(7)}
    lines(root / "mmhal-bench_with_image.jsonl", [record] * 8)
    return ["A cat."] * 8


def objhal(root: Path) -> list[str]:
    lines(
        root / "obj_halbench_300_with_image.jsonl",
        [
            {"image": text64(8), "question": "Describe.", "image_id": 9},
            {"image": text64(9), "question": "?", "image_id": 8},
        ],
    )
    (root / "synonyms_refine.txt").write_text("person, man, woman\ndog, puppy\ntraffic light, street light\n")
    instances = {"categories": [{"id": 1, "name": "person"}], "annotations": [{"image_id": 9, "category_id": 1}]}
    dump(root / "annotations/instances_val2014.json", instances)
    captions = [{"image_id": 8, "caption": "Two puppies under the street lights"}]
    dump(root / "annotations/captions_val2014.json", {"annotations": captions})
    return ["A man walks along there.", "A puppy and a woman stand there."]


def seed(root: Path) -> list[str]:
    images(root / "SEED-Bench-image", "1_2")
    record = {f"choice_{letter}": letter for letter in "abcd"} | {"question": "Which?", "answer": "C"}
    record |= {"question_id": "101", "question_type_id": 1, "data_type": "image", "data_id": "1_2"}
    video = {**record, "question_id": "v1", "data_type": "video"}
    dump(root / "SEED-Bench.json", {"questions": [record, video], "question_type": {"Scene": 1}})
    return ["C"]


def mmvet(root: Path) -> list[str]:
    images(root / "images", "v1_0.png")
    dump(root / "mm-vet.json", {"v1_0": {"imagename": "v1_0.png", "question": "Why?", "answer": "So."}})
    return ["Because."]


# benchmark -> (how its files are made, with the right answers; the first question's text)
LAYOUTS: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "ai2d": (ai2d, "Which?\nA. leaf\nB. stem\nAnswer with the option's letter from the given choices directly."),
    "chartqa": (chartqa, "How many?\nAnswer the question with a single word."),
    "gqa": (gqa, "Is it red?\nAnswer the question using a single word or phrase."),
    "hallusionbench": (hallusionbench, "Is it?"),
    "mathvista": (mathvista, "Hint: x\nQuestion: How many?"),
    "mmbench": (mmbench, "What?\nA. cat\nB. dog\nAnswer with the option's letter from the given choices directly."),
    "mme": (mme, "Is it red?\nAnswer the question using a single word or phrase."),
    "mmhal": (mmhal, "What?"),
    "mmmu": (
        mmmu,
        "What is <image>?\n(A) one\n(B) <image>\n\nAnswer with the option's letter from the given choices directly.",
    ),
    "mmstar": (mmstar, "Which?\nOptions: A: a, B: b\nAnswer with the option's letter from the given choices directly."),
    "mmvet": (mmvet, "Why?"),
    "objhal": (objhal, "Describe."),
    "pope": (pope, "Is there a cat?\nAnswer the question using a single word or phrase."),
    "scienceqa": (
        scienceqa,
        "<image>\nContext: Look.\nWhich?\nA. a\nB. b\nAnswer with the option's letter from the given choices directly.",
    ),
    "seed": (seed, "Which?\nA. a\nB. b\nC. c\nD. d\nAnswer with the option's letter from the given choices directly."),
    "textvqa": (
        textvqa,
        "What Brand 7?\nReference OCR token: NOKIA, 3310\nAnswer the question using a single word or phrase.",
    ),
    "vizwiz": (
        vizwiz,
        "What is this?\nWhen the provided information is insufficient, respond with 'Unanswerable'.\n"
        "Answer the question using a single word or phrase.",
    ),
    "vqav2": (vqav2, "Cat?\nAnswer the question using a single word or phrase."),
}
VERDICTS = {"hallusionbench": "correct", "mmhal": "Rating: 6", "mathvista": "3", "objhal": '["man"]'}


# ---- the same in the hub's tables and in LLaVA's question files


def textvqa_hub(root: Path) -> list[str]:
    common = {"image_id": "i1", "ocr_tokens": ["NOKIA", "3310"], "answers": ["nokia"] * 10, "image": hub(1)}
    rows = [{**common, "question_id": n, "question": f"What Brand {n}?"} for n in (7, 8)]
    parquet(root / "data/validation-00000-of-00001.parquet", rows)
    return ["Nokia.", "nokia"]


def vizwiz_hub(root: Path) -> list[str]:
    row = {"question_id": "VizWiz_val_00000000.jpg", "question": "What is this?", "answers": ["can"] * 10}
    parquet(root / "data/val-00000-of-00001.parquet", [{**row, "image": hub(1), "category": "other"}])
    return ["A can."]


def gqa_hub(root: Path) -> list[str]:
    row = {
        "id": "201", "imageId": "n1", "question": "Is it red?", "answer": "yes", "isBalanced": True,
        "types": {"structural": "verify", "semantic": "attr"}, "groups": {"global": "color", "local": "l"},
        "semantic": [{"operation": "select", "argument": "cat (1)", "dependencies": [0]}],
    }  # fmt: skip
    parquet(root / "testdev_balanced_instructions/testdev-00000-of-00001.parquet", [row, {**row, "id": "202"}])
    parquet(root / "testdev_balanced_images/testdev-00000-of-00001.parquet", [{"id": "n1", "image": hub(2)}])
    return ["Yes.", "yes"]


def scienceqa_hub(root: Path) -> list[str]:
    row = {"question": "Which?", "choices": ["a", "b"], "answer": 1, "hint": "Look.", "subject": "x", "image": hub(3)}
    parquet(root / "ScienceQA-FULL/test-00000-of-00001.parquet", [row, {**row, "hint": "", "image": None}])
    return ["B", "B"]


def mme_hub(root: Path) -> list[str]:
    rows = [
        {
            "question_id": f"{category}/0001.png", "image": hub(shade), "category": category,
            "question": f"Is it {colour}?{blanks}Please answer yes or no.", "answer": answer,
        }
        for shade, category in enumerate((*PERCEPTION, *COGNITION))
        for colour, answer, blanks in (("red", "Yes", " "), ("blue", "No", "  "))
    ]  # fmt: skip
    parquet(root / "data/test-00000-of-00001.parquet", rows)
    return ["Yes", "No"] * 14


def pope_hub(root: Path) -> list[str]:
    rows = [
        {
            "id": str(n), "question_id": str(1 + n // 3), "question": "Is there a cat?", "image_source": f"a{n // 3}",
            "answer": ("yes", "no")[n // 3], "category": ("adversarial", "popular", "random")[n % 3], "image": hub(n),
        }
        for n in range(6)
    ]  # fmt: skip
    parquet(root / "data/test-00000-of-00001.parquet", rows)
    return ["Yes"] * 3 + ["No"] * 3


def pope_llava(root: Path) -> list[str]:
    right = pope(root)
    first = {"adversarial": 0, "popular": 20_000_000, "random": 10_000_000}
    text = "Is there a cat?\nAnswer the question using a single word or phrase."
    lines(
        root / "llava_pope_test.jsonl",
        [
            {"question_id": first[category] + n + 1, "image": "ab"[n] + ".jpg", "text": text, "category": category}
            for category in first
            for n in (0, 1)
        ],
    )
    return right


def vqav2_hub(root: Path) -> list[str]:
    answers = [{"answer": "yes", "answer_confidence": "yes", "answer_id": n} for n in range(1, 11)]
    row = {
        "question_id": 420, "image_id": 42, "question": "Cat?", "question_type": "is", "answer_type": "yes/no",
        "multiple_choice_answer": "yes", "answers": answers, "image": hub(4),
    }  # fmt: skip
    parquet(root / "data/validation-00000-of-00001.parquet", [row])
    return ["Yes"]


def gqa_llava(root: Path) -> list[str]:
    right = gqa(root)
    text = "Is it red?\nAnswer the question using a single word or phrase."
    lines(root / "llava_gqa_testdev_balanced.jsonl", [_llava("201", "n1.jpg", text)])
    return right


def vizwiz_llava(root: Path) -> list[str]:
    right = vizwiz(root)
    text = (
        "What is this?\nWhen the provided information is insufficient, respond with 'Unanswerable'.\n"
        "Answer the question using a single word or phrase."
    )
    lines(root / "llava_test.jsonl", [_llava(0, "VizWiz_val_00000000.jpg", text)])
    return right


def scienceqa_llava(root: Path) -> list[str]:
    right = scienceqa(root)
    turns = [{"from": "human", "value": "<image>\nContext: Look.\nWhich?\nA. a\nB. b"}, {"from": "gpt", "value": "B"}]
    plain = [{"from": "human", "value": "Which?\nA. a\nB. b"}]
    records = [{"id": "5", "image": "5/image.png", "conversations": turns}, {"id": "4", "conversations": plain}]
    dump(root / "llava_test_CQM-A.json", records)
    return right


def textvqa_llava(root: Path) -> list[str]:
    right = textvqa(root)
    prompt = "What Brand {}?\nReference OCR token: NOKIA, 3310\nAnswer the question using a single word or phrase."
    lines(root / "llava_textvqa_val_v051_ocr.jsonl", [_llava("i1", "i1.jpg", prompt.format(n)) for n in (7, 8)])
    (root / "TextVQA_Rosetta_OCR_v0.2_val.json").unlink()
    return right


def hallusionbench_hub(root: Path) -> list[str]:
    record = {
        "category": "VD", "subcategory": "chart", "visual_input": "1", "set_id": "0", "figure_id": "0",
        "question_id": "0", "question": "Is it?", "gt_answer_details": "Yes.", "gt_answer": "1",
        "filename": "./VD/chart/0_0.png",
    }  # fmt: skip
    parquet(root / "data/image-00000-of-00001.parquet", [{**record, "image": hub(5)}])
    unseen = {"category": "VS", "visual_input": "0", "filename": None}
    parquet(root / "data/non_image-00000-of-00001.parquet", [{**record, **unseen}])
    return ["Yes", "Maybe"]


def mathvista_hub(root: Path) -> list[str]:
    record = {
        "pid": "1", "question": "How many?", "image": "images/1.jpg", "decoded_image": hub(6), "choices": None,
        "unit": None, "precision": 1.0, "answer": "3", "question_type": "free_form", "answer_type": "integer",
        "query": "Hint: x\nQuestion: How many?", "metadata": {"skills": ["a"]},
    }  # fmt: skip
    parquet(root / "data/testmini-00000-of-00001.parquet", [record])
    return ["3"]


def chartqa_hub(root: Path) -> list[str]:
    rows = [
        {"type": "human_test", "question": "How many?", "answer": "14", "image": hub(7)},
        {"type": "augmented_test", "question": "Which?", "answer": "Yes", "image": hub(8)},
    ]
    parquet(root / "data/test-00000-of-00001.parquet", rows)
    return ["14.5", "yes"]


def mmbench_hub(root: Path) -> list[str]:
    row = {
        "question": "What?", "hint": None, "A": "cat", "B": "dog", "C": None, "D": "nan", "answer": "A",
        "category": "c", "image": hub(9), "source": "s", "L2-category": "l", "comment": None, "split": "dev",
    }  # fmt: skip
    turned = {**row, "A": "dog", "B": "cat", "answer": "B"}
    rows = [{"index": "1", **row}, {"index": "1000001", **turned}]
    parquet(root / "en/dev-00000-of-00001.parquet", rows)
    return ["A", "B"]


def mmvet_hub(root: Path) -> list[str]:
    row = {"question_id": "v1_0", "question": "Why?", "answer": "So.", "image": hub(10), "capability": "rec"}
    parquet(root / "data/test-00000-of-00001.parquet", [row])
    return ["Because."]


def mmmu_hub(root: Path) -> list[str]:
    mmmu(root)
    for place, subject in enumerate(("Art", "Math")):
        (root / "data").mkdir(exist_ok=True)
        (root / subject / "validation-00000-of-00001.parquet").rename(root / f"data/validation-0000{place}.parquet")
    return ["(B)", "It is 4"]


def mmhal_official(root: Path) -> list[str]:
    images(root / "images", "1.jpg")
    record = {"question": "What?", "gt_answer": "A cat.", "image_content": ["Cat"], "image_src": "https://x.org/1.jpg"}
    dump(root / "response_template.json", [record] * 8)
    return ["A cat."] * 8


def vqav2_llava(root: Path) -> list[str]:
    images(root / "test2015", "COCO_test2015_000000000042.jpg")
    text = "Cat?\nAnswer the question using a single word or phrase."
    asked = _llava(420, "COCO_test2015_000000000042.jpg", text)
    lines(root / "llava_vqav2_mscoco_test-dev2015.jsonl", [asked])
    lines(root / "llava_vqav2_mscoco_test2015.jsonl", [{**asked, "question_id": n} for n in (419, 420, 421)])
    return ["Yes"]


def _llava(number: int | str, image: str, text: str) -> dict[str, Any]:
    return {"question_id": number, "image": image, "text": text, "category": "default"}


# (benchmark, form) -> (how it is made, the entry's files); questions and verdicts are those of the official form
FORMS: dict[tuple[str, str], tuple[Callable[[Path], list[str]], dict[str, str]]] = {
    ("chartqa", "hub"): (chartqa_hub, {}),
    ("gqa", "hub"): (gqa_hub, {}),
    ("gqa", "llava"): (gqa_llava, {}),
    ("hallusionbench", "hub"): (hallusionbench_hub, {}),
    ("mathvista", "hub"): (mathvista_hub, {}),
    ("mmbench", "hub"): (mmbench_hub, {"questions": "en"}),
    ("mme", "hub"): (mme_hub, {}),
    ("mmhal", "official"): (mmhal_official, {}),
    ("mmmu", "hub"): (mmmu_hub, {"questions": "data"}),
    ("mmvet", "hub"): (mmvet_hub, {}),
    ("pope", "hub"): (pope_hub, {}),
    ("pope", "llava"): (pope_llava, {}),
    ("scienceqa", "hub"): (scienceqa_hub, {}),
    ("scienceqa", "llava"): (scienceqa_llava, {}),
    ("textvqa", "hub"): (textvqa_hub, {}),
    ("textvqa", "llava"): (textvqa_llava, {}),
    ("vizwiz", "hub"): (vizwiz_hub, {}),
    ("vizwiz", "llava"): (vizwiz_llava, {}),
    ("vqav2", "hub"): (vqav2_hub, {}),
}
