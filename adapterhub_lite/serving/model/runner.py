"""The frozen base with a lora and a cache beside it: packed steps in, logits out, by the leanest pass that fits it."""

import hashlib

import torch
from transformers import PreTrainedModel

from adapterhub_lite.errors import ConfigurationError
from adapterhub_lite.serving.adapters.weights import Family, find_families
from adapterhub_lite.serving.model.batch import RowSlice, Step, pack
from adapterhub_lite.serving.model.forward_hf import HFForward
from adapterhub_lite.serving.model.forward_llama import LlamaForward, can_fuse, fused_groups
from adapterhub_lite.serving.model.kv_cache import KVCache, NativeAttention
from adapterhub_lite.serving.model.lora_native import NativeLora
from adapterhub_lite.serving.model.lora_torch import LoraBank, TorchLora
from adapterhub_lite.serving.model.native import row_attention, row_products


class ModelRunner:
    """A base model that only ever computes packed steps. Not thread-safe: one thread owns it.

    `fused` None chooses the lean pass where it computes the same; False always takes the model's own code. `native`
    None has adapters and short attention computed by compiled code on a CPU where there is a compiler; False never.

    Raises:
        ConfigurationError: no linear layers, or `native` is True and there is no compiled code for this base.
    """

    def __init__(
        self, model: PreTrainedModel, *, rows: int, fused: bool | None = None, native: bool | None = None
    ) -> None:
        self.model = model.requires_grad_(False)
        self.device = model.device
        self.rows = rows
        self.families: tuple[Family, ...] = find_families(model)
        if not self.families:
            raise ConfigurationError(f"{type(model).__name__} has no linear layers that adapters could be put beside.")
        config = model.config.get_text_config()
        self.max_length: int = getattr(config, "max_position_embeddings", None) or 1 << 20
        self.fused = can_fuse(model) if fused is None else fused
        groups = fused_groups(self.families) if self.fused else tuple((family,) for family in self.families)
        compiled = _may_compile(model, native)
        self.lora: LoraBank = _make_bank(model, groups, rows, compiled)
        kernel = row_attention() if compiled else None
        direct = None if kernel is None else NativeAttention(kernel)
        self.cache = KVCache(config.num_hidden_layers, rows, device=self.device, direct=direct)
        self._tensors: dict[str, torch.Tensor] = dict(model.named_parameters()) | dict(model.named_buffers())
        self._pass = (
            LlamaForward(model, self.lora, self.cache)
            if self.fused
            else HFForward(model, self.lora, self.cache, groups)
        )
        for name in self._pass.tensors():
            self._tensors.pop(name, None)
        if getattr(model, "is_quantized", False):
            # bitsandbytes puts 4-bit weights into another layout at their first use: before anybody takes a digest.
            self.forward(pack([RowSlice(0, 0, [0])], self.device))

    @torch.inference_mode()
    def forward(self, step: Step) -> torch.Tensor:
        """Compute a step; logits (rows of the step that want them, vocabulary) in float32, in the order of rows."""
        self.lora.begin(step)
        self.cache.begin(step)
        return self._pass.forward(step).float()

    def idle(self) -> None:
        """Give back memory that only long requests needed. Only when no row is in use."""
        self.cache.shrink()
        self.lora.shrink()

    def base_digest(self) -> str:
        """The sha256 over the base's weights as they are in memory now, the same whichever pass is used."""
        digest = hashlib.sha256()
        tensors = self._tensors | self._pass.tensors()
        for name, parameter in self._tensors.items():
            state = getattr(parameter, "quant_state", None)
            if state is not None:
                tensors[f"{name}.absmax"] = state.absmax
        for name, tensor in sorted(tensors.items()):
            digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def _may_compile(model: PreTrainedModel, native: bool | None) -> bool:
    """Whether compiled code computes the rows' own work. float16 is computed in on a GPU only, so it is not for that."""
    fits = model.device.type == "cpu" and model.dtype in (torch.float32, torch.bfloat16)
    if native and not (fits and row_products()):
        raise ConfigurationError(
            "There is no compiled code for this base: it needs a CPU, fp32 or bf16 and a compiler."
        )
    return fits and native is not False


def _make_bank(model: PreTrainedModel, groups: tuple[tuple[Family, ...], ...], rows: int, compiled: bool) -> LoraBank:
    products = row_products() if compiled else None
    if products is not None:
        return NativeLora(groups, rows, products)
    # Products in float32 are faster than in bfloat16 on a CPU, which converts small bf16 matrices at each call.
    dtype = torch.float32 if model.device.type == "cpu" else model.dtype
    return TorchLora(groups, rows, dtype=dtype, device=model.device)
