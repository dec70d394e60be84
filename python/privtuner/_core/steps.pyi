# cpp/include/privtuner/ckks/recording.hpp says what the steps do. An array that is None is not there.
from typing import final

import numpy as np
import numpy.typing as npt

from privtuner._core import _Words

@final
class TensorRef:
    @property
    def storage(self) -> int: ...
    @property
    def first(self) -> int: ...
    @property
    def features(self) -> int: ...
    @property
    def level(self) -> int: ...

@final
class Combine:
    @property
    def out(self) -> TensorRef: ...
    @property
    def terms(self) -> list[TensorRef]: ...
    @property
    def weights(self) -> _Words: ...  # (limbs, terms, features)
    @property
    def constants(self) -> _Words | None: ...  # (limbs, features)
    @property
    def rescaled(self) -> bool: ...
    @property
    def limbs(self) -> int: ...

@final
class Add:
    @property
    def out(self) -> TensorRef: ...
    @property
    def x(self) -> TensorRef: ...
    @property
    def y(self) -> TensorRef: ...
    @property
    def minus(self) -> bool: ...

@final
class Sum:
    @property
    def out(self) -> TensorRef: ...
    @property
    def x(self) -> TensorRef: ...

@final
class Copy:
    @property
    def out(self) -> TensorRef: ...
    @property
    def parts(self) -> list[TensorRef]: ...

@final
class Plain:
    @property
    def out(self) -> TensorRef: ...
    @property
    def x(self) -> TensorRef: ...
    @property
    def coefficients(self) -> npt.NDArray[np.int64]: ...  # (features, N)
    @property
    def limbs(self) -> int: ...

@final
class Product:
    @property
    def out(self) -> TensorRef: ...
    @property
    def x(self) -> TensorRef: ...
    @property
    def y(self) -> TensorRef: ...
    @property
    def summed(self) -> bool: ...
    @property
    def multipliers(self) -> _Words | None: ...  # (limbs, features)
    @property
    def terms(self) -> list[TensorRef]: ...
    @property
    def weights(self) -> _Words: ...  # (limbs, terms, features)
    @property
    def constants(self) -> _Words | None: ...  # (limbs, features)
    @property
    def limbs(self) -> int: ...

@final
class Matrix:
    @property
    def out(self) -> TensorRef: ...
    @property
    def x(self) -> TensorRef: ...
    @property
    def transpose(self) -> bool: ...

@final
class Galois:
    @property
    def x(self) -> TensorRef: ...
    @property
    def outs(self) -> list[TensorRef]: ...
    @property
    def elements(self) -> list[int]: ...

@final
class Monomial:
    @property
    def out(self) -> TensorRef: ...
    @property
    def x(self) -> TensorRef: ...
    @property
    def power(self) -> int: ...

_Step = Combine | Add | Sum | Copy | Plain | Product | Matrix | Galois | Monomial
