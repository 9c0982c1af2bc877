"""The version of Python."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator

from packaging.specifiers import SpecifierSet

from mmpipe.doctor.base import Finding, Machine
from mmpipe.doctor.project import project


def check(machine: Machine) -> Iterator[Finding]:
    wanted, found = project(machine.root).get("requires-python", ""), platform.python_version()
    if found not in SpecifierSet(wanted, prereleases=True):
        yield Finding("problem", f"Python {found}, needs {wanted}", "make an environment with a newer Python")
    else:
        yield Finding("ok", f"Python {found} ({sys.executable})")
