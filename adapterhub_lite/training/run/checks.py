"""What is checked before and in the first steps of a run, so that one that cannot be right stops in seconds.

The proof: something is to be learned, the end of an answer is learned, the loss is the model's own, every trainable tensor
gets a gradient. The pre-flight: the longest batch first, so that running out of memory takes seconds, not hours; whatever
it did is undone. Knows the trainer's parts, not the trainer.
"""

import copy
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from adapterhub_lite import devices
from adapterhub_lite.errors import DataError, OutOfMemoryError, ProofFailedError
from adapterhub_lite.training.data.reading.tables import Dataset, FlatLists, flat_batches
from adapterhub_lite.training.data.tokenization import IGNORED
from adapterhub_lite.training.model.master_weights import masters_of
from adapterhub_lite.training.run.memory_choice import is_out_of_memory

logger = logging.getLogger(__name__)
ROWS_AT_A_TIME = 1000
# So many of them have their logits in fp32 at a time.
REFERENCE_TOKENS = 8
# Relative to the loss: what rounding in the base's dtype may make of two ways to compute the same thing.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}


def check_rows(
    table: Any,
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: int,
    ends: frozenset[int] | None = None,
    *,
    tokenized_elsewhere: bool = False,
    truncated: int = 0,
) -> None:
    """Check every row of a tokenised table: as many labels as tokens, in the vocabulary, some of them to be learned.

    `ends` are the ids that end an answer; the tokenizer's EOS where they are not given. Rows that were
    `tokenized_elsewhere` may be pieces of a longer text, which end nowhere: that is said, not refused.
    `truncated` is how many were cut.

    Raises:
        DataError: tokens and labels differ in number, or one of them is outside the vocabulary.
        ProofFailedError: a row teaches nothing, or no row teaches the end of an answer.
    """
    if not isinstance(table, Dataset) or "labels" not in table.column_names:
        return
    ends = ends or frozenset([tokenizer.eos_token_id])
    learned_end, before = False, 0
    for ids, labels in flat_batches(table, ["input_ids", "labels"], ROWS_AT_A_TIME):
        uneven = (ids.ends != labels.ends).nonzero()[0]
        if len(uneven):
            raise DataError(
                f"Row {before + uneven[0]} has another number of labels than of tokens. Give one label per token."
            )
        goals = labels.values.copy()
        # The first token of a row is predicted by nothing.
        goals[labels.starts[labels.starts < labels.ends]] = IGNORED
        _in_vocabulary("token", ids, True, vocabulary, before)
        _in_vocabulary("label", labels, goals != IGNORED, vocabulary, before)
        counts = np.concatenate([[0], (goals != IGNORED).cumsum()])
        empty = (counts[labels.ends] == counts[labels.starts]).nonzero()[0]
        if len(empty):
            raise ProofFailedError(
                f"Row {before + empty[0]} has no label to learn from: all of them are {IGNORED}. Check how the labels "
                "were made: a chat template without an assistant marker gives an empty mask."
            )
        learned_end = learned_end or bool(np.isin(goals, list(ends)).any())
        before += len(labels.ends)
    if not learned_end and tokenized_elsewhere:
        logger.warning(
            f"No row teaches the end token {tokenizer.eos_token!r}: the model will go on writing until it is cut."
        )
    elif not learned_end:
        advice = (
            "Let the chat template end each assistant turn with it, or set tokenizer.eos_token to the token that does."
        )
        if tokenizer.eos_token is None:
            advice = "The tokenizer has no end token: set tokenizer.eos_token to the token that ends an answer."
        if truncated:
            advice = f"{truncated} rows were cut before their end: raise max_length, or say overlong='truncate_start'."
        named = "an end token" if tokenizer.eos_token is None else f"the end token {tokenizer.eos_token!r}"
        raise ProofFailedError(f"No row teaches {named}, so the model would never stop. {advice}")


def _in_vocabulary(kind: str, flat: FlatLists, counted: Any, vocabulary: int, before: int) -> None:
    wrong = (counted & ((flat.values < 0) | (flat.values >= vocabulary))).nonzero()[0]
    if len(wrong):
        row = before + np.searchsorted(flat.ends, wrong[0], side="right")
        raise DataError(_outside(f"Row {row}", kind, flat.values[wrong[0]], vocabulary))


def _outside(where: str, kind: str, value: Any, vocabulary: int) -> str:
    wanted = f"{IGNORED} or 0" if kind == "label" else "0"
    return (
        f"{where} has the {kind} {value}; wanted {wanted} to {vocabulary - 1}. "
        "Tokenise with the tokenizer of this base."
    )


def check_batch(batch: Mapping[str, Tensor], vocabulary: int, step: int, must_teach: bool) -> None:
    """Check one batch of a stream, whose rows could not be checked before the run.

    Raises:
        DataError: a label is outside the vocabulary.
        ProofFailedError: the batch teaches nothing although it `must_teach`.
    """
    goals = batch["labels"][..., 1:]
    goals = goals[goals != IGNORED]
    if must_teach and not len(goals):
        raise ProofFailedError(
            f"The batch of step {step} has no label to learn from: all of them are {IGNORED}. Check how the stream "
            "makes its labels."
        )
    wrong = goals[(goals < 0) | (goals >= vocabulary)]
    if len(wrong):
        raise DataError(_outside(f"The batch of step {step}", "label", int(wrong[0]), vocabulary))


def check_loss(model: nn.Module, batch: Mapping[str, Tensor], loss: Any, precision: torch.dtype | None = None) -> None:
    """Check that `loss(batch)` on one short row is the cross entropy of the model's own logits, computed plainly.

    `batch` is one row: `input_ids` and `labels`, each (1, seq), cut to some valid labels. `loss` returns the sum.
    `precision` is the dtype that autocast computes in, None for that of the weights.

    Raises:
        ProofFailedError: they differ by more than rounding explains.
    """
    labels = batch["labels"]
    with torch.no_grad():
        ours = float(loss())
        logits, goals = model(input_ids=batch["input_ids"]).logits[0, :-1], labels[0, 1:]
        # In parts: beside a large vocabulary's logits, fp32 copies would be the peak of a run that saves memory.
        parts = zip(logits.split(REFERENCE_TOKENS), goals.split(REFERENCE_TOKENS), strict=True)
        reference = sum(
            float(F.cross_entropy(part.float(), some, ignore_index=IGNORED, reduction="sum")) for part, some in parts
        )
    dtype = precision or next(model.parameters()).dtype
    valid = int((labels[:, 1:] != IGNORED).sum())
    allowed = TOLERANCE.get(dtype, 3e-2) * (abs(reference) + valid)
    if not abs(ours - reference) <= allowed:
        raise ProofFailedError(
            f"The loss of {valid} tokens is {ours:.5f}, but the model's own logits give {reference:.5f}. The head has "
            "something that the logits-free loss does not know. Train with loss_backend='model', and report this model."
        )


def read_while_training(model: nn.Module) -> list[str]:
    """The LoRA layers that `model` calls when it answers, and whose own weight it reads instead when it trains.

    A clamp of the weight in training is such a place (Gemma 3n's AltUp): under PEFT's own training too, their pairs get
    no gradient and stay without effect. Both passes are over a few tokens, and leave random numbers as they were.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    tokens = torch.ones(1, 4, dtype=torch.long, device=next(model.parameters()).device)
    called: dict[bool, set[str]] = {False: set(), True: set()}
    was_training, randomness, on_device = model.training, torch.get_rng_state(), devices.random_states()
    hooks = [
        layer.register_forward_pre_hook(lambda *_, name=name: called[model.training].add(name))
        for name, layer in layers.items()
    ]
    with torch.no_grad():
        for training in called:
            model.train(training)(input_ids=tokens)
    for hook in hooks:
        hook.remove()
    model.train(was_training)
    torch.set_rng_state(randomness)
    devices.set_random_states(on_device)
    return sorted(called[False] - called[True])


class GradientProof:
    """Watches the gradients of the first two steps (law: none missing, none but finite, every pair moved)."""

    def __init__(self, names: Iterable[str]) -> None:
        # The tokens that are trained alone may come later in the rows.
        self.unmoved = {_pair(name) for name in names if "trainable_tokens_delta" not in name}
        self._heard: dict[str, Tensor] | None = None
        self._hooks: list[Any] = []
        self._left_out: tuple[str, ...] = ()

    def leave_out(self, layers: Sequence[str]) -> None:
        """Ask nothing of the pairs on these layers, whose weight is read in training (`read_while_training`); say so."""
        self._left_out = tuple(f"{layer}." for layer in layers)
        self.unmoved = {pair for pair in self.unmoved if not pair.startswith(self._left_out)}
        if layers:
            logger.warning(
                f"The LoRA on {len(layers)} layers ({_some(layers)}) learns nothing and has no effect: in training this model "
                "reads their weights without calling them. PEFT trains it so too."
            )

    def listen(self, model: nn.Module) -> None:
        """Catch the gradients as they are made, for engines that take them away before the step can be looked at."""
        self._heard = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                self._hooks.append(parameter.register_hook(partial(self._hear, name)))

    def _hear(self, name: str, gradient: Tensor) -> None:
        assert self._heard is not None
        self._heard[name] = self._heard[name] + gradient if name in self._heard else gradient.detach().clone()

    def of(self, model: nn.Module) -> list[tuple[str, Tensor | None]]:
        """The gradients of this step, by parameter: those that were heard, or those that lie in `model`."""
        trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        if self._heard is None:
            return [(name, parameter.grad) for name, parameter in trained]
        heard, self._heard = self._heard, {}
        return [(name, heard.get(name)) for name, _ in trained]

    def check(self, gradients: Iterable[tuple[str, Tensor | None]], last: bool) -> None:
        """Take the gradients of one step; with `last`, every LoRA pair must have had one that is not zero.

        Raises:
            ProofFailedError: which tensors have no gradient, one that is not finite, or only zeros.
        """
        missing, wild = [], []
        for name, gradient in gradients:
            if gradient is None:
                missing += [] if name.startswith(self._left_out) else [name]
            elif not bool(torch.isfinite(gradient).all()):
                wild.append(name)
            elif bool((gradient != 0).any()):
                self.unmoved.discard(_pair(name))
        if missing:
            raise ProofFailedError(
                f"{len(missing)} trainable tensors got no gradient ({_some(missing)}): the loss does not depend on "
                "them. Take their layers out of target_modules, or check what cuts the graph (a detached forward, "
                "reentrant checkpointing without input gradients)."
            )
        if wild:
            raise ProofFailedError(
                f"{len(wild)} trainable tensors got a gradient that is not finite ({_some(wild)}). "
                "Use bf16 or fp32 instead of fp16, or lower the learning rate."
            )
        if last:
            for hook in self._hooks:
                hook.remove()
        if last and self.unmoved:
            raise ProofFailedError(
                f"{len(self.unmoved)} trainable pairs got only zero gradients in two steps ({_some(self.unmoved)}): "
                "they would never learn. Check that their layers take part in the forward pass, and that A is not zero."
            )


def _pair(name: str) -> str:
    """One name for both halves of a LoRA pair; other tensors stand for themselves."""
    for half in (".lora_A.", ".lora_B.", ".lora_embedding_A.", ".lora_embedding_B."):
        name = name.replace(half, ".lora.")
    return name.removesuffix(".weight")


def _some(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:3]) + (", ..." if len(ordered) > 3 else "")


Step = Callable[[list[dict[str, Any]]], None]


def longest_rows(table: Any, count: int, counted: Any = None) -> list[dict[str, Any]]:
    """Return the `count` longest rows of a tokenised table, longest first; `counted` may have the same rows' lengths."""
    known = counted if "length" in (getattr(counted, "column_names", None) or ()) else table
    known = known if len(known) == len(table) else table
    lengths = known["length"] if "length" in known.column_names else [len(ids) for ids in known["input_ids"]]
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])[:count]
    return [table[index] for index in order]


def fly(step: Step, rows: Sequence[dict[str, Any]], accumulation: int, describe_device: str) -> None:
    """Run `step` on the longest rows; when memory runs out, find by halving what would fit, and say so.

    `step` makes one whole step (forward, backward, optimizer) and undoes it.

    Raises:
        OutOfMemoryError: the batch does not fit; the text says which would.
    """
    longest = max(len(row["input_ids"]) for row in rows)
    count = len(rows)
    while count:
        try:
            step(list(rows[:count]))
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        else:
            break
        devices.empty_cache()
        count //= 2
    if count == len(rows):
        return
    wanted = (
        f"The longest batch of this run ({len(rows)} rows of up to {longest} tokens) does not fit on {describe_device}."
    )
    if count:
        times = -(-len(rows) * accumulation // count)
        raise OutOfMemoryError(
            f"{wanted} {count} rows would: set per_device_train_batch_size={count} and "
            f"gradient_accumulation_steps={times} for the same result."
        )
    raise OutOfMemoryError(
        f"{wanted} Not even one row does: set gradient_checkpointing=True, lower max_length, or take a smaller or "
        "quantised base."
    )


@contextmanager
def nothing_happened(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Put trained tensors, buffers, gradients, the whole optimizer and random numbers back as they were, whatever happens.

    An optimizer keeps what it knows in its state, in its groups (schedule-free, Prodigy) or in attributes of its own
    (bitsandbytes): all of it is copied before, but for the parameters, which stay the same objects.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before = [parameter.detach().clone() for parameter in trained]
    buffers = [
        (module, name, tensor, tensor.clone())
        for module in model.modules()
        for name, tensor in module._buffers.items()
        if tensor is not None and tensor.is_floating_point()
    ]
    masters = masters_of(optimizer)
    # Copied only where they say more than the weights: all of them again would be the peak of the run.
    copies = list(masters.beyond_rounding()) if masters is not None else []
    own = (optimizer, masters, model, *model.modules(), *model.parameters(), *(master for _, master, _ in copies))
    same: dict[int, Any] = {id(one): one for one in own}
    kept = copy.deepcopy(vars(optimizer), same)
    randomness = (random.getstate(), np.random.get_state(), torch.get_rng_state())
    on_device = devices.random_states()
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(trained, before, strict=True):
                parameter.copy_(value)
                parameter.grad = None
            for weight, master, kept_value in copies:
                master.copy_(weight if kept_value is None else kept_value)
            for module, name, tensor, value in buffers:
                module._buffers[name] = tensor.copy_(value)
        vars(optimizer).clear()
        vars(optimizer).update(kept)
        random.setstate(randomness[0])
        np.random.set_state(randomness[1])
        torch.set_rng_state(randomness[2])
        devices.set_random_states(on_device)
