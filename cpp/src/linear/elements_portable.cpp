#include "elements_loops.hpp"

namespace privtuner::linear {

const PathElements& elements_portable() { return kElements; }

}  // namespace privtuner::linear
