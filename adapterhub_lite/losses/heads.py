"""The output head of a causal language model, read at call time. Knows torch and duck typing; never imports peft."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from adapterhub_lite.errors import ConfigurationError
from adapterhub_lite.losses.rows import held_whole, is_quantised, is_sharded, is_zero3, open_rows, rows_shape, whole

KNOWN_FAMILIES = frozenset(
    (
        *("cohere", "cohere2", "falcon_h1", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "granite"),
        *("granitemoe", "hyperclovax", "llama", "minicpm3", "mistral", "olmo2", "phi", "phi3", "qwen2", "qwen3"),
        *("smollm3", "starcoder2"),
    )
)
"""Model types whose logits are known to be what `head_of` says: a test compares each with the model's own."""


class CausalModel(Protocol):
    """What a head is found by: a causal language model of transformers, or PEFT's wrapper around one."""

    @property
    def config(self) -> Any:  # a config of transformers: its fields differ by family
        """The model's config."""

    def get_output_embeddings(self) -> nn.Module | None:
        """The module that makes the logits."""


@dataclass(frozen=True)
class Head:
    """Where the logits of a model come from: cap(scale * (hidden @ weight.T + bias)).

    `module` is what the model calls. Everything is read from it when asked, so that a switched adapter, a swapped
    weight or an optimizer step is seen. `family` is the model type, None where it is not known.
    """

    module: nn.Module
    softcap: float | None = None
    logit_scale: float = 1.0
    family: str | None = None

    @property
    def plain(self) -> nn.Module:
        """The module that holds the weight: inside a LoRA layer the base, in modules_to_save the active copy."""
        module: Any = self.module  # a wrapper of PEFT, known by its attributes
        copies = getattr(module, "modules_to_save", None)
        if isinstance(copies, nn.ModuleDict):
            active = [name for name in module.active_adapters if name in copies]
            module = module.original_module if module.disable_adapters or not active else copies[active[0]]
        tokens = getattr(module, "token_adapter", None)
        module = module if tokens is None else tokens
        while hasattr(module, "base_layer"):
            module = module.base_layer
        assert isinstance(module, nn.Module)
        return module

    @property
    def weight(self) -> Tensor:
        """The (V, D) weight of the head as it is now; packed, partitioned or empty if it is held so."""
        weight = self.plain.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def device(self) -> torch.device | None:
        """Where the head is, whatever its weight is called; None while it is offloaded: it goes where its input is."""
        found = next((x.device for x in (*self.module.parameters(), *self.module.buffers())), None)
        return None if found is None or found.type == "meta" else found

    @property
    def bias(self) -> Tensor | None:
        """The (V,) bias, or None."""
        bias = getattr(self.plain, "bias", None)
        return bias if isinstance(bias, Tensor) else None

    @property
    def trained(self) -> bool:
        """Whether the head gets a gradient: its weight, its bias or a LoRA pair on it."""
        return any(parameter.requires_grad for parameter in self._parameters())

    def _parameters(self) -> list[Tensor]:
        """Weight, bias and the matrices of the LoRA pairs."""
        pairs = [x for pair in self.low_rank() for x in (pair.down_weight, pair.up_weight)]
        pairs += [values for _, values in self.token_rows()]
        return [x for x in (getattr(self.plain, "weight", None), self.bias, *pairs) if isinstance(x, Tensor)]

    def low_rank(self) -> tuple["LowRankPair", ...]:
        """The active LoRA pairs on the head, unmerged, in the order the layer adds them."""
        layer: Any = self.module  # a LoRA layer of PEFT, known by its attributes
        if not _is_lora(layer) or layer.disable_adapters or layer.merged:
            return ()
        return tuple(
            LowRankPair(layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name], layer.scaling[name])
            for name in layer.active_adapters
            if name in layer.lora_A
        )

    def token_rows(self) -> tuple[tuple[list[int], Tensor], ...]:
        """Rows that stand in place of the weight's own (PEFT's `trainable_token_indices`): numbers, values (k, D)."""
        layer: Any = getattr(self.module, "token_adapter", None)  # a layer of PEFT, known by its attributes
        if layer is None or layer.disable_adapters or layer.merged:
            return ()
        values = layer.trainable_tokens_delta
        return tuple((layer.token_indices[name], values[name]) for name in layer.active_adapters if name in values)

    @property
    def widens(self) -> bool:
        """Whether `widened` gives the head more columns."""
        return bool(self.low_rank() or self.token_rows())

    def unreadable(self) -> str | None:
        """Why the tiles cannot compute these logits from weight, bias and LoRA pairs; None when they can."""
        refusal = self._no_linear_map()
        if refusal is not None:
            return refusal
        if self.weight.device.type == "meta":
            return "the head's weight is offloaded outside its module"
        if any(is_zero3(parameter) and parameter.requires_grad for parameter in self._parameters()):
            return "a trained head under ZeRO-3 can only be read inside its module"
        return None

    def _no_linear_map(self) -> str | None:
        plain = self.plain
        layer: Any = self.module  # as in `low_rank`
        if _is_lora(layer) and self.low_rank():
            if any(name in layer.lora_variant for name in layer.active_adapters):
                return "a LoRA variant such as DoRA on the head is more than a low-rank sum"
            if any(pair.up_module.bias is not None for pair in self.low_rank()):
                return "a LoRA on the head has a bias of its own"
        elif rows := self.token_rows():
            if self.bias is not None:
                return "PEFT leaves the head's bias out where some of its rows are trained"
            if sum(len(numbers) for numbers, _ in rows) > self.weight.shape[-1]:
                return "more rows of tokens are trained than a row has numbers"
        elif hasattr(layer, "base_layer") and not _is_lora(layer):
            return f"the head is wrapped by {type(layer).__name__}, which is no LoRA"
        weight = getattr(plain, "weight", None)
        if not isinstance(weight, Tensor):
            return f"{type(plain).__name__} has no weight"
        if type(plain).forward is not nn.Linear.forward and not is_quantised(weight):
            return f"{type(plain).__name__} does not compute a plain linear map"
        return None

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (n, V) of hidden states (n, D) by the module itself, whatever it computes."""
        return self._finished(self.module(hidden))

    @contextmanager
    def opened(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """Yield `logits`, for evaluation. A head that is split over processes is gathered once and none of its modules is
        run, so that each process may ask as often as it needs: ZeRO-3 expects all processes to run the same modules."""
        if self._no_linear_map() or not any(is_zero3(x) or is_sharded(x) for x in self._parameters()):
            yield self.logits
            return
        with torch.no_grad(), held_whole(self._parameters()), open_rows(self.weight) as read:
            rows, bias = read(slice(0, rows_shape(self.weight)[0])), self.bias
            bias = None if bias is None else whole(bias)
            pairs = [pair.matrices() for pair in self.low_rank()]

            def logits(hidden: Tensor) -> Tensor:
                widened, extra = self.widened(hidden, pairs)
                return self._finished(
                    nn.functional.linear(widened, rows if extra is None else torch.cat([rows, extra], 1), bias)
                )

            yield logits

    def _finished(self, logits: Tensor) -> Tensor:
        if self.logit_scale != 1.0:
            logits = logits * self.logit_scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    def widened(
        self, hidden: Tensor, matrices: list[tuple[Tensor, Tensor]] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Hidden states (n, D + r) and more columns of the head (V, r), so that LoRA pairs, or rows of tokens, are one
        linear map: what a token's row became less what it was is a column for it alone.

        `matrices` are those of the pairs, where they were gathered before: then nothing is dropped out."""
        pairs = self.low_rank()
        if rows := self.token_rows():
            numbers = torch.tensor([number for some, _ in rows for number in some], device=hidden.device)
            values, own = torch.cat([values for _, values in rows]), self.weight.detach()[numbers]
            # Rounded as PEFT rounds them, and subtracted before they are rounded again.
            moved = values.to(own.dtype).float() - own.float()
            column = nn.functional.linear(hidden.float(), moved).to(hidden.dtype)
            places = hidden.new_zeros(self.weight.shape[0], len(numbers))
            places[numbers, torch.arange(len(numbers), device=hidden.device)] = 1.0
            return torch.cat([hidden, column], 1), places
        if not pairs:
            return hidden, None
        inputs = [hidden if matrices else pair.dropped(hidden) for pair in pairs]
        matrices = matrices or [pair.matrices() for pair in pairs]
        downs = [
            (nn.functional.linear(states.to(a.dtype), a) * pair.scaling).to(hidden.dtype)
            for states, pair, (a, _) in zip(inputs, pairs, matrices, strict=True)
        ]
        return torch.cat([hidden, *downs], 1), torch.cat([b for _, b in matrices], 1)


@dataclass(frozen=True)
class LowRankPair:
    """One LoRA on the head: B @ A, of rank r."""

    down_module: nn.Module
    up_module: nn.Module
    dropout: nn.Module
    scaling: float

    @property
    def down_weight(self) -> Tensor:
        """A, (r, D), as it is held."""
        return cast(Tensor, self.down_module.weight)

    @property
    def up_weight(self) -> Tensor:
        """B, (V, r), as it is held."""
        return cast(Tensor, self.up_module.weight)

    def matrices(self) -> tuple[Tensor, Tensor]:
        """A and B, gathered where they are split over processes: then all of them must call."""
        return whole(self.down_weight), whole(self.up_weight)

    def dropped(self, hidden: Tensor) -> Tensor:
        """Hidden states (n, D) as A gets them: in its dtype, after the dropout."""
        states: Tensor = self.dropout(hidden.to(self.down_weight.dtype))
        return states


def head_of(model: CausalModel) -> Head:
    """Find the output head of a causal language model, also of one that PEFT wraps.

    Raises:
        ConfigurationError: the model has no output head.
    """
    module = model.get_output_embeddings()
    if module is None:
        raise ConfigurationError(f"{type(model).__name__} has no output embeddings: a causal language model is needed.")
    config = model.config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None)
    # The factor on the logits under the names that families give it: Cohere's, Falcon-H1's, Granite's and MiniCPM3's.
    names = ("logit_scale", "lm_head_multiplier")
    scale = next((float(value) for name in names if (value := getattr(config, name, None)) is not None), 1.0)
    divisor = getattr(config, "logits_scaling", None)
    if divisor is not None and all(getattr(config, name, None) is None for name in names):
        # HyperCLOVA X multiplies by what Granite and MiniCPM3 divide by.
        scale = float(divisor) if config.model_type == "hyperclovax" else 1.0 / float(divisor)
    return Head(module, softcap or None, scale, getattr(config, "model_type", None))


def _is_lora(module: nn.Module) -> bool:
    return hasattr(module, "base_layer") and hasattr(module, "lora_A")
