"""Answers the questions of `peers` by OpenVINO GenAI, in its own environment: `openvino_driver.py MODEL ADAPTER.safetensors...`.

MODEL is a GGUF file, or a folder with OpenVINO's own format.
"""

import sys

from scripts.bench.engine.drivers.lines import Question, by_adapter, quiet_output, serve


def main() -> None:
    """Read requests until there are no more."""
    out = quiet_output()
    import numpy as np
    import openvino as ov
    import openvino_genai as genai

    model, *files = sys.argv[1:]
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size, scheduler.max_num_batched_tokens, scheduler.max_num_seqs = 1, 2048, 16
    scheduler.enable_prefix_caching = scheduler.dynamic_split_fuse = True
    adapters = [genai.Adapter(file) for file in files]
    more = {"adapters": genai.AdapterConfig(adapters)} if adapters else {}
    pipe = genai.ContinuousBatchingPipeline(model, scheduler, "CPU", more)

    def answer(question: Question) -> int:
        tokens = 0
        for number, prompts in by_adapter(question):  # "must be the same for all requests", it says
            config = genai.GenerationConfig()
            config.max_new_tokens, config.ignore_eos, config.do_sample = question["new"], True, False
            config.adapters = genai.AdapterConfig([] if number is None else [adapters[number]])
            ids = [ov.Tensor(np.array([one], dtype=np.int64)) for one in prompts]
            answers = pipe.generate(ids, [config] * len(ids))
            tokens += sum(len(one.m_generation_ids[0]) for one in answers)
        return tokens

    serve(out, answer)


if __name__ == "__main__":
    main()
