"""What an adapter changes: each parameter of the base that it names, in which way, and by which tensors of its file.

One description that adding, serving and merging read. W0 is the base's weight, or the adapter's own in its place:

    pair         W = W0 + scaling * B A (arXiv:2106.09685), on a linear layer, an embedding, or each expert of a parameter
    magnitude    each row of that sum scaled to its own length (DoRA, arXiv:2402.09353)
    saved        the adapter's own parameter in place of the base's (PEFT's `modules_to_save`)
    tokens       some rows of an embedding in place of the base's (PEFT's `trainable_token_indices`)

Rows that the base has not, of tokens added for the adapter, are those behind its own: of `saved` and `tokens`.

Which tensors those are follows PEFT 0.21. Torch is imported where values are read, and only there.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from adapterhub_lite.adapter_format.lora_config import ALL_LINEAR, LoraConfigFile, named, values_for

if TYPE_CHECKING:
    import torch

PREFIX = "base_model.model."
LORA_A, LORA_B = "lora_A.weight", "lora_B.weight"
LORA_BIAS, DORA_MAGNITUDE = "lora_B.bias", "lora_magnitude_vector"
EMBEDDING_A, EMBEDDING_B = "lora_embedding_A", "lora_embedding_B"
TOKENS = "token_adapter.trainable_tokens_delta"
PAIRED = frozenset({LORA_A, EMBEDDING_A})
# A parameter of a module of which several are adapted lies one wrapper deeper than the next.
NESTED = ".base_layer"
TENSOR_NAME = re.compile(
    re.escape(PREFIX)
    + r"(?P<module>[A-Za-z0-9_]+(?:\.[A-Za-z0-9_]+){0,30})\."
    + rf"(?P<part>{'|'.join(map(re.escape, (LORA_A, LORA_B, LORA_BIAS, DORA_MAGNITUDE, EMBEDDING_A, EMBEDDING_B, TOKENS)))})"
)
PARAMETER_NAME = re.compile(re.escape(PREFIX) + r"(?P<parameter>[A-Za-z0-9_]+(?:\.[A-Za-z0-9_]+){0,30})")
Kind = Literal["pair", "embedding", "parameter", "saved", "tokens"]


def tensor_name(module: str, part: str) -> str:
    """The name in a PEFT file of one part (`LORA_A`, ...) of what is on `module`."""
    return f"{PREFIX}{module}.{part}"


def module_and_part(name: str) -> tuple[str, str] | None:
    """The module that a tensor belongs to and which part of its change it is; None where it is no LoRA weight."""
    match = TENSOR_NAME.fullmatch(name)
    return (match["module"], match["part"]) if match else None


@dataclass(frozen=True)
class Structure:
    """The parameters of a model by its own names, in its order, with their shapes; and which modules are what.

    `transposed` are modules whose weight is (in, out): GPT-2's `Conv1D`, and experts that say so. `linear` are modules
    that a pair is put on as on a linear layer; None where only the names in the files are known.
    """

    parameters: Mapping[str, tuple[int, ...]]
    embeddings: frozenset[str] = frozenset()
    linear: frozenset[str] | None = None
    transposed: frozenset[str] = frozenset()
    embedding: str | None = None
    head: str | None = None
    tied: bool = False

    @property
    def matrices(self) -> dict[str, tuple[int, ...]]:
        """The modules that hold a matrix: name -> shape."""
        found: dict[str, tuple[int, ...]] = {
            name.removesuffix(".weight"): shape
            for name, shape in self.parameters.items()
            if name.endswith(".weight") and len(shape) == 2
        }
        if self.tied and self.head and self.embedding and self.head not in found:
            found[self.head] = found[self.embedding]
        return found

    def shape_of(self, parameter: str) -> tuple[int, ...] | None:
        """The shape of a parameter; a tied head's is the embedding's."""
        if self.tied and self.head and self.embedding and parameter == f"{self.head}.weight":
            return self.parameters.get(f"{self.embedding}.weight")
        return self.parameters.get(parameter)


@dataclass(frozen=True)
class Target:
    """One parameter that an adapter changes, and where in its file the tensors lie: under `holder`.

    `shape` is that of the parameter in the base, None where that is not known.
    """

    parameter: str
    kind: Kind
    holder: str
    shape: tuple[int, ...] | None = None
    tokens: tuple[int, ...] = ()
    transposed: bool = False
    also_head: str | None = None  # whose rows the tokens are too, because its weight is the embedding's

    @property
    def module(self) -> str:
        """The module that has the parameter."""
        return self.parameter.rpartition(".")[0]

    @property
    def key(self) -> str:
        """What patterns of ranks and alphas are held against: a module, or a parameter that was named itself."""
        return self.parameter if self.kind == "parameter" else self.module

    @property
    def new_tokens(self) -> tuple[int, ...]:
        """Those of its tokens that the base has no row for."""
        return tuple(token for token in self.tokens if self.shape and token >= self.shape[0])

    def parts(self, config: LoraConfigFile) -> set[str]:
        """The parts that have to be in the file."""
        if self.kind == "pair":
            bias = {LORA_BIAS} if config.lora_bias else set()
            return {LORA_A, LORA_B} | bias | ({DORA_MAGNITUDE} if config.use_dora else set())
        if self.kind == "embedding":
            return {EMBEDDING_A, EMBEDDING_B}
        return {"parameter": {LORA_A, LORA_B}, "tokens": {TOKENS}, "saved": {""}}[self.kind]


def targets_of(config: LoraConfigFile, structure: Structure, present: Iterable[str]) -> list[Target]:
    """Every parameter that an adapter of this configuration changes in a base.

    `present` are the modules that have a pair in the file, for `all-linear`, and for a head tied to what is targeted.

    Raises:
        PatternError: a pattern takes too long.
    """
    present = set(present)
    matrices = structure.matrices
    if config.target_modules == ALL_LINEAR:
        # Which matrices are those of linear layers stands in no header; what has a pair is one.
        wanted = {module for module in present if module in matrices}
    else:
        wanted = config.targets(matrices) if config.target_modules else set()
        if structure.linear is not None and isinstance(config.target_modules, str):
            wanted &= structure.linear | structure.embeddings
    if config.ensure_weight_tying and structure.tied and structure.embedding in wanted and structure.head in present:
        wanted.add(structure.head or "")
    if endings := config.saved_modules:
        wanted = {module for module in wanted if not any(one.endswith(endings) for one in _around(f"{module}.weight"))}
    found = [
        Target(
            f"{module}.weight",
            "embedding" if module in structure.embeddings else "pair",
            module,
            matrices[module],
            transposed=module in structure.transposed,
        )
        for module in sorted(wanted)
    ]
    return found + _parameters(config, structure) + _saved(config, structure) + _tokens(config, structure)


def _parameters(config: LoraConfigFile, structure: Structure) -> list[Target]:
    if not config.target_parameters:
        return []
    ends = tuple(f".{one}" for one in config.target_parameters)
    chosen = [name for name in structure.parameters if name in config.target_parameters or name.endswith(ends)]
    found = []
    for place, name in enumerate(chosen):
        module = name.rpartition(".")[0]
        # In the order of the module's own parameters, the first is wrapped first and lies deepest.
        deeper = sum(later.rpartition(".")[0] == module for later in chosen[place + 1 :])
        shape = structure.parameters[name]
        found.append(
            Target(name, "parameter", module + NESTED * deeper, shape, transposed=module in structure.transposed)
        )
    return found


def _saved(config: LoraConfigFile, structure: Structure) -> list[Target]:
    # A head that shares nothing is saved only where it is named.
    endings = config.saved_modules if structure.tied else tuple(config.modules_to_save or ())
    if not endings:
        return []
    names = dict(structure.parameters)
    if structure.tied and structure.head:
        names[f"{structure.head}.weight"] = structure.shape_of(f"{structure.head}.weight") or ()
    return [
        Target(name, "saved", name, shape)
        for name, shape in names.items()
        if any(one.endswith(endings) for one in _around(name))
    ]


def _around(parameter: str) -> list[str]:
    """The modules that a parameter lies in, the innermost first."""
    parts = parameter.split(".")[:-1]
    return [".".join(parts[:end]) for end in range(len(parts), 0, -1)]


def _tokens(config: LoraConfigFile, structure: Structure) -> list[Target]:
    given = config.trainable_token_indices
    if not given:
        return []
    asked = given if isinstance(given, dict) else {structure.embedding or "": given}
    layers = {module: tokens for name, tokens in asked.items() for module in named([name], structure.matrices)}
    ends = {structure.embedding, structure.head}
    found = []
    for module, tokens in layers.items():
        of_tied = structure.tied and module in ends
        if of_tied and module == structure.head and layers.get(structure.embedding or "") == tokens:
            continue  # one set of rows, which lies with the embedding
        also = structure.head if of_tied and module == structure.embedding else None
        if also in layers and layers[also or ""] != tokens:
            also = None
        found.append(
            Target(f"{module}.weight", "tokens", module, structure.matrices[module], tuple(tokens), also_head=also)
        )
    return found


def is_saved(name: str, modules_to_save: Sequence[str] | None) -> str | None:
    """The parameter that a tensor stands in place of, where it lies in one of `modules_to_save`."""
    match = PARAMETER_NAME.fullmatch(name)
    endings = tuple(modules_to_save or ())
    if match is None or not endings or module_and_part(name):
        return None
    return match["parameter"] if any(one.endswith(endings) for one in _around(match["parameter"])) else None


@dataclass(frozen=True)
class Change:
    """The change of one parameter, with its tensors as they are stored.

    `a`, `b` and `scaling` are the pair's; `bias` (out,) is added to what the layer gives, scaled too; `value` is a saved
    parameter, or the rows (n, D) of `target.tokens`.
    """

    target: Target
    a: "torch.Tensor | None" = None
    b: "torch.Tensor | None" = None
    scaling: float = 1.0
    bias: "torch.Tensor | None" = None
    magnitude: "torch.Tensor | None" = None
    value: "torch.Tensor | None" = None

    @property
    def rows(self) -> int:
        """Rows of the parameter as the adapter changes it: more than the base's where it brings tokens along."""
        base = self.target.shape[0] if self.target.shape else 0
        if self.target.kind == "saved" and self.value is not None:
            return self.value.shape[0] if self.value.dim() else base
        return max((base, *(token + 1 for token in self.target.tokens)))

    @property
    def adds_up(self) -> bool:
        """Whether shares of it can be added to shares of others: what is put in place of something cannot."""
        return self.value is None and self.magnitude is None

    def tensors(self) -> list["torch.Tensor"]:
        """All that is held in memory."""
        return [t for t in (self.a, self.b, self.bias, self.magnitude, self.value) if t is not None]

    def moved(self, move: Callable[["torch.Tensor"], "torch.Tensor"]) -> "Change":
        """The same with what `move` makes of each tensor."""
        names = ("a", "b", "bias", "magnitude", "value")
        own: dict[str, Any] = {n: move(t) for n in names if (t := getattr(self, n)) is not None}  # by field
        return replace(self, **own)

    def delta(self) -> "torch.Tensor":
        """scaling * B A in float32, laid out as the parameter is."""
        assert self.a is not None and self.b is not None
        a, b, shape = self.a.float(), self.b.float(), self.target.shape
        if self.target.kind == "embedding":
            return (b @ a).T * self.scaling
        if self.target.kind != "parameter" or shape is None or len(shape) == 2:
            product = b @ a * self.scaling
            return product.T if self.target.transposed and self.target.kind == "pair" else product
        # (experts * rank, in) and (out, rank * experts), with the experts' places as PEFT reads them.
        experts = shape[0]
        a = a.reshape(experts, -1, a.shape[-1])
        b = b.reshape(b.shape[0], -1, experts).permute(2, 0, 1)
        product = b @ a * self.scaling
        return product.transpose(1, 2) if self.target.transposed else product

    def applied(self, weight: "torch.Tensor") -> "torch.Tensor":
        """The changed parameter in float32, for the base's own; longer than that by the rows of new tokens."""
        weight = weight.float()
        if self.target.kind == "saved":
            assert self.value is not None
            return self.value.float().to(weight.device)
        if self.target.kind == "tokens":
            assert self.value is not None
            changed = weight.new_zeros(max(self.rows, len(weight)), *weight.shape[1:])
            changed[: len(weight)] = weight
            changed[list(self.target.tokens)] = self.value.float().to(weight.device)
            return changed
        turned = weight + self.delta().to(weight.device)
        if self.magnitude is None:
            return turned
        across = 0 if self.target.transposed else 1
        ratio = self.magnitude.float().to(weight.device) / turned.norm(dim=across)
        return turned * (ratio[None, :] if self.target.transposed else ratio[:, None])


def read_changes(weights: Path | bytes, config: LoraConfigFile, structure: Structure) -> list[Change]:
    """Read the (validated) weights of an adapter, a file or its bytes, in the dtype of the file."""
    from safetensors.torch import load

    # Not by safe_open: safetensors 0.8 never gives back 60 bytes of each tensor got so, which adds up in a server.
    tensors = load(weights if isinstance(weights, bytes) else weights.read_bytes())
    held = {found[0] for name in tensors if (found := module_and_part(name)) and found[1] in PAIRED}
    targets = targets_of(config, structure, held)
    scalings = scalings_of(config, targets)
    changes = []
    for target in targets:
        if target.kind == "saved":
            changes.append(Change(target, value=tensors[PREFIX + target.holder]))
            continue
        own = {part: tensors[tensor_name(target.holder, part)] for part in target.parts(config)}
        a, b = own.get(LORA_A, own.get(EMBEDDING_A)), own.get(LORA_B, own.get(EMBEDDING_B))
        bias, magnitude, value = own.get(LORA_BIAS), own.get(DORA_MAGNITUDE), own.get(TOKENS)
        changes.append(Change(target, a, b, scalings[target], bias, magnitude, value))
    return changes


def ranks_of(config: LoraConfigFile, targets: Iterable[Target]) -> dict[Target, int]:
    """The rank of each pair."""
    targets = list(targets)
    own = values_for(config.rank_pattern, [target.key for target in targets])
    return {target: own.get(target.key, config.r) for target in targets}


def scalings_of(config: LoraConfigFile, targets: Iterable[Target]) -> dict[Target, float]:
    """The factor on B A of each pair."""
    targets = list(targets)
    ranks = ranks_of(config, targets)
    alphas = values_for(config.alpha_pattern, [target.key for target in targets])
    return {
        target: float(alphas.get(target.key, config.lora_alpha)) / (rank**0.5 if config.use_rslora else rank)
        for target, rank in ranks.items()
    }
