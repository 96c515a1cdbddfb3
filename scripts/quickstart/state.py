"""What the quickstart has already done, so that the next run continues from there. Knows stages by name only."""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class QuickstartState:
    """Results of finished stages in one JSON file, replaced whole at each write: a crash loses at most a stage.

    `settings` is what the results depend on: results of other settings are not reused.
    """

    path: Path
    settings: dict[str, Any]

    def run(self, stage: str, work: Callable[[], dict[str, Any]], say: Callable[[str], None]) -> dict[str, Any]:
        """Return the stage's result: stored by an earlier run if there is one, else from `work()`."""
        done = self._read()
        if stage in done:
            say(f"{stage}: done in an earlier run, reused (--fresh starts over)")
            return done[stage]
        say(f"{stage} ...")
        result = work()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        aside = self.path.with_suffix(".tmp")
        with aside.open("w") as file:
            json.dump({"settings": self._key(), "stages": {**self._read(), stage: result}}, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(self.path)
        return result

    def forget(self) -> None:
        """Start over: the next run of every stage does its work again."""
        self.path.unlink(missing_ok=True)

    def _key(self) -> str:
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()

    def _read(self) -> dict[str, dict[str, Any]]:
        try:
            content = json.loads(self.path.read_bytes())
        except (OSError, ValueError):
            return {}
        return content["stages"] if content.get("settings") == self._key() else {}
