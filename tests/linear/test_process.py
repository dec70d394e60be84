"""The compiled core in its process: threads, the interpreter lock, forks, instruction sets, environment variables."""

import os
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import privtuner
from linear_cases import DIRECTIONS, batch, check_exchange, check_result, features_in, layer
from privtuner import _core, linear, system
from privtuner.errors import EngineError, InputError

SUPPORT = Path(__file__).parents[1] / "support"
PATHS = {path["name"]: path for path in _core.isa_paths()}


def run(code, **environment):
    """Run Python code in a new process that imports the same package, with the helpers of the tests."""
    paths = [str(Path(privtuner.__file__).parents[1]), str(SUPPORT)]
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def threads():
    before = system.get_num_threads()
    yield system.set_num_threads
    system.set_num_threads(before)


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_thread_counts(threads, count):
    threads(count)
    assert system.get_num_threads() == count
    for direction in DIRECTIONS:
        prepared = layer(70, 90)
        check_exchange(prepared, batch(100, features_in(prepared, direction)), direction)


def test_replies_do_not_depend_on_the_number_of_threads(threads):
    prepared = layer(70, 90)
    request, _ = linear.encrypt(batch(100, 90), prepared.spec)
    replies = set()
    for count in (1, 2, 5):
        threads(count)
        replies.add(linear.apply(prepared, request))
    assert len(replies) == 1


@pytest.mark.parametrize("count", [0, -1, 1025])
def test_thread_counts_out_of_range(count):
    with pytest.raises(InputError, match=rf"n = {count}: the number of threads must be in \[1, 1024\]"):
        system.set_num_threads(count)


def test_four_threads_at_once():
    layers = [layer(100, 60, seed=seed) for seed in range(2)]
    masks = linear.MaskCache()

    def work(number):
        prepared, direction = layers[number % 2], DIRECTIONS[number // 2 % 2]
        for seed in range(5):
            x = batch(30, features_in(prepared, direction), 100 * number + seed)
            request, secret = linear.encrypt(x, prepared.spec, direction, masks)
            blocks = linear.apply_blocks(prepared, request, 32)
            check_result(prepared, x, linear.decrypt(blocks, secret), direction)

    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(work, number) for number in range(4)]:
            future.result()
    assert masks.bytes == 2 * (100 + 60) * 8192


@pytest.mark.parametrize("step", ["prepare", "encrypt", "apply", "decrypt"])
def test_the_interpreter_runs_on_meanwhile(step):
    prepared = layer(700, 700)
    x = batch(700, 700)
    request, secret = linear.encrypt(x, prepared.spec)
    reply = linear.apply(prepared, request)
    core = linear._core
    integers, delta = np.ones((3000, 3000), np.int8), np.ones(3000)
    actions = {
        "prepare": lambda: core.QuantisedWeight("linear-w8", bytes(16), integers, delta),
        "encrypt": lambda: core.encrypt(prepared.spec._core, "forward", x, None),
        "apply": lambda: core.Job(prepared._core, request).rows(0, 700),
        "decrypt": lambda: core.Decryption(secret).feed(reply),
    }
    begin, end = threading.Event(), threading.Event()
    threads = system.get_num_threads()

    def work():
        begin.set()
        actions[step]()
        end.set()

    interval = sys.getswitchinterval()
    thread = threading.Thread(target=work)
    turns = 0
    try:
        system.set_num_threads(1)  # longer at work, and a processor is left for this thread
        sys.setswitchinterval(30)  # nobody is made to let go of the lock: who has it keeps it until it releases it
        thread.start()
        begin.wait()
        while not end.wait(0.0002):
            turns += 1
        thread.join()
    finally:
        sys.setswitchinterval(interval)
        system.set_num_threads(threads)
    assert turns >= 1  # none if the lock had been kept: `end` would be set before this thread ran again


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_forks_after_use():
    result = run(
        """
        import os
        from linear_cases import DIRECTIONS, batch, check_exchange, check_result, features_in, layer
        from privtuner import linear
        prepared, masks = layer(100, 60), linear.MaskCache()
        x = batch(50, 60)
        check_exchange(prepared, x, masks=masks)
        request, secret = linear.encrypt(x, prepared.spec, masks=masks)
        child = os.fork()
        for direction in DIRECTIONS:
            check_exchange(prepared, batch(50, features_in(prepared, direction)), direction, masks)
        check_result(prepared, x, linear.decrypt(linear.apply(prepared, request), secret), "forward")
        fresh = linear.encrypt(x, prepared.spec, masks=masks)[0]
        if child == 0:
            print("child", fresh[32:48].hex(), fresh[112:144].hex(), flush=True)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        print("parent", fresh[32:48].hex(), fresh[112:144].hex())
        """,
        PRIVTUNER_NUM_THREADS="3",
    )
    assert result.returncode == 0, result.stderr
    lines = {line.split()[0]: line.split()[1:] for line in result.stdout.splitlines()}
    # Randomness after the fork is each process's own.
    assert lines["child"][0] != lines["parent"][0]
    assert lines["child"][1] != lines["parent"][1]


EXCHANGE = """
import privtuner
from linear_cases import DIRECTIONS, PRESETS, batch, check_exchange, features_in, layer
for preset in PRESETS:
    prepared = layer(70, 50, preset)
    for direction in DIRECTIONS:
        check_exchange(prepared, batch(30, features_in(prepared, direction)), direction)
print(privtuner.system.active_isa())
"""


@pytest.mark.parametrize("name", PATHS)
def test_an_instruction_set_can_be_forced(name):
    result = run(EXCHANGE, PRIVTUNER_ISA=name)
    if PATHS[name]["usable"]:
        assert (result.returncode, result.stdout) == (0, f"{name}\n"), result.stderr
    else:
        assert result.returncode != 0
        assert f"PRIVTUNER_ISA={name} cannot be used: {PATHS[name]['obstacle']}; unset it" in result.stderr


def test_an_unknown_instruction_set_is_refused():
    result = run(EXCHANGE, PRIVTUNER_ISA="sse9")
    assert result.returncode != 0
    choices = "portable, avx2, avx512, avx512ifma or amx"
    assert f'PRIVTUNER_ISA: unknown instruction-set path "sse9"; choose {choices}' in result.stderr
    result = run("import privtuner; privtuner.system.active_isa()", PRIVTUNER_ISA="sse9")
    assert "privtuner.errors.EngineError" in result.stderr


def test_the_best_instruction_set_is_the_default():
    usable = [name for name, path in PATHS.items() if path["usable"]]
    result = run("import privtuner; print(privtuner.system.active_isa())", PRIVTUNER_ISA="")
    assert result.stdout.strip() == usable[-1]


def test_set_isa():
    before = system.active_isa()
    try:
        for name, path in PATHS.items():
            if path["usable"]:
                system.set_isa(name)
                assert system.active_isa() == name
            else:
                with pytest.raises(EngineError, match=f"'{name}' cannot be used here: {path['obstacle']}"):
                    system.set_isa(name)
        with pytest.raises(InputError, match="unknown instruction-set path 'sse9': choose one of portable, avx2"):
            system.set_isa("sse9")
    finally:
        system.set_isa(before)


def test_paths_agree_on_one_request():
    prepared = layer(70, 50)
    request, _ = linear.encrypt(batch(30, 50), prepared.spec)
    before, replies = system.active_isa(), set()
    try:
        for name, path in PATHS.items():
            if path["usable"]:
                system.set_isa(name)
                replies.add(linear.apply(prepared, request))
    finally:
        system.set_isa(before)
    assert len(replies) == 1


def test_num_threads_from_the_environment():
    code = """
    import os
    import privtuner
    for bad in ("0", "-1", "1025", "abc", "2.5", "1e3", "3 ", " ", "0x10", "9" * 30):
        os.environ["PRIVTUNER_NUM_THREADS"] = bad
        try:
            privtuner.system.get_num_threads()
        except privtuner.errors.EngineError as error:
            want = f'PRIVTUNER_NUM_THREADS is "{bad}"; set a whole number from 1 to 1024 or unset it'
            assert str(error) == want, error
        else:
            raise SystemExit(f"{bad!r} was accepted")
    os.environ["PRIVTUNER_NUM_THREADS"] = "3"
    print(privtuner.system.get_num_threads())
    """
    result = run(code)
    assert (result.returncode, result.stdout) == (0, "3\n"), result.stdout + result.stderr


@pytest.mark.parametrize(("text", "count"), [("1", 1), ("1024", 1024), ("", None)])
def test_num_threads_at_the_limits(text, count):
    result = run("import privtuner; print(privtuner.system.get_num_threads())", PRIVTUNER_NUM_THREADS=text)
    assert int(result.stdout) == (count or len(os.sched_getaffinity(0))), result.stderr
