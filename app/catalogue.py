"""What the Registry tab shows: rows, and everything about one version. Plain text and numbers out, never HTML."""

from dataclasses import dataclass

from adapterhub_lite.registry import AdapterManifest, AdapterRegistry
from app.escape import one_line

COLUMNS = ("Adapter", "Version", "Aliases", "Task", "Metric", "Base", "Adapter score", "Rank", "Made")


@dataclass(frozen=True)
class Row:
    """One line of the table, as text and numbers."""

    reference: str
    cells: tuple[str | int | float | None, ...]


def catalogue_rows(registry: AdapterRegistry, search: str = "") -> list[Row]:
    """Every version whose name, task, tags, aliases, digest or base hold every word searched for."""
    words = search.lower().split()
    aliases: dict[str, dict[str, int]] = {}
    rows = []
    for manifest in registry.list():
        names = aliases.setdefault(manifest.name, registry.aliases(manifest.name))
        own = ", ".join(alias for alias, version in names.items() if version == manifest.version)
        held = " ".join(
            [manifest.name, own, manifest.task or "", manifest.digest, manifest.base.id, *manifest.tags]
        ).lower()
        if all(word in held for word in words):
            rows.append(Row(manifest.reference, _cells(manifest, own)))
    return rows


def _cells(manifest: AdapterManifest, aliases: str) -> tuple[str | int | float | None, ...]:
    best = manifest.evaluation[0] if manifest.evaluation else None
    return (
        manifest.name,
        manifest.version,
        aliases,
        one_line(manifest.task or "", 60),
        one_line(best.metric, 30) if best else "",
        best.base_value if best else None,
        best.adapter_value if best else None,
        manifest.lora.rank,
        manifest.created[:10],
    )
