"""What the data owner gets from the server: everything of the model but its frozen linear weights."""

from __future__ import annotations

import hashlib
import json
import struct
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from privtuner import linear
from privtuner.errors import InputError, MessageError
from privtuner.foreign import foreign_json, foreign_text
from privtuner.nn.configuration import offline
from privtuner.sealed.public import Public

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TOKENIZER_FILES", "GroupSpec", "OwnerBundle", "bundle_digest", "describing_entries"]

TOKENIZER_FILES = frozenset(
    {
        "added_tokens.json",
        "chat_template.jinja",
        "merges.txt",
        "sentencepiece.bpe.model",
        "special_tokens_map.json",
        "spiece.model",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "vocab.json",
        "vocab.txt",
    }
)
"""Names of files that a bundle may carry beside its own."""

_NOT_DESCRIBING = frozenset({"auto_map", "custom_pipelines", "quantization_config", "use_kernels"})

_DTYPES = frozenset({"bfloat16", "float16", "float32", "float64"})
_JSON_BYTES = 16 << 20
_NAME = 500

_FORMAT = 4
_CONFIG, _MANIFEST = "config.json", "privtuner.json"
_TENSORS, _LAYERS, _PUBLIC = "owner.safetensors", "layers.safetensors", "sealed.bin"
_OWN_FILES = (_CONFIG, _MANIFEST, _TENSORS, _LAYERS)


@dataclass(frozen=True)
class GroupSpec:
    """One prepared layer of the server and the modules it stands for.

    Attributes:
        kind: "linear" for `torch.nn.Linear`, "conv1d" for the ``Conv1D`` of ``transformers``.
        members: module name -> output features, in the order of the stacked rows.
    """

    kind: Literal["linear", "conv1d"]
    members: Mapping[str, int]


@dataclass(frozen=True, eq=False, repr=False)
class OwnerBundle:
    """The data owner's part of a split model. Holds no frozen linear weight and no secret.

    Names of modules and tensors leave out the prefix of the base model ("bert.", "transformer.", ...), so they do not
    depend on the head that is built on top.

    Attributes:
        config: the model's configuration as ``transformers`` writes it.
        architecture: class of the model that was split, e.g. "BertModel".
        dtype: dtype of the model, e.g. "float32".
        groups: wire name -> the modules it stands for.
        specs: wire name -> layer description.
        tensors: embeddings, norms, biases, buffers and kept heads by name.
        kept: names among ``tensors`` of heads that were kept to be trained.
        omitted: modules of the architecture that neither party has, to be initialised by the data owner.
        files: tokenizer files, name -> contents.
        sealed: what the data owner must know of a model that is sealed whole; None of one that is served in layers.
    """

    config: Mapping[str, Any]
    architecture: str
    dtype: str
    groups: Mapping[str, GroupSpec]
    specs: Mapping[str, linear.LayerSpec]
    tensors: Mapping[str, torch.Tensor]
    kept: frozenset[str] = frozenset()
    omitted: frozenset[str] = frozenset()
    files: Mapping[str, bytes] = field(default_factory=dict)
    sealed: Public | None = None

    def __post_init__(self) -> None:
        if set(self.groups) != set(self.specs):
            raise MessageError(
                f"bundle: groups and layers differ in {sorted(set(self.groups) ^ set(self.specs))}; fetch it again"
            )
        for name, spec in self.groups.items():
            if sum(spec.members.values()) != self.specs[name].d_out:
                raise MessageError(
                    f"bundle: the members of '{name}' have {sum(spec.members.values())} output features and its "
                    f"description {self.specs[name].d_out}; fetch the bundle again"
                )
        names = [*self.groups, *(member for spec in self.groups.values() for member in spec.members)]
        for name in (*names, *self.tensors, *self.kept, *self.omitted, self.architecture):
            if foreign_text(name, _NAME) != name:
                raise MessageError(
                    f"bundle: a name is not printable or too long ({foreign_text(name)}); fetch it again"
                )
        if self.dtype not in _DTYPES:
            raise MessageError(f"bundle: unknown dtype {self.dtype!r}; fetch the bundle again")
        unknown = sorted(set(self.files) - TOKENIZER_FILES)
        if unknown:
            raise MessageError(f"bundle: unexpected files {unknown}; only tokenizer files may be added")

    def __repr__(self) -> str:
        size = sum(tensor.nbytes for tensor in self.tensors.values())
        served = f"{len(self.groups)} served layers" if self.sealed is None else "sealed"
        return f"OwnerBundle({self.architecture}, {served}, {size / 1e6:.1f} MB of tensors)"

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer whose files the bundle carries.

        Raises:
            privtuner.errors.InputError: it carries none, or one that does not load.
        """
        from transformers import AutoTokenizer

        if not self.files:
            raise InputError("the bundle carries no tokenizer; split a model directory that has one, or load your own")
        with tempfile.TemporaryDirectory() as folder:
            for name in (_CONFIG, *self.files):
                (Path(folder) / name).write_bytes(self._config_bytes() if name == _CONFIG else self.files[name])
            try:
                with offline():
                    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                        folder, local_files_only=True, trust_remote_code=False
                    )
            # The files come from the server, and transformers raises exceptions of any class on odd ones.
            except Exception as error:
                raise InputError(
                    f"the bundle's tokenizer does not load: {foreign_text(error)}; split the model again"
                ) from error
        tokenizer.name_or_path = ""
        return tokenizer

    def digest(self) -> str:
        """Return `bundle_digest` of the bundle's files: what a server of it says, and a data owner expects."""
        return bundle_digest(self.to_files())

    def to_files(self) -> dict[str, bytes]:
        """Return the bundle as file name -> contents: JSON and safetensors, no pickle."""
        from safetensors.torch import save

        manifest = {
            "format": _FORMAT,
            "architecture": self.architecture,
            "dtype": self.dtype,
            "groups": {
                name: {"kind": spec.kind, "members": [list(item) for item in spec.members.items()]}
                for name, spec in self.groups.items()
            },
            "kept": sorted(self.kept),
            "omitted": sorted(self.omitted),
        }
        specs = {
            name: torch.frombuffer(bytearray(spec.to_bytes()), dtype=torch.uint8) for name, spec in self.specs.items()
        }
        return {
            _CONFIG: self._config_bytes(),
            _MANIFEST: json.dumps(manifest, indent=1).encode(),
            _TENSORS: save({name: tensor.contiguous() for name, tensor in self.tensors.items()}),
            _LAYERS: save(specs),
            **({} if self.sealed is None else {_PUBLIC: self.sealed.to_bytes()}),
            **self.files,
        }

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> OwnerBundle:
        """Return the bundle that `to_files` wrote.

        Args:
            files: file name -> contents. Nothing in them is executed, and names are not used as paths.

        Raises:
            privtuner.errors.MessageError: a file is missing, unexpected or malformed, or of another format version.
        """
        missing = [name for name in _OWN_FILES if name not in files]
        if missing:
            raise MessageError(f"bundle: {', '.join(missing)} missing; fetch or save the bundle again")
        try:
            return cls._parse(files)
        except MessageError:
            raise
        # safetensors raises an exception class of its own, and JSON of any shape can reach the parser.
        except Exception as error:
            raise MessageError(
                f"bundle: malformed ({type(error).__name__}: {foreign_text(error)}); fetch it again"
            ) from error

    @classmethod
    def _parse(cls, files: Mapping[str, bytes]) -> OwnerBundle:
        from safetensors.torch import load

        manifest = foreign_json(files[_MANIFEST], f"bundle: {_MANIFEST}", _JSON_BYTES)
        if manifest["format"] != _FORMAT:
            raise MessageError(
                f"bundle: format {manifest['format']!r}, this version reads {_FORMAT}; install the same version of "
                "privtuner on both sides"
            )
        groups = {}
        for name, spec in manifest["groups"].items():
            if spec["kind"] not in ("linear", "conv1d"):
                raise MessageError(f"bundle: group '{foreign_text(name)}' is of unknown kind {spec['kind']!r}")
            groups[name] = GroupSpec(spec["kind"], {str(key): int(value) for key, value in spec["members"]})
        config = describing_entries(foreign_json(files[_CONFIG], f"bundle: {_CONFIG}", _JSON_BYTES))
        specs = load(bytes(files[_LAYERS]))
        return cls(
            config=config,
            architecture=str(manifest["architecture"]),
            dtype=str(manifest["dtype"]),
            groups=groups,
            specs={name: linear.LayerSpec.from_bytes(spec.numpy().tobytes()) for name, spec in specs.items()},
            tensors=load(bytes(files[_TENSORS])),
            kept=frozenset(map(str, manifest["kept"])),
            omitted=frozenset(map(str, manifest["omitted"])),
            files={name: bytes(content) for name, content in files.items() if name not in (*_OWN_FILES, _PUBLIC)},
            sealed=Public.from_bytes(files[_PUBLIC]) if _PUBLIC in files else None,
        )

    def save(self, directory: str | Path) -> None:
        """Write the bundle's files to ``directory``, which is made if it does not exist.

        ``AutoConfig`` and ``AutoTokenizer`` of ``transformers`` read the directory as that of the original model.
        """
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self.to_files().items():
            (folder / name).write_bytes(content)

    @classmethod
    def load(cls, directory: str | Path) -> OwnerBundle:
        """Return the bundle saved in ``directory``.

        Raises:
            privtuner.errors.InputError: there is no bundle in ``directory``.
            privtuner.errors.MessageError: its files are malformed.
        """
        folder = Path(directory)
        if not (folder / _MANIFEST).is_file():
            raise InputError(f"no bundle in {folder}: {_MANIFEST} is missing; write one with OwnerBundle.save")
        names = sorted(path.name for path in folder.iterdir() if path.name in TOKENIZER_FILES | {*_OWN_FILES, _PUBLIC})
        return cls.from_files({name: (folder / name).read_bytes() for name in names})

    def _config_bytes(self) -> bytes:
        return json.dumps(dict(self.config), indent=1, sort_keys=True).encode()


def bundle_digest(files: Mapping[str, bytes]) -> str:
    """Return the SHA-256 of a bundle's files, names and contents, as 64 hexadecimal digits.

    The same for the same model, preset and versions of this package and ``transformers``, at every start of a server.
    """
    digest = hashlib.sha256(b"privtuner bundle")
    for name, content in sorted(files.items()):
        for part in (name.encode(), content):
            # With its length, so that no two lists of files run into the same bytes.
            digest.update(struct.pack("<Q", len(part)))
            digest.update(part)
    return digest.hexdigest()


def describing_entries(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a configuration that describe the model, at every depth.

    Left out are those that name places on the server's machine, or code and kernels to fetch and run: one party's
    configuration must not decide what the other's machine executes.
    """
    return {
        key: _describing(value)
        for key, value in config.items()
        if not (key.startswith("_") or key.endswith("_implementation") or key in _NOT_DESCRIBING)
    }


def _describing(value: Any) -> Any:
    if isinstance(value, dict):
        return describing_entries(value)
    return [_describing(one) for one in value] if isinstance(value, list) else value
