"""The engine on the device that is rehearsed, or on the CPU: `python -m tests.rehearsal.serving DEVICE BASE ADAPTER... `.

Prints as JSON the answers of mixed batches, and for the device where the CPU waited for it in the steps of the engine, and how
many of them were replayed from a tape.
"""

import json
import sys
from pathlib import Path
from typing import Any

from tests.rehearsal import device as rehearsal


def main(where: str, base: str, *adapters: str) -> None:
    """Answer greedy, sampled, constrained and scored requests, in one batch and one by one."""
    mode = rehearsal.install() if where == rehearsal.NAME else None
    if mode is not None:
        mode.__enter__()
    from adapterhub_lite.serving import GenerationRequest, InferenceEngine
    from adapterhub_lite.serving.engine import engine as engine_module
    from tests.serving.model.tape import TapeRecorder

    if mode is not None:
        engine_module.graph_recorder = lambda _: TapeRecorder()
    found: dict[str, Any] = {}
    for dtype in ("float32", "bfloat16"):
        engine = InferenceEngine.from_base(Path(base), device=where, dtype=dtype, max_rows=6, native=False)
        with engine:
            kinds: list[dict[str, Any]] = [
                {"max_new_tokens": 12},
                {"temperature": 0.9, "seed": 3, "top_p": 0.9, "top_k": 40, "max_new_tokens": 12, "logprobs": 2},
                {"repetition_penalty": 1.3, "presence_penalty": 0.4, "max_new_tokens": 8},
                {"regex": "[0-9]{4}", "max_new_tokens": 8},
                {"labels": ["yes", "no"]},
                {"max_new_tokens": 4, "prompt_logprobs": 1},
            ]
            requests = [
                GenerationRequest(
                    prompt=f"prompt number {i} " * (1 + 4 * i),
                    adapter=[None, *map(Path, adapters)][i % (1 + len(adapters))],
                    **kind,
                )
                for i, kind in enumerate(kinds)
            ]
            answers = [*engine.generate_many(requests), *(engine.generate(one) for one in requests[:2])]
            before, steps = dict(mode.syncs) if mode else {}, engine.status().steps
            engine.generate_many([requests[0]] * 3)
            waits = {f"{what} in {line}": count - before.get((what, line), 0)
                     for (what, line), count in (mode.syncs if mode else {}).items()}  # fmt: skip
            found[dtype] = {
                "forward": engine.status().forward,
                "reasons": engine.status().reasons,
                "replayed": engine.status().graphs_replayed,
                "no_graphs": engine.status().no_graphs,
                "steps": engine.status().steps - steps,
                "answers": [[list(answer.token_ids), answer.label_logprobs] for answer in answers],
                "waits": {name: count for name, count in waits.items() if count},
            }
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
