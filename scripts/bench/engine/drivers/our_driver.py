"""Answers the questions of `peers` by this project's engine: `our_driver.py PRECISION BASE ADAPTER...`."""

import sys
from pathlib import Path

from adapterhub_lite.serving import GenerationRequest, InferenceEngine
from scripts.bench.engine.drivers.lines import Question, quiet_output, serve


def main() -> None:
    """Read requests until there are no more."""
    out = quiet_output()
    precision, base = sys.argv[1:3]
    folders = [Path(folder) for folder in sys.argv[3:]]
    engine = InferenceEngine.from_base(
        Path(base),
        device="cpu",
        max_rows=16,
        quantization=None if precision == "saved" else precision,
        end_tokens=frozenset(),
        guess=False,  # random prompts are answered in circles, which would be guessed too well
    )

    def answer(question: Question) -> int:
        requests = [
            GenerationRequest(
                prompt_token_ids=ids, adapter=None if number is None else folders[number],
                max_new_tokens=question["new"], ignore_eos=True,
            )
            for ids, number in zip(question["prompts"], question["adapters"], strict=True)
        ]  # fmt: skip
        return sum(len(one.token_ids) for one in engine.generate_many(requests))

    with engine:
        serve(out, answer)


if __name__ == "__main__":
    main()
