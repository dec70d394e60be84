"""A host of layers: each is answered by the server of a scheme."""

import numpy as np
import pytest

from privtuner import linear, wire
from privtuner.cpu import CpuServer
from privtuner.errors import InputError, MessageError
from privtuner.openfhe import OpenFheServer
from privtuner.parties import LinearServer, rows_of
from privtuner.schemes import SCHEMES, Host

PREPARED = linear.prepare(np.random.default_rng(0).standard_normal((300, 5)))


def request(tokens=3):
    return linear.encrypt(np.ones((tokens, 5), np.float32), PREPARED.spec)[0]


def test_layers_are_answered_by_their_names():
    other = linear.prepare(np.ones((2, 5)))
    host = Host({"fc": PREPARED, "other": other})
    assert dict(host.layers) == {"fc": PREPARED, "other": other}
    asked = request()
    assert list(host.answer("fc", asked)) == list(linear.apply_blocks(PREPARED, asked))
    with pytest.raises(MessageError, match="meant for another layer"):
        list(host.answer("other", asked))


def test_layers_are_loaded_and_gathered_by_the_server():
    class Noting(CpuServer):
        def load(self, layers):
            return {"memory": len(list(layers))}

        def gather(self, prepared, parts):
            return b"gathered " + super().gather(prepared, parts)

    host = Host({"fc": PREPARED}, Noting())
    assert host.load() == {"memory": 1}
    assert host.gather("fc", iter([b"a", b"b"])) == b"gathered ab"


def test_a_layer_that_is_none_is_refused_before_its_request_is_received():
    def parts():
        raise AssertionError("asked for")
        yield b""

    host = Host({"fc": PREPARED})
    for ask in (lambda: host.gather("other", parts()), lambda: host.answer("other", b"")):
        with pytest.raises(InputError, match="no layer is called 'other'; fetch the bundle"):
            ask()


def test_the_defaults_of_a_server():
    class Least(LinearServer):
        scheme = "linear"

        def answer(self, prepared, request, block_bytes=0):
            return iter(())

    server = Least()
    server.close()
    assert (server.load([PREPARED]), server.gather(PREPARED, [b"a", b"b"])) == ({}, b"ab")


@pytest.mark.parametrize(("tokens", "rows"), [(1, 256), (1024, 256), (2048, 128), (4097, 63), (1 << 24, 1)])
def test_blocks_stay_near_the_size_asked_for(tokens, rows):
    assert rows_of(1 << 20, 4 * tokens) == rows


def test_requests_of_another_scheme_are_named():
    foreign = wire.seal(SCHEMES["openfhe"].request, [], tokens=3)
    with pytest.raises(
        MessageError, match="the scheme linear, the request carries openfhe: start it with 'privtuner se"
    ):
        Host({"fc": PREPARED}).answer("fc", foreign)
    with pytest.raises(MessageError, match="carries linear: .* train with --scheme openfhe"):
        Host({"fc": PREPARED}, OpenFheServer()).answer("fc", request())
    with pytest.raises(MessageError, match="expected a message of kind request, got tensor"):
        list(Host({"fc": PREPARED}).answer("fc", wire.seal("tensor", [], tokens=3)))
