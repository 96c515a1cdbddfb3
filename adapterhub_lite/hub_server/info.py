"""Repositories as the client reads them: what a card says, tags derived from it, filters, order and pages."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any  # JSON values
from urllib.parse import urlencode

import yaml
from fastapi import Request
from fastapi.responses import JSONResponse

from adapterhub_lite.hub_server.store import Commit, Entry, HubRefusal, HubStore, Repo

Json = dict[str, Any]
# As the client reads it: white space may come first.
FRONT = re.compile(r"\A\s*---(?:\r\n|\r|\n)(.*?)(?:\r\n|\r|\n)---[ \t]*(?:\r\n|\n|\Z)", re.DOTALL)
MAX_DEPTH = 32
PAGE = 1000
# What a card says under these keys becomes a tag as it is, or behind the key.
PLAIN_TAGS = ("tags", "library_name", "pipeline_tag")
PREFIXED_TAGS = {
    "model": {"license": "license", "datasets": "dataset"},
    "dataset": {
        key: key
        for key in ("license", "language", "task_categories", "task_ids", "size_categories", "multilinguality",
                    "language_creators", "annotations_creators", "source_datasets")
    },
}  # fmt: skip
SORTS = {
    "createdAt": "createdAt",
    "lastModified": "lastModified",
    "downloads": "",
    "likes": "",
    "trendingScore": "",
    "main_size": "mainSize",
}
CONFIG_KEYS = {
    "config.json": ("architectures", "model_type"),
    "adapter_config.json": ("base_model_name_or_path", "task_type"),
}
# Filters of the real hub for which this one has no figures: refused, because a list that ignores one is wrong.
UNSUPPORTED_FILTERS = ("apps", "inference", "inference_provider", "num_parameters", "emissions_thresholds")
BASIC = ("id", "modelId", "author", "private", "gated", "disabled", "tags", "pipeline_tag", "library_name", "downloads",
         "likes", "createdAt", "lastModified", "sha", "trendingScore")  # fmt: skip


def front_matter(text: str) -> Json:
    """The metadata block of a card as JSON values, {} without one.

    Raises YAMLError when it is no mapping, one that would grow, or one that JSON cannot hold.
    """
    match = FRONT.match(text)
    block, depth = match[1] if match else "{}", 0
    for event in yaml.parse(block, yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        # A few aliases of aliases are gigabytes once they are written out as JSON.
        if isinstance(event, yaml.AliasEvent) or depth > MAX_DEPTH:
            raise yaml.YAMLError("the metadata block has aliases or is nested too deep")
    try:
        found = yaml.safe_load(block)
        written = json.dumps(found, default=str, skipkeys=True, allow_nan=False, ensure_ascii=False)
        written.encode()  # refuses half of a surrogate pair, which no answer can carry
    # PyYAML lets KeyError, AttributeError and others out of its constructors: `!!bool x`, `!!timestamp x`.
    except Exception as error:
        raise yaml.YAMLError(f"the metadata block cannot be read: {str(error)[:200]}") from error
    found = json.loads(written)
    if not isinstance(found, dict):
        raise yaml.YAMLError("the metadata block is not a mapping")
    return found


def texts(value: object) -> list[str]:
    """The texts in what a card has under a key: one, or a list of them."""
    return [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, str)]


def read_card(store: HubStore, commit: Commit) -> tuple[Json, str]:
    """(metadata, text without it) of a commit's card; empty where there is none, or none that can be read."""
    readme = commit.files.get("README.md")
    if readme is None or readme.size > 10_000_000:
        return {}, ""
    try:
        text = store.blob(readme.sha256).read_text()
    except UnicodeDecodeError:
        return {}, ""
    body = FRONT.sub("", text, count=1)
    try:
        return front_matter(text), body
    except yaml.YAMLError:
        return {}, body


def describe(store: HubStore, repo: Repo, commit: Commit, *, blobs: bool = False) -> Json:
    """A repository as `model_info` and `dataset_info` read it; tags are derived from its card."""
    card, _ = read_card(store, commit)
    if "tags" in card:
        card["tags"] = texts(card["tags"])  # the client iterates over them
    library = next(iter(texts(card.get("library_name"))), "peft" if "adapter_config.json" in commit.files else None)
    plain = [tag for key in PLAIN_TAGS for tag in texts(card.get(key))] + ([library] if library else [])
    if repo.kind == "model":
        plain += texts(card.get("language"))
        kinds = ["", *(f"{relation}:" for relation in texts(card.get("base_model_relation")))]
        plain += [f"base_model:{kind}{base}" for kind in kinds for base in texts(card.get("base_model"))]
    plain += [f"{tag}:{text}" for key, tag in PREFIXED_TAGS[repo.kind].items() for text in texts(card.get(key))]
    siblings = [
        {"rfilename": path} | ({"blobId": file.oid} | described(file) if blobs else {})
        for path, file in commit.files.items()
    ]
    found: Json = {
        "id": repo.id, "author": repo.id.split("/")[0], "sha": commit.sha, "private": repo.private,
        "gated": repo.gated or False, "disabled": False, "downloads": 0, "likes": 0,
        "tags": list(dict.fromkeys(plain)), "createdAt": repo.created, "lastModified": commit.date,
        "siblings": siblings, "cardData": card, "trendingScore": 0, "downloadsAllTime": 0,
    }  # fmt: skip
    if repo.kind == "model":
        pipeline = next(iter(texts(card.get("pipeline_tag"))), None)
        found |= {"modelId": repo.id, "library_name": library, "pipeline_tag": pipeline}
        found["config"] = read_config(store, commit)
    else:
        found["mainSize"] = sum({file.sha256: file.size for file in commit.files.values()}.values())
    return found


def read_config(store: HubStore, commit: Commit) -> Json:
    """What the real hub says of a model's `config.json` and `adapter_config.json`."""
    found: Json = {}
    for name, keys in CONFIG_KEYS.items():
        file = commit.files.get(name)
        try:
            raw = json.loads(store.blob(file.sha256).read_text()) if file and file.size < 1_000_000 else {}
        except (ValueError, RecursionError):
            continue
        kept = {key: raw[key] for key in keys if isinstance(raw, dict) and texts(raw.get(key)) and is_text(raw[key])}
        found |= {"peft": kept} if kept and name == "adapter_config.json" else kept
    return found


def is_text(value: object) -> bool:
    """Whether JSON can carry a value: no number that is not finite, no half of a surrogate pair."""
    try:
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return False
    return True


def described(file: Entry) -> Json:
    """Size, LFS and Xet keys of a file in a listing; `oid` and `sha256` are the same thing under two of its names."""
    lfs = {"oid": file.sha256, "sha256": file.sha256, "size": file.size, "pointerSize": len(file.pointer)}
    return {"size": file.size} | ({"lfs": lfs} if file.lfs else {}) | ({"xetHash": file.xet} if file.xet else {})


def expanded(found: Json, names: Sequence[str]) -> Json:
    """Only the properties asked for, and what says which repository it is; 400 for one that this hub does not have."""
    if not names:
        return found
    unknown = sorted(set(names) - set(found))
    if unknown:
        raise HubRefusal(400, f"This hub cannot expand {', '.join(unknown)}. It has {', '.join(sorted(found))}.")
    return {key: value for key, value in found.items() if key in {"id", "modelId", *names}}


def matching(infos: Iterable[Json], query: "Request") -> Iterator[Json]:
    """Those that the query of a listing asks for, in its order.

    `search` and `author` ignore case, `filter` names tags, `gated` and `pipeline_tag` compare. Refuses with 400 what
    this hub cannot filter or sort by.
    """
    asked = query.query_params
    refused = [name for name in UNSUPPORTED_FILTERS if name in asked]
    if refused:
        raise HubRefusal(400, f"This hub cannot filter by {', '.join(refused)}.")
    words = [word.lower() for word in asked.getlist("search")]
    tags, author = set(asked.getlist("filter")), asked.get("author", "").lower()
    pipeline, gated = asked.get("pipeline_tag"), asked.get("gated")
    found = [
        info
        for info in infos
        if tags <= set(info["tags"])
        and all(word in info["id"].lower() for word in words)
        and author in ("", info["author"].lower())
        and pipeline in (None, info.get("pipeline_tag"))
        and (gated is None or bool(info["gated"]) == (gated.lower() in ("1", "true")))
    ]
    sort = asked.get("sort", "")
    if sort and sort not in SORTS:
        raise HubRefusal(400, f"This hub cannot sort by {sort!r:.60}. It knows {', '.join(SORTS)}.")
    if SORTS.get(sort):
        found.sort(key=lambda info: info.get(SORTS[sort]) or 0, reverse=asked.get("direction", "-1") != "1")
    return iter(found)


def listed(info: Json, query: Mapping[str, str], expand: Sequence[str]) -> Json:
    """One line of a listing: everything with `full`, else what is small; `expand` chooses."""
    if expand:
        return expanded(info, expand)
    if query.get("full", "").lower() in ("1", "true"):
        return info
    extra = {key for key in ("cardData", "config") if query.get(key, "").lower() in ("1", "true")}
    return {key: value for key, value in info.items() if key in BASIC or key in extra}


def paged(request: Request, items: Sequence[Json], limit: int = PAGE) -> JSONResponse:
    """One page of a listing, with the address of the next in the header `Link`."""
    text = request.query_params.get("cursor", "0")
    if not text.isdigit() or limit < 1:
        raise HubRefusal(400, "A listing takes limit from 1 on, and a cursor that an earlier page gave.")
    start, limit = int(text), min(limit, PAGE)
    headers = {}
    if start + limit < len(items):
        rest = [(key, value) for key, value in request.query_params.multi_items() if key != "cursor"]
        query = urlencode([*rest, ("cursor", start + limit)])
        headers["Link"] = f'<{request.url.replace(query=query)}>; rel="next"'
    return JSONResponse(items[start : start + limit], headers=headers)


def tree(files: Mapping[str, Entry], folder: str = "", *, recursive: bool = False) -> list[Json]:
    """The folders, then the files, of a tree below `folder`; 404 EntryNotFound when that is no folder."""
    top = f"{folder}/" if folder else ""
    below = {path: file for path, file in files.items() if path.startswith(top)}
    if folder and not below:
        raise HubRefusal(404, f"{folder!r:.120} is not a folder of this revision.", "EntryNotFound")
    folders = {str(parent) for path in below for parent in PurePosixPath(path).parents} - {".", folder}
    oids = folder_oids(files)
    shown: list[Json] = [
        {"type": "directory", "path": path, "size": 0, "oid": oids[path]}
        for path in sorted(folders)
        if path.startswith(top)
    ]
    shown += [{"type": "file", "path": path, "oid": file.oid} | described(file) for path, file in below.items()]
    return [item for item in shown if recursive or "/" not in item["path"][len(top) :]]


def folder_oids(files: Mapping[str, Entry]) -> dict[str, str]:
    """Folder -> git's sha1 of it, of every folder: its names in git's order, each with its mode and its own sha1."""
    inside: dict[str, dict[str, bytes]] = {}
    for path, file in files.items():
        folder, _, name = path.rpartition("/")
        inside.setdefault(folder, {})[name] = b"100644 %s\0" % name.encode() + bytes.fromhex(file.oid)
        for parent in PurePosixPath(folder).parents if folder else ():
            inside.setdefault("" if str(parent) == "." else str(parent), {})
    found = {}
    for folder in sorted(inside, key=lambda path: -path.count("/") - bool(path)):  # the deepest first
        content = b"".join(line for _, line in sorted(inside[folder].items(), key=lambda item: item[0].encode()))
        found[folder] = hashlib.sha1(b"tree %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
        above, _, name = folder.rpartition("/")
        if folder:  # git orders a folder as if its name ended with a slash
            inside[above][f"{name}/"] = b"40000 %s\0" % name.encode() + bytes.fromhex(found[folder])
    return found


def last_commits(store: HubStore, key: str, sha: str, paths: Sequence[str]) -> dict[str, Json]:
    """For each path (of a file or a folder) the newest commit that changed it."""
    found: dict[str, Json] = {}
    newer: Commit | None = None

    def within(commit: Commit, path: str) -> dict[str, Entry]:
        return {name: e for name, e in commit.files.items() if name == path or name.startswith(f"{path}/")}

    def line(commit: Commit) -> Json:
        return {"id": commit.sha, "title": commit.title, "date": commit.date}

    for commit in store.log(key, sha):
        if newer is not None:
            for path in paths:
                if path not in found and within(newer, path) != within(commit, path):
                    found[path] = line(newer)
        if len(found) == len(paths):
            return found
        newer = commit
    return {path: found.get(path) or line(newer) for path in paths} if newer else found
