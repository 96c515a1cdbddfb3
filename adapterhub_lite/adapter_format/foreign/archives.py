"""Zip and tar archives of an adapter: the few files of one folder are copied out, everything else is left alone.

Nothing is unpacked by the archive's own rules: no link is made, no name of a stranger becomes a path, and no more bytes
are written than the archive announces and an adapter may have.
"""

import gzip
import io
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from adapterhub_lite.errors import AdapterRejectedError

MAX_MEMBERS = 5000
# A LoRA is noise to a compressor; only padding shrinks.
MAX_RATIO = 100
MAX_LISTED_BYTES = 16 << 30
BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Member:
    """One plain file in an archive: its folder and name there, and how many bytes it announces."""

    folder: str
    name: str
    size: int
    packed: int
    open: Callable[[], IO[bytes]]


def is_archive(path: Path) -> bool:
    """Whether the file at `path` calls itself a zip or tar archive."""
    named = path.name.lower().endswith((".zip", ".tar", ".tar.gz", ".tgz"))
    return named and path.is_file() and not path.is_symlink()


def unpack(archive: Path, target: Path, sizes: dict[str, int]) -> tuple[str, list[str]]:
    """Copy the files named in `sizes` (name -> most bytes) of the one adapter folder in `archive` into `target`.

    Returns that folder's path in the archive, and what was left alone.

    Raises:
        AdapterRejectedError: it is no archive, holds no adapter or several, or more bytes than it may.
    """
    with _members(archive) as members:
        found = list(members)
        folder = _adapter_folder(archive, found)
        target.mkdir()
        left_alone = []
        for member in found:
            if member.folder == folder and member.name in sizes:
                _copy(archive, member, target / member.name, sizes[member.name])
            else:
                left_alone.append(ascii(f"{member.folder}/{member.name}".lstrip("/"))[1:-1][:100])
    return folder, sorted(left_alone)


def _adapter_folder(archive: Path, members: list[Member]) -> str:
    marks = ("adapter_config.json", "adapters.safetensors")
    folders = sorted({m.folder for m in members if m.name in marks}, key=lambda folder: (folder.count("/"), folder))
    if not folders:
        raise AdapterRejectedError(archive.name, ["it holds no adapter_config.json"])
    depth = [f for f in folders if f.count("/") == folders[0].count("/") and bool(f) == bool(folders[0])]
    if len(depth) > 1:
        listed = ", ".join(ascii(folder)[1:-1][:60] for folder in depth[:5])
        raise AdapterRejectedError(archive.name, [f"it holds {len(depth)} adapters ({listed}); give one of them"])
    return depth[0]


@contextmanager
def _members(archive: Path) -> Iterator[Iterator[Member]]:
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as file:
                yield _zipped(archive, file)
        else:
            with _bytes_of_tar(archive) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
                yield _tarred(archive, tar)
    except (
        zipfile.BadZipFile,
        tarfile.TarError,
        EOFError,
        OSError,
        ValueError,
        NotImplementedError,
        RuntimeError,
    ) as error:
        reason = f"it cannot be read as an archive: {type(error).__name__}: {error!s:.120}"
        raise AdapterRejectedError(archive.name, [reason]) from None


class _Measured(io.BufferedIOBase):
    """A stream that gives no more at once than a block: tarfile would read a header of gigabytes in one piece."""

    def __init__(self, stream: gzip.GzipFile | io.BufferedReader) -> None:
        self._stream = stream

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or size < 0 or size > BLOCK_BYTES:
            raise tarfile.ReadError(f"a header asks for {size} bytes at once")
        return self._stream.read(size)

    def seek(self, offset: int, whence: int = 0, /) -> int:
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        return self._stream.tell()

    def close(self) -> None:
        self._stream.close()
        super().close()


def _bytes_of_tar(archive: Path) -> _Measured:
    with archive.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    return _Measured(gzip.open(archive) if packed else archive.open("rb"))


def _zipped(archive: Path, file: zipfile.ZipFile) -> Iterator[Member]:
    infos = file.infolist()
    if len(infos) > MAX_MEMBERS:
        raise AdapterRejectedError(archive.name, [f"it has {len(infos)} entries, at most {MAX_MEMBERS} are read"])
    for info in infos:
        # The upper half of the external attributes is the Unix mode, where there is one: a link is no file.
        kind = (info.external_attr >> 16) & 0o170000
        where = _place(info.filename)
        if where is not None and not info.is_dir() and kind in (0, 0o100000) and not info.flag_bits & 1:
            yield Member(*where, info.file_size, info.compress_size, lambda info=info: file.open(info))  # type: ignore[misc]


def _tarred(archive: Path, tar: tarfile.TarFile) -> Iterator[Member]:
    announced = 0
    limit = min(MAX_LISTED_BYTES, MAX_RATIO * archive.stat().st_size + (1 << 20))
    for count, info in enumerate(tar):
        announced += max(info.size, 0)
        # The bytes of every entry are unpacked on the way to the next.
        if announced > limit:
            raise AdapterRejectedError(archive.name, [f"its entries announce more than {limit} bytes"])
        if count >= MAX_MEMBERS:
            raise AdapterRejectedError(archive.name, [f"it has more than {MAX_MEMBERS} entries"])
        where = _place(info.name)
        if where is not None and info.isreg() and not info.sparse:
            yield Member(*where, info.size, info.size, lambda info=info: _of_tar(tar, info))  # type: ignore[misc]


def _of_tar(tar: tarfile.TarFile, info: tarfile.TarInfo) -> IO[bytes]:
    file = tar.extractfile(info)
    assert file is not None, "a regular file"
    return file


def _place(name: str) -> tuple[str, str] | None:
    """Folder and name of an entry; None where it would lie outside of the archive."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name or not path.name:
        return None
    folder = path.parent.as_posix()
    return ("" if folder == "." else folder), path.name


def _copy(archive: Path, member: Member, target: Path, most: int) -> None:
    if member.size > most:
        raise AdapterRejectedError(archive.name, [f"{member.name} has {member.size} bytes, at most {most} are taken"])
    if member.size > BLOCK_BYTES and member.size > MAX_RATIO * max(member.packed, 1):
        raise AdapterRejectedError(archive.name, [f"{member.name} grows more than {MAX_RATIO} times when unpacked"])
    if target.exists():
        raise AdapterRejectedError(archive.name, [f"{member.name} is in it twice"])
    written = 0
    with member.open() as source, target.open("xb") as out:
        while block := source.read(BLOCK_BYTES):
            written += len(block)
            if written > member.size:
                break
            out.write(block)
    if written != member.size:
        raise AdapterRejectedError(archive.name, [f"{member.name} does not have the {member.size} bytes it announces"])
