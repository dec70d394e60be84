from privtuner._core import _Buffer

VERSION: int
HEAD_BYTES: int
KINDS: tuple[str, ...]
DIRECTIONS: tuple[str, ...]

_Fields = tuple[str, str, int, bytes, bytes, int, int, int]

def peek(data: _Buffer) -> _Fields: ...
def seal(
    kind: str,
    parts: list[object],
    direction: str,
    parameters: int,
    subject: bytes,
    request: bytes,
    tokens: int,
    features: int,
) -> bytes: ...
def open(kind: str, data: _Buffer) -> _Fields: ...  # noqa: A001
