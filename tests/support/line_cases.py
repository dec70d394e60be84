"""A small authority with certificates for a server on this machine and for two data owners, and a small model."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

import numpy as np

from privtuner import linear
from privtuner.nn import GroupSpec, OwnerBundle, Split
from privtuner.service import ClientCredentials, ServerCredentials
from privtuner.service.certificates import Authority

HOSTS = ("localhost", "127.0.0.1")


@functools.cache
def small_split(shape: tuple[int, int] = (12, 8)) -> Split:
    """A model of one layer, which nothing but the connection looks at."""
    layer = linear.prepare(np.random.default_rng(5).standard_normal(shape))
    groups = {"fc": GroupSpec("linear", {"fc": layer.spec.d_out})}
    bundle = OwnerBundle({"model_type": "bert"}, "BertModel", "float32", groups, {"fc": layer.spec}, {})
    return Split({"fc": layer}, bundle)


class Files:
    """The files that `privtuner certs` makes.

    Args:
        folder: where they go.
        hosts: that the server's certificate is for.
    """

    def __init__(self, folder: Path, hosts: tuple[str, ...] = HOSTS) -> None:
        authority = Authority(folder)
        self.ca = authority.certificate
        self.server = authority.issue_server(hosts, 1)
        self.clients = {name: authority.issue_client(name, 1) for name in ("alice", "bob")}

    def serving(self, *, client_ca: Path | None = None) -> ServerCredentials:
        return ServerCredentials(*self.server, client_ca)

    def owning(self, name: str | None = None) -> ClientCredentials:
        return ClientCredentials(self.ca, *(self.clients[name] if name else ()))


@functools.cache
def files() -> Files:
    """Those that both ends are told of."""
    return Files(_folder())


@functools.cache
def files_of_another() -> Files:
    """Of an authority that nobody was told to trust, for the same names."""
    return Files(_folder())


def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="privtuner-test-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
