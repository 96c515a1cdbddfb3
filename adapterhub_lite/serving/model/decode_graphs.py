"""Steps in which every row computes one token, recorded on the device and replayed: one launch in place of thousands.

A device that runs what it was asked for by itself is idle while Python asks, and a token of each row is little to compute.
A recorder (`devices.graph_recorder`) keeps what a call asked of the device, with the addresses of its memory, and replays it.
So what differs from step to step is written into `inputs` first: token, position, and where the row's keys and values begin.
What cannot be written there is in the key of a graph: the number of rows, filled up to a power of two, a bound on their
lengths, and the first place of their adapters in the bank. Which adapter a place holds may change between two replays.

A graph is used only after its replay has given what the plain step gave, when it was recorded. A difference or any error while
recording ends that for good: the plain steps go on, and `refusal` says why. Where memory was taken or given back since,
a graph would write into what is not there any more: all are dropped and recorded again as they are needed.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch

from adapterhub_lite.devices import Recorder
from adapterhub_lite.serving.model.cache.kv_cache import KVCache
from adapterhub_lite.serving.model.lora.pairs_torch import TorchLora
from adapterhub_lite.serving.model.packed_step import Step
from adapterhub_lite.serving.model.tolerances import TOLERANCE, TOLERANCE_16_BITS, check_within, relative_difference

logger = logging.getLogger(__name__)
SHORTEST, LONGEST = 256, 4096  # tokens of the rows; with more of them, copying their keys takes longer than asking
MOST = 48
Compute = Callable[[Step], torch.Tensor]


@dataclass(frozen=True)
class Key:
    """What a graph is of: `rows`, none with more than `keys` tokens, whose adapters lie from place `first` on."""

    rows: int
    keys: int
    first: int | None


@dataclass(frozen=True)
class Graph:
    """A recorded step: `inputs` (3, rows) are token ids, positions and begins, `logits` what `replay` writes."""

    inputs: torch.Tensor
    logits: torch.Tensor
    replay: Callable[[], None]


class DecodeGraphs:
    """Computes steps, those of one token for each row by graphs where that was shown to be right.

    `plain` computes any step, with everything that begins it; `forward` computes one for which cache and bank have begun.
    """

    def __init__(
        self, recorder: Recorder, cache: KVCache, lora: TorchLora, rows: int, *, plain: Compute, forward: Compute
    ) -> None:
        self._recorder, self._cache, self._lora, self._rows = recorder, cache, lora, rows
        self._plain, self._forward = plain, forward
        self._graphs: OrderedDict[Key, Graph] = OrderedDict()
        self._allocations = (0, 0)
        self.refusal = ""
        self.replayed = 0

    @property
    def keys(self) -> tuple[Key, ...]:
        """What is recorded now."""
        return tuple(self._graphs)

    def compute(self, step: Step) -> torch.Tensor:
        """The logits (tokens that want them, vocabulary) of a step."""
        if self.refusal or not decodes(step):
            return self._plain(step)
        key = self._key(step)
        begins = self._cache.begins(step, key.rows)
        self._forget_what_moved()
        if key not in self._graphs:
            return self._recorded(key, step, begins)
        self._graphs.move_to_end(key)
        return self._replayed(self._graphs[key], step, begins)

    def clear(self) -> None:
        """Drop what was recorded."""
        self._graphs.clear()

    def _key(self, step: Step) -> Key:
        count = len(step.rows)
        first = self._lora.line_up(slice(step.rows[0], step.rows[-1] + 1))
        rows = min(1 << (count - 1).bit_length(), self._rows - (first or 0))
        longest = max(run.kv_length for run in step.runs)
        return Key(rows, max(SHORTEST, 1 << (longest - 1).bit_length()), first)

    def _recorded(self, key: Key, step: Step, begins: torch.Tensor) -> torch.Tensor:
        """The plain logits of a step, of which a graph is recorded and compared."""
        truth = self._plain(step)
        if not bool(truth.isfinite().all()):
            return truth  # the fault of an adapter, and nothing to compare with
        try:
            graph = self._record(key, truth.device)
            found = self._replayed(graph, step, begins)
            tolerance = TOLERANCE if truth.dtype == torch.float32 else TOLERANCE_16_BITS
            for ours, own in zip(found.float(), truth.float(), strict=True):
                check_within(tolerance, relative_difference(ours, own))
        except Exception as error:
            self.refusal = f"{type(error).__name__}: {error}"[:300]
            logger.warning("Steps are computed without CUDA graphs: %s", self.refusal)
            logger.debug("What stopped the recording:", exc_info=True)
            self.clear()
            return truth
        self._forget_what_moved()
        while len(self._graphs) >= MOST:
            self._graphs.popitem(last=False)
        self._graphs[key] = graph
        return truth

    def _forget_what_moved(self) -> None:
        now = (self._cache.allocations, self._lora.allocations)
        if now != self._allocations:
            self._graphs.clear()
            self._allocations = now

    def _record(self, key: Key, device: torch.device) -> Graph:
        inputs = torch.zeros(3, key.rows, dtype=torch.long, device=device)
        inputs[2] = self._cache.places
        count = key.rows

        def call() -> torch.Tensor:
            ids, positions, begins = inputs.unbind()
            # Made in here: what a graph reads has to be there as long as it is, and `inputs` is all that it keeps.
            whole = torch.arange(count, device=device)
            self._lora.begin_places(key.first, count)
            self._cache.begin_gathered(begins, positions, key.keys)
            step = Step(ids, positions, whole, whole, whole, (1,) * count, tuple(range(count)), ())
            return self._forward(step)

        logits, replay = self._recorder.record(call)
        return Graph(inputs, logits, replay)

    def _replayed(self, graph: Graph, step: Step, begins: torch.Tensor) -> torch.Tensor:
        count = len(step.rows)
        graph.inputs[0, :count] = step.token_ids
        graph.inputs[1, :count] = step.positions
        graph.inputs[1, count:] = 0
        graph.inputs[2] = begins
        graph.replay()
        self.replayed += 1
        return graph.logits[:count].clone()


def decodes(step: Step) -> bool:
    """Whether neighbouring rows compute one token each, and none is longer than a graph takes."""
    if step.counts != (1,) * len(step.rows):
        return False
    neighbours = step.rows == tuple(range(step.rows[0], step.rows[0] + len(step.rows)))
    return neighbours and all(run.query_length == 1 and run.kv_length <= LONGEST for run in step.runs)
