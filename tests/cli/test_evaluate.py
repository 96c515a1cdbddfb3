"""`eval`: each kind of measure, base beside adapter, kept where `show`, `list` and a rebuild find it."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from adapterhub_lite.adapter_format.manifest import EvaluationRecord
from adapterhub_lite.hub_server import HubServer
from adapterhub_lite.registry import AdapterRegistry
from tests.cli.outcome import Run

ROWS = [{"prompt": f"{n} plus {n}?", "completion": str(2 * n)} for n in range(6)]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def test_loss_and_perplexity_are_those_of_the_model_itself(
    stocked: AdapterRegistry, run: Run, rows: Path, tiny_base: Path, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    done = run("eval", "sql:1", "--data", str(rows), "--base", str(tiny_base), "--metric", "loss", "--metric",
               "perplexity", "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["metrics"]
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    folder = stocked.export("sql:1", tmp_path / "plain")
    for column in ("base", "adapter"):
        model = AutoModelForCausalLM.from_pretrained(tiny_base)
        model = PeftModel.from_pretrained(model, folder) if column == "adapter" else model
        total = tokens = 0.0
        for row in ROWS:
            prompt, answer = tokenizer(row["prompt"]).input_ids, tokenizer(row["completion"] + "<|im_end|>").input_ids
            with torch.no_grad():
                scores = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
            for place, token in enumerate(answer, start=len(prompt)):
                total, tokens = total - float(scores[place - 1, token]), tokens + 1
        assert found["loss"][column] == pytest.approx(total / tokens, rel=1e-4)
        assert found["perplexity"][column] == pytest.approx(math.exp(total / tokens), rel=1e-3)
    assert found["loss"]["base"] != found["loss"]["adapter"]


def test_rows_are_read_as_train_reads_them(
    stocked: AdapterRegistry, run: Run, rows: Path, tiny_base: Path, tmp_path: Path
) -> None:
    table = tmp_path / "rows.csv"
    lines = ["Frage;Antwort;Nr", *(f"{row['prompt']};{row['completion']};{n}" for n, row in enumerate(ROWS))]
    table.write_bytes("\r\n".join(lines).encode("utf-8-sig"))
    more = ("--base", str(tiny_base), "--metric", "loss", "--no-record", "--json")
    plain = run("eval", "sql:1", "--data", str(rows), *more)
    named = ("--prompt-column", "Frage", "--completion-column", "Antwort")
    told = run("eval", "sql:1", "--data", str(table), *named, *more)
    assert json.loads(told.stdout)["metrics"] == json.loads(plain.stdout)["metrics"], told.stderr
    lost = run("eval", "sql:1", "--data", str(table), *more)
    assert lost.returncode == 2 and "name the columns" in lost.stderr


@pytest.mark.parametrize("own", [False, True])
def test_losses_are_those_of_the_adapters_own_template(
    own: bool, tiny_base: Path, make_adapter: Any, tmp_path: Path
) -> None:
    from adapterhub_lite.bases import resolve_base
    from adapterhub_lite.evaluation import compare_losses
    from tests.serving.engine.test_asked_as_trained import QA, with_record

    base, registry = resolve_base(str(tiny_base)), AdapterRegistry(tmp_path / "home")
    (tmp_path / "aside").mkdir()
    folder = make_adapter(seed=1)
    registry.add(with_record(folder, tmp_path / "aside", tiny_base, QA, ()) if own else folder, "sql", base=base)
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    found = compare_losses(registry, registry.resolve("sql"), base, rows)
    assert own == (found[0].base != compare_losses_of_base(tiny_base, tmp_path, make_adapter, rows))


def compare_losses_of_base(tiny_base: Path, aside: Path, make_adapter: Any, rows: Any) -> float:
    """The loss of the base by its own template."""
    from adapterhub_lite.bases import resolve_base
    from adapterhub_lite.evaluation import compare_losses

    base, registry = resolve_base(str(tiny_base)), AdapterRegistry(aside / "other")
    registry.add(make_adapter(seed=1), "plain", base=base)
    return compare_losses(registry, registry.resolve("plain"), base, rows)[0].base


@pytest.mark.parametrize("kind", ["prompt", "messages"])
def test_rows_are_asked_as_they_are_learned(kind: str, tiny_base: Path, stocked: AdapterRegistry) -> None:
    from adapterhub_lite.evaluation import compare_answers
    from adapterhub_lite.serving import GenerationRequest, InferenceEngine

    question = {"prompt": "ab"} if kind == "prompt" else {"messages": [{"role": "user", "content": "ab"}]}
    with InferenceEngine.from_base(tiny_base, registry=stocked) as engine:
        said = engine.generate(GenerationRequest(**question, adapter="sql:1", max_new_tokens=4)).text
        row: dict[str, Any] = (
            {**question, "completion": said}
            if kind == "prompt"
            else {"messages": [*question["messages"], {"role": "assistant", "content": said}]}  # type: ignore[misc]
        )
        (score,) = compare_answers(engine, "sql:1", [row], ("exact_match",), 4)
    assert score.adapter == 1.0


def test_a_function_of_the_users_scores_answers(
    stocked: AdapterRegistry, run: Run, rows: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_scores.py").write_text(
        "def length(wanted, found):\n    return len(wanted)\n\ndef broken(wanted, found):\n    return wanted / 2\n"
    )
    monkeypatch.chdir(tmp_path)
    ask = ("eval", "sql:1", "--data", str(rows), "--base", str(tiny_base), "--max-new-tokens", "2", "--metric")
    found = json.loads(run(*ask, "my_scores:length", "--json").stdout)["metrics"]["my_scores:length"]
    assert found["base"] == found["adapter"] == pytest.approx(sum(len(row["completion"]) for row in ROWS) / 6)
    for metric, complaint in (
        ("my_scores:broken", "TypeError"), ("my_scores:none", "none"), ("nowhere:length", "nowhere"),
    ):  # fmt: skip
        refused = run(*ask, metric)
        assert refused.returncode == 2 and complaint in refused.stderr
    assert str(tmp_path) not in sys.path


def test_the_result_is_kept_beside_the_manifest(
    stocked: AdapterRegistry, run: Run, rows: Path, tiny_base: Path
) -> None:
    before = stocked.resolve("sql:2")
    ask = ("eval", "sql", "--data", str(rows), "--base", str(tiny_base), "--max-new-tokens", "2")
    assert run(*ask, "--no-record").returncode == 0
    assert json.loads(run("show", "sql", "--json").stdout)["here"]["evaluation"] == []
    for _ in range(2):  # the same on the same data again replaces it
        assert run(*ask).returncode == 0
    assert stocked.resolve("sql:2") == before, "a manifest never changes"
    shown = json.loads(run("show", "sql", "--json").stdout)["here"]["evaluation"]
    assert [one["metric"] for one in shown] == ["exact_match", "loss", "perplexity"]
    assert all(one["data"] == "rows.jsonl" and one["base_value"] is not None for one in shown)
    assert "perplexity" in run("show", "sql").stdout
    listed = json.loads(run("list", "--metric", "perplexity>0", "--json").stdout)
    assert [row["reference"] for row in listed] == ["sql:2"]


def test_evaluations_come_back_with_a_rebuild_and_go_with_their_version(stocked: AdapterRegistry, run: Run) -> None:
    for version, value in ((1, 0.5), (2, 0.25), (2, 0.75)):
        one = EvaluationRecord(metric="exact_match", adapter_value=value, base_value=0.0, data="rows")
        stocked.record_evaluation(f"sql:{version}", [one])
    stocked.remove("sql:1")
    stocked.close()
    (stocked.home / "registry.db").unlink()
    assert run("doctor", "--rebuild").returncode == 0
    (kept,) = stocked.show("sql:2").evaluation
    assert kept.adapter_value == 0.75
    assert [line.name for line in stocked.summaries(metric="exact_match")] == ["sql"]


def test_a_card_that_is_pushed_later_has_what_was_measured(stocked: AdapterRegistry, hub_server: HubServer) -> None:
    from huggingface_hub import ModelCard, hf_hub_download

    stocked.record_evaluation("sql:1", [EvaluationRecord(metric="exact_match", adapter_value=0.875, data="rows")])
    stocked.push("sql:1", "org/measured", endpoint=hub_server.url)
    card = ModelCard.load(hf_hub_download("org/measured", "README.md", endpoint=hub_server.url))
    assert card.data.eval_results[0].metric_value == 0.875


def test_the_harness_is_named_where_it_is_missing(
    stocked: AdapterRegistry, run: Run, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    refused = run("eval", "sql", "--harness", "arc_easy", "--base", str(tiny_base))
    assert refused.returncode == 2 and "pip install" in refused.stderr


TASK = """task: my_sums
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {rows}}}}}
validation_split: validation
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{completion}}}}"
doc_to_choice: ["0", "2", "4", "6", "8", "10"]
metric_list: [{{metric: acc}}]
"""


@pytest.mark.slow
def test_a_task_of_the_harness_is_run_on_both(
    stocked: AdapterRegistry, run: Run, rows: Path, tiny_base: Path, tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install lm_eval")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "my_sums.yaml").write_text(TASK.format(rows=rows))
    done = run("eval", "sql", "--harness", "my_sums", "--harness-folder", str(tmp_path / "tasks"), "--base",
               str(tiny_base), "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout[done.stdout.index("{\n") :])["metrics"]["my_sums/acc"]
    assert 0 <= found["base"] <= 1 and 0 <= found["adapter"] <= 1
