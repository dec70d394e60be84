#include "elements.hpp"

#include "privtuner/math/kernel_table.hpp"

namespace privtuner::linear {

const Elements& elements(math::Isa isa) {
  static constexpr math::KernelTable<const Elements& (*)()> kTable("linear", PRIVTUNER_KERNEL_ENTRIES(elements));
  return kTable.at(isa)();
}

}  // namespace privtuner::linear
