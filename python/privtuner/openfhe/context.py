"""Contexts: OpenFHE's parameters and everything precomputed from them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from privtuner.ckks import Parameters
from privtuner.ckks.arguments import whole
from privtuner.copies import Immutable
from privtuner.errors import CkksError, InputError, MessageError
from privtuner.openfhe.library import Saved, library, read

__all__ = ["Context"]

BytesLike: TypeAlias = bytes | bytearray | memoryview

_SETTINGS = {
    "multiplicative_depth": "depth",
    "scaling_mod_size": "scaling_bits",
    "first_mod_size": "first_bits",
    "ring_dim": "ring_dimension",
    "batch_size": "batch_size",
    "num_large_digits": "digits",
    "digit_size": "digit_bits",
    "scaling_technique": "scaling_technique",
    "key_switch_technique": "key_switching",
    "ckks_data_type": "complex_data",
}
_TEXTS = ("scaling_technique", "key_switch_technique")


class Context(Immutable, Saved):
    """An OpenFHE context for CKKS with 128 bits of classical security by OpenFHE's own check (HEStd_128_classic).

    Released with the last object that refers to it: OpenFHE's table of contexts does not keep it.

    Args:
        parameters: ring, depth and scale of a native set. OpenFHE chooses primes of the same sizes, scales every level
            exactly (FLEXIBLEAUTO), and gets as many digits of key switching as its check needs.

    Attributes:
        ring_dimension: N. slots: values in a ciphertext, N / 2 unless a batch size was set.
        depth: multiplications in a row. scale_bits: log2 of the scale.
        moduli: the primes of the ciphertexts' towers, up to 60 bits each. special_moduli: of key switching.
        scaling_technique, key_switch_technique, num_large_digits: OpenFHE's.
        security_bits: 128, or 0 where OpenFHE's check was off.
        complex: whether slots hold complex numbers; OpenFHE decrypts real parts only otherwise.

    Raises:
        InputError: OpenFHE refuses the parameters. EngineError: OpenFHE is missing.
    """

    def __init__(self, parameters: Parameters) -> None:
        if parameters.security_bits < 128:
            raise InputError(f"{parameters.name} is not secure; for tests pass it to Context.INSECURE")
        self._hold(_make_like(parameters, secure=True))

    def _hold(self, core: Any) -> None:
        self._core = core
        self.ring_dimension: int = core.ring_dimension
        self.slots: int = core.slots
        self.depth: int = core.depth
        self.scale_bits: int = core.scaling_bits
        self.moduli: tuple[int, ...] = tuple(core.moduli)
        self.special_moduli: tuple[int, ...] = tuple(core.special_moduli)
        self.scaling_technique: str = core.scaling_technique
        self.key_switch_technique: str = core.key_switching
        self.num_large_digits: int = core.digits
        self.complex: bool = core.complex
        self.security_bits: int = 128 if core.secure else 0
        self.bootstrapping: bool = False
        self.bootstrapping_elements: frozenset[int] | None = None  # what its keys must hold, once some were made
        # FLEXIBLEAUTOEXT has a tower above the first level.
        self._top: int = self.depth + (self.scaling_technique == "FLEXIBLEAUTOEXT")

    @classmethod
    def from_settings(cls, multiplicative_depth: int, **settings: Any) -> Context:
        """A context from OpenFHE's own settings, the ``CCParams`` of CryptoContextCKKSRNS.

        Args:
            multiplicative_depth: multiplications in a row.
            **settings: ``scaling_mod_size``, ``first_mod_size`` (bits), ``ring_dim``, ``batch_size``,
                ``num_large_digits``, ``digit_size`` (bits), ``scaling_technique`` (FIXEDMANUAL, FIXEDAUTO,
                FLEXIBLEAUTO, FLEXIBLEAUTOEXT), ``key_switch_technique`` (HYBRID, BV), ``ckks_data_type`` (REAL,
                COMPLEX). What is left out has OpenFHE's default; the security level is HEStd_128_classic and the secret
                uniform ternary.

        Raises:
            InputError: an unknown setting or value, or OpenFHE refuses them, with its reason.
            EngineError: OpenFHE is missing.
        """
        return cls._of(_make(multiplicative_depth, settings, secure=True))

    @classmethod
    def INSECURE(  # noqa: N802 - the capitals are the warning
        cls, parameters: Parameters | None = None, **settings: Any
    ) -> Context:
        """Make a context from parameters, or from settings as `from_settings`, without the security check.

        For tests, never for data.

        Raises:
            InputError: parameters beside settings, settings without ``ring_dim``, or OpenFHE refuses them.
            EngineError: OpenFHE is missing.
        """
        if parameters is not None:
            if settings:
                raise InputError(f"settings {sorted(settings)} beside parameters; give one or the other")
            return cls._of(_make_like(parameters, secure=False))
        if "ring_dim" not in settings:
            raise InputError("without a security check OpenFHE cannot choose the ring: give ring_dim")
        return cls._of(_make(settings.pop("multiplicative_depth", 1), settings, secure=False))

    @classmethod
    def _of(cls, core: Any) -> Context:
        context = cls.__new__(cls)
        context._hold(core)
        return context

    def enable_bootstrapping(self, level_budget: Sequence[int] = (4, 4)) -> None:
        """Precompute what `Evaluator.bootstrap` needs.

        Args:
            level_budget: levels for the two linear transforms, OpenFHE's ``EvalBootstrapSetup``.

        Raises:
            InputError: OpenFHE cannot bootstrap with these parameters, with its reason.
        """
        self._core.enable_bootstrapping([whole("level_budget", levels) for levels in level_budget])
        self.bootstrapping = True

    def galois_element(self, steps: int) -> int:
        """The automorphism X -> X^k that rotates slots by ``steps``."""
        return int(self._core.galois_element(whole("a rotation", steps)))

    def level_of(self, level: int, degree: int) -> int:
        """Multiplications left, from OpenFHE's level (towers gone) and degree of the scale."""
        return self._top - level - (degree - 1)

    def openfhe_level(self, level: int) -> int:
        """OpenFHE's level of a fresh ciphertext with ``level`` multiplications left."""
        return 0 if level == self.depth else int(self._top - level)

    def require_level(self, level: int) -> int:
        """The level, or CkksError."""
        number = whole("level", level)
        if not 0 <= number <= self.depth:
            raise CkksError(f"level {number} is outside [0, {self.depth}]")
        return number

    def scale_deviation(self) -> float:
        """Largest |prime / scale - 1|: what a rescaling is off by where every level is said to have one scale."""
        if self.scaling_technique.startswith("FLEXIBLE"):
            return 0.0
        return float(max((abs(q / 2.0**self.scale_bits - 1) for q in self.moduli[1:]), default=0.0))

    def to_bytes(self) -> bytes:
        """OpenFHE's binary serialisation: what other programs read with ``Serial::Deserialize``."""
        return bytes(self._core.to_bytes())

    @classmethod
    def from_bytes(cls, data: BytesLike) -> Context:
        """Read OpenFHE's binary serialisation. It trusts what it reads: use it on bytes whose writer you trust.

        A context whose security check was off is accepted as it is, with ``security_bits`` 0.

        Raises:
            MessageError: this is no CKKS context of OpenFHE, or damaged in a way that OpenFHE notices.
        """
        return cls._of(library().Context.from_bytes(require_message(data, "context")))

    @classmethod
    def load(cls, path: str | Path) -> Context:
        """Read a file as `from_bytes` reads bytes."""
        return cls.from_bytes(read(path))

    def __reduce__(self) -> tuple[Any, ...]:
        return (Context.from_bytes, (self.to_bytes(),))

    def __repr__(self) -> str:
        return (
            f"<OpenFHE context: N = {self.ring_dimension}, {self.slots} slots, depth {self.depth}, scale "
            f"2^{self.scale_bits}, {self.scaling_technique}, {self.key_switch_technique}, "
            f"{self.security_bits or 'no'} bits of security>"
        )


def same_context(first: Context, second: Context) -> bool:
    """Whether two objects stand for one context of OpenFHE's."""
    return first is second or bool(first._core.same(second._core))


def require_message(data: BytesLike, what: str) -> bytes:
    """Return ``data`` as bytes; refuse what is no bytes, or empty."""
    if not isinstance(data, (bytes, bytearray, memoryview)):
        raise InputError(f"{what}: a {type(data).__name__}; expected bytes")
    if len(data) == 0:
        raise MessageError(f"{what}: there are no bytes")
    return bytes(data)


def _make(depth: int, settings: dict[str, Any], *, secure: bool) -> Any:
    unknown = sorted(set(settings) - set(_SETTINGS))
    if unknown:
        known = ", ".join(name for name in _SETTINGS if name != "multiplicative_depth")
        raise InputError(f"unknown settings {unknown}; known: {known}")
    values: dict[str, Any] = {core: "" if name in _TEXTS else 0 for name, core in _SETTINGS.items()}
    for name, value in {"multiplicative_depth": depth, **settings}.items():
        values[_SETTINGS[name]] = str(value) if name in _TEXTS else value
    data_type = settings.get("ckks_data_type", "REAL")
    if data_type not in ("REAL", "COMPLEX"):
        raise InputError(f"ckks_data_type {data_type!r}: choose REAL or COMPLEX")
    values["complex_data"] = data_type == "COMPLEX"
    for name, core in _SETTINGS.items():
        value = values[core]
        if name in _TEXTS or name == "ckks_data_type":
            continue
        if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or not 0 <= value < 1 << 20:
            raise InputError(f"{name} is {value!r}; give a whole number that is not negative")
        values[core] = int(value)
    ring = values["ring_dimension"]
    if ring and (ring < 16 or ring & (ring - 1)):
        raise InputError(f"ring_dim {ring} is not a power of two from 16 on")
    return library().Context(**values, secure=secure)


def _make_like(parameters: Parameters, *, secure: bool) -> Any:
    settings = {
        "scaling_mod_size": parameters.scale_bits,
        "first_mod_size": parameters.primes[0].bit_length(),
        "ring_dim": parameters.ring_dimension,
        "scaling_technique": "FLEXIBLEAUTO",
        "key_switch_technique": "HYBRID",
    }
    refusal: InputError | None = None
    # OpenFHE's default (0) first. More digits mean fewer special primes, until its check passes.
    for digits in (0, *range(2, parameters.depth + 2)):
        try:
            return _make(parameters.depth, {**settings, "num_large_digits": digits}, secure=secure)
        except InputError as error:
            refusal = error
    raise InputError(
        f"{parameters.name}: {refusal}; OpenFHE's special primes have 60 bits, so give parameters a ring_dimension "
        f"of {2 * parameters.ring_dimension}"
    )
