"""Recorded steps: a replay gives what the plain step gives, whoever is in the rows, however long they are; or none is used."""

import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from adapterhub_lite.bases import load_base_model
from adapterhub_lite.serving import GenerationRequest, InferenceEngine
from adapterhub_lite.serving.adapters.weights import Part, Parts
from adapterhub_lite.serving.engine import engine as engine_module
from adapterhub_lite.serving.model.decode_graphs import LONGEST, decodes
from adapterhub_lite.serving.model.packed_step import RowSlice, pack
from adapterhub_lite.serving.model.proof import random_adapter
from adapterhub_lite.serving.model.runner import ForwardKind, ModelRunner
from tests.serving.model.families import build
from tests.serving.model.tape import TapeRecorder

ROWS = 5


class Both:
    """Two runners of one base, of which the second has recorded steps; every step is computed by both, and compared."""

    def __init__(self, base: Path, kind: ForwardKind, dtype: torch.dtype = torch.float32) -> None:
        models = [load_base_model(base, dtype=dtype) for _ in range(2)]
        self.plain, self.recorded = (ModelRunner(model, rows=ROWS, kind=kind, native=False) for model in models)
        self.recorded.record_decoding(TapeRecorder())
        self.known: dict[int, list[int]] = {}
        self.parts: dict[int, Parts] = {}
        self.draw = random.Random(5)
        self.last: tuple[torch.Tensor, torch.Tensor] | None = None

    def join(self, row: int, length: int, parts: Parts = (), need: int = 0) -> None:
        ids = [self.draw.randrange(self.plain.vocabulary) for _ in range(length)]
        for runner in (self.plain, self.recorded):
            runner.admit(row, parts, max(need, length + 1))
        self.known[row], self.parts[row] = ids, parts
        self.step([RowSlice(row, 0, ids)])

    def leave(self, row: int) -> None:
        """The last row moves into the hole."""
        last = max(self.known)
        for runner in (self.plain, self.recorded):
            runner.leave(row)
            if last != row:
                runner.move(last, row, self.parts[last])
        self.known[row], self.parts[row] = self.known[last], self.parts[last]
        del self.known[last], self.parts[last]

    def decode(self) -> None:
        slices = []
        for row, ids in sorted(self.known.items()):
            ids.append(self.draw.randrange(self.plain.vocabulary))
            slices.append(RowSlice(row, len(ids) - 1, ids[-1:]))
        self.step(slices)

    def step(self, slices: list[RowSlice]) -> None:
        ours, own = (runner.forward(pack(slices)) for runner in (self.recorded, self.plain))
        torch.testing.assert_close(ours, own, atol=1e-4, rtol=1e-4)
        if self.last is not None:
            assert torch.equal(*self.last), "another step has written into the logits of the one before"
        self.last = ours, ours.clone()


def tasks(runner: ModelRunner, count: int) -> list[Parts]:
    """The base, single adapters, and blends, which are of a larger rank."""
    draw = torch.Generator().manual_seed(4)
    made = [Part(random_adapter(runner.families, runner.model, draw)) for _ in range(count)]
    return [(), *((one,) for one in made), (made[0], made[1]), tuple(made)]


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("llama", ForwardKind.LEAN),
        ("qwen2_swa", ForwardKind.LEAN),
        ("gemma2", ForwardKind.LEAN),
        ("qwen3", ForwardKind.PACKED),
        ("gpt2", ForwardKind.PACKED),
        ("gpt_oss", ForwardKind.PACKED),
    ],
)
def test_a_replay_is_the_plain_step_for_any_rows(
    tmp_path: Path, byte_tokenizer: Any, family: str, kind: ForwardKind
) -> None:
    both = Both(build(family, tmp_path, byte_tokenizer), kind)
    graphs = both.recorded.graphs
    assert graphs is not None and not graphs.refusal and len(graphs.keys) == 4, (
        "one for each number of rows: 1, 2, 4, 5"
    )
    choices = itertools.cycle(tasks(both.plain, 3))
    before = graphs.replayed
    for turn in range(24):
        count = len(both.known)
        if count < ROWS and (count == 0 or turn % 3 == 0):
            # Some rows are longer than the bound of most, and the cache grows for what others may need.
            length, need = both.draw.choice((1, 3, 17, 40, 290)), both.draw.choice((0, 700))
            both.join(count, length, next(choices), need)
        elif turn % 5 == 4:
            both.leave(both.draw.choice(sorted(both.known)))
        for _ in range(2 if both.known else 0):
            both.decode()
    assert not graphs.refusal and graphs.replayed > before + 20
    assert both.plain.base_digest() == both.recorded.base_digest()


def test_a_row_that_grows_goes_through_every_bound(tiny_base: Path) -> None:
    both = Both(tiny_base, ForwardKind.LEAN)
    (_, one, *_) = tasks(both.plain, 2)
    both.join(0, 250, one)
    both.join(1, 3)
    for _ in range(20):
        both.decode()
    assert both.recorded.graphs is not None and not both.recorded.graphs.refusal
    assert {key.keys for key in both.recorded.graphs.keys} == {256, 512}


def test_a_lone_row_has_its_adapter_where_it_lies(tiny_base: Path) -> None:
    """A row that is alone takes over the place that holds its task: which one that is, is the graph's own."""
    both = Both(tiny_base, ForwardKind.LEAN)
    choices = tasks(both.plain, 3)
    for turn in range(9):
        both.join(0, 4, choices[turn % 3])
        both.decode()
        both.decode()
        both.leave(0)
    assert both.recorded.graphs is not None and not both.recorded.graphs.refusal


def test_rows_that_leave_are_filled_up_by_what_nobody_reads(tiny_base: Path) -> None:
    both = Both(tiny_base, ForwardKind.LEAN)
    for row in range(4):
        both.join(row, 9 + row)
    both.decode()
    both.leave(1)
    both.decode()
    both.join(3, 2)
    both.decode()
    assert both.recorded.graphs is not None and not both.recorded.graphs.refusal


def test_only_short_neighbours_of_one_token_are_recorded() -> None:
    assert decodes(pack([RowSlice(3, 9, [1]), RowSlice(4, 2, [1])]))
    assert not decodes(pack([RowSlice(3, 9, [1]), RowSlice(5, 2, [1])]))
    assert not decodes(pack([RowSlice(3, 9, [1, 2], 2)]))
    assert not decodes(pack([RowSlice(3, 9, [1], 0)]))
    assert not decodes(pack([RowSlice(0, LONGEST, [1])]))


class Waiting(TapeRecorder):
    """A device whose replay does not see what has changed."""

    def record(self, call: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Callable[[], None]]:
        out, _ = super().record(call)
        return out, lambda: None


class Failing(TapeRecorder):
    """A device that cannot record."""

    def record(self, call: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Callable[[], None]]:
        raise RuntimeError("CUDA error: operation failed due to a previous error during capture")


@pytest.mark.parametrize(("recorder", "said"), [(Waiting, "logits differ"), (Failing, "previous error during capture")])
def test_what_is_not_shown_to_be_right_is_not_used(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch, recorder: Any, said: str
) -> None:
    requests = [GenerationRequest(prompt=f"prompt {i}", max_new_tokens=5) for i in range(3)]
    answers = []
    for chosen in (None, recorder()):
        monkeypatch.setattr(engine_module, "graph_recorder", lambda _, chosen=chosen: chosen)
        with InferenceEngine.from_base(tiny_base, dtype="float32", max_rows=4, native=False) as engine:
            answers.append([one.token_ids for one in engine.generate_many(requests)])
            status = engine.status()
    assert answers[0] == answers[1]
    assert said in status.no_graphs and (status.graphs, status.graphs_replayed) == (0, 1 if recorder is Waiting else 0)


def test_a_base_that_waits_for_the_device_is_not_recorded(tmp_path: Path, byte_tokenizer: Any) -> None:
    """Dynamic rotary frequencies ask how long the row is, in Python: a replay would not ask again."""
    model = load_base_model(build("llama_dynrope", tmp_path, byte_tokenizer), dtype=torch.float32)
    runner = ModelRunner(model, rows=2, kind=ForwardKind.PACKED, native=False)
    runner.record_decoding(TapeRecorder())
    assert runner.graphs is not None and "not permitted when stream is capturing" in runner.graphs.refusal


def test_the_engine_answers_the_same_and_says_how(
    tiny_base: Path, adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [None, *adapters.values()]
    requests = [
        GenerationRequest(prompt=f"number {i} " * (1 + 3 * i), adapter=folders[i % len(folders)], max_new_tokens=9 + i)
        for i in range(9)
    ]
    monkeypatch.setattr(engine_module, "graph_recorder", lambda _: TapeRecorder())
    found = {}
    for graphs in (False, True):
        with InferenceEngine.from_base(tiny_base, dtype="float32", max_rows=6, native=False, graphs=graphs) as engine:
            found[graphs] = [list(one.token_ids) for one in engine.generate_many(requests)]
            status = engine.status()
            assert (status.graphs > 0, status.graphs_replayed > 5, status.no_graphs) == (graphs, graphs, "")
    assert found[True] == found[False]


def test_numbers_of_an_adapter_out_of_range_end_no_recording(tiny_base: Path) -> None:
    both = Both(tiny_base, ForwardKind.LEAN)
    (_, one, *_) = tasks(both.plain, 2)
    huge = Part(one[0].weights, 1e38)
    runner = both.recorded
    runner.admit(0, (huge, huge), 4)
    runner.forward(pack([RowSlice(0, 0, [1, 2])]))
    assert not runner.forward(pack([RowSlice(0, 2, [1])])).isfinite().all()
    assert runner.graphs is not None and not runner.graphs.refusal
    runner.leave(0)
    both.join(0, 4, one)
    both.decode()
    both.decode()
