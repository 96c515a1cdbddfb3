"""What an admin may do in the Registry tab: promote, roll back, push, pull. Each step is told in a plain line."""

import queue
import threading
from collections.abc import Callable, Iterator

from adapterhub_app.backend import Backend
from adapterhub_app.display.notice import sentence
from adapterhub_app.display.task import short_digest
from adapterhub_lite.errors import UsageError

Tell = Callable[[str], None]


def promote(backend: Backend, user: str | None, reference: str | None, alias: str) -> str:
    """Point an alias at a version; returns what happened.

    Raises:
        UsageError: no admin, no version picked, or no name for an alias.
    """
    backend.access.require_admin(user, "promote a version")
    manifest = backend.registry.resolve(_picked(reference))
    before = backend.registry.aliases(manifest.name).get(alias)
    backend.registry.set_alias(manifest.name, alias, version=manifest.version, expect=before or 0)
    was = f"was at version {before}" if before else "is new"
    return f"{manifest.name}@{alias} {was} and is now at version {manifest.version}."


def roll_back(backend: Backend, user: str | None, reference: str | None, alias: str) -> str:
    """Point an alias where it pointed before; returns what happened. Raises as `promote` does."""
    backend.access.require_admin(user, "roll an alias back")
    name = backend.registry.resolve(_picked(reference)).name
    version = backend.registry.rollback(name, alias)
    return f"{name}@{alias} is back at version {version}."


def push(backend: Backend, user: str | None, reference: str | None, repo_id: str) -> Iterator[list[str]]:
    """Publish a version; yields the steps so far, the last line says what came of it."""

    def work(tell: Tell) -> str:
        backend.access.require_admin(user, "push to a hub")
        _wanted(repo_id)
        receipt = backend.registry.push(_picked(reference), repo_id.strip(), endpoint=backend.hub, progress=tell)
        how = "Published" if receipt.uploaded else "It was there already"
        return f"{how}: {receipt.repo_id} {receipt.tag}, commit {receipt.commit[:12]}."

    yield from _steps(work)


def pull(backend: Backend, user: str | None, repo_id: str, revision: str, name: str) -> Iterator[list[str]]:
    """Bring a published version in; yields the steps so far, the last line says what came of it."""

    def work(tell: Tell) -> str:
        backend.access.require_admin(user, "pull from a hub")
        _wanted(repo_id)
        receipt = backend.registry.pull(
            repo_id.strip(),
            revision=revision.strip() or None,
            name=name.strip() or None,
            endpoint=backend.hub,
            progress=tell,
        )
        manifest = receipt.manifest
        where = {"hub": "fetched and verified", "store": "was here already", "offline": "taken from here"}[
            receipt.source
        ]
        return f"{manifest.reference} ({short_digest(manifest.digest)}) {where}, commit {receipt.commit[:12]}."

    yield from _steps(work)


def _steps(work: Callable[[Tell], str]) -> Iterator[list[str]]:
    """Run `work` beside, and yield all lines told so far each time there is a new one."""
    told: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def run() -> None:
        try:
            told.put(work(told.put))
        except Exception as error:  # the page's edge
            told.put(sentence(error))
        told.put(None)

    threading.Thread(target=run, name="hub-transfer", daemon=True).start()
    lines: list[str] = []
    while (line := told.get()) is not None:
        lines.append(line)
        yield list(lines)


def _picked(reference: str | None) -> str:
    if not reference:
        raise UsageError("No version is picked yet. Pick one in the table or the list above.")
    return reference


def _wanted(repo_id: str) -> None:
    if not repo_id.strip():
        raise UsageError("The repository is missing. Write it as owner/name, such as you/sql-lora.")
