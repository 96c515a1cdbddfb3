"""The page for people: repositories, cards, files, versions, and the commands that pull them. Read only, no scripts.

A browser sends no token, so that a page shows what anybody may see.
"""

import csv
import html
import json
from collections.abc import Sequence
from itertools import islice
from urllib.parse import quote, unquote

from fastapi import Request
from fastapi.responses import HTMLResponse
from markdown_it import MarkdownIt

from adapterhub_lite.hub_server.hub import Hub
from adapterhub_lite.hub_server.info import describe, read_card
from adapterhub_lite.hub_server.store import Commit, HubRefusal, Repo

# In the order they are matched, after all routes of the API.
PAGE_ROUTES = (
    ("GET", "/", "repositories"),
    ("GET", "/datasets/{ns}/{name}", "data_set"),
    ("GET", "/datasets/{ns}/{name}/{view}/{rev}", "data_set"),
    ("GET", "/{ns}/{name}", "model"),
    ("GET", "/{ns}/{name}/{view}/{rev}", "model"),
)
STYLE = """
:root{color-scheme:light dark;--line:#8884;--quiet:#777}body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;
margin:2rem auto;padding:0 1rem}table{border-collapse:collapse;width:100%}td,th{text-align:left;padding:.3rem .6rem;
border-bottom:1px solid var(--line);overflow-wrap:anywhere}pre{background:#8882;padding:.7rem;overflow:auto;
border-radius:6px}code{font-family:ui-monospace,monospace}a{color:#1f7a6c}small,.quiet{color:var(--quiet)}
.card{border:1px solid var(--line);border-radius:6px;padding:0 1rem;margin:1rem 0;overflow-wrap:anywhere}"""
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src 'self'; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'"
)
# So much of a data file is read for its columns, and so many of its rows.
ROWS_BYTES, MOST_ROWS = 65_536, 100
ROWS_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv")
KINDS = {bool: "yes or no", int: "number", float: "number", list: "list", dict: "object", type(None): "nothing"}
# No HTML of a card's own, and links of http and https only; pictures are left to the real hub.
MARKDOWN = MarkdownIt("commonmark", {"html": False, "linkify": False}).enable("table").disable("image")


def draw(title: str, body: str) -> str:
    """A whole page around `body`."""
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style>"
        f'<p class="quiet"><a href="/">All repositories</a></p><h1>{html.escape(title)}</h1>{body}</html>'
    )


def error_page(text: str) -> str:
    """A refusal as a page."""
    return draw("Not here", f"<p>{html.escape(text)}</p>")


def table(heads: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Rows of cells that are HTML already."""
    top = "".join(f"<th>{html.escape(head)}</th>" for head in heads)
    lines = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{top}</tr>{lines}</table>"


def link(address: str, text: str) -> str:
    """A link to a path of this hub."""
    return f'<a href="{html.escape(quote(address, safe="/?=&%"))}">{html.escape(text)}</a>'


class Pages:
    """The pages, from one hub. Path parameters arrive quoted."""

    def __init__(self, hub: Hub) -> None:
        self.hub, self.store = hub, hub.store

    def repositories(self, request: Request, search: str = "") -> HTMLResponse:
        """Every repository that anybody may see, newest first."""
        rows = []
        for repo in self.hub.visible(request, ""):
            if "main" in repo.branches and search.lower() in repo.id.lower():
                info = describe(self.store, repo, self.hub.at(request, repo, "main"))
                about = ", ".join(info["tags"][:6])
                cells = (link(f"/{repo.key}", repo.id), repo.kind, html.escape(about), info["lastModified"][:16])
                rows.append((info["lastModified"], cells))
        form = (
            f'<form><input name="search" type="search" aria-label="Search" placeholder="Search" '
            f'value="{html.escape(search)}"> <button>Search</button></form>'
        )
        shown = table(("repository", "kind", "tags", "changed (UTC)"), [cells for _, cells in sorted(rows)[::-1]])
        return self._page("Repositories", form + (shown if rows else "<p>There is nothing here yet.</p>"))

    def model(self, request: Request, view: str = "tree", rev: str = "main") -> HTMLResponse:
        """One model repository at a revision."""
        return self._repository(request, view, unquote(rev))

    def data_set(self, request: Request, view: str = "tree", rev: str = "main") -> HTMLResponse:
        """One data set at a revision."""
        request.scope["path_params"] = {**request.path_params, "kinds": "datasets"}
        return self._repository(request, view, unquote(rev))

    def _repository(self, request: Request, view: str, revision: str) -> HTMLResponse:
        if request.path_params["name"] == "resolve":  # a file of `squad`, an id without an owner
            raise HubRefusal(404, "Repository not found", "RepoNotFound")
        if view not in ("tree", "commit"):
            raise HubRefusal(404, "There is no such page.")
        repo = self.hub.readable(request)
        commit = self.hub.at(request, repo, quote(revision, safe=""))
        _, card = read_card(self.store, commit)
        endpoint = str(request.base_url).rstrip("/")
        parts = [
            f'<p class="quiet">{html.escape(repo.kind)}, at {html.escape(revision)}, commit {commit.sha[:12]}'
            f"{', gated' if repo.gated else ''}</p>",
            f"<h2>Pull</h2><pre><code>{html.escape(commands(repo, endpoint, revision))}</code></pre>",
            f'<h2>Card</h2><div class="card">{MARKDOWN.render(card)}</div>' if card.strip() else "",
            self._rows(commit) if repo.kind == "dataset" else "",
            "<h2>Versions</h2>", self._versions(repo, commit),
            "<h2>Files</h2>", files_table(repo, commit, revision),
        ]  # fmt: skip
        return self._page(repo.id, "".join(parts))

    def _versions(self, repo: Repo, commit: Commit) -> str:
        aliases: dict[str, list[str]] = {}
        listing = commit.files.get("aliases.json")
        if listing and listing.size < 1_000_000:
            try:
                found = json.loads(self.store.blob(listing.sha256).read_bytes())
                for alias, version in found.get("aliases", found).items():
                    aliases.setdefault(f"v{version}", []).append(str(alias))
            except (ValueError, AttributeError, RecursionError):
                pass
        rows = [
            (link(f"/{repo.key}/tree/{quote(name, safe='')}", name), kind,
             html.escape(", ".join(aliases.get(name, []))), sha[:12])
            for kind, refs in (("branch", repo.branches), ("tag", repo.tags))
            for name, sha in refs.items()
        ]  # fmt: skip
        return table(("revision", "kind", "aliases", "commit"), rows)

    def _rows(self, commit: Commit) -> str:
        """The columns of a data set, from the beginning of its first file of text rows."""
        for path, file in sorted(commit.files.items()):
            if path.lower().endswith(ROWS_SUFFIXES):
                with self.store.blob(file.sha256).open("rb") as stream:
                    columns = columns_of(path, stream.read(ROWS_BYTES), whole=file.size <= ROWS_BYTES)
                if columns:
                    cells = [tuple(html.escape(text) for text in (name, *about)) for name, about in columns.items()]
                    heading = f"<h2>Rows</h2><p>From the beginning of {html.escape(path)}:</p>"
                    return heading + table(("column", "kind", "example"), cells)
        return ""

    def _page(self, title: str, body: str) -> HTMLResponse:
        headers = {
            "Content-Security-Policy": POLICY,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
        }
        return HTMLResponse(draw(title, body), headers=headers)


def columns_of(path: str, beginning: bytes, *, whole: bool) -> dict[str, tuple[str, str]]:
    """Column -> (kinds of its values, an example) of the rows at the beginning of a JSON, JSON Lines, CSV or TSV file.

    Empty for what cannot be read so. `whole` says that there is no more of the file.
    """
    text = beginning.decode("utf-8-sig", "replace")
    try:
        if path.lower().endswith((".csv", ".tsv")):
            lines = text.splitlines(keepends=True)[: None if whole else -1]
            mark = "\t" if path.lower().endswith(".tsv") else max(",;\t", key=lines[0].count)
            rows = list(islice(csv.DictReader(lines, delimiter=mark), MOST_ROWS))
        elif text.lstrip().startswith("["):
            rows = json.loads(text)[:MOST_ROWS]
        else:
            lines = text.split("\n")[: None if whole else -1]
            rows = [json.loads(line) for line in lines[:MOST_ROWS] if line.strip()]
    except (ValueError, RecursionError, IndexError, csv.Error):
        return {}
    found: dict[str, tuple[set[str], str]] = {}
    for row in rows:
        for name, value in row.items() if isinstance(row, dict) else ():
            kinds, _ = found.setdefault(str(name)[:80], (set(), _example(value)))
            kinds.add(KINDS.get(type(value), "text"))
    return {name: (" or ".join(sorted(kinds)), example) for name, (kinds, example) in islice(found.items(), 50)}


def _example(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:79] + "…"


def files_table(repo: Repo, commit: Commit, revision: str) -> str:
    """The files of a commit with their size, each a download."""
    at = quote(revision, safe="")
    rows = [
        (link(f"/{repo.key}/resolve/{at}/{quote(path)}", path), f"{file.size:,}", file.sha256[:12])
        for path, file in sorted(commit.files.items())
    ]
    return table(("file", "bytes", "sha256"), rows)


def commands(repo: Repo, endpoint: str, revision: str) -> str:
    """What to type elsewhere to get the repository at this revision."""
    at = "" if revision == "main" else f" --revision {revision}"
    if repo.kind == "dataset":
        return (
            f"export HF_ENDPOINT={endpoint}\nhf download {repo.id} --repo-type dataset{at}\n"
            f"adapterhub-lite train NAME --data {repo.id}"
        )
    return f"adapterhub-lite pull {repo.id}{at} --endpoint {endpoint}\nHF_ENDPOINT={endpoint} hf download {repo.id}{at}"
