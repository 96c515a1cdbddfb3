"""The probes: a few prompts and the logits an adapter gave for them, kept beside it and asked again later.

It catches by behaviour what no checksum of the adapter can: a moved base, a renamed module, a wrong alpha, a changed
quantisation. Knows models that map `input_ids` to `.logits`; knows no adapter format. Torch is imported on use.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterhub_lite.adapter_format.strict_reading import nonfinite_tensors, read_tensor_entries
from adapterhub_lite.errors import AdapterRejectedError, IntegrityError

if TYPE_CHECKING:
    import torch

PROBES_FILE = "probes.safetensors"
PROBES_FORMAT = "adapterhub-probes-1"
PROBES_TENSORS = {"tokens": "I64", "lengths": "I64", "top_ids": "I64", "top_logits": "F32"}
TOP_K = 16
MAX_PROBES = 64
MAX_PROBE_TOKENS = 512
# The prompts are kept as token ids, so that a replay needs no tokenizer; they only have to differ from each other.
DEFAULT_PROBES = (
    "The capital of France is",
    "def add(a, b):\n    return",
    "SELECT name FROM users WHERE",
    '{"event": "meeting", "date": "',
    "Once upon a time, in a village by the sea,",
    "7 + 5 = 12. 9 + 8 =",
)
# Largest difference of a logit, as a fraction of the largest logit in the probe, between two sound runs: other
# kernels, thread counts and batch shapes. Half the mantissa bits of a dtype are lost on the way through a network.
TOLERANCES = {"float32": 2e-4, "float16": 1e-2, "bfloat16": 4e-2}


@dataclass(frozen=True)
class ProbeResult:
    """How far a model is from the recorded logits, in units of logits; `tolerance` belongs to the coarser dtype."""

    max_abs_difference: float
    tolerance: float
    passed: bool


@dataclass(frozen=True)
class Probes:
    """Probes as read from disk. `prompts` are token ids; `top_ids` and `top_logits` are (probes, TOP_K)."""

    prompts: tuple[tuple[int, ...], ...]
    top_ids: "torch.Tensor"
    top_logits: "torch.Tensor"
    dtype: str

    def check_vocabulary(self, tokens: int) -> None:
        """Raise IntegrityError unless a model with a vocabulary of so many tokens can be asked and compared."""
        largest = max(int(self.top_ids.max()), *(max(ids) for ids in self.prompts))
        if largest >= tokens:
            raise IntegrityError(f"The probes name token {largest}; the model's vocabulary has {tokens}.")


def write_probes(model: Any, tokenizer: Any, folder: str | Path, prompts: Sequence[str] = DEFAULT_PROBES) -> Path:
    """Record the top logits of `model` after each of `prompts` as `folder`/probes.safetensors; returns its path.

    The model is asked in evaluation mode and left in the mode it was in.

    Raises:
        AdapterRejectedError: a logit is NaN or infinite.
    """
    import torch
    from safetensors.torch import save

    encoded = [tuple(tokenizer(prompt, add_special_tokens=True)["input_ids"])[:MAX_PROBE_TOKENS] for prompt in prompts]
    logits = _ask(model, encoded)
    if not torch.isfinite(logits).all():
        raise AdapterRejectedError("The model", ["its logits for the probe prompts are NaN or infinite"])
    top = logits.topk(min(TOP_K, logits.shape[-1]), dim=-1)
    lengths = torch.tensor([len(ids) for ids in encoded])
    tokens = torch.zeros(len(encoded), int(lengths.max()), dtype=torch.int64)
    for row, ids in enumerate(encoded):
        tokens[row, : len(ids)] = torch.tensor(ids)
    content = save(
        {
            "tokens": tokens,
            "lengths": lengths,
            "top_ids": top.indices.contiguous(),
            "top_logits": top.values.contiguous(),
        },
        metadata={"format": PROBES_FORMAT, "dtype": _dtype_name(model)},
    )
    path = Path(folder) / PROBES_FILE
    aside = path.with_name(f".{PROBES_FILE}.{os.getpid()}.tmp")
    aside.write_bytes(content)
    aside.replace(path)
    return path


def replay_probes(model: Any, folder_or_path: str | Path) -> ProbeResult:
    """Ask `model` (with the adapter on it) the recorded probes again and compare.

    Raises:
        IntegrityError: the file holds no probes, or its tokens are outside the model's vocabulary.
    """
    probes = read_probes(folder_or_path)
    weight = model.get_input_embeddings().weight
    # Split over processes by ZeRO-3, a weight is empty outside its module, and says its shape elsewhere.
    probes.check_vocabulary(getattr(weight, "ds_shape", weight.shape)[0])
    return compare_logits(probes, _ask(model, probes.prompts), _dtype_name(model))


def compare_logits(probes: Probes, logits: "torch.Tensor", dtype: str) -> ProbeResult:
    """How far `logits` (probes, vocabulary), of a model in `dtype` ("bfloat16", ...), are from the recorded ones."""
    import torch

    asked = logits.gather(1, probes.top_ids)
    worst = float((asked - probes.top_logits).abs().max()) if torch.isfinite(asked).all() else float("inf")
    fraction = max(TOLERANCES.get(name, max(TOLERANCES.values())) for name in (probes.dtype, dtype))
    tolerance = fraction * max(1.0, float(probes.top_logits.abs().max()))
    return ProbeResult(max_abs_difference=worst, tolerance=tolerance, passed=worst <= tolerance)


def probes_problems(path: Path) -> list[str]:
    """What is wrong with the probes file at `path` by its header and values, before anything loads it. No torch."""
    try:
        entries = read_tensor_entries(path)
    except ValueError as error:
        return [str(error)]
    if {entry.name: entry.dtype for entry in entries} != PROBES_TENSORS:
        return [f"{path.name} does not hold exactly {', '.join(PROBES_TENSORS)}"]
    return [f"{path.name} holds NaN or infinity"] if any(nonfinite_tensors(path, entries)) else []


def read_probes(folder_or_path: str | Path) -> Probes:
    """Read and check a probes file, given it or its folder.

    Raises:
        IntegrityError: it is not there, or holds no probes.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(folder_or_path)
    path = path / PROBES_FILE if path.is_dir() else path
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError) as error:
        raise IntegrityError(f"{path.name} could not be read as probes: {error}.") from error
    if metadata.get("format") != PROBES_FORMAT or set(found) != set(PROBES_TENSORS):
        raise IntegrityError(f"{path.name} holds no probes of this format ({PROBES_FORMAT}).")
    tokens, lengths = found["tokens"], found["lengths"]
    probes, longest = tokens.shape if tokens.dim() == 2 else (0, 0)
    shapes_fit = (
        0 < probes <= MAX_PROBES
        and longest <= MAX_PROBE_TOKENS
        and lengths.shape == (probes,)
        and found["top_ids"].shape == found["top_logits"].shape
        and found["top_ids"].dim() == 2
        and len(found["top_ids"]) == probes
        and found["top_ids"].numel() > 0
    )
    if not shapes_fit or not (int(lengths.min()) > 0 and int(lengths.max()) <= longest):
        raise IntegrityError(f"{path.name} holds shapes that probes never have.")
    if int(tokens.min()) < 0 or int(found["top_ids"].min()) < 0:
        raise IntegrityError(f"{path.name} holds negative token ids.")
    prompts = tuple(tuple(row[:length].tolist()) for row, length in zip(tokens, lengths.tolist(), strict=True))
    return Probes(prompts, found["top_ids"], found["top_logits"], metadata.get("dtype", ""))


def _ask(model: Any, prompts: Sequence[Sequence[int]]) -> "torch.Tensor":
    """Logits in fp32 on the CPU after each prompt, (probes, vocabulary); each asked alone: no padding counts."""
    import torch

    device = model.get_input_embeddings().weight.device
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            answers = [
                model(input_ids=torch.tensor([list(ids)], device=device), use_cache=False).logits[0, -1].float().cpu()
                for ids in prompts
            ]
    finally:
        model.train(was_training)
    return torch.stack(answers)


def _dtype_name(model: Any) -> str:
    # The base decides: a LoRA in fp32 on a bf16 base still answers with bf16's precision.
    return str(model.get_input_embeddings().weight.dtype).removeprefix("torch.")
