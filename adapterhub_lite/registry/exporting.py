"""The way out: a version as a plain folder that PEFT and vLLM read without us."""

import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub_lite.errors import UsageError
from adapterhub_lite.registry.manifest import AdapterManifest
from adapterhub_lite.registry.transfer import adapter_files

if TYPE_CHECKING:
    from adapterhub_lite.registry.store import AdapterRegistry


def export_folder(registry: "AdapterRegistry", manifest: AdapterManifest, folder: Path) -> Path:
    """Write the files of a version into `folder`, which appears complete or not at all; returns it.

    Raises:
        UsageError: `folder` is there already and not empty.
        IntegrityError: a file of the version is missing here.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{str(folder)!r} is there already and not empty; export to a new folder.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        for name, path in adapter_files(registry, manifest).items():
            # copyfile, not copy: an export belongs to its owner, who may change it.
            shutil.copyfile(path, aside / name)
        aside.chmod(0o777 & ~_umask())
        aside.replace(folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return folder


def _umask() -> int:
    current = os.umask(0o022)
    os.umask(current)
    return current
