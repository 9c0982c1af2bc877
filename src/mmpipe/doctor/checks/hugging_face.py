"""The Hugging Face hub: offline or not, with a token or not, and whether that matters. The token is never shown."""

from __future__ import annotations

import os
from collections.abc import Iterator

from mmpipe.doctor.base import Finding, Machine
from mmpipe.doctor.needs import missing_sources


def check(machine: Machine) -> Iterator[Finding]:
    from huggingface_hub import constants, get_token

    wanted = [name for name, source in missing_sources(machine).items() if source.kind == "hub"]
    state = ("offline" if constants.HF_HUB_OFFLINE else "online") + (", with a token" if get_token() else ", no token")
    if os.environ.get("HF_ENDPOINT"):
        state += ", through HF_ENDPOINT"
    if constants.HF_HUB_OFFLINE and wanted:
        yield Finding(
            "problem",
            f"{state}, but {_some(wanted)} must still be fetched",
            "unset HF_HUB_OFFLINE where Snakemake runs (jobs set it themselves), or name copies with `source: path`",
        )
    elif wanted and not get_token():
        yield Finding("ok", f"{state}; to fetch: {_some(wanted)}", "repositories that ask for consent need HF_TOKEN")
    else:
        yield Finding("ok", f"{state}; " + (f"to fetch: {_some(wanted)}" if wanted else "nothing to fetch"))


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
