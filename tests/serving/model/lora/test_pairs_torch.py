"""Going back and forth between tasks copies nothing, and a batch after it still answers each row as if alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapterhub_lite.serving import GenerationRequest, InferenceEngine
from adapterhub_lite.serving.model.lora.pairs_torch import GroupBank


@pytest.fixture
def fills(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The places of the bank that were filled, as it happens; the filling itself is the real one."""
    seen: list[int] = []
    real = GroupBank.fill

    def watched(self: GroupBank, row: int, parts: Any) -> None:
        seen.append(row)
        real(self, row, parts)

    monkeypatch.setattr(GroupBank, "fill", watched)
    return seen


def test_switching_back_copies_nothing_and_stays_right(
    make_engine: Callable[..., InferenceEngine], alone: Any, adapters: dict[str, Path], fills: list[int]
) -> None:
    engine = make_engine(max_rows=8)
    tasks: list[Path | None] = [None, *adapters.values()]
    wanted = {task: alone.tokens("switch", *([task] if task else [])) for task in tasks}

    def ask(task: Path | None) -> GenerationRequest:
        return GenerationRequest(prompt="switch", adapter=task, max_new_tokens=12)

    # Twice: a larger rank than before makes the bank wider, and forgets what it held.
    for task in tasks * 2:
        assert engine.generate(ask(task)).token_ids == wanted[task]
    before = len(fills)
    for task in tasks[::-1] * 3:
        assert engine.generate(ask(task)).token_ids == wanted[task]
    assert len(fills) == before
    # Places are shuffled by now; batches of every size and order must not care.
    for size in range(2, 7):
        batch = (tasks * 3)[size : 2 * size]
        for task, result in zip(batch, engine.generate_many([ask(task) for task in batch]), strict=True):
            assert result.token_ids == wanted[task]
        assert engine.generate(ask(tasks[-1])).token_ids == wanted[tasks[-1]]
