"""The frozen base with a bank beside its linear layers: packed tokens in, logits of each row's last token out.

Works for any causal language model of transformers whose attention goes through its attention interface, plain, 8-bit
or 4-bit: the model's own code runs, only its linear layers and its attention function are put around.
"""

import hashlib
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel

from adapterhub_lite.errors import ConfigurationError
from adapterhub_lite.serving.bank import RowBank
from adapterhub_lite.serving.cache import RowCache
from adapterhub_lite.serving.packing import Step
from adapterhub_lite.serving.weights import Family, find_families

ATTENTION = "adapterhub_rows"


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    row_cache: RowCache | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attend over the rows' own caches; query, key, value are (1, heads, T, head_dim), the result (1, T, heads, d)."""
    assert row_cache is not None, "the model was called around the trunk"
    if options.get("softcap") is not None or options.get("s_aux") is not None:
        raise ConfigurationError("This base caps its attention scores or adds sinks, which the engine cannot serve.")
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    layer: int = module.layer_idx  # type: ignore[assignment]
    return row_cache.attend(layer, q.contiguous(), k, v, scaling, sliding_window)[None], None


AttentionInterface.register(ATTENTION, _attention)


class BankLinear(nn.Module):
    """A frozen linear layer of any kind with the bank's delta added; (1, T, in) -> (1, T, out)."""

    def __init__(self, inner: nn.Module, bank: RowBank, family: str, layer: int) -> None:
        super().__init__()
        self.inner, self._bank, self._family, self._layer = inner, bank, family, layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.inner(x)
        self._bank.add(self._family, self._layer, x.flatten(0, -2), y.view(-1, y.shape[-1]))
        return y


class Trunk:
    """A base model that only ever computes packed steps. Not thread-safe: one thread owns it."""

    def __init__(self, model: PreTrainedModel, *, rows: int) -> None:
        self.model = model
        self.device = model.device
        self.rows = rows
        self.families: tuple[Family, ...] = find_families(model)
        if not self.families:
            raise ConfigurationError(f"{type(model).__name__} has no linear layers that adapters could be put beside.")
        # Products in float32 are faster than in bfloat16 on a CPU, which converts small bf16 matrices at each call.
        dtype = torch.float32 if self.device.type == "cpu" else model.dtype
        self.bank = RowBank(self.families, rows, dtype=dtype, device=self.device)
        config = model.config.get_text_config()
        self.cache = RowCache(config.num_hidden_layers, rows, device=self.device)
        self.max_length: int = getattr(config, "max_position_embeddings", None) or 1 << 20
        self.vocab_size: int = config.vocab_size
        self._tensors = dict(_named_tensors(model))
        for family in self.families:
            for layer, path in enumerate(family.paths):
                model.set_submodule(path, BankLinear(model.get_submodule(path), self.bank, family.name, layer))
        model.set_attn_implementation(ATTENTION)
        model.requires_grad_(False)

    @torch.inference_mode()
    def forward(self, step: Step) -> torch.Tensor:
        """Compute a step; logits (rows of the step, vocabulary) in float32, in the order of `step.rows`."""
        self.bank.begin(step)
        self.cache.begin(step)
        out = self.model(
            input_ids=step.token_ids[None],
            position_ids=step.positions[None],
            use_cache=False,
            logits_to_keep=step.last,
            row_cache=self.cache,
        )
        logits: torch.Tensor = out.logits[0]
        return logits.float()

    def idle(self) -> None:
        """Give back memory that only long requests needed. Only when no row is in use."""
        self.cache.shrink()

    def base_digest(self) -> str:
        """The sha256 over the base's weights as they are in memory now."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self._tensors.items()):
            digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def _named_tensors(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    found: list[tuple[str, torch.Tensor]] = [*model.named_parameters(), *model.named_buffers()]
    for name, parameter in model.named_parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            found.append((f"{name}.absmax", state.absmax))
    return found
