"""The base of families of metrics: input files, table and figure; and shared helpers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from mmpipe.plotting import figure
from mmpipe.registry import modules

if TYPE_CHECKING:
    from numpy.typing import NDArray

Row = dict[str, Any]
Reads = Literal[
    "log",
    "logs of all benchmarks",
    "logs of the path",
    "models of the path",
    "model and questions",
    "scores with and without the first expert",
]
"""The files a family can read: the expert log of a checkpoint on a benchmark; its logs on all benchmarks; the logs on a
benchmark, or the models, of the sparse checkpoints on its recipe's path, itself the last; its model and a benchmark's
questions; or, for every benchmark answered without first experts, ``score.json`` and ``per_item.jsonl`` with and without."""


@dataclass(frozen=True)
class MetricInput:
    """One input of a table: its file, and the checkpoint and benchmark it belongs to."""

    path: Path
    checkpoint: str
    benchmark: str

    @classmethod
    def of(cls, path: str | Path) -> MetricInput:
        """Read checkpoint and benchmark from a path ``.../{checkpoint}/eval/{benchmark}/{file}`` or
        ``.../{recipe}/{stage}/model/{file}``."""
        path = Path(path)
        if "eval" in path.parts:
            at = path.parts.index("eval")
            return cls(path, path.parts[at - 1], path.parts[at + 1])
        return cls(path, f"{path.parts[-4]}@{path.parts[-3]}", "")


class MetricFamily:
    """A table (CSV) and a figure (SVG) of one kind of metric. The docstring is the caption of the figure.

    A subclass declares what it ``reads``, computes ``table`` (or ``measure``) from these files and draws ``figure`` from the
    table.
    """

    reads: ClassVar[Reads] = "log"
    least_inputs: ClassVar[int] = 1
    """Least number of input files."""
    per: ClassVar[Literal["benchmark", "checkpoint"]] = "benchmark"
    """One table for every benchmark a checkpoint answered, or one for each checkpoint."""
    runs_model: ClassVar[bool] = False
    """Whether the model has to be run (``measure``); the others read files."""
    title: ClassVar[str]

    def table(self, sources: Sequence[MetricInput]) -> list[Row]:
        """The rows, all with the same columns."""
        raise NotImplementedError

    def measure(self, sources: Sequence[MetricInput], device: str, questions: int) -> list[Row]:
        """The rows, where the model has to be run: on ``device``, with so many questions."""
        raise NotImplementedError

    def draw(self, rows: Sequence[Row], path: Path) -> None:
        """Draw the figure of the rows."""
        raise NotImplementedError


def families() -> dict[str, MetricFamily]:
    """Every family, by the name of its module."""
    return {name: module.FAMILY for name, module in modules("mmpipe.analysis.families").items()}


@dataclass(frozen=True)
class Layer:
    """The choices of one layer in a log; choices without effect (a null or free expert) have weight zero."""

    part: str
    layer: int
    experts: int
    """Number of experts."""
    question_T: NDArray[Any]
    times_T: NDArray[Any]
    """Number of questions that share each token's computation."""
    scale_T: NDArray[Any]
    position_T: NDArray[Any]
    kind_T: NDArray[Any]
    """Index into ``KINDS``."""
    indices_TK: NDArray[Any]
    weights_TK: NDArray[Any]

    @property
    def place(self) -> Row:
        """The columns that identify the layer."""
        return {"part": self.part, "layer": self.layer}

    @cached_property
    def done_TK(self) -> NDArray[Any]:
        """Mask of the choices that have an effect."""
        return self.weights_TK != 0


def read_layers(path: Path) -> Iterator[Layer]:
    """The layers of a log, one in memory at a time; layers without a single token are left out."""
    from mmpipe.analysis.expert_log import places

    for place in places(path):
        layer = read_layer(path, place)
        if layer is not None:
            yield layer


def read_layer(path: Path, place: Any) -> Layer | None:
    """One layer of a log; None when the log has none or not a token in it."""
    import numpy as np

    from mmpipe.analysis import expert_log

    table = expert_log.read_layer(path, place)
    if table is None or not len(table):
        return None

    def plain(name: str) -> NDArray[Any]:
        return table[name].to_numpy()

    def lists(name: str) -> NDArray[Any]:
        values = table[name].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        return values.reshape(len(table), -1)

    names = table["kind"].combine_chunks()
    codes = np.array([expert_log.KINDS.index(name) for name in names.dictionary.to_pylist()], np.int8)
    return Layer(
        part=place.part,
        layer=place.layer,
        experts=place.experts,
        question_T=plain("question"),
        times_T=plain("shared_by").astype(np.int64),
        scale_T=plain("scale"),
        position_T=plain("position"),
        kind_T=codes[names.indices.to_numpy()],
        indices_TK=lists("experts").astype(np.int64),
        weights_TK=lists("weights").astype(np.float64),
    )


def draw(family: MetricFamily, rows: Sequence[Row], path: Path) -> None:
    """Draw a family's figure; of a log without tokens, an empty one."""
    if rows:
        return family.draw(rows, path)
    with axes(path, 1) as (axis,):
        axis.set_axis_off()
        axis.text(0.5, 0.5, "no token was sent to an expert", ha="center")


@contextmanager
def axes(path: Path, panels: int, *, width: float = 3.6, height: float = 3.0, columns: int = 3) -> Iterator[Any]:
    """Axes for ``panels`` panels in rows of ``columns``, saved as SVG when the block ends."""
    columns = max(1, min(columns, panels))
    rows = -(-max(1, panels) // columns)
    with figure(path, rows, columns, (width * columns, height * rows)) as grid:
        flat = list(grid.flat)
        for unused in flat[panels:]:
            unused.set_axis_off()
        yield flat[: max(1, panels)]


def by(rows: Sequence[Row], *names: str) -> dict[Any, list[Row]]:
    """Rows grouped by one column, or by several as a tuple, in the order they first come."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        key = row[names[0]] if len(names) == 1 else tuple(row[name] for name in names)
        groups.setdefault(key, []).append(row)
    return groups


def where(part: str, layer: int | str) -> str:
    """The name of a layer in figures."""
    short = {"language_model": "language", "vision_tower": "tower", "multi_modal_projector": "projector"}
    return short[part] if part == "multi_modal_projector" else f"{short[part]} {layer}"


def lines_by_layer(axis: Any, rows: Sequence[Row], value: str, label: str = "") -> None:
    """One line a part over its layers; a part with a single layer is a dot."""
    for part, some in by(rows, "part").items():
        name = where(part, "").strip()
        axis.plot(
            [row["layer"] for row in some],
            [row[value] for row in some],
            marker="o",
            markersize=3,
            linewidth=1,
            label=f"{name} {label}".strip(),
        )
    axis.set_xlabel("layer")
    axis.xaxis.get_major_locator().set_params(integer=True)
