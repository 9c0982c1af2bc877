"""Verifying a mixture and tokenising it: records a second on one core, and peak memory, as the number of records grows.

Records are made: conversations of LLaVA's length about images of COCO's size (640 by 480, JPEG of noise and shapes). There
are a hundred different contents, linked under a name of its own for every record, so that all of them are opened and decoded.
The tokenizer is a byte-pair one of 4,000 tokens trained on the made words; an image counts 576 tokens.
Every size and step runs in a fresh process with one worker. Time is that of the processor, which other work on the machine
changes least. Of memory there are two high-water marks (Linux): the resident set, in which pages of mapped files count that the
kernel may drop at any time, and its anonymous part, which is what the process itself holds, looked at twenty times a second.

    python perf/verify.py                                  # 10,000, 30,000 and 100,000 records; two minutes
    python perf/verify.py --records 1000 3000              # quickly
    python perf/verify.py --text                           # without images: reading, checking and writing alone
    python perf/verify.py --steps verify                   # the first step alone
    python perf/verify.py --records 10000 100000 1000000   # a quarter of an hour; a million links and 4 GB of disk
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LIMIT_GB = 1.5
"""Peak memory must stay below this."""
LINEAR = 1.25
"""Time a record may grow by this factor from the smallest to the largest size."""
CONTENTS = 100
WORDS = 999
"""Different words, so few that each is one token: a record has as many tokens as one of LLaVA's."""
PHRASES = 4096
"""Texts that the turns are taken from: making a million records takes half a minute."""
TURNS = (10, 60, 12, 40)
"""Words of each turn."""


def make(folder: Path, records: int, text: bool) -> None:
    """Annotations in LLaVA's format with an image file for each record."""
    import numpy as np
    from PIL import Image

    chooser = random.Random(0)
    images = folder / "images"
    images.mkdir(parents=True)
    for number in range(CONTENTS):
        noise = np.random.default_rng(number).integers(0, 256, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((640, 480), Image.Resampling.BICUBIC).save(images / f"{number}.jpg", quality=90)
    phrases = [
        [" ".join(f"word{chooser.randrange(WORDS)}" for _ in range(length)) for _ in range(PHRASES)] for length in TURNS
    ]
    with (folder / "mix.json").open("w") as file:
        for number in range(records):
            name = f"{number // 1000:04}/{number}.jpg"
            if not text:
                link = images / name
                if not number % 1000:
                    link.parent.mkdir()
                os.link(images / f"{number % CONTENTS}.jpg", link)
            said = [chooser.choice(of_length) for of_length in phrases]
            file.write(("[" if not number else ",\n") + json.dumps(record(number, name, text, said)))
        file.write("]")


def record(number: int, name: str, text: bool, said: list[str]) -> dict[str, Any]:
    """About as long as LLaVA's: four turns of ten to sixty words."""
    turns = [{"from": ("human", "gpt")[turn % 2], "value": words} for turn, words in enumerate(said)]
    if text:
        return {"id": f"{number:09}", "conversations": turns}
    turns[0]["value"] = f"<image>\n{turns[0]['value']}"
    return {"id": f"{number:09}", "image": name, "conversations": turns}


def verifying(folder: Path, workers: int) -> Callable[[], dict[str, Any]]:
    """The step that builds the mixture."""
    from mmpipe.data.mixture import build_mixture
    from mmpipe.data.spec import MixtureSourceSpec, MixtureSpec

    spec = MixtureSpec(parts=(MixtureSourceSpec(dataset="made", annotations="mix.json", images="images"),))
    return lambda: build_mixture(spec, {"made": folder}, folder / "out", workers=workers, log=lambda line: None)


def tokenising(folder: Path, workers: int) -> Callable[[], dict[str, Any]]:
    """The step that encodes it."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    from mmpipe.data.templates import get_template
    from mmpipe.data.tokens import TextEncoder, tokenise

    backend = ByteLevelBPETokenizer()
    words = (f"word{number} USER: ASSISTANT:" for number in range(WORDS))
    backend.train_from_iterator(
        words, vocab_size=4000, min_frequency=1, special_tokens=["<s>", "</s>", "<image>"], show_progress=False
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend._tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    encoder = TextEncoder(
        template=get_template("vicuna_v1"),
        tokenizer=tokenizer,
        image_token="<image>",
        tokens_per_image=576,
        max_length=2048,
    )
    records = folder / "out" / "records.arrow"
    return lambda: tokenise(records, encoder, folder / "tokens", max_bad=0, workers=workers, log=lambda line: None)


STEPS = {"verify": verifying, "tokenise": tokenising}


def measure(step: str, folder: Path, workers: int) -> None:
    """Take a step here and print what it took; runs in a process of its own."""
    take = STEPS[step](folder, workers)
    start, wall = time.process_time(), time.perf_counter()
    report = take()
    seconds = time.process_time() - start
    print(json.dumps({
        "step": step,
        "records": report["kept"],
        "processor_seconds": round(seconds, 1),
        "wall_seconds": round(time.perf_counter() - wall, 1),
        "records_per_core_second": round(report["kept"] / seconds),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }))  # fmt: skip


def watched(command: list[str]) -> dict[str, Any]:
    """What a measuring process prints, and the most anonymous memory it was seen with."""
    anonymous = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            status = Path(f"/proc/{process.pid}/status").read_text()
            found = re.search(r"RssAnon:\s+(\d+) kB", status)  # not there any more once it has ended
            anonymous = max(anonymous, int(found[1]) if found else 0)
            time.sleep(0.05)
        assert process.stdout is not None
        output = process.stdout.read()
    if process.returncode:
        raise SystemExit(process.returncode)
    return json.loads(output) | {"anonymous_peak_mb": round(anonymous / 1024)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, nargs="+", default=[10_000, 30_000, 100_000])
    parser.add_argument("--text", action="store_true", help="records without images")
    parser.add_argument("--steps", nargs="+", choices=list(STEPS), default=list(STEPS))
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure[0], Path(options.measure[1]), options.workers)
        return 0
    results: dict[str, list[dict[str, Any]]] = {step: [] for step in options.steps}
    for records in options.records:
        with tempfile.TemporaryDirectory(prefix="verify-") as folder:
            make(Path(folder) / "data", records, options.text)
            for step, found in results.items():
                command = [sys.executable, __file__, "--measure", step, str(Path(folder) / "data")]
                command += ["--workers", str(options.workers)]
                found.append(watched(command))
                print(json.dumps(found[-1]), flush=True)
    passed = [judged(found) for found in results.values()]
    return 0 if all(passed) else 1


def judged(results: list[dict[str, Any]]) -> bool:
    """Whether a step's time is linear in the records and its memory bounded; says so."""
    first, last = results[0], results[-1]
    growth = first["records_per_core_second"] / last["records_per_core_second"]
    more = max(1, last["records"] - first["records"])
    passed = last["peak_mb"] < LIMIT_GB * 1000 and growth < LINEAR
    print(json.dumps({
        "step": first["step"],
        "time_per_record_grows_by": round(growth, 2),
        **{
            f"{name}_bytes_per_record": round((last[f"{name}_mb"] - first[f"{name}_mb"]) * 1024**2 / more)
            for name in ("peak", "anonymous_peak")
        },
        "passed": passed,
    }))  # fmt: skip
    return passed


if __name__ == "__main__":
    sys.exit(main())
