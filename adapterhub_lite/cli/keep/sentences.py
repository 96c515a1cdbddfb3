"""An adapter version in plain sentences, for `show`."""

from adapterhub_lite.cli.output import megabytes, short, shown_number
from adapterhub_lite.registry.operations.list import AdapterDetails


def sentences(details: AdapterDetails) -> list[str]:
    """What a version is, in plain sentences: base, LoRA, training, where it came from, and what holds it here."""
    manifest = details.manifest
    lora, base, record, origin = manifest.lora, manifest.base, manifest.training, manifest.origin
    said = [
        f"{manifest.reference} is a LoRA adapter for {base.id}" + (f", for {manifest.task}." if manifest.task else ".")
    ]
    kinds = [
        word for on, word in ((lora.use_dora, "DoRA"), (lora.use_rslora, "rsLoRA"), (lora.lora_bias, "biases")) if on
    ]
    said.append(
        f"It changes {lora.modules_bound} of {lora.modules_total} modules with rank {lora.rank} and alpha {lora.alpha:g}, "
        f"scaled by {lora.scaling:g}" + (f" ({', '.join(kinds)})." if kinds else ".")
    )
    if lora.also:
        said.append(f"Besides linear layers it changes {', '.join(lora.also)}.")
    at = f"commit {base.revision}, " if base.revision else ""
    loaded = f", loaded as {base.quantization}" if base.quantization else ""
    said.append(f"The base is known by {at}fingerprint {short(base.fingerprint)}{loaded}.")
    if base.named:
        said.append(f"Its own configuration calls the base {base.named!r}.")
    if record is not None:
        chats = record.text.of_chats if record.text else None
        asked = {True: "; ask it with chat messages", False: "; ask it with a raw prompt", None: ""}[chats]
        loss = "" if record.final_loss is None else f" to a loss of {shown_number(record.final_loss)}"
        said.append(
            f"It was trained for {record.steps} steps{loss} on {record.data.rows} rows of "
            f"{record.data.id}, in {record.wall_seconds:.0f} s{asked}."
        )
    if manifest.answer_schema is not None:
        fields = ", ".join(map(str, manifest.answer_schema.get("properties", ())))
        said.append(
            "Its answers are JSON after the schema kept with it" + (f", with {fields:.200}." if fields else ".")
        )
    if manifest.parents:
        parents = ", ".join(f"{one.reference} (weight {one.weight:g})" for one in manifest.parents)
        said.append(f"It was merged from {parents}.")
    if origin is not None and origin.repo_id:
        called = f", where it is called {origin.name}:{origin.version}" if origin.name else ""
        said.append(f"It came from {origin.repo_id}{called}.")
    held = [f"{manifest.name}@{alias}" for alias in details.aliases]
    held += [text for on, text in ((details.pinned, "a pin"), (details.held, "a running server")) if on]
    kept = (
        f"{', '.join(held)} {'keep' if len(held) > 1 else 'keeps'} it from gc"
        if held
        else "No alias, pin or server keeps it from gc"
    )
    said.append(f"{kept}. It was added {manifest.created}, takes {megabytes(details.size)} and is "
                f"{'' if details.signed else 'not '}signed. Digest {manifest.digest}.")  # fmt: skip
    return said
