"""What this machine can do: one finding per capability. Only inspects; imports no room above `memory`."""

import importlib.metadata
import importlib.util
import os
import shutil
from dataclasses import replace
from pathlib import Path

from adapterhub_lite.adapter_format.strict_reading import StrictModel
from adapterhub_lite.home import adapterhub_home
from adapterhub_lite.installation import install_command, installer

# Where the tests keep other people's clients, away from this installation.
CLIENTS = Path("~/.cache/adapterhub-lite/test-clients").expanduser()
# Where the tests keep a vLLM, likewise.
VLLM = Path("~/.cache/adapterhub-lite/test-vllm").expanduser()
CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome")


class Finding(StrictModel):
    """One capability: whether it works here, what was found, and how to get it if it does not."""

    what: str
    works: bool
    detail: str
    remedy: str | None = None


def diagnose(home: str | Path | None = None) -> list[Finding]:
    """Return a finding for every capability that depends on the machine."""
    extras = [find_extra(*row) for row in EXTRAS]
    packages = [find_package(*row) for row in _PACKAGES]
    models = [find_gpu(), *runnable_presets()] if importlib.util.find_spec("torch") else []
    tools = [find_browser(), find_converter(), find_clients(), find_vllm()]
    return [*extras, *packages, *models, *tools, check_home(adapterhub_home(home))]


def client_python() -> Path | None:
    """The interpreter of the environment in which the tests keep other people's clients, once it is whole."""
    return CLIENTS / "bin" / "python" if (CLIENTS / "complete").exists() else None


def find_clients() -> Finding:
    """Whether the tests with other people's clients have been able to install them."""
    found = client_python() is not None
    return Finding(
        what="clients for tests",
        works=found,
        detail=str(CLIENTS)
        if found
        else "not installed; the test of conformance with other clients installs them or is skipped",
        remedy=None if found else "pytest -m slow tests/serving/api/test_clients.py, with access to a package index",
    )


def vllm_python() -> Path | None:
    """The interpreter of an environment with vLLM: `$ADAPTERHUB_VLLM_PYTHON`, or the one that the tests made."""
    named = os.environ.get("ADAPTERHUB_VLLM_PYTHON")
    found = Path(named) if named else VLLM / "bin" / "python"
    return found if found.exists() and (named or (VLLM / "complete").exists()) else None


def find_vllm() -> Finding:
    """Whether `serve --engine vllm` finds a vLLM by itself, and the tests one of their own."""
    program, tested = shutil.which("vllm"), vllm_python()
    found = program or tested
    missing = "no `vllm` on the path for --engine vllm, and none for its test, which installs one or is skipped"
    return Finding(
        what="vLLM",
        works=found is not None,
        detail=(str(found) if found else missing)
        + ("" if shutil.which("setpriv") else "; no setpriv, so one outlives us if we are killed"),
        remedy=None
        if found
        else "install vLLM in an environment of its own, and give its Python with --vllm-python; "
        "pytest -m slow tests/serving/vllm/test_real_vllm.py makes one for the test",
    )


def find_chromium() -> str | None:
    """The path of an installed Chromium, or None; browser tests need one."""
    return next((path for name in CHROMIUM_NAMES if (path := shutil.which(name))), None)


def find_gpu() -> Finding:
    """Whether torch sees an accelerator."""
    from adapterhub_lite import devices

    kind = devices.accelerator()
    if kind is not None:
        count = devices.count()
        alone = "" if count > 1 else "; the tests of FSDP, which need two, are skipped"
        return Finding(what="GPU", works=True, detail=f"{count} x {devices.name_of(kind) or kind.type}{alone}")
    return Finding(
        what="GPU",
        works=False,
        detail=f"none; {os.cpu_count()} CPU cores are used. GPU-only tests and presets are skipped",
        remedy="a machine with a GPU and the build of torch for it",
    )


# extra, a package that only it brings, what it is for
EXTRAS = (
    ("train", "datasets", "training, evaluation and plans"),
    ("serve", "fastapi", "the server and the hub"),
    ("app", "gradio", "the app"),
    ("deepspeed", "deepspeed", "ZeRO training on several devices"),
    ("cluster", "ray", "serving on several machines"),
    ("search", "optuna", "sweeps and hyperparameter search"),
    ("harness", "lm_eval", "tasks of lm-evaluation-harness in eval; without it their test is skipped"),
    ("bench", "trl", "comparisons in the benches; without it the tests of TRL's tables and templates are skipped"),
)
# package, what it is for, how to get it
_PACKAGES = (
    ("bitsandbytes", "8-bit and nf4 bases (QLoRA)", install_command("models")),
    (
        "triton",
        "GPU kernels of the loss: ours, Liger's, cut_cross_entropy",
        "use the CUDA build of torch, which brings it",
    ),
    (
        "hf_xet",
        "fast transfers with the hub (Xet); without it LFS is used and the Xet tests are skipped",
        f"{installer()} hf-xet",
    ),
)


def find_extra(extra: str, package: str, purpose: str) -> Finding:
    """Whether an extra of this package is installed."""
    found = importlib.util.find_spec(package) is not None
    return Finding(
        what=f"[{extra}]",
        works=found,
        detail=purpose if found else f"not installed: {purpose}",
        remedy=None if found else install_command(extra),
    )


def find_package(name: str, purpose: str, remedy: str) -> Finding:
    """Whether an optional package is installed."""
    found = importlib.util.find_spec(name) is not None
    detail = (
        f"{importlib.metadata.version(name.replace('_', '-'))}: {purpose}" if found else f"not installed: {purpose}"
    )
    return Finding(what=name, works=found, detail=detail, remedy=None if found else remedy)


_REMEDIES = {
    "it splits over processes, and there is one": "start several processes: train --devices, torchrun",
    "Accelerate leaves FSDP out on a CPU": "a machine with two GPUs; the tests of FSDP through Accelerate are skipped here",
    "deepspeed is not installed": install_command("deepspeed"),
}


def runnable_presets() -> list[Finding]:
    """One finding for the memory presets that run here, and one for each reason why others do not."""
    from adapterhub_lite.memory import MEMORY_PRESETS, Machine, refusal

    here = Machine.present()
    reasons: dict[str, list[str]] = {}
    for name, preset in MEMORY_PRESETS.items():
        # Several processes depend on how a run is started; what would be missing even then is reported first.
        lasting = None if preset.strategy == "single" else refusal(preset, replace(here, world_size=2))
        reasons.setdefault(lasting or refusal(preset, here) or "", []).append(name)
    able = Finding(what="memory presets", works=True, detail=", ".join(reasons.pop("", [])))
    unable = [
        Finding(
            what=f"presets {', '.join(names)}",
            works=False,
            detail=reason,
            remedy=_REMEDIES.get(reason, "a machine that supports it"),
        )
        for reason, names in reasons.items()
    ]
    return [able, *unable]


def find_browser() -> Finding:
    """Whether the browser tests can run."""
    path = find_chromium()
    return Finding(
        what="chromium",
        works=path is not None,
        detail=path or "not installed: the browser tests are skipped",
        remedy=None if path else "apt-get install chromium",
    )


def find_converter() -> Finding:
    """Whether llama.cpp's converter is there, which the export to GGUF runs."""
    script = "convert_lora_to_gguf.py"
    path = os.environ.get("LLAMA_CPP_CONVERTER") or shutil.which(script)
    works = path is not None and Path(path).is_file()
    return Finding(
        what="llama.cpp",
        works=works,
        detail=path
        if works and path
        else f"no {path or script}: export to GGUF is not available, and its test is skipped",
        remedy=None if works else f"get llama.cpp and point LLAMA_CPP_CONVERTER at its {script}",
    )


def check_home(home: Path) -> Finding:
    """Whether the home folder is writable and has a GiB of free space."""
    folder: Path = home
    while not folder.exists():
        folder = folder.parent
    writable = os.access(folder, os.W_OK)
    free = shutil.disk_usage(folder).free
    works = writable and free > 1 << 30
    problem = "" if works else "; less than 1 GiB" if writable else "; read-only"
    return Finding(
        what="home folder",
        works=works,
        detail=f"{home}: {free >> 30} GiB free{problem}",
        remedy=None if works else "set ADAPTERHUB_HOME to a writable folder with space",
    )
