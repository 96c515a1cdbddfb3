"""Who answers: the bare base, one adapter, or a blend. Knows the names, not the page.

The page holds a task as one line of text in the engine's own notation, so that a restarted server can parse it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adapterhub_app.display.escape import one_line
from adapterhub_lite.errors import AdapterHubError, ReferenceSyntaxError
from adapterhub_lite.registry import AdapterManifest, AdapterReference, AdapterRegistry

# Not a valid adapter name, so that an adapter called "base" can still be picked.
BASE = "(base)"


@dataclass(frozen=True)
class Task:
    """Who answers: `parts` holds (reference, weight) pairs; none for the base, one of weight 1 for an adapter."""

    parts: tuple[tuple[str, float], ...] = ()

    @classmethod
    def parse(cls, text: str | None) -> "Task":
        """Read `(base)`, an adapter reference, or a blend such as `sql:3*0.7+event@prod*0.3`.

        Raises:
            ReferenceSyntaxError: anything else.
        """
        text = (text or BASE).strip()
        if text == BASE:
            return cls()
        return cls(tuple(parse_part(piece.strip()) for piece in text.split("+")))

    @property
    def is_base(self) -> bool:
        """Whether the bare base answers."""
        return not self.parts

    @property
    def is_blend(self) -> bool:
        """Whether several adapters answer together, or one at another weight than 1."""
        return len(self.parts) > 1 or any(weight != 1.0 for _, weight in self.parts)

    @property
    def name(self) -> str:
        """The displayed name: `base`, the reference, or `0.7×sql + 0.3×event`."""
        if self.is_base:
            return "base"
        if not self.is_blend:
            return self.parts[0][0]
        return " + ".join(f"{weight:g}×{reference}" for reference, weight in self.parts)

    def __str__(self) -> str:
        if self.is_base:
            return BASE
        return "+".join(reference if weight == 1.0 else f"{reference}*{weight:g}" for reference, weight in self.parts)

    def pinned(self, registry: AdapterRegistry) -> str | None:
        """The engine's notation, with each reference resolved to `name:version` now; None for the base.

        Raises:
            UnknownNameError: a part names no adapter.
        """
        if self.is_base:
            return None
        fixed = tuple((registry.resolve(reference).reference, weight) for reference, weight in self.parts)
        return str(Task(fixed))


def task_choices(registry: AdapterRegistry, base_name: str, served: str | None = None) -> list[tuple[str, str]]:
    """Every task as (label, value): the base, then the adapters, as `adapter_choices` has them."""
    return [(f"base · {base_name}", BASE), *adapter_choices(registry, served)]


def adapter_choices(registry: AdapterRegistry, served: str | None = None) -> list[tuple[str, str]]:
    """Every adapter as (label, value): its newest version, then its aliases; `served` leaves out those of other bases."""
    choices = []
    for manifest in newest_versions(registry):
        if fits(manifest, served):
            choices.append((f"{manifest.name} · v{manifest.version}", manifest.name))
        for alias, version in sorted(registry.aliases(manifest.name).items()):
            if version == manifest.version or served is None:
                fitting = fits(manifest, served)
            else:
                fitting = fits(registry.resolve(f"{manifest.name}:{version}"), served)
            if fitting:
                choices.append((f"{manifest.name}@{alias} · v{version}", f"{manifest.name}@{alias}"))
    return choices


def fits(manifest: AdapterManifest, served: str | None) -> bool:
    """Whether an adapter was made for the base with the fingerprint `served`; None: whichever it is."""
    return served is None or manifest.base.fingerprint == served


def newest_versions(registry: AdapterRegistry) -> list[AdapterManifest]:
    """The newest version of every adapter, by name."""
    newest: dict[str, AdapterManifest] = {}
    for manifest in registry.list():
        if manifest.name not in newest or newest[manifest.name].version < manifest.version:
            newest[manifest.name] = manifest
    return [newest[name] for name in sorted(newest)]


def manifests_of(task: Task, registry: AdapterRegistry) -> list[AdapterManifest]:
    """The manifests that a task refers to now; empty for the base.

    Raises:
        UnknownNameError: a part names no adapter.
    """
    return [registry.resolve(reference) for reference, _ in task.parts]


def describe_task(text: str | None, registry: AdapterRegistry, served: str | None = None) -> str:
    """Describe a task in one line: its purpose, version and short digest; or why it cannot answer.

    `served` is the fingerprint of the base that is served here, where that is to be compared.
    """
    try:
        task = Task.parse(text)
        manifests = manifests_of(task, registry)
    except AdapterHubError as error:
        return str(error)
    if not manifests:
        return "The frozen base model, no adapter."
    for other in manifests:
        if not fits(other, served):
            made_for = (
                f"{other.reference} was made for the base {other.base.id} ({short_digest(other.base.fingerprint)})"
            )
            return f"{made_for}, and this page serves another one: it cannot answer here."
    if task.is_blend:
        return "Blend of " + ", ".join(f"{m.reference} ({short_digest(m.digest)})" for m in manifests) + "."
    manifest = manifests[0]
    about = one_line(manifest.task or "No description in its manifest.")
    known = f"{about} · {manifest.reference} · {short_digest(manifest.digest)} · rank {manifest.lora.rank}"
    return known if manifest.answer_schema is None else f"{known} · answers {describe_form(manifest.answer_schema)}"


def describe_form(schema: Mapping[str, Any]) -> str:
    """The form that a JSON schema gives to answers, in one line: `{name: string, age: integer}`, the first 12 fields."""
    properties = schema.get("properties")
    if not isinstance(properties, Mapping) or not properties:
        return f"JSON ({one_line(str(schema.get('title') or schema.get('type') or 'after its schema'))})"
    fields = [
        f"{name}: {field.get('type', 'any') if isinstance(field, Mapping) else 'any'}"
        for name, field in list(properties.items())[:12]
    ]
    return one_line("{" + ", ".join(fields) + (", ..." if len(properties) > 12 else "") + "}")


def task_examples(text: str | None, registry: AdapterRegistry, limit: int = 4) -> list[str]:
    """Example questions of a task, taken in turn from the manifest of each adapter; none if a part does not resolve."""
    try:
        each = [manifest.examples for manifest in manifests_of(Task.parse(text), registry)]
    except AdapterHubError:
        return []
    longest = max((len(examples) for examples in each), default=0)
    mixed = [examples[row] for row in range(longest) for examples in each if row < len(examples)]
    return mixed[:limit]


def short_digest(digest: str) -> str:
    """The first 8 hex digits of a digest, with or without its `sha256:` mark."""
    return digest.removeprefix("sha256:")[:8]


def parse_part(piece: str) -> tuple[str, float]:
    """Parse one part of a blend, `reference` or `reference*weight`.

    Raises:
        ReferenceSyntaxError: the reference or the weight is malformed.
    """
    reference, star, weight = piece.partition("*")
    try:
        factor = float(weight) if star else 1.0
    except ValueError:
        factor = math.nan
    if not math.isfinite(factor):
        raise ReferenceSyntaxError(
            f"The weight in {piece!r:.80} is not a number; expected a blend such as sql*0.7+event*0.3."
        )
    return str(AdapterReference.parse(reference.strip())), factor
