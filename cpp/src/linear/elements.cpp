#include "elements.hpp"

namespace privtuner::linear {

const PathElements& path_elements(math::Isa isa) {
  switch (isa) {
#ifdef PRIVTUNER_HAVE_AVX512
    case math::Isa::amx:
    case math::Isa::avx512ifma:
    case math::Isa::avx512:
      return elements_avx512();
#endif
#ifdef PRIVTUNER_HAVE_AVX2
    case math::Isa::avx2:
      return elements_avx2();
#endif
    default:
      return elements_portable();
  }
}

}  // namespace privtuner::linear
