"""The pages, typed: every block of README and docs runs, or says above itself why it does not."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from adapterhub_lite.bases import resolve_base
from adapterhub_lite.errors import AdapterRejectedError
from adapterhub_lite.registry import AdapterRegistry
from tests.docs.terminal import FENCE, PAGES, ROOT, Terminal, blocks, pages_with, shortened
from tests.fixture_types import MakeAdapter

DATA = ROOT / "docs" / "how-to" / "data.md"
TUTORIAL, README = ROOT / "docs" / "tutorial.md", ROOT / "README.md"
HUB = ROOT / "docs" / "how-to" / "private-hub.md"
PRODUCTION = ROOT / "docs" / "how-to" / "production.md"
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
OWN_WALK = (TUTORIAL, README, HUB, PRODUCTION)
OTHERS = [page for page in pages_with("bash") if page not in OWN_WALK]
ROWS = "".join(json.dumps({"prompt": f"{n} plus {n}?", "completion": str(2 * n)}) + "\n" for n in range(8))


def test_code_is_in_a_language_that_is_run_here() -> None:
    """So that no block escapes by being called `sh` or `py`; `json` and `text` are shown, and read where they matter."""
    assert {kind for page in PAGES for _, kind, _ in FENCE.findall(page.read_text())} <= {
        "bash", "python", "json", "text", "",
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("page", pages_with("python"), ids=lambda page: page.stem)
def test_the_python_of_a_page_runs(
    page: Path, stocked_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "page"}
    for number, code in enumerate(blocks(page, "python")):
        exec(compile(code, f"{page.name}, block {number}", "exec"), names)


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(
    notebook: Path, environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "notebook"}
    cells = [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]
    for number, cell in enumerate(cells):
        assert not cell["outputs"], "what was shown once is no part of a notebook"
        exec(compile("".join(cell["source"]), f"{notebook.name}, cell {number}", "exec"), names)
    if "theirs" in names:
        shown = names["tokenizer"].decode(names["theirs"], skip_special_tokens=True)
        assert names["ours"].text == shown


@pytest.mark.slow
@pytest.mark.parametrize("page", OTHERS, ids=lambda page: page.stem)
def test_the_commands_of_a_page_run(
    page: Path, stocked_home: Path, make_adapter: MakeAdapter, warm_terminal: Terminal, tmp_path: Path
) -> None:
    for name in ("rows", "questions"):
        (tmp_path / f"{name}.jsonl").write_text(ROWS)
    shutil.copytree(make_adapter(seed=9), tmp_path / "my-lora")
    for code in blocks(page, "bash"):
        warm_terminal.type("\n".join(shortened(line) for line in code.replace("\\\n", " ").splitlines()))


@pytest.mark.slow
def test_the_page_on_a_hub_of_ones_own_runs(
    home: Path, make_adapter: MakeAdapter, terminal: Terminal, tmp_path: Path
) -> None:
    registry = AdapterRegistry(home)
    registry.add(make_adapter(), "sql", base=resolve_base("smollm2-135m", home=home))
    typed = blocks(HUB, "bash")
    said = next(line for code in typed for line in code.splitlines() if line.startswith("export HF_ENDPOINT"))
    shutil.copytree(make_adapter(seed=9), tmp_path / "plain")
    (tmp_path / "plain" / "README.md").unlink()  # it names the tiny base's folder, which is no model id
    key = ""
    for code in typed:
        if "plain-lora --adopt" in code:
            terminal.type(f"{said}\nhf upload --quiet team/plain-lora ./plain")
        if "PUBLIC_KEY" in code:
            assert registry.resolve("team-sql").digest == registry.resolve("sql").digest
            code, _, trust = code.partition("adapterhub-lite trust")
            shown = terminal.type(code)
            key = re.search(r"\b[0-9a-f]{64}\b", shown)[0]  # type: ignore[index]
            code = f"adapterhub-lite trust{trust.replace('PUBLIC_KEY', key)}"
        terminal.type(code if code.startswith("adapterhub-lite hub") else f"{said}\n{code}")
    # What was pulled before its publisher signed it is not answered with any more.
    with pytest.raises(AdapterRejectedError, match="not signed"):
        registry.resolve("team-sql")
    assert registry.resolve("sql") and key and json.loads((tmp_path / "adapters.lock").read_text())


@pytest.mark.slow
def test_the_page_on_production_runs(stocked_home: Path, terminal: Terminal, tmp_path: Path) -> None:
    (tmp_path / "keys.json").write_text(blocks(PRODUCTION, "json")[0])
    (tmp_path / "keys.json").chmod(0o600)
    shown = [terminal.type(code) for code in blocks(PRODUCTION, "bash")]
    assert '"share":0.1' in shown[1].replace(" ", "") and '"error"' not in shown[1]
    assert AdapterRegistry(stocked_home).aliases("sql")["prod"] == 3


@pytest.mark.slow
def test_the_page_on_data_runs_and_its_previews_are_those_shown(terminal: Terminal) -> None:
    shown = "\n".join(terminal.type(code) for code in blocks(DATA, "bash"))
    (preview,) = blocks(DATA, "text")
    # The base of the tests begins no chat by itself; the two files give the same.
    assert shown.count(preview[preview.index("<|im_start|>user") :].strip()) == 2
    assert "\n2+2=⟦4<|im_end|>⟧" in shown and "⟦Two and two are four.<|im_end|>⟧" in shown


@pytest.mark.slow
def test_the_tutorial_runs_as_it_is_written(terminal: Terminal) -> None:
    """From one's own rows to a task that is served and shared, with the commands of the page and nothing else."""
    shown = [terminal.type(code) for code in blocks(TUTORIAL, "bash")]
    answer = next(text for text in shown if '"receipt"' in text)
    assert json.loads(answer[answer.index("{") : answer.rindex("}") + 1])["receipt"]["adapter"] == "desk:1"
    assert any("desk-again:1" in text for text in shown)
    assert "desk@prod points to version 1 again" in shown[-1]
    if os.environ.get("ADAPTERHUB_TEST_HOME"):
        assert '"content":"billing"' in answer.replace(" ", "")


# The servers and the app have tests of their own, with a client or a browser.
RUN_ON = ("adapterhub-lite serve", "adapterhub-lite demo")


@pytest.mark.slow
def test_the_commands_of_the_readme_run(warm_terminal: Terminal) -> None:
    """Line by line, with fewer steps: two adapters first, as `merge` and `diff` want them."""
    lines = [line for code in blocks(README, "bash") for line in code.splitlines() if line.strip()]
    assert len(lines) > 10 and all(line.startswith("adapterhub-lite ") for line in lines)
    hub = next(line for line in lines if line.startswith("adapterhub-lite hub"))
    for line in [
        "adapterhub-lite train sql --task sql --seed 1", "adapterhub-lite train event --task event", hub, *lines,
    ]:  # fmt: skip
        if not line.startswith(RUN_ON) and not (line == hub and warm_terminal.servers):
            warm_terminal.type(shortened(line))
