"""TextVQA (Singh et al. 2019, arXiv 1904.08920): read the text in the image; ten human answers a question.

Files are the official ``TextVQA_0.5.1_val.json`` (``{"data": [...]}``) and the folder ``train_images``. The OCR tokens
of the prompt come from the records, from the Rosetta file, or with whole prompts from LLaVA's question file. The table
on the hub (role ``parquet``) has the tokens in it. Prompts with and without OCR tokens differ by ten points or more, so
they are different protocols.

The default scorer is LLaVA's ``eval_textvqa.py`` (MMF's ``m4c_evaluator.py``), whose answers carry the image's id for
the question's; the question is then read from the prompt.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from mmpipe.benchmarks.base import SHORT_ANSWER, AnswerPair, Item, Protocol, Question, mean_score
from mmpipe.benchmarks.jsonl import Document, JsonDict, key, read_document, records_of, require
from mmpipe.benchmarks.readers import BenchmarkFiles
from mmpipe.benchmarks.short_answer import HumanAnswers
from mmpipe.errors import DataError

_OCR = "Reference OCR token: "
_OLD_LAYOUT = re.compile(r"Question: (.*?) Short answer:", re.DOTALL)


class TextVqa(HumanAnswers):
    """TextVQA's validation split."""

    name = "textvqa"
    files = {
        "questions": "TextVQA_0.5.1_val.json",
        "images": "train_images",
        "ocr": "TextVQA_Rosetta_OCR_v0.2_val.json",
        "prompts": "llava_textvqa_val_v051_ocr.jsonl",
        "parquet": "data",
    }
    fields = ("image_id", "question")
    hub_columns = ("question_id", "image_id", "question", "answers", "ocr_tokens")
    image = "{image_id}.jpg"
    shown = ("question",)
    unit_field = "image_id"
    carried = ("image_id",)
    humans = 10
    prompts = {
        "llava": "{question}\n" + _OCR + "{ocr}" + SHORT_ANSWER,
        "plain": "{question}" + SHORT_ANSWER,
        "lmms": "{capitalised}" + SHORT_ANSWER,
    }
    protocols = (
        Protocol("textvqa_val_ocr", "LLaVA's prompt with OCR tokens, MMF's m4c evaluator", rule="evalai",
                 metric="accuracy_exact", scale=100, aliases=("llava", "m4c", "ocr")),
        Protocol("textvqa_val", "the same without OCR tokens", rule="evalai", prompt="plain", metric="accuracy_exact",
                 scale=100),
        Protocol("lmms", "lmms-eval: no OCR tokens, question capitalised", rule="evalai", prompt="lmms",
                 metric="exact_match", aliases=("libmoe",)),
        Protocol("vlmevalkit", "VLMEvalKit: no OCR tokens, its punctuation rule on both sides", rule="vlmevalkit",
                 prompt="plain", metric="Overall", scale=100, max_new_tokens=2048),
        Protocol("vqa", "the VQA evaluation, which compares raw where the humans are unanimous", rule="vqa",
                 metric="overall", scale=100, digits=2),
    )  # fmt: skip

    def llava_questions(self, source: BenchmarkFiles, protocol: Protocol, role: str = "prompts") -> Iterator[Question]:
        """LLaVA's prompts, found by image and question."""
        given = {
            (key(record["question_id"]), question): record["text"]
            for record in records_of([read_document(source.path(role))], ("question_id", "text"))
            if (question := question_of_prompt(record["text"])) is not None
        }
        records = self.references(source, protocol)
        texts = (given.get(_question_key(record)) or self.text(record, protocol) for record in records)
        yield from self.ask(source, protocol, records, texts)

    def references(self, source: BenchmarkFiles, protocol: Protocol) -> list[JsonDict]:
        records = super().references(source, protocol)
        lacking = [record for record in records if "ocr_tokens" not in record]
        if lacking and protocol.prompt == "llava" and not source.has("prompts") and not source.on_hub:
            document = _data(read_document(source.path("ocr")))
            tokens = {key(r["image_id"]): r["ocr_tokens"] for r in records_of([document], ("image_id", "ocr_tokens"))}
            for record in records:
                if key(record["image_id"]) not in tokens:
                    raise DataError(f"{document.name}: no OCR tokens for the image {record['image_id']}")
                record["ocr_tokens"] = tokens[key(record["image_id"])]
        return records

    def parse_references(self, documents: Sequence[Document]) -> list[JsonDict]:
        return [dict(record) for record in records_of([_data(d) for d in documents], self.fields)]

    def variables(self, record: JsonDict) -> JsonDict:
        tokens = {"ocr": ", ".join(record["ocr_tokens"])} if "ocr_tokens" in record else {}
        return super().variables(record) | tokens

    def id_of(self, reference: JsonDict) -> int | str:
        """LLaVA's records have no question id."""
        return reference["question_id" if "question_id" in reference else "image_id"]

    def reference_keys(self, reference: JsonDict) -> list[tuple[str, ...]]:
        by_text = _question_key(reference)
        return [(key(reference["question_id"]),), by_text] if "question_id" in reference else [by_text]

    def answer_keys(self, answer: JsonDict) -> list[tuple[str, ...]]:
        number = key(answer["question_id"])
        question = question_of_prompt(str(answer.get("prompt", "")))
        return [(number,)] if question is None else [(number, question), (number,)]

    def metrics(self, items: Sequence[Item], pairs: Sequence[AnswerPair], protocol: Protocol) -> JsonDict:
        if protocol.metric != "accuracy_exact":
            return super().metrics(items, pairs, protocol)
        mean = mean_score(items)
        return {"accuracy": round(100 * mean, 2), "accuracy_exact": 100 * mean, "samples": len(items)}

    def submitted(self, pair: AnswerPair) -> JsonDict:
        require(pair.reference, ("question_id",), self.name)
        return super().submitted(pair)


def question_of_prompt(prompt: str) -> str | None:
    """The lower-cased question in one of the prompt layouts that LLaVA's scorer knows; None in any other."""
    if prompt.startswith("OCR tokens: "):
        found = _OLD_LAYOUT.search(prompt)
        return found.group(1).lower() if found else None
    lines = prompt.split("\n")
    if _OCR in prompt and len(lines) == 3:
        return lines[1 if lines[0].startswith(_OCR) else 0].lower()
    return lines[0].lower() if len(lines) == 2 else None


def _data(document: Document) -> Document:
    content = document.content
    return Document(document.name, content.get("data")) if isinstance(content, dict) else document


def _question_key(record: JsonDict) -> tuple[str, str]:
    return key(record["image_id"]), str(record["question"]).lower()


BENCHMARK = TextVqa()
