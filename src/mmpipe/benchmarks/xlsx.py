"""Writing text into spreadsheets so that it stays text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmpipe.artifacts.files import atomic_open

_LONGEST_CELL = 32_767  # Excel's limit


def write_sheet(out: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Write rows to ``Sheet1`` of an xlsx file, atomically.

    Text is stored as text, also where it starts like a formula (``=``, ``+``, ``-``, ``@``): a model's reply
    must not be run by who opens the file. Characters that xlsx cannot hold are left out and longer texts than
    Excel allows are cut; the returned counts tell how many cells that met.
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
