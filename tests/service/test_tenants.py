"""The file of tenants: what it may hold, and how tokens get into it."""

import json
import stat

import pytest

from loops import each
from privtuner.errors import InputError
from privtuner.service import Tenants
from privtuner.service.tenants import add_token

ONE, TWO = "1" * 64, "2" * 64


@pytest.fixture
def path(tmp_path):
    return tmp_path / "tenants.json"


@each(
    ("content", "reason"),
    [
        ("", "is empty"),
        ("{", "is no file of tenants: Expecting"),
        ("[" * 100_000, "is no file of tenants: maximum recursion"),
        ("[]", "the file is no object of JSON"),
        ("{}", "names no tenants; add one with 'privtuner token NAME'"),
        ('{"tenants": []}', "names no tenants"),
        ('{"tenants": {}, "token": 1}', "the file has no entry 'token'; known are tenants, default"),
        ('{"tenants": {}, "default": {"token_sha256": "a"}}', "default has no entry 'token_sha256'; known are quota"),
        ('{"tenants": {"a b": {}}}', "tenant 'a b' is not made of up to 64 letters"),
        ('{"tenants": {"": {}}}', "tenant '' is not made of"),
        (json.dumps({"tenants": {"a" * 65: {}}}), "tenant 'a+' is not made of"),
        ('{"tenants": {"a": 1}}', "a is no object of JSON"),
        ('{"tenants": {"a": {"tokens": []}}}', "a has no entry 'tokens'"),
        ('{"tenants": {"a": {}}}', "a has neither token_sha256 nor certificate"),
        ('{"tenants": {"a": {"token_sha256": "secret"}}}', "token_sha256 of a is not 64 small hexadecimal digits"),
        (json.dumps({"tenants": {"a": {"token_sha256": ["A" * 64]}}}), "token_sha256 of a is not 64 small"),
        ('{"tenants": {"a": {"certificate": [1]}}}', "certificate of a is not a name"),
        (json.dumps({"tenants": {name: {"token_sha256": ONE} for name in "ab"}}), "a and b share a token_sha256"),
        (json.dumps({"tenants": {name: {"certificate": "c"} for name in "ab"}}), "a and b share a certificate"),
        ('{"tenants": {"a": {"certificate": "b"}, "a": {"certificate": "c"}}}', "'a' stands there twice"),
    ],
)
def test_file_of_another_form(content, reason, path):
    path.write_text(content)
    with pytest.raises(InputError, match=reason) as caught:
        Tenants(path)
    # Somebody may have written the token itself.
    assert "secret" not in str(caught.value)


def test_file_that_is_not_there(path):
    with pytest.raises(InputError, match="tenants.json cannot be read"):
        Tenants(path)


def test_tokens_are_added_and_the_rest_stays(path):
    assert add_token(path, "alice", ONE) == 1
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    content = json.loads(path.read_text())
    assert content == {"tenants": {"alice": {"token_sha256": [ONE]}}}
    content["default"] = {"quota": {"requests": 5}}
    content["tenants"]["bob"] = {"certificate": "bob", "token_sha256": TWO}
    path.write_text(json.dumps(content))
    path.chmod(0o640)
    assert add_token(path, "bob", "3" * 64) == 2
    assert json.loads(path.read_text()) == {
        "tenants": {
            "alice": {"token_sha256": [ONE]},
            "bob": {"certificate": "bob", "token_sha256": [TWO, "3" * 64]},
        },
        "default": {"quota": {"requests": 5}},
    }
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    Tenants(path)


def test_nothing_is_added_to_what_cannot_be_read(path):
    for content in ("{", '{"tenants": {"a": {}}}'):
        path.write_text(content)
        with pytest.raises(InputError):
            add_token(path, "alice", ONE)
        assert path.read_text() == content


def test_name_that_is_none(path):
    with pytest.raises(InputError, match=r"the name '\.\./alice' is not made of"):
        add_token(path, "../alice", ONE)
    assert not path.exists()
