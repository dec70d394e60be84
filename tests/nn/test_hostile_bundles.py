"""Bundles that would make an owner ask a hub, wait, take memory, or show what its terminal obeys."""

from __future__ import annotations

import dataclasses
import json
import socket
import time
from contextlib import suppress
from typing import Any

import huggingface_hub
import pytest
import torch

from nn_cases import tiny_bert
from privtuner.errors import InputError, MessageError
from privtuner.nn import LocalTransport, OwnerBundle, Session, Split, build, build_embeddings, split
from privtuner.nn.bundle import describing_entries
from privtuner.nn.configuration import at_most_modules, configuration_of, offline

VOCABULARY = "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "world"]).encode()
ASKING = ("upernet", "dpt", "mask2former", "vitmatte", "depth_anything", "zoedepth")


@pytest.fixture(scope="module")
def parts() -> Split:
    return split(tiny_bert(), files={"vocab.txt": VOCABULARY})


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a hub is asked for, though the process is not told to stay offline."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    found: list[str] = []

    def resolve(host: Any, *_: Any, **__: Any) -> Any:
        found.append(str(host))
        raise OSError("no network in tests")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    return found


def made(parts: Split, **config: Any) -> Any:
    bundle = dataclasses.replace(parts.bundle, config={**parts.bundle.config, **config})
    return build(OwnerBundle.from_files(bundle.to_files()), Session(LocalTransport(parts.server)))


@pytest.mark.parametrize("kind", ASKING)
def test_no_configuration_asks_a_hub(parts: Split, asked: list[str], kind: str) -> None:
    hostile = {"model_type": kind, "backbone": "attacker/beacon", "use_pretrained_backbone": True}
    with pytest.raises(InputError, match=f"model of type {kind} is not known"):
        made(parts, **hostile)
    with suppress(InputError):  # some take it, and do not ask either
        configuration_of({**hostile, "use_timm_backbone": False}, any_type=True)
    bundle = dataclasses.replace(parts.bundle, config=hostile)
    for use in (bundle.tokenizer, lambda: build_embeddings(bundle)):
        with suppress(InputError):
            use()
    assert asked == []


def test_the_hub_is_asked_without_that(asked: list[str]) -> None:
    """The check above can fail."""
    with pytest.raises(Exception, match="."):
        huggingface_hub.HfApi().repo_info("attacker/beacon")
    assert asked
    seen = len(asked)
    with offline(), pytest.raises(Exception, match="offline"):
        huggingface_hub.HfApi().repo_info("attacker/beacon")
    assert len(asked) == seen
    assert huggingface_hub.constants.HF_HUB_OFFLINE is False


def test_entries_that_no_class_defines_are_left_out(parts: Split) -> None:
    entries = {**parts.bundle.config, "backbone": "attacker/beacon", "secret_switch": 1, "attn": "x"}
    config = configuration_of(entries)
    assert not any(hasattr(config, name) for name in ("backbone", "secret_switch", "attn"))
    assert config.hidden_size == 32


def test_entries_that_run_something_are_left_out_at_every_depth() -> None:
    evil = {"auto_map": {"AutoModel": "code.Model"}, "_attn_implementation": "someone/kernels", "kept": 1}
    assert describing_entries({"a": [evil, [evil]], "b": {"c": evil}}) == {
        "a": [{"kept": 1}, [{"kept": 1}]],
        "b": {"c": {"kept": 1}},
    }


@pytest.mark.parametrize(
    "entries",
    [
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 4000},
        {"vocab_size": 1 << 40},
        {"rope_parameters": {"factor": 1 << 40}},
        {"model_type": "qwen2", "num_hidden_layers": 10**9},
        {"model_type": "distilbert", "n_layers": 10**9},
        {"model_type": "distilbert", "max_position_embeddings": 10**7, "sinusoidal_pos_embds": True},
        {"model_type": "albert", "num_hidden_groups": 10**8},
    ],
)
def test_sizes_that_no_bundle_has_are_refused_at_once(parts: Split, entries: dict[str, Any]) -> None:
    before = time.perf_counter()
    with pytest.raises(InputError, match="are believed|describes more than"):
        made(parts, **{**entries, "architectures": None})
    assert time.perf_counter() - before < 20


def test_modules_are_counted_in_this_thread_alone() -> None:
    with at_most_modules(2):
        torch.nn.Sequential(torch.nn.Identity(), torch.nn.Identity())
    with pytest.raises(InputError, match="describes more than 2 modules"), at_most_modules(2):
        torch.nn.Sequential(*(torch.nn.Identity() for _ in range(3)))
    torch.nn.Sequential(*(torch.nn.Identity() for _ in range(3)))


def test_an_architecture_of_another_type_is_refused(parts: Split) -> None:
    for architecture in ("DPTModel", "GPT2Model", "PreTrainedModel", "Nothing"):
        bundle = dataclasses.replace(parts.bundle, architecture=architecture)
        with pytest.raises(InputError, match=f"no model '{architecture}' of type bert"):
            build(bundle, Session(LocalTransport(parts.server)))


def test_names_that_a_terminal_obeys_are_refused(parts: Split) -> None:
    bundle, evil = parts.bundle, "name\x1b]0;owned\x07"
    changes: list[dict[str, Any]] = [
        {"architecture": evil},
        {"omitted": frozenset([evil])},
        {"kept": frozenset(["x" * 501])},
        {"tensors": {**bundle.tensors, evil: torch.zeros(1)}},
    ]
    for change in changes:
        with pytest.raises(MessageError, match="not printable or too long") as caught:
            dataclasses.replace(bundle, **change)
        assert str(caught.value).isprintable()
    files = bundle.to_files()
    for entry in ("format", "dtype", "groups"):
        manifest = {**json.loads(files["privtuner.json"]), entry: {evil: {"kind": evil}} if entry == "groups" else evil}
        with pytest.raises(MessageError) as caught:
            OwnerBundle.from_files({**files, "privtuner.json": json.dumps(manifest).encode()})
        assert str(caught.value).isprintable()


def test_json_is_read_within_bounds(parts: Split) -> None:
    files = parts.bundle.to_files()
    for name in ("config.json", "privtuner.json"):
        for content in (b"[" * 200_000, b'{"a": 1e999}', b'{"a": "' + b"x" * (16 << 20) + b'"}'):
            with pytest.raises(MessageError, match=f"bundle: {name}: "):
                OwnerBundle.from_files({**files, name: content})
