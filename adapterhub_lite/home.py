"""Where data is stored on this machine. Knows folder names, not what is in them."""

import os
from pathlib import Path

HOME_VARIABLE = "ADAPTERHUB_HOME"


def adapterhub_home(home: str | Path | None = None) -> Path:
    """Return the folder that contains objects/, registry.db, bases/ and runs/; it may not exist yet.

    `home` takes precedence, then `$ADAPTERHUB_HOME`, then `~/.adapterhub-lite`.
    """
    chosen = home or os.environ.get(HOME_VARIABLE) or Path.home() / ".adapterhub-lite"
    return Path(chosen).expanduser().resolve()
