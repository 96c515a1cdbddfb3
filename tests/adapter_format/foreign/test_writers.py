"""Adapters as real writers leave them are taken, and act as their writer means; each is compared with plain PEFT."""

import json
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from adapterhub_lite.adapter_format.binding import read_pairs
from adapterhub_lite.adapter_format.foreign.opening import open_adapter
from adapterhub_lite.bases import ResolvedBase, resolve_base
from adapterhub_lite.bases.fit import inspect_adapter
from adapterhub_lite.errors import AdapterRejectedError, BaseMismatchError
from adapterhub_lite.registry import AdapterRegistry
from tests.checkout import ROOT

Change = Callable[[Path], None]
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@pytest.fixture(scope="module")
def base(tiny_base: Path) -> ResolvedBase:
    return resolve_base(tiny_base)


@pytest.fixture(scope="module")
def plain(make_adapter: Any) -> Path:
    return Path(make_adapter(seed=3, targets=ATTENTION))


@pytest.fixture
def folder(plain: Path, tmp_path: Path) -> Path:
    """A copy of a plain adapter of PEFT's, to be written as somebody else would."""
    return Path(shutil.copytree(plain, tmp_path / "adapter"))


@pytest.fixture
def registry(home: Path) -> AdapterRegistry:
    return AdapterRegistry(home)


def set_config(**changes: Any) -> Change:
    def change(folder: Path) -> None:
        found = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**found, **changes}))

    return change


def only_config(content: dict[str, Any]) -> Change:
    return lambda folder: (folder / CONFIG).write_text(json.dumps(content)) and None


def renamed(rename: Callable[[str], str]) -> Change:
    def change(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        save_file({rename(name): tensor for name, tensor in tensors.items()}, folder / WEIGHTS)

    return change


def beside(**files: bytes) -> Change:
    def change(folder: Path) -> None:
        for name, content in files.items():
            (folder / name.replace("__", ".")).write_bytes(content)

    return change


UNSLOTH = (
    r"(?:.*?(?:language|text|model).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
    r"(?:q_proj|k_proj|v_proj|o_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|k_proj)))"
)
LLAMA_CLASS = {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers.models.llama.modeling_llama"}
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# As PEFT 0.2 wrote it.
PEFT_0_2 = {
    "base_model_name_or_path": "tiny", "bias": "none", "enable_lora": None, "fan_in_fan_out": False, "inference_mode": True,
    "init_lora_weights": True, "lora_alpha": 8, "lora_dropout": 0.05, "merge_weights": False, "modules_to_save": None,
    "peft_type": "LORA", "r": 4, "target_modules": list(ATTENTION), "task_type": "CAUSAL_LM",
}  # fmt: skip
# The keys that releases of PEFT added to what they write, at their defaults.
ADDED: dict[str, dict[str, Any]] = {
    "0.4": {"layers_pattern": None, "layers_to_transform": None, "revision": None},
    "0.5": {"auto_mapping": None},
    "0.6": {"alpha_pattern": {}, "rank_pattern": {}},
    "0.7": {"loftq_config": {}, "megatron_config": None, "megatron_core": "megatron.core"},
    "0.8": {"use_rslora": False},
    "0.9": {"use_dora": False},
    "0.10": {"layer_replication": None},
    "0.14": {"eva_config": None, "exclude_modules": None, "lora_bias": False},
    "0.15": {"corda_config": None, "trainable_token_indices": None},
    "0.16": {"qalora_group_size": 16, "use_qalora": False},
    "0.17": {"target_parameters": None},
    "0.18": {
        "alora_invocation_tokens": None,
        "arrow_config": None,
        "ensure_weight_tying": False,
        "peft_version": "0.18.0",
    },
}


def peft_of(version: str) -> Change:
    """The configuration as PEFT `version` wrote it: 0.3 to 0.20, by the keys that there were."""
    kept = {key: value for key, value in PEFT_0_2.items() if key not in ("enable_lora", "merge_weights")}
    for release, keys in ADDED.items():
        if int(release[2:]) <= int(version[2:]):
            kept |= keys
    return only_config({**kept, **({"peft_version": f"{version}.0"} if "peft_version" in kept else {})})


TORCHTUNE = {"r": 4, "lora_alpha": 8, "target_modules": list(ATTENTION), "peft_type": "LORA"}
WRITERS: dict[str, Change] = {
    "PEFT 0.2": only_config(PEFT_0_2),
    **{f"PEFT 0.{n}": peft_of(f"0.{n}") for n in range(3, 21)},
    "PEFT 0.21": lambda folder: None,
    "PEFT without a task type": set_config(task_type=None, auto_mapping=LLAMA_CLASS),
    "PEFT of tomorrow": set_config(peft_version="0.99.0", use_tomorrow=False, tomorrow_config=None, tomorrow_list=[]),
    "PEFT with EVA": set_config(init_lora_weights="eva", eva_config={"rho": 2.0, "tau": 0.99}),
    "another task type": set_config(task_type="SEQ_2_SEQ_LM"),
    "features": set_config(task_type="FEATURE_EXTRACTION"),
    "TRL": beside(
        tokenizer__json=b"{}", training_args__bin=b"x", chat_template__jinja=CHATML.encode(), README__md=b"# card\n"
    ),
    "Axolotl": beside(README__md=b"---\nlibrary_name: peft\n---\n<details><summary>config</summary></details>\n"),
    "LLaMA-Factory": beside(all_results__json=b"{}", training_loss__png=b"x", trainer_log__jsonl=b"{}"),
    "Unsloth": set_config(target_modules=UNSLOTH, auto_mapping={**LLAMA_CLASS, "unsloth_fixed": True}),
    "torchtune": only_config(TORCHTUNE),
    "patterns": set_config(target_modules=r".*\.self_attn\.[qkvo]_proj", rank_pattern={r"layers\.\d+\..*": 4}),
    "exclusion": set_config(target_modules=[*ATTENTION, "up_proj"], exclude_modules=r".*\.mlp\..*"),
    "the adapter's own name": renamed(
        lambda n: n.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default.")
    ),
    "no prefix": renamed(lambda n: n.removeprefix("base_model.model.")),
    "torch.compile": renamed(lambda n: n.replace("base_model.model.", "base_model.model._orig_mod.")),
    "FSDP": renamed(lambda n: n.replace(".self_attn", "._fsdp_wrapped_module.self_attn")),
    "checkpointing": renamed(lambda n: n.replace(".self_attn", "._checkpoint_wrapped_module.self_attn")),
    "DDP": renamed(lambda n: "module." + n),
}


@pytest.mark.parametrize("name", WRITERS)
def test_it_is_taken_and_acts_as_its_writer_means(
    name: str, folder: Path, plain: Path, base: ResolvedBase, registry: AdapterRegistry, tmp_path: Path
) -> None:
    WRITERS[name](folder)
    manifest = registry.add(folder, "x", base=base, tell=lambda _: None)
    truth = read_pairs(plain / WEIGHTS, lambda _: 2.0)
    kept = read_pairs(registry.store.file(manifest, WEIGHTS), manifest.lora.scaling_of)
    assert kept.keys() == truth.keys() and manifest.lora.modules_bound == len(truth)
    for module, pair in truth.items():
        assert torch.equal(kept[module].a, pair.a) and torch.equal(kept[module].b, pair.b)
        assert kept[module].scaling == pair.scaling
    again = inspect_adapter(registry.export("x", tmp_path / "out"), base=base)
    assert not again.problems and again.lora == manifest.lora, "what is kept is plain PEFT"


def test_a_kept_configuration_has_no_pattern_and_peft_reads_it(
    folder: Path, base: ResolvedBase, registry: AdapterRegistry, tmp_path: Path
) -> None:
    from peft import LoraConfig

    WRITERS["patterns"](folder)
    registry.add(folder, "x", base=base)
    config = LoraConfig.from_pretrained(registry.export("x", tmp_path / "out"))
    assert config.target_modules == set(ATTENTION) and config.task_type == "CAUSAL_LM"
    assert all(key.startswith("model.layers.") and "\\" not in key for key in config.rank_pattern)


REFUSED: dict[str, tuple[Change, str]] = {
    "a key set to something": (
        set_config(peft_version="0.99.0", use_tomorrow=True),
        r"unknown key 'use_tomorrow'.*PEFT '0\.99\.0'",
    ),
    "enable_lora set": (set_config(enable_lora=[True, False, True]), "unknown key 'enable_lora'"),
    "auto_mapping of others": (
        set_config(auto_mapping={**LLAMA_CLASS, "parent_library": "os"}),
        "names a library to import",
    ),
    "Kohya": (renamed(lambda n: "lora_unet_" + n.replace(".", "_") + ".lora_down.weight"), "Kohya"),
    "diffusers of a transformer": (
        renamed(lambda n: n.replace("base_model.model.model.layers.", "transformer.transformer_blocks.")),
        "diffusers",
    ),
    "diffusers of old": (renamed(lambda n: n.replace("lora_A.weight", "lora.down.weight")), "diffusers"),
    "another method": (set_config(peft_type="IA3"), "of the kind 'IA3'; only LoRA"),
    "diffusers": (renamed(lambda n: n.replace("base_model.model.", "unet.")), "diffusers"),
    "LyCORIS": (renamed(lambda n: n.replace("lora_A.weight", "lora_down.weight")), "LyCORIS"),
    "two adapters": (
        renamed(lambda n: n.replace("lora_A.", "lora_A.one.").replace("lora_B.", "lora_B.two.")),
        "several adapters: one, two",
    ),
    "pickled": (lambda f: pickled(f), r"--convert"),
    # A base has its model's names, or leaves out their first part; these are another model's.
    "the text half of a larger model": (
        renamed(lambda n: n.replace("base_model.model.", "base_model.model.language_model.")),
        "have tensors but are not targeted in the base: language_model.model",
    ),
    "nothing to adapt": (set_config(target_modules=None), "it names nothing to adapt: target_modules is empty"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_taken_is_refused_by_name(
    name: str, folder: Path, base: ResolvedBase, registry: AdapterRegistry
) -> None:
    change, reason = REFUSED[name]
    change(folder)
    with pytest.raises(AdapterRejectedError, match=reason):
        registry.add(folder, "x", base=base)
    assert registry.list() == [] and list(registry.store.objects) == []


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


def same_pairs(one: Path, other: Path, tolerance: float = 0.0) -> bool:
    ours, theirs = (read_pairs(folder / WEIGHTS, lambda _: 1.0) for folder in (one, other))
    close = all(
        torch.allclose(ours[m].a, theirs[m].a, atol=tolerance)
        and torch.allclose(ours[m].b, theirs[m].b, atol=tolerance)
        for m in theirs
    )
    return ours.keys() == theirs.keys() and close


def test_a_pickle_is_converted_where_that_is_asked_for(folder: Path, plain: Path, tmp_path: Path) -> None:
    pickled(folder)
    (tmp_path / "s").mkdir()
    opened = open_adapter(folder, tmp_path / "s", convert=True)
    assert same_pairs(opened.folder, plain) and "executes nothing" in opened.said[0]


def test_a_pickle_that_acts_does_nothing(folder: Path, tmp_path: Path) -> None:
    (folder / WEIGHTS).unlink()
    mark = tmp_path / "mark"
    (folder / "adapter_model.bin").write_bytes(b"cposix\nsystem\n(S'touch " + str(mark).encode() + b"'\ntR.")
    (tmp_path / "s").mkdir()
    with pytest.raises(AdapterRejectedError, match="could not be converted"):
        open_adapter(folder, tmp_path / "s", convert=True)
    assert not mark.exists()


def as_mlx(folder: Path, *, scale: float = 2.0, **more: Any) -> None:
    """Rewrite a plain adapter as mlx-lm saves it."""
    tensors = {}
    for name, tensor in load_file(folder / WEIGHTS).items():
        short = (
            name.removeprefix("base_model.model.").replace("lora_A.weight", "lora_a").replace("lora_B.weight", "lora_b")
        )
        tensors[short] = tensor.T.contiguous()
    (folder / WEIGHTS).unlink()
    save_file(tensors, folder / "adapters.safetensors")
    settings = {"rank": 4, "scale": scale, "dropout": 0.0, "keys": ["self_attn.q_proj"]}
    config = {
        "fine_tune_type": "lora",
        "num_layers": 2,
        "lora_parameters": settings,
        "model": "mlx-community/tiny-4bit",
    }
    (folder / CONFIG).write_text(json.dumps({**config, **more}))


def test_an_adapter_of_mlx_is_converted(
    folder: Path, plain: Path, base: ResolvedBase, registry: AdapterRegistry
) -> None:
    as_mlx(folder)
    heard: list[str] = []
    manifest = registry.add(folder, "x", base=base, tell=heard.append)
    kept = read_pairs(registry.store.file(manifest, WEIGHTS), manifest.lora.scaling_of)
    truth = read_pairs(plain / WEIGHTS, lambda _: 2.0)
    assert (
        all(torch.equal(kept[m].a, truth[m].a) and kept[m].scaling == 2.0 for m in truth)
        and kept.keys() == truth.keys()
    )
    assert any("converted from MLX (lora, scale 2)" in line for line in heard)


def permute(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """What llama.cpp's converter does to q_proj and k_proj of Llama models (LlamaModel.permute)."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def as_gguf(folder: Path, target: Path, architecture: str = "llama") -> Path:
    """Write a plain adapter for the tiny base as llama.cpp's convert_lora_to_gguf.py does."""
    import gguf

    short = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    writer = gguf.GGUFWriter(target, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 8.0)
    for module, pair in read_pairs(folder / WEIGHTS, lambda _: 1.0).items():
        layer, kind = module.split(".")[2], module.rpartition(".")[2]
        b = permute(pair.b, {"q_proj": 4, "k_proj": 2}[kind]) if kind in ("q_proj", "k_proj") else pair.b
        writer.add_tensor(f"blk.{layer}.{short[kind]}.weight.lora_a", pair.a.numpy().astype(np.float32))
        writer.add_tensor(f"blk.{layer}.{short[kind]}.weight.lora_b", b.contiguous().numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def test_an_adapter_of_llama_cpp_is_converted(
    plain: Path, base: ResolvedBase, registry: AdapterRegistry, tmp_path: Path
) -> None:
    file = as_gguf(plain, tmp_path / "x.gguf")
    manifest = registry.add(file, "x", base=base, tell=lambda _: None)
    out = registry.export("x", tmp_path / "out")
    assert same_pairs(out, plain) and manifest.lora.scaling == 2.0
    with pytest.raises(AdapterRejectedError, match="give base"):
        open_adapter(file, tmp_path)


def test_a_frozen_copy_of_the_head_is_dropped_and_a_trained_one_kept(
    folder: Path, tiny_base: Path, base: ResolvedBase, registry: AdapterRegistry, plain: Path, tmp_path: Path
) -> None:
    tensors, own = load_file(folder / WEIGHTS), load_file(tiny_base / "model.safetensors")
    embedding = own["model.embed_tokens.weight"]
    for place in ("lm_head.base_layer.weight", "lm_head.weight", "model.embed_tokens.modules_to_save.default.weight"):
        for copy in (embedding, embedding.to(torch.bfloat16)):
            save_file({**tensors, f"base_model.model.{place}": copy.clone()}, folder / WEIGHTS)
            set_config(modules_to_save=["lm_head"])(folder)
            heard: list[str] = []
            manifest = registry.add(folder, "x", base=base, tell=heard.append)
            assert any("unchanged copies" in line for line in heard)
            assert len(read_pairs(registry.store.file(manifest, WEIGHTS), lambda _: 1.0)) == 8
    for place in ("lm_head.weight", "lm_head.modules_to_save.default.weight"):
        save_file({**tensors, f"base_model.model.{place}": embedding + 1e-3}, folder / WEIGHTS)
        manifest = registry.add(folder, "x", base=base)
        kept = load_file(registry.store.file(manifest, WEIGHTS))
        torch.testing.assert_close(kept["base_model.model.lm_head.weight"], embedding + 1e-3)
        assert manifest.lora.also == ("whole modules",) and len(kept) == len(tensors) + 1
    before = len(registry.list())
    for wrong, reason in (
        (torch.cat([embedding, embedding[:8] + 1]) * 2, "rows of 280 tokens and model.embed_tokens.weight has not"),
        (embedding[:, :16].contiguous(), "the base's"),
    ):
        save_file({**tensors, "base_model.model.lm_head.weight": wrong.clone()}, folder / WEIGHTS)
        with pytest.raises(AdapterRejectedError, match=reason):
            registry.add(folder, "x", base=base)
    set_config(modules_to_save=None)(folder)
    save_file({**tensors, "base_model.model.lm_head.weight": embedding + 1e-3}, folder / WEIGHTS)
    with pytest.raises(AdapterRejectedError, match="differ from the base's own"):
        registry.add(folder, "x", base=base)
    assert len(registry.list()) == before


def run_folder(root: Path, plain: Path, *numbers: int, best: int | None = None) -> Path:
    for number in numbers:
        checkpoint = Path(shutil.copytree(plain, root / f"checkpoint-{number}"))
        state = {"best_model_checkpoint": f"/home/ann/run/checkpoint-{best}" if best else None, "loss": float("nan")}
        (checkpoint / "trainer_state.json").write_text(json.dumps(state))
        (checkpoint / "optimizer.pt").write_bytes(b"pickle")
    return root


@pytest.mark.parametrize(
    ("numbers", "best", "taken"),
    [((5, 10, 100), None, "the newest checkpoint of the run, checkpoint-100"),
     ((5, 10), 5, "the best checkpoint of the run, checkpoint-5"),
     ((10,), 5, "the newest checkpoint of the run, checkpoint-10")],
)  # fmt: skip
def test_a_run_folder_gives_its_best_or_newest_checkpoint(
    numbers: tuple[int, ...], best: int | None, taken: str, plain: Path, tmp_path: Path
) -> None:
    run = run_folder(tmp_path / "run", plain, *numbers, best=best)
    opened = open_adapter(run, tmp_path)
    assert opened.said == [f"took {taken}"] and opened.folder.name == taken.rpartition(" ")[2]
    shutil.copytree(plain, run / "adapter")
    assert open_adapter(run, tmp_path).folder == run / "adapter"


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])
@pytest.mark.parametrize("inside", ["", "my-lora/", "a/b/"])
def test_an_archive_is_taken(kind: str, inside: str, plain: Path, base: ResolvedBase, tmp_path: Path) -> None:
    archive = tmp_path / f"adapter.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as zipped:
            for path in plain.iterdir():
                zipped.write(path, inside + path.name)
            zipped.writestr("notes.txt", "x")
    else:
        with tarfile.open(archive, f"w:{kind.partition('.')[2]}") as tar:
            for path in plain.iterdir():
                tar.add(path, inside + path.name)
    (tmp_path / "s").mkdir()
    opened = open_adapter(archive, tmp_path / "s")
    assert same_pairs(opened.folder, plain) and not inspect_adapter(opened.folder, base=base).problems
    assert ("notes.txt" in opened.left_alone) is (kind == "zip")


@pytest.mark.parametrize(
    ("named", "ours", "said"),
    [("org/base", "org/base", "same"), ("org/other", "org/base", "another"), ("/data/base", "org/base", "unknown"),
     (None, "org/base", "unknown"), ("unsloth/base-bnb-4bit", "org/base", "unknown"), ("org/base", "two", "unknown"),
     ("/data/two", "two", "same"), ("../evil/x", "org/base", "unknown"), ("Org/Base", "org/base", "unknown")],
)  # fmt: skip
def test_the_base_is_told_apart_by_its_name(
    named: str | None, ours: str, said: str, folder: Path, tiny_base: Path, registry: AdapterRegistry
) -> None:
    set_config(base_model_name_or_path=named)(folder)
    base, heard = ResolvedBase(ours, ours, tiny_base), list[str]()
    if said == "another":
        with pytest.raises(BaseMismatchError, match=r"names 'org/other', not 'org/base'.*--base-differs"):
            registry.add(folder, "x", base=base, tell=heard.append)
        assert registry.add(folder, "x", base=base, tell=heard.append, base_differs=True).base.named == named
        return
    manifest = registry.add(folder, "x", base=base, tell=heard.append)
    assert any("cannot be told" in line for line in heard) is (said == "unknown")
    assert (manifest.base.named is None) is (said == "same" or named is None)


# Rows of the table in docs/how-to/from-trl-or-peft.md, and the tests that hold them.
ROWS: dict[str, tuple[str, ...]] = {
    "PEFT 0.2 to 0.21": (*(f"PEFT 0.{n}" for n in range(2, 22)), "PEFT without a task type", "PEFT with EVA", "patterns", "exclusion"),
    "a later PEFT": ("PEFT of tomorrow", "a key set to something"),
    "TRL, Axolotl, LLaMA-Factory": (
        "TRL", "Axolotl", "LLaMA-Factory", "test_a_run_folder_gives_its_best_or_newest_checkpoint",
    ),
    "LLaMA-Factory with `modules_to_save`, resized or saved embeddings": (
        "test_a_frozen_copy_of_the_head_is_dropped_and_a_trained_one_kept",
    ),
    "Unsloth": ("Unsloth", "test_the_base_is_told_apart_by_its_name"),
    "torchtune": ("torchtune",),
    "`torch.compile`, FSDP, DDP, checkpointing around the model": (
        "torch.compile", "FSDP", "DDP", "checkpointing", "the adapter's own name",
    ),
    "MLX (`adapters.safetensors`)": ("test_an_adapter_of_mlx_is_converted",),
    "llama.cpp (GGUF LoRA)": ("test_an_adapter_of_llama_cpp_is_converted",),
    "`adapter_model.bin`": ("pickled", "test_a_pickle_is_converted_where_that_is_asked_for"),
    "zip, tar, tar.gz": ("test_an_archive_is_taken",),
    "a repository on a hub": (),  # tests/registry/hub
    "Kohya, LyCORIS, diffusers; prefix tuning, IA3, OFT": (
        "Kohya", "LyCORIS", "diffusers", "diffusers of a transformer", "diffusers of old", "another method",
    ),
}  # fmt: skip


def test_every_row_of_the_documented_table_is_tested() -> None:
    page = (ROOT / "docs" / "how-to" / "from-trl-or-peft.md").read_text()
    table = page.split("| written by |")[1].split("\n\n")[0].splitlines()[2:]
    assert [row.split(" | ")[0].removeprefix("| ") for row in table] == list(ROWS)
    known = {*WRITERS, *REFUSED, *(name for name in globals() if name.startswith("test_"))}
    assert {name for names in ROWS.values() for name in names} <= known
