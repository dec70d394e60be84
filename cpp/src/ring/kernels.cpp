#include "kernels.hpp"

#include "privtuner/math/kernel_table.hpp"

namespace privtuner::ring::kernels {

const Kernels& kernels_of(math::Isa isa) {
  static constexpr math::KernelTable<const Kernels& (*)()> kTable("ring", PRIVTUNER_KERNEL_ENTRIES(kernels));
  return kTable.at(isa)();
}

}  // namespace privtuner::ring::kernels
