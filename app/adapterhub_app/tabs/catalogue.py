"""What the Registry tab shows: one row per version, and everything about one version. Plain text and numbers, never HTML."""

import re

from adapterhub_app.display.escape import literal_markdown, one_line
from adapterhub_app.display.task import short_digest
from adapterhub_lite.registry import AdapterManifest, AdapterRegistry
from adapterhub_lite.registry.hub.card import render_card

COLUMNS = ("Adapter", "Version", "Aliases", "Task", "Metric", "Base score", "Score", "Rank", "Made")
COLUMN_TYPES = ("str", "number", "str", "str", "str", "number", "number", "number", "str")
# In pixels, so that a phone scrolls the table instead of shrinking every cell to one letter.
COLUMN_WIDTHS = ("140px", "85px", "105px", "310px", "130px", "110px", "75px", "70px", "120px")
HISTORY_COLUMNS = ("When", "Alias", "What", "From", "To")

# Only lines of the card itself match: text from the adapter is escaped in it.
_PICTURE = re.compile(r"^!\[[^\]]*\]\([^)]*\)\n*", re.MULTILINE)

Cell = str | int | float | None


def catalogue_rows(registry: AdapterRegistry, search: str = "") -> list[list[Cell]]:
    """Every version whose name, task, tags, aliases, digest or base contain all the search words, newest first."""
    words = search.lower().split()
    ranks = {manifest.digest: manifest.lora.rank for manifest in registry.list()}
    rows: list[list[Cell]] = []
    for one in sorted(registry.summaries(), key=lambda one: (one.created, one.version), reverse=True):
        text = " ".join([one.name, *one.aliases, one.task or "", one.digest, one.base_id, *one.tags]).lower()
        if all(word in text for word in words):
            metric, (value, base) = next(iter(one.metrics.items()), ("", (None, None)))
            aliases, task, metric = ", ".join(one.aliases), one_line(one.task or "", 60), one_line(metric, 30)
            scores = (_rounded(base), _rounded(value), ranks.get(one.digest))
            rows.append([one.name, one.version, aliases, task, metric, *scores, one.created[:10]])
    return rows


def measured_manifest(registry: AdapterRegistry, reference: str) -> AdapterManifest:
    """The manifest that a reference resolves to, with the evaluations recorded later.

    Raises:
        UnknownNameError: there is no such version.
    """
    found = registry.show(reference)
    return found.manifest.model_copy(update={"evaluation": found.evaluation})


def version_choices(registry: AdapterRegistry) -> list[str]:
    """Every version as `name:version`, by name, newest first."""
    return [one.reference for one in sorted(registry.list(), key=lambda one: (one.name, -one.version))]


def provenance(manifest: AdapterManifest) -> str:
    """Where a version comes from, as a Markdown list; text from the adapter is escaped."""
    lora, record = manifest.lora, manifest.training
    facts: list[tuple[str, str]] = [
        ("digest, the sha256 over its files", manifest.digest),
        ("base", f"{manifest.base.id}, revision {manifest.base.revision or 'local'}"),
        ("fingerprint of the base, over weights, tokenizer and template", manifest.base.fingerprint),
        ("LoRA", f"rank {lora.rank}, alpha {lora.alpha:g}, on {lora.modules_bound} of {lora.modules_total} modules"),
        ("targets", ", ".join(lora.target_modules)),
        ("made", manifest.created),
    ]
    facts += [("parent", f"{p.weight:g} × {p.reference}, digest {short_digest(p.digest)}") for p in manifest.parents]
    if manifest.recipe:
        facts.append(("merge", f"{manifest.recipe.method}, measured error {manifest.recipe.relative_error:.2g}"))
    if record:
        facts.append(
            (
                "data",
                f"{record.data.id}, {record.data.rows} rows, {record.data.fingerprint[:12]} (the same rows give the same digits)",
            )
        )
        loss = "" if record.final_loss is None else f", final loss {record.final_loss:.4g}"
        facts.append(("run", f"{record.steps} steps in {record.wall_seconds:.0f} s, preset {record.preset}{loss}"))
        facts.append(("peak memory", f"{record.memory.measured_peak_bytes / 2**20:.0f} MiB"))
    if manifest.tags:
        facts.append(("tags", ", ".join(manifest.tags)))
    return "\n".join(f"- **{label}** {literal_markdown(value)}" for label, value in facts)


def card_text(manifest: AdapterManifest) -> str:
    """The version's model card as Markdown, without its metadata block and its pictures, which are only on the hub."""
    card = render_card(manifest, f"you/{manifest.name}")
    return _PICTURE.sub("", card.split("---\n", 2)[-1]).strip()


def alias_moves(registry: AdapterRegistry, name: str) -> list[list[Cell]]:
    """Every move of an adapter's aliases, newest first."""
    moves = reversed(list(registry.history(name)))
    return [[move.at, move.alias, move.act, _version(move.previous), _version(move.version)] for move in moves]


def loss_curve(manifest: AdapterManifest) -> list[tuple[int, float]]:
    """(step, loss) pairs of the run, if they were recorded."""
    return [(int(step), float(loss)) for step, loss in (manifest.training.loss_curve if manifest.training else ())]


def _version(version: int | None) -> str:
    return "none" if version is None else f"v{version}"


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")
