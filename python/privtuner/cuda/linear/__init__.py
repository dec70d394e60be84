"""Encrypted linear layers on the device: the scheme of `privtuner.linear`, the same bytes on the wire.

Messages lie in page-locked memory, which is used again. The host reads each once, to seal or to check it; the words are
copied over the bus from and to the message itself, and everything else is done by kernels. Two streams, called lanes,
take turns with pieces of a message: while one copies, the other computes. What is secret (secrets, errors, products
with secrets, scales, batches in clear that were made here) is overwritten with zeros once it was used.

Two levels. `open_request`, `answer`, `apply_blocks`, `encrypt` and `decrypt` speak bytes, use the lanes, and are done
with every copy when they return. `Product`, `apply`, `apply_many`, `encrypt_words` and `decrypt_words` take and give
device arrays and put their work into the current stream.
"""

from __future__ import annotations

from privtuner.cuda.linear.decryption import decrypt, decrypt_words
from privtuner.cuda.linear.encryption import encrypt, encrypt_words
from privtuner.cuda.linear.secret import DeviceOneTimeKey
from privtuner.cuda.linear.server import (
    DeviceLayer,
    Opened,
    Product,
    answer,
    apply,
    apply_blocks,
    apply_many,
    gather,
    open_request,
)

__all__ = [
    "DeviceLayer",
    "DeviceOneTimeKey",
    "Opened",
    "Product",
    "answer",
    "apply",
    "apply_blocks",
    "apply_many",
    "decrypt",
    "decrypt_words",
    "encrypt",
    "encrypt_words",
    "gather",
    "open_request",
]
