"""An adapter, or a blend of several, as the two files that vLLM loads: verified bytes, in a private folder.

A plain adapter goes over as it is. What vLLM would not read, or reads in some of its versions alone (weights of a blend,
ranks and scales per module), becomes one plain adapter that adds the same: A's stacked, B's side by side with their
factors inside, which is exact. Any other kind of LoRA is refused here, before vLLM sees it.
"""

import hashlib
import json
import shutil
import tempfile
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from adapterhub_lite.adapter_format.changes import LORA_A, LORA_B, module_and_part, tensor_name
from adapterhub_lite.adapter_format.lora_config import HEADS, LoraConfigFile
from adapterhub_lite.adapter_format.manifest import CONFIG_FILE, WEIGHTS_FILE
from adapterhub_lite.adapter_format.strict_reading import read_tensor_entries
from adapterhub_lite.errors import AdapterRejectedError, IntegrityError, ResourceError
from adapterhub_lite.serving.adapters.finding import FoundAdapters
from adapterhub_lite.serving.adapters.sources import AdapterFiles
from adapterhub_lite.serving.adapters.weights import REPAIR, next_load_id

MERGE = (
    "Give vLLM its base with the adapter merged in (`adapterhub-lite merge --into-base`), or serve without --engine."
)


@dataclass(frozen=True)
class RemoteAdapter:
    """An adapter that vLLM has loaded: what is known of it here. Fulfils `Loaded`."""

    rank: int
    modules: int
    nbytes: int
    load_id: int = field(default_factory=next_load_id)
    extras: tuple[object, ...] = ()


def model_name(digest: str) -> str:
    """What vLLM calls an adapter or blend with this digest: always the same bytes under the same name."""
    if digest.count("sha256:") == 1 and "*" not in digest:
        return digest
    return f"blend:{hashlib.sha256(digest.encode()).hexdigest()}"


def write_adapter(found: FoundAdapters, folder: Path, *, max_rank: int | None) -> RemoteAdapter:
    """Write what was found into `folder` for vLLM, which takes ranks up to `max_rank` (None: it says so itself).

    Raises:
        IntegrityError: the bytes are not the recorded ones.
        AdapterRejectedError: a kind of LoRA or a rank that vLLM does not serve; with the way out.
    """
    read = [_verified(files) for files in found.files]
    for files, (config, _) in zip(found.files, read, strict=True):
        refuse_kinds(files, config)
    (config, content), (piece, *more) = read[0], found.pieces
    names = [entry.name for entry in read_tensor_entries(found.files[0].weights)]
    if more or piece.weight != 1.0 or config.rank_pattern or config.alpha_pattern:
        return _write_sum(found, [content for _, content in read], folder, max_rank)
    _check_rank(found.files[0].name, config.r, max_rank)
    (folder / WEIGHTS_FILE).write_bytes(content)
    (folder / CONFIG_FILE).write_bytes(
        config.to_peft(base_id=config.base_model_name_or_path or "", revision=config.revision)
    )
    return RemoteAdapter(config.r, len(names) // 2, len(content))


def refuse_kinds(files: AdapterFiles, config: LoraConfigFile) -> None:
    """Refuse what is no plain LoRA on linear layers, with AdapterRejectedError."""
    parts = [module_and_part(entry.name) for entry in read_tensor_entries(files.weights)]
    other = sorted({part[1] for part in parts if part is not None and part[1] not in (LORA_A, LORA_B)})
    heads = sorted({part[0] for part in parts if part is not None and part[0].rpartition(".")[2] in HEADS})
    problems = []
    if config.beyond_pairs or config.use_dora or config.lora_bias or None in parts or other:
        what = "DoRA" if config.use_dora else ", ".join(other) or "whole parameters"
        problems.append(f"vLLM serves LoRA on linear layers by pairs alone, and it has more ({what}). {MERGE}")
    if heads:
        problems.append(f"it adapts the head ({heads[0]}), which vLLM serves for some models alone. {MERGE}")
    if problems:
        raise AdapterRejectedError(files.name, problems)


def _verified(files: AdapterFiles) -> tuple[LoraConfigFile, bytes]:
    """The configuration and the weights, whose bytes were just compared with the record."""
    assert files.config is not None
    with files.hold():
        try:
            content = files.weights.read_bytes()
        except OSError as error:
            raise IntegrityError(f"The weights of {files.name} cannot be read: {error.strerror}. {REPAIR}") from error
        config = files.config()
    if files.sha256 is not None and hashlib.sha256(content).hexdigest() != files.sha256:
        raise IntegrityError(f"The weights of {files.name} are not the recorded bytes any more. {REPAIR}")
    return config, content


def _check_rank(name: str, rank: int, most: int | None) -> None:
    if most is not None and rank > most:
        raise AdapterRejectedError(
            name,
            [
                f"it has rank {rank}, vLLM was started for ranks up to {most}. Start it for more (--vllm-max-rank), or bring "
                "the rank down: `adapterhub-lite merge --method svd --rank`"
            ],
        )


def _write_sum(found: FoundAdapters, contents: Sequence[bytes], folder: Path, max_rank: int | None) -> RemoteAdapter:
    import torch
    from safetensors.torch import save_file

    from adapterhub_lite.adapter_format.binding import read_pairs

    parts: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = defaultdict(list)
    for files, piece, content in zip(found.files, found.pieces, contents, strict=True):
        for module, pair in read_pairs(content, files.scaling_of).items():
            parts[module].append((pair.a.float(), pair.b.float() * (pair.scaling * piece.weight)))
    ranks = {module: sum(len(a) for a, _ in own) for module, own in parts.items()}
    rank = max(ranks.values())
    _check_rank(found.receipt()[0], rank, max_rank)
    tensors: dict[str, torch.Tensor] = {}
    for module, own in parts.items():
        a, b = torch.cat([a for a, _ in own]), torch.cat([b for _, b in own], dim=1)
        missing = rank - len(a)
        tensors[tensor_name(module, LORA_A)] = torch.cat([a, a.new_zeros(missing, a.shape[1])])
        tensors[tensor_name(module, LORA_B)] = torch.cat([b, b.new_zeros(len(b), missing)], dim=1)
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    # alpha = rank scales by one: the factors are inside.
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank, "bias": "none"}
    (folder / CONFIG_FILE).write_text(json.dumps(config | {"target_modules": sorted(parts)}))
    return RemoteAdapter(rank, len(parts), (folder / WEIGHTS_FILE).stat().st_size)


class Shelf:
    """A folder, readable by its owner alone, with one folder for each adapter that some vLLM has. Thread-safe.

    `place` None makes one that is removed at the end; another is for a vLLM that sees it under the same path.
    """

    def __init__(self, place: Path | None = None) -> None:
        try:
            if place is not None:
                place.mkdir(parents=True, exist_ok=True, mode=0o700)
            self.folder = Path(tempfile.mkdtemp(prefix="adapterhub-vllm-", dir=place)).resolve()
        except OSError as error:
            raise ResourceError(f"No folder for adapters could be made in {place}: {error.strerror}.") from error
        self._lock = threading.Lock()
        self._users: dict[str, set[str]] = defaultdict(set)
        self._written: dict[str, RemoteAdapter] = {}

    def put(self, name: str, user: str, write: Callable[[Path], RemoteAdapter]) -> tuple[Path, RemoteAdapter]:
        """The folder of the adapter `name`, written by `write` unless it is there, and what it holds."""
        target = self.folder / name.replace(":", "-")
        with self._lock:
            self._users[name].add(user)
            if name in self._written:
                return target, self._written[name]
        aside = Path(tempfile.mkdtemp(dir=self.folder))
        try:
            made = write(aside)
            with self._lock:
                if name not in self._written:
                    aside.rename(target)
                    self._written[name] = made
                return target, self._written[name]
        except BaseException as error:
            self.drop(name, user)
            if isinstance(error, OSError):
                raise ResourceError(f"An adapter could not be written to {self.folder}: {error.strerror}.") from error
            raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def drop(self, name: str, user: str) -> None:
        """Remove the folder of an adapter once its last user has dropped it."""
        with self._lock:
            self._users[name].discard(user)
            if self._users[name]:
                return
            del self._users[name]
            if self._written.pop(name, None) is not None:
                shutil.rmtree(self.folder / name.replace(":", "-"), ignore_errors=True)

    def close(self) -> None:
        """Remove it all."""
        shutil.rmtree(self.folder, ignore_errors=True)


def largest_rank(ranks: Mapping[str, int]) -> int:
    """The smallest of the ranks that vLLM can be started for which is enough for all of `ranks` (name -> rank).

    Raises:
        AdapterRejectedError: one is above them all.
    """
    wanted = max(ranks.values(), default=1)
    fitting = [rank for rank in VLLM_RANKS if rank >= wanted]
    if not fitting:
        name = max(ranks, key=lambda one: ranks[one])
        _check_rank(name, wanted, VLLM_RANKS[-1])
    return fitting[0]


# What --max-lora-rank takes.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
