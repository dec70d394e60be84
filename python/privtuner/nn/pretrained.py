"""Loads a model directory whole or not at all: what is damaged, missing or left over is named in one line."""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from privtuner.errors import InputError
from privtuner.nn.bundle import TOKENIZER_FILES, OwnerBundle, describing_entries
from privtuner.nn.families import NEW_HEADS

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["is_new_head", "load_configuration", "load_model", "load_tokenizer", "own_files", "tokenizer_files"]

_CONFIG = "config.json"
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_LFS = b"version https://git-lfs"
_LOCAL = {"local_files_only": True, "trust_remote_code": False}


def load_configuration(directory: str | Path) -> PreTrainedConfig:
    """Return the configuration of a model directory, after looking at every file that loading will read.

    Raises:
        privtuner.errors.InputError: there is no such directory or no model in it; a file is missing, empty, damaged, a
            Git LFS pointer or unreadable; the model type is missing or unknown, or needs code of its own.
    """
    from transformers import CONFIG_MAPPING, AutoConfig, __version__

    folder = Path(directory)
    if not folder.is_dir():
        raise InputError(f"no model in {folder}: there is no such directory; give one that save_pretrained wrote")
    if not (folder / _CONFIG).is_file():
        raise InputError(f"no model in {folder}: {_CONFIG} is missing; give a directory that save_pretrained wrote")
    entries = _read_json(folder / _CONFIG)
    kind = entries.get("model_type")
    if not isinstance(kind, str):
        raise InputError(f"{folder / _CONFIG} has no model_type, which says what the model is; fetch the file again")
    if kind not in CONFIG_MAPPING:
        own = "needs code of its own (auto_map), which is not run" if entries.get("auto_map") else "is unknown"
        raise InputError(
            f"{folder / _CONFIG}: model type '{kind}' {own}; use a model that transformers {__version__} "
            "has, or another transformers"
        )
    _check_weights(folder)
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, **_LOCAL)
    # transformers raises exceptions of any class on odd entries.
    except Exception as error:
        raise InputError(f"{folder / _CONFIG}: {_line(error)}") from error
    return config


def load_model(
    directory: str | Path, loader: Any, *, relabelled: bool = False, **options: Any
) -> tuple[PreTrainedModel, frozenset[str]]:
    """Load a model, in eval mode.

    Args:
        directory: as ``save_pretrained`` writes it. Nothing is downloaded, no code in it is run.
        loader: a class of ``transformers`` with ``from_pretrained``.
        relabelled: a head of another number of labels than the directory's is made anew.
        **options: for ``from_pretrained``.

    Returns:
        The model, and the names of the modules of heads that the directory lacks, which were made up.

    Raises:
        privtuner.errors.InputError: as `load_configuration`; or tensors are missing, left over or of another shape,
            other than those of a whole head that is made anew.
    """
    folder = Path(directory)
    config = load_configuration(folder)
    if getattr(loader, "_model_mapping", None) is not None:
        options = {**options, "trust_remote_code": False}
    try:
        model, report = loader.from_pretrained(
            folder, local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except MemoryError:
        raise
    # As above.
    except Exception as error:
        raise InputError(f"cannot load a {config.model_type} model from {folder}: {_line(error)}") from error
    missing = set(report["missing_keys"])
    mismatched = {name: (tuple(found), tuple(wanted)) for name, found, wanted in report["mismatched_keys"]}
    for name, (found, wanted) in sorted(mismatched.items()):
        if not (relabelled and is_new_head(model, name)):
            raise InputError(
                f"{folder}: '{name}' has shape {found} in the weights and {wanted} by {_CONFIG}; they do not belong "
                "together, fetch the directory again"
            )
    broken = sorted(name for name in missing if not _is_whole_head(model, name, missing))
    if broken:
        raise InputError(
            f"{folder}: the weights lack {_names(broken)}, which would be random; fetch the directory again"
        )
    extra = sorted(name for name in report["unexpected_keys"] if _belongs_inside(model, name))
    if extra:
        raise InputError(
            f"{folder}: by {_CONFIG} the model has no {_names(extra)}, which the weights hold; they do not belong "
            "together, fetch the directory again"
        )
    return model.eval(), frozenset(name.rpartition(".")[0] for name in missing)


def load_tokenizer(directory: str | Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model directory.

    Raises:
        privtuner.errors.InputError: there is none, or a file of it is damaged.
    """
    from transformers import AutoTokenizer

    folder = Path(directory)
    if not tokenizer_files(folder):
        raise InputError(f"no tokenizer in {folder}: fetch the model's tokenizer.json, vocab.txt and the like")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, **_LOCAL)
    # As above.
    except Exception as error:
        raise InputError(f"cannot load the tokenizer in {folder}: {_line(error)}; fetch its files again") from error
    if not len(tokenizer):
        raise InputError(f"the tokenizer in {folder} knows no tokens; fetch its files again")
    return tokenizer


def own_files(bundle: OwnerBundle, directory: str | Path) -> tuple[OwnerBundle, PreTrainedTokenizerBase]:
    """Return a bundle and its tokenizer with the data owner's own files in place of the server's.

    The tokenizer decides how many tokens a word has, and so what the sizes of requests tell; the configuration how many
    requests there are.

    Args:
        bundle: of the server.
        directory: the owner's copy of the model's tokenizer, and of its ``config.json``, which takes the place of the
            bundle's if it is there.

    Raises:
        privtuner.errors.InputError: there is no tokenizer, or a file is damaged.
    """
    tokenizer, config = load_tokenizer(directory), Path(directory) / _CONFIG
    if config.exists():
        bundle = replace(bundle, config=describing_entries(_read_json(config)))
    return bundle, tokenizer


def tokenizer_files(directory: str | Path) -> dict[str, bytes]:
    """Return name and contents of the tokenizer's files, none where there are none.

    Raises:
        privtuner.errors.InputError: one is empty, unreadable, a Git LFS pointer, or not the JSON its name promises.
    """
    paths = [path for path in sorted(Path(directory).iterdir()) if path.name in TOKENIZER_FILES]
    for path in paths:
        _check_file(path)
        if path.suffix == ".json":
            _read_json(path)
    return {path.name: path.read_bytes() for path in paths}


def is_new_head(model: PreTrainedModel, name: str) -> bool:
    """Return whether ``name``, a tensor or module of ``model``, belongs to a head that fine-tuning makes anew.

    That is what lies outside the base model, and poolers, but no output embeddings: those are pretrained.
    """
    head, inside = _outermost(model, name)
    if inside and head not in NEW_HEADS:
        return False
    words = model.get_output_embeddings()
    return words is None or not any(module is words for module in _part(model, head, inside).modules())


def _is_whole_head(model: PreTrainedModel, name: str, missing: Collection[str]) -> bool:
    """Return whether ``name`` is of a new head of which nothing else was found either."""
    if not is_new_head(model, name):
        return False
    place = _outermost(model, name)
    return all(other in missing for other, _ in model.named_parameters() if _outermost(model, other) == place)


def _belongs_inside(model: PreTrainedModel, name: str) -> bool:
    """Return whether a parameter that the model lacks would have its place inside the base model."""
    head, inside = _outermost(model, name)
    # Old checkpoints hold buffers (position_ids, masked_bias) that are computed today.
    return inside and head not in NEW_HEADS and name.rpartition(".")[2] in ("weight", "bias")


def _outermost(model: PreTrainedModel, name: str) -> tuple[str, bool]:
    """Return the outermost module of a dotted name, the base model passed over, and whether it is a part of that.

    Names of what a checkpoint holds beyond the model may lack the base model's prefix.
    """
    base = model.base_model
    prefix = f"{model.base_model_prefix}."
    first = name.removeprefix(prefix).partition(".")[0]
    if base is not model and name.startswith(prefix):
        return first, True
    return first, first in dict(base.named_children()) and (base is model or first not in dict(model.named_children()))


def _part(model: PreTrainedModel, head: str, inside: bool) -> torch.nn.Module:
    owner = model.base_model if inside else model
    part = getattr(owner, head, None)
    return part if isinstance(part, torch.nn.Module) else torch.nn.Module()


def _check_weights(folder: Path) -> None:
    present = [folder / name for name in _WEIGHTS if (folder / name).is_file()]
    if not present:
        raise InputError(f"no weights in {folder}: {_WEIGHTS[0]} is missing; fetch it")
    path = present[0]
    shards = [path]
    if path.suffix == ".json":
        places = _read_json(path).get("weight_map")
        if not isinstance(places, dict):
            raise InputError(f"{path} has no weight_map, which names the parts of the weights; fetch it again")
        shards = [folder / name for name in sorted({str(name) for name in places.values()})]
    for shard in shards:
        if not shard.is_file():
            raise InputError(f"{shard} is missing, and {path.name} names it; fetch it")
        _check_file(shard)
        if shard.suffix == ".safetensors":
            from safetensors import SafetensorError, safe_open

            try:
                with safe_open(shard, "pt"):
                    pass
            except SafetensorError as error:
                raise InputError(f"{shard} is damaged or cut short ({_line(error)}); fetch it again") from error


def _check_file(path: Path) -> None:
    try:
        with path.open("rb") as file:
            start = file.read(len(_LFS))
    except OSError as error:
        raise InputError(f"{path} cannot be read ({os.strerror(error.errno or 0)}); check its permissions") from error
    if not start:
        raise InputError(f"{path} is empty; fetch it again")
    if start == _LFS:
        raise InputError(f"{path} is a pointer of Git LFS, not the file itself; run 'git lfs pull' in its repository")


def _read_json(path: Path) -> dict[str, Any]:
    _check_file(path)
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}); fetch it again") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__} instead of an object; fetch it again")
    return content


def _names(names: list[str]) -> str:
    """Return the first few names, and how many more there are."""
    shown = ", ".join(f"'{name}'" for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _line(error: BaseException) -> str:
    """Return the first line of what ``error`` says."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
