"""An embedding that was resized for an adapter: of its whole copy in the file, the rows of new tokens stay.

PEFT writes embedding and head whole where they were resized (`save_embedding_layers="auto"`), frozen rows of the base and
all. What is not the base's own becomes what PEFT calls `trainable_token_indices`: a few rows by their numbers.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from adapterhub_lite.adapter_format.changes import TOKENS, module_and_part, tensor_name
from adapterhub_lite.adapter_format.lora_config import LoraConfigFile
from adapterhub_lite.adapter_format.strict_reading import (
    MAX_BASE_HEADER_BYTES,
    TensorEntry,
    read_tensor_entries,
)

# Of a tensor in the file that begins with all of the base's own rows: how many those are, and the base's name for it.
OwnRows = Callable[[str], tuple[int, str] | None]


def take_new_rows(
    source: Path, names: dict[str, str], copies: dict[str, tuple[str, str]], config: LoraConfigFile, own_rows: OwnRows
) -> tuple[dict[str, int], dict[str, Any]]:
    """Take resized embeddings out of `copies` and put the rows behind the base's into `names`, as rows of tokens.

    Returns how many rows of each tensor are left out (by its old name), and what the configuration has to say instead.
    """
    entries = {entry.name: entry for entry in read_tensor_entries(source)}
    tokens = _rows_in_file(names, config)
    rows: dict[str, int] = {}
    for name, (module, part) in sorted(copies.items()):
        found = own_rows(name) if part == "weight" else None
        if found is None:
            continue
        first, of_base = found
        new = list(range(first, entries[name].shape[0]))
        shared = module.rpartition(".")[2] not in of_base  # a tied head, whose rows are the embedding's
        trained = tokens.get(module)
        if trained is not None and not set(new) <= set(trained):
            continue  # some rows are in the copy alone: it is refused, whole as it is
        del copies[name]
        if shared:
            tokens.pop(module, None)
        elif trained is None:
            names[name], rows[name], tokens[module] = tensor_name(module, TOKENS), first, new
    if not rows and not _drop_twice(source, names, entries, tokens):
        return {}, {}
    saved = [one for one in config.modules_to_save or () if not _any_is(one, tokens)]
    return rows, {"trainable_token_indices": _indices(tokens, config), "modules_to_save": saved or None}


def _rows_in_file(names: dict[str, str], config: LoraConfigFile) -> dict[str, list[int]]:
    """The modules that have rows of tokens in the file -> their numbers."""
    given = config.trainable_token_indices or {}
    found = {}
    for name in names.values():
        parts = module_and_part(name)
        if parts is None or parts[1] != TOKENS:
            continue
        numbers = given if isinstance(given, list) else next((n for key, n in given.items() if _is(key, parts[0])), [])
        found[parts[0]] = list(numbers)
    return found


def _drop_twice(
    source: Path, names: dict[str, str], entries: dict[str, TensorEntry], tokens: dict[str, list[int]]
) -> bool:
    """Leave out the rows of a module that is not in `tokens` any more, because its weight is the embedding's."""
    gone = [n for n, new in names.items() if (p := module_and_part(new)) and p[1] == TOKENS and p[0] not in tokens]
    for name in gone:
        del names[name]
    return bool(gone)


def _is(name: str, module: str) -> bool:
    return module == name or module.endswith(f".{name}")


def _any_is(name: str, modules: dict[str, list[int]]) -> bool:
    return any(_is(name, module) for module in modules)


def _indices(tokens: dict[str, list[int]], config: LoraConfigFile) -> list[int] | dict[str, list[int]]:
    if len(tokens) == 1 and not isinstance(config.trainable_token_indices, dict):
        return next(iter(tokens.values()))
    return dict(sorted(tokens.items()))


def own_rows(
    source: Path, name: str, where: tuple[str, str], base: Path | None, *, longer: bool
) -> tuple[int, str] | None:
    """The rows and the name of a tensor in the base which is that of the adapter, rounded to the adapter's dtype.

    `longer`: which is the beginning of it. None where it is not.
    """
    found = _in_base(base, *where) if base else None
    if found is None:
        return None
    from safetensors import safe_open

    path, own = found
    with safe_open(source, framework="pt") as ours, safe_open(path, framework="pt") as theirs:
        one, other = ours.get_slice(name), theirs.get_slice(own)
        shape, of_base = one.get_shape(), other.get_shape()
        if not shape or len(shape) != len(of_base) or shape[1:] != of_base[1:] or (shape[0] > of_base[0]) != longer:
            return None
        if shape[0] < of_base[0]:
            return None
        # In blocks of rows: an embedding may be gigabytes.
        step = max(1, (1 << 22) // max(1, shape[-1]))
        for start in range(0, of_base[0], step):
            block = one[start : min(start + step, of_base[0])]
            if not bool((block == other[start : start + step].to(block.dtype)).all()):
                return None
    return of_base[0], own


def _in_base(base: Path, module: str, part: str) -> tuple[Path, str] | None:
    """The file and name of a tensor of the base; a head without one is the embedding."""
    wanted = [f"{module}.{part}", f"{module.partition('.')[2]}.{part}"]
    entries = {
        entry.name: path
        for path in sorted(base.glob("*.safetensors"))
        for entry in read_tensor_entries(path, header_limit=MAX_BASE_HEADER_BYTES)
    }
    if module.endswith("lm_head") and not any(name.endswith("lm_head.weight") for name in entries):
        wanted += [name for name in ("head.weight", "output.weight") if name in entries]
        wanted += [name for name in entries if re.fullmatch(r"(.*\.)?(embed_tokens|wte)\.weight", name)]
    return next(((entries[name], name) for name in wanted if name in entries), None)
