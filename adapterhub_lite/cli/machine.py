"""`doctor` and `bench`: what this machine can do, and how fast."""

import ast
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from adapterhub_lite.adapter_format.changes import Structure
from adapterhub_lite.bases.fingerprint import ResolvedBase
from adapterhub_lite.cli.output import DryRunOption, HomeOption, JsonOption, print_json, print_table, say, would
from adapterhub_lite.errors import ConfigurationError, UnknownNameError

ROOT = Path(__file__).resolve().parents[2]
BENCHES = ROOT / "scripts" / "bench"


def doctor(
    base: Annotated[
        str | None, typer.Option("--base", help="Report what this base gets: plan, serving, kinds of LoRA. Loads it.")
    ] = None,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Rebuild the database from the manifests.")] = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Report what works on this machine, how to get what does not, and what is wrong in the registry.

    Exit code 1 means that the registry has a problem. Example: `adapterhub-lite doctor --base smollm2-135m`
    """
    from adapterhub_lite.diagnosis import diagnose
    from adapterhub_lite.registry import AdapterRegistry

    if base is not None:
        answers = examine_base(base, home)
        if as_json:
            return print_json({"base": base, **answers})
        return print_table(base, ("what", "answer"), list(answers.items()))
    registry = AdapterRegistry(home)
    rebuilt = registry.rebuild() if rebuild else None
    findings, report = diagnose(home), registry.examine()
    if as_json:
        print_json(
            {
                "machine": [finding.model_dump(mode="json") for finding in findings],
                "registry": asdict(report),
                "rebuilt": asdict(rebuilt) if rebuilt else None,
            }
        )
    else:
        print_table(
            "This machine",
            ("capability", "works", "detail"),
            [(f.what, "yes" if f.works else "no", f.detail) for f in findings],
        )
        # Not in the table, which would break a command to copy where the terminal is narrow.
        for finding in findings:
            if finding.remedy:
                typer.echo(f"To get {finding.what}: {finding.remedy}")
        if rebuilt:
            say(f"The database was rebuilt: {rebuilt.versions} versions, {rebuilt.aliases} aliases.")
            for line in rebuilt.skipped:
                say(f"  left out: {line}")
        say(f"Registry: {report.versions} versions, {report.objects} files, {len(report.problems)} problems.")
        for line in (*report.problems, *report.notes):
            say(f"  {line}")
    if not report.healthy:
        raise typer.Exit(1)


def examine_base(base: str, home: str | Path | None) -> dict[str, str]:
    """What a base gets here, by topic; the base is loaded, and proven as the engine does at its start."""
    from adapterhub_lite.bases import load_base_model, load_tokenizer, resolve_base
    from adapterhub_lite.bases.structure import structure_of
    from adapterhub_lite.errors import AdapterHubError
    from adapterhub_lite.home import adapterhub_home
    from adapterhub_lite.memory import plan_memory
    from adapterhub_lite.serving.adapters.weights import find_families
    from adapterhub_lite.serving.model.proof import proven
    from adapterhub_lite.serving.model.runner import ForwardKind

    resolved = resolve_base(base, home=home)
    answers = {"fingerprint": resolved.fingerprint}
    try:
        plan = plan_memory(resolved, batch_size=1, sequence_length=512, home=home)
        size = f"{'at least ' * bool(plan.predicted.unpredicted)}{plan.predicted.total / 2**30:.2f} GiB"
        answers["training, 1 x 512 tokens"] = f"{plan.preset.name}, {size}"
        if plan.predicted.unpredicted:
            answers["not planned"] = plan.predicted.unpredicted
    except AdapterHubError as error:
        answers["training, 1 x 512 tokens"] = f"no: {error}"
    answers["training by all-linear"] = trained_by_default(resolved)
    model = load_base_model(resolved.folder)
    answers["class"] = type(model).__name__
    families, structure = find_families(model), structure_of(model)
    batched = False
    try:
        _, verdict = proven(model, resolved.fingerprint, adapterhub_home(home), rows=16)
        answers["serving"] = (
            f"{verdict.kind}; logits within {verdict.difference:.1g} of the model's own, relative to their size; at most "
            f"{verdict.tolerance:.1g} is rounding"
        )
        batched = verdict.kind not in (ForwardKind.ROWS, ForwardKind.RECOMPUTED)
        if verdict.reasons:
            answers["why no faster way"] = "; ".join(verdict.reasons)
    except AdapterHubError as error:
        answers["serving"] = f"no: {error}"
    layers = ", ".join(sorted({target_name(path) for family in families for path in family.paths})) or "nothing"
    answers["LoRA, served " + ("in one batch" if batched else "row by row")] = layers
    ends = [one for one in (structure.head, structure.embedding) if one]
    # The weight of a convolution by channel has three dimensions too, the second of which is 1.
    experts = sorted({n.rpartition(".")[2] for n, s in structure.parameters.items() if len(s) == 3 and s[1] > 1})
    apart = [f"LoRA on {' and '.join(ends)}", "DoRA, lora_bias", "modules_to_save", "trainable_token_indices"]
    if experts:
        apart.insert(1, f"experts ({', '.join(experts)}), as target_parameters")
    answers["served " + ("apart from others" if batched else "row by row too")] = "; ".join(apart)
    answers["tokens of an adapter's own"] = new_tokens_of(structure, len(load_tokenizer(resolved.folder)))
    answers["merging"] = "a LoRA bias only where its layer has a bias"
    if structure.tied:
        answers["merging"] += f"; one of {' and '.join(ends)} alone needs --untie: the base has one matrix for both"
    answers["refused"] = "; ".join([*unfit_layers(structure), "DoRA on an embedding", "bias, layer_replication, aLoRA"])
    return answers


def target_name(path: str) -> str:
    """What `target_modules` call a layer: its last name, with the one before where that is a number, as layers have."""
    before, _, last = path.rpartition(".")
    return f"{before.rpartition('.')[2]}.{last}" if last.isdigit() else last


def trained_by_default(base: ResolvedBase) -> str:
    """Whether the trainer's own choice of layers is trained, by the check that it makes; no weights are read."""
    import torch

    from adapterhub_lite.bases import load_tokenizer
    from adapterhub_lite.memory import build_model, read_config
    from adapterhub_lite.training.arguments import AdapterTrainingArguments
    from adapterhub_lite.training.model.adapters import OpenedBase, with_adapter
    from adapterhub_lite.training.model.before_training import check_before_training

    args, opened = AdapterTrainingArguments(output_dir="unused"), OpenedBase(None, base, load_tokenizer(base.folder))
    try:
        with torch.device("meta"):
            adapted = with_adapter(build_model(read_config(base), dtype=torch.float32), args, None, opened)
            check_before_training(adapted, base, whole=True)
    except ConfigurationError as error:
        return f"no: {error} Name the layers in the target_modules of a peft_config"
    return "yes"


def new_tokens_of(structure: Structure, tokens: int) -> str:
    """Whether an adapter may bring tokens along, by the rows of its base; `tokens` are those of its tokenizer."""
    others = sorted(
        name for name in structure.embeddings - {structure.embedding, structure.head} if "per_layer" in name
    )
    free = max(0, ((structure.shape_of(f"{structure.embedding}.weight") or (0,))[0]) - tokens)
    if others:
        return f"{free}, in rows that no token takes; not more: {others[0]} has a row per token too"
    return f"yes; {free} in rows that no token takes, and more, for which embedding and head grow beside the base's"


def unfit_layers(structure: Structure) -> list[str]:
    """Which matrices of a base take no LoRA, by their place in a layer."""
    ends = {structure.head, structure.embedding, *structure.embeddings}
    others = structure.matrices.keys() - ends - (structure.linear or set())
    places = sorted({name.rpartition(".")[2] for name in others})
    return [f"a pair on {', '.join(places)}, which the model does not call as plain linear layers"] if places else []


def bench(
    name: Annotated[str | None, typer.Argument(help="Name of the bench; without one, all benches are listed.")] = None,
    arguments: Annotated[list[str] | None, typer.Argument(help="Arguments of the bench itself, after `--`.")] = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure this machine: run one bench, which writes its figures and plot to scripts/bench/results.

    Example: `adapterhub-lite bench registry -- --versions 1000`
    """
    if not BENCHES.is_dir():
        raise ConfigurationError(
            "The benches are part of a checkout of the project, not of the installed package: run this from a checkout."
        )
    known = find_benches()
    if name is None:
        rows = [{"name": one, "question": found.question} for one, found in known.items()]
        if as_json:
            return print_json(rows)
        return print_table("Benches", ("name", "question"), [tuple(row.values()) for row in rows])
    if name not in known:
        raise UnknownNameError.among("bench", name, list(known))
    command = [sys.executable, "-m", f"scripts.bench.{known[name].room}.{name}", *(arguments or [])]
    if dry_run:
        return would(f"run {' '.join(['python', *command[1:]])}", as_json, command=command)
    before = _results()
    # With --json, standard output holds our document only: the output of the bench goes to standard error.
    done = subprocess.run(command, cwd=ROOT, stdout=2 if as_json else None, check=False)
    written = sorted(str(path) for path, when in _results().items() if before.get(path) != when)
    if as_json:
        print_json({"name": name, "returncode": done.returncode, "written": written})
    elif written:
        say("Written: " + ", ".join(written))
    if done.returncode:
        raise typer.Exit(1)


@dataclass(frozen=True)
class Bench:
    """A runnable file of `scripts/bench`: the folder it is in, and the question it answers."""

    room: str
    question: str


def find_benches() -> dict[str, Bench]:
    """Every bench of this checkout, by name."""
    found = {}
    for path in sorted(BENCHES.glob("*/*.py"), key=lambda path: path.stem):
        text = path.read_text()
        if '__name__ == "__main__"' in text:
            question = (ast.get_docstring(ast.parse(text)) or "").split("\n")[0]
            found[path.stem] = Bench(path.parent.name, question)
    return found


def _results() -> dict[Path, float]:
    return {path: path.stat().st_mtime for path in (BENCHES / "results").glob("*")}
