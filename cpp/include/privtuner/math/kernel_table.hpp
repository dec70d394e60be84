// One table of kernels a layer: an entry for every instruction-set path of the build.
#pragma once

#include <cstddef>
#include <initializer_list>
#include <iterator>
#include <stdexcept>
#include <string>

#include "privtuner/math/compiled_paths.hpp"
#include "privtuner/math/cpu.hpp"

// {Isa::portable, &name_portable}, ... for every path that is compiled: one that the layer has no kernels for does not
// compile, or does not link. A path that adds nothing for a layer says so there: name_amx() calls name_avx512ifma().
#define PRIVTUNER_KERNEL_ENTRY(path, name) {::privtuner::math::Isa::path, &name##_##path},
#define PRIVTUNER_KERNEL_ENTRIES(name) {PRIVTUNER_COMPILED_PATHS(PRIVTUNER_KERNEL_ENTRY, name)}

namespace privtuner::math {

// Function: a pointer to the function that gives a path's kernels.
template <class Function>
class KernelTable {
 public:
  struct Entry {
    Isa isa;
    Function kernels;
  };

  constexpr KernelTable(const char* layer, std::initializer_list<Entry> entries) : layer_(layer) {
    for (const Entry& entry : entries) kernels_[static_cast<std::size_t>(entry.isa)] = entry.kernels;
  }

  // Throws std::logic_error for a path without an entry: no path does another one's work unasked.
  Function at(Isa isa) const {
    const auto i = static_cast<std::size_t>(isa);
    if (i < std::size(kernels_) && kernels_[i] != nullptr) return kernels_[i];
    throw std::logic_error(std::string(layer_) + " has no kernels for the path " + isa_name(isa) +
                           " in this build; choose another path");
  }

 private:
  const char* layer_;
  Function kernels_[std::size(kIsaPaths)] = {};
};

}  // namespace privtuner::math
