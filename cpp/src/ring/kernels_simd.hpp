// All kernels from the operations of an instruction set. Included by the kernels' files alone; internal linkage.
#pragma once

#include "chacha20_batches.hpp"
#include "ntt_lanes.hpp"
#include "ntt_passes.hpp"
#include "residues_real.hpp"
#include "sampling_loops.hpp"

namespace privtuner::ring::kernels {
namespace {

template <class Ops>
constexpr Kernels kKernels = {kNttKernels<Word32<Ops>>, kNttKernels<Word64<Ops>>,
                              kNttKernels<Word64<Ops>>, kChaCha20Kernel<Ops>,
                              kSamplingKernels<Ops>,    ResidueLoops<RealLanes<Ops>>::kKernels};

}  // namespace
}  // namespace privtuner::ring::kernels
