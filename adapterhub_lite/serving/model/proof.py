"""The proof at start: a base is served only after the engine has reproduced the model's own `generate`.

A few random rows are answered by the model itself, one of them with a random adapter. The engine is then given the
same rows as it will get real ones: prompts in pieces, rows in one batch, one joining late, one leaving early and
another moving into its place, across the edge of a sliding window. Its logits must be the model's, token for token.

The ways to compute are tried from the fastest to the most general; the first that is equal serves the base. None equal:
the base is refused, with what differs. A verdict holds for one base, one setting and one set of versions, and is kept.

In 16 bits, rounding hides faults as large as itself: a window's edge off by one, a wrong position of one row. So what a
way computes is compared in float32, to which the base's weights are widened in place for a while and come back as they
were; in its own dtype it is then held against the float32 logits, beside the model's own forward in that dtype.
"""

import hashlib
import itertools
import json
import logging
import math
import platform
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from adapterhub_lite.bases.layer_parts import depends_on_length
from adapterhub_lite.devices import free_memory
from adapterhub_lite.errors import ConfigurationError
from adapterhub_lite.serving.adapters.weights import AdapterWeights, Family, FamilyWeights, Part, Parts, find_families
from adapterhub_lite.serving.model.cache.row_states import STATE_CLASSES
from adapterhub_lite.serving.model.compiled.kept_weights import KeptWeights
from adapterhub_lite.serving.model.compiled.packed_weights import PanelStore, Precision
from adapterhub_lite.serving.model.forward_rows import RowForward, greedy_settings
from adapterhub_lite.serving.model.lean_families import can_fuse
from adapterhub_lite.serving.model.packed_step import RowSlice, pack
from adapterhub_lite.serving.model.runner import ForwardKind, ModelRunner
from adapterhub_lite.serving.model.tolerances import TOLERANCE, TOLERANCE_16_BITS, check_within, relative_difference

logger = logging.getLogger(__name__)
# How much further from float32 than the model's own forward a way may be in 16 bits, where that one is off by rounding
# alone, at half of the tokens: rounding may send a token to another expert. Over 77 families, those that are right were
# at 0.7 to 1.6 of it.
ROUNDING = 2.0
# How far quantised weights may be from the base's own logits, at half of the tokens. SmolLM2-135M was at 0.11 in int8; in
# int4, as far off as a base of its size gets, at 0.69 with symmetric weights. Another layout of them is at 1 or more.
QUANTISED_DIFFERENCE: dict[Precision, float] = {"int8": 0.3, "int4": 0.8}
# At most this part of the free memory goes into widening.
WIDENED_SHARE = 0.5
PROMPTS = (21, 6, 11)  # tokens
WRITTEN = 4
# Windows are narrowed to this for the proof, so that a row of 25 tokens crosses the edge of one of 4,096.
NARROW = 16
# Where transformers keeps keys and values and nothing else; nothing at all, where a layer reads those of another.
PLAIN_STATE = {"DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer"}
KEPT = {ForwardKind.PACKED: PLAIN_STATE, ForwardKind.STACKED: PLAIN_STATE | STATE_CLASSES}
WINDOWS = ("sliding_window", "attention_chunk_size")


@dataclass(frozen=True)
class Verdict:
    """How a base is computed. `difference` is the largest found, at most `tolerance`; `reasons` say why no faster way is.

    `kind` is empty for a base that cannot be served.
    """

    kind: str
    difference: float
    tolerance: float
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class Answer:
    """What the model itself makes of a row: prompt, tokens written, and the logits (written, vocabulary) of each."""

    prompt: list[int]
    tokens: list[int]
    logits: torch.Tensor
    parts: Parts = ()


def prove(
    model: PreTrainedModel,
    *,
    rows: int,
    native: bool | None = None,
    kinds: Sequence[ForwardKind] | None = None,
    precision: Precision | None = None,
    store: PanelStore | None = None,
) -> tuple[ModelRunner, Verdict]:
    """Return a runner that computes what `model` does, with its verdict. `kinds` are those to try, in order.

    With `precision` the lean pass alone is tried: first as the base is, then with its weights quantised, which may differ
    by as much as `QUANTISED_DIFFERENCE` says. `store` has, or takes, what they come to.

    Raises:
        ConfigurationError: no way is equal to the model itself; the text says what differs.
    """
    model.requires_grad_(False)
    wide = can_widen(model)
    exact = wide or (model.dtype in (torch.float32, torch.float64) and not getattr(model, "is_quantized", False))
    tolerance = TOLERANCE if exact else TOLERANCE_16_BITS
    with narrow_windows(model), torch.inference_mode(), quiet_transformers():
        answers, kept, rounding = own_truth(model, wide=wide)
        reasons: list[str] = []
        for kind in kinds or ([ForwardKind.LEAN] if precision else candidates(model)):
            if kind == ForwardKind.STACKED and not kinds and kept <= PLAIN_STATE:
                continue  # the packed way with more calls
            more = kept - KEPT[kind] if kind in KEPT else set()
            if more:
                reasons.append(f"{kind}: the base keeps more than this way does: {', '.join(sorted(more))}")
                continue
            runner = None
            try:
                worst = 0.0
                if wide or precision is not None:  # as the base is, before any rounding of our own
                    with widened(model) if wide else nullcontext():
                        worst = differ_within(tolerance, model, answers, rows, kind, native)
                runner = ModelRunner(model, rows=rows, kind=kind, native=native, precision=precision, store=store)
                found = differences(runner, answers[:rows])
                if precision is not None:
                    check_within(QUANTISED_DIFFERENCE[precision], statistics.median(itertools.chain(*found)))
                elif rounding is None:
                    worst = check_within(tolerance, worst_row(found))
                else:
                    check_within(ROUNDING * rounding, statistics.median(itertools.chain(*found)))
                runner.idle()
                return runner, Verdict(str(kind), worst, tolerance, tuple(reasons))
            except ConfigurationError as error:
                if native:
                    raise
                reasons.append(f"{kind}: {error}")
            except Exception as error:
                logger.debug("The %s pass fails on this base.", kind, exc_info=True)
                reasons.append(f"{kind}: {type(error).__name__}: {error}"[:300])
            if runner is not None:
                runner.close()
    raise ConfigurationError(refusal(type(model).__name__, reasons))


def own_truth(model: PreTrainedModel, *, wide: bool) -> tuple[list[Answer], set[str], float | None]:
    """The model's own answers, the classes of its state, and how far its own dtype is from float32 where that is known.

    Raises:
        ConfigurationError: transformers' own generate fails on the model.
    """
    try:
        with widened(model) if wide else nullcontext():
            answers, kept = own_answers(model)
        return answers, kept, statistics.median(own_differences(model, answers)) if wide else None
    except Exception as error:
        raise ConfigurationError(
            f"{type(model).__name__} cannot be served: transformers' own generate fails on it, with "
            f"{type(error).__name__}: {error}"
        ) from error


def differ_within(
    tolerance: float,
    model: PreTrainedModel,
    answers: Sequence[Answer],
    rows: int,
    kind: ForwardKind,
    native: bool | None,
) -> float:
    """How much a way to compute differs from the answers, with a runner for this only. Raises as `check_within`."""
    runner = ModelRunner(model, rows=rows, kind=kind, native=native)
    try:
        return check_within(tolerance, worst_row(differences(runner, answers[:rows])))
    finally:
        runner.close()


def refusal(name: str, reasons: Sequence[str]) -> str:
    """The sentence for a base that cannot be served."""
    return (
        f"{name} is not served: the engine does not compute what the model itself does. {'; '.join(reasons)}. "
        "Use transformers' generate for this base, with the adapter loaded by PEFT."
    )


def candidates(model: PreTrainedModel) -> list[ForwardKind]:
    """The ways that may be right for a base, the fastest first."""
    general = [ForwardKind.ROWS, ForwardKind.RECOMPUTED]
    if depends_on_length(model.config):
        return general
    return [*([ForwardKind.LEAN] if can_fuse(model) else []), ForwardKind.PACKED, ForwardKind.STACKED, *general]


def own_answers(model: PreTrainedModel) -> tuple[list[Answer], set[str]]:
    """What the model's own `generate` says to random prompts, the first with a random adapter too.

    Also the classes in which transformers keeps the state of its layers. What a state does may show only after more
    tokens than are tried here, so a kind that is not known is not left to the comparison.
    """
    generator = torch.Generator().manual_seed(0)
    vocabulary: int = model.config.get_text_config().vocab_size
    prompts = [torch.randint(vocabulary, (1, length), generator=generator).to(model.device) for length in PROMPTS]
    families = find_families(model)
    hooks = RowForward(model, families, rows=1)
    try:
        answers = []
        kept: set[str] = set()
        for number, ids in enumerate(prompts):
            parts = (Part(random_adapter(families, model, generator)),) if families and number == 0 else ()
            hooks.lora.place(0, parts)
            hooks.lora.use(0)
            # Typed as one of several outputs, by which arguments decide.
            out: Any = model.generate(  # type: ignore[operator]
                ids, attention_mask=torch.ones_like(ids), output_logits=True, return_dict_in_generate=True,
                **greedy_settings(WRITTEN),
            )  # fmt: skip
            state = getattr(out, "past_key_values", None)
            layers = getattr(state, "layers", None)
            kept |= {type(state).__name__} if layers is None else {type(layer).__name__ for layer in layers}
            written = out.sequences[0, ids.shape[1] :].tolist()
            answers.append(Answer(ids[0].tolist(), written, torch.cat(out.logits).float().cpu(), parts))
        return answers, kept
    finally:
        hooks.close()


def random_adapter(families: Sequence[Family], model: PreTrainedModel, generator: torch.Generator) -> AdapterWeights:
    """A LoRA of rank 2 on every linear layer, large enough to be seen in the logits."""

    def pairs(family: Family) -> FamilyWeights:
        layers = len(family.paths)
        a = torch.randn(layers, 2, family.in_features, generator=generator) / family.in_features**0.5
        b = torch.randn(layers, 2, family.out_features, generator=generator) * 0.1
        return FamilyWeights(tuple(range(layers)), a, b, torch.ones(layers, 1, 1))

    made = {family.name: pairs(family) for family in families}
    return AdapterWeights(made, 2, sum(len(family.paths) for family in families)).to(model.device)


def worst_row(found: Sequence[Sequence[float]]) -> float:
    """The root mean square of the differences of a row, of the row with the largest."""
    return max(math.sqrt(sum(value**2 for value in values) / len(values)) for values in found)


def differences(runner: ModelRunner, answers: Sequence[Answer]) -> list[list[float]]:
    """For each answer, the relative differences between the runner's logits and its own, by token written.

    The rows share their steps.
    """
    rows = dict(enumerate(answers))  # row -> its answer
    computed = dict.fromkeys(rows, 0)
    found: dict[int, list[float]] = {id(answer): [] for answer in answers}
    for row, answer in rows.items():
        runner.admit(row, answer.parts, len(answer.prompt) + WRITTEN)
    for step in range(100):
        slices = []
        for row, answer in sorted(rows.items()):
            known, at = answer.prompt + answer.tokens[:-1], computed[row]
            left = len(answer.prompt) - at
            # Prompts in pieces of 7, the last row a step late; then a token at a time.
            piece = 1 if left <= 0 else left if runner.whole_prompts else min(left, 7)
            if not (row == len(answers) - 1 > 0 and step == 0):
                slices.append(RowSlice(row, at, known[at : at + piece]))
        logits = runner.forward(pack(slices, runner.device)).cpu()
        for part, own in zip(slices, logits, strict=True):
            answer = rows[part.row]
            computed[part.row] += len(part.token_ids)
            index = computed[part.row] - len(answer.prompt)
            if index >= 0:
                found[id(answer)].append(relative_difference(own, answer.logits[index]))
            if index == WRITTEN - 1:
                runner.leave(part.row)
                del rows[part.row]
        for hole in range(len(rows)):
            if hole not in rows:
                last = max(rows)
                runner.move(last, hole, rows[last].parts)
                rows[hole], computed[hole] = rows.pop(last), computed[last]
        if not rows:
            return [found[id(answer)] for answer in answers]
    raise AssertionError("every row ends")


def own_differences(model: PreTrainedModel, answers: Sequence[Answer]) -> list[float]:
    """How far the model's own forward is from the answers in the dtype that it is in, for each token written."""
    hooks = RowForward(model, find_families(model), rows=1, keeps_state=False)
    try:
        found = []
        for answer in answers:
            hooks.lora.place(0, answer.parts)
            hooks.lora.use(0)
            ids = torch.tensor([answer.prompt + answer.tokens[:-1]], device=model.device)
            out = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
            own = out.logits[0, len(answer.prompt) - 1 :].float().cpu()
            found += [relative_difference(*pair) for pair in zip(own, answer.logits, strict=True)]
        return found
    finally:
        hooks.close()


def narrow_tensors(model: PreTrainedModel) -> list[torch.Tensor]:
    """The parameters and buffers in 16 bits."""
    return [t for t in (*model.parameters(), *model.buffers()) if t.dtype in (torch.bfloat16, torch.float16)]


def can_widen(model: PreTrainedModel) -> bool:
    """Whether the base is in 16 bits, unquantised, and there is memory to have it in float32 for a while."""
    narrow = narrow_tensors(model)
    if not narrow or getattr(model, "is_quantized", False):
        return False
    return 2 * sum(t.nbytes for t in narrow) <= WIDENED_SHARE * free_memory(model.device)


@contextmanager
def widened(model: PreTrainedModel) -> Iterator[None]:
    """Have every 16-bit tensor of a model in float32 for a while; its own memory is put back afterwards."""
    before = [(tensor, tensor.data) for tensor in narrow_tensors(model)]
    for tensor, data in before:
        tensor.data = data.float()
    try:
        yield
    finally:
        for tensor, data in before:
            tensor.data = data


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers from warning about what is only tried; its setting is put back afterwards."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


@contextmanager
def narrow_windows(model: PreTrainedModel) -> Iterator[None]:
    """Make every sliding window that is wider than `NARROW` that narrow, in modules and configuration, for a while."""
    changed: list[tuple[Any, str, int]] = []
    holders = {id(one): one for one in (model.config, model.config.get_text_config(), *model.modules())}
    for holder in holders.values():
        for name in WINDOWS:
            value = getattr(holder, name, None)
            if type(value) is int and value > NARROW:
                changed.append((holder, name, value))
                setattr(holder, name, NARROW)
    try:
        yield
    finally:
        for holder, name, value in changed:
            setattr(holder, name, value)


_verdicts: dict[str, Verdict] = {}


def proven(
    model: PreTrainedModel,
    fingerprint: str,
    home: Path,
    *,
    rows: int,
    native: bool | None = None,
    precision: Precision | None = None,
) -> tuple[ModelRunner, Verdict]:
    """`prove`, or the verdict that was found before for this base, these settings and versions. Raises as `prove`."""
    known = [
        fingerprint,
        str(model.dtype),
        str(model.device.type),
        rows > 1,
        native,
        can_fuse(model),
        precision,
        versions(),
    ]
    quantization = getattr(model.config, "quantization_config", None)
    key = hashlib.sha256(json.dumps([*known, str(quantization)]).encode()).hexdigest()
    file = home / "verdicts" / f"{key}.json"
    store = None if precision is None else KeptWeights(home, fingerprint, model.dtype, precision)
    verdict = _verdicts.get(key) or read_verdict(file)
    if verdict is not None and verdict.kind:
        kind = ForwardKind(verdict.kind)
        runner = ModelRunner(model, rows=rows, kind=kind, native=native, precision=precision, store=store)
    else:
        runner, verdict = prove(model, rows=rows, native=native, precision=precision, store=store)
        _verdicts[key] = verdict
        # A home that cannot be written costs the proof at the next start, and nothing else.
        with suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(asdict(verdict)))
    if store is not None:
        store.save()
    return runner, verdict


def read_verdict(file: Path) -> Verdict | None:
    """A verdict from an earlier start; None where there is none, or none that can be read."""
    try:
        read = json.loads(file.read_text())
        return Verdict(str(ForwardKind(read["kind"])), read["difference"], read["tolerance"], tuple(read["reasons"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


@cache
def versions() -> str:
    """What a verdict depends on besides the base: the packages that compute, this code, and the processor."""
    digest = hashlib.sha256(platform.machine().encode())
    for package in ("torch", "transformers", "bitsandbytes"):
        with suppress(PackageNotFoundError):
            digest.update(f"{package} {version(package)}".encode())
    for source in sorted(Path(__file__).parent.rglob("*.*")):
        if source.suffix in (".py", ".c", ".h"):
            digest.update(source.read_bytes())
    return digest.hexdigest()
