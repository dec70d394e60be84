"""OpenFHE's generator is state of the process: children of fork draw random numbers of their own."""

import multiprocessing
import os
import pickle
import select
import signal
import threading

import numpy as np
import pytest

from evaluators import NEEDS_OPENFHE
from privtuner import ckks, openfhe
from privtuner.errors import EngineError, InputError
from privtuner.openfhe import library

pytestmark = [
    NEEDS_OPENFHE,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning"),
]

SECONDS = 60  # a child that takes longer hangs


@pytest.fixture(scope="module")
def context():
    return openfhe.Context.INSECURE(ckks.Parameters.INSECURE(2))


@pytest.fixture(scope="module")
def secret(context):
    return openfhe.SecretKey(context)


@pytest.fixture(params=[1, 3])
def threads(request):
    before = openfhe.num_threads()
    openfhe.set_num_threads(request.param)
    yield request.param
    openfhe.set_num_threads(before)


class Child:
    """A child process that sends back what ``work`` returns, or the exception it raises."""

    def __init__(self, work):
        reader, writer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.close(reader)
                try:
                    result = work()
                except Exception as error:
                    result = error
                with os.fdopen(writer, "wb") as pipe:
                    pickle.dump(result, pipe)
            finally:
                os._exit(0)
        os.close(writer)
        self.pipe = os.fdopen(reader, "rb")

    def result(self):
        try:
            if not select.select([self.pipe], [], [], SECONDS)[0]:
                os.kill(self.pid, signal.SIGKILL)
                pytest.fail("the child hangs")
            with self.pipe:
                return pickle.load(self.pipe)
        finally:
            os.waitpid(self.pid, 0)


def drawn(context, secret):
    """One of everything that OpenFHE's generator makes."""
    values = np.linspace(-1, 1, 6 * 3).reshape(6, 3)
    own = openfhe.SecretKey(context)
    tensor = secret.encrypt(values)
    keys = secret.evaluation_keys(rotations=[1], relinearisation=True)
    return {
        "secret key": own.to_bytes(),
        "public key": own.public_key().to_bytes(),
        "ciphertext": tensor.to_bytes(),
        # c1 of a fresh ciphertext is a; with the same a, c0 - c0' is the difference of the messages
        "a": tensor._core.residues(0, 1, 0, context.ring_dimension).tobytes(),
        "by the public key": secret.public_key().encrypt(values).to_bytes(),
        "relinearisation": keys.to_bytes()[0],
        "rotation": keys.to_bytes()[1],
    }


def assert_all_different(results):
    assert len(results) > 1
    for what in results[0]:
        assert len({result[what] for result in results}) == len(results), what


def test_parent_children_and_grandchildren_draw_their_own(context, secret, threads):
    drawn(context, secret)  # a generator is there and in use

    def work():
        grandchild = Child(lambda: [drawn(context, secret)])
        return [drawn(context, secret), drawn(context, secret), *grandchild.result()]

    children = [Child(work) for _ in range(2)]
    results = [drawn(context, secret)]
    for child in children:
        results += child.result()
    assert len(results) == 7
    assert_all_different(results)


def test_noise_of_decryptions_is_each_processs_own(context, secret):
    tensor = secret.encrypt(np.full((context.slots, 1), 0.25))
    work = lambda: {"decryption": secret.decrypt(tensor).tobytes()}  # noqa: E731
    children = [Child(work) for _ in range(2)]
    assert_all_different([work(), *(child.result() for child in children)])


def test_a_fork_in_a_thread(context, secret, threads):
    results = []

    def work():
        drawn(context, secret)
        child = Child(lambda: drawn(context, secret))
        results.append(drawn(context, secret))
        results.append(child.result())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert_all_different([*results, drawn(context, secret)])


def _send_drawn(context, secret, connection):
    connection.send(drawn(context, secret))


def test_workers_of_multiprocessing(context, secret):
    fork = multiprocessing.get_context("fork")
    drawn(context, secret)
    pairs = [fork.Pipe(duplex=False) for _ in range(2)]
    workers = [fork.Process(target=_send_drawn, args=(context, secret, writer)) for _, writer in pairs]
    for worker in workers:
        worker.start()
    results = [reader.recv() if reader.poll(SECONDS) else pytest.fail("the worker hangs") for reader, _ in pairs]
    for worker in workers:
        worker.join()
    assert_all_different([*results, drawn(context, secret)])


def test_what_children_encrypt_is_right(context, secret):
    values = np.linspace(-1, 1, 6 * 3).reshape(6, 3)
    engine = openfhe.Evaluator(context)

    def work():
        openfhe.SecretKey(context)
        tensor = secret.encrypt(values)
        return secret.decrypt(engine.add(tensor, tensor))

    np.testing.assert_allclose(Child(work).result(), 2 * values, atol=1e-6)


def test_children_keep_to_one_thread(threads):
    def work():
        openfhe.set_num_threads(1)
        with pytest.raises(InputError, match="num_threads is 2; a child of fork computes on one thread"):
            openfhe.set_num_threads(2)
        return openfhe.num_threads()

    assert Child(work).result() == 1


def test_a_fork_while_another_thread_computes_is_refused_there_and_harms_nobody(context, secret):
    """Tables may be half changed and their lock held for ever: the child says so instead of waiting."""
    stop = threading.Event()
    keys = secret.evaluation_keys()
    engine = openfhe.Evaluator(context, keys)
    x = secret.encrypt(np.full((context.slots, 1), 0.5))

    def compute():
        while not stop.is_set():
            library.library().multiply(x._core, x._core, keys._core, 50)

    def work():
        outcomes = []
        for use in (
            lambda: secret.encrypt([0.5]),
            lambda: secret.decrypt(x),
            lambda: openfhe.SecretKey(context),
            lambda: secret.evaluation_keys(),
            lambda: engine.add(x, x),
            lambda: openfhe.Context.INSECURE(ckks.Parameters.INSECURE(4)),
        ):
            try:
                use()
                outcomes.append("")
            except EngineError as error:
                outcomes.append(str(error))
        return outcomes

    thread = threading.Thread(target=compute)
    thread.start()
    try:
        for _ in range(100):  # nearly every time
            outcomes = Child(work).result()
            assert len(set(outcomes)) == 1
            if outcomes[0]:
                break
    finally:
        stop.set()
        thread.join()
    assert "forked while another thread used OpenFHE" in outcomes[0]
    assert "spawn" in outcomes[0]
    np.testing.assert_allclose(secret.decrypt(engine.add(x, x)), 1.0, atol=1e-6)
    assert Child(lambda: secret.decrypt(x).shape).result() == (context.slots, 1)
