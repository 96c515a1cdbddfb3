"""The model card: README.md made from a manifest, never by hand, so that it is always valid. Knows no network."""

import re
from typing import Any

import yaml

from adapterhub_lite.adapter_format.manifest import CARD_FILE, AdapterManifest
from adapterhub_lite.registry.hub.loss_plot import LOSS_FILE, draw_loss

# What the hub takes for `base_model` and `datasets`: an id, never a path.
HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]{0,95}(/[A-Za-z0-9][\w.\-]{0,95})?", re.ASCII)
DATA_ID = re.compile(r"[A-Za-z0-9][\w.\-]{0,95}/[A-Za-z0-9][\w.\-]{0,95}", re.ASCII)


def hub_id(text: str) -> str:
    """`text` itself when it is a valid hub id, else the nearest valid id without folders of this machine in it."""
    if HUB_ID.fullmatch(text):
        return text
    last = re.sub(r"[^A-Za-z0-9_.\-]+", "-", text.replace("\\", "/").rstrip("/").rpartition("/")[2]).strip("-._")
    return last[:96] or "unknown-base"


def card_metadata(manifest: AdapterManifest) -> dict[str, Any]:
    """The YAML block of the card, as the hub reads it (`model-index` for the metrics)."""
    metadata: dict[str, Any] = {
        "base_model": hub_id(manifest.base.id),
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": sorted({"lora", "adapterhub-lite", *manifest.tags}),
    }
    if manifest.training and DATA_ID.fullmatch(manifest.training.data.id):
        metadata["datasets"] = [manifest.training.data.id]
    if manifest.evaluation:
        metadata["model-index"] = [{"name": manifest.name, "results": [_result(item) for item in manifest.evaluation]}]
    return metadata


def _result(item: Any) -> dict[str, Any]:
    data = {"name": item.data or "unnamed", "type": hub_id(item.data or "unnamed")}
    metric = {"type": item.metric, "name": item.metric, "value": item.adapter_value}
    return {"task": {"type": "text-generation"}, "dataset": data, "metrics": [metric]}


def card_files(manifest: AdapterManifest, repo_id: str) -> dict[str, bytes]:
    """What is published of a version for people: the card, and the picture in it where a loss was recorded."""
    picture = draw_loss(manifest.training.loss_curve) if manifest.training else None
    return {CARD_FILE: render_card(manifest, repo_id).encode(), **({LOSS_FILE: picture} if picture else {})}


def render_card(manifest: AdapterManifest, repo_id: str) -> str:
    """The whole README.md of a version as it is published under `repo_id`."""
    block = yaml.safe_dump(card_metadata(manifest), sort_keys=False)
    sections = [
        f"---\n{block}---\n",
        f"# {manifest.name} v{manifest.version}\n",
        _summary(manifest),
        _usage(manifest, repo_id),
    ]
    sections += [_metrics(manifest), _training(manifest), _examples(manifest), _files(manifest)]
    return "\n".join(section for section in sections if section)


def _summary(manifest: AdapterManifest) -> str:
    lora, base = manifest.lora, manifest.base
    task = f"Task: {_inline(manifest.task.rstrip('.'))}.\n\n" if manifest.task else ""
    revision = f", revision `{base.revision}`" if base.revision else ""
    parents = "".join(
        f"\n- merged from `{parent.reference}` with weight {parent.weight:g}, digest `{parent.digest}`"
        for parent in manifest.parents
    )
    return (
        f"{task}A LoRA adapter of rank {lora.rank} (alpha {lora.alpha:g}, scaling {lora.scaling:g}) on "
        f"{lora.modules_bound} modules of `{hub_id(base.id)}`{revision}.\n\n"
        f"- digest `{manifest.digest}`\n- fingerprint of the base it was made on `{base.fingerprint}`{parents}\n"
    )


def _usage(manifest: AdapterManifest, repo_id: str) -> str:
    base, tag = hub_id(manifest.base.id), f"v{manifest.version}"
    return f"""## How to use

With plain PEFT:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained("{base}")
tokenizer = AutoTokenizer.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "{repo_id}", revision="{tag}")
```

With adapterhub-lite, which checks every byte and the base before it loads anything:

```python
from adapterhub_lite import AdapterRegistry, GenerationRequest, InferenceEngine

registry = AdapterRegistry()
registry.pull("{repo_id}", revision="{tag}")
with InferenceEngine.from_base("{base}", registry=registry) as engine:
    print(engine.generate(GenerationRequest(prompt="...", adapter="{manifest.reference}")).text)
```
"""


def _metrics(manifest: AdapterManifest) -> str:
    if not manifest.evaluation:
        return ""
    rows = [
        f"| {_cell(item.metric)} | {_cell(item.data)} | {item.adapter_value:.4g} | "
        + (f"{item.base_value:.4g} |" if item.base_value is not None else "not measured |")
        for item in manifest.evaluation
    ]
    return "## Evaluation\n\n| metric | data | adapter | bare base |\n|---|---|---|---|\n" + "\n".join(rows) + "\n"


def _training(manifest: AdapterManifest) -> str:
    record = manifest.training
    if record is None:
        return ""
    loss = f", final loss {record.final_loss:.4g}" if record.final_loss is not None else ""
    picture = f"\n![Training loss by step]({LOSS_FILE})\n" if draw_loss(record.loss_curve) else ""
    packages = ", ".join(f"{_inline(name)} {_inline(version)}" for name, version in sorted(record.packages.items()))
    return (
        f"## Training\n\n{record.data.rows} rows of `{_inline(record.data.id)}`, {record.steps} steps{loss}, "
        f"{record.wall_seconds:.0f} s, preset `{_inline(record.preset)}`, peak memory "
        f"{record.memory.measured_peak_bytes / 2**20:.0f} MiB.\n{picture}\nPackages: {packages}.\n"
    )


def _examples(manifest: AdapterManifest) -> str:
    # Indented code: nothing in an example can close it, as it could a fence.
    shown = ["".join(f"    {line}\n" for line in example.splitlines()) for example in manifest.examples[:5]]
    return "## Examples\n\n" + "\n<!-- -->\n\n".join(shown) if shown else ""


def _files(manifest: AdapterManifest) -> str:
    rows = [f"| {name} | {record.size} | `{record.sha256}` |" for name, record in sorted(manifest.files.items())]
    return "## Files\n\n| file | bytes | sha256 |\n|---|---|---|\n" + "\n".join(rows) + "\n"


def _inline(text: str) -> str:
    return re.sub(r"[`<>\r\n\[\]|]+", " ", text).strip()


def _cell(text: str) -> str:
    return _inline(text) or "unnamed"
