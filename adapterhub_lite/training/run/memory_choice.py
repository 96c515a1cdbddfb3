"""Which memory preset a run gets: planned for this machine and these rows, or asked for by name.

What was set by hand wins over the preset; what contradicts it is refused in one sentence. Knows arguments and the
state of a model that is in memory already; the plan itself is the memory room's. When memory runs out in a
run all the same, it says what to try next: fewer rows at a time first, then recomputed activations.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftConfig, PeftModel

from adapterhub_lite.adapter_format.quantization import Quantization
from adapterhub_lite.errors import ConfigurationError, OutOfMemoryError
from adapterhub_lite.memory import (
    MEMORY_PRESETS,
    GivenAdapter,
    Machine,
    MemoryEstimate,
    MemoryPreset,
    ModelFacts,
    Workload,
    best_attention,
    calibrated,
    estimate,
    facts_of,
    find_preset,
    plan_memory,
    refusal,
)
from adapterhub_lite.training.arguments import AdapterTrainingArguments
from adapterhub_lite.training.distributed.sharded import engine_of, least

# What libraries add to a process between the choice and the second step.
GROWTH_BYTES = {"cpu": 64 * 2**20}
CHECKPOINTING = frozenset({"activation_checkpointing", "gradient_checkpointing"})


@dataclass(frozen=True)
class Loaded:
    """A model in memory as a preset would have made it: dtype by torch name, quantisation, whether it has a LoRA."""

    dtype: str
    quantization: str | None
    adapted: bool

    @classmethod
    def of(cls, model: Any) -> "Loaded":
        """Read it off `model`."""
        config = getattr(model.config, "quantization_config", None)
        try:
            quantization: str | None = Quantization.of(config, exact=False)
        except ValueError:
            quantization = str(getattr(config, "quant_method", "other"))
        # The norms and embeddings tell: quantised weights are stored in bytes.
        return cls(
            str(model.get_input_embeddings().weight.dtype).removeprefix("torch."),
            quantization,
            isinstance(model, PeftModel),
        )

    def mismatch(self, preset: MemoryPreset) -> str | None:
        """Why a model like this cannot be what `preset` makes, in one clause."""
        kept = f"in {self.dtype}" if self.quantization is None else f"in {self.quantization} beside {self.dtype}"
        if (preset.dtype, preset.quantization) != (self.dtype, self.quantization):
            return f"the model given is in memory already, {kept}"
        if self.adapted and preset.trains != "lora":
            return "the model given has a LoRA already"
        return None


@dataclass(frozen=True)
class MemoryChoice:
    """The preset of a run, as changed by hand; what it was predicted to need (None: not foreseeable); and why.

    `planned` is False for a preset asked for by name, whose batch is left as it is.
    """

    preset: MemoryPreset
    predicted: MemoryEstimate | None
    uncorrected: MemoryEstimate | None
    attention: str
    reasons: tuple[str, ...]
    planned: bool
    batch_size: int
    accumulation: int = 1

    def applied(self, args: AdapterTrainingArguments) -> AdapterTrainingArguments:
        """The arguments of the run: the preset's fields, except where something was set by hand."""
        fields = {
            name: value
            for name, value in self.preset.training_arguments().items()
            if name not in args.set_by_hand and not (name in CHECKPOINTING and CHECKPOINTING & args.set_by_hand)
        }
        if engine_of(args) is not None:
            # `accelerate launch` has set the engine up already.
            fields = {name: value for name, value in fields.items() if name not in ("deepspeed", "fsdp", "fsdp_config")}
        if args.device.type == "cpu" and str(fields.get("optim", "")).startswith("paged_"):
            # There is no device to page out of.
            fields["optim"] = fields["optim"].removeprefix("paged_")
        if self.preset.gradient_checkpointing is False:
            fields.pop("activation_checkpointing_kwargs", None)
        if self.accumulation > 1:
            fields["per_device_train_batch_size"] = self.batch_size
            fields["gradient_accumulation_steps"] = args.gradient_accumulation_steps * self.accumulation
        different = {name: value for name, value in fields.items() if getattr(args, name) != value}
        # Base and adapter are in their dtypes already: autocast would only cast and cache, for 8 % of the speed and a third
        # more memory. Engines read it for what they keep, and get it.
        needless = args.bf16 and self.preset.dtype == "bfloat16" and engine_of(args) is None
        made = args.changed(**different) if different or needless else args
        if needless:
            made.mixed_precision = "no"
        return made

    def record(self) -> dict[str, str]:
        """What was decided, for the training record."""
        return {"memory": "; ".join(self.reasons), "attention": self.attention}


def choose_memory(
    base: Any,
    args: AdapterTrainingArguments,
    lengths: Sequence[int],
    *,
    adapter: PeftConfig | None = None,
    overhead: int | None = None,
    home: str | Path | None = None,
) -> MemoryChoice:
    """Choose the preset for a run on `base` (a model in memory, a folder or a resolved base).

    `lengths` are the tokens of each training row, empty where they are not known; `adapter` is the PEFT configuration
    that came along. `overhead` is what the process holds already (bytes), for the prediction that is compared with the run.

    Raises:
        ConfigurationError: the preset asked for cannot be used here, or contradicts what was set by hand.
        OutOfMemoryError: no preset fits this machine.
        UnknownNameError: there is no such preset.
    """
    loaded = Loaded.of(base) if isinstance(base, torch.nn.Module) else None
    facts = facts_of(base.config if loaded else base)
    machine = Machine.present(world_size=args.world_size, device=args.device.type)
    if loaded is not None and args.device.type == "cpu":
        # What is there already is counted as weights below, and is no longer free.
        machine = replace(machine, memory_bytes=machine.memory_bytes + base.get_memory_footprint())
    # Another choice in another process, and they would wait for each other for ever.
    machine = replace(machine, memory_bytes=least(machine.memory_bytes))
    asked = workload(args, lengths, machine, adapter)
    attention = attention_of(facts, machine, base if loaded else None)
    if args.memory_preset != "auto":
        preset, reasons = named_preset(facts, args, machine, loaded, adapter)
        try:
            raw = estimate(facts, preset, asked)
        except ConfigurationError as error:
            return _unforeseen(preset, attention(preset), asked, str(error))
        if raw.unpredicted:
            return _unforeseen(preset, attention(preset), asked, raw.unpredicted)
        how = False, args.per_device_train_batch_size, 1
        return _choice(preset, raw, attention(preset), reasons, how, overhead, home)
    candidates = tuple(_by_hand(preset, args) for preset in suited_presets(args, loaded))
    engine = engine_of(args)
    if engine is not None:
        # What was set up for many processes may be asked to run in one, as a run that is resumed there.
        preset = replace(MEMORY_PRESETS[engine], dtype=candidates[0].dtype)
        reasons = (f"{engine} was set up by hand",)
        how = False, args.per_device_train_batch_size, 1
        return _choice(preset, estimate(facts, preset, asked), attention(preset), reasons, how, overhead, home)
    try:
        facts.lora(candidates[0], asked)
        facts.step(candidates[0], asked)
    except ConfigurationError as error:
        # A model that cannot be foreseen can still be trained.
        return _unforeseen(candidates[0], attention(candidates[0]), asked, str(error))
    plan = plan_memory(
        facts, batch_size=asked.batch_size, sequence_length=asked.sequence_length, rank=asked.rank,
        target_modules=asked.target_modules, machine=machine, home=home, candidates=candidates,
    )  # fmt: skip
    raw = estimate(facts, plan.preset, plan.predicted.workload)
    how = True, plan.batch_size, plan.accumulation
    return _choice(plan.preset, raw, attention(plan.preset), plan.reasons, how, overhead, home)


def workload(
    args: AdapterTrainingArguments, lengths: Sequence[int], machine: Machine, adapter: PeftConfig | None = None
) -> Workload:
    """The largest step of the run: the longest rows together, laid end to end or padded to the longest."""
    rows = args.per_device_train_batch_size
    longest = sorted(lengths, reverse=True)[:rows]
    tokens = args.longest_row
    if longest:
        # Fewer rows than a step takes: spread over it, because it is the tokens that count.
        whole = sum(longest) if args.padding_free else longest[0] * len(longest)
        tokens = max(1, -(-whole // rows))
    targets: Any = args.target_modules if isinstance(args.target_modules, str) else tuple(args.target_modules)
    if adapter is not None:
        targets = GivenAdapter.of(adapter)
    times = args.gradient_accumulation_steps
    return Workload(rows, tokens, args.rank, targets, machine.world_size, times, machine.device)


def _by_hand(preset: MemoryPreset, args: AdapterTrainingArguments) -> MemoryPreset:
    """`preset` with what was set by hand in its place."""
    changes: dict[str, Any] = {"master_weights": args.master_weights}
    if CHECKPOINTING & args.set_by_hand:
        changes["gradient_checkpointing"] = bool(args.activation_checkpointing)
    if "optim" in args.set_by_hand:
        changes["optimizer"] = str(getattr(args.optim, "value", args.optim))
    if args.base_dtype is not None:
        changes["dtype"] = args.base_dtype
    return replace(preset, **changes)


def suited_presets(args: AdapterTrainingArguments, loaded: Loaded | None) -> tuple[MemoryPreset, ...]:
    """The presets that the model in memory, or a dtype set by hand, leaves open; all of the ladder where neither is."""
    from adapterhub_lite.memory.plan import LADDER

    wanted = loaded.dtype if loaded else args.base_dtype or ("float16" if args.fp16 else None)
    if wanted is None:
        return tuple(MEMORY_PRESETS[name] for name in LADDER)
    # A quantisation that no preset makes is left as it is, and not counted.
    kept: dict[str | None, Literal["int8", "nf4"]] = {
        k: "int8" if k is Quantization.INT8 else "nf4" for k in Quantization
    }
    quantization = kept.get(loaded.quantization) if loaded else None
    ladder = [MEMORY_PRESETS[name] for name in (*LADDER, "lora-fp32", "lora-int8")]
    open_ones = [
        replace(preset, dtype=wanted) if preset.strategy != "single" else preset
        for preset in ladder
        if preset.quantization == quantization and (preset.strategy != "single" or preset.dtype == wanted)
    ]
    single = next((p for p in open_ones if p.strategy == "single"), None) or replace(
        MEMORY_PRESETS["lora-bf16"], dtype=wanted, quantization=quantization
    )
    again = replace(single, gradient_checkpointing=True)
    return (single, *(p for p in open_ones if p is not single), *([] if again in open_ones else [again]))


def named_preset(
    facts: ModelFacts,
    args: AdapterTrainingArguments,
    machine: Machine,
    loaded: Loaded | None,
    adapter: PeftConfig | None,
) -> tuple[MemoryPreset, tuple[str, ...]]:
    """The preset asked for, as changed by hand, and how it came about."""
    name = args.memory_preset
    preset = find_preset(name)
    quantized = loaded is None and getattr(facts.config, "quantization_config", None) is not None
    problems = [
        refusal(preset, machine, model_quantized=quantized),
        loaded.mismatch(_by_hand(preset, args)) if loaded else None,
        *contradictions(preset, args, adapter is not None and not (loaded and loaded.adapted)),
    ]
    found = [problem for problem in problems if problem is not None]
    if found:
        raise ConfigurationError(f"memory_preset={name!r} cannot be used: {'; '.join(found)}.")
    by_hand = sorted({*CHECKPOINTING, "optim", "base_dtype"} & args.set_by_hand)
    return _by_hand(preset, args), ("asked for by name", *(f"{one} was set by hand" for one in by_hand))


def contradictions(preset: MemoryPreset, args: AdapterTrainingArguments, adapter_given: bool) -> list[str]:
    """What was set by hand and cannot be together with `preset`, one clause each."""
    hand = args.set_by_hand
    rules = (
        (adapter_given and preset.trains != "lora", "it trains no LoRA, and a peft_config was given"),
        (args.fp16 and preset.dtype == "bfloat16", "it computes in bfloat16, and fp16=True was given"),
        (args.bf16 and preset.mixed_precision == "fp16", "it computes in fp16, and bf16=True was given"),
        (preset.quantization and args.base_dtype is not None, "it packs the weights, and base_dtype was given"),
        ("deepspeed" in hand and not preset.strategy.startswith("zero"), "it does not use DeepSpeed, and deepspeed was given"),
        (preset.trains != "lora" and args.world_size > 1 and engine_of(args) is not None,
         f"it trains whole weights, which {engine_of(args)} would split: start it without that engine"),
        ("fsdp" in hand and preset.strategy != "fsdp", "it does not use FSDP, and fsdp was given"),
        (preset.strategy == "zero3" and args.auto_find_batch_size, "ZeRO-3 cannot change its batch size in a run"),
        (preset.trains != "lora" and (args.use_dora or args.use_rslora or args.loraplus_lr_ratio or args.init_lora != "default"),
         "it trains no LoRA, and an option of LoRA was given"),
        (preset.quantization and args.init_lora.startswith("pissa"), "PiSSA takes the weights apart, and they are packed"),
    )  # fmt: skip
    return [reason for broken, reason in rules if broken]


def attention_of(facts: ModelFacts, machine: Machine, model: Any) -> Callable[[MemoryPreset], str]:
    """A function (preset) -> "name: reason" of the attention implementation; `model` in memory has its own."""
    if model is not None:
        own = f"{model.config._attn_implementation}: that of the model given"
        return lambda preset: own
    return lambda preset: ": ".join(best_attention(preset, machine, facts.attentions))


def _unforeseen(preset: MemoryPreset, attention: str, asked: Workload, reason: str) -> MemoryChoice:
    return MemoryChoice(preset, None, None, attention, (f"not foreseen: {reason}",), False, asked.batch_size)


def _choice(
    preset: MemoryPreset,
    raw: MemoryEstimate,
    attention: str,
    reasons: tuple[str, ...],
    how: tuple[bool, int, int],
    overhead: int | None,
    home: str | Path | None,
) -> MemoryChoice:
    if overhead is not None:
        raw = replace(
            raw, components={**raw.components, "overhead": overhead + GROWTH_BYTES.get(raw.workload.device, 0)}
        )
    return MemoryChoice(preset, calibrated(raw, home=home), raw, attention, reasons, *how)


PHRASES = ("can't allocate memory", "out of memory", "Cannot allocate memory", "No executable batch size found")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that a device, or the host, had no memory left."""
    known = isinstance(error, torch.OutOfMemoryError | MemoryError | OutOfMemoryError)
    return known or (isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in PHRASES))


def with_less(args: AdapterTrainingArguments, choice: MemoryChoice, error: BaseException) -> MemoryChoice:
    """Change `args` to what needs less memory for the same updates, and say so in the choice.

    Raises:
        OutOfMemoryError: the run is to stop (several processes cannot change together), or nothing is left to try.
    """
    if args.on_out_of_memory == "stop" or args.world_size > 1:
        if isinstance(error, OutOfMemoryError):
            raise error
        raise OutOfMemoryError(what_would_fit(args, choice)) from error
    rows, times = args.per_device_train_batch_size, args.gradient_accumulation_steps
    if rows > 1:
        fewer = max(part for part in range(1, rows // 2 + 1) if rows % part == 0)
        args.per_device_train_batch_size, args.gradient_accumulation_steps = fewer, times * (rows // fewer)
        reason = f"memory ran out with {rows} rows at a time: {fewer} rows, {rows // fewer} times as often"
    elif not args.activation_checkpointing:
        args.activation_checkpointing = args.gradient_checkpointing = True
        args.activation_checkpointing_kwargs = {"use_reentrant": choice.preset.use_reentrant}
        reason = "memory ran out with one row at a time: activations are made again"
        choice = replace(choice, preset=replace(choice.preset, gradient_checkpointing=True))
    else:
        raise OutOfMemoryError(what_would_fit(args, choice)) from error
    # What was predicted was for more.
    return replace(choice, predicted=None, uncorrected=None, reasons=(*choice.reasons, reason))


def what_would_fit(args: AdapterTrainingArguments, choice: MemoryChoice) -> str:
    """The sentence for a run that memory ran out in, when nothing is tried any more."""
    # The search for a batch size ends with a single row.
    rows = 1 if args.auto_find_batch_size else args.per_device_train_batch_size
    times = args.gradient_accumulation_steps
    said = f"Memory ran out on {args.device} with {rows} rows of up to {args.max_length or 'any number of'} tokens at a time."
    if rows > 1:
        fewer = max(part for part in range(1, rows // 2 + 1) if rows % part == 0)
        return (
            f"{said} The same updates need about {fewer / rows:.0%} of the activations with "
            f"per_device_train_batch_size={fewer} and gradient_accumulation_steps={times * (rows // fewer)}; "
            "on_out_of_memory='replan' tries that by itself."
        )
    if not args.activation_checkpointing:
        return f"{said} Set activation_checkpointing=True, or on_out_of_memory='replan'."
    packed = "a smaller base" if choice.preset.quantization else "memory_preset='qlora-nf4-gc'"
    return f"{said} Activations are made again already: take {packed}, or shorter rows."
