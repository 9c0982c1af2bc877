"""Unpacking archives that may be damaged, split, or malicious.

Refused with a DataError before any file is written outside: absolute names, ``..``, links, devices, encrypted members,
and contents out of proportion to the archive. Every zip member's checksum is verified by reading it to its end.
"""

from __future__ import annotations

import io
import os
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from lzma import LZMAError
from pathlib import Path, PurePosixPath
from typing import IO, BinaryIO, cast

from mmpipe.artifacts.files import leaves_folder
from mmpipe.errors import DataError
from mmpipe.sources.transfer.progress import check_space

_MAX_RATIO = 200
"""Expansion ratio above which an archive counts as a bomb; real ones stay below 50."""
_MODEST = 64 * 1024**2
"""Contents below this size are never a bomb."""
_ZIP = (b"PK\x03\x04", b"PK\x05\x06")
_DAMAGE = (zipfile.BadZipFile, tarfile.TarError, zlib.error, LZMAError, EOFError, NotImplementedError)


class DamagedArchive(DataError):
    """An archive that cannot be read to its end; a new download may help."""


@dataclass
class Contents:
    """What was unpacked."""

    files: int = 0
    size: int = 0


def unpack(pieces: Sequence[Path], target: Path, flat: bool = False) -> Contents:
    """Unpack a zip or tar archive, whole or in ``pieces`` that follow each other, into ``target``.

    Members appear in ``target`` only after all of them were read; existing files stay, those of the same name
    are replaced. ``flat`` drops the folders inside the archive (``unzip -j``).

    Raises DamagedArchive or, for an archive that is not safe, DataError.
    """
    name = str(pieces[0])
    stage = target.with_name(f".{target.name or 'root'}.unpacking")
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir(parents=True)
    try:
        with _opened(pieces) as file:
            # By its first bytes: a tar whose last member is a zip ends like a zip.
            start = file.read(4)
            file.seek(0)
            if start.startswith(b"<"):
                raise DamagedArchive(f"{name}: a web page, not an archive; the server did not give the file")
            kind = _unpack_zip if start in _ZIP else _unpack_tar
            contents = kind(file, stage, name, sum(piece.stat().st_size for piece in pieces))
        if not contents.files:
            raise DamagedArchive(f"{name}: the archive holds no files")
        if flat:
            _flatten(stage, name)
        _merge(stage, target)
        return contents
    except _DAMAGE as error:
        raise DamagedArchive(f"{name}: the archive is damaged ({error})") from error
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        raise DataError(f"{name}: a member is both a file and a folder ({error.filename})") from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _member_path(root: Path, name: str, archive: str) -> Path:
    """``root / name``. Raises DataError when the name leads out of ``root``."""
    if leaves_folder(name):
        raise DataError(f"{archive}: the member {name!r} leads out of the folder; the archive is not safe")
    return root.joinpath(*PurePosixPath(name.replace("\\", "/")).parts)


def _unpack_zip(file: BinaryIO, target: Path, name: str, packed: int) -> Contents:
    contents = Contents()
    with zipfile.ZipFile(file) as bundle:
        members = bundle.infolist()
        total = sum(member.file_size for member in members)
        _check_growth(total, packed, name)
        check_space(target, total, name)
        for member in members:
            path = _member_path(target, member.filename, name)
            kind = stat.S_IFMT(member.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise DataError(f"{name}: the member '{member.filename}' is a link or a device; not safe")
            if member.flag_bits & 0x1:
                raise DataError(f"{name}: the member '{member.filename}' is encrypted; it cannot be read")
            if member.is_dir():
                path.mkdir(parents=True, exist_ok=True)
                continue
            with bundle.open(member) as source:
                _write(source, path, contents)
    return contents


def _unpack_tar(file: BinaryIO, target: Path, name: str, packed: int) -> Contents:
    contents = Contents()
    # As a stream: a tar has no directory, and a list of a million members would fill the memory.
    with tarfile.open(fileobj=file, mode="r|*") as bundle:
        while (member := bundle.next()) is not None:
            bundle.members.clear()  # type: ignore[attr-defined]
            path = _member_path(target, member.name, name)
            if member.isdir():
                path.mkdir(parents=True, exist_ok=True)
                continue
            source = bundle.extractfile(member) if member.isreg() else None
            if source is None:
                raise DataError(f"{name}: the member '{member.name}' is a link or a device; not safe")
            _check_growth(contents.size + member.size, packed, name)
            check_space(target, member.size, name)  # earlier members count against the limit
            with source:
                _write(source, path, contents)
    return contents


def _write(source: IO[bytes], path: Path, contents: Contents) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as sink:
        shutil.copyfileobj(source, sink, 1 << 20)
        contents.size += sink.tell()
    contents.files += 1


def _check_growth(size: int, packed: int, name: str) -> None:
    if size > max(_MAX_RATIO * packed, _MODEST):
        raise DataError(f"{name}: {packed} bytes would grow to {size}; the archive is not safe")


def _flatten(stage: Path, name: str) -> None:
    """Move every file to the top and remove the folders. Raises DataError when two have the same name."""
    for path in [path for path in stage.rglob("*") if path.is_file() and path.parent != stage]:
        if (stage / path.name).exists():
            raise DataError(f"{name}: two members are called '{path.name}'; it cannot be unpacked flat")
        path.rename(stage / path.name)
    for folder in [path for path in stage.iterdir() if path.is_dir()]:
        shutil.rmtree(folder)


def _merge(source: Path, target: Path) -> None:
    """Move everything below ``source`` into ``target``, folder by folder."""
    target.mkdir(parents=True, exist_ok=True)
    for entry in sorted(os.scandir(source), key=lambda entry: entry.name):
        place = target / entry.name
        if entry.is_dir(follow_symlinks=False) and place.exists():
            _merge(Path(entry.path), place)
        else:
            os.replace(entry.path, place)


@contextmanager
def _opened(pieces: Sequence[Path]) -> Iterator[BinaryIO]:
    with ExitStack() as stack:
        files = [stack.enter_context(piece.open("rb")) for piece in pieces]
        whole = files[0] if len(files) == 1 else io.BufferedReader(cast(io.RawIOBase, _Joined(files)), 1 << 20)
        yield cast(BinaryIO, whole)


class _Joined(io.RawIOBase):
    """Several files read as one; joining them on disk would double the space."""

    def __init__(self, files: Sequence[BinaryIO]) -> None:
        self._files = files
        self._ends: list[int] = []
        for file in files:
            self._ends.append((self._ends or [0])[-1] + file.seek(0, io.SEEK_END))
        self._place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._ends[-1]}[whence]
        self._place = max(0, origin + offset)
        return self._place

    def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]
        number = next((i for i, end in enumerate(self._ends) if self._place < end), None)
        if number is None:
            return 0
        start = self._ends[number - 1] if number else 0
        self._files[number].seek(self._place - start)
        data = self._files[number].read(min(len(buffer), self._ends[number] - self._place))
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)
