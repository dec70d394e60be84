"""Objects bound to a running process."""

from __future__ import annotations

from privtuner.copies import Stays

__all__ = ["LiveResource"]


class LiveResource(Stays):
    """Something a copied model goes on using, and a pickled one could not."""

    stays = (
        "a model with encrypted layers cannot be pickled: it holds a live connection to the server; save the adapter "
        "with save_pretrained, the owner's tensors with OwnerBundle.save, or use state_dict"
    )
