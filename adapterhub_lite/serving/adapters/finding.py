"""What an adapter argument names at this moment: references resolved, splits and all, before anything is loaded.

Knows references and files; nothing of memory, slots or where the answer is computed.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapterhub_lite.adapter_format.added_tokens import AddedTokens
from adapterhub_lite.bases.chat.template import TEMPLATE_FILE
from adapterhub_lite.errors import BaseMismatchError, IntegrityError
from adapterhub_lite.serving.adapters.sources import AdapterFiles, AdapterSource
from adapterhub_lite.serving.adapters.split import Splits, WeightedReference, parse_blend


@dataclass(frozen=True)
class FoundAdapters:
    """What an adapter argument names at one moment: the adapters of a blend with their weights, or none."""

    files: tuple[AdapterFiles, ...] = ()
    pieces: tuple[WeightedReference, ...] = ()
    seconds: float = 0.0

    def receipt(self) -> tuple[str, str]:
        """The names and the digests, joined with their weights as a receipt has them; for at least one adapter."""
        alone = len(self.pieces) == 1 and self.pieces[0].weight == 1.0
        factors = ["" if alone else piece.factor for piece in self.pieces]
        own = list(zip(self.files, factors, strict=True))
        return "+".join(f.name + factor for f, factor in own), "+".join(f.digest + factor for f, factor in own)

    def end_tokens(self) -> frozenset[int] | None:
        """The ids that end an answer of any of them; None are the base's alone."""
        own = [files.asked.end_tokens for files in self.files]
        return frozenset().union(*(ends for ends in own if ends is not None)) if own and all(own) else None

    def prefill(self) -> str:
        """What the template writes when it asks and none of their answers began with; "" where they differ."""
        own = {files.asked.prefill for files in self.files}
        return own.pop() if len(own) == 1 else ""

    def answer_schema(self) -> Mapping[str, Any] | None:
        """The schema that all of them answer after; None where they differ."""
        own = [files.asked.answer_schema for files in self.files]
        return own[0] if own and all(schema == own[0] for schema in own) else None

    def added_tokens(self) -> AddedTokens | None:
        """The tokens that one brings along; it is no part of a blend."""
        return next((files.asked.added for files in self.files if files.asked.added is not None), None)

    def template(self, of_base: str) -> str | None:
        """The chat template to ask with, None is the base's, which has the digest `of_base`.

        Raises:
            BaseMismatchError: one was trained with a template that is not here, or two with different ones.
        """
        others = [files for files in self.files if files.asked.template_digest not in (None, of_base)]
        if not others:
            return None
        if len({files.asked.template_digest for files in self.files}) > 1:
            raise BaseMismatchError(
                f"{' and '.join(files.name for files in self.files)} were trained with different chat templates, so no "
                "chat can be put to both. Ask with a prompt, laid out by hand."
            )
        if others[0].asked.template is None:
            raise BaseMismatchError(
                f"{others[0].name} was trained with another chat template than this base has, and does not bring it "
                f"along ({TEMPLATE_FILE}), so a chat would reach it in words it never saw. Ask with a prompt, or add "
                "the template it was trained with to its folder."
            )
        return others[0].asked.template


class AdapterFinder:
    """Adapters by reference, for one base. Thread-safe. `damaged` counts files that were not the recorded bytes."""

    def __init__(self, source: AdapterSource, base_fingerprint: str) -> None:
        self.source = source
        self.splits = Splits()
        self._base_fingerprint = base_fingerprint
        self.damaged = 0

    def find(self, adapter: str | Path | None) -> FoundAdapters:
        """Resolve an adapter argument, splits and all, without loading anything."""
        if adapter is None:
            return FoundAdapters()
        started = time.perf_counter()
        blend = parse_blend(adapter)
        files = tuple(self.locate(self.splits.choose(piece.reference)) for piece in blend)
        return FoundAdapters(files, tuple(blend), time.perf_counter() - started)

    def locate(self, reference: str | Path) -> AdapterFiles:
        """Return the files that a reference names now.

        Raises:
            BaseMismatchError: they were made for another base.
        """
        with self.counting_damage():
            files = self.source.locate(reference)
        if files.base_fingerprint not in (None, self._base_fingerprint):
            raise BaseMismatchError(
                f"{files.name} was made for the base {str(files.base_fingerprint)[:12]}, this engine serves "
                f"{self._base_fingerprint[:12]}. Serve it on its own base, or train it for this one."
            )
        return files

    @contextmanager
    def counting_damage(self) -> Iterator[None]:
        """Count an IntegrityError that passes through."""
        try:
            yield
        except IntegrityError:
            self.damaged += 1
            raise
