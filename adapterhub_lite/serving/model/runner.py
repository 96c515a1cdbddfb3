"""The frozen base with LoRA and state for each row: packed steps in, logits out, by one of five forward passes."""

import hashlib
from collections.abc import Sequence
from enum import StrEnum

import torch
from transformers import PreTrainedModel

from adapterhub_lite import devices
from adapterhub_lite.bases.structure import structure_of, token_bytes
from adapterhub_lite.devices import free_memory
from adapterhub_lite.errors import ConfigurationError, ResourceError
from adapterhub_lite.serving.adapters.weights import Family, Parts, find_families
from adapterhub_lite.serving.model.cache.kv_cache import KVCache
from adapterhub_lite.serving.model.cache.row_states import RowStates
from adapterhub_lite.serving.model.compiled.attention_native import NativeAttention
from adapterhub_lite.serving.model.compiled.library import StepFunctions, compiled, row_attention, row_products
from adapterhub_lite.serving.model.compiled.packed_weights import PanelStore, Precision
from adapterhub_lite.serving.model.decode_graphs import SHORTEST, DecodeGraphs
from adapterhub_lite.serving.model.forward_hf import HFForward
from adapterhub_lite.serving.model.forward_lean import LeanForward, fused_groups
from adapterhub_lite.serving.model.forward_native import NativeForward
from adapterhub_lite.serving.model.forward_rows import RowForward, cat_logits
from adapterhub_lite.serving.model.lean_families import can_fuse
from adapterhub_lite.serving.model.lora.changed_modules import ChangedModules
from adapterhub_lite.serving.model.lora.pairs_native import NativeLora
from adapterhub_lite.serving.model.lora.pairs_torch import LoraBank, RowAdapters, TorchLora
from adapterhub_lite.serving.model.packed_step import RowSlice, Step, pack, unpack

# Passes that hold the weights themselves, in a layout of their own.
TAKES_WEIGHTS = (LeanForward, NativeForward)


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
    on a CPU where there is a compiler; False never. `precision` has the base's linear layers kept as int8 or int4, which is
    for the compiled lean pass alone.

    Raises:
        ConfigurationError: `native` is True, or `precision` is given, and there is no compiled code for this base.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        rows: int,
        kind: ForwardKind | None = None,
        native: bool | None = None,
        precision: Precision | None = None,
        store: PanelStore | None = None,
    ) -> None:
        self.model = model.requires_grad_(False)
        self.device = model.device
        self.rows = rows
        self.precision = precision
        self.families: tuple[Family, ...] = find_families(model)
        config = model.config.get_text_config()
        self.max_length: int = getattr(config, "max_position_embeddings", None) or 1 << 20
        head = model.get_output_embeddings() or model.get_input_embeddings()
        self.vocabulary: int = getattr(head, "out_features", None) or head.weight.shape[0]  # type: ignore[assignment, index]
        self.kind = kind or (ForwardKind.LEAN if can_fuse(model) else ForwardKind.PACKED)
        self.structure = structure_of(model)
        self._changed = ChangedModules(model)
        # Rows whose adapter is put into the modules, and the pass that calls them.
        self._apart: dict[int, Parts] = {}
        # Rows whose adapter has tokens of its own -> how many there are with it.
        self._wider: dict[int, int] = {}
        self._modules_pass: HFForward | None = None
        self._tensors: dict[str, torch.Tensor] = dict(model.named_parameters()) | dict(model.named_buffers())
        self._states: RowStates | None = None
        self.graphs: DecodeGraphs | None = None
        self.cache: KVCache | RowForward
        self.lora: RowAdapters
        self._pass: LeanForward | NativeForward | HFForward | RowForward
        if self.kind in (ForwardKind.ROWS, ForwardKind.RECOMPUTED):
            keeps_state = self.kind == ForwardKind.ROWS
            self._pass = self.cache = RowForward(model, self.families, rows, keeps_state=keeps_state)
            self.lora = self._pass.lora
        else:
            self._pass = self._packed(model, native, precision, store)
        if precision is not None and not isinstance(self._pass, NativeForward):
            raise ConfigurationError(f"{type(model).__name__} cannot be kept as {precision} here.")
        for name in self._pass.tensors():
            self._tensors.pop(name, None)

    def _packed(
        self, model: PreTrainedModel, native: bool | None, precision: Precision | None, store: PanelStore | None
    ) -> LeanForward | NativeForward | HFForward:
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
            whole_heads=devices.is_accelerator(model.device),
            spare_place=products is None,
        )
        if lean:
            library = compiled()
            if isinstance(lora, NativeLora) and library is not None:
                return NativeForward(model, lora, self.cache, StepFunctions(library), precision=precision, store=store)
            return LeanForward(model, lora, self.cache)
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

    @property
    def shares_reads(self) -> bool:
        """Whether a few tokens more of a row cost next to nothing, and leave the others' logits as they are bit for bit."""
        return isinstance(self._pass, NativeForward)

    def set_cache_budget(self, budget: int) -> None:
        """Bound what keys, values and other states may take together, in bytes. Only when no row is in use.

        Other states are of one size for all rows, which a first token shows.
        """
        if self._states is not None:
            if not self._states.nbytes:
                self.admit(0, (), 1)
                self.forward(pack([RowSlice(row=0, token_ids=[0], start=0)], self.device))
                self.leave(0)
            budget = max(0, budget - self._states.nbytes)
        self.cache.budget = budget
        self.cache.shrink()

    def record_decoding(self, recorder: devices.Recorder | None) -> None:
        """Have steps of one token for each row recorded and replayed from now on, where that gives the same here.

        Tries it for every number of rows, on the base alone. Only when no row is in use, and after the last change of how
        the base is computed: a window that is another one later is not seen by what was recorded.
        """
        batched = self.kind in (ForwardKind.LEAN, ForwardKind.PACKED)
        if recorder is None or not batched or not isinstance(self.lora, TorchLora):
            return
        assert isinstance(self.cache, KVCache)
        self.graphs = DecodeGraphs(
            recorder,
            self.cache,
            self.lora,
            self.rows,
            plain=lambda step: self._plain(step, self._pass),
            forward=self._pass.forward,
        )
        used = range(next(n for n in range(self.rows, -1, -1) if self.fits([SHORTEST] * n)))
        for row in used:
            self.admit(row, (), SHORTEST)
        for count in sorted({min(1 << n, len(used)) for n in range(len(used).bit_length() + 1)} - {0}):
            for start, tokens in ((0, 2), (2, 1)):
                ids = [[(7 * row + at) % self.vocabulary for at in range(tokens)] for row in range(count)]
                self.forward(pack([RowSlice(row, start, ids[row]) for row in range(count)], self.device))
        for row in used:
            self.leave(row)

    @property
    def state_bytes(self) -> int:
        """Bytes that keys, values and other states have now."""
        return self.cache.nbytes + (0 if self._states is None else self._states.nbytes)

    def fits(self, needs: Sequence[int]) -> bool:
        """Whether rows of so many tokens have room for their keys and values, all together."""
        return self.cache.fits(needs)

    @torch.inference_mode()
    def forward(self, step: Step) -> torch.Tensor:
        """Compute a step; logits (tokens of the step that want them, vocabulary) in float32, in the order of rows.

        Rows that share an adapter which is put into the modules are computed in a call of their own. The vocabulary is
        the widest of the rows'; what one of them has not is -inf there: `width` says how much of it is its own.
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
        return cat_logits([logits[row] for row in step.rows])

    def width(self, row: int) -> int | None:
        """How many tokens a row is given logits of; None: as many as the base has."""
        return self._wider.get(row)

    def _computed(self, step: Step, by: "LeanForward | NativeForward | HFForward | RowForward") -> torch.Tensor:
        if self.graphs is not None and by is self._pass:
            return self.graphs.compute(step).float()
        return self._plain(step, by).float()

    def _plain(self, step: Step, by: "LeanForward | NativeForward | HFForward | RowForward") -> torch.Tensor:
        self.lora.begin(step)
        if isinstance(self.cache, KVCache):
            self.cache.begin(step, masks=not isinstance(by, NativeForward))
        return by.forward(step)

    def _with_modules(self) -> HFForward:
        """The pass that calls the model's own modules. After the lean pass they get back what it took, as it is used now."""
        if isinstance(self._pass, HFForward):
            return self._pass
        if self._modules_pass is None:
            assert isinstance(self.cache, KVCache) and isinstance(self._pass, TAKES_WEIGHTS), "the others call modules"
            needed, free = self._pass.copied_bytes, free_memory(self.device)
            if needed > free:
                raise ResourceError(
                    "An adapter that changes more than linear layers is computed with the base's plain weights, whose "
                    f"copy takes {needed:,} bytes, and {free:,} are free. Free some memory, or start the engine with a "
                    "smaller --cache-memory."
                )
            for name, tensor in self._pass.tensors().items():
                path, _, parameter = name.rpartition(".")
                module = self.model.get_submodule(path)
                module._parameters[parameter] = torch.nn.Parameter(tensor, requires_grad=False)
            self.model.tie_weights()
            self._modules_pass = HFForward(self.model, None, self.cache, ())
        return self._modules_pass

    def _place(self, row: int, parts: Parts) -> None:
        self._apart.pop(row, None)
        self._wider.pop(row, None)
        if wider := max((part.weights.rows for part in parts), default=0):
            self._wider[row] = wider
        apart = isinstance(self.cache, KVCache) and any(part.weights.extras for part in parts)
        if apart:
            self._with_modules()  # where memory is short for that, it is said now
            self._apart[row] = parts
        self.lora.place(row, () if apart else parts)

    def admit(self, row: int, parts: Parts, length: int) -> None:
        """Give a row to a request of at most `length` tokens, answered with the sum of `parts`.

        Raises:
            Exception: what PyTorch raises where memory is short; the other rows stay as they are.
        """
        self.cache.reserve(row, length)
        self._place(row, parts)

    def move(self, source: int, target: int, parts: Parts) -> None:
        """Move a request to another row."""
        self.cache.move(source, target)
        if self._states is not None:
            self._states.move(source, target)
        self.lora.leave(source)
        self._apart.pop(source, None)
        self._wider.pop(source, None)
        self._place(target, parts)

    @property
    def shared_cache(self) -> KVCache | None:
        """The cache, where keys and values are all that a row keeps, so that its beginning is another row's too."""
        return self.cache if isinstance(self.cache, KVCache) and self._states is None else None

    def leave(self, row: int) -> None:
        """A request is over: drop its adapter, and its state where that is an object of its own."""
        self.lora.leave(row)
        self._apart.pop(row, None)
        self._wider.pop(row, None)
        self.cache.leave(row)

    def idle(self) -> None:
        """Give back memory that only long requests or adapters computed apart needed. Only when no row is in use."""
        self.cache.shrink()
        self.lora.shrink()
        if self._modules_pass is not None and isinstance(self._pass, TAKES_WEIGHTS):
            self._modules_pass.close()
            self._modules_pass = None
            self._pass.take_again()

    def close(self) -> None:
        """Leave the model as it was."""
        if self.graphs is not None:
            self.graphs.clear()
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
