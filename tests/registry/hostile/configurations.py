"""Hostile and broken `adapter_config.json` files."""

import json
from pathlib import Path
from typing import Any

from tests.registry.hostile.case import CONFIG, Case, Spoil, put


def config(**changes: Any) -> Spoil:
    """Set keys of adapter_config.json."""

    def spoil(folder: Path) -> None:
        found = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**found, **changes}))

    return spoil


def config_text(old: str, new: str) -> Spoil:
    """Replace text in adapter_config.json: for what json.dumps would not write."""

    def spoil(folder: Path) -> None:
        text = json.dumps(json.loads((folder / CONFIG).read_text()))
        assert old in text
        (folder / CONFIG).write_text(text.replace(old, new, 1))

    return spoil


def config_bytes(content: bytes) -> Spoil:
    """Put something else in place of adapter_config.json."""
    return lambda folder: put(folder / CONFIG, content)


CONFIG_CASES = [
    Case("rank bomb", config(r=2_000_000), r"r: .*less than or equal to 1024"),
    Case("negative rank", config(r=-4), r"r: .*greater than 0"),
    Case("zero rank", config(r=0), r"r: .*greater than 0"),
    Case("true as rank", config(r=True), r"r: .*valid integer"),
    Case("rank with 5000 digits", config_text('"r": 4', '"r": 1' + "0" * 5000), "not JSON"),
    Case("rank unlike the tensors", config(r=8), r"says rank 8, the tensors are A \[4, 32\]"),
    Case("alpha 4000", config(lora_alpha=4000), "scales by 1000, at most 64"),
    Case("negative alpha", config(lora_alpha=-8), r"lora_alpha: .*greater than 0"),
    Case("NaN alpha", config_text('"lora_alpha": 8', '"lora_alpha": NaN'), "NaN, which is not JSON"),
    Case("infinite alpha", config_text('"lora_alpha": 8', '"lora_alpha": 1e999'), r"lora_alpha: "),
    Case("alpha bomb in a pattern", config(alpha_pattern={"q_proj": 60_000}), "scales by 15000"),
    Case("layer replication", config(layer_replication=[[0, 2]] * 200), "layer_replication.*base grow"),
    Case("a pattern that never ends", config(target_modules="(a|\\w|[a-z]|[.])*[A-Z]"), "takes too long"),
    Case("a pattern that unrolls", config(target_modules="(a{1000}){1000}"), "repeats parts of itself"),
    Case("a pattern that is none", config(target_modules="(a"), "no regular expression"),
    Case("a pattern of 10,000 characters", config(target_modules="a|" * 5000), "at most 2000 characters"),
    Case("a pattern for other modules", config(target_modules=r".*\.(k_proj|o_proj)"), "not targeted in the base"),
    Case("a pattern among targets", config(target_modules=["q_proj", "(a|a)*$"]), r"target_modules\.1: "),
    Case("a rank_pattern that never ends", config(rank_pattern={"(a|\\w|[a-z]|[.])*[A-Z]": 4}), "takes too long"),
    Case("path among targets", config(target_modules=["../../q_proj"]), r"target_modules\.0: "),
    Case(
        "auto_mapping",
        config(auto_mapping={"parent_library": "os", "base_model_class": "system"}),
        "auto_mapping.*import",
    ),
    Case("megatron core", config(megatron_core="os"), "megatron_core.*import"),
    Case("megatron configuration", config(megatron_config={"a": 1}), "megatron_config.*import"),
    Case("covariance file", config(corda_config={"covariance_file": "/etc/passwd"}), "corda_config.*files to load"),
    Case("cache file", config(lora_ga_config={"cache_file": "x.pt"}), "lora_ga_config.*files to load"),
    Case("loftq", config(loftq_config={"loftq_bits": 4}), "loftq_config.*changes the base"),
    Case("pissa", config(init_lora_weights="pissa"), "init_lora_weights.*changes the base"),
    Case("modules to save that are not there", config(modules_to_save=["lm_head"]), "no tensors for"),
    Case("all modules to save", config(modules_to_save=["a" * 201]), r"modules_to_save\.0: "),
    Case("token indices without rows", config(trainable_token_indices=[1]), "no tensors for"),
    Case("a token beyond all", config(trainable_token_indices=[1 << 40]), "trainable_token_indices"),
    Case("parameters that are not there", config(target_parameters=["embed_tokens.weight"]), "no tensors for"),
    Case("a module that is a parameter too", config(target_parameters=["up_proj.weight"]), "named twice"),
    Case("activated LoRA", config(alora_invocation_tokens=[1]), "alora_invocation_tokens.*not supported"),
    Case("biases of the base", config(bias="all"), "bias.*not part of an adapter"),
    Case("remote code", config(trust_remote_code=True), "unknown key 'trust_remote_code'"),
    Case("auto_map", config(auto_map={"AutoModel": "evil.Model"}), "unknown key 'auto_map'"),
    Case("tokenizer arguments", config(tokenizer_kwargs={"trust_remote_code": True}), "unknown key 'tokenizer_kwargs'"),
    Case("another family", config(peft_type="PROMPT_TUNING"), "of the kind 'PROMPT_TUNING'; only LoRA"),
    Case("duplicated key", config_text('"r": 4', '"r": 4, "r": 2000000'), "key 'r' twice"),
    Case("deep nesting", config_bytes(b"[" * 60_000), "nested too deep|not JSON"),
    Case("not JSON", config_bytes(b"\x80\x04cos\nsystem\n"), "not JSON"),
    Case("a list", config_bytes(b"[]"), "not a JSON object"),
    Case("ten megabytes of configuration", config_bytes(b'{"a": "' + b"x" * (10 << 20) + b'"}'), "at most 1048576"),
    Case("no configuration", lambda folder: (folder / CONFIG).unlink(), "adapter_config.json is missing"),
]
