"""Objects bound to a running process."""

from __future__ import annotations

from typing import Any

from privtuner.errors import InputError

__all__ = ["LiveResource"]


class LiveResource:
    """Something a copied model goes on using, and a pickled one could not."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self

    def __reduce__(self) -> str | tuple[Any, ...]:
        raise InputError(
            "a model with encrypted layers cannot be pickled: it holds a live connection to the server; save the "
            "adapter with save_pretrained, the owner's tensors with OwnerBundle.save, or use state_dict"
        )
