"""One hub: its store, its tokens, and who may do what. The requests themselves are in `routes` and `transfer`."""

import uuid
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from fastapi import Request

from adapterhub_lite.hub_server.store import Commit, Entry, HubRefusal, HubStore, Repo, repo_key
from adapterhub_lite.hub_server.xet import XetStore

# Uploads that were announced and never made; the oldest are forgotten.
MAX_TICKETS = 10_000


@dataclass(frozen=True)
class Account:
    """Who a token stands for. `role` is "write" or "read"; `orgs` are other namespaces it may use."""

    name: str
    role: str = "write"
    orgs: tuple[str, ...] = ()


class MovedError(Exception):
    """The repository has another address now: the client is sent there with 307."""

    def __init__(self, old: str, new: str) -> None:
        self.old, self.new = old, new
        super().__init__(f"{old} is now {new}")


def key_of(request: Request) -> str:
    """The key of the repository that a path names: `/api/models/org/name`, `/datasets/org/name/resolve/...`."""
    kind = {"models": "model", "datasets": "dataset"}.get(request.path_params.get("kinds", "models"))
    if kind is None:
        raise HubRefusal(501, f"This hub holds models and data sets, no {request.path_params['kinds']}.")
    return repo_key(kind, "{ns}/{name}".format(**request.path_params))


class Hub:
    """One store behind one table of tokens (None: open to all)."""

    def __init__(
        self, data: Path, accounts: Mapping[str, Account] | None, part_bytes: int, quota_bytes: int | None
    ) -> None:
        # Clients get a path of it as an address, wherever they run.
        self.store, self.xet = HubStore(data, quota_bytes), XetStore(data.resolve() / "xet")
        self.accounts, self.part_bytes = accounts, part_bytes
        self._tickets: OrderedDict[str, tuple[str, int]] = OrderedDict()

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

    def visible(self, request: Request, kind: str) -> list[Repo]:
        """The repositories of a kind that the caller may see."""
        account = self.account(request)
        return [repo for repo in self.store.repos(kind) if not repo.private or self.owns(account, repo.id)]

    def readable(self, request: Request, key: str = "") -> Repo:
        """The repository, by default that of the path; missing and hidden look the same, as on the real hub.

        Raises MovedError when the path names it by an address that it had before; `key` is followed.
        """
        account, named, key = self.account(request), key, key or key_of(request)
        repo = self.store.find(key)
        if repo is None and (new := self.store.elsewhere(key)):
            repo = self.store.find(new)
        if repo is None or (repo.private and not self.owns(account, repo.id)):
            raise HubRefusal(404 if account else 401, "Repository not found", "RepoNotFound")
        if repo.key != key and not named:
            raise MovedError(key, repo.key)
        return repo

    def require_write(self, request: Request, repo_id: str) -> None:
        """Refuse a caller who may not write under this name: 401 without a token, 403 with a wrong one."""
        account = self.account(request)
        if self.accounts is not None and account is None:
            raise HubRefusal(401, "Invalid username or password.")
        if not self.owns(account, repo_id) or (account and account.role != "write"):
            raise HubRefusal(403, f"Forbidden: you don't have the rights to write to {repo_id}.")

    def writable(self, request: Request, key: str = "") -> Repo:
        """The repository, for a caller who may write to it."""
        repo = self.readable(request, key)
        self.require_write(request, repo.id)
        return repo

    def open_files(self, request: Request) -> Repo:
        """The repository, for a caller who may read its files: gated ones are for their owners."""
        repo, account = self.readable(request), self.account(request)
        if repo.gated and not self.owns(account, repo.id):
            raise HubRefusal(403 if account else 401, f"Access to {repo.key} is restricted.", "GatedRepo")
        return repo

    def at(self, request: Request, repo: Repo, revision: str) -> Commit:
        """The commit that a quoted revision names; for a branch the one before while a stale listing is injected."""
        commit = self.store.commit(repo.key, self.store.resolve(repo, unquote(revision)))
        stale = getattr(request.state, "stale", False) and unquote(revision) in repo.branches and commit.parent
        return self.store.commit(repo.key, commit.parent) if stale else commit

    def entry(self, sha256: str) -> Entry:
        """The entry of a large file that a commit names, taken in from the Xet side when it went there."""
        if not self.store.blob(sha256).exists():
            landing = self.store.incoming / uuid.uuid4().hex
            if not self.xet.take_in(sha256, landing):
                raise HubRefusal(400, f"No content with sha256 {sha256} was uploaded.")
            self.store.admit(landing, sha256)
        return self.store.large(sha256, self.xet.hash_of(sha256))

    def issue_ticket(self, sha256: str, size: int) -> str:
        """A new upload address for a content."""
        ticket = uuid.uuid4().hex
        self._tickets[ticket] = (sha256, size)
        while len(self._tickets) > MAX_TICKETS:
            self._tickets.popitem(last=False)
        return ticket

    def ticket(self, ticket: str) -> tuple[str, int]:
        """What an upload address is for: sha256 and size in bytes."""
        if ticket not in self._tickets:
            raise HubRefusal(403, "This upload address is not valid any more.")
        return self._tickets[ticket]
