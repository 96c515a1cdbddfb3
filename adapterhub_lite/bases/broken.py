"""What is wrong with the files of a base, said before anything is computed with it. torch and transformers on use only.

transformers draws weights that no file holds at random and leaves out those that it has no place for, with a warning: such
a model trains and answers, differently at each load.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterhub_lite.adapter_format.strict_reading import MAX_BASE_HEADER_BYTES, TensorEntry, read_tensor_entries
from adapterhub_lite.errors import AdapterHubError, BrokenBaseError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FLOATING = ("F64", "F32", "F16", "BF16")
LONGEST_REASON = 300


def fetch_again(folder: Path) -> str:
    """How to get the files of the base in `folder` anew; of a snapshot of the hub's cache, its bytes lie in a folder beside."""
    fetched = next((above for above in folder.parents if above.name.startswith("models--")), folder)
    return f"Fetch the base again; what was fetched here by its name is, once {fetched} is deleted."


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a base.

    Raises:
        BrokenBaseError: it holds none.
    """
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise BrokenBaseError(
            f"{path} is not JSON: {str(error)[:LONGEST_REASON]}. {fetch_again(path.parent)}"
        ) from None
    if not isinstance(found, dict):
        raise BrokenBaseError(f"{path} holds no JSON object but a {type(found).__name__}. {fetch_again(path.parent)}")
    return found


def read_entries(path: Path) -> list[TensorEntry]:
    """The tensors of a safetensors file of a base, by its header.

    Raises:
        BrokenBaseError: the header does not describe the bytes of the file.
    """
    try:
        return read_tensor_entries(path, header_limit=MAX_BASE_HEADER_BYTES)
    except ValueError as error:
        raise BrokenBaseError(f"{path.parent}: {error}. {fetch_again(path.parent)}") from None


@contextmanager
def read_by_transformers(part: str, source: str | Path) -> Iterator[None]:
    """Say in a sentence why transformers cannot use the `part` of the base in `source`; want of memory passes through.

    Raises:
        BrokenBaseError: it raised something.
    """
    import torch

    try:
        yield
    except (AdapterHubError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a configuration's values fail wherever a family uses them
        if "allocate memory" in str(error):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:LONGEST_REASON].rstrip(".")
        # A configuration that was made in memory has no files.
        advice = fetch_again(Path(source)) if Path(source, "config.json").is_file() and str(source) else ""
        named = f"the base {source}" if str(source) else "a base"
        raise BrokenBaseError(
            f"transformers cannot use the {part} of {named}. It says: {reason}. Correct what it names. {advice}".rstrip()
        ) from error


def check_loaded(model: "PreTrainedModel", found: Mapping[str, Iterable[Any]], folder: Path) -> None:
    """Compare what transformers loaded from `folder` with what is there; `found` is its `output_loading_info`.

    Raises:
        BrokenBaseError: a weight is missing or without a place in the model, is a whole number, or is not finite.
    """
    family = type(model).__name__
    if absent := sorted(map(str, found.get("missing_keys", ()))):
        raise BrokenBaseError(
            f"The files of {folder} lack {_some(absent)} of {family}, which transformers would draw at random. Its "
            f"config.json may be of another model. {fetch_again(folder)}"
        )
    if strange := _contradicting(model, sorted(map(str, found.get("unexpected_keys", ())))):
        raise BrokenBaseError(
            f"The files of {folder} hold {_some(strange)}, for which {family} as config.json describes it has no place: they "
            "would be left out. Correct config.json, or save the model with save_pretrained."
        )
    if getattr(model.config, "quantization_config", None) is None and (whole := _whole_numbers(model, folder)):
        raise BrokenBaseError(
            f"{folder} stores {_some(whole)} as whole numbers, and its config.json has no quantization_config that says what "
            f"they stand for. {fetch_again(folder)}"
        )
    if _of_several():
        return  # each of them holds a part of the values, or room for them
    if broken := [name for name, parameter in model.named_parameters() if not _is_finite(parameter)]:
        raise BrokenBaseError(f"{folder} has NaN or infinity in {_some(broken)}. {fetch_again(folder)}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more weights" if len(names) > 3 else "")


def _contradicting(model: "PreTrainedModel", names: list[str]) -> list[str]:
    """Of weights without a place, those of a layer that is there, or of one more in a list of layers.

    Others are parts that the family leaves out on purpose, such as the eyes of a model that sees.
    """
    from torch import nn

    modules = dict(model.named_modules())
    prefix = f"{model.base_model_prefix}."
    further = int(getattr(model.config, "num_nextn_predict_layers", None) or 0)

    def contradicts(name: str) -> bool:
        layer = modules.get(name.rpartition(".")[0])
        if layer is not None and not any(True for _ in layer.children()) and any(True for _ in layer.parameters()):
            return True
        lists = ((modules.get(name[: at.start()]), int(at[1])) for at in re.finditer(r"\.(\d+)\.", name))
        return any(isinstance(layers, nn.ModuleList) and at >= len(layers) + further for layers, at in lists)

    return [name for name in names if contradicts(name) or contradicts(prefix + name)]


def _whole_numbers(model: "PreTrainedModel", folder: Path) -> list[str]:
    wanted = {name for name, parameter in model.named_parameters() if parameter.is_floating_point()}
    entries = (entry for path in sorted(folder.glob("*.safetensors")) for entry in read_entries(path))
    return [e.name for e in entries if e.name in wanted and e.dtype not in FLOATING and not e.dtype.startswith("F8")]


def _of_several() -> bool:
    import torch.distributed as processes

    return processes.is_available() and processes.is_initialized() and processes.get_world_size() > 1


def _is_finite(parameter: Any) -> bool:  # a tensor
    import torch

    # Parts that another process holds are empty or on "meta"; packed ones and eight bits have no such values to find.
    if not parameter.is_floating_point() or parameter.itemsize < 2 or parameter.is_meta or not parameter.numel():
        return True
    # Both are NaN where one value is; five times as fast as the largest norm.
    return all(bool(edge.isfinite()) for edge in torch.aminmax(parameter.detach()))
