"""Our own strict reading of `adapter_config.json`: what decides the answers, what is inert, and nothing that acts.

PEFT's configuration can name modules to import and files to load; of those keys only the value that does nothing is
accepted. What passes is written out again by `to_peft`, so that what is kept was made here.

Which modules it means follows PEFT 0.21 (`check_target_module_exists`, `get_pattern_key`). A pattern is a regular
expression from whoever wrote the file, and Python's `re` may take forever over one: the engine here gives up in time.
"""

import json
import math
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, Literal, TypeVar

import regex
from pydantic import AfterValidator, Field, StringConstraints, ValidationError, model_validator

from adapterhub_lite.adapter_format.strict_reading import StrictModel, strict_json

Value = TypeVar("Value")

# For all patterns of one question and all modules of a base together; honest ones take milliseconds.
MATCH_SECONDS = 2.0
MAX_PATTERN = 2000
# `a{1000}{1000}` is unrolled when it is compiled, so counts are bounded together.
MAX_REPEATS = 1000
REPEAT = re.compile(r"\{(\d*)(?:,(\d*))?\}")
PLAIN_NAME = r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*"


class PatternError(ValueError):
    """A pattern that is no regular expression, or that takes too long."""


@lru_cache(maxsize=4096)
def is_plain(name: str) -> bool:
    """Whether `name` is the name of a module or its ending, and no pattern."""
    return re.fullmatch(PLAIN_NAME, name) is not None


def checked(pattern: str) -> str:
    """`pattern`, which Python's `re` has to compile too: PEFT uses that.

    Raises:
        PatternError: it is no regular expression, or unrolls into a huge one.
    """
    repeats = math.prod(max(int(n) for n in pair if n) for pair in REPEAT.findall(pattern) if any(pair))
    try:
        if repeats > MAX_REPEATS:
            raise PatternError(f"{pattern!r:.80} repeats parts of itself {min(repeats, 10**9)} times")
        re.compile(pattern)
        _compiled(pattern)
    except (re.error, regex.error, RecursionError, OverflowError) as error:
        raise PatternError(f"{pattern!r:.80} is no regular expression: {error!s:.80}") from None
    return pattern


ModuleName = Annotated[str, StringConstraints(pattern=rf"^{PLAIN_NAME}$", max_length=200)]
Pattern = Annotated[str, StringConstraints(min_length=1, max_length=MAX_PATTERN), AfterValidator(checked)]


def named(names: Sequence[str] | str | None, modules: Iterable[str]) -> set[str]:
    """Those of `modules` that `names` mean: a pattern has to fit a whole name, a list holds names or their endings.

    Raises:
        PatternError: the pattern takes too long.
    """
    if not names:
        return set()
    if isinstance(names, str):
        clock = _Clock()
        return {module for module in modules if clock.match(names, module, whole=True)}
    whole, endings = frozenset(names), tuple(f".{name}" for name in names)
    return {module for module in modules if module in whole or module.endswith(endings)}


def values_for(patterns: Mapping[str, Value], modules: Iterable[str]) -> dict[str, Value]:
    """The value of the first key of `patterns` that fits the end of each module, from a dot on; others are left out.

    Raises:
        PatternError: a pattern takes too long.
    """
    clock = _Clock()
    found = {}
    for module in modules:
        for key, value in patterns.items():
            if _ends_with(module, key) if is_plain(key) else clock.match(rf"(.*\.)?({key})$", module):
                found[module] = value
                break
    return found


def layer_indices(modules: Iterable[str], layers_pattern: Sequence[str] | str | None) -> dict[str, int]:
    """The index of the layer that each module lies in: the first number in its name, or the one behind a pattern.

    Raises:
        PatternError: a pattern takes too long.
    """
    patterns = [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern
    forms = [rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\." for pattern in patterns or ()] or [r".*?\.[^.]*\.(?P<idx>\d+)\."]
    clock = _Clock()
    found = {}
    for module in modules:
        match = next((match for form in forms if (match := clock.match(form, module))), None)
        if match:
            found[module] = int(match["idx"])
    return found


class _Clock:
    """Matches until this thread has computed for so long."""

    def __init__(self) -> None:
        self._end = time.thread_time() + MATCH_SECONDS

    def match(self, pattern: str, text: str, *, whole: bool = False) -> "regex.Match[str] | None":
        compiled = _compiled(pattern)
        try:
            if time.thread_time() > self._end:
                raise TimeoutError
            look = compiled.fullmatch if whole else compiled.match
            return look(text, timeout=MATCH_SECONDS)
        except TimeoutError:
            raise PatternError(f"the pattern {pattern!r:.80} takes too long on {text!r:.80}") from None


def _ends_with(module: str, key: str) -> bool:
    """What `(.*\\.)?(key)$` says of a plain `key`, in which a dot fits any character."""
    before, tail = len(module) - len(key), module[-len(key) :]
    if before < 0 or (before > 0 and module[before - 1] != "."):
        return False
    return tail == key or ("." in key and all(k in (".", t) for k, t in zip(key, tail, strict=True)))


@lru_cache(maxsize=4096)
def _compiled(pattern: str) -> "regex.Pattern[str]":
    return regex.compile(pattern, flags=regex.VERSION0)


MAX_CONFIG_BYTES = 1 << 20
MAX_RANK = 1024
MAX_SCALING = 64.0
MAX_TARGETS = 10_000
ALL_LINEAR = "all-linear"

Rank = Annotated[int, Field(gt=0, le=MAX_RANK)]
Alpha = Annotated[float, Field(gt=0, le=MAX_RANK * MAX_SCALING, allow_inf_nan=False)]
# Which head PEFT would put on the model; of a LoRA on a causal base it changes nothing.
TaskType = Literal["CAUSAL_LM", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"]
Layer = Annotated[int, Field(ge=0, lt=10_000)]
Tokens = Annotated[list[Annotated[int, Field(ge=0, lt=1 << 24)]], Field(max_length=MAX_TARGETS)]
# What families call their output heads.
HEADS = ("lm_head", "embed_out", "output_layer")
LATER = ("target_parameters", "modules_to_save", "trainable_token_indices", "ensure_weight_tying")

# key -> why it is refused when it is set to something. Null, false and empty do nothing, nor does what HARMLESS has.
ACTING: dict[str, str] = {
    "auto_mapping": "it names a library to import",
    "megatron_config": "it configures a library to import",
    "megatron_core": "it names a library to import",
    "loftq_config": "it changes the base's weights at load",
    "corda_config": "it names files to load",
    "lora_ga_config": "it names files to load",
    "velora_config": "this variant is not supported",
    "monteclora_config": "this variant is not supported",
    "kasa_config": "this variant is not supported",
    "arrow_config": "this variant is not supported",
    "alora_invocation_tokens": "this variant is not supported",
    "use_qalora": "this variant is not supported",
    "qalora_group_size": "this variant is not supported",
    "use_bdlora": "this variant is not supported",
    "layer_replication": "it makes the base grow",
    "init_lora_weights": (
        "this initialisation changes the base's weights, so the adapter alone does not say what it does; convert it to "
        "a plain LoRA (PEFT: save_pretrained with path_initial_model_for_weight_conversion)"
    ),
    "bias": "biases of the base are not part of an adapter",
}
HARMLESS: dict[str, tuple[Any, ...]] = {
    "megatron_core": ("megatron.core",),
    "qalora_group_size": (16,),
    "init_lora_weights": (True, "gaussian", "orthogonal", "eva"),
    "bias": ("none",),
}
# What a training run set up its adapter with; it says nothing about the adapter that came out.
SPENT = frozenset({"eva_config", "runtime_config"})


class LoraConfigFile(StrictModel):
    """The keys of `adapter_config.json` that decide something; the inert ones have been checked and dropped."""

    peft_type: Literal["LORA"]
    task_type: TaskType | None = None
    peft_version: Annotated[str, Field(max_length=80)] | None = None
    base_model_name_or_path: Annotated[str, Field(max_length=500)] | None = None
    revision: Annotated[str, Field(max_length=100)] | None = None
    inference_mode: bool = True
    r: Rank
    lora_alpha: Alpha
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: Annotated[list[ModuleName], Field(max_length=MAX_TARGETS)] | Pattern = Field(default_factory=list)
    exclude_modules: Annotated[list[ModuleName], Field(max_length=MAX_TARGETS)] | Pattern | None = None
    layers_to_transform: list[Layer] | Layer | None = None
    layers_pattern: list[Pattern] | Pattern | None = None
    fan_in_fan_out: bool = False
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    rank_pattern: dict[Pattern, Rank] = Field(default_factory=dict, max_length=MAX_TARGETS)
    alpha_pattern: dict[Pattern, Alpha] = Field(default_factory=dict, max_length=MAX_TARGETS)
    target_parameters: Annotated[list[ModuleName], Field(max_length=MAX_TARGETS)] | None = None
    modules_to_save: Annotated[list[ModuleName], Field(max_length=MAX_TARGETS)] | None = None
    trainable_token_indices: Tokens | dict[ModuleName, Tokens] | None = None
    ensure_weight_tying: bool = False

    @model_validator(mode="after")
    def _adapts_something(self) -> "LoraConfigFile":
        if not (self.target_modules or self.target_parameters or self.modules_to_save or self.trainable_token_indices):
            raise ValueError("it names nothing to adapt: target_modules is empty, and so is all else that could")
        return self

    @property
    def saved_modules(self) -> tuple[str, ...]:
        """Endings of the names of modules that are saved whole; with ensured tying, heads are that share such a weight."""
        own = tuple(self.modules_to_save or ())
        return own + HEADS if own and self.ensure_weight_tying else own

    @property
    def beyond_pairs(self) -> bool:
        """Whether it changes more than linear layers by pairs, so that a base's layers alone do not say what fits."""
        return bool(self.target_parameters or self.modules_to_save or self.trainable_token_indices)

    def deciding(self) -> dict[str, Any]:
        """What decides the answers: part of the adapter's digest, so a key is never added or renamed here."""
        return {
            "r": self.r,
            "lora_alpha": float(self.lora_alpha),
            "target_modules": _listed(self.target_modules),
            "exclude_modules": _listed(self.exclude_modules or ()),
            "layers_to_transform": self.layers_to_transform,
            "layers_pattern": self.layers_pattern,
            "fan_in_fan_out": self.fan_in_fan_out,
            "use_rslora": self.use_rslora,
            "use_dora": self.use_dora,
            "lora_bias": self.lora_bias,
            # Pairs in a list: the first pattern that fits wins, so their order counts.
            "rank_pattern": [list(pair) for pair in self.rank_pattern.items()],
            "alpha_pattern": [[key, float(value)] for key, value in self.alpha_pattern.items()],
            # These came later: they are left out where they are not set, so that no digest changed.
            **{key: _listed(value) for key in LATER if (value := getattr(self, key))},
        }

    def to_peft(self, *, base_id: str, revision: str | None) -> bytes:
        """The `adapter_config.json` that is kept: plain PEFT, naming the base by its id and no path of this machine."""
        # exclude_none: what PEFT fills in by itself need not be said, and an older PEFT does not know every key.
        kept = self.model_dump(mode="json", exclude_none=True)
        kept.update(
            base_model_name_or_path=base_id,
            revision=revision,
            inference_mode=True,
            task_type="CAUSAL_LM",
            target_modules=_listed(self.target_modules),
            bias="none",
            init_lora_weights=True,
        )
        kept.setdefault("modules_to_save", None)
        if not self.ensure_weight_tying:
            del kept["ensure_weight_tying"]
        # An int stays an int: PEFT's own hot-swap compares alpha with what it saved.
        if float(self.lora_alpha).is_integer():
            kept["lora_alpha"] = int(self.lora_alpha)
        return (json.dumps(kept, indent=2, sort_keys=True) + "\n").encode()

    def targets(self, modules: Iterable[str]) -> set[str]:
        """Those of a base's `modules` (dotted names) that PEFT would put this LoRA on; not for `all-linear`.

        Raises:
            PatternError: a pattern takes too long.
        """
        modules = list(modules)
        left = set(modules) - named(self.exclude_modules, modules)
        found = named(self.target_modules, left)
        if isinstance(self.target_modules, str) or self.layers_to_transform in (None, []):
            return found
        chosen = self.layers_to_transform
        layers = {chosen} if isinstance(chosen, int) else set(chosen or ())
        inside = layer_indices(found, self.layers_pattern)
        # A module that is named in full is meant wherever it lies.
        return {m for m in found if m in self.target_modules or inside.get(m) in layers}

    def resolved(
        self, bound: Iterable[str], modules: Iterable[str] = (), *, also: Iterable[str] = ()
    ) -> "LoraConfigFile":
        """The same LoRA without patterns, for an adapter with tensors for the modules `bound` and no others.

        `also` are parameters with a pair of their own, which have ranks and alphas too.

        A configuration of plain names alone stays as it is; a pattern becomes the last parts of the names where, of the
        base's `modules`, they mean the same.

        Raises:
            PatternError: a pattern takes too long.
        """
        whole = sorted(bound)
        changes: dict[str, Any] = {}
        if isinstance(self.target_modules, str) or isinstance(self.exclude_modules, str):
            short = sorted({module.rpartition(".")[2] for module in whole})
            changes = {
                "target_modules": short if named(short, modules) == set(whole) else whole,
                "exclude_modules": None,
                "layers_to_transform": None,
                "layers_pattern": None,
            }
        for field in ("rank_pattern", "alpha_pattern"):
            if not all(is_plain(key) for key in getattr(self, field)):
                changes[field] = values_for(getattr(self, field), [*whole, *also])
        return self.model_copy(update=changes)


@dataclass(frozen=True)
class ConfigReading:
    """A configuration as read, with `notes` on what in the file was dropped because it changes nothing."""

    config: LoraConfigFile
    notes: tuple[str, ...] = ()


class ConfigProblems(ValueError):  # noqa: N818 - a list of findings, turned into one error with all others
    """What is wrong with an `adapter_config.json`, in `problems`."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("; ".join(problems))


def read_lora_config(content: bytes) -> LoraConfigFile:
    """Read the bytes of an `adapter_config.json`; raises as `examine_lora_config` does."""
    return examine_lora_config(content).config


def examine_lora_config(content: bytes) -> ConfigReading:
    """Read the bytes of an `adapter_config.json`, and say what of them was dropped.

    Raises:
        ConfigProblems: with every problem found.
    """
    try:
        found = strict_json(content, what="adapter_config.json", limit=MAX_CONFIG_BYTES)
    except ValueError as error:
        raise ConfigProblems([str(error)]) from None
    kind = found.get("peft_type")
    if isinstance(kind, str) and kind != "LORA":
        raise ConfigProblems([f"it is an adapter of the kind {kind!r:.40}; only LoRA (peft_type 'LORA') is taken"])
    problems, notes = [], []
    for key in [key for key in found if key not in LoraConfigFile.model_fields]:
        value = found.pop(key)
        if key in SPENT:
            notes += [f"{key} only set up the training"] if value else []
        elif key == "auto_mapping" and _names_a_class(value):
            notes.append("auto_mapping was dropped: it only names the class of the base")
        elif key in ACTING:
            # type() too: 1 == True in Python, not in a schema.
            if not _is_nothing(value) and not any(
                value == ok and type(value) is type(ok) for ok in HARMLESS.get(key, ())
            ):
                problems.append(f"adapter_config.json sets {key} to {_short(value)}: {ACTING[key]}")
        elif _is_nothing(value):
            notes.append(f"the unknown key {key!r:.80} was dropped: it is set to nothing")
        else:
            problems.append(
                f"adapter_config.json has the unknown key {key!r:.80}, set to {_short(value)}; it was written by PEFT "
                f"{found.get('peft_version')!r:.40}, and this version knows the keys of PEFT up to 0.21"
            )
    try:
        config = LoraConfigFile.model_validate_json(json.dumps({k: v for k, v in found.items() if v is not None}))
    except ValidationError as error:
        problems += _problems(error)
        raise ConfigProblems(problems[:40]) from None
    if config.task_type not in (None, "CAUSAL_LM"):
        notes.append(f"task_type {config.task_type} became CAUSAL_LM, which is what the base is")
    alphas, ranks = [config.lora_alpha, *config.alpha_pattern.values()], [config.r, *config.rank_pattern.values()]
    largest = max(alphas) / (math.sqrt(min(ranks)) if config.use_rslora else min(ranks))
    if largest > MAX_SCALING:
        scales = f"alpha {max(alphas):g} over rank {min(ranks)} scales by {largest:g}"
        problems.append(f"{scales}, at most {MAX_SCALING:g} is taken")
    if problems:
        raise ConfigProblems(problems)
    return ConfigReading(config, tuple(notes))


def _is_nothing(value: Any) -> bool:
    return value is None or value is False or (isinstance(value, str | list | dict) and not value)


def _names_a_class(value: Any) -> bool:
    """Whether an `auto_mapping` names a class of transformers, as PEFT writes it where no task type was given."""
    if not isinstance(value, dict) or not set(value) <= {"base_model_class", "parent_library", "unsloth_fixed"}:
        return False
    library, name = value.get("parent_library"), value.get("base_model_class")
    plain = isinstance(library, str) and isinstance(name, str) and name.isidentifier()
    return plain and re.fullmatch(r"transformers(\.\w+)*|transformers_modules(\.[\w-]+)*", str(library)) is not None


def _listed(names: Any) -> Any:
    """A list sorted, with everything in it once; anything else as it is. The order of tokens counts, so they stay."""
    return (
        sorted(set(names)) if isinstance(names, list | tuple) and all(isinstance(one, str) for one in names) else names
    )


def _problems(error: ValidationError) -> list[str]:
    """One sentence for each place that is wrong; where a list or a text could stand, of what came nearest."""
    found: dict[str, Any] = {}
    for one in error.errors():
        place = ".".join(
            str(part) for part in one["loc"] if not re.match(r"function-after|constrained|list\[", str(part))
        )
        if place not in found or found[place]["type"] in ("list_type", "string_type", "int_type"):
            found[place] = one
    inner = {place.rpartition(".")[0] for place in found if place}
    return [
        # What is wrong with the whole has no place.
        f"adapter_config.json: {place:.80}: {one['msg']}, got {_short(one['input'])}"
        if place
        else f"adapter_config.json: {one['msg'].removeprefix('Value error, ')}"
        for place, one in found.items()
        if place not in inner
    ][:20]


def _short(value: Any) -> str:
    text = re.sub(r"\s+", " ", repr(value))
    return text if len(text) <= 60 else f"{text[:57]}..."
