// Randomness of the operating system, and tables of the number-theoretic transform for transforms on other devices.
#include <array>
#include <string>

#include "bindings.hpp"
#include "privtuner/ring/ntt.hpp"
#include "privtuner/ring/sampling.hpp"

namespace privtuner::bindings {
namespace {

template <class Word>
py::tuple tables(std::size_t n, std::uint64_t q) {
  const ring::Ntt<Word> ntt(n, q);
  const auto array = [](const auto& words) {
    return py::array_t<Word>(static_cast<py::ssize_t>(words.size()), words.data());
  };
  return py::make_tuple(array(ntt.roots()), array(ntt.roots_companion()), array(ntt.inverse_roots()),
                        array(ntt.inverse_roots_companion()), array(ntt.last_stage()));
}

}  // namespace

void register_ring(py::module_& module) {
  module.def(
      "os_random",
      [](const py::buffer& out) {
        const WritableBytes bytes(out);
        ring::os_random(bytes.data(), bytes.size());
      },
      py::arg("out"));
  module.def(
      "ntt_tables",
      [](std::size_t n, std::uint64_t q, int word_bytes) {
        if (word_bytes == 4) return tables<std::uint32_t>(n, q);
        if (word_bytes == 8) return tables<std::uint64_t>(n, q);
        throw std::invalid_argument("words of " + std::to_string(word_bytes) + " bytes; choose 4 or 8");
      },
      py::arg("n"), py::arg("q"), py::arg("word_bytes"));
}

}  // namespace privtuner::bindings
