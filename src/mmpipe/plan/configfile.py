"""Configuration files hold values, not code.

Snakemake evaluates the expressions of a configuration that says ``__use_yte__``, as Python, and those of ``--configfile``
before it reads the Snakefile. ``profiles/default`` calls :func:`read_plainly` earlier than that.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mmpipe.errors import ConfigError
from mmpipe.settings import read_yaml

EXPRESSIONS = "__use_yte__"


def refuse_expressions(content: Any, where: str) -> None:
    """Raise ConfigError, opened by ``where``, for the content of a configuration that asks Snakemake to run its code."""
    if isinstance(content, Mapping) and EXPRESSIONS in content:
        raise ConfigError(
            f"{where}: '{EXPRESSIONS}' lets Snakemake run expressions of this file as Python; a configuration holds values "
            "alone: remove the key, and write values in place of expressions"
        )


def read_plainly(configfiles: Iterable[Path] = ()) -> None:
    """Let this process's Snakemake read configurations without evaluating anything, and refuse those that ask for it.

    ``configfiles`` may have been read already. Raises WorkflowError for each that is refused.
    """
    from snakemake.common import configfile
    from snakemake.exceptions import WorkflowError

    evaluating = configfile._load_configfile
    if getattr(evaluating, "plain", False):
        evaluating = evaluating.evaluating

    def load(file: Any, filetype: str = "Config") -> Any:
        if not isinstance(file, (str, Path)):
            return evaluating(file, filetype)
        try:
            content = read_yaml(Path(file))
            refuse_expressions(content, str(file))
        except ConfigError as error:
            raise WorkflowError(str(error)) from None
        return content

    load.plain, load.evaluating = True, evaluating  # type: ignore[attr-defined]
    configfile._load_configfile = load
    for file in configfiles:
        load(file)
