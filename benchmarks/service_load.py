"""A server in a process of its own, as a model owner runs it, and data owners that keep it busy."""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers
import transformers

from privtuner import linear, nn
from privtuner.errors import PrivtunerError
from privtuner.service import ClientCredentials, RemoteTransport, Token
from privtuner.service.certificates import Authority
from privtuner.service.security import make_token, token_digest

MINILM = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
SMALL = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 128}


class Work(NamedTuple):
    """What an owner has one layer do in one direction."""

    layer: str
    direction: str
    x: np.ndarray


def model_folder(folder: Path, sizes: dict[str, int]) -> Path:
    """Write a random BERT to ``folder``: the values of weights change no time."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "word"]
    vocabulary = tokenizers.models.WordPiece({word: place for place, word in enumerate(words)}, unk_token="[UNK]")
    config = transformers.BertConfig(vocab_size=len(words), **sizes)
    transformers.BertModel(config).save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(vocabulary), pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(folder)
    return folder


def step_of(split: nn.Split, tokens: int) -> list[Work]:
    """Return what a training step of ``tokens`` asks of every layer: its product forward, and the one backward."""
    random = np.random.default_rng(0)
    forward = [
        Work(name, "forward", random.standard_normal((tokens, layer.spec.d_in)).astype(np.float32))
        for name, layer in split.server.items()
    ]
    backward = [
        Work(name, "backward", random.standard_normal((tokens, layer.spec.d_out)).astype(np.float32))
        for name, layer in reversed(split.server.items())
    ]
    return forward + backward


@dataclasses.dataclass(frozen=True)
class Served:
    """A server that runs.

    Attributes:
        address: HOST:PORT.
        metrics: HOST:PORT of its metrics.
        process: it.
        ca: of its certificate; None where the connection is in the clear.
        tokens: owner's name -> its token.
    """

    address: str
    metrics: str
    process: subprocess.Popen[str]
    ca: Path | None
    tokens: dict[str, str]

    def connect(self, name: str = "") -> RemoteTransport:
        """Open the connection of an owner, with its token if it has one."""
        credentials = None if self.ca is None else ClientCredentials(self.ca)
        token = self.tokens.get(name)
        return RemoteTransport(self.address, credentials, None if token is None else Token(token))

    def processor_seconds(self) -> float:
        """Time that all threads of the process have computed for."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")

    def memory(self) -> int:
        """Bytes that the process has in memory now."""
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def serving(model: Path, threads: int, names: Sequence[str] = (), *options: str, tls: bool = True) -> Iterator[Served]:
    """Run ``privtuner serve`` on a free port of this machine until the block ends.

    Args:
        model: folder of the model.
        threads: of the server.
        names: owners that get a token each, and are served alone; everybody is, where there are none.
        options: more of them.
        tls: encrypt the connection.
    """
    with tempfile.TemporaryDirectory() as folder:
        line = [sys.executable, "-m", "privtuner", "serve", "--model", str(model), "--port", "0", "--ready-json"]
        line += ["--threads", str(threads), "--metrics", "127.0.0.1:0", *options]
        ca = None
        if tls:
            authority = Authority(Path(folder) / "certificates")
            certificate, key = authority.issue_server(("127.0.0.1",), 1)
            ca, line = authority.certificate, [*line, "--certificate", str(certificate), "--key", str(key)]
        tokens = {name: make_token() for name in names}
        if names:
            entries = {name: {"token_sha256": [token_digest(token)]} for name, token in tokens.items()}
            tenants = Path(folder) / "tenants.json"
            tenants.write_text(json.dumps({"tenants": entries}))
            line += ["--tenants", str(tenants)]
        process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        try:
            assert process.stdout is not None
            ready = json.loads(process.stdout.readline())
            yield Served(ready["address"], ready["metrics"], process, ca, tokens)
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(20)
            process.kill()
            process.communicate()


class Replay(NamedTuple):
    """A request that is sent again and again, and how long an owner's own part of it takes."""

    layer: str
    request: bytes
    tokens: int
    owner_seconds: float


def replays(split: nn.Split, work: Sequence[Work], rounds: int = 3) -> list[Replay]:
    """Encrypt ``work`` once, and take the time of encryption and decryption: the median of ``rounds``."""
    made = []
    for layer, direction, x in work:
        seconds = []
        for _ in range(rounds):
            start = time.perf_counter()
            request, secret = linear.encrypt(x, split.bundle.specs[layer], direction=direction)
            encrypted = time.perf_counter()
            reply = linear.apply(split.server[layer], request)
            applied = time.perf_counter()
            linear.decrypt(reply, secret)
            seconds.append(encrypted - start + time.perf_counter() - applied)
        made.append(Replay(layer, bytes(request), len(x), statistics.median(seconds)))
    return made


class Load:
    """Owners that work at once, each on a connection of its own, from a thread each.

    The requests are encrypted beforehand, and the replies are not read: owners have machines of their own, and here
    they would take the server's processors. In place of that they pause.

    Attributes:
        rows: of answered requests, all owners' together.
        errors: what ended owners.
    """

    def __init__(self, served: Served, names: Sequence[str], requests: Sequence[Replay], *, pause: bool) -> None:
        self._served, self._requests, self._pause = served, requests, pause
        self._end, self._lock = threading.Event(), threading.Lock()
        self._threads = [threading.Thread(target=self._run, args=(name,), daemon=True) for name in names]
        self.rows, self.errors = 0, list[str]()

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join()

    def _run(self, name: str) -> None:
        try:
            with self._served.connect(name) as transport:
                while not self._end.is_set():
                    self._step(transport)
        except PrivtunerError as error:
            with self._lock:
                self.errors.append(str(error))

    def _step(self, transport: RemoteTransport) -> None:
        for layer, request, tokens, owner_seconds in self._requests:
            if self._pause and self._end.wait(owner_seconds):
                return
            for _ in transport.apply(layer, request):
                pass
            if self._end.is_set():
                return
            with self._lock:
                self.rows += tokens
