"""The commands of ``privtuner``, one module each: ``add(parser)`` declares its options, ``run(arguments)`` does it.

A module is imported when its command is called. A new command is a module and a row here.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["COMMANDS"]

COMMANDS: Mapping[str, str] = {
    "prepare": "seal a model: calibrate it, plan its circuits, save it for 'privtuner serve'",
    "serve": "hold a model's frozen weights and compute on encrypted activations",
    "top": "what a server has answered, in a table that is redrawn",
    "train": "fine-tune a text classifier through a server, or in the clear",
    "embed": "have a sealed model turn texts into vectors that its server never sees",
    "certs": "make certificates for the connection to a server",
    "token": "make a token by which a server knows a data owner",
    "allocate": "share bandwidth, power and processors among devices",
    "wireless-study": "compare the methods of allocation along every parameter",
    "calibrate": "measure what the parameter sets cost on this machine",
    "info": "what this installation can do",
    "demo": "fine-tune MiniLM plain and encrypted, and compare",
    "demo-sealed": "fine-tune a block of MiniLM that neither side shows the other, and compare",
}
"""Name -> what the list of commands says of it. ``wireless-study`` is in the module ``wireless_study``."""
