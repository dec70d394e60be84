"""Text and JSON of the other side: what is shown, what is read, what is refused."""

from __future__ import annotations

import json
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from privtuner.errors import MessageError
from privtuner.foreign import foreign_entry, foreign_json, foreign_text


@given(st.text())
def test_text_is_printable_short_and_on_one_line(text):
    shown = foreign_text(text, 50)
    assert shown.isprintable()
    assert len(shown) <= 50
    if text.isprintable() and len(text) <= 50:
        assert shown == text


@pytest.mark.parametrize("evil", ["\x1b[2J", "\x1b]0;owned\x07", "a\rb", "a\nb", "\u202eevil", "\x9b31m", "\ud800"])
def test_nothing_reaches_the_terminal(evil):
    shown = foreign_text(f"of tiny{evil}!")
    assert shown.startswith("of tiny")
    assert shown.endswith("!")
    assert not any(char in shown for char in "\x1b\x07\r\n\u202e\x9b\ud800")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(st.text(max_size=5), json_values, max_size=3))
def test_json_is_read_as_it_is(entries):
    assert foreign_json(json.dumps(entries).encode(), "it") == entries


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data):
    with suppress(MessageError):
        assert isinstance(foreign_json(data, "it"), dict)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no JSON"),
        (b"{", "no JSON"),
        (b"\xff", "no JSON"),
        (json.dumps({"a": 1}).encode("utf-16"), "no JSON"),
        (b"[1]", "a list instead of an object"),
        (b"5", "an? int instead of an object"),
        (b"[" * 200_000, "no JSON"),
        (b'{"a":' * 16 + b"1" + b"}" * 16, "nested deeper than 16"),
        (b'{"a": 1e999}', "no JSON"),
        (b'{"a": NaN}', "no JSON"),
        (b'{"a": -Infinity}', "no JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "no JSON"),
        (b'{"a": 18446744073709551616}', "no JSON"),
        (b'{"a": 1, "a": 2}', "no JSON"),
        (b'{"a": "' + b"x" * 1000 + b'"}', "at most 1000 are read"),
    ],
)
def test_json_that_is_refused(data, reason):
    with pytest.raises(MessageError, match=f"^it: .*{reason}"):
        foreign_json(data, "it", 1000 if b"x" in data else 1 << 20)


def test_entries_have_their_types():
    entries = {"text": "a", "number": 5, "truth": True, "negative": -1, "half": 0.5}
    assert foreign_entry(entries, "text", str, "it") == "a"
    assert foreign_entry(entries, "number", int, "it") == 5
    assert foreign_entry(entries, "number", float, "it") == 5.0
    for name, kind in (
        ("text", int),
        ("truth", int),
        ("number", bool),
        ("negative", int),
        ("half", int),
        ("absent", str),
    ):
        with pytest.raises(MessageError, match=f"its entry {name} is missing or not as it should be"):
            foreign_entry(entries, name, kind, "it")
