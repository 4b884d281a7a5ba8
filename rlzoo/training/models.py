"""Loading a causal language model and its tokenizer: embedded, local folder or hub. Nothing that a folder contains is executed:
no modelling code of its own, and pickled weights are read as tensors only."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

EMBEDDED = "tiny"

PROBES = (
    "Let $x_1=1{,}234.5$ and \\frac{3}{4}; it's  DON'T\tdo 007.\n\n  So 62-11+39=90?\r\n",
    "ﬁ ½ Ångström, e\u0301té, 中文, 🙂",
    "<|im_start|>user\nHi <|im_end|>\n<|endoftext|>",
)
"""Texts on which tokenizers that cut text differently differ: digits, contractions, spaces, line ends, letters, special tokens."""


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


@dataclass(frozen=True, slots=True)
class Described:
    """All of a model but its weights: tokenizer, config and generation config (None: it has none)."""

    tokenizer: Any
    config: Any
    generation_config: Any


def describe_model(name: str) -> Described:
    """Load what a model's folder or hub page says of it, without the weights, which may be missing.

    Raises:
        ValueError: no such model, no tokenizer there, or no config.
    """
    from transformers import AutoConfig, GenerationConfig

    source = resolve(name)
    tokenizer = load_tokenizer(name)
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # of many kinds, as for the tokenizer
        raise ValueError(f"model {name!r}: no usable config ({_first_line(error)})") from error
    try:
        generation = GenerationConfig.from_pretrained(source, trust_remote_code=False)
    except OSError:
        generation = None
    return Described(tokenizer, config, generation)


def count_parameters(name: str) -> int | None:
    """Parameters of a model by its config alone, tied ones once; None where transformers cannot build it from that."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(resolve(name), trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception:  # of many kinds; loading the model says what is wrong with it
        return None
    return sum(int(p.numel()) for p in model.parameters())


def weights_sha256(name: str) -> str | None:
    """SHA-256 of a model's safetensors file (what `sha256sum` prints), of several that of the lines "SHA-256  NAME" in the order of
    their names. None where there is no such file here: another format, or a model that is somewhere else. `name` as for `load_model`;
    of a model of the hub it is the copy that was downloaded."""
    folder = Path(resolve(name))
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            cached = try_to_load_from_cache(name, "config.json")
        except HFValidationError:
            return None
        if not isinstance(cached, str):
            return None
        folder = Path(cached).parent
    hashes = {path.name: _file_sha256(path, path.stat().st_size, path.stat().st_mtime_ns) for path in folder.glob("model*.safetensors")}
    if len(hashes) < 2:
        return next(iter(hashes.values()), None)
    return hashlib.sha256("".join(f"{hashes[name]}  {name}\n" for name in sorted(hashes)).encode()).hexdigest()


@cache
def _file_sha256(path: Path, size_bytes: int, mtime_ns: int) -> str:
    """Of a file in one state, told by size and time: a suite of evaluations reads it once."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def pick_device(device: str) -> str:
    """A torch device string; "auto" is the first GPU, or the CPU.

    Raises:
        ValueError: unknown device, or a GPU that is not there.
    """
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        return "cuda" if count else "cpu"
    allowed = ["cpu", *(["cuda"] if count else []), *(f"cuda:{i}" for i in range(count))]
    if device not in allowed:
        lacking = ", but this machine has no usable GPU" if device.startswith("cuda") and not count else ""
        raise ValueError(f"backend.device = {device!r}{lacking}; allowed here: auto, {', '.join(allowed)}")
    return device


def load_model(name: str, *, dtype: str, device: str) -> LoadedModel:
    """Load weights and tokenizer, and check that both are whole and belong together.

    Raises:
        ValueError: no such model, no or broken weights, no tokenizer there, or an unknown device.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    where = pick_device(device)
    source = resolve(name)
    tokenizer = load_tokenizer(name)
    logging.disable_progress_bar()
    before = logging.get_verbosity()
    logging.set_verbosity_error()  # its report of weights that are missing is a sentence below
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            source, dtype=getattr(torch, dtype), output_loading_info=True, trust_remote_code=False, weights_only=True
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"model {name!r} cannot be loaded: {_first_line(error)}") from error
    finally:
        logging.set_verbosity(before)
    _check_weights(name, model, report["missing_keys"])
    _check_vocabulary(name, model, tokenizer)
    return LoadedModel(model.to(where).eval(), tokenizer, source, where)


def _check_weights(name: str, model: Any, missing: Collection[str]) -> None:
    if missing:  # transformers would go on with random numbers
        raise ValueError(f"model {name!r} has no weights for {sorted(missing)[0]} ({len(missing)} tensors are missing)")
    for tensor, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise ValueError(f"model {name!r} has weights that are not finite (NaN or infinite) in {tensor}")


def _check_vocabulary(name: str, model: Any, tokenizer: Any) -> None:
    rows = int(model.get_output_embeddings().weight.shape[0])
    last = max(tokenizer.get_vocab().values())
    if last >= rows:
        raise ValueError(f"model {name!r} has an embedding of {rows} rows, too few for the ids of its tokenizer, which go up to {last}")


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model. Of a local folder with a tokenizer.json it makes exactly the ids that this file says.

    Raises:
        ValueError: no such model, or no tokenizer there.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    source = resolve(name)
    local = Path(source)
    if local.exists() or source.startswith((".", "/", "~")):
        _check_folder(name, local)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        if not _follows(tokenizer, local / "tokenizer.json"):  # transformers reads every qwen2 folder as if it were Qwen2's own
            tokenizer = PreTrainedTokenizerFast.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # the Rust part raises bare exceptions; whatever it is, the files are not a tokenizer
        raise ValueError(f"model {name!r}: no usable tokenizer ({_first_line(error)})") from error
    if not _follows(tokenizer, local / "tokenizer.json"):
        raise ValueError(f"model {name!r}: transformers reads its tokenizer.json as another tokenizer than it is; expected the same ids")
    return tokenizer


def _follows(tokenizer: Any, file: Path) -> bool:
    """Whether `tokenizer` gives the ids of tokenizer.json; True where there is no such file."""
    from tokenizers import Tokenizer

    if not file.is_file():
        return True
    own = Tokenizer.from_file(str(file))
    if not own.get_vocab(with_added_tokens=True).items() <= tokenizer.get_vocab().items():
        return False
    return all(own.encode(text, add_special_tokens=False).ids == tokenizer.encode(text, add_special_tokens=False) for text in PROBES)


def _check_folder(name: str, folder: Path) -> None:
    if not folder.is_dir():
        raise ValueError(f"model folder {name!r} does not exist")
    config = folder / "config.json"
    if not config.is_file():
        raise ValueError(f"model folder {name!r} has no config.json; expected a folder as written by save_pretrained")
    try:
        json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{config} is not JSON: {error}") from error
    if not any((folder / f).is_file() for f in ("tokenizer.json", "vocab.json", "tokenizer.model")):
        raise ValueError(f"model folder {name!r} has no tokenizer (tokenizer.json); save the model's tokenizer beside it")


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
