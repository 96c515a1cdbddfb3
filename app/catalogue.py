"""What the Registry tab shows: rows, and everything about one version. Text and numbers out, never HTML."""

import re

from adapterhub_lite.registry import AdapterManifest, AdapterRegistry
from adapterhub_lite.registry.card import render_card
from app.escape import literal_markdown, one_line
from app.task import short_digest

COLUMNS = ("Adapter", "Version", "Aliases", "Task", "Metric", "Base score", "Score", "Rank", "Made")
COLUMN_TYPES = ("str", "number", "str", "str", "str", "number", "number", "number", "str")
COLUMN_WIDTHS = ("13%", "8%", "10%", "27%", "12%", "8%", "7%", "6%", "9%")
HISTORY_COLUMNS = ("When", "Alias", "What", "From", "To")

# A line of the card's own; what an adapter says of itself stands there escaped.
_PICTURE = re.compile(r"^!\[[^\]]*\]\([^)]*\)\n*", re.MULTILINE)

Cell = str | int | float | None


def catalogue_rows(registry: AdapterRegistry, search: str = "") -> list[list[Cell]]:
    """Every version whose name, task, tags, aliases, digest or base hold every word searched for, newest first."""
    words = search.lower().split()
    aliases: dict[str, dict[str, int]] = {}
    rows = []
    for manifest in sorted(registry.list(), key=lambda one: (one.created, one.version), reverse=True):
        known = aliases.setdefault(manifest.name, registry.aliases(manifest.name))
        own = ", ".join(alias for alias, version in known.items() if version == manifest.version)
        held = [manifest.name, own, manifest.task or "", manifest.digest, manifest.base.id, *manifest.tags]
        if all(word in " ".join(held).lower() for word in words):
            rows.append(_cells(manifest, own))
    return rows


def version_choices(registry: AdapterRegistry) -> list[str]:
    """Every version as `name:version`, by name, newest first."""
    return [one.reference for one in sorted(registry.list(), key=lambda one: (one.name, -one.version))]


def provenance(manifest: AdapterManifest) -> str:
    """Where a version comes from, as a Markdown list in which nothing of the adapter is markup."""
    lora, record = manifest.lora, manifest.training
    facts: list[tuple[str, str]] = [
        ("digest", manifest.digest),
        ("base", f"{manifest.base.id}, revision {manifest.base.revision or 'local'}"),
        ("base fingerprint", manifest.base.fingerprint),
        ("LoRA", f"rank {lora.rank}, alpha {lora.alpha:g}, on {lora.modules_bound} of {lora.modules_total} modules"),
        ("targets", ", ".join(lora.target_modules)),
        ("made", manifest.created),
    ]
    facts += [("parent", f"{p.weight:g} × {p.reference}, digest {short_digest(p.digest)}") for p in manifest.parents]
    if manifest.recipe:
        facts.append(("merge", f"{manifest.recipe.method}, measured error {manifest.recipe.relative_error:.2g}"))
    if record:
        facts.append(("data", f"{record.data.id}, {record.data.rows} rows, fingerprint {record.data.fingerprint[:12]}"))
        loss = "" if record.final_loss is None else f", final loss {record.final_loss:.4g}"
        facts.append(("run", f"{record.steps} steps in {record.wall_seconds:.0f} s, preset {record.preset}{loss}"))
        facts.append(("peak memory", f"{record.memory.measured_peak_bytes / 2**20:.0f} MiB"))
    if manifest.tags:
        facts.append(("tags", ", ".join(manifest.tags)))
    return "\n".join(f"- **{label}** {literal_markdown(value)}" for label, value in facts)


def card_text(manifest: AdapterManifest) -> str:
    """The version's model card as Markdown, without its metadata block and its pictures, which lie on the hub."""
    card = render_card(manifest, f"you/{manifest.name}")
    return _PICTURE.sub("", card.split("---\n", 2)[-1]).strip()


def alias_moves(registry: AdapterRegistry, name: str) -> list[list[Cell]]:
    """Every move of an adapter's aliases, newest first."""
    moves = reversed(list(registry.history(name)))
    return [[move.at, move.alias, move.act, _version(move.previous), _version(move.version)] for move in moves]


def loss_curve(manifest: AdapterManifest) -> list[tuple[int, float]]:
    """(step, loss) pairs of the run, where its record holds them."""
    return [(int(step), float(loss)) for step, loss in (manifest.training.loss_curve if manifest.training else ())]


def _version(version: int | None) -> str:
    return "none" if version is None else f"v{version}"


def _cells(manifest: AdapterManifest, aliases: str) -> list[Cell]:
    best = manifest.evaluation[0] if manifest.evaluation else None
    return [
        manifest.name,
        manifest.version,
        aliases,
        one_line(manifest.task or "", 60),
        one_line(best.metric, 30) if best else "",
        _rounded(best.base_value if best else None),
        _rounded(best.adapter_value if best else None),
        manifest.lora.rank,
        manifest.created[:10],
    ]


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")
