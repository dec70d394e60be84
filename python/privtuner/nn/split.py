"""Cuts a Hugging Face model into the server's prepared layers and the data owner's bundle."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from privtuner import linear
from privtuner.errors import InputError
from privtuner.nn.bundle import TOKENIZER_FILES, GroupSpec, OwnerBundle, describing_entries
from privtuner.nn.families import KEPT_HEADS, TASKS, group_siblings, wire_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Split", "split", "split_pretrained"]

# Heads of pretraining that fine-tuning throws away; the base model is what the directory is for.
_PRETRAINING = ("ForMaskedLM", "ForPreTraining")


@dataclass(frozen=True, eq=False, repr=False)
class Split:
    """The two parts of a model.

    Attributes:
        server: wire name -> prepared layer; never leaves the model owner.
        bundle: for the data owner.
    """

    server: Mapping[str, linear.Prepared]
    bundle: OwnerBundle

    def __repr__(self) -> str:
        return f"Split(server={len(self.server)} prepared layers, bundle={self.bundle!r})"


def split(
    model: PreTrainedModel,
    preset: str = "linear-w8",
    keep: Collection[str] = KEPT_HEADS,
    *,
    files: Mapping[str, bytes] | None = None,
    omit: Collection[str] = (),
) -> Split:
    """Split ``model``: every frozen linear layer to the server, the rest to the data owner.

    Linear layers are :class:`torch.nn.Linear` and the ``Conv1D`` of ``transformers``. One whose weight is tied to an
    embedding stays with the data owner, who has the embedding anyway. Whatever else holds a matrix and is no embedding
    is refused rather than given away.

    Args:
        model: a model of ``transformers`` without adapters, in the clear; unchanged.
        preset: parameters of the encrypted product, "linear-w8" or "linear-w16".
        keep: modules or parameters that stay in the clear with the data owner, by the end of their dotted name
            ("classifier" covers everything inside ``classifier``).
        files: tokenizer files to carry along, name -> contents.
        omit: names of modules (as in ``model``) to leave out of both parts.

    Raises:
        privtuner.errors.InputError: ``model`` is no such model, has adapters or quantised layers, holds a matrix that
            is neither linear nor an embedding, or weights that are not finite; or ``preset`` is unknown.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise InputError(f"split takes a model of transformers; this is a {type(model).__name__}")
    if any(hasattr(module, "base_layer") for module in model.modules()):
        raise InputError("the model has adapters; split the plain model and add adapters to what the bundle builds")
    if getattr(model.config, "quantization_config", None) is not None:
        raise InputError("the model's weights are quantised; load it in float32, bfloat16 or float16 and split that")
    canonical = canonical_names(model)
    kept = _matcher(keep)
    omitted = _matcher_exact(omit)
    layers = {
        name: module
        for name, module in model.named_modules()
        if _kind(module) and not (kept(name) or omitted(name) or _is_tied(module, model))
    }

    server: dict[str, linear.Prepared] = {}
    groups: dict[str, GroupSpec] = {}
    for names in group_siblings(layers):
        for members in _stackable(names, layers):
            modules = [layers[name] for name in members]
            wire = wire_name(tuple(canonical(name) for name in members))
            server[wire] = _prepare(wire, modules, preset)
            groups[wire] = GroupSpec(
                _kind(modules[0]) or "linear",
                {canonical(name): _matrix(module).shape[0] for name, module in zip(members, modules, strict=True)},
            )

    tensors: dict[str, torch.Tensor] = {}
    kept_tensors = set()
    for name, tensor in _owner_tensors(model, layers, kept, omitted):
        tensors[canonical(name)] = tensor.detach().cpu().clone()
        if kept(name):
            kept_tensors.add(canonical(name))
    bundle = OwnerBundle(
        config=describing_entries(json.loads(model.config.to_json_string(use_diff=False))),
        architecture=type(model).__name__,
        dtype=str(model.dtype).removeprefix("torch."),
        groups=groups,
        publics={name: prepared.public for name, prepared in server.items()},
        tensors=tensors,
        kept=frozenset(kept_tensors),
        omitted=frozenset(canonical(name) for name in omit),
        files=dict(files or {}),
    )
    return Split(server, bundle)


def split_pretrained(
    directory: str | Path,
    preset: str = "linear-w8",
    keep: Collection[str] = KEPT_HEADS,
    *,
    task: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Split:
    """Load the model in ``directory`` and split it; its tokenizer goes into the bundle.

    Args:
        directory: model directory as ``save_pretrained`` writes it. Nothing is downloaded, no code in it is run.
        preset: see :func:`split`.
        keep: see :func:`split`.
        task: which head to load, as in :meth:`OwnerBundle.build`. None loads the architecture the configuration
            names, or the base model when that is a pretraining head.
        dtype: dtype to load and train in.

    Raises:
        privtuner.errors.InputError: ``directory`` holds no model, or see :func:`split`.
    """
    import transformers

    folder = Path(directory)
    if not (folder / "config.json").is_file():
        raise InputError(f"no model in {folder}: config.json is missing; give a directory that save_pretrained wrote")
    if task is not None and task not in TASKS:
        raise InputError(f"unknown task {task!r}; known: {', '.join(sorted(TASKS))}")
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    loader: Any = getattr(transformers, TASKS[task or "feature-extraction"])
    architecture = (config.architectures or [""])[0]
    if task is None and architecture and not architecture.endswith(_PRETRAINING):
        loader = getattr(transformers, architecture, loader)
    model, report = loader.from_pretrained(
        folder, config=config, dtype=dtype, local_files_only=True, output_loading_info=True
    )
    # A layer that the directory lacks was made up on loading: the data owner makes and trains its own.
    missing = {name.rpartition(".")[0] for name in report["missing_keys"] if "." in name}
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name in TOKENIZER_FILES}
    return split(model, preset, keep, files=files, omit=missing)


def canonical_names(model: PreTrainedModel) -> Callable[[str], str]:
    """Return the function that takes the prefix of the base model off a name of ``model``."""
    inside = model.base_model is not model
    prefix = f"{model.base_model_prefix}." if inside else ""
    return lambda name: name.removeprefix(prefix)


def _matcher(suffixes: Collection[str]) -> Callable[[str], bool]:
    """Return whether a dotted name, or one of its parents, ends with one of ``suffixes``."""
    if isinstance(suffixes, str):
        raise InputError(f"keep is the string {suffixes!r}; give a collection of names, such as ({suffixes!r},)")
    wanted = [tuple(suffix.split(".")) for suffix in suffixes]

    def matches(name: str) -> bool:
        parts = tuple(name.split("."))
        return any(parts[end - len(w) : end] == w for w in wanted for end in range(len(w), len(parts) + 1))

    return matches


def _matcher_exact(names: Collection[str]) -> Callable[[str], bool]:
    """Return whether a name is one of ``names`` or lies right inside it."""
    exact = frozenset(names)
    return lambda name: name in exact or name.rpartition(".")[0] in exact


def _kind(module: torch.nn.Module) -> Literal["linear", "conv1d"] | None:
    from transformers.pytorch_utils import Conv1D

    # Subclasses may compute something else, so only the classes themselves count.
    if type(module) is torch.nn.Linear:
        return "linear"
    return "conv1d" if type(module) is Conv1D else None


def _matrix(module: torch.nn.Module) -> torch.Tensor:
    """Return the weight as (out_features, in_features)."""
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    return weight if _kind(module) == "linear" else weight.T


def _is_tied(module: torch.nn.Module, model: PreTrainedModel) -> bool:
    return any(module.weight is other.weight for other in model.modules() if isinstance(other, torch.nn.Embedding))


def _stackable(names: tuple[str, ...], layers: Mapping[str, torch.nn.Module]) -> list[tuple[str, ...]]:
    """Return ``names`` as one group if their inputs and kinds agree, else each on its own."""
    shapes = {(_kind(layers[name]), _matrix(layers[name]).shape[1]) for name in names}
    return [names] if len(shapes) == 1 else [(name,) for name in names]


def _prepare(wire: str, modules: list[torch.nn.Module], preset: str) -> linear.Prepared:
    stacked = torch.cat([_matrix(module).detach().to("cpu", torch.float32) for module in modules])
    try:
        return linear.prepare(stacked.numpy(), preset=preset)
    except InputError as error:
        raise InputError(f"layer '{wire}': {error}") from error


def _owner_tensors(
    model: PreTrainedModel,
    layers: Mapping[str, torch.nn.Module],
    kept: Callable[[str], bool],
    omitted: Callable[[str], bool],
) -> list[tuple[str, torch.Tensor]]:
    """Return the named tensors the data owner gets, each once; refuse a matrix that is nobody's embedding."""
    owned: list[tuple[str, torch.Tensor]] = []
    seen: set[int] = set()
    # Embeddings first: a tensor tied to one goes by the embedding's name.
    modules = sorted(model.named_modules(), key=lambda item: not isinstance(item[1], torch.nn.Embedding))
    for path, module in modules:
        if omitted(path):
            continue
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for leaf, tensor in own:
            name = f"{path}.{leaf}" if path else leaf
            if id(tensor) in seen or (path in layers and leaf == "weight"):
                continue
            seen.add(id(tensor))
            harmless = tensor.ndim <= 1 or isinstance(module, torch.nn.Embedding)
            index = not isinstance(tensor, torch.nn.Parameter) and tensor.dtype in (torch.bool, torch.int64)
            if not (harmless or index or kept(name)):
                raise InputError(
                    f"'{name}' of shape {tuple(tensor.shape)} in a {type(module).__name__} is neither a linear weight "
                    f"nor an embedding, so it cannot be served encrypted; give it to the data owner in the clear with "
                    f"keep=(..., '{name}'), or choose another model"
                )
            owned.append((name, tensor))
    return owned
