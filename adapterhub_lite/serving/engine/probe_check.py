"""An adapter's probes asked of the running engine: through its own batch and kernels, beside whatever else runs.

A checksum says that the bytes are the recorded ones; this says that they do here what they did when they were recorded.
"""

import time
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedTokenizerBase

from adapterhub_lite.adapter_format.probes import ProbeResult, compare_logits, read_probes
from adapterhub_lite.errors import BaseMismatchError, UsageError
from adapterhub_lite.serving.adapters.pool import AdapterPool, Route
from adapterhub_lite.serving.engine.core import EngineCore
from adapterhub_lite.serving.engine.request import GenerationRequest
from adapterhub_lite.serving.engine.sampling import Sampler
from adapterhub_lite.serving.engine.sequence import GenerationHandle, GenerationSequence
from adapterhub_lite.serving.engine.text import TextStream
from adapterhub_lite.serving.model.runner import ModelRunner

Verify = Literal["files", "probes"]


class _Listener(Sampler):
    """Keeps the logits that it chooses from."""

    heard: torch.Tensor

    def choose(self, logits: torch.Tensor, allowed: torch.Tensor | None = None) -> int:
        self.heard = logits.clone()
        return super().choose(logits, allowed)


def check_probes(
    pool: AdapterPool, core: EngineCore, runner: ModelRunner, tokenizer: PreTrainedTokenizerBase, reference: str | Path
) -> ProbeResult:
    """Ask the engine's own loop the recorded probes of an adapter, one token each.

    Raises:
        UsageError: the adapter carries no probes.
        BaseMismatchError: it answers otherwise than recorded.
        IntegrityError: the probes are damaged, or made for another vocabulary.
    """
    files = pool.finder.locate(reference)
    if files.probes is None:
        raise UsageError(f"{files.name} carries no probes; load it with verify='files', or add it with probes.")
    probes = read_probes(files.probes)
    # By digest, which no split and no move of an alias means anything to.
    route = pool.route(reference if isinstance(reference, Path) else files.digest)
    try:
        probes.check_vocabulary(max((runner.vocabulary, *(part.weights.rows for part in route.parts))))
        request = GenerationRequest(prompt="a probe", max_new_tokens=1)
        asked = [
            GenerationSequence(
                request=request,
                prompt_ids=ids,
                # Held here until the last probe is answered.
                route=Route(route.parts, route.name, route.digest),
                sampler=_Listener(request, ids),
                stream=TextStream(tokenizer),
                base_fingerprint="",
                submitted=time.perf_counter(),
                limit=1,
            )
            for ids in probes.prompts
        ]
        for sequence in asked:
            core.add(sequence)
        for sequence in asked:
            GenerationHandle(sequence, core.wake).result()
    finally:
        route.release()
    logits = torch.stack([sequence.sampler.heard for sequence in asked if isinstance(sequence.sampler, _Listener)])
    result = compare_logits(probes, logits, str(runner.model.dtype).removeprefix("torch."))
    if not result.passed:
        raise BaseMismatchError(
            f"{files.name} does not behave on this engine as recorded: logits differ by up to "
            f"{result.max_abs_difference:.3g}, at most {result.tolerance:.3g} is explained by rounding. Another base, "
            "a wrong alpha or another quantisation would do this."
        )
    return result
