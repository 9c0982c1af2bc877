"""The settings of a mixture, as written in ``mixtures.yaml``."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from mmpipe.artifacts.files import leaves_folder
from mmpipe.settings import Settings


def _inside(path: str) -> str:
    if leaves_folder(path):
        raise ValueError(f"'{path}' must lie inside the directory of the data set")
    return path


def listed(value: object) -> object:
    """A list of one text for a text; other values as they are."""
    return [value] if isinstance(value, str) else value


def _matches_something(pattern: str) -> str:
    if not pattern or pattern.startswith("/"):
        raise ValueError(f"'{pattern}' matches no image: names are relative, as the annotations write them")
    return pattern


InnerPath = Annotated[str, AfterValidator(_inside)]
InnerPaths = Annotated[
    tuple[InnerPath, ...], Field(min_length=1), BeforeValidator(listed, json_schema_input_type=str | tuple[str, ...])
]
Patterns = Annotated[
    tuple[Annotated[str, AfterValidator(_matches_something)], ...],
    BeforeValidator(listed, json_schema_input_type=str | tuple[str, ...]),
]


class MixtureSourceSpec(Settings):
    """A source of a mixture: records taken from one data set."""

    dataset: str
    """A name in the catalogue of data sets; it becomes the ``source`` of the records."""
    annotations: InnerPaths
    """Files that hold the records, relative to the data set's directory, in this order; ``*.json`` is a pattern."""
    images: InnerPaths = (".",)
    """The folder or folders that image names are relative to; the first that holds an image gives it."""
    format: str = "llava"
    """The format of the annotations: a module of ``mmpipe.data.formats``."""
    take: Annotated[int, Field(gt=0)] | Annotated[float, Field(gt=0, le=1)] | None = None
    """A number of records, or a share of them, chosen at random; None takes all."""
    with_images: bool | None = None
    """True keeps only records with images, False only those without."""
    only: Patterns = ()
    """Keeps only records whose images all have a name that matches one of these: ``coco/*`` is everything below
    ``coco/``. Names are matched as the annotations write them, before ``take`` chooses."""
    without: Patterns = ()
    """Leaves out records with an image whose name matches one of these."""
    prefix: str = ""
    """Put before the text of every question, after its leading images."""
    suffix: str = ""
    """Appended to every question, e.g. the instruction to answer with a single word."""
    expected: Annotated[int, Field(gt=0)] | None = None
    """Number of records according to publishers or a paper; the report compares it with the number found."""
    known: str = ""
    """Known reason of dropped records, with its source; shown beside the drops in report and failure."""
    image_position: Literal["keep", "first"] = "keep"
    """``first`` moves the images of a question to its head, as LLaVA does; ``keep`` leaves them."""


class MixtureSpec(Settings):
    """A training set. The order of training is the sampler's, not that of the sources."""

    VERSION: ClassVar[int] = 1
    """Raised when a change of code changes the selected records or their content."""

    description: str = ""
    """Description in one line."""
    parts: Annotated[tuple[MixtureSourceSpec, ...], Field(min_length=1)]
    """The sources of the records, each a selection from one data set."""
    seed: int = 0
    """Decides which records ``take`` chooses."""
    max_bad: Annotated[float, Field(ge=0, le=1)] = 0.01
    """The largest share of bad records that any source may have."""

    def spec(self) -> dict[str, Any]:
        """The settings that determine the records; descriptions do not."""
        told = {"description": True, "parts": {"__all__": {"expected", "known"}}}
        return {
            "version": self.VERSION,
            **self.model_dump(mode="json", exclude_defaults=True, exclude=told),  # type: ignore[arg-type]
        }
