"""Low-rank adapters on encrypted layers, by PEFT. The only file that imports it.

`peft.get_peft_model` works on a model built from a bundle as it is; `add_lora` spares choosing the head and
says up front what cannot work without the weights.
"""

from __future__ import annotations

import re
import tempfile
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from privtuner.errors import InputError, WeightWithheldError
from privtuner.nn.families import PEFT_TASKS
from privtuner.nn.layers import EncryptedLayer
from privtuner.paths import put

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

    from privtuner.train.mean_head import MeanForSequenceClassification

__all__ = [
    "add_lora",
    "check_lora_config",
    "load_adapter",
    "save_encoder_adapter",
    "save_released",
    "trainable_heads",
]

_Matrices: TypeAlias = Mapping[tuple[int, Any], tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]]

_ALL_LINEAR = "all-linear"
# Initialisations that read no weight: A random and B zero in one way or another.
_FREE_INITS = (True, False, "gaussian", "orthogonal")


def add_lora(
    model: PreTrainedModel | MeanForSequenceClassification,
    *,
    r: int = 8,
    alpha: int | None = None,
    dropout: float = 0.0,
    targets: Collection[str] | str | None = None,
    modules_to_save: Collection[str] | None = None,
    **options: Any,
) -> PeftModel:
    """Put LoRA adapters on a model built from a bundle and make its heads trainable.

    Args:
        model: what `privtuner.nn.build` returned, or a clear model to compare with.
        r: rank of the adapters; 0 adds none, so that the heads alone are trained and saved.
        alpha: the update is scaled by ``alpha / r``; 2 r when None.
        dropout: probability of dropping an input of an adapter, in [0, 1).
        targets: ends of module names, e.g. ("query", "value"), a regular expression, or "all-linear"; PEFT's choice for
            the model type when None.
        modules_to_save: modules trained in full; the model's trainable heads when None.
        **options: further fields of `peft.LoraConfig`.

    Returns:
        The `peft.PeftModel`; its ``save_pretrained`` writes an adapter for the clear model.

    Raises:
        privtuner.errors.InputError: a rank, dropout or target that cannot be used, or a module to save whose weight
            is the server's.
        privtuner.errors.WeightWithheldError: an option that needs the values of frozen weights.
    """
    from peft import LoraConfig, get_peft_model
    from peft.utils.constants import DUMMY_TARGET_MODULES

    if not isinstance(r, int) or r < 0:
        raise InputError(f"r is {r}; give a rank of at least 1, or 0 to train the heads alone")
    if not 0.0 <= dropout < 1.0:
        raise InputError(f"dropout is {dropout}; give a probability in [0, 1)")
    if any(hasattr(module, "base_layer") for module in model.modules()):
        raise InputError("the model has adapters already; give what nn.build returned, or use its add_adapter")
    if targets is not None and not isinstance(targets, str):
        # As in PEFT, the word stands for all layers, and the command line gives a list.
        targets = _ALL_LINEAR if list(targets) == [_ALL_LINEAR] else list(targets)
    name = type(model).__name__
    if r == 0:
        # PEFT's word for an adapter that matches no layer; it refuses a rank of 0 and an empty list of targets.
        r, targets = 1, DUMMY_TARGET_MODULES
    options.setdefault("fan_in_fan_out", _targets_conv1d(model, targets))
    try:
        config = LoraConfig(
            r=r,
            lora_alpha=2 * r if alpha is None else alpha,
            lora_dropout=dropout,
            target_modules=targets,
            modules_to_save=list(trainable_heads(model) if modules_to_save is None else modules_to_save),
            task_type=next((task for suffix, task in PEFT_TASKS.items() if name.endswith(suffix)), None),
            **options,
        )
    except (TypeError, ValueError) as error:
        raise InputError(f"these are no options of a LoRA adapter: {error}") from error
    check_lora_config(model, config)
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise InputError(f"PEFT cannot adapt this {name}: {str(error).partition('. ')[0]}") from error


def load_adapter(model: torch.nn.Module, directory: str | Path) -> PeftModel:
    """Return ``model`` with the adapter in ``directory`` on it, in eval mode.

    Raises:
        privtuner.errors.InputError: there is none, or it does not fit ``model``.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import SafetensorError, safe_open

    # PEFT would look for what is missing on the hub, and for weights that are a pickle.
    for name in ("adapter_config.json", weights := "adapter_model.safetensors"):
        if not (Path(directory) / name).is_file():
            raise InputError(f"there is no adapter in {directory}: it has no {name}")
    try:
        with warnings.catch_warnings():
            # A layer without its part of the adapter would go on as it was.
            warnings.filterwarnings("error", ".*missing adapter keys", UserWarning)
            adapted = PeftModel.from_pretrained(model, str(directory)).eval()
        with safe_open(Path(directory) / weights, "pt") as file:
            left = set(file.keys()) - set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    except (RuntimeError, UserWarning) as error:
        first = " ".join(" ".join(str(error).splitlines()[:2]).split())
        raise InputError(f"the adapter in {directory} does not fit this {type(model).__name__}: {first}") from error
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"cannot load an adapter from {directory}: {error}") from error
    if left:
        raise InputError(
            f"the adapter in {directory} does not fit this {type(model).__name__}: it has no place for '{min(left)}'"
        )
    return adapted


def save_released(
    directory: Path,
    matrices: _Matrices,
    head: torch.nn.Linear,
    *,
    alpha: float,
    inside: str,
) -> None:
    """Write the adapters that the server of a sealed model released as an adapter of the clear model.

    Args:
        directory: where the files go; it exists.
        matrices: (layer, "query" or "value") -> A (rank, width) and B (width, rank).
        head: weight and bias of the classes.
        alpha: the adapters are scaled by ``alpha / rank``.
        inside: name of the encoder in the clear classifier.
    """
    tensors = {f"base_model.model.classifier.{name}": tensor for name, tensor in head.state_dict().items()}
    _save_matrices(directory, matrices, tensors, alpha, f"{inside}.", modules_to_save=["classifier"])


def save_encoder_adapter(directory: Path, matrices: _Matrices, *, alpha: float) -> None:
    """Write the adapters that the server of a sealed model has in the clear as an adapter of its encoder.

    Args:
        directory: where the files go; made if it does not exist.
        matrices: (layer, "query" or "value") -> A (rank, width) and B (width, rank).
        alpha: the adapters are scaled by ``alpha / rank``.
    """
    directory.mkdir(parents=True, exist_ok=True)
    _save_matrices(directory, matrices, {}, alpha, "")


def _save_matrices(
    directory: Path,
    matrices: _Matrices,
    tensors: dict[str, torch.Tensor],
    alpha: float,
    inside: str,
    **options: Any,
) -> None:
    """Write an adapter of these matrices and of further tensors, each file whole or as it was before."""
    from peft import LoraConfig
    from safetensors.torch import save_file

    (a, _), *_ = matrices.values()
    config = LoraConfig(
        r=len(a),
        lora_alpha=alpha,  # type: ignore[arg-type]  # any number does
        target_modules=sorted({target for _, target in matrices}),
        inference_mode=True,
        **options,
    )
    for (layer, target), pair in matrices.items():
        place = f"base_model.model.{inside}encoder.layer.{layer}.attention.self.{target}"
        for name, matrix in zip("AB", pair, strict=True):
            tensors[f"{place}.lora_{name}.weight"] = torch.tensor(matrix, dtype=torch.float32)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=directory, ignore_cleanup_errors=True) as staged:
        config.save_pretrained(staged)
        save_file(tensors, Path(staged) / "adapter_model.safetensors")
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            put(Path(staged) / name, directory / name)


def check_lora_config(model: torch.nn.Module, config: LoraConfig) -> None:
    """Refuse what cannot work on a model whose frozen weights are elsewhere.

    Args:
        model: a model with encrypted layers.
        config: what is to be passed to `peft.get_peft_model`.

    Raises:
        privtuner.errors.InputError: a target matches no module, or one that takes no adapter or is trained in full; a
            module to save does not exist, or has its weight at the server.
        privtuner.errors.WeightWithheldError: DoRA, an initialisation computed from the weights, or an adapter of a
            weight itself.
    """
    if config.use_dora:
        raise WeightWithheldError("use_dora needs the values of the frozen weights; use plain LoRA")
    if config.init_lora_weights not in _FREE_INITS:
        raise WeightWithheldError(
            f"init_lora_weights={config.init_lora_weights!r} is computed from the frozen weights; "
            f"use one of {', '.join(map(repr, _FREE_INITS))}"
        )
    modules = dict(model.named_modules())
    for parameter in getattr(config, "target_parameters", None) or ():
        if any(_ends_with(f"{path}.weight", parameter) for path, m in modules.items() if isinstance(m, EncryptedLayer)):
            raise WeightWithheldError(f"target_parameters: '{parameter}' is with the server; name its layer in targets")
    _check_targets(modules, config)
    for wanted in config.modules_to_save or ():
        if not any(_ends_with(path, wanted) for path in modules):
            parts = ", ".join(path for path in modules if path and "." not in path)
            raise InputError(f"modules_to_save: '{wanted}' matches no module; the model has {parts}")
        for path, module in modules.items():
            if _ends_with(path, wanted) and any(isinstance(m, EncryptedLayer) for m in module.modules()):
                raise InputError(
                    f"'{path}' cannot be trained in full: its weight stays with the server; give it an adapter "
                    "(targets) or split the model with keep naming it"
                )


def _check_targets(modules: Mapping[str, torch.nn.Module], config: LoraConfig) -> None:
    """Refuse targets that PEFT would pass over, or stop at with the model half changed."""
    from peft.utils.constants import DUMMY_TARGET_MODULES

    targets = config.target_modules
    if targets is None or targets in (_ALL_LINEAR, DUMMY_TARGET_MODULES):
        return
    saved = config.modules_to_save or ()
    takes = {path for path, module in modules.items() if isinstance(module, _adaptable())}
    takes -= {path for path in takes if any(_is_in(path, name) for name in saved)}
    known = ", ".join(sorted({path.rpartition(".")[2] for path in takes}))
    if not targets and not getattr(config, "target_parameters", None):
        raise InputError(f"no targets; name layers that get adapters, of {known}")
    for target in [targets] if isinstance(targets, str) else sorted(map(str, targets)):
        try:
            found = [path for path in modules if _matches(path, target, expression=isinstance(targets, str))]
        except re.error as error:
            raise InputError(f"target {target!r} is no regular expression: {error}") from error
        if not found:
            raise InputError(f"target {target!r} matches no module; the layers that take adapters are {known}")
        open_ = [path for path in found if not any(_is_in(path, name) for name in saved)]
        if not open_:
            raise InputError(f"target {target!r}: '{found[0]}' is trained in full, without an adapter; leave it out")
        for path in open_:
            if path not in takes:
                kind = type(modules[path]).__name__
                raise InputError(
                    f"target {target!r}: '{path}' is a {kind}, which takes no adapter; name some of {known}"
                )


def trainable_heads(model: torch.nn.Module) -> list[str]:
    """Return the outermost modules of ``model`` whose parameters are all trainable, by dotted name.

    The base model of a clear model that was not frozen yet is passed over: an adapter freezes it.
    """
    heads: list[str] = []
    base = getattr(model, "base_model", None)

    def visit(path: str, module: torch.nn.Module) -> None:
        flags = [parameter.requires_grad for parameter in module.parameters()]
        if all(flags) and module is base:
            return
        if path and flags and all(flags):
            heads.append(path)
        elif any(flags):
            for name, child in module.named_children():
                visit(f"{path}.{name}" if path else name, child)

    visit("", model)
    return heads


def _targets_conv1d(model: torch.nn.Module, targets: Collection[str] | str | None) -> bool:
    """Return what PEFT would set, with a warning, on meeting the first target."""
    from transformers.pytorch_utils import Conv1D

    wanted = None if targets is None or isinstance(targets, str) else tuple(targets)
    return any(
        isinstance(module, Conv1D) and (wanted is None or any(_ends_with(path, target) for target in wanted))
        for path, module in model.named_modules()
    )


def _matches(path: str, target: str, *, expression: bool) -> bool:
    return re.fullmatch(target, path) is not None if expression else _ends_with(path, target)


def _adaptable() -> tuple[type[torch.nn.Module], ...]:
    from transformers.pytorch_utils import Conv1D

    return (torch.nn.Linear, torch.nn.Embedding, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d, Conv1D)


def _is_in(path: str, name: str) -> bool:
    """Return whether a module is the one called ``name``, or inside it."""
    return f".{name}." in f".{path}."


def _ends_with(path: str, suffix: str) -> bool:
    return path == suffix or path.endswith(f".{suffix}")
