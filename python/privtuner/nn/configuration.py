"""A model's configuration from what a server says of it: types and entries that are known, sizes within reason."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from privtuner.errors import InputError
from privtuner.foreign import foreign_text
from privtuner.nn import families

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["at_most_modules", "configuration_of", "offline"]

_MOST = 1 << 25  # a vocabulary, a context, the base of rotary positions
_MOST_LAYERS = 4096
_MOST_POSITIONS = 1 << 14  # where a table of them is computed entry by entry

_going_offline = threading.RLock()


def configuration_of(entries: Mapping[str, Any], *, any_type: bool = False) -> PreTrainedConfig:
    """Return the configuration that a server describes.

    Entries that the class of its model type does not define are left out, and nothing in it makes ``transformers`` ask
    a hub.

    Args:
        entries: as ``transformers`` writes them.
        any_type: take model types whose requests may depend on the data.

    Raises:
        privtuner.errors.InputError: an unknown model type, or one outside of `privtuner.nn.families.REGULAR`; an entry
            that the class refuses, or a size beyond that of any model.
    """
    from transformers import CONFIG_MAPPING

    model_type = entries.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise InputError(
            f"the installed transformers makes no configuration of model type {foreign_text(model_type)!r} from the "
            "bundle; install the server's version"
        )
    if not (any_type or model_type in families.REGULAR):
        raise InputError(families.irregular(f"model of type {model_type}"))
    cls: Any = CONFIG_MAPPING[model_type]
    _check_sizes(entries, model_type)
    try:
        with offline():
            known = set(inspect.signature(cls.__init__).parameters) | set(cls().to_dict()) | set(cls.attribute_map)
            known |= _UNDECLARED
            config: PreTrainedConfig = cls(**{name: value for name, value in entries.items() if name in known - _TOLD})
    # The entries come from the server, and transformers raises exceptions of any class on odd ones.
    except Exception as error:
        raise InputError(
            f"the installed transformers makes no configuration of model type {model_type!r} from the bundle: "
            f"{foreign_text(error)}"
        ) from error
    return config


_UNDECLARED = {
    *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id"),
    *("share_att_key", "position_buckets", "norm_rel_ebd", "conv_kernel_size", "conv_act", "conv_groups"),
}
"""Entries that models and their generation read, and configuration classes take without naming them."""
_TOLD = {"self", "kwargs", "model_type", "_name_or_path"}


def _check_sizes(entries: Mapping[str, Any], model_type: str) -> None:
    """Refuse what would keep `transformers` busy, or take memory, before any tensor is looked at."""
    for name, value in _numbers(entries):
        most = _MOST
        if any(word in name for word in ("layer", "expert", "group")):
            most = _MOST_LAYERS
        elif "position" in name and model_type in families.COMPUTED_POSITIONS:
            most = _MOST_POSITIONS
        if abs(value) > most:
            raise InputError(
                f"the bundle's configuration says {foreign_text(name)} = {value}, and at most {most} are believed"
            )


def _numbers(entries: Mapping[str, Any], outer: str = "") -> Iterator[tuple[str, int]]:
    for name, value in entries.items():
        if name == "label2id":  # names of somebody's labels
            continue
        for one in value if isinstance(value, list) else (value,):
            if isinstance(one, dict):
                yield from _numbers(one, name)
            elif isinstance(one, int):
                yield f"{outer}.{name}" if outer else name, one


@contextmanager
def offline() -> Iterator[None]:
    """Keep ``transformers`` from asking a hub while the block runs, whatever a server's files say."""
    from huggingface_hub import constants

    with _going_offline:
        before = constants.HF_HUB_OFFLINE
        constants.HF_HUB_OFFLINE = True
        try:
            yield
        finally:
            constants.HF_HUB_OFFLINE = before


@contextmanager
def at_most_modules(most: int) -> Iterator[None]:
    """Let this thread make at most ``most`` modules while the block runs.

    Raises:
        privtuner.errors.InputError: there are more.
    """
    made, here = 0, threading.get_ident()

    def count(*_: object) -> None:
        nonlocal made
        if threading.get_ident() == here:
            made += 1
            if made > most:
                raise InputError(f"the bundle's configuration describes more than {most} modules, and has not as many")

    handle = torch.nn.modules.module.register_module_module_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()
