"""Tensor names that PEFT's own loader would not know, and frozen copies of the base: renamed or dropped, and said.

Works on the bytes of a safetensors file: only its header is written anew, no tensor is loaded but to compare a copy
with the base. What cannot be understood without guessing is refused by the name of its writer.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from adapterhub_lite.adapter_format.safetensors_header import (
    MAX_BASE_HEADER_BYTES,
    TensorEntry,
    read_tensor_entries,
    write_tensors,
)
from adapterhub_lite.adapter_format.tensors import PREFIX, module_and_part, some
from adapterhub_lite.errors import AdapterRejectedError

# Names that wrappers put into a path: torch.compile, FSDP, activation checkpointing.
WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
# `lora_A.default.weight`: the name that the adapter had in the model it was saved from.
ADAPTER_NAME = re.compile(r"(.*\.lora_(?:A|B))\.([A-Za-z0-9_-]+)\.(weight|bias)")
MAGNITUDE = re.compile(r"(.*\.lora_magnitude_vector)(?:\.([A-Za-z0-9_-]+?))??(?:\.weight)?")
COPY = re.compile(
    re.escape(PREFIX) + r"(?P<module>[A-Za-z0-9_.]+?)(?:\.base_layer|\.original_module|\.modules_to_save(?:\.\w+)?)?"
    r"\.(?P<part>weight|bias)"
)
# What the tensors of other kinds of adapters are called, and whose they are.
FOREIGN = (
    (re.compile(r"lora_(unet|te\d?|transformer|prior)_"), "Kohya's format for diffusion models"),
    (re.compile(r"(unet|text_encoder(_\d)?|vae|diffusion_model|transformer\.(single_)?transformer_blocks)\."),
     "a LoRA of diffusers, for a diffusion model"),
    (re.compile(r".*\.lora(_linear_layer)?\.(up|down)\.weight"), "a LoRA of diffusers, for a diffusion model"),
    (re.compile(r".*\.lora_(up|down)\.weight|.*\.hada_w\d|.*\.lokr_w"), "LyCORIS or Kohya's format for diffusion models"),
    (re.compile(r".*\.(lora_[ab]|m)$"), "MLX's names"),
    (re.compile(r"(.*\.)?prompt_embeddings|.*\.ia3_l|.*\.oft_|.*\.lokr_|.*\.loha_"), "another method than LoRA"),
)  # fmt: skip


@dataclass
class Renaming:
    """How a weights file becomes PEFT's: old name -> new name, and which tensors are copies of the base's."""

    names: dict[str, str] = field(default_factory=dict)
    copies: dict[str, tuple[str, str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def changes_nothing(self) -> bool:
        """Whether the file is as PEFT writes it."""
        return not self.copies and all(old == new for old, new in self.names.items())


def plan_renaming(subject: str, entries: Iterable[TensorEntry]) -> Renaming:
    """Find PEFT's names for the tensors of an adapter.

    Raises:
        AdapterRejectedError: the names are those of another kind of adapter, or of several adapters.
    """
    found = Renaming()
    adapters: set[str] = set()
    unwrapped, prefixed = [], []
    for entry in entries:
        name = ".".join(part for part in entry.name.split(".") if part not in WRAPPERS).removeprefix("module.")
        if name != entry.name:
            unwrapped.append(entry.name)
        if module_and_part(name) is None:
            _refuse_foreign(subject, name)
        for pattern in (ADAPTER_NAME, MAGNITUDE):
            match = pattern.fullmatch(name)
            if match and match[2]:
                adapters.add(match[2])
            if match:
                name = f"{match[1]}.{match[3]}" if pattern is ADAPTER_NAME else match[1]
        if not name.startswith(PREFIX) and module_and_part(PREFIX + name):
            prefixed.append(name)
            name = PREFIX + name
        copy = COPY.fullmatch(name)
        if copy and not module_and_part(name):
            found.copies[entry.name] = (copy["module"], copy["part"])
        else:
            found.names[entry.name] = name
    if len(adapters) > 1:
        raise AdapterRejectedError(subject, [f"its weights hold several adapters: {some(sorted(adapters))}"])
    if len(set(found.names.values())) < len(found.names):
        raise AdapterRejectedError(subject, ["two of its tensors have one name once wrappers are taken off"])
    if adapters:
        found.notes.append(f"the adapter's own name {adapters.pop()!r} was taken out of its tensor names")
    if unwrapped:
        found.notes.append(f"what wraps a model was taken out of {len(unwrapped)} tensor names ({some(unwrapped)})")
    if prefixed:
        found.notes.append(f"{len(prefixed)} tensor names lacked PEFT's prefix, which its own loader would not find")
    return found


def _refuse_foreign(subject: str, name: str) -> None:
    for pattern, writer in FOREIGN:
        if pattern.match(name.removeprefix(PREFIX)):
            raise AdapterRejectedError(
                subject, [f"its tensors ({name:.80}) are {writer}; only LoRA as PEFT means it is taken"]
            )


def rewrite(subject: str, source: Path, target: Path, plan: Renaming, base: Path | None) -> list[str]:
    """Write the weights at `source` under PEFT's names to `target`, without the copies of the base's own tensors.

    Returns what to say of it.

    Raises:
        AdapterRejectedError: a copy differs from the base in folder `base`, or there is no base to compare it with.
    """
    notes = list(plan.notes)
    if plan.copies:
        changed = sorted(name for name, where in plan.copies.items() if not _same_as_base(source, name, where, base))
        if changed:
            known = "differ from the base's own" if base else "cannot be compared without the base"
            raise AdapterRejectedError(
                subject,
                [
                    f"it holds whole tensors of the base that {known} ({some(changed)}): trained modules in place of the "
                    "base's (modules_to_save, a resized vocabulary) are not an adapter; train with LoRA on them"
                ],
            )
        notes.append(
            f"{len(plan.copies)} unchanged copies of the base's own tensors were dropped ({some(sorted(plan.copies))})"
        )
    write_tensors(source, target, plan.names)
    return notes


def _same_as_base(source: Path, name: str, where: tuple[str, str], base: Path | None) -> bool:
    """Whether a tensor of the adapter is the base's own, rounded to the adapter's dtype."""
    found = _in_base(base, *where) if base else None
    if found is None:
        return False
    from safetensors import safe_open

    path, own = found
    with safe_open(source, framework="pt") as ours, safe_open(path, framework="pt") as theirs:
        one, other = ours.get_slice(name), theirs.get_slice(own)
        shape = one.get_shape()
        if shape != other.get_shape() or not shape:
            return False
        # In blocks of rows: an embedding may be gigabytes.
        step = max(1, (1 << 22) // max(1, shape[-1]))
        for start in range(0, shape[0], step):
            block = one[start : start + step]
            if not bool((block == other[start : start + step].to(block.dtype)).all()):
                return False
    return True


def _in_base(base: Path, module: str, part: str) -> tuple[Path, str] | None:
    """The file and name of a tensor of the base; a head without one is the embedding."""
    wanted = [f"{module}.{part}", f"{module.partition('.')[2]}.{part}"]
    entries = {
        entry.name: path
        for path in sorted(base.glob("*.safetensors"))
        for entry in read_tensor_entries(path, header_limit=MAX_BASE_HEADER_BYTES)
    }
    if module.endswith("lm_head") and not any(name.endswith("lm_head.weight") for name in entries):
        wanted += [name for name in entries if re.fullmatch(r"(.*\.)?(embed_tokens|wte)\.weight", name)]
    return next(((entries[name], name) for name in wanted if name in entries), None)
