#include "elements.hpp"

#include "privtuner/math/kernel_table.hpp"

namespace privtuner::linear {

const PathElements& path_elements(math::Isa isa) {
  static constexpr math::KernelTable<const PathElements& (*)()> kTable("linear", PRIVTUNER_KERNEL_ENTRIES(elements));
  return kTable.at(isa)();
}

}  // namespace privtuner::linear
