"""The pretend vLLM as a process with vLLM's command line: [serve] MODEL --host --port --served-model-name ..."""

import argparse
import os
import signal
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))


def main() -> None:
    from adapterhub_lite.serving import InferenceEngine
    from tests.serving.vllm.pretend import PretendVllm

    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--served-model-name", required=True)
    parser.add_argument("--enable-lora", action="store_true", required=True)
    for name in ("--max-lora-rank", "--max-loras", "--max-cpu-loras"):
        parser.add_argument(name, type=int, required=True)
    parser.add_argument("--fail", action="store_true")
    # More of vLLM's own options are taken, and do nothing.
    given, _ = parser.parse_known_args(sys.argv[2:] if sys.argv[1] == "serve" else sys.argv[1:])
    if given.fail:
        sys.exit(f"ValueError: no such device, and the key is {os.environ['VLLM_API_KEY']}")
    assert given.host == "127.0.0.1" and os.environ["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "True"
    assert not any(os.environ["VLLM_API_KEY"] in word for word in sys.argv)
    with InferenceEngine.from_base(given.model, device="cpu", max_rows=4) as engine:
        server = PretendVllm(
            engine, base=given.served_model_name, max_rank=given.max_lora_rank, key=os.environ["VLLM_API_KEY"],
            port=given.port,
        )  # fmt: skip
        ended = threading.Event()
        signal.signal(signal.SIGTERM, lambda *_: ended.set())
        ended.wait()
        server.close()


if __name__ == "__main__":
    main()
