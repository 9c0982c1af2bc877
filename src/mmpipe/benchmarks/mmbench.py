"""MMBench (Liu et al. 2023, arXiv 2307.06281): multiple choice, every question asked once for each rotation
of its options.

Files are the official TSVs (``mmbench_dev_20230712.tsv``, ``mmbench_dev_en_20231003.tsv``,
``mmbench_dev_cn_20231003.tsv``; columns ``index, question, hint, A-D, answer, category, image, source,
l2-category, comment, split``) or the parquet files of the copies on the hub. A row whose index is 1e6 or more
is a rotation of the question ``index % 1e6``.

A question is right when all its rotations are (circular evaluation). The dev splits of 2023-07-12 and
2023-10-03 hold different questions; their scores are not comparable. Cells that pandas reads as "not
available" (``None``, ``NA``, ...) are no options, because the official scripts read the table with pandas.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from types import MappingProxyType
from typing import Any, ClassVar

from mmpipe.benchmarks.base import (
    OPTION_LETTER,
    Benchmark,
    Document,
    Item,
    Pair,
    Protocol,
    Question,
    Record,
    Source,
    key,
    records_of,
    require,
)
from mmpipe.benchmarks.choices import infer_option, infer_option_lmms, options_block
from mmpipe.benchmarks.image_bytes import decode_base64, hub_image
from mmpipe.benchmarks.jsonl import is_missing, iter_rows
from mmpipe.benchmarks.stats import Estimate, estimate_mean
from mmpipe.benchmarks.xlsx import write_sheet
from mmpipe.errors import DataError

_OPTION_LETTER_CN = "\n请直接回答选项字母。"
_COLUMNS = ("index", "question", "A", "B")
_NOT_SUBMITTED = ("hint", "category", "source", "image", "comment", "l2-category")
_PREDICTION_PLACE = 6

# Abbreviations that the official report prints for the six abilities.
_ABILITIES = {
    "coarse_perception": "CP",
    "finegrained_perception (instance-level)": "FP-S",
    "finegrained_perception (cross-instance)": "FP-C",
    "logic_reasoning": "LR",
    "relation_reasoning": "RR",
    "attribute_reasoning": "AR",
}

_INFER: Mapping[str, Callable[[str, Mapping[str, str]], str | None]] = MappingProxyType(
    {"official": infer_option, "lmms": infer_option_lmms}
)


class MMBench(Benchmark):
    """MMBench in English and Chinese."""

    name = "mmbench"
    submission = "xlsx"
    files: ClassVar[Mapping[str, str]] = {"questions": "mmbench_dev_en_20231003.tsv"}
    protocols = (
        Protocol(
            "circular",
            "all rotations right; options read by VLMEvalKit's rule without judge; LLaVA's prompt",
            max_new_tokens=1024,
            aliases=("llava", "vlmevalkit"),
        ),
        Protocol("circular_cn", "the same with the Chinese instruction", prompt="llava_cn", max_new_tokens=1024),
        Protocol("vanilla", "the first rotation of every question alone", rule="vanilla", max_new_tokens=1024),
        Protocol(
            "lmms",
            "all rotations right; prompt and option rule of lmms-eval without judge",
            rule="lmms",
            prompt="lmms",
            max_new_tokens=1024,
            aliases=("libmoe",),
        ),
    )

    def questions(self, source: Source, protocol: Protocol) -> Iterator[Question]:
        images: dict[str, bytes] = {}
        for row in self._rows(source):
            options = _options(row)
            where = f"{self.name}: index {row['index']}"
            content = self._image(row, images, where)
            question = str(row["question"]).strip() if protocol.prompt == "lmms" else str(row["question"])
            hint = "" if is_missing(row.get("hint")) else str(row["hint"])
            text, recorded = _prompt(protocol.prompt, question, hint, options)
            yield Question(
                id=row["index"],
                text=text,
                images=(content,),
                prompt=recorded,
                group=str(_group(row)),
                extra={"round_id": 0, "options": list(options.values()), "option_char": list(options)},
            )

    def references(self, source: Source, protocol: Protocol) -> list[Record]:
        return [_clean(row, self.name) for row in self._rows(source)]

    def parse_references(self, documents: Sequence[Document]) -> list[Record]:
        rows = [{_column(name): value for name, value in row.items()} for row in records_of(documents)]
        for row in rows:
            require(row, _COLUMNS, self.name)
        return [_clean(row, self.name) for row in rows]

    def reference_keys(self, reference: Record) -> list[tuple[str, ...]]:
        return [(key(reference["index"]),)]

    def judgement_key(self, reference: Record) -> str:
        return key(reference["index"])

    def rate(self, pairs: Sequence[Pair], protocol: Protocol) -> tuple[list[Item], Record]:
        infer = _INFER["lmms" if protocol.rule == "lmms" else "official"]
        for pair in pairs:
            if is_missing(pair.reference.get("answer")):
                raise DataError(
                    f"{self.name}: index {pair.reference['index']} has no 'answer'; this split is scored by "
                    "the MMBench server only: write its submission file with 'convert'"
                )
        items = [_rate_row(pair, infer) for pair in pairs]
        groups = _groups(items, pairs)
        if protocol.rule == "vanilla":
            items = [group[0] for group in groups.values()]
        metrics = _report(pairs, groups, first_only=protocol.rule == "vanilla")
        firsts = [group[0].score for group in groups.values()]
        metrics["n_groups"] = len(groups)
        metrics["vanilla_first_rotation_accuracy"] = fmean(firsts)
        metrics["vanilla_all_rows_accuracy"] = fmean(item.score for group in groups.values() for item in group)
        return items, metrics

    def estimate(self, items: Sequence[Item], metrics: Record, protocol: Protocol) -> Estimate:
        hits: dict[str, float] = {}
        for item in items:
            hits[item.unit] = min(hits.get(item.unit, 1.0), item.score)
        return estimate_mean("overall", list(hits.values()), list(hits))

    def convert(self, pairs: Sequence[Pair], out: Path) -> Record:
        """Write the sheet that the MMBench server accepts.

        It holds the columns of the table without hint, category, source, image, comment and l2-category, with
        ``prediction`` as the seventh; a question without answer keeps an empty cell.
        """
        columns = [name for name in pairs[0].reference if name not in _NOT_SUBMITTED]
        place = min(_PREDICTION_PLACE, len(columns))
        columns = [*columns[:place], "prediction", *columns[place:]]
        rows = [
            {**pair.reference, "prediction": pair.text if pair.answered else None}  #
            for pair in pairs
        ]
        return write_sheet(out, columns, rows)

    def _rows(self, source: Source) -> Iterator[Record]:
        path = source.path("questions")
        for row in iter_rows(path):
            record = {_column(name): value for name, value in row.items()}
            require(record, (*_COLUMNS, "image"), str(path))
            yield record | {"index": _index(record["index"], str(path))}

    def _image(self, row: Record, images: dict[str, bytes], where: str) -> bytes:
        """The row's image; a short cell names the row that holds it."""
        cell = row["image"]
        if not isinstance(cell, str):
            return hub_image(cell, where)
        if len(cell) <= 16 and cell.strip() in images:
            return images[cell.strip()]
        content = decode_base64(cell, where)
        if row["index"] < 1_000_000:
            images[key(row["index"])] = content
        return content


def _column(name: str) -> str:
    """Column names differ in case between the copies (``L2-category``); the option letters stay."""
    return name if len(name) == 1 else name.lower()


def _clean(row: Record, where: str) -> Record:
    """The row without image, cells without value as None and the index as a number."""
    clean = {name: None if is_missing(value) else value for name, value in row.items() if name != "image"}
    return clean | {"index": _index(row["index"], where)}


def _index(value: Any, where: str) -> int:
    try:
        return int(value)
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: the index {value!r} is not a number") from error


def _options(row: Record) -> dict[str, str]:
    """Letters and texts up to the first empty cell."""
    options = {}
    for letter in "ABCD":
        if is_missing(row.get(letter)):
            break
        options[letter] = str(row[letter])
    return options


def _prompt(layout: str, question: str, hint: str, options: Mapping[str, str]) -> tuple[str, str]:
    """The text asked, and the text recorded with the answer (LLaVA leaves the instruction out of it)."""
    block = options_block(list(options.values()))
    if layout == "lmms":
        stem = f"{hint} {question}" if hint else question
        text = f"{stem} There are several options:\n{block}\n{OPTION_LETTER}"
        return text, text
    stem = f"{hint}\n{question}" if hint else question
    recorded = f"{stem}\n{block}"
    return recorded + (_OPTION_LETTER_CN if layout == "llava_cn" else OPTION_LETTER), recorded


def _group(row: Record) -> int:
    return int(row["index"]) % 1_000_000


def _rate_row(pair: Pair, infer: Callable[[str, Mapping[str, str]], str | None]) -> Item:
    row = pair.reference
    options = {letter: str(row[letter]) for letter in "ABCD" if row.get(letter) is not None}
    parsed = infer(pair.text, options) if pair.answered else None
    return Item(
        id=row["index"],
        score=float(parsed == row["answer"]),
        unit=str(_group(row)),
        parsed=parsed,
        answered=pair.answered,
        unparsed=pair.answered and parsed is None,
        facts={"category": row.get("category"), "gold": row["answer"]},
    )


def _groups(items: Sequence[Item], pairs: Sequence[Pair]) -> dict[str, list[Item]]:
    """Items by question, rotations in the order of their index."""
    groups: dict[str, list[Item]] = {}
    for item in sorted(items, key=lambda item: int(item.id)):
        groups.setdefault(item.unit, []).append(item)
    return groups


def _report(pairs: Sequence[Pair], groups: Mapping[str, list[Item]], first_only: bool) -> Record:
    """``overall``, ``category``, ``l2_category``, and ``report_acc`` as VLMEvalKit prints it."""
    rows: dict[str, Record] = {}
    for pair in sorted(pairs, key=lambda pair: pair.reference["index"]):
        rows.setdefault(str(_group(pair.reference)), pair.reference)
    hits = {
        unit: float(group[0].score if first_only else all(item.score for item in group))
        for unit, group in groups.items()
    }
    category = _means(rows, hits, "category")
    ability = _means(rows, hits, "l2-category")
    splits = sorted({str(row.get("split") or "none") for row in rows.values()})
    report: Record = {"split": splits[0] if len(splits) == 1 else splits, "Overall": fmean(hits.values())}
    report |= {_ABILITIES.get(name, name): mean for name, mean in ability.items()} | category
    return {"overall": fmean(hits.values()), "category": category, "l2_category": ability, "report_acc": report}


def _means(rows: Mapping[str, Record], hits: Mapping[str, float], column: str) -> dict[str, float]:
    values: dict[str, list[float]] = {}
    for unit, row in rows.items():
        if row.get(column) is not None:
            values.setdefault(str(row[column]), []).append(hits[unit])
    return {name: fmean(values[name]) for name in sorted(values)}


BENCHMARK = MMBench()
