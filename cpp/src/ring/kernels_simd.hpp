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
constexpr NttKernels<std::uint64_t> kRealNttKernels = {&forward_transform<RealWord<Ops>>,
                                                       &inverse_transform<RealWord<Ops>>, &multiply_words<Word64<Ops>>};

template <class Ops>
constexpr Kernels kKernels = {kNttKernels<Word32<Ops>>, kRealNttKernels<Ops>,  kNttKernels<Word64<Ops>>,
                              kChaCha20Kernel<Ops>,     kSamplingKernels<Ops>, ResidueLoops<RealLanes<Ops>>::kKernels};

}  // namespace
}  // namespace privtuner::ring::kernels
