"""Quantised weights on disk, so that a base is quantised once: int4 takes minutes for a base of a few billion weights.

One file for a base, a precision and a layout of panels, with the sha256 of each weight in its header: what does not
match, or cannot be read, is quantised anew. The folder can be deleted at any time.
"""

import hashlib
import logging
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from adapterhub_lite.serving.model.compiled import packed_weights

logger = logging.getLogger(__name__)


class KeptWeights:
    """The panels of one base in one precision, by the names of the modules that are one product.

    `fingerprint` and `dtype` say which weights were quantised; a file of another layout of the same is deleted at `save`.
    """

    def __init__(self, home: Path, fingerprint: str, dtype: torch.dtype, precision: packed_weights.Precision) -> None:
        layout = hashlib.sha256(Path(packed_weights.__file__).read_bytes()).hexdigest()[:12]
        self._same_base = f"{fingerprint}-{str(dtype).removeprefix('torch.')}-{precision}-"
        self.file = home / "quantised" / f"{self._same_base}{layout}.safetensors"
        self._panels: dict[str, torch.Tensor] = {}
        self._to_write = False
        self._digests: dict[str, str] = {}
        with suppress(OSError, SafetensorError), safe_open(self.file, "pt") as stored:
            self._digests = stored.metadata() or {}

    def packed(self, name: str, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The panels (panels, bytes of each) of `name`: from the file, or made; remembered until `save`."""
        panels = self._read(name)
        if panels is None:
            panels, self._to_write = make(), True
        self._panels[name] = panels
        return panels

    def _read(self, name: str) -> torch.Tensor | None:
        if name not in self._digests:
            return None
        with suppress(OSError, SafetensorError), safe_open(self.file, "pt") as stored:
            panels: torch.Tensor = stored.get_tensor(name).clone()  # out of the mapped file
            if _digest(panels) == self._digests[name]:
                return panels
        logger.warning("%s is damaged: %s is quantised anew.", self.file, name)
        return None

    def save(self) -> None:
        """Write what had to be made, where anything had. A home that cannot be written costs the work again, and nothing else."""
        panels, self._panels = self._panels, {}
        if not self._to_write:
            return
        self._to_write = False
        with suppress(OSError, SafetensorError):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            for other in self.file.parent.glob(f"{self._same_base}*"):
                other.unlink()
            handle, name = tempfile.mkstemp(dir=self.file.parent, prefix=self._same_base)
            os.close(handle)
            written = Path(name)
            try:
                save_file(panels, written, {name: _digest(own) for name, own in panels.items()})
                written.replace(self.file)
            finally:
                written.unlink(missing_ok=True)


def _digest(panels: torch.Tensor) -> str:
    return hashlib.sha256(panels.numpy().data).hexdigest()
