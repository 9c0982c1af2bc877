"""Archives that are split, damaged or hostile."""

from __future__ import annotations

import gzip
import io
import random
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from source_entries import MEMBERS, make_tar, make_zip, tree

from mmpipe.errors import DataError
from mmpipe.sources.transfer import progress
from mmpipe.sources.transfer.archives import DamagedArchive, unpack


@pytest.mark.parametrize(
    "make",
    [
        make_zip,
        lambda path, members: make_zip(path, members, zipfile.ZIP_DEFLATED),
        make_tar,
        lambda path, members: make_tar(path, members, "w:gz"),
    ],
    ids=["stored zip", "deflated zip", "tar", "tar.gz"],
)
def test_unpacks_by_content_not_by_name(make: Callable[..., Path], tmp_path: Path) -> None:
    contents = unpack([make(tmp_path / "archive", MEMBERS)], tmp_path / "out")
    assert tree(tmp_path / "out") == MEMBERS
    assert (contents.files, contents.size) == (3, sum(map(len, MEMBERS.values())))


@pytest.mark.parametrize("make", [make_zip, make_tar], ids=["zip", "tar"])
@pytest.mark.parametrize("size", [1, 1000, 4096, 9_999])
def test_reads_pieces_as_one(make: Callable[..., Path], size: int, tmp_path: Path) -> None:
    content = make(tmp_path / "whole", MEMBERS).read_bytes()
    if size == 1:
        content, size = make(tmp_path / "small", {"list.json": b"[]"}).read_bytes(), 50
    pieces = []
    for number, start in enumerate(range(0, len(content), size)):
        pieces.append(tmp_path / f"images.zip.{number:03}")
        pieces[-1].write_bytes(content[start : start + size])
    unpack(pieces, tmp_path / "out")
    assert tree(tmp_path / "out")["list.json"] == b"[]"


def test_a_tar_that_ends_with_a_zip_is_a_tar(tmp_path: Path) -> None:
    inner = make_zip(tmp_path / "inner.zip", {"x": b"x"}).read_bytes()
    unpack([make_tar(tmp_path / "outer.tar", {"inner.zip": inner})], tmp_path / "out")
    assert tree(tmp_path / "out") == {"inner.zip": inner}


def test_adds_to_what_is_there(tmp_path: Path) -> None:
    unpack([make_zip(tmp_path / "one", {"vg/1.jpg": b"1"})], tmp_path / "out")
    unpack([make_zip(tmp_path / "two", {"vg/2.jpg": b"2"})], tmp_path / "out")
    assert tree(tmp_path / "out") == {"vg/1.jpg": b"1", "vg/2.jpg": b"2"}


def test_flat_drops_the_folders(tmp_path: Path) -> None:
    unpack([make_zip(tmp_path / "one", MEMBERS)], tmp_path / "out", flat=True)
    assert set(tree(tmp_path / "out")) == {"a.jpg", "b.jpg", "list.json"}
    assert not [path for path in (tmp_path / "out").iterdir() if path.is_dir()]


def test_flat_refuses_two_of_one_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"two members are called 'a.jpg'"):
        unpack([make_zip(tmp_path / "one", {"x/a.jpg": b"1", "y/a.jpg": b"2"})], tmp_path / "out", flat=True)


@pytest.mark.parametrize("make", [make_zip, make_tar], ids=["zip", "tar"])
@pytest.mark.parametrize("name", ["/etc/evil", "../evil", "a/../../evil", "..\\evil"])
def test_refuses_names_that_lead_out(make: Callable[..., Path], name: str, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    archive = make(tmp_path / "archive", {"good.txt": b"good", name: b"evil"})
    with pytest.raises(DataError, match="leads out of the folder"):
        unpack([archive], tmp_path / "here" / "out")
    assert not list(tmp_path.rglob("evil"))
    assert not list(tmp_path.rglob("good.txt")), "nothing of an unsafe archive may be used"


@pytest.mark.parametrize("mode", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR, stat.S_IFBLK])
def test_refuses_links_and_devices_in_a_zip(mode: int, tmp_path: Path) -> None:
    member = zipfile.ZipInfo("link")
    member.external_attr = (mode | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as bundle:
        bundle.writestr(member, "/etc/passwd")
    with pytest.raises(DataError, match="a link or a device"):
        unpack([tmp_path / "a.zip"], tmp_path / "out")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE])
def test_refuses_links_and_devices_in_a_tar(kind: bytes, tmp_path: Path) -> None:
    member = tarfile.TarInfo("link")
    member.type, member.linkname = kind, "/etc/passwd"
    with tarfile.open(tmp_path / "a.tar", "w") as bundle:
        bundle.addfile(member)
    with pytest.raises(DataError, match="a link or a device"):
        unpack([tmp_path / "a.tar"], tmp_path / "out")


@pytest.mark.parametrize(
    "make",
    [
        lambda path, members: make_zip(path, members, zipfile.ZIP_DEFLATED),
        lambda path, members: make_tar(path, members, "w:gz"),
    ],
    ids=["zip", "tar.gz"],
)
def test_refuses_bombs(make: Callable[..., Path], tmp_path: Path) -> None:
    bomb = make(tmp_path / "bomb", {"zeros": bytes(80 * 1024**2)})
    assert bomb.stat().st_size < 200_000
    with pytest.raises(DataError, match="would grow to 83886080; the archive is not safe"):
        unpack([bomb], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_refuses_encrypted_members(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "a.zip", {"secret": b"secret"})
    content = bytearray(archive.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(signature) + offset] |= 1
    archive.write_bytes(content)
    with pytest.raises(DataError, match="encrypted"):
        unpack([archive], tmp_path / "out")


@pytest.mark.parametrize("make", [make_zip, make_tar], ids=["zip", "tar"])
def test_a_truncated_archive_is_damaged(make: Callable[..., Path], tmp_path: Path) -> None:
    archive = make(tmp_path / "archive", MEMBERS)
    archive.write_bytes(archive.read_bytes()[:3000])
    with pytest.raises(DamagedArchive, match="archive is damaged"):
        unpack([archive], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "a.zip", MEMBERS)
    content = bytearray(archive.read_bytes())
    content[content.index(b"aaaa") + 100] ^= 1
    archive.write_bytes(content)
    with pytest.raises(DamagedArchive, match="CRC"):
        unpack([archive], tmp_path / "out")


@pytest.mark.parametrize("content", [b"", b"plain text", b"\x00" * 2000])
def test_what_is_no_archive_is_damaged(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(DamagedArchive, match=r"a\.zip"):
        unpack([tmp_path / "a.zip"], tmp_path / "out")


def test_recognises_the_page_a_server_sends_instead(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"<!doctype html><title>Quota exceeded</title>")
    with pytest.raises(DamagedArchive, match="a web page, not an archive"):
        unpack([tmp_path / "a.zip"], tmp_path / "out")


def test_a_name_that_is_both_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="both a file and a folder"):
        unpack([make_tar(tmp_path / "a.tar", {"a": b"1", "a/b": b"2"})], tmp_path / "out")


def test_looks_at_the_disk_before_filling_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_MARGIN", 10**18)
    with pytest.raises(DataError, match="are free"):
        unpack([make_zip(tmp_path / "a.zip", MEMBERS)], tmp_path / "out")


@pytest.mark.parametrize("make", [make_zip, make_tar], ids=["zip", "tar"])
@pytest.mark.parametrize("room", [1.2, 0.8])
def test_what_is_unpacked_already_is_not_asked_for_again(
    make: Callable[..., Path], room: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a disk with ``room`` times the contents: more than half of it, so that counting them twice would not fit."""
    members = {f"{n}.jpg": bytes(10_000) for n in range(20)}
    total, out = sum(map(len, members.values())), tmp_path / "out"

    def usage(folder: Path) -> SimpleNamespace:
        taken = sum(path.stat().st_size for path in tmp_path.rglob("*.jpg"))
        return SimpleNamespace(free=int(room * total) - taken)

    monkeypatch.setattr(progress, "_MARGIN", 0)
    monkeypatch.setattr(shutil, "disk_usage", usage)
    archive = make(tmp_path / "archive", members)
    if room > 1:
        assert unpack([archive], out).size == total
    else:
        with pytest.raises(DataError, match="are free"):
            unpack([archive], out)
        assert not out.exists()


def compressed_tar(kind: str) -> Callable[..., Path]:
    return lambda path, members: make_tar(path, members, f"w:{kind}")


MAKERS = {"zip": make_zip, "tar": make_tar, **{f"tar.{kind}": compressed_tar(kind) for kind in ("gz", "bz2", "xz")}}


@pytest.mark.parametrize("kind", MAKERS)
def test_damage_is_refused_or_does_no_harm(kind: str, tmp_path: Path) -> None:
    """A tar without compression has checksums of its headers alone."""
    chance = random.Random(kind)
    archive = MAKERS[kind](tmp_path / "a", MEMBERS)
    whole = archive.read_bytes()
    refused = 0
    for number in range(80):
        damaged = bytearray(whole)
        if number % 4:
            place = chance.randrange(len(whole))
            if kind == "tar":
                place -= place % 512 - chance.randrange(512) if number % 8 == 1 else place % 512
            damaged[place] ^= 1 << chance.randrange(8)
        else:
            damaged = damaged[: chance.randrange(len(whole))]
        archive.write_bytes(damaged)
        try:
            unpack([archive], tmp_path / "out")
        except DataError:
            refused += 1
        else:
            assert kind == "tar" or set(tree(tmp_path / "out").values()) == set(MEMBERS.values())
            shutil.rmtree(tmp_path / "out")
    assert refused > 20


def test_a_flipped_bit_in_a_compressed_tar_is_found(tmp_path: Path) -> None:
    content = random.Random(0).randbytes(3000)
    archive = make_tar(tmp_path / "a", {"1.jpg": content, "2.jpg": content})
    damaged = bytearray(gzip.compress(archive.read_bytes(), compresslevel=0))
    damaged[damaged.index(content[:50]) + 60] ^= 4
    archive.write_bytes(damaged)
    with pytest.raises(DamagedArchive, match=r"damaged.*CRC"):
        unpack([archive], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["tar", "tar.gz"])
def test_a_tar_that_was_cut_between_its_members_is_damaged(kind: str, tmp_path: Path) -> None:
    cut = make_tar(tmp_path / "a", MEMBERS).read_bytes()[:5632]  # the first member of three
    (tmp_path / "a").write_bytes(gzip.compress(cut) if kind == "tar.gz" else cut)
    with pytest.raises(DamagedArchive, match=r"at the member 'images/a.jpg'.*end-of-archive mark is missing"):
        unpack([tmp_path / "a"], tmp_path / "out")


@pytest.mark.parametrize("tail", [b"more", make_tar], ids=["garbage", "another tar"])
def test_what_follows_the_end_of_a_tar_is_not_dropped_in_silence(
    tail: bytes | Callable[..., Path], tmp_path: Path
) -> None:
    whole = make_tar(tmp_path / "a", MEMBERS).read_bytes()
    more = tail if isinstance(tail, bytes) else tail(tmp_path / "b", {"late.jpg": b"1"}).read_bytes()
    (tmp_path / "a").write_bytes(whole + more)
    with pytest.raises(DamagedArchive, match="something follows the end-of-archive mark"):
        unpack([tmp_path / "a"], tmp_path / "out")


def header(kind: bytes, size: int, name: str = "././@LongLink") -> bytes:
    member = tarfile.TarInfo(name)
    member.type, member.size = kind, size
    return member.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    "kind",
    [tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE],
)
def test_a_header_is_not_read_before_its_size_is_checked(kind: bytes, tmp_path: Path) -> None:
    packed = zlib.compressobj(wbits=31)
    content = packed.compress(header(kind, 2_500_000_000)) + packed.compress(bytes(50_000_000)) + packed.flush()
    (tmp_path / "a.tar.gz").write_bytes(content)
    with pytest.raises(DataError, match="a header of 2500000000 bytes"):
        unpack([tmp_path / "a.tar.gz"], tmp_path / "out")


def test_endless_headers_are_refused(tmp_path: Path) -> None:
    one = header(tarfile.GNUTYPE_LONGNAME, 5) + b"name".ljust(512, b"\0")
    (tmp_path / "a").write_bytes(one * 3000)
    with pytest.raises(DataError, match="a header of 5 bytes before a member"):
        unpack([tmp_path / "a"], tmp_path / "out")


def test_sparse_members_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(header(tarfile.GNUTYPE_SPARSE, 512, "holes.bin") + bytes(2048))
    with pytest.raises(DataError, match=r"'holes.bin' is sparse"):
        unpack([tmp_path / "a"], tmp_path / "out")


def twice(make: Callable[..., Path], first: str, second: str) -> Callable[[Path], Path]:
    """An archive of two members, of one name if need be."""

    def made(path: Path) -> Path:
        if make is make_tar:
            with tarfile.open(path, "w") as bundle:
                for name in (first, second):
                    bundle.addfile(tarfile.TarInfo(name), io.BytesIO())
            return path
        with zipfile.ZipFile(path, "w") as bundle:
            for name in (first, second):
                bundle.writestr(zipfile.ZipInfo(name), b"")
        return path

    return made


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("make", [make_zip, make_tar], ids=["zip", "tar"])
@pytest.mark.parametrize("second", ["a/b.jpg", "./a/b.jpg", "a\\b.jpg", "A/B.jpg"])
def test_two_members_of_one_name_are_refused(make: Callable[..., Path], second: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="two members are called"):
        unpack([twice(make, "a/b.jpg", second)(tmp_path / "a")], tmp_path / "out")


@pytest.mark.parametrize("make", [make_zip, make_tar], ids=["zip", "tar"])
@pytest.mark.parametrize("name", ["a\x1b[2Jb", "a\nb", "a\u202egpj.exe", "a\x9bb"])
def test_names_with_control_characters_are_refused(make: Callable[..., Path], name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has control characters") as error:
        unpack([make(tmp_path / "archive", {"good.txt": b"good", name: b"evil"})], tmp_path / "out")
    assert "\x1b" not in str(error.value)
    assert "\n" not in str(error.value)


def test_names_in_other_encodings_are_unpacked(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a", "w", encoding="latin-1", format=tarfile.GNU_FORMAT) as bundle:
        bundle.addfile(tarfile.TarInfo("Bär.jpg"), io.BytesIO())
    assert unpack([tmp_path / "a"], tmp_path / "out").files == 1


def test_overlapping_members_of_a_zip_are_refused(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "a.zip", {"1": b"x" * 100, "2": b"x" * 100})
    content = bytearray(archive.read_bytes())
    second = content.rindex(b"PK\x01\x02")
    content[second + 42 : second + 46] = bytes(4)  # the second entry points to the first member
    archive.write_bytes(content)
    with pytest.raises(DataError, match=r"the member '.' overlaps"):
        unpack([archive], tmp_path / "out")


def test_an_unknown_compression_is_not_called_damage(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "a.zip", {"deflated64.jpg": b"x"})
    content = bytearray(archive.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
        content[content.index(signature) + offset] = 9
    archive.write_bytes(content)
    with pytest.raises(DataError, match=r"'deflated64.jpg' is packed in a way that cannot be read") as error:
        unpack([archive], tmp_path / "out")
    assert not isinstance(error.value, DamagedArchive)


@pytest.mark.parametrize("make", [make_zip, make_tar], ids=["zip", "tar"])
def test_a_name_too_long_for_this_disk_is_named(make: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'xxx.*cannot be a file here"):
        unpack([make(tmp_path / "a", {"x" * 300: b"1"})], tmp_path / "out")
