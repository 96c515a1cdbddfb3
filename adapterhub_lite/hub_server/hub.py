"""One hub: its store, its tokens, and who may do what. The requests themselves are in `routes`."""

import json
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import yaml
from fastapi import Request

from adapterhub_lite.hub_server.store import Commit, Entry, HubRefusal, HubStore, Repo
from adapterhub_lite.hub_server.xet import XetStore

MAX_DEPTH = 32


@dataclass(frozen=True)
class Account:
    """Who a token stands for. `role` is "write" or "read"; `orgs` are other namespaces it may use."""

    name: str
    role: str = "write"
    orgs: tuple[str, ...] = ()


def front_matter(text: str) -> dict[str, Any]:
    """The metadata block of a card, {} without one; raises YAMLError when it is no mapping, or one that would grow."""
    match = re.match(r"^---\r?\n(.*?)\r?\n---(\r?\n|$)", text, re.DOTALL)
    block, depth = match[1] if match else "{}", 0
    for event in yaml.parse(block, yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        # A few aliases of aliases are gigabytes once they are written out as JSON.
        if isinstance(event, yaml.AliasEvent) or depth > MAX_DEPTH:
            raise yaml.YAMLError("the metadata block has aliases or is nested too deep")
    found = yaml.safe_load(block)
    if not isinstance(found, dict):
        raise yaml.YAMLError("the metadata block is not a mapping")
    return found


def texts(value: Any) -> list[str]:
    """The texts in what a card has under a key: one, or a list of them."""
    return [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, str)]


class Hub:
    """One store behind one table of tokens (None: open to all)."""

    def __init__(self, data: Path, accounts: Mapping[str, Account] | None, part_bytes: int) -> None:
        # Clients get a path of it as an address, wherever they run.
        self.store, self.xet = HubStore(data), XetStore(data.resolve() / "xet")
        self.accounts, self.part_bytes = accounts, part_bytes
        self.tickets: dict[str, tuple[str, int]] = {}

    def account(self, request: Request) -> Account | None:
        """Who is asking; 401 for a token that nobody has."""
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not token or self.accounts is None:
            return Account("user") if token else None
        if token not in self.accounts:
            raise HubRefusal(401, "Invalid credentials in Authorization header")
        return self.accounts[token]

    def owns(self, account: Account | None, repo_id: str) -> bool:
        """Whether the repository is in the caller's own or an organisation's namespace."""
        return self.accounts is None or bool(account and repo_id.split("/")[0] in (account.name, *account.orgs))

    def readable(self, request: Request, repo_id: str = "") -> Repo:
        """The repository, by default that of the path; missing and hidden look the same, as on the real hub."""
        account = self.account(request)
        repo = self.store.find(repo_id or "{ns}/{name}".format(**request.path_params))
        if repo is None or (repo.private and not self.owns(account, repo.id)):
            raise HubRefusal(404 if account else 401, "Repository not found", "RepoNotFound")
        return repo

    def require_write(self, request: Request, repo_id: str) -> None:
        """Refuse a caller who may not write under this name: 401 without a token, 403 with a wrong one."""
        account = self.account(request)
        if self.accounts is not None and account is None:
            raise HubRefusal(401, "Invalid username or password.")
        if not self.owns(account, repo_id) or (account and account.role != "write"):
            raise HubRefusal(403, f"Forbidden: you don't have the rights to write to {repo_id}.")

    def writable(self, request: Request, repo_id: str = "") -> Repo:
        """The repository, for a caller who may write to it."""
        repo = self.readable(request, repo_id)
        self.require_write(request, repo.id)
        return repo

    def at(self, request: Request, repo: Repo, revision: str) -> Commit:
        """The commit that a quoted revision names; for a branch the one before while a stale listing is injected."""
        commit = self.store.commit(repo.id, self.store.resolve(repo, unquote(revision)))
        stale = getattr(request.state, "stale", False) and unquote(revision) in repo.branches and commit.parent
        return self.store.commit(repo.id, commit.parent) if stale else commit

    def entry(self, sha256: str) -> Entry:
        """The entry of a large file that a commit names, taken in from the Xet side when it went there."""
        if not self.store.blob(sha256).exists():
            landing = self.store.incoming / uuid.uuid4().hex
            if not self.xet.take_in(sha256, landing):
                raise HubRefusal(400, f"No content with sha256 {sha256} was uploaded.")
            self.store.admit(landing, sha256)
        return self.store.large(sha256, self.xet.hash_of(sha256))

    def ticket(self, ticket: str) -> tuple[str, int]:
        """What an upload address is for: sha256 and size."""
        if ticket not in self.tickets:
            raise HubRefusal(403, "This upload address is not valid any more.")
        return self.tickets[ticket]

    def info(self, repo: Repo, commit: Commit) -> dict[str, Any]:
        """A repository as `model_info` and `list_models` read it; tags are derived from its card."""
        readme = commit.files.get("README.md")
        try:
            card = front_matter(self.store.blob(readme.sha256).read_text()) if readme else {}
        except (yaml.YAMLError, UnicodeDecodeError):
            card = {}
        if "tags" in card:
            card["tags"] = texts(card["tags"])  # the client iterates over them
        kinds = ["", *(f"{relation}:" for relation in texts(card.get("base_model_relation")))]
        tags = [f"base_model:{kind}{base}" for kind in kinds for base in texts(card.get("base_model"))]
        tags = [*card.get("tags", ()), *tags, *texts(card.get("library_name"))]
        files = [{"rfilename": path, "blobId": file.oid} | described(file) for path, file in commit.files.items()]
        return {"id": repo.id, "sha": commit.sha, "private": repo.private, "gated": repo.gated or False, "tags": tags,
                "createdAt": repo.created, "lastModified": commit.date, "siblings": files,
                "cardData": json.loads(json.dumps(card, default=str, skipkeys=True))}  # fmt: skip


def described(file: Entry) -> dict[str, Any]:
    """Size, LFS and Xet keys of a file in a listing; `oid` and `sha256` are the same thing under two of its names."""
    lfs = {"oid": file.sha256, "sha256": file.sha256, "size": file.size, "pointerSize": 134}
    return {"size": file.size} | ({"lfs": lfs} if file.lfs else {}) | ({"xetHash": file.xet} if file.xet else {})
