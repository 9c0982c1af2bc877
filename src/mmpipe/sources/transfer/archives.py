"""Unpacking archives that may be damaged, split, or malicious.

Refused with a DataError that names the member, before any file is written outside: absolute names, ``..``, links,
devices, sparse and encrypted members, names with control characters, two members of one name (upper and lower case count
as equal), members that overlap, headers that take too much memory, and contents out of proportion to the archive. The
checksums of a zip's members and of a compressed tar are verified by reading to the end, and a tar must have its
end-of-archive mark.
"""

from __future__ import annotations

import bz2
import errno
import gzip
import io
import lzma
import os
import shutil
import stat
import struct
import tarfile
import unicodedata
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any, BinaryIO, cast

from mmpipe.artifacts.files import leaves_folder
from mmpipe.errors import DataError
from mmpipe.escapes import printable
from mmpipe.sources.transfer.progress import check_space

_MAX_RATIO = 200
"""Expansion ratio above which an archive counts as a bomb; real ones stay below 50."""
_MODEST = 64 * 1024**2
"""Contents below this size are never a bomb."""
_ZIP = (b"PK\x03\x04", b"PK\x05\x06")
_MAX_HEADER = 1 << 20
"""Bytes of the long name or the extended attributes of a member, and of all attributes that hold for the whole tar."""
_MAX_EXTENSIONS = 16
"""Headers before a member that extend its own; tar writes three at most."""
_LOCAL_HEADER = 30
"""Bytes of a zip's header before a member, without its name."""
_DAMAGE = (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError)
# What zipfile and tarfile raise on headers that make no sense.
_DAMAGE += (ValueError, OverflowError, IndexError, KeyError, struct.error, RecursionError)  # type: ignore[assignment]
_NO_NAME = {errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ}
_DECOMPRESSORS = ((b"\x1f\x8b", gzip.open), (b"BZh", bz2.open), (b"\xfd7zXZ", lzma.open))


class DamagedArchive(DataError):
    """An archive that cannot be read to its end; a new download may help."""


@dataclass
class Contents:
    """What was unpacked."""

    files: int = 0
    size: int = 0
    names: set[int] = field(default_factory=set)
    """Hashes of the names so far, as a file system that ignores case sees them."""


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
            start = file.read(6)
            file.seek(0)
            if start.startswith(b"<"):
                raise DamagedArchive(f"{name}: a web page, not an archive; the server did not give the file")
            packed = sum(piece.stat().st_size for piece in pieces)
            if start.startswith(_ZIP):
                contents = _unpack_zip(file, stage, name, packed)
            else:
                opened: Any = next((kind(file) for magic, kind in _DECOMPRESSORS if start.startswith(magic)), file)
                contents = _unpack_tar(opened, stage, name, packed)
        if not contents.files:
            raise DamagedArchive(f"{name}: the archive holds no files")
        if flat:
            _flatten(stage, name)
        _merge(stage, target)
        return contents
    finally:
        shutil.rmtree(stage, ignore_errors=True)


@contextmanager
def _reading(name: str, member: str) -> Iterator[None]:
    """Errors of reading a member, or what follows it, as DataErrors that name both."""
    at = f"the member {member[:200]!r}" if member else "the archive"
    damaged = f"{name}: the archive is damaged" + (f" at {at}" if member else "")
    try:
        yield
    except _DAMAGE as error:
        raise DamagedArchive(f"{damaged} ({error})") from error
    except NotImplementedError as error:
        raise DataError(f"{name}: {at} is packed in a way that cannot be read ({error})") from error
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        raise DataError(f"{name}: {at} is both a file and a folder ({error.filename})") from error
    except OSError as error:
        if error.errno is None:  # gzip and bz2
            raise DamagedArchive(f"{damaged} ({error})") from error
        if error.errno in _NO_NAME:
            raise DataError(f"{name}: {at} cannot be a file here ({error.strerror})") from error
        raise


def _member_path(root: Path, member: str, name: str, contents: Contents, *, folder: bool) -> Path:
    """``root / member``. Raises DataError when the name leads out of ``root``, hides something, or is there already."""
    if leaves_folder(member):
        raise DataError(f"{name}: the member {member!r} leads out of the folder; the archive is not safe")
    readable = member.encode("utf-8", "surrogateescape").decode("utf-8", "replace")  # names need not be UTF-8
    if printable(readable, line=True) != readable:
        raise DataError(f"{name}: the name of the member {member!r} has control characters; the archive is not safe")
    parts = PurePosixPath(member.replace("\\", "/")).parts
    if not folder:
        alike = hash(unicodedata.normalize("NFC", "/".join(parts)).lower())
        if alike in contents.names:
            raise DataError(f"{name}: two members are called {member!r}, but for upper and lower case; not safe")
        contents.names.add(alike)
    return root.joinpath(*parts)


def _unpack_zip(file: BinaryIO, target: Path, name: str, packed: int) -> Contents:
    contents = Contents()
    with _reading(name, ""), zipfile.ZipFile(file) as bundle:
        members = bundle.infolist()
        total = sum(member.file_size for member in members)
        _check_growth(total, packed, name)
        _check_overlap(members, bundle.start_dir, name)
        check_space(target, total, name)
        for member in members:
            path = _member_path(target, member.orig_filename, name, contents, folder=member.is_dir())
            kind = stat.S_IFMT(member.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise DataError(f"{name}: the member {member.filename!r} is a link or a device; not safe")
            if member.flag_bits & 0x1:
                raise DataError(f"{name}: the member {member.filename!r} is encrypted; it cannot be read")
            with _reading(name, member.filename):
                if member.is_dir():
                    path.mkdir(parents=True, exist_ok=True)
                    continue
                with bundle.open(member) as source:
                    _write(source, path, contents)
    return contents


def _check_overlap(members: Sequence[zipfile.ZipInfo], end: int, name: str) -> None:
    """Raise DataError when the bytes of a member are those of another one too, as in bombs (Fifield, WOOT 2019)."""
    ordered = sorted(members, key=lambda member: member.header_offset)
    starts = [*(member.header_offset for member in ordered[1:]), end]
    for member, following in zip(ordered, starts, strict=False):
        if member.header_offset + _LOCAL_HEADER + member.compress_size > following:
            raise DataError(f"{name}: the member {member.filename!r} overlaps what follows it; the archive is not safe")


class _Member(tarfile.TarInfo):
    """A tar's member whose headers are checked before they are read: tarfile reads them whole, of any size, and takes
    whatever is no header for the end of the archive."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str | None, errors: str) -> _Member:
        if not buf:
            raise tarfile.ReadError("its end-of-archive mark is missing: it was cut off")
        try:
            return cast(_Member, super().frombuf(buf, encoding, errors))  # type: ignore[arg-type]
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError) as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError(f"{error}: neither a member nor the end of the archive") from None

    def _proc_member(self, bundle: Any) -> Any:
        if self.type == tarfile.GNUTYPE_SPARSE:
            raise DataError(f"{bundle.name}: the member {self.name!r} is sparse; pack it without --sparse")
        extensions = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
        if self.type in (*extensions, tarfile.XGLTYPE):
            bundle.extensions += 1
            bundle.shared += self.size if self.type == tarfile.XGLTYPE else 0
            if bundle.extensions > _MAX_EXTENSIONS or max(self.size, bundle.shared) > _MAX_HEADER:
                raise DataError(
                    f"{bundle.name}: a header of {self.size} bytes before a member ({self.name!r}); the archive is not safe"
                )
        else:
            bundle.extensions = 0
        if self.size < 0:
            raise tarfile.ReadError("a member of negative size")
        return super()._proc_member(bundle)  # type: ignore[misc]

    def _proc_gnusparse_10(self, following: Any, pax_headers: Any, bundle: Any) -> None:
        raise DataError(f"{bundle.name}: the member {following.name!r} is sparse; pack it without --sparse")


class _Tar(tarfile.TarFile):
    tarinfo = _Member
    extensions = 0
    """Headers since the last member."""
    shared = 0
    """Bytes of the headers for all members."""


def _unpack_tar(file: BinaryIO, target: Path, name: str, packed: int) -> Contents:
    contents, last = Contents(), ""
    with _reading(name, last):
        # As a stream: a tar has no directory, and a list of a million members would fill the memory.
        bundle = _Tar.open(name, mode="r|", fileobj=file)
    with bundle:
        while True:
            with _reading(name, last):
                member = bundle.next()
                if member is None:
                    break
                bundle.members.clear()  # type: ignore[attr-defined]
                last = member.name
                if member.size < 0 or member.issparse():
                    raise DataError(f"{name}: the member {last!r} is sparse or of negative size; it cannot be read")
            path = _member_path(target, last, name, contents, folder=member.isdir())
            with _reading(name, last):
                if member.isdir():
                    path.mkdir(parents=True, exist_ok=True)
                    continue
                source = bundle.extractfile(member) if member.isreg() else None
                if source is None:
                    raise DataError(f"{name}: the member {last!r} is a link or a device; not safe")
                _check_growth(contents.size + member.size, packed, name)
                check_space(target, member.size, name)  # earlier members count against the limit
                with source:
                    _write(source, path, contents)
        with _reading(name, last):
            _read_padding(cast(BinaryIO, bundle.fileobj), contents.size, packed, name)
    return contents


def _read_padding(stream: BinaryIO, size: int, packed: int, name: str) -> None:
    """Read a tar to its end, where the checksum of a compressed one is. Raises ReadError for anything but zeros."""
    while block := stream.read(1 << 16):
        size += len(block)
        _check_growth(size, packed, name)
        if block.count(0) < len(block):
            raise tarfile.ReadError("something follows the end-of-archive mark")


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
