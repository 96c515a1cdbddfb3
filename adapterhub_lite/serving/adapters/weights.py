"""An adapter in memory: its LoRA pairs stacked over layers, read from safetensors. Knows nothing of slots or requests.

The layers of a model repeat one shape, so the pairs of one projection over all layers are one tensor: putting an
adapter into a row of the bank is then a copy per projection, not per layer.
"""

import hashlib
import itertools
import math
import re
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from adapterhub_lite.adapter_format.binding import LoraPair, Pair, bind, lora_pairs, read_pairs
from adapterhub_lite.adapter_format.changes import LORA_A, LORA_B, Change, Structure, module_and_part, read_changes
from adapterhub_lite.adapter_format.lora_config import LoraConfigFile
from adapterhub_lite.adapter_format.strict_reading import read_tensor_entries
from adapterhub_lite.bases.structure import takes_lora
from adapterhub_lite.errors import AdapterRejectedError, IntegrityError

REPAIR = "Pull it again, or add it again from where it came; `adapterhub-lite doctor` lists all that is damaged."


@dataclass(frozen=True)
class Family:
    """Linear modules of one shape at one place of every layer, e.g. all `q_proj`. `paths` is in layer order.

    `name` is the place, with its shape where layers differ in it (Gemma 4's sliding and full attention).
    """

    name: str
    in_features: int
    out_features: int
    paths: tuple[str, ...]


def find_families(model: PreTrainedModel) -> tuple[Family, ...]:
    """Return the families of linear modules of `model` that take a LoRA, inside its layers and outside.

    8-bit and 4-bit layers count: bitsandbytes derives them from `nn.Linear`. So does GPT-2's `Conv1D`, whose weight is
    transposed; its LoRA pairs are not. Left out: the output head, layers that compute more than a product (routers
    that return a choice of experts), to which PEFT cannot add a LoRA either, and layers whose weight alone is read.
    """
    head = model.get_output_embeddings()
    found: dict[tuple[str, int, int], list[str]] = {}
    for path, module in model.named_modules():
        if module is head:
            continue
        if isinstance(module, nn.Linear) and takes_lora(path, module):
            shape = module.in_features, module.out_features
        elif isinstance(module, Conv1D):
            shape = module.nx, module.nf
        else:
            continue
        found.setdefault((re.sub(r"\.\d+\.", ".{}.", path), *shape), []).append(path)
    places = Counter(place for place, *_ in found)
    return tuple(
        Family(place if places[place] == 1 else f"{place} {outs}x{ins}", ins, outs, tuple(paths))
        for (place, ins, outs), paths in found.items()
    )


@dataclass(frozen=True)
class FamilyWeights:
    """The pairs of one family. `layers` are indices into `Family.paths`; n of them.

    `a` (n, rank, in), `b` (n, rank, out) as saved and transposed, of one dtype, that of the widest tensor;
    `scale` (n, 1, 1) float32 for `b`: the scale is folded in when a row is filled, in float32, so that no rounding is
    added here.
    """

    layers: tuple[int, ...]
    a: torch.Tensor
    b: torch.Tensor
    scale: torch.Tensor


# Hashes while another thread parses; it is started at the first load.
_hashing = ThreadPoolExecutor(2, thread_name_prefix="adapterhub-hash")
next_load_id = itertools.count(1).__next__


@dataclass(frozen=True)
class AdapterWeights:
    """All pairs of an adapter, by family name. `rank` is the largest; `modules` how many pairs there are.

    `extras` are changes that no row of a batch can have of its own: such an adapter is computed in a step of its own.
    `load_id` is fresh for each load: what is copied or cached under it can never be taken for another load. `hold`
    goes along with every copy, and ends with the last one: until then the store keeps the version.
    """

    families: dict[str, FamilyWeights]
    rank: int
    modules: int
    load_id: int = field(default_factory=next_load_id)
    hold: object = None
    extras: tuple[Change, ...] = ()

    def tensors(self) -> list[torch.Tensor]:
        """All that is held in memory, in one order."""
        pairs = [t for _, f in sorted(self.families.items()) for t in (f.a, f.b, f.scale)]
        return pairs + [t for change in self.extras for t in change.tensors()]

    @property
    def nbytes(self) -> int:
        """Bytes held in memory."""
        return sum(tensor.nbytes for tensor in self.tensors())

    @property
    def rows(self) -> int:
        """How many tokens base and adapter have rows for, where it brings any of its own; else 0."""
        own = [change for change in self.extras if change.target.kind in ("saved", "tokens") and change.target.shape]
        return max((one.rows for one in own if one.rows > (one.target.shape or (0,))[0]), default=0)

    @property
    def adds_up(self) -> bool:
        """Whether a share of it can be added to shares of others."""
        return all(change.adds_up for change in self.extras)

    def checksum(self) -> int:
        """A checksum of the tensors as they are in host memory now, against bits that flip there (CRC-32)."""
        value = 0
        for tensor in self.tensors():
            value = zlib.crc32(tensor.contiguous().view(-1).view(torch.uint8).numpy().data, value)
        return value

    def has(self, family: str, layer: int) -> bool:
        """Whether there is a pair on a family's layer."""
        return family in self.families and layer in self.families[family].layers

    def product(self, family: str, layer: int, x: torch.Tensor) -> torch.Tensor:
        """scale * (x A^T) B of the pair on a family's layer, in float32, for its input x (..., in)."""
        pair = self.families[family]
        at = pair.layers.index(layer)
        return (x.float() @ pair.a[at].float().T) @ (pair.b[at].float() * pair.scale[at])

    def to(self, device: torch.device | str) -> "AdapterWeights":
        """The same load on another device; on its own device, the same tensors."""
        return self.moved(lambda tensor: tensor.to(device))

    def moved(self, move: Callable[[torch.Tensor], torch.Tensor]) -> "AdapterWeights":
        """The same load with what `move` makes of each tensor."""
        families = {
            name: replace(f, a=move(f.a), b=move(f.b), scale=move(f.scale)) for name, f in self.families.items()
        }
        return replace(self, families=families, extras=tuple(change.moved(move) for change in self.extras))


@dataclass(frozen=True)
class Part:
    """An adapter's weights with the factor on its delta; several of them make a blend."""

    weights: AdapterWeights
    factor: float = 1.0


Parts = tuple[Part, ...]


def read_adapter_weights(
    path: Path,
    families: Sequence[Family],
    scaling_of: Callable[[str], float],
    *,
    max_rank: int,
    subject: str,
    sha256: str | None = None,
    config: Callable[[], LoraConfigFile] | None = None,
    structure: Structure | None = None,
) -> AdapterWeights:
    """Read `path` (safetensors, PEFT's names) for the linear modules in `families`; nothing in it is executed.

    What changes more than those is read by the adapter's `config` for the `structure` of the model, where both are
    given. `scaling_of` gives the scale of a module path such as "model.layers.0.self_attn.q_proj". With `sha256` the very
    bytes that become tensors are hashed, on another thread while they are taken apart.

    Raises:
        IntegrityError: the bytes do not have that sha256, or the disk cannot read them.
        AdapterRejectedError: no safetensors, not for these modules, no module matches, a half pair, a rank above
            `max_rank`, a wrong shape, or values that are not finite. All reasons are listed.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise IntegrityError(f"The weights of {subject} cannot be read: {error.strerror}. {REPAIR}") from error

    def parse() -> AdapterWeights:
        if config is not None and structure is not None:
            settings = config()
            if not _is_plain(settings, path, families):
                return _parse_changes(content, path, families, settings, structure, max_rank, subject)
        return _parse_weights(content, path, families, scaling_of, max_rank, subject)

    if sha256 is None:
        return parse()
    hashing = _hashing.submit(lambda: hashlib.sha256(content).hexdigest())
    try:
        return parse()
    finally:
        # In any case: damaged bytes are damaged, whatever else is wrong with them.
        if hashing.result() != sha256:
            raise IntegrityError(f"The weights of {subject} are not the recorded bytes any more. {REPAIR}")


def _parse_weights(
    content: bytes,
    path: Path,
    families: Sequence[Family],
    scaling_of: Callable[[str], float],
    max_rank: int,
    subject: str,
) -> AdapterWeights:
    try:
        # Shapes stand in the header: nothing is read before they are known to be what the base needs.
        own, problems = lora_pairs(read_tensor_entries(path))
        known = {module: family for family in families for module in family.paths}
        for module, pair in own.items():
            problems += _pair_problems(pair, known.get(module), max_rank)
        if not own and not problems:
            problems.append("it holds no LoRA pair at all, so it would answer like the base")
        if problems:
            raise AdapterRejectedError(subject, problems)
        pairs = read_pairs(content, scaling_of)
    except (SafetensorError, OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise AdapterRejectedError(subject, [f"{path.name} cannot be read: {reason}"]) from error
    if {module: _shapes(pair) for module, pair in own.items()} != {
        module: (tuple(pair.a.shape), tuple(pair.b.shape)) for module, pair in pairs.items()
    }:
        raise AdapterRejectedError(subject, [f"{path.name} changed while it was read"])
    stacked = {f.name: _stack(f, pairs) for f in families if any(p in pairs for p in f.paths)}
    if not all(_finite(tensor) for weights in stacked.values() for tensor in (weights.a, weights.b)):
        broken = [module for module, pair in pairs.items() if not (_finite(pair.a) and _finite(pair.b))]
        raise AdapterRejectedError(subject, [f"{module} holds values that are not finite" for module in broken])
    rank = max(weights.a.shape[1] for weights in stacked.values())
    return AdapterWeights(stacked, rank, len(pairs))


def _is_plain(config: LoraConfigFile, path: Path, families: Sequence[Family]) -> bool:
    """Whether all that an adapter changes are pairs that rows of a batch can have; a file that cannot be read is."""
    try:
        found = [module_and_part(entry.name) for entry in read_tensor_entries(path)]
    except (OSError, ValueError):
        return True
    known = {module for family in families for module in family.paths}
    return not (config.beyond_pairs or config.use_dora or config.lora_bias) and all(
        one is None or one[0] in known for one in found
    )


def _parse_changes(
    content: bytes,
    path: Path,
    families: Sequence[Family],
    config: LoraConfigFile,
    structure: Structure,
    max_rank: int,
    subject: str,
) -> AdapterWeights:
    try:
        problems = bind(config, read_tensor_entries(path), None, structure).problems
        if problems:
            raise AdapterRejectedError(subject, problems)
        changes = read_changes(content, config, structure)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise AdapterRejectedError(subject, [f"{path.name} cannot be read: {error}"]) from error
    broken = [c.target.parameter for c in changes if not all(_finite(tensor) for tensor in c.tensors())]
    if broken:
        raise AdapterRejectedError(subject, [f"{name} holds values that are not finite" for name in broken])
    known = {module for family in families for module in family.paths}
    pairs, extras = {}, []
    for change in changes:
        alone = change.bias is None and change.magnitude is None
        if change.target.kind == "pair" and alone and change.target.module in known:
            assert change.a is not None and change.b is not None
            pairs[change.target.module] = Pair(change.a, change.b, change.scaling)
        else:
            extras.append(change)
    wide = {
        c.target.module: len(c.a)
        for c in changes
        if c.target.kind == "pair" and c.a is not None and len(c.a) > max_rank
    }
    if wide:
        raise AdapterRejectedError(
            subject,
            [
                f"{module} has rank {rank}, the engine takes at most {max_rank}; start it with a larger max_rank"
                for module, rank in wide.items()
            ],
        )
    stacked = {f.name: _stack(f, pairs) for f in families if any(p in pairs for p in f.paths)}
    rank = max((weights.a.shape[1] for weights in stacked.values()), default=config.r)
    return AdapterWeights(stacked, rank, len(changes), extras=tuple(extras))


def _finite(tensor: torch.Tensor) -> bool:
    # One pass and no copy: what is not a number comes through as smallest and largest.
    low, high = torch.aminmax(tensor)
    return math.isfinite(low) and math.isfinite(high)


def _shapes(pair: LoraPair) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return pair.parts[LORA_A].shape, pair.parts[LORA_B].shape


def _pair_problems(pair: LoraPair, family: Family | None, max_rank: int) -> list[str]:
    if family is None:
        return [f"the base has no linear layer {pair.module} that takes a LoRA"]
    if set(pair.parts) != {LORA_A, LORA_B}:
        return [f"{pair.module} has {', '.join(sorted(pair.parts))}, wanted {LORA_A} with its partner {LORA_B}"]
    a, b = _shapes(pair)
    rank = a[0] if len(a) == 2 else 0
    wanted = ((rank, family.in_features), (family.out_features, rank))
    if rank == 0 or (a, b) != wanted:
        return [f"{pair.module} has shapes {a} and {b}, the base needs {wanted[0]} and {wanted[1]}"]
    if rank > max_rank:
        return [f"{pair.module} has rank {rank}, the engine takes at most {max_rank}; start it with a larger max_rank"]
    return []


def _stack(family: Family, pairs: Mapping[str, Pair]) -> FamilyWeights:
    layers = tuple(i for i, path in enumerate(family.paths) if path in pairs)
    own = [pairs[family.paths[i]] for i in layers]
    rank = max(pair.a.shape[0] for pair in own)
    # A file may mix dtypes, and compiled code reads both halves of a pair as one.
    dtype = reduce(torch.promote_types, (half.dtype for pair in own for half in (pair.a, pair.b)))
    a = torch.zeros(len(layers), rank, family.in_features, dtype=dtype)
    b = torch.zeros(len(layers), rank, family.out_features, dtype=dtype)
    for i, pair in enumerate(own):
        width = pair.a.shape[0]
        a[i, :width] = pair.a
        b[i, :width] = pair.b.T
    scale = torch.tensor([pair.scaling for pair in own]).view(-1, 1, 1)
    return FamilyWeights(layers, a, b, scale)
