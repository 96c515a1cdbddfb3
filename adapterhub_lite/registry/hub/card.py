"""The model card: README.md and its picture of the loss, made from a manifest and so always valid. Knows no network."""

import re
from collections.abc import Sequence
from typing import Any

import yaml

from adapterhub_lite.adapter_format.manifest import CARD_FILE, LOSS_FILE, AdapterManifest, EvaluationRecord
from adapterhub_lite.bases.fingerprint import is_commit
from adapterhub_lite.bases.resolve import EMBEDDED_BASES

# What the hub takes for `base_model` and `datasets`: an id, never a path.
HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]{0,95}(/[A-Za-z0-9][\w.\-]{0,95})?", re.ASCII)
DATA_ID = re.compile(r"[A-Za-z0-9][\w.\-]{0,95}/[A-Za-z0-9][\w.\-]{0,95}", re.ASCII)
# The picture, in its own units of length.
WIDTH, HEIGHT = 640, 320
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 16, 40
MOST_POINTS = 400
TICKS = 5
# Beyond it nothing is a loss: NaN, infinity, a run that blew up.
LARGEST = 1e9


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


def _result(item: EvaluationRecord) -> dict[str, Any]:
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
        f"\n- merged from `{_inline(parent.reference)}` with weight {parent.weight:g}, digest `{parent.digest}`"
        for parent in manifest.parents
    )
    return (
        f"{task}A LoRA adapter of rank {lora.rank} (alpha {lora.alpha:g}, scaling {lora.scaling:g}) on "
        f"{lora.modules_bound} modules of `{hub_id(base.id)}`{revision}.\n\n"
        f"- digest `{manifest.digest}`\n- fingerprint of the base it was made on `{base.fingerprint}`{parents}\n"
    )


def _usage(manifest: AdapterManifest, repo_id: str) -> str:
    """Two programs that run as they are, and ask as the adapter was trained: by chat messages, or by raw text."""
    record, base, tag = manifest.training, hub_id(manifest.base.id), f"v{manifest.version}"
    pinned = manifest.base.revision
    revision = f', revision="{pinned}"' if pinned and is_commit(pinned) else ""
    chats = record.text.of_chats if record and record.text else None
    embedded = (name for name, one in EMBEDDED_BASES.items() if one.base_model == manifest.base.id)
    served = base if revision else next(embedded, base)
    how = {True: "It was trained on chats: ask it with messages.\n\n",
           False: "It was trained on raw text: ask it with a prompt, without the chat template.\n\n",
           None: "What it was trained on is not recorded: ask it as it was trained, with messages or with a prompt.\n\n"}  # fmt: skip
    if chats is False:
        encoded, asked = 'tokenizer("...", return_tensors="pt")', 'prompt="..."'
    else:
        asked = 'messages=[{"role": "user", "content": "..."}]'
        encoded = (
            'tokenizer.apply_chat_template(\n    [{"role": "user", "content": "..."}], add_generation_prompt=True, '
            'return_dict=True, return_tensors="pt"\n)'
        )
    return f"""## How to use

{how[chats]}With plain PEFT:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained("{base}"{revision})
tokenizer = AutoTokenizer.from_pretrained("{base}"{revision})
model = PeftModel.from_pretrained(base, "{repo_id}", revision="{tag}")
asked = {encoded}
answer = model.generate(**asked, max_new_tokens=64)[0, asked["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True))
```

With adapterhub-lite, which checks every byte and the base before it loads anything:

```python
from adapterhub_lite import AdapterRegistry, GenerationRequest, InferenceEngine

registry = AdapterRegistry()
adapter = registry.pull("{repo_id}", revision="{tag}").manifest.reference
with InferenceEngine.from_base("{served}", registry=registry) as engine:
    request = GenerationRequest({asked}, adapter=adapter, max_new_tokens=64)
    print(engine.generate(request).text)
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


def draw_loss(curve: Sequence[tuple[int, float]]) -> bytes | None:
    """The SVG of (step, loss) pairs; None where fewer than two can be drawn. Long curves are thinned out."""
    points = sorted({step: loss for step, loss in curve if abs(loss) < LARGEST}.items())
    if len(points) < 2:
        return None
    points = [*points[: -1 : -(-len(points) // MOST_POINTS)], points[-1]]
    first, last = points[0][0], points[-1][0]
    low, high = min(loss for _, loss in points), max(loss for _, loss in points)
    span = (high - low) or max(abs(high), 1.0)

    def x(step: float) -> str:
        return f"{LEFT + (step - first) / (last - first) * (WIDTH - LEFT - RIGHT):.1f}"

    def y(loss: float) -> str:
        return f"{TOP + (high - loss) / span * (HEIGHT - TOP - BOTTOM):.1f}"

    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        'font-family="sans-serif" font-size="12" fill="#333">',
        f"<title>Training loss, {points[0][1]:.4g} at step {first} to {points[-1][1]:.4g} at step {last}</title>",
        # A ground of its own, so that it can be read on a dark page too.
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
    ]
    for tick in range(TICKS):
        loss = low + span * tick / (TICKS - 1)
        parts.append(f'<path d="M{LEFT} {y(loss)}H{right}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y(loss)}" dy="4" text-anchor="end">{loss:.3g}</text>')
        step = round(first + (last - first) * tick / (TICKS - 1))
        parts.append(f'<text x="{x(step)}" y="{bottom + 16}" text-anchor="middle">{step}</text>')
    line = " ".join(f"{x(step)},{y(loss)}" for step, loss in points)
    parts.append(f'<polyline points="{line}" fill="none" stroke="#2563eb" stroke-width="1.5"/>')
    parts.append(f'<text x="{(LEFT + right) // 2}" y="{HEIGHT - 6}" text-anchor="middle">step</text>')
    parts.append(f'<text x="14" y="{HEIGHT // 2}" transform="rotate(-90 14 {HEIGHT // 2})">loss</text></svg>')
    return "\n".join(parts).encode() + b"\n"
