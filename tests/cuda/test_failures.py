"""A device that fails at one call, any: nothing secret is left, page-locked memory comes back, what follows works."""

import gc

import pytest

import linear_cases as cases
from cuda_arrays import host
from cuda_counts import CountingDevice
from privtuner import linear
from privtuner.cuda import linear as kernels
from privtuner.errors import EngineError

SEED, MASK = bytes(range(32)), bytes(range(100, 132))
SECRETS = {"a batch", "a decrypted reply", "errors", "prepared factors", "products with secrets", "scales", "secrets"}


class FailingDevice(CountingDevice):
    """Fails once, at the call where ``left`` gets to 0; its arrays hold zeros until they are written to."""

    def __init__(self):
        super().__init__()
        self.left, self.taken = 0, []
        for name in ("launch", "empty", "upload", "download", "page_locked", "copy_in", "copy_out"):
            setattr(self, name, self._failing(getattr(self, name)))

    def _failing(self, call):
        def failing(*arguments, **options):
            self.left -= 1
            if self.left == 0:
                raise EngineError(f"{call.__name__} fails")
            result = call(*arguments, **options)
            if call.__name__ == "empty":
                result.fill(0)
                self.taken.append((result, (*arguments, "")[2]))
            return result

        return failing

    def traces(self):
        """What is secret and not zero."""
        return [what for array, what in self.taken if host(array).any() and what in SECRETS] + [
            "the seed" for array, _ in self.taken if host(array).tobytes() == SEED
        ]


def encrypting(device, prepared, x, masks):
    return lambda: kernels.encrypt(device, x, prepared.spec, masks=masks, seed=SEED), None


def encrypting_words(device, prepared, x, masks):
    x = device.upload(x)
    return lambda: kernels.encrypt_words(device, x, prepared.spec, mask_seed=MASK, seed=SEED), None


def decrypting(device, prepared, x, masks):
    request, secret = kernels.encrypt(device, x, prepared.spec, masks=masks, seed=SEED)
    reply = b"".join(linear.apply_blocks(prepared, request, block_rows=32))
    return lambda: kernels.decrypt(reply, secret), secret


def decrypting_there(device, prepared, x, masks):
    request, secret = kernels.encrypt(device, x, prepared.spec, masks=masks, seed=SEED)
    blocks = list(linear.apply_blocks(prepared, request, block_rows=32))
    return lambda: kernels.decrypt(blocks, secret, on_device=True), secret


@pytest.fixture
def quick_collections():
    """What was there before is not walked again at each of many collections."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("quick_collections")
@pytest.mark.parametrize("work", [encrypting, encrypting_words, decrypting, decrypting_there])
@pytest.mark.parametrize("masked", ["no cache", "known", "new"])
def test_a_failure_at_any_call_leaves_no_secret_and_lends_no_memory(work, masked):
    device, prepared, x = FailingDevice(), cases.layer(40, 11), cases.batch(3, 11)
    known = linear.MaskCache()
    decrypting(device, prepared, x, known)[0]()
    failures, at, reached = 0, 0, True
    while reached:
        at += 1
        masks = {"no cache": None, "known": known, "new": linear.MaskCache()}[masked]
        device.taken = []
        run, secret = work(device, prepared, x, masks)
        device.left = at
        error = None
        try:
            run()
        except EngineError as raised:
            error = raised  # held, and with it every frame that it went through
            failures += 1
        if error is not None and (secret is None or secret.used):  # else its decryption has not begun
            assert device.traces() == [], (at, str(error))
        reached, device.left, device.taken, run, error = device.left <= 0, 0, [], None, None
        gc.collect()
        assert device.lent == 0, at
    assert failures > 10
    request, secret = kernels.encrypt(device, x, prepared.spec, masks=known)
    cases.check_result(prepared, x, kernels.decrypt(linear.apply(prepared, request), secret), "forward")
