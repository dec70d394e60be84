#include "residues_real.hpp"
#include "residues_words512.hpp"

namespace privtuner::ring::kernels {

const ResidueKernels& residues_avx512() { return ResidueLoops<RealLanes<ResidueWords512>>::kKernels; }

}  // namespace privtuner::ring::kernels
