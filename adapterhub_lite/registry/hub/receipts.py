"""What a push and a pull come to. Imports nothing that speaks to a hub, so that the facade can name them in its types."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from adapterhub_lite.adapter_format.manifest import AdapterManifest

Progress = Callable[[str], None]


@dataclass(frozen=True)
class PushReceipt:
    """What a push did. `uploaded` is False when the digest was there already; `commits_sent` counts the attempts."""

    repo_id: str
    commit: str
    tag: str
    digest: str
    uploaded: bool
    commits_sent: int


@dataclass(frozen=True)
class PullReceipt:
    """What a pull brought. `source`: "hub" (bytes fetched now), "store" (the hub named a digest that was here
    already) or "offline" (the hub was not asked, on request); `commit` is the 40-hex commit in each case."""

    manifest: AdapterManifest
    commit: str
    source: Literal["hub", "store", "offline"]
