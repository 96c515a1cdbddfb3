"""What the machine says no to, in words: disk full, read-only folder, store locked. Wraps OS and SQLite errors."""

import errno
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adapterhub_lite.errors import RegistryError, ResourceError

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
FORBIDDEN = {errno.EROFS, errno.EACCES, errno.EPERM}


@contextmanager
def machine_errors(doing: str, home: Path) -> Iterator[None]:
    """Turn errors of the machine inside the block into one sentence about `doing` (as in "add 'sql'").

    Raises:
        ResourceError: the disk is full, the folder read-only, or it cannot be read.
        RegistryError: another process held the store for longer than the time-out, or the database is damaged.
    """
    try:
        yield
    except OSError as error:
        raise ResourceError(_os_text(error, doing, home)) from error
    except sqlite3.Error as error:
        text = str(error)
        if "full" in text:
            raise ResourceError(_os_text(OSError(errno.ENOSPC, ""), doing, home)) from error
        if "readonly" in text or "unable to open" in text:
            raise ResourceError(_os_text(OSError(errno.EROFS, ""), doing, home)) from error
        if "disk I/O" in text:
            raise ResourceError(f"Could not {doing}: the disk under {home} fails or is full ({text}).") from error
        if "locked" in text or "busy" in text:
            raise RegistryError(
                f"Could not {doing}: another process holds the registry in {home}. Try again."
            ) from error
        raise RegistryError(
            f"Could not {doing}: the database in {home} is damaged ({text}). Run `adapterhub-lite doctor --rebuild`."
        ) from error


def _os_text(error: OSError, doing: str, home: Path) -> str:
    if error.errno in FULL:
        return f"Could not {doing}: the disk under {home} is full. Nothing was changed; free some space and try again."
    if error.errno in FORBIDDEN:
        return f"Could not {doing}: {home} cannot be written to. Set ADAPTERHUB_HOME to a folder of your own."
    where = f" ({Path(str(error.filename)).name})" if error.filename else ""
    return f"Could not {doing} in {home}: {error.strerror or error}{where}."
