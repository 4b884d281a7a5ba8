"""Loading a causal language model and its tokenizer: embedded, local folder or hub."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

EMBEDDED = "tiny"


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in eval mode (no dropout), its tokenizer, where it came from, and the device it is on."""

    model: Any
    tokenizer: Any
    source: str
    device: str


def resolve(name: str) -> str:
    """The folder of the embedded model, or `name` itself."""
    return str(files("rlzoo").joinpath("assets", "tiny")) if name == EMBEDDED else name


def pick_device(device: str) -> str:
    """A torch device string; "auto" is the first GPU, or the CPU.

    Raises:
        ValueError: a GPU is asked for and there is none.
    """
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"backend.device = {device!r}, but this machine has no usable GPU; allowed here: auto, cpu")
    return device


def load_model(name: str, *, dtype: str, device: str) -> LoadedModel:
    """Load weights and tokenizer.

    Raises:
        ValueError: no such model, no weights, or no tokenizer there.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    source = resolve(name)
    tokenizer = load_tokenizer(name)
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype))
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"model {name!r} cannot be loaded: {_first_line(error)}") from error
    where = pick_device(device)
    return LoadedModel(model.to(where).eval(), tokenizer, source, where)


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model.

    Raises:
        ValueError: no such model, or no tokenizer there.
    """
    from transformers import AutoTokenizer

    source = resolve(name)
    local = Path(source)
    if local.exists() or source.startswith((".", "/", "~")):
        _check_folder(name, local)
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"model {name!r}: no usable tokenizer ({_first_line(error)})") from error


def _check_folder(name: str, folder: Path) -> None:
    if not folder.is_dir():
        raise ValueError(f"model folder {name!r} does not exist")
    if not (folder / "config.json").is_file():
        raise ValueError(f"model folder {name!r} has no config.json; expected a folder as written by save_pretrained")
    if not any((folder / f).is_file() for f in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model")):
        raise ValueError(f"model folder {name!r} has no tokenizer (tokenizer.json); save the model's tokenizer beside it")


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
