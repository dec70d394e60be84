"""The data owner's model, built from a bundle."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from privtuner.errors import InputError
from privtuner.foreign import foreign_text
from privtuner.nn.bundle import GroupSpec, OwnerBundle
from privtuner.nn.configuration import at_most_modules, configuration_of, offline
from privtuner.nn.families import TASKS, canonical_names, check_regular
from privtuner.nn.groups import EncryptedGroup
from privtuner.nn.layers import EncryptedLayer, EncryptedLinear
from privtuner.nn.pretrained import is_new_head
from privtuner.nn.saving import adapt_methods
from privtuner.nn.session import Session

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["build", "build_embeddings"]

_LABELS = frozenset({"num_labels", "id2label", "label2id", "problem_type"})


def build(
    bundle: OwnerBundle,
    session: Session,
    *,
    task: str | None = None,
    skip_padding: bool | None = None,
    attn_implementation: str | None = None,
    base_model: str | None = None,
    allow_data_dependent_requests: bool = False,
    **config: Any,
) -> PreTrainedModel:
    """Return the data owner's ``transformers`` model, its frozen linear layers computed by a server.

    Everything from the bundle is frozen but its kept heads; a head that the bundle lacks is initialised with
    PyTorch's generator, as ``from_pretrained`` does, and trainable. The model is in eval mode and on the
    processor, as from ``transformers``; move it with ``.to``. It works with
    ``transformers.Trainer`` and PEFT as it is. Its ``save_pretrained`` writes the data owner's tensors alone, see
    `privtuner.nn.saving.adapt_methods`; with PEFT around it, the adapter.

    Args:
        bundle: the data owner's part of the model.
        session: what encrypts, and the way to the server that prepared the layers.
        task: "sequence-classification", "token-classification", "question-answering", "causal-lm", "masked-lm" or
            "feature-extraction" (no head). None means sequence classification when ``num_labels`` is given, else
            the architecture that was split.
        skip_padding: leave positions that ``attention_mask`` hides out of requests. The server then learns the
            number of real tokens in a batch. None does so where it is proven that nothing reads what the model
            computes there: for model types whose attention honours the mask, in sequence classification if the
            pooled position is visible, and in training with labels if the loss reads visible positions alone (of
            that step's logits no value can be used). A base model gives its hidden states to the caller, who may
            say that the mask is honoured with `privtuner.nn.visible_only`. True leaves them out on the
            caller's word, of whatever the model gives back; False sends them always.
        attn_implementation: "sdpa" or "eager"; None for the default of ``transformers``.
        base_model: directory or name of the clear model, which PEFT writes into saved adapters for
            ``AutoPeftModel`` to find it. The server's own is not in the bundle; ``PeftModel.from_pretrained`` needs
            none.
        allow_data_dependent_requests: build model types that are not known to ask every layer for the same tokens
            whatever the texts say, such as mixtures of experts. The server then learns of the data what the numbers
            and sizes of requests tell.
        **config: entries of the configuration to change, such as ``num_labels``, ``id2label`` or
            ``pad_token_id``.

    Raises:
        privtuner.errors.InputError: unknown task, model type or configuration entry, a model type whose
            requests may depend on the data, or the bundle lacks what the architecture needs.
    """
    if not isinstance(session, Session):
        raise InputError(f"session is a {type(session).__name__}; give privtuner.nn.Session(transport)")
    if bundle.sealed is not None:
        raise InputError("the bundle is of a sealed model, which has no layers to place; use nn.SealedEncoder")
    configuration = _configuration(bundle, config, any_type=allow_data_dependent_requests)
    if task is None and not {"num_labels", "id2label"}.isdisjoint(config):
        task = "sequence-classification"
    model = _skeleton(bundle, configuration, task, attn_implementation)
    if not allow_data_dependent_requests:
        check_regular(model)
    _check_against_architecture(bundle, configuration)
    _place_encrypted_layers(model, bundle, session)
    _load_tensors(model, bundle, resized=not _LABELS.isdisjoint(config))
    model.tie_weights()
    _initialise_missing(model)
    _check_complete(model)
    session.passes.watch(model, skip=skip_padding, any_size=allow_data_dependent_requests)
    adapt_methods(model)
    if base_model is not None:
        model.name_or_path = configuration.name_or_path = base_model
    model.eval()
    return model


def build_embeddings(bundle: OwnerBundle) -> torch.nn.Module:
    """Return the embeddings of a sealed model with their norm: frozen, without dropout, on the processor.

    They are called with ``input_ids`` (n, length), and give (n, length, width).

    Raises:
        privtuner.errors.InputError: the bundle lacks a part of them, or the architecture has none.
    """
    model: Any = _skeleton(bundle, _configuration(bundle, {}), None, None)
    _load_tensors(model, bundle, resized=False)
    embeddings = getattr(model, "embeddings", None)
    if not isinstance(embeddings, torch.nn.Module):
        raise InputError(f"a {bundle.architecture} has no embeddings of its own; fetch the bundle again")
    _check_complete(embeddings)
    for name, module in embeddings.named_children():
        if isinstance(module, torch.nn.Dropout):
            setattr(embeddings, name, torch.nn.Identity())
    return embeddings.eval()


def _configuration(bundle: OwnerBundle, overrides: Mapping[str, Any], *, any_type: bool = False) -> PreTrainedConfig:
    config = configuration_of(bundle.config, any_type=any_type)
    unknown = sorted(key for key in overrides if key not in _LABELS and not hasattr(config, key))
    if unknown:
        raise InputError(f"{unknown} are no entries of a {type(config).__name__}; see its documentation for the names")
    labels = {key: value for key, value in overrides.items() if key in _LABELS}
    if "num_labels" in labels and "id2label" in labels and len(labels["id2label"]) != labels["num_labels"]:
        raise InputError(f"num_labels is {labels['num_labels']} and id2label names {len(labels['id2label'])} labels")
    config.update(dict(overrides))
    return config


def _skeleton(
    bundle: OwnerBundle, config: PreTrainedConfig, task: str | None, attn_implementation: str | None
) -> PreTrainedModel:
    """Return the architecture without memory: every tensor on the meta device."""
    import transformers

    options: dict[str, Any] = {"dtype": getattr(torch, bundle.dtype)}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    if task is None:
        cls = getattr(transformers, bundle.architecture, None)
        if not (
            isinstance(cls, type)
            and issubclass(cls, transformers.PreTrainedModel)
            and isinstance(config, cls.config_class or ())
        ):
            raise InputError(
                f"the installed transformers has no model {bundle.architecture!r} of type {config.model_type}; use the "
                "server's transformers"
            )
        build: Any = cls._from_config
    elif task in TASKS:
        build = getattr(transformers, TASKS[task]).from_config
    else:
        raise InputError(f"unknown task {task!r}; known: {', '.join(sorted(TASKS))}")
    parts = len(bundle.tensors) + sum(len(spec.members) for spec in bundle.groups.values())
    try:
        with offline(), at_most_modules(8 * parts + 1000), torch.device("meta"):
            model: PreTrainedModel = build(config, **options)
    # As above: any class of exception, on a task the model type lacks as on odd entries.
    except Exception as error:
        raise InputError(
            f"cannot build {task or bundle.architecture} of {config.model_type}: {foreign_text(error)}"
        ) from error
    return model


def _check_against_architecture(bundle: OwnerBundle, config: PreTrainedConfig) -> None:
    """Refuse a bundle that lacks a part of the model that was split, which would be replaced by a random one."""
    whole = _skeleton(bundle, config, None, None)
    canonical = canonical_names(whole)
    served = {member for spec in bundle.groups.values() for member in spec.members}
    named = whole.named_parameters(remove_duplicate=False)
    sources = {id(tensor) for name, tensor in named if canonical(name) in bundle.tensors}
    for path, module in whole.named_modules():
        name = canonical(path)
        if name in bundle.omitted:
            if not is_new_head(whole, path):
                raise InputError(
                    f"the bundle leaves out '{name}' of its {bundle.architecture}, which is no head to be made anew; "
                    "the server's model is incomplete"
                )
            continue
        for leaf, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            full = canonical(f"{path}.{leaf}" if path else leaf)
            if full in bundle.tensors or (name in served and leaf == "weight") or id(tensor) in sources:
                continue
            raise InputError(
                f"the bundle lacks '{full}' of its {bundle.architecture}; fetch it again, and do not change entries of "
                "the configuration that set sizes"
            )


def _place_encrypted_layers(model: PreTrainedModel, bundle: OwnerBundle, session: Session) -> None:
    canonical = canonical_names(model)
    modules = {canonical(name): (name, module) for name, module in model.named_modules()}
    for wire, spec in bundle.groups.items():
        present = [name for name in spec.members if name in modules]
        if not present:
            # Belongs to a head that this task does without.
            continue
        if len(present) < len(spec.members):
            missing = sorted(set(spec.members) - set(present))
            raise InputError(f"the model built here lacks {missing} of group '{wire}'; use the server's transformers")
        group = EncryptedGroup(wire, bundle.specs[wire], list(spec.members.values()), session)
        for member, name in enumerate(spec.members):
            path, module = modules[name]
            parent, _, leaf = path.rpartition(".")
            layer = _make_encrypted(group, member, spec, name, module, getattr(torch, bundle.dtype))
            setattr(model.get_submodule(parent), leaf, layer)


def _make_encrypted(
    group: EncryptedGroup,
    member: int,
    spec: GroupSpec,
    name: str,
    module: torch.nn.Module,
    dtype: torch.dtype,
) -> EncryptedLayer:
    from transformers.pytorch_utils import Conv1D

    from privtuner.nn.conv1d import EncryptedConv1D

    expected = torch.nn.Linear if spec.kind == "linear" else Conv1D
    if type(module) is not expected:
        raise InputError(
            f"'{name}' is a {type(module).__name__} here and was split as {spec.kind}; use the server's transformers"
        )
    features = (group.out_features[member], group.in_features)
    shape = tuple(module.weight.shape) if spec.kind == "linear" else tuple(module.weight.shape)[::-1]
    if shape != features:
        raise InputError(
            f"'{name}' has {shape} (out, in) features by the configuration and {features} at the server; do not change "
            "entries of the configuration that set sizes"
        )
    cls = EncryptedLinear if spec.kind == "linear" else EncryptedConv1D
    layer = cls(group, member, bias=module.bias, dtype=dtype)
    return layer.train(module.training)


def _load_tensors(model: PreTrainedModel, bundle: OwnerBundle, *, resized: bool) -> None:
    """Give the model copies of the bundle's tensors; a kept head of another size is left to be initialised anew."""
    canonical = canonical_names(model)
    for path, module in model.named_modules():
        for table in (module._parameters, module._buffers):
            for leaf, old in table.items():
                name = canonical(f"{path}.{leaf}" if path else leaf)
                if old is None or name not in bundle.tensors:
                    continue
                new = bundle.tensors[name].clone()
                if new.shape != old.shape:
                    if resized and name in bundle.kept:
                        continue
                    raise InputError(
                        f"'{name}' has shape {tuple(old.shape)} by the configuration and {tuple(new.shape)} in the "
                        "bundle; do not change entries of the configuration that set sizes"
                    )
                if table is module._parameters:
                    new = torch.nn.Parameter(new, requires_grad=name in bundle.kept)
                table[leaf] = new


def _initialise_missing(model: PreTrainedModel) -> None:
    """Initialise modules that the bundle lacks, as ``from_pretrained`` does for a new head."""
    base = model.base_model
    for path, module in model.named_modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if not any(tensor.is_meta for tensor in own):
            continue
        if isinstance(module, EncryptedLayer):
            raise InputError(f"the bundle lacks the bias of '{path}'; fetch it again")
        module.to_empty(device="cpu", recurse=False)
        model._init_weights(module)
        if base is model or any(module is inner for inner in base.modules()):
            warnings.warn(
                f"'{path}' is not in the bundle and was newly initialised; train it, or serve a model that has it",
                stacklevel=3,
            )


def _check_complete(model: torch.nn.Module) -> None:
    for path, module in model.named_modules():
        for name, value in [*vars(module).items(), *module._parameters.items(), *module._buffers.items()]:
            if isinstance(value, torch.Tensor) and value.is_meta:
                raise InputError(f"'{path}.{name}' of this {type(model).__name__} cannot be filled from a bundle")
