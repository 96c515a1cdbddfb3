"""The frozen base with LoRA and state for each row: packed steps in, logits out, by one of five forward passes."""

import hashlib
from enum import StrEnum

import torch
from transformers import PreTrainedModel

from adapterhub_lite.bases.structure import structure_of
from adapterhub_lite.errors import ConfigurationError
from adapterhub_lite.serving.adapters.weights import Family, Parts, find_families
from adapterhub_lite.serving.model.attention_native import NativeAttention
from adapterhub_lite.serving.model.elementwise import NativeElementwise, TorchElementwise
from adapterhub_lite.serving.model.forward_hf import HFForward
from adapterhub_lite.serving.model.forward_lean import LeanForward, can_fuse, fused_groups
from adapterhub_lite.serving.model.forward_rows import RowForward
from adapterhub_lite.serving.model.kv_cache import KVCache, RowSlice, Step, pack, token_bytes, unpack
from adapterhub_lite.serving.model.lora.changed_modules import ChangedModules
from adapterhub_lite.serving.model.lora.pairs_native import NativeLora
from adapterhub_lite.serving.model.lora.pairs_torch import LoraBank, RowAdapters, TorchLora
from adapterhub_lite.serving.model.native import compiled, row_attention, row_products
from adapterhub_lite.serving.model.row_states import RowStates


class ForwardKind(StrEnum):
    """How steps are computed, the fastest first."""

    LEAN = "lean"
    PACKED = "packed"
    STACKED = "stacked"
    ROWS = "row by row"
    RECOMPUTED = "recomputed"


class ModelRunner:
    """A base model that only ever computes steps. Not thread-safe: one thread owns it.

    `kind` None chooses the lean pass for the families that are described for it, else the packed one; `proof.prove` finds the
    first that computes what the model does. `native` None has adapters and short attention computed by compiled code
    on a CPU where there is a compiler; False never.

    Raises:
        ConfigurationError: `native` is True and there is no compiled code for this base.
    """

    def __init__(
        self, model: PreTrainedModel, *, rows: int, kind: ForwardKind | None = None, native: bool | None = None
    ) -> None:
        self.model = model.requires_grad_(False)
        self.device = model.device
        self.rows = rows
        self.families: tuple[Family, ...] = find_families(model)
        config = model.config.get_text_config()
        self.max_length: int = getattr(config, "max_position_embeddings", None) or 1 << 20
        self.kind = kind or (ForwardKind.LEAN if can_fuse(model) else ForwardKind.PACKED)
        self.structure = structure_of(model)
        self._changed = ChangedModules(model)
        # Rows whose adapter is put into the modules, and the pass that calls them.
        self._apart: dict[int, Parts] = {}
        self._modules_pass: HFForward | None = None
        self._tensors: dict[str, torch.Tensor] = dict(model.named_parameters()) | dict(model.named_buffers())
        self._states: RowStates | None = None
        self.cache: KVCache | RowForward
        self.lora: RowAdapters
        self._pass: LeanForward | HFForward | RowForward
        if self.kind in (ForwardKind.ROWS, ForwardKind.RECOMPUTED):
            keeps_state = self.kind == ForwardKind.ROWS
            self._pass = self.cache = RowForward(model, self.families, rows, keeps_state=keeps_state)
            self.lora = self._pass.lora
        else:
            self._pass = self._packed(model, native)
        for name in self._pass.tensors():
            self._tensors.pop(name, None)

    def _packed(self, model: PreTrainedModel, native: bool | None) -> LeanForward | HFForward:
        lean = self.kind == ForwardKind.LEAN
        groups = fused_groups(model, self.families) if lean else tuple((family,) for family in self.families)
        # float16 is computed in on a GPU only, so there is no compiled code for it.
        fits = model.device.type == "cpu" and model.dtype in (torch.float32, torch.bfloat16)
        products = row_products() if fits and native is not False else None
        if native and products is None:
            raise ConfigurationError(
                "There is no compiled code for this base: it needs a CPU, fp32 or bf16 and a compiler."
            )
        lora: LoraBank
        if products is not None:
            lora = NativeLora(groups, self.rows, products)
        else:
            # Products in float32 are faster than in bfloat16 on a CPU, which converts small bf16 matrices at each call.
            dtype = torch.float32 if model.device.type == "cpu" else model.dtype
            lora = TorchLora(groups, self.rows, dtype=dtype, device=model.device)
        self.lora = lora
        kernel = row_attention() if products is not None else None
        direct = None if kernel is None else NativeAttention(kernel)
        layers = model.config.get_text_config().num_hidden_layers
        self.cache = KVCache(
            layers,
            self.rows,
            device=self.device,
            direct=direct,
            token_bytes=token_bytes(model.config.get_text_config(), model.dtype),
        )
        if lean:
            library = compiled() if products is not None else None
            elementwise = TorchElementwise(model.dtype) if library is None else NativeElementwise(library)
            return LeanForward(model, lora, self.cache, elementwise)
        self._states = RowStates(model, self.rows) if self.kind == ForwardKind.STACKED else None
        return HFForward(model, lora, self.cache, self.families, self._states)

    @property
    def whole_prompts(self) -> bool:
        """Whether a prompt has to be computed in one piece: not every kind of state takes several tokens later on."""
        return self.kind in (ForwardKind.STACKED, ForwardKind.ROWS)

    @property
    def repeatable(self) -> bool:
        """Whether a step may be computed again after it failed: what it stores is stored at fixed places."""
        return self.kind not in (ForwardKind.STACKED, ForwardKind.ROWS)

    def set_cache_budget(self, budget: int) -> None:
        """Bound what keys and values may take, in bytes. Only when no row is in use."""
        self.cache.budget = budget
        self.cache.shrink()

    def most_rows(self, length: int) -> int:
        """How many rows of at most `length` tokens have room for their keys and values; 0: not even one."""
        return self.cache.most_rows(length)

    @torch.inference_mode()
    def forward(self, step: Step) -> torch.Tensor:
        """Compute a step; logits (tokens of the step that want them, vocabulary) in float32, in the order of rows.

        Rows that share an adapter which is put into the modules are computed in a call of their own.
        """
        if not any(row in self._apart for row in step.rows):
            return self._computed(step, self._pass)
        groups: dict[object, list[RowSlice]] = {}
        for part in unpack(step):
            key = tuple((one.weights.load_id, one.factor) for one in self._apart.get(part.row, ()))
            groups.setdefault(key, []).append(part)
        logits: dict[int, torch.Tensor] = {}
        for slices in groups.values():
            parts = self._apart.get(slices[0].row, ())
            own = pack(slices, self.device)
            if parts:
                by = self._with_modules()
                with self._changed.applied(parts, self.families):
                    found = self._computed(own, by)
            else:
                found = self._computed(own, self._pass)
            logits |= zip(own.rows, found.split(own.counts), strict=True)
        return torch.cat([logits[row] for row in step.rows])

    def _computed(self, step: Step, by: "LeanForward | HFForward | RowForward") -> torch.Tensor:
        self.lora.begin(step)
        if isinstance(self.cache, KVCache):
            self.cache.begin(step)
        return by.forward(step).float()

    def _with_modules(self) -> HFForward:
        """The pass that calls the model's own modules. After the lean pass they get back what it took, as it is used now."""
        if isinstance(self._pass, HFForward):
            return self._pass
        if self._modules_pass is None:
            assert isinstance(self.cache, KVCache), "row by row, modules are called anyway"
            for name, tensor in self._pass.tensors().items():
                path, _, parameter = name.rpartition(".")
                module = self.model.get_submodule(path)
                module._parameters[parameter] = torch.nn.Parameter(tensor, requires_grad=False)
            self._modules_pass = HFForward(self.model, None, self.cache, ())
        return self._modules_pass

    def _place(self, row: int, parts: Parts) -> None:
        self._apart.pop(row, None)
        apart = isinstance(self.cache, KVCache) and any(part.weights.extras for part in parts)
        if apart:
            self._apart[row] = parts
        self.lora.place(row, () if apart else parts)

    def admit(self, row: int, parts: Parts, length: int) -> None:
        """Give a row to a request answered with the sum of `parts`; `length` is the most tokens of any row now.

        Raises:
            Exception: what PyTorch raises where memory is short; the other rows stay as they are.
        """
        self.cache.reserve(length)
        self._place(row, parts)

    def move(self, source: int, target: int, parts: Parts, length: int) -> None:
        """Move a request of `length` computed tokens to another row."""
        self.cache.move(source, target, length)
        if self._states is not None:
            self._states.move(source, target)
        self.lora.leave(source)
        self._apart.pop(source, None)
        self._place(target, parts)

    @property
    def shares_prefixes(self) -> bool:
        """Whether keys and values are all that a row keeps, so that its beginning is another row's too."""
        return isinstance(self.cache, KVCache) and self._states is None

    @property
    def allocated(self) -> tuple[int, int]:
        """For how many rows of how many tokens there are keys and values now."""
        return self.cache.allocated if isinstance(self.cache, KVCache) else (0, 0)

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens' keys and values to another row."""
        self.cache.move(source, target, length)

    def leave(self, row: int) -> None:
        """A request is over: drop its adapter, and its state where that is an object of its own."""
        self.lora.leave(row)
        self._apart.pop(row, None)
        if isinstance(self.cache, RowForward):
            self.cache.spoil(row)

    def idle(self) -> None:
        """Give back memory that only long requests needed. Only when no row is in use."""
        self.cache.shrink()
        self.lora.shrink()

    def close(self) -> None:
        """Leave the model as it was."""
        self._pass.close()

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
