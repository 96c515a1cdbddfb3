"""What does a publish cost, and what does each fault do to it? Push and pull of a 21 MB adapter over loopback.

    python -m scripts.bench.keep.hub [--rounds 5]

Writes results/hub.json: requests, commits, bytes and seconds for a push and a pull by LFS and by Xet (medians), the
outcome of every fault on push and on pull, and eight publishers at once. The hub is the embedded one, so the seconds
say what the client and we cost, not what a network does.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from huggingface_hub.utils.tqdm import disable_progress_bars
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from adapterhub_lite.bases import ResolvedBase, resolve_base
from adapterhub_lite.errors import AdapterHubError
from adapterhub_lite.hub_server import FAULT_KINDS, HubServer
from adapterhub_lite.registry import AdapterRegistry
from adapterhub_lite.registry.hub.client import HubRepo
from adapterhub_lite.registry.hub.pull import pull_adapter
from adapterhub_lite.registry.hub.push import push_adapter
from scripts.bench.report import write_result

REPO, PUBLISHERS = "org/large", 8
PUSH_PATHS = {"commit": "/commit/main", "tag": "/tag/", "head": "/revision/main", "upload": "/lfs/"}
PULL_PATHS = {"weights": "/resolve/.*safetensors", "manifest": "/resolve/.*adapterhub.json", "head": "/revision/v"}


def build(folder: Path, versions: int) -> tuple[AdapterRegistry, ResolvedBase]:
    """A registry with `versions` of a random 21 MB adapter (each with other weights) on a random 27 MB base."""
    from tokenizers import Tokenizer, models

    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 8}
    shape["num_attention_heads"] = 4
    model = LlamaForCausalLM(LlamaConfig(vocab_size=272, tie_word_embeddings=True, **shape))
    model.save_pretrained(folder / "base")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE())).save_pretrained(folder / "base")
    model.name_or_path = str(folder / "base")
    adapted = get_peft_model(model, LoraConfig(r=128, target_modules="all-linear", task_type="CAUSAL_LM"))
    adapted.save_pretrained(folder / "adapter")
    registry, base = AdapterRegistry(folder / "home"), resolve_base(folder / "base")
    weights = folder / "adapter" / "adapter_model.safetensors"
    for _ in range(versions):
        save_file({name: torch.randn_like(tensor) for name, tensor in load_file(weights).items()}, weights)
        registry.add(folder / "adapter", "large", base=base)
    return registry, base


def timed(call: Callable[[], Any], hub: HubServer) -> dict[str, Any]:
    """Seconds, requests, commits and bytes of one call."""
    hub.faults.log.clear()
    started = time.perf_counter()
    call()
    seconds, log = time.perf_counter() - started, list(hub.faults.log)
    commits = [one for one in log if one.method == "POST" and "/commit/" in one.path]
    return {
        "seconds": seconds,
        "requests": len(log),
        "commits": len(commits),
        "bytes_up": sum(one.received for one in log),
        "bytes_down": sum(one.sent for one in log),
    }


def transfers(registry: AdapterRegistry, folder: Path, rounds: int) -> dict[str, Any]:
    """Medians of a push and a pull, by LFS and by Xet; Xet's bytes go past HTTP."""
    found: dict[str, Any] = {}
    for way in ("lfs", "xet"):
        constants.HF_HUB_DISABLE_XET = way == "lfs"
        pushes, pulls, again = [], [], []
        with HubServer(folder / f"hub-{way}") as hub:
            for version in range(1, rounds + 1):
                elsewhere = AdapterRegistry(folder / f"elsewhere-{way}-{version}")
                push = lambda v=version: push_adapter(registry.store, f"large:{v}", REPO, endpoint=hub.url)  # noqa: E731
                pull = lambda v=version, r=elsewhere: pull_adapter(r.store, REPO, revision=f"v{v}", endpoint=hub.url)  # noqa: E731
                pushes.append(timed(push, hub))
                pulls.append(timed(pull, hub))
                again.append(timed(push, hub))
        found[way] = {"push": medians(pushes), "pull": medians(pulls), "push of what is there": medians(again)}
    return found


def medians(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The median of each column."""
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]}


def faults(registry: AdapterRegistry, folder: Path) -> list[dict[str, Any]]:
    """Each fault once on each step of a push and of a pull: what came of it."""
    constants.HF_HUB_DISABLE_XET = True
    rows = []
    for kind in FAULT_KINDS:
        for doing, paths in (("push", PUSH_PATHS), ("pull", PULL_PATHS)):
            for step, path in paths.items():
                with tempfile.TemporaryDirectory(dir=folder) as scratch, HubServer(Path(scratch) / "hub") as hub:
                    rows.append(
                        {
                            "fault": kind,
                            "on": f"{doing}: {step}",
                            **one_fault(registry, Path(scratch), hub, kind, doing, path),
                        }
                    )
    return rows


def one_fault(
    registry: AdapterRegistry, scratch: Path, hub: HubServer, kind: Any, doing: str, path: str
) -> dict[str, Any]:
    """The outcome with the fault in force: exactly one commit and tag, and bytes equal to what was published."""
    elsewhere, wanted = AdapterRegistry(scratch / "elsewhere"), registry.resolve("large:2")
    push_adapter(registry.store, "large:1", REPO, endpoint=hub.url)
    if doing == "pull":
        push_adapter(registry.store, "large:2", REPO, endpoint=hub.url)
    rule, error = hub.faults.add(kind, path, seconds=0.2), None
    started = time.perf_counter()
    try:
        if doing == "push":
            push_adapter(registry.store, "large:2", REPO, endpoint=hub.url)
        else:
            pull_adapter(elsewhere.store, REPO, revision="v2", endpoint=hub.url)
    except AdapterHubError as failure:
        error = type(failure).__name__
    seconds = time.perf_counter() - started
    struck = rule.times == 0
    hub.faults.clear()
    repo = HubRepo(REPO, endpoint=hub.url)
    published = sum(commit.text.startswith("large v2") for commit in repo.log(repo.head()))
    verified = pull_adapter(elsewhere.store, REPO, revision="v2", endpoint=hub.url).manifest.published() == wanted
    return {"struck": struck, "error": error, "commits_of_v2": published, "tagged": "v2" in repo.tags(),
            "pulled_as_published": verified, "seconds": seconds}  # fmt: skip


def publishers(registry: AdapterRegistry, folder: Path) -> dict[str, Any]:
    """Eight publishers of eight versions at once."""
    with HubServer(folder / "hub-many") as hub, ThreadPoolExecutor(PUBLISHERS) as pool:
        receipts: list[Any] = []

        def all_at_once() -> None:
            versions = range(1, PUBLISHERS + 1)
            receipts.extend(
                pool.map(lambda n: push_adapter(registry.store, f"large:{n}", REPO, endpoint=hub.url), versions)
            )

        row = timed(all_at_once, hub)
        repo = HubRepo(REPO, endpoint=hub.url)
        titles = [commit.text.splitlines()[0] for commit in repo.log(repo.head())]
        kept = sum(title.startswith("large v") for title in titles)
        return {
            **row,
            "commits_kept": kept,
            "tags": len(repo.tags()),
            "commits_sent": [r.commits_sent for r in receipts],
        }


def main() -> None:
    """Run everything and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    disable_progress_bars()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        registry, _ = build(folder, max(rounds, PUBLISHERS))
        size = registry.resolve("large:1").files["adapter_model.safetensors"].size
        payload = {"adapter_bytes": size, "rounds": rounds, "transfers": transfers(registry, folder, rounds),
                   "publishers": publishers(registry, folder), "faults": faults(registry, folder)}  # fmt: skip
    print(write_result("hub", payload))


if __name__ == "__main__":
    main()
