"""Xet through the client's own on-disk scheme `local://`. Knows folders and hashes, no repositories.

The client's on-disk store is locked by one process for the whole life of that process, so every token names a folder of
its own: writers get an empty one, readers a copy of the index over the contents that the server took in.
"""

import hashlib
import shutil
import struct
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

INDEX = "global_dedup_lookup.redb"


def _hex(raw: bytes) -> str:
    # Xet prints and stores a hash as four little-endian 64-bit words.
    return "".join(raw[i : i + 8][::-1].hex() for i in range(0, 32, 8))


def shard_files(shard: bytes) -> Iterator[tuple[str, str]]:
    """Yield (sha256, Xet hash) of each file that a shard describes (format of xet-core's `mdb_shard`)."""
    position = 48
    while position + 48 <= len(shard) and shard[position : position + 32] != b"\xff" * 32:
        xet_hash = _hex(shard[position : position + 32])
        flags, segments = struct.unpack_from("<II", shard, position + 32)
        position += 48 + 48 * segments * (2 if flags & 0x80000000 else 1)
        if flags & 0x40000000:
            yield _hex(shard[position : position + 32]), xet_hash
            position += 48


class XetStore:
    """Xet contents under `root`. Needs the `hf_xet` package, which `huggingface_hub` brings along."""

    def __init__(self, root: Path) -> None:
        self.lanes, self.main = root / "lanes", root / "main"
        self._lock = threading.Lock()
        self._session: Any = None
        shutil.rmtree(self.lanes, ignore_errors=True)

    def _lane(self, source: Path | None) -> Path:
        lane = self.lanes / uuid.uuid4().hex
        (lane / "xet/xorbs").mkdir(parents=True)
        inner = source / "xet/xorbs" if source else None
        if inner and (inner / INDEX).exists():
            shutil.copyfile(inner / INDEX, lane / "xet/xorbs" / INDEX)
            for part in ("xorbs", "shards"):
                (lane / "xet/xorbs" / part).symlink_to(inner / part)
        return lane

    def open_lane(self, write: bool) -> str:
        """The `local://` address for one token."""
        with self._lock:
            return f"local://{self._lane(None if write else self.main)}"

    def take_in(self, sha256: str, target: Path) -> bool:
        """Write the content that some lane holds for `sha256` to `target`; False when none does."""
        import hf_xet

        with self._lock:
            for shard in sorted(self.lanes.glob("*/xet/xorbs/shards/*.mdb")):
                xet_hash = dict(shard_files(shard.read_bytes())).get(sha256)
                if xet_hash and not shard.parent.is_symlink():
                    break
            else:
                return False
            lane = self._lane(shard.parents[3])
            with hf_xet.XetSession().new_file_download_group(endpoint=f"local://{lane}") as group:
                group.start_download_file(hf_xet.XetFileInfo(xet_hash, None), str(target))
            with target.open("rb") as stream:
                if hashlib.file_digest(stream, "sha256").hexdigest() != sha256:
                    return False
            self.keep(sha256, target)
            return True

    def keep(self, sha256: str, content: Path) -> None:
        """Store a content so that readers can fetch it by Xet."""
        import hf_xet

        self._session = self._session or hf_xet.XetSession()
        with self._session.new_upload_commit(endpoint=f"local://{self.main}") as upload:
            handle = upload.start_upload_file(str(content), sha256=sha256)
        memo = self.main / "hashes" / sha256
        memo.parent.mkdir(parents=True, exist_ok=True)
        memo.write_text(handle.result().xet_info.hash)

    def size(self) -> int:
        """Bytes of everything stored here."""
        return sum(path.stat().st_size for path in self.main.rglob("*") if path.is_file())

    def hash_of(self, sha256: str) -> str:
        """The Xet hash of a content that was taken in, "" for any other."""
        memo = self.main / "hashes" / sha256
        return memo.read_text() if memo.exists() else ""
