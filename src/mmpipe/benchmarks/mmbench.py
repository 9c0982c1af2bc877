"""MMBench (Liu et al. 2023, arXiv 2307.06281): multiple choice, every question repeated for each rotation of its
options.

Files are the official TSVs (``mmbench_dev_20230712.tsv``, ``mmbench_dev_en_20231003.tsv``,
``mmbench_dev_cn_20231003.tsv``; columns ``index, question, hint, A-D, answer, category, image, source, l2-category,
comment, split``) or the parquet files of the copies on the hub. A row whose index is 1e6 or more is a rotation of the
question ``index % 1e6``.

A question is right when all its rotations are (circular evaluation, ``mcq_circular_eval`` of VLMEvalKit). The dev
splits of 2023-07-12 and 2023-10-03 hold different questions; their scores are not comparable. Cells that pandas reads
as "not available" (``None``, ``NA``, ...) are no options, because the official scripts read the table with pandas.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from mmpipe.artifacts.files import atomic_open
from mmpipe.benchmarks.base import OPTION_LETTER, AnswerPair, Item, Protocol, Question, grouped, mean_score
from mmpipe.benchmarks.jsonl import Document, JsonDict, is_missing, iter_rows, key, records_of, require
from mmpipe.benchmarks.multiple_choice import MultipleChoice, infer_option, infer_option_lmms, options_block
from mmpipe.benchmarks.readers import BenchmarkFiles, decode_base64, image_bytes
from mmpipe.benchmarks.stats import MetricEstimate, estimate_mean
from mmpipe.errors import DataError

_LLAVA = "{hint_line}{question}\n{options}"
_LMMS = "{hint_words}{stripped} There are several options:\n{options}\n" + OPTION_LETTER
_NOT_SUBMITTED = ("hint", "category", "source", "image", "comment", "l2-category")
_PREDICTION_PLACE = 6
_LONGEST_CELL = 32_767  # Excel's limit

# Abbreviations that the official report prints for the six abilities.
_ABILITIES = {
    "coarse_perception": "CP",
    "finegrained_perception (instance-level)": "FP-S",
    "finegrained_perception (cross-instance)": "FP-C",
    "logic_reasoning": "LR",
    "relation_reasoning": "RR",
    "attribute_reasoning": "AR",
}


class MMBench(MultipleChoice):
    """MMBench in English and Chinese."""

    name = "mmbench"
    submission = "xlsx"
    files = {"questions": "mmbench_dev_en_20231003.tsv"}
    fields = ("index", "question", "A", "B")
    id_field = "index"
    prompts = {"llava": _LLAVA + OPTION_LETTER, "llava_cn": _LLAVA + "\n请直接回答选项字母。", "lmms": _LMMS}
    recorded = {"llava": _LLAVA, "llava_cn": _LLAVA, "lmms": _LMMS}  # LLaVA leaves the instruction out
    rules = {"official": infer_option, "vanilla": infer_option, "lmms": infer_option_lmms}
    protocols = (
        Protocol("circular", "all rotations right; options read by VLMEvalKit's rule without judge; LLaVA's prompt",
                 metric="overall", max_new_tokens=1024, aliases=("llava", "vlmevalkit")),
        Protocol("circular_cn", "the same with the Chinese instruction", prompt="llava_cn", metric="overall",
                 max_new_tokens=1024),
        Protocol("vanilla", "the first rotation of every question alone", rule="vanilla", metric="overall",
                 max_new_tokens=1024),
        Protocol("lmms", "all rotations right; prompt and option rule of lmms-eval without judge", rule="lmms",
                 prompt="lmms", metric="overall", max_new_tokens=1024, aliases=("libmoe",)),
    )  # fmt: skip

    def questions(self, source: BenchmarkFiles, protocol: Protocol) -> Iterator[Question]:
        images: dict[str, bytes] = {}
        for row in self._rows(source):
            options = self.options(row)
            yield Question(
                id=row["index"],
                text=self.text(row, protocol),
                images=(self._image(row, images),),
                prompt=self.fill(self.recorded[protocol.prompt], row),
                group=_group(row),
                extra={"round_id": 0, "options": list(options.values()), "option_char": list(options)},
            )

    def references(self, source: BenchmarkFiles, protocol: Protocol) -> list[JsonDict]:
        return [_clean(row, self.name) for row in self._rows(source)]

    def parse_references(self, documents: Sequence[Document]) -> list[JsonDict]:
        rows = [_columns(row) for row in records_of(documents)]
        for row in rows:
            require(row, self.fields, self.name)
        return [_clean(row, self.name) for row in rows]

    def options(self, reference: JsonDict) -> dict[str, str]:
        """Letters and texts up to the first empty cell."""
        options = {}
        for letter in "ABCD":
            if is_missing(reference.get(letter)):
                break
            options[letter] = str(reference[letter])
        return options

    def unit_of(self, reference: JsonDict) -> str:
        return _group(reference)

    def variables(self, record: JsonDict) -> JsonDict:
        hint, question = "" if is_missing(record.get("hint")) else str(record["hint"]), str(record["question"])
        return {
            "hint_line": f"{hint}\n" if hint else "",
            "hint_words": f"{hint} " if hint else "",
            "question": question,
            "stripped": question.strip(),
            "options": options_block(self.options(record).values()),
        }

    def item(self, pair: AnswerPair, protocol: Protocol) -> Item:
        row = pair.reference
        if is_missing(row.get("answer")):
            raise DataError(
                f"{self.name}: index {row['index']} has no 'answer'; this split is scored by the MMBench server only: "
                "write its submission file with 'convert'"
            )
        options = {letter: str(row[letter]) for letter in "ABCD" if row.get(letter) is not None}
        parsed = self.rules[protocol.rule](pair.text, options) if pair.answered else None
        return self.result(pair, parsed == row["answer"], parsed, category=row.get("category"), gold=row["answer"])

    def rate(self, pairs: Sequence[AnswerPair], protocol: Protocol) -> tuple[list[Item], JsonDict]:
        items = [self.item(pair, protocol) for pair in pairs]
        groups = grouped(sorted(items, key=lambda item: int(item.id)))  # rotations in the order of their index
        first_only = protocol.rule == "vanilla"
        if first_only:
            items = [group[0] for group in groups.values()]
        return items, {
            **_report(pairs, groups, first_only),
            "n_groups": len(groups),
            "vanilla_first_rotation_accuracy": fmean(group[0].score for group in groups.values()),
            "vanilla_all_rows_accuracy": fmean(item.score for group in groups.values() for item in group),
        }

    def estimate(self, items: Sequence[Item], metrics: JsonDict, protocol: Protocol) -> MetricEstimate:
        hits: dict[str, float] = {}
        for item in items:
            hits[item.unit] = min(hits.get(item.unit, 1.0), item.score)
        return estimate_mean("overall", list(hits.values()), list(hits))

    def convert(self, pairs: Sequence[AnswerPair], out: Path) -> JsonDict:
        """Write the sheet that the MMBench server accepts.

        It holds the columns of the table without hint, category, source, image, comment and l2-category, with
        ``prediction`` as the seventh; a question without answer keeps an empty cell.
        """
        columns = [name for name in pairs[0].reference if name not in _NOT_SUBMITTED]
        columns.insert(_PREDICTION_PLACE, "prediction")
        rows = [{**pair.reference, "prediction": pair.text if pair.answered else None} for pair in pairs]
        return write_sheet(out, columns, rows)

    def _rows(self, source: BenchmarkFiles) -> Iterator[JsonDict]:
        path = source.path("questions")
        for row in iter_rows(path):
            record = _columns(row)
            require(record, (*self.fields, "image"), str(path))
            yield record | {"index": _index(record["index"], str(path))}

    def _image(self, row: JsonDict, images: dict[str, bytes]) -> bytes:
        """The row's image; a short cell names the row that holds it."""
        cell, where = row["image"], f"{self.name}: index {row['index']}"
        if not isinstance(cell, str):
            return image_bytes(cell, where)
        if len(cell) <= 16 and cell.strip() in images:
            return images[cell.strip()]
        content = decode_base64(cell, where)
        if row["index"] < 1_000_000:
            images[key(row["index"])] = content
        return content


def _columns(row: JsonDict) -> JsonDict:
    """Column names differ in case between the copies (``L2-category``); the option letters stay."""
    return {name if len(name) == 1 else name.lower(): value for name, value in row.items()}


def _clean(row: JsonDict, where: str) -> JsonDict:
    """The row without image, cells without value as None and the index as a number."""
    clean = {name: None if is_missing(value) else value for name, value in row.items() if name != "image"}
    return clean | {"index": _index(row["index"], where)}


def _index(value: Any, where: str) -> int:
    try:
        return int(value)
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: the index {value!r} is not a number") from error


def _group(row: JsonDict) -> str:
    return str(int(row["index"]) % 1_000_000)


def _report(pairs: Sequence[AnswerPair], groups: Mapping[str, list[Item]], first_only: bool) -> JsonDict:
    """``overall``, ``category``, ``l2_category``, and ``report_acc`` as VLMEvalKit prints it."""
    rows: dict[str, JsonDict] = {}
    for pair in sorted(pairs, key=lambda pair: pair.reference["index"]):
        rows.setdefault(_group(pair.reference), pair.reference)
    verdicts = [
        Item(
            unit, float(group[0].score if first_only else all(item.score for item in group)), unit,
            facts={column: rows[unit].get(column) for column in ("category", "l2-category")},
        )
        for unit, group in groups.items()
    ]  # fmt: skip
    category, ability = (
        {name: mean_score(some) for name, some in sorted(grouped(verdicts, column).items())}
        for column in ("category", "l2-category")
    )
    overall, splits = mean_score(verdicts), sorted({str(row.get("split") or "none") for row in rows.values()})
    report: JsonDict = {"split": splits[0] if len(splits) == 1 else splits, "Overall": overall}
    report |= {_ABILITIES.get(name, name): mean for name, mean in ability.items()} | category
    return {"overall": overall, "category": category, "l2_category": ability, "report_acc": report}


def write_sheet(out: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Write rows to ``Sheet1`` of an xlsx file, atomically.

    Text is stored as text, also where it starts like a formula (``=``, ``+``, ``-``, ``@``): a model's reply
    must not be executed by a spreadsheet. Characters that xlsx cannot hold are left out and longer texts than
    Excel allows are cut; returns the counts of such cells.
    """
    from openpyxl import Workbook
    from openpyxl.cell import WriteOnlyCell
    from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE

    counts = {"rows": len(rows), "cells_cut": 0, "cells_cleaned": 0}
    book = Workbook(write_only=True)
    sheet = book.create_sheet("Sheet1")
    sheet.append(list(columns))
    for row in rows:
        cells = []
        for column in columns:
            value = row.get(column)
            if not isinstance(value, str):
                cells.append(value)
                continue
            clean = ILLEGAL_CHARACTERS_RE.sub("", value).encode("utf-8", "ignore").decode("utf-8")
            counts["cells_cleaned"] += clean != value
            counts["cells_cut"] += len(clean) > _LONGEST_CELL
            cell = WriteOnlyCell(sheet, value=clean[:_LONGEST_CELL])
            cell.data_type = "s"
            cell.quotePrefix = clean.startswith(("=", "+", "-", "@"))
            cells.append(cell)
        sheet.append(cells)
    with atomic_open(out) as file:
        book.save(file)
    return counts


BENCHMARK = MMBench()
