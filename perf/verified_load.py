"""Start of a checkpoint whose files are compared with their hashes, against the same start without.

A checkpoint of LLaVA's form is made on the spot (one ``model.safetensors`` in bfloat16, random weights) and opened as a job
opens it, until every weight was read once. Prints one JSON line: median seconds and their ratio to ``unverified``, for

* ``first``: the files were never hashed; sha256 runs beside the loading;
* ``again``: a later process, whose cache knows this version of the files.

Starts of all kinds are interleaved, each in a process of its own, so that other work on the machine hits them alike. With
``--cold`` the files leave the page cache before each start.

    python perf/verified_load.py                                # 3 GB, warm page cache, in bfloat16
    python perf/verified_load.py --cold --dtype float32         # from the disk, as a training on a CPU opens it
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import torch

KINDS = ("unverified", "first", "again")


def make(out: Path, gigabytes: float) -> None:
    """A checkpoint of about that size, with a manifest."""
    from mmpipe.artifacts import manifest
    from mmpipe.checkpoints.load import build_model
    from mmpipe.checkpoints.save import save_checkpoint
    from mmpipe.demo.backbones import clip_tiny, qwen2_tiny
    from mmpipe.models.settings import VisionLanguage

    width = 2048
    layers = max(1, round(gigabytes * 1e9 / 2 / (14.5 * width**2)))
    with (
        tempfile.TemporaryDirectory(dir=out.parent) as folder,
        patch("torch.nn.init.normal_", lambda tensor, **_: tensor),
    ):
        backbones = {role: Path(folder, role) for role in ("vision", "language")}
        clip_tiny(backbones["vision"], hidden_size=32, layers=2, training_steps=0)
        torch.set_default_dtype(torch.bfloat16)
        qwen2_tiny(backbones["language"], hidden_size=width, layers=layers)
        torch.set_default_dtype(torch.float32)
        settings = VisionLanguage(vision="clip-tiny", language="qwen2")
        model, processor = build_model(backbones, settings, template="qwen", image_aspect="pad", seed=0)
    save_checkpoint(model.to(torch.bfloat16), processor, out)
    manifest.write(out, kind="model", spec="{}", inputs={}, checkpoint={"template": "qwen", "image_aspect": "pad"})


def start(directory: Path, dtype: torch.dtype, verified: bool) -> float:
    """Seconds to open a checkpoint and to read every weight once."""
    from mmpipe.artifacts import manifest
    from mmpipe.checkpoints.load import open_checkpoint

    began = time.perf_counter()
    with nullcontext() if verified else patch.object(manifest, "checking", lambda _: nullcontext()):
        model, _, _ = open_checkpoint(directory, dtype)
    for parameter in model.parameters():
        parameter.view(torch.int16 if dtype.itemsize == 2 else torch.int32).max()
    return time.perf_counter() - began


def measured(directory: Path, dtype: str, kind: str, cache: Path, cold: bool) -> float:
    """The seconds of a start in a process of its own."""
    files = [path for path in directory.iterdir() if path.is_file()]
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            if cold:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while file.read(1 << 24):
                    pass
    place = cache / ("empty" if kind == "first" else "kept")
    if kind == "first":
        subprocess.run(["rm", "-rf", str(place)], check=True)
    command = [sys.executable, __file__, "--start", str(directory), "--dtype", dtype]
    command += ["--unverified"] * (kind == "unverified")
    run = subprocess.run(
        command, env={**os.environ, "XDG_CACHE_HOME": str(place)}, capture_output=True, text=True, check=True
    )
    return float(run.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=3.0)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--cold", action="store_true", help="drop the files from the page cache first")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--directory", type=Path, help="keep the checkpoint there, or take the one that is there")
    parser.add_argument("--start", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--unverified", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.start:
        print(start(args.start, getattr(torch, args.dtype), not args.unverified))
        return
    with tempfile.TemporaryDirectory(dir=args.directory) as folder:
        directory, cache = (args.directory or Path(folder)) / "model", Path(folder, "cache")
        if not directory.is_dir():
            make(directory, args.gigabytes)
        measured(directory, args.dtype, "again", cache, args.cold)  # fills the cache
        found: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for _ in range(args.repeat):
            for kind in KINDS:
                found[kind].append(measured(directory, args.dtype, kind, cache, args.cold))
        size = (directory / "model.safetensors").stat().st_size
    seconds = {kind: statistics.median(values) for kind, values in found.items()}
    ratios = {kind: round(seconds[kind] / seconds["unverified"], 3) for kind in KINDS}
    facts = {"gigabytes": round(size / 1e9, 2), "cold": args.cold, "dtype": args.dtype, "cores": os.cpu_count()}
    print(json.dumps({**facts, "seconds": {k: round(v, 2) for k, v in seconds.items()}, "ratio": ratios}))


if __name__ == "__main__":
    main()
