#include "elements_loops.hpp"

namespace privtuner::linear {

const Elements& elements_portable() { return kElements; }

}  // namespace privtuner::linear
