"""Saving and resizing a data owner's model, where ``transformers`` takes for granted that all weights are at hand."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch

from privtuner.errors import InputError, WeightWithheldError
from privtuner.nn.layers import EncryptedLayer
from privtuner.nn.withheld import mark_withheld

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["adapt_methods"]

_CONFIG, _WEIGHTS, _TRAINER = "config.json", "model.safetensors", "training_args.bin"


def adapt_methods(model: PreTrainedModel) -> None:
    """Replace the methods of ``model``, and of the base model inside it, that need weights which are the server's.

    ``save_pretrained`` writes the data owner's tensors as ``model.safetensors`` without a ``config.json``, so that
    ``transformers.Trainer`` can save and resume checkpoints and nothing can load the directory as a model: each layer
    of the server has a ``weight`` of one zero in the file, which no clear model takes. They load with
    ``safetensors.torch.load_model(model, file)`` on what the bundle builds; a head alone, on the clear model, with
    ``load_state_dict({k: t for k, t in load_file(file).items() if k.startswith("classifier.")}, strict=False)``.

    ``push_to_hub`` and ``init_weights`` are refused, and ``resize_token_embeddings`` before anything changes if the
    server has the output embeddings. A model to which ``add_adapter`` was applied saves its adapter, as ever.
    """
    from transformers import PreTrainedModel

    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            # Bound methods, not functions: copies of the model get methods of their own.
            for name, function in (
                ("save_pretrained", _save_pretrained),
                ("push_to_hub", _push_to_hub),
                ("init_weights", _init_weights),
                ("resize_token_embeddings", _resize_token_embeddings),
            ):
                setattr(module, name, MethodType(function, module))


def _save_pretrained(
    self: PreTrainedModel,
    save_directory: str | Path,
    is_main_process: bool = True,
    state_dict: dict[str, torch.Tensor] | None = None,
    push_to_hub: bool = False,
    **options: Any,
) -> None:
    """Write the data owner's tensors, or the adapter that ``add_adapter`` made; see `adapt_methods`.

    Args:
        self: the model.
        save_directory: made if it does not exist.
        is_main_process: nothing is written where this is False.
        state_dict: tensors to write instead of those of ``self``.
        push_to_hub: refused.
        **options: of ``transformers``, which have no effect on a single file.

    Raises:
        privtuner.errors.InputError: the directory holds a model, or there is a file of that name.
        privtuner.errors.WeightWithheldError: ``push_to_hub``.
    """
    from safetensors.torch import save_file

    if getattr(self, "_hf_peft_config_loaded", False):
        type(self).save_pretrained(self, save_directory, is_main_process, state_dict, push_to_hub, **options)
        return
    if push_to_hub:
        _push_to_hub(self)
    folder = Path(save_directory)
    if folder.is_file():
        raise InputError(f"{folder} is a file; give a directory to save to")
    # Left by an earlier run of the Trainer it is about to be replaced; anywhere else it may be the only copy.
    if (folder / _CONFIG).is_file() and not (folder / _TRAINER).is_file():
        raise InputError(
            f"{folder} holds a model ({_CONFIG}), and what is saved here is none: its frozen weights are the server's; "
            "give another directory"
        )
    if not is_main_process:
        return
    tensors: dict[str, torch.Tensor] = {}
    seen: set[tuple[int, torch.Size]] = set()
    for name, tensor in (self.state_dict() if state_dict is None else state_dict).items():
        place = (tensor.data_ptr(), tensor.shape)
        if tensor.numel() and place in seen:
            continue  # tied to one that is saved
        seen.add(place)
        tensors[name] = tensor.detach().contiguous()
    for path, module in self.named_modules():
        if isinstance(module, EncryptedLayer):
            mark_withheld(tensors, path)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _CONFIG).unlink(missing_ok=True)
    save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})
    warnings.warn(
        f"{folder / _WEIGHTS} holds the data owner's tensors, heads included, and no frozen weight, so from_pretrained "
        "cannot load it: use safetensors.torch.load_model(model, file) on what nn.build returns",
        stacklevel=2,
    )


def _push_to_hub(self: PreTrainedModel, *_: Any, **__: Any) -> None:
    raise WeightWithheldError(
        f"this {type(self).__name__} is no whole model: its frozen weights are with the server; push a PEFT adapter "
        "(PeftModel.push_to_hub), or what save_pretrained writes"
    )


def _init_weights(self: PreTrainedModel) -> None:
    raise WeightWithheldError(
        f"the weights of this {type(self).__name__} are pretrained, and most of them with the server; they cannot be "
        "initialised anew"
    )


def _resize_token_embeddings(
    self: PreTrainedModel,
    new_num_tokens: int | None = None,
    pad_to_multiple_of: int | None = None,
    mean_resizing: bool = True,
) -> torch.nn.Module:
    """Resize the embeddings as ``transformers`` does.

    Raises:
        privtuner.errors.WeightWithheldError: the output embeddings are the server's.
    """
    changes = not (new_num_tokens is None and pad_to_multiple_of is None)
    head = self.get_output_embeddings()
    if changes and head is not None and any(isinstance(module, EncryptedLayer) for module in head.modules()):
        raise WeightWithheldError(
            "the output embeddings are with the server and cannot be resized here; resize the embeddings of the clear "
            "model and split it again"
        )
    old: Any = self.get_input_embeddings()
    rows = old.weight.shape[0]
    table: Any = type(self).resize_token_embeddings(self, new_num_tokens, pad_to_multiple_of, mean_resizing)
    if table.weight.shape[0] != rows:
        warnings.warn(
            f"the embeddings went from {rows} to {table.weight.shape[0]} rows after the split; a saved adapter has "
            "them only if the model was built with base_model, or with save_pretrained(..., "
            "save_embedding_layers=True)",
            stacklevel=2,
        )
    resized: torch.nn.Module = table
    return resized
