#include "elements_loops.hpp"

namespace privtuner::linear {

const PathElements& elements_avx512() { return kElements; }

}  // namespace privtuner::linear
