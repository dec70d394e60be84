"""Cuts a Hugging Face model into the server's part and the data owner's bundle."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from privtuner import linear
from privtuner.errors import InputError
from privtuner.nn.bundle import GroupSpec, OwnerBundle, describing_entries
from privtuner.nn.families import (
    KEPT_HEADS,
    PRETRAINING_HEADS,
    READ_WEIGHTS,
    TASKS,
    canonical_names,
    check_regular,
    group_siblings,
    type_of,
    wire_name,
)
from privtuner.nn.kinds import kind_of, matrix_of
from privtuner.nn.pretrained import load_configuration, load_model, load_tokenizer, tokenizer_files
from privtuner.nn.sealing import Sealing, take_apart

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from privtuner.sealed.weights import Weights

__all__ = ["Split", "split", "split_pretrained"]


@dataclass(frozen=True, eq=False, repr=False)
class Split:
    """The two parts of a model.

    Attributes:
        server: wire name -> prepared layer; never leaves the model owner.
        bundle: for the data owner.
        weights: of a model that is sealed whole, which is served instead of layers, once
            `privtuner.nn.Prepared.calibrate` has prepared it; never leaves the model owner.
    """

    server: Mapping[str, linear.QuantisedWeight]
    bundle: OwnerBundle
    weights: Weights | None = None

    def __repr__(self) -> str:
        if self.weights is not None:
            return f"Split(weights of {len(self.weights.layers)} blocks, bundle={self.bundle!r})"
        return f"Split(server={len(self.server)} prepared layers, bundle={self.bundle!r})"


def split(
    model: PreTrainedModel,
    preset: str = "linear-w8",
    keep: Collection[str] = KEPT_HEADS,
    *,
    files: Mapping[str, bytes] | None = None,
    omit: Collection[str] = (),
    seal: Sealing | Literal["model"] | None = None,
    allow_data_dependent_requests: bool = False,
    progress: Callable[[int, int, str], object] | None = None,
) -> Split:
    """Split ``model``: every frozen linear layer to the server, the rest to the data owner.

    Linear layers are `torch.nn.Linear` and the ``Conv1D`` of ``transformers``. One whose weight is tied to an
    embedding stays with the data owner, who has the embedding anyway. Whatever else holds a matrix and is no embedding
    is refused rather than given away.

    Args:
        model: a model of ``transformers`` without adapters, in the clear; unchanged.
        preset: parameters of the encrypted product, "linear-w8" or "linear-w16".
        keep: modules or parameters that stay in the clear with the data owner, by the end of their dotted name
            ("classifier" covers everything inside ``classifier``).
        files: tokenizer files to carry along, name -> contents.
        omit: names of modules (as in ``model``) to leave out of both parts.
        seal: how to seal a BERT-like encoder whole, "model" for the defaults: its blocks are then evaluated on
            ciphertexts, and neither side learns the other's secret. Preset and keep have no meaning then.
        allow_data_dependent_requests: split model types that are not known to ask every layer for the same tokens
            whatever the texts say; see `privtuner.nn.build`, where the data owner has to say so too.
        progress: called with the weights prepared so far, all that there are, and the name of the layer that is next.

    Raises:
        privtuner.errors.InputError: ``model`` is no such model, has adapters, quantised layers or tensors that are not
            in memory, holds a matrix that is neither linear nor an embedding, or weights that are not finite; it is of
            a type whose requests may depend on the data; ``preset`` is unknown; or with ``seal``, it is of a type or
            form that cannot be sealed.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise InputError(f"split takes a model of transformers; this is a {type(model).__name__}")
    if any(hasattr(module, "base_layer") for module in model.modules()):
        raise InputError("the model has adapters; split the plain model and add adapters to what the bundle builds")
    if getattr(model.config, "quantization_config", None) is not None:
        raise InputError("the model's weights are quantised; load it in float32, bfloat16 or float16 and split that")
    away = next((name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta), None)
    if away is not None:
        raise InputError(
            f"'{away}' is not in memory (offloaded to disk, or on the meta device); load the model with "
            "from_pretrained(directory) and no device_map"
        )
    if seal is not None:
        weights, bundle = take_apart(model, _sealing(seal), files or {}, omit)
        return Split({}, bundle, weights)
    if not allow_data_dependent_requests:
        check_regular(model)
    canonical = canonical_names(model)
    kept = _make_matcher(keep)
    omitted = _make_exact_matcher(omit)
    layers = {
        name: module
        for name, module in model.named_modules()
        if kind_of(module) and not (kept(name) or omitted(name) or _is_tied(module, model))
    }
    if (read := READ_WEIGHTS.get(type_of(model))) in layers:
        raise InputError(
            f"'{read}' cannot be served: a {type(model).__name__} reads its weight past the layer; give it to the data "
            f"owner in the clear with keep=(..., '{read}'), or split the base model"
        )
    begin = _make_counter(progress, sum(matrix_of(module).numel() for module in layers.values()))
    server: dict[str, linear.QuantisedWeight] = {}
    groups: dict[str, GroupSpec] = {}
    specs: dict[str, linear.LayerSpec] = {}
    for names in group_siblings(layers):
        for members in _group(names, layers):
            modules = [layers[name] for name in members]
            wire = wire_name(tuple(canonical(name) for name in members))
            begin(wire, modules)
            server[wire] = prepared = _prepare(wire, modules, preset)
            specs[wire] = prepared.spec
            groups[wire] = GroupSpec(
                kind_of(modules[0]) or "linear",
                {canonical(name): matrix_of(module).shape[0] for name, module in zip(members, modules, strict=True)},
            )

    begin("", ())

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
        specs=specs,
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
    **options: Any,
) -> Split:
    """Load the model in ``directory`` and split it; its tokenizer goes into the bundle.

    Args:
        directory: model directory as ``save_pretrained`` writes it. Nothing is downloaded, no code in it is run.
        preset: see `split`.
        keep: see `split`.
        task: which head to load, as in `privtuner.nn.build`. None loads the architecture the configuration
            names, or the base model when that is a pretraining head.
        dtype: dtype to load and train in.
        **options: ``seal``, ``allow_data_dependent_requests``, ``progress`` of `split`.

    Raises:
        privtuner.errors.InputError: ``directory`` holds no whole model: a file is missing or damaged, or a tensor that
            is not of a head to be made anew is missing, left over or of another shape; or see `split`.
    """
    import transformers

    if task is not None and task not in TASKS:
        raise InputError(f"unknown task {task!r}; known: {', '.join(sorted(TASKS))}")
    config = load_configuration(directory)
    loader: Any = getattr(transformers, TASKS[task or "feature-extraction"])
    architecture = (config.architectures or [""])[0]
    if task is None and architecture and not architecture.endswith(PRETRAINING_HEADS):
        loader = getattr(transformers, architecture, None)
        if loader is None:
            raise InputError(
                f"{directory} holds a {architecture}, which transformers {transformers.__version__} lacks; give a task "
                f"of {', '.join(sorted(TASKS))}, or use another version"
            )
    model, missing = load_model(directory, loader, config=config, dtype=dtype)
    files = tokenizer_files(directory)
    if files:
        load_tokenizer(directory)  # one that does not load should show here, not at the data owner's
    # A head that the directory lacks was made up on loading: the data owner makes and trains its own.
    return split(model, preset, keep, files=files, omit=missing, **options)


def _sealing(seal: Sealing | str) -> Sealing:
    if seal == "model":
        return Sealing()
    if not isinstance(seal, Sealing):
        raise InputError(f"seal is {seal!r}; give 'model', or privtuner.nn.Sealing(...) with options")
    return seal


def _make_counter(
    progress: Callable[[int, int, str], object] | None, total: int
) -> Callable[[str, Collection[torch.nn.Module]], None]:
    """Return what is called before each piece of work with its name and modules, and passes on how much is done."""
    done = 0

    def begin(name: str, modules: Collection[torch.nn.Module]) -> None:
        nonlocal done
        if progress is not None:
            progress(done, total, name)
        done += sum(matrix_of(module).numel() for module in modules)

    return begin


def _make_matcher(suffixes: Collection[str]) -> Callable[[str], bool]:
    """Return whether a dotted name, or one of its parents, ends with one of ``suffixes``."""
    if isinstance(suffixes, str):
        raise InputError(f"keep is the string {suffixes!r}; give a collection of names, such as ({suffixes!r},)")
    wanted = [tuple(suffix.split(".")) for suffix in suffixes]

    def matches(name: str) -> bool:
        parts = tuple(name.split("."))
        return any(parts[end - len(w) : end] == w for w in wanted for end in range(len(w), len(parts) + 1))

    return matches


def _make_exact_matcher(names: Collection[str]) -> Callable[[str], bool]:
    """Return whether a name is one of ``names`` or lies right inside it."""
    exact = frozenset(names)
    return lambda name: name in exact or name.rpartition(".")[0] in exact


def _is_tied(module: torch.nn.Module, model: PreTrainedModel) -> bool:
    return any(module.weight is other.weight for other in model.modules() if isinstance(other, torch.nn.Embedding))


def _group(names: tuple[str, ...], layers: Mapping[str, torch.nn.Module]) -> list[tuple[str, ...]]:
    """Return ``names`` as one group if their inputs and kinds agree, else each on its own."""
    shapes = {(kind_of(layers[name]), matrix_of(layers[name]).shape[1]) for name in names}
    return [names] if len(shapes) == 1 else [(name,) for name in names]


def _prepare(wire: str, modules: list[torch.nn.Module], preset: str) -> linear.QuantisedWeight:
    stacked = torch.cat([matrix_of(module).detach().to("cpu", torch.float32) for module in modules])
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
