"""Object HalBench (RLHF-V, Yu et al. 2023, arXiv 2312.00849): objects of a description that are not in the image.

Files are RLHF-V's ``obj_halbench_300_with_image.jsonl`` (images in base64), its ``synonyms_refine.txt`` (a line a COCO
class: the class and its synonyms, comma-separated), and the annotations of COCO 2014 (``instances_*.json`` and
``captions_*.json`` in one folder), from which the objects of an image are taken: those annotated, and those its five
captions mention.

A judge lists the objects of a reply; replies of at most three words have none. Mentions are mapped to COCO classes
(CHAIR, Rohrbach et al. 2018, arXiv 1809.02156). The published rates are ``CHAIRs_refine`` (responses with a
hallucinated object among those that mention any) and ``CHAIRi`` (hallucinated mentions among all). The published
scripts (RLAIF-V, ``eval/eval_gpt_obj_halbench.py``) lemmatise with spaCy's transformer model; where the judge's record
has its lemmas (``extracted_objects``) they are used, otherwise nouns are singularised by rules against the synonym
table, which finds every word of the published table in singular and plural, so that spaCy would add only its
part-of-speech tagging. The protocol ``chair`` reads the reply itself in that way and needs no judge.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

from mmpipe.benchmarks.base import AnswerPair, Benchmark, Item, JudgeRequest, Protocol, Question
from mmpipe.benchmarks.jsonl import Document, JsonDict, iter_rows, key, read_document, records_of, require
from mmpipe.benchmarks.readers import BenchmarkFiles, decode_base64
from mmpipe.benchmarks.stats import MetricEstimate, bootstrap
from mmpipe.errors import DataError

_SHORT = 3
_FIELDS = ("image_id", "question")
_WORD = re.compile(r"[^\W\d_]+(?:'[a-z]+)?")
_POSSESSIVE = re.compile(r"['’]s\b|(?<=s)['’](?!\w)")

# Two words that count as one, besides the two-word synonyms; and what young and grown animals are called.
_PAIRS = {"home plate": "home plate", "train track": "train track", "passenger jet": "jet", "passenger train": "train",
          "bow tie": "tie", "toilet seat": "toilet", "wine glas": "wine glass"}  # fmt: skip
_AGES = ("baby", "adult")
_ANIMALS = ("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "animal", "cub")
_IRREGULAR = {"men": "man", "women": "woman", "children": "child", "people": "people", "knives": "knife", "mice": "mouse",
              "geese": "goose", "wolves": "wolf", "calves": "calf", "loaves": "loaf", "shelves": "shelf",
              "policemen": "policeman", "firemen": "fireman", "fishermen": "fisherman", "oxen": "ox"}  # fmt: skip


_INSTRUCTION = (
    "You list objects. From the description of an image, list the visible physical objects that it says are there. "
    "Leave out abstract things, colours, places, and objects said to be absent. Reply with a JSON list of nouns and nothing "
    'else, e.g. ["dog", "traffic light"]; if there are none, with [].'
)


class SynonymTable:
    """The synonym table: every word's COCO class, and the pairs of words that count as one."""

    def __init__(self, classes: Mapping[str, str | None]) -> None:
        named = {word: name for word, name in classes.items() if name}
        self.classes = {word.lower(): name for word, name in named.items()} | named

    @cached_property
    def pairs(self) -> dict[str, str]:
        """Two words -> the word they count as."""
        own = {word: word for word in self.classes if len(word.split()) == 2}
        ages = {f"{age} {animal}": animal for age in _AGES for animal in _ANIMALS}
        return own | ages | _PAIRS

    @cached_property
    def _single(self) -> frozenset[str]:
        """The words of the table and the parts of its pairs."""
        return frozenset(self.classes) | {part for pair in self.pairs for part in pair.split()}

    def tokens(self, text: str) -> list[str]:
        """The words of a text in lower case, without the mark of possession, in singular where the table has that."""
        return [self._singular(word) for word in _WORD.findall(_POSSESSIVE.sub(" ", text.lower()))]

    def _singular(self, word: str) -> str:
        endings = (("s", ""), ("es", ""), ("ies", "y"), ("ves", "fe"), ("ves", "f"), ("men", "man"))
        candidates = (word, _IRREGULAR.get(word), *(word.removesuffix(plural) + one for plural, one in endings))
        return next((candidate for candidate in candidates if candidate in self._single), word)

    def in_text(self, text: str) -> list[str]:
        """The words of the table in a text, pairs first, in order and each once."""
        found = dict.fromkeys(word for word, _ in _joined(self.tokens(text), self.pairs))
        return [word for word in found if word in self.classes]

    def of_objects(self, objects: Iterable[str]) -> list[str]:
        """The lemmas of the objects that a judge listed, each once; two-word hits stand for the whole phrase."""
        phrases = map(self.tokens, objects)
        lemmas = [double_words(tokens, self.pairs) or [" ".join(tokens)] for tokens in phrases]
        return list(dict.fromkeys(word for words in lemmas for word in words))


def _joined(tokens: Sequence[str], pairs: Mapping[str, str]) -> Iterator[tuple[str, bool]]:
    """The tokens, two where they are a pair as the word they count as; and whether they are."""
    place = 0
    while place < len(tokens):
        pair = pairs.get(" ".join(tokens[place : place + 2]))
        yield pair or tokens[place], pair is not None
        place += 2 if pair else 1


def double_words(tokens: Sequence[str], pairs: Mapping[str, str]) -> list[str]:
    """What the pairs of neighbouring tokens count as."""
    return [word for word, pair in _joined(tokens, pairs) if pair]


class ObjHal(Benchmark):
    """Object HalBench."""

    name = "objhal"
    files = {
        "questions": "obj_halbench_300_with_image.jsonl",
        "synonyms": "synonyms_refine.txt",
        "annotations": "annotations",
    }
    reference_roles = ("questions", "synonyms", "annotations")
    protocols = (
        Protocol("objhal", "a judge lists the objects; three beams, as RLAIF-V", rule="judge", max_new_tokens=1024,
                 num_beams=3, judged=True, aliases=("rlaifv", "llava_mod")),
        Protocol("greedy", "the same with greedy decoding", rule="judge", max_new_tokens=1024, judged=True),
        Protocol("chair", "objects read from the reply itself, no judge", rule="chair", max_new_tokens=1024),
    )  # fmt: skip

    def questions(self, source: BenchmarkFiles, protocol: Protocol) -> Iterator[Question]:
        for place, row in enumerate(iter_rows(source.path("questions"))):
            require(row, (*_FIELDS, "image"), f"objhal, row {place}")
            yield Question(
                id=place,
                text=str(row["question"]),
                images=(decode_base64(str(row["image"]), f"objhal, row {place}"),),
                extra={"image_id": row["image_id"]},
            )

    def read_references(self, paths: Sequence[Path]) -> list[JsonDict]:
        """Besides files of records, the synonym table (``.txt``) and the folder of COCO's annotations."""
        tables = [path for path in paths if path.suffix == ".txt"]
        folders = [path for path in paths if path.is_dir()]
        synonyms = {word: name for path in tables for word, name in _read_synonyms(path).items()}
        documents = [read_document(path) for path in paths if path not in tables and path not in folders]
        for folder in folders:
            rows = [{name: row[name] for name in _FIELDS} for row in records_of(documents, _FIELDS)]
            objects = _coco_objects(folder, {key(row["image_id"]) for row in rows}, SynonymTable(synonyms))
            documents = [Document("questions", [{**row, "gt_objects": objects[key(row["image_id"])]} for row in rows])]
        if synonyms:
            documents.append(Document("synonyms", {"synonyms": synonyms}))
        return self.parse_references(documents)

    def parse_references(self, documents: Sequence[Document]) -> list[JsonDict]:
        """Records with ``gt_objects``; the synonym table in each, as a document ``{"synonyms"}``, or as its own."""
        synonyms: dict[str, str | None] = {}
        records: list[JsonDict] = []
        for document in documents:
            content = document.content
            if isinstance(content, dict):
                synonyms |= content.get("synonyms", {} if "questions" in content else content)
                content = content.get("questions", [])
            records += records_of([Document(document.name, content)], ("image_id", "gt_objects"))
        table = {"synonyms": synonyms} if synonyms else {}
        return [{"question_id": place, **record, **table} for place, record in enumerate(records)]

    def reference_keys(self, reference: JsonDict) -> list[tuple[str, ...]]:
        return [(key(reference["question_id"]),), ("image", key(reference["image_id"]))]

    def rate(self, pairs: Sequence[AnswerPair], protocol: Protocol) -> tuple[list[Item], JsonDict]:
        tables: dict[int, SynonymTable] = {}
        items = []
        for pair in pairs:
            require(pair.reference, ("synonyms",), "objhal (give the synonym table with the references)")
            table = pair.reference["synonyms"]
            words = tables.setdefault(id(table), SynonymTable(table))
            items.append(_rate(pair, words, protocol.rule))
        return items, _chair(items)

    def estimate(self, items: Sequence[Item], metrics: JsonDict, protocol: Protocol) -> MetricEstimate:
        totals = {i.unit: [i.facts["hallucinated_response"], bool(i.facts["coco_mentions"])] for i in items}
        value = metrics["response_hallucination_rate_percent"]
        return bootstrap("response_hallucination_rate_percent", totals, lambda t: 100 * t[..., 0] / t[..., 1], value)

    def submitted(self, pair: AnswerPair) -> JsonDict:
        """A line of the published scripts' answer file."""
        reference = pair.reference
        known = {"question_id": reference["question_id"], "image_id": reference["image_id"]}
        return {**known, "question": reference.get("question", ""), "answer": pair.text}

    def judge_request(self, pair: AnswerPair) -> JudgeRequest | None:
        """The request for the objects of a reply of more than three words."""
        text = cleaned(pair.text)
        if len(text.split()) <= _SHORT:
            return None
        return JudgeRequest(self.judgement_key(pair.reference), _INSTRUCTION, text)


def cleaned(reply: str) -> str:
    """The reply without the role name that some models repeat."""
    return reply.replace("Assistant:", "").strip()


def listed_objects(reply: str) -> list[str] | None:
    """The objects in a judge's reply: the reply, or its last line, as a JSON list of texts; None if it is none."""
    for text in (reply, reply.split("\n")[-1] if '["' in reply else reply):
        try:
            found = json.loads(text)
        except ValueError:
            continue
        return found if isinstance(found, list) and all(isinstance(name, str) for name in found) else None
    return None


def _rate(pair: AnswerPair, words: SynonymTable, rule: str) -> Item:
    reference, text = pair.reference, cleaned(pair.text)
    lemmas: list[str] | None = []
    if len(text.split()) > _SHORT and rule == "chair":
        lemmas = words.in_text(text)
    elif len(text.split()) > _SHORT:
        objects = listed_objects(pair.verdict) if pair.verdict is not None else None
        lemmas = (pair.judgement or {}).get("extracted_objects")
        lemmas = words.of_objects(objects) if lemmas is None and objects is not None else lemmas
    # the seat of a toilet is no chair
    kept = [word for word in lemmas or [] if not (word == "seat" and "toilet" in (lemmas or []))]
    mentions = [(word, words.classes[word]) for word in kept if word in words.classes]
    gold = set(reference["gt_objects"])
    hallucinated = [word for word, name in mentions if name not in gold]
    return Item(
        id=reference["question_id"],
        score=float(pair.answered and lemmas is not None and not hallucinated),
        unit=key(reference["question_id"]),
        parsed=None if lemmas is None else ", ".join(lemmas),
        answered=pair.answered,
        unparsed=lemmas is None,
        facts={
            "image_id": reference["image_id"],
            "coco_mentions": [list(mention) for mention in mentions],
            "hallucinated": hallucinated,
            "hallucinated_response": int(bool(hallucinated)),
            "recalled": len({name for _, name in mentions} & gold),
            "gt_objects": len(gold),
            "words": len(text.split()),
        },
    )


def _chair(items: Sequence[Item]) -> JsonDict:
    """The published rates, with the counts they come from."""
    facts = [item.facts for item in items]
    names = ("hallucinated_response", "gt_objects", "recalled", "words")
    responses, gold, recalled, length = (sum(fact[name] for fact in facts) for name in names)
    mentions, wrong = (sum(len(fact[name]) for fact in facts) for name in ("coco_mentions", "hallucinated"))
    naming = sum(bool(fact["coco_mentions"]) for fact in facts)
    refine, share = _ratio(responses, naming), _ratio(wrong, mentions)
    return {
        "CHAIRs_all_responses": _ratio(responses, len(items)),
        "CHAIRs_refine": refine,
        "CHAIRi": share,
        "object_recall": _ratio(recalled, gold),
        "response_hallucination_rate_percent": 100 * refine,
        "mention_hallucination_rate_percent": 100 * share,
        "response_correct_percent": 100 * (1 - refine),
        "object_correct_percent": 100 * (1 - share),
        "n_responses": len(items),
        "n_responses_with_coco_mention": naming,
        "coco_word_count": recalled,
        "gt_word_count": gold,
        "avg_word_len": _ratio(length, len(items)),
    }


def _ratio(part: float, whole: float) -> float:
    """0 for a zero denominator; the published scripts stop there."""
    return part / whole if whole else 0.0


def _read_synonyms(path: Path) -> dict[str, str]:
    table: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8-sig").splitlines():
        words = [word.strip() for word in line.split(",") if word.strip()]
        table |= dict.fromkeys(words, words[0]) if words else {}
    if not table:
        raise DataError(f"{path}: the synonym table is empty")
    return table


def _coco_objects(folder: Path, wanted: set[str], words: SynonymTable) -> dict[str, list[str]]:
    """The classes in each wanted image: those annotated and those its captions mention.

    Raises DataError for an image that has no annotation.
    """
    found: dict[str, set[str]] = {}
    for path in sorted([*folder.glob("instances_*.json"), *folder.glob("captions_*.json")]):
        content = read_document(path).content
        names = {category["id"]: category["name"] for category in content.get("categories", ())}
        for entry in content["annotations"]:
            if key(entry["image_id"]) in wanted:
                seen = found.setdefault(key(entry["image_id"]), set())
                if "caption" in entry:
                    seen.update(words.classes[word] for word in words.in_text(entry["caption"]))
                else:
                    name = names[entry["category_id"]]
                    seen.add(words.classes.get(name, name))
    lost = sorted(wanted - set(found))
    if lost:
        raise DataError(f"{folder}: {len(lost)} images have no COCO annotation, e.g. {', '.join(lost[:5])}")
    return {image: sorted(objects) for image, objects in found.items()}


BENCHMARK = ObjHal()
