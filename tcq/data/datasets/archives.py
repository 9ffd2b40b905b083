"""Reading published archives safely: members by name into memory.

Nothing is unpickled, and no path is extracted.
"""

import hashlib
import lzma
import os
import tarfile
import zipfile
import zlib
from collections.abc import Collection
from pathlib import Path

MAX_MEMBER = 64 * 2**20  # bytes; the largest members read are CIFAR-10's batches of 30,730,000


class ArchiveError(ValueError):
    """A file of the dataset is missing, corrupted, or not the published one.

    The message says what was expected.
    """


def find(folder: str | os.PathLike[str], name: str, *, size: int | None = None) -> Path:
    """The file `name` in the folder.

    Raises ArchiveError if it is missing or does not have the published size.
    """
    path = Path(folder) / name
    if not path.is_file():
        raise ArchiveError(f"{str(path)!r} not found")
    actual = path.stat().st_size
    if size is not None and actual != size:
        raise ArchiveError(
            f"{str(path)!r} has {actual:,} bytes, the published file has {size:,}: the download may be incomplete"
        )
    return path


def verify(path: Path, algorithm: str, digest: str) -> None:
    """Raises ArchiveError unless the file has the given checksum."""
    with open(path, "rb") as file:
        actual = hashlib.file_digest(file, algorithm).hexdigest()
    if actual != digest:
        raise ArchiveError(
            f"{str(path)!r} has {algorithm} {actual}, the published file has {digest}: download it again"
        )


def open_zip(path: Path) -> zipfile.ZipFile:
    """Opens a zip file for `read_member`.

    Raises ArchiveError if it is truncated or not a zip file.
    """
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise ArchiveError(
            f"{str(path)!r} is truncated or not a zip file ({error}): the download may be incomplete"
        ) from None


def read_member(archive: zipfile.ZipFile, name: str) -> bytes:
    """One member, its checksum verified.

    Raises ArchiveError if it is missing, corrupted or above MAX_MEMBER bytes.
    """
    where = f"{str(archive.filename)!r}, member {name!r}"
    try:
        info = archive.getinfo(name)
    except KeyError:
        raise ArchiveError(f"{where}: not found") from None
    try:
        with archive.open(info) as file:
            data = file.read(MAX_MEMBER + 1)  # the size in the header may be false
    except (
        zipfile.BadZipFile,
        zlib.error,
        lzma.LZMAError,
        EOFError,
        OSError,
        RuntimeError,
        NotImplementedError,
    ) as error:
        raise ArchiveError(f"{where}: cannot be read: {error}") from None
    if len(data) > MAX_MEMBER:
        raise ArchiveError(f"{where}: above the limit of {MAX_MEMBER:,} bytes")
    return data


def read_tar(path: Path, names: Collection[str]) -> dict[str, bytes]:
    """Regular members of a tar.gz file.

    Raises ArchiveError if one is missing, corrupted or above MAX_MEMBER bytes.
    """
    members: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r|gz") as archive:
            for member in archive:
                if member.name not in names or not member.isreg():
                    continue
                if member.size > MAX_MEMBER:
                    raise ArchiveError(
                        f"{str(path)!r}, member {member.name!r}: above the limit of {MAX_MEMBER:,} bytes"
                    )
                file = archive.extractfile(member)
                assert file is not None
                members[member.name] = file.read()
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise ArchiveError(f"{str(path)!r} is truncated or not a tar.gz file ({error})") from None
    missing = [name for name in names if name not in members]
    if missing:
        raise ArchiveError(f"{str(path)!r} lacks {', '.join(missing)}")
    return members


def read_lines(path: Path) -> list[str]:
    """The lines of a text file without trailing blank ones.

    Raises ArchiveError if it is missing or not text.
    """
    try:
        return path.read_text(encoding="utf-8-sig").rstrip().splitlines()
    except UnicodeDecodeError:
        raise ArchiveError(f"{str(path)!r} is not a text file") from None
    except OSError as error:
        raise ArchiveError(f"{str(path)!r} cannot be read: {error.strerror}") from None
