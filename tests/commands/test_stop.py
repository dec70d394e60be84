"""Signals that end a command: raised while nothing is to be lost, only noted after that, the second one at once."""

# ruff: noqa: PT012 - a signal may come anywhere in a block

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from privtuner.commands import stop
from privtuner.commands.stop import SIGNALS, Stop, Stopped
from privtuner.errors import ServiceError
from text_cases import environment


def kill(number):
    os.kill(os.getpid(), number)
    time.sleep(0)  # where the interpreter looks for signals


def until(true):
    """Wait for another thread."""
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.fixture(autouse=True)
def _handlers_stay():
    before = [signal.getsignal(number) for number in SIGNALS]
    yield
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1
    assert not any(thread.name == "privtuner-signals" for thread in threading.enumerate())


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_signal_ends_what_has_nothing_to_lose(number, status):
    with pytest.raises(Stopped) as caught, Stop():
        kill(number)
        raise AssertionError("not reached")
    assert caught.value.status == status
    assert isinstance(caught.value, KeyboardInterrupt)


def test_signal_is_noted_where_an_exception_would_do_harm():
    done = []
    with pytest.raises(Stopped) as caught, Stop() as stopping, stopping.defer():
        stopping.check()
        kill(signal.SIGTERM)
        done.append("all of it")
        with pytest.raises(Stopped):
            stopping.check()
        done.append("up to its end")
    assert done == ["all of it", "up to its end"]
    assert caught.value.status == 143


def test_signal_that_was_swallowed_shows_at_the_next_stage():
    with Stop() as stopping:
        with contextlib.suppress(BaseException):  # as an import that tries something may do
            kill(signal.SIGINT)
        with pytest.raises(Stopped), stopping.defer():
            raise AssertionError("not reached")


def test_error_that_follows_from_a_signal_is_none():
    with pytest.raises(Stopped) as caught, Stop() as stopping, stopping.defer():
        kill(signal.SIGINT)
        raise ServiceError("the connection was closed")
    assert isinstance(caught.value.__cause__, ServiceError)
    with pytest.raises(ZeroDivisionError), Stop() as stopping, stopping.defer():
        kill(signal.SIGINT)
        _ = 1 / 0
    with pytest.raises(ServiceError), Stop() as stopping, stopping.defer():
        raise ServiceError("nobody there")


def test_those_who_wait_are_called_back_in_another_thread():
    called = []
    with pytest.raises(Stopped), Stop() as stopping, stopping.defer():
        with stopping.on_stop(lambda: called.append("left")):
            pass
        with stopping.on_stop(lambda: called.append(threading.current_thread())):
            kill(signal.SIGINT)
            until(lambda: called)
    assert called != [threading.main_thread()]
    assert len(called) == 1


def test_callback_after_the_signal_is_not_waited_for():
    with pytest.raises(Stopped), Stop() as stopping, stopping.defer():
        kill(signal.SIGINT)
        with stopping.on_stop(lambda: None):
            raise AssertionError("not reached")


def test_wait_ends_with_the_signal():
    with pytest.raises(Stopped), Stop() as stopping, stopping.defer():
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGHUP)).start()
        stopping.wait()


def test_one_press_may_arrive_twice(monkeypatch):
    monkeypatch.setattr(stop, "ONE_PRESS_SECONDS", 60)
    with pytest.raises(Stopped) as caught, Stop() as stopping, stopping.defer():
        kill(signal.SIGTERM)
        kill(signal.SIGHUP)
    assert caught.value.status == 143


def test_thread_takes_no_signals():
    seen = []

    def work():
        with Stop() as stopping, stopping.defer():
            seen.append([signal.getsignal(number) for number in SIGNALS])
            stopping.check()

    before = [signal.getsignal(number) for number in SIGNALS]
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


def test_nohup_is_heard():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Stop() as stopping:
            kill(signal.SIGHUP)
            stopping.check()
    finally:
        signal.signal(signal.SIGHUP, before)


PROGRAM = """
    import os, signal, sys, time
    from privtuner.commands.stop import Stop, Stopped
    kill = lambda number: os.kill(os.getpid(), number)
    {body}
    print("alive", flush=True)
"""


def ended(body):
    program = textwrap.dedent(PROGRAM).replace("{body}", textwrap.dedent(body))
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment(), timeout=60
    )


@pytest.mark.parametrize(("number", "status"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_second_signal_ends_at_once(number, status):
    # The main thread is in a native call all the while and looks at no signal.
    done = ended(f"""
        import hashlib, threading
        def presses():
            for number in (signal.SIGINT, *[signal.{number}] * 99):
                kill(number)
                time.sleep(0.5)
        with Stop() as stop, stop.defer():
            threading.Thread(target=presses, daemon=True).start()
            hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
    """)
    assert (done.returncode, done.stdout, done.stderr) == (status, "", "")


def test_later_signals_of_a_process_of_our_own_end_it_silently():
    done = ended("""
        try:
            with Stop(own_process=True): kill(signal.SIGINT)
        except Stopped: pass
        kill(signal.SIGINT)
        time.sleep(30)
    """)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")
