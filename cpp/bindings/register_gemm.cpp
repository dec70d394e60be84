// Products of clear matrices with residues that come from elsewhere.
#include <algorithm>
#include <atomic>
#include <memory>
#include <string>

#include "bindings.hpp"
#include "privtuner/ckks/evaluator.hpp"
#include "privtuner/gemm/gemm.hpp"
#include "privtuner/linear/server.hpp"
#include "privtuner/math/parallel.hpp"

namespace privtuner::bindings {
namespace {

using Words = py::array_t<std::uint64_t, py::array::c_style>;

constexpr int kBits = gemm::kMaxBits<std::uint64_t>;

math::Modulus modulus_of(std::uint64_t q) {
  if (q >> kBits != 0) {
    throw std::invalid_argument("modulus " + std::to_string(q) + " is not below 2^" + std::to_string(kBits) +
                                "; choose a smaller prime");
  }
  return math::Modulus(q);
}

// The kernels take words below q for granted.
void require_reduced(const std::uint64_t* words, std::size_t rows, std::size_t columns, std::uint64_t q) {
  std::atomic<std::size_t> first{rows};  // row with a word that is not
  math::parallel_for(rows, 4, [&](std::size_t begin, std::size_t end) {
    for (std::size_t r = begin; r < end; ++r) {
      const std::uint64_t* row = words + r * columns;
      std::uint64_t signs = 0;  // q < 2^63: a word at or above q has its own sign bit or that of q - 1 - word
      for (std::size_t c = 0; c < columns; ++c) signs |= row[c] | (q - 1 - row[c]);
      if (signs >> 63 == 0) continue;
      std::size_t known = first;
      while (r < known && !first.compare_exchange_weak(known, r)) {
      }
    }
  });
  if (first == rows) return;
  const std::uint64_t* row = words + first * columns;
  const std::uint64_t* word = std::find_if(row, row + columns, [q](std::uint64_t w) { return w >= q; });
  throw std::invalid_argument("the residue at (" + std::to_string(first) + ", " + std::to_string(word - row) +
                              ") is not below the modulus " + std::to_string(q) + "; reduce it");
}

// op(W) C mod q, the residues packed once. The weights outlive it: its Python object keeps theirs.
class ResidueProduct {
 public:
  ResidueProduct(const gemm::Weights& weights, bool transpose, const py::array& residues, std::uint64_t modulus)
      : weights_(weights),
        operand_(transpose ? gemm::Operand::transpose : gemm::Operand::plain),
        q_(modulus_of(modulus)) {
    const std::size_t depth = transpose ? weights.rows() : weights.cols();
    if (residues.ndim() != 2 || static_cast<std::size_t>(residues.shape(0)) != depth || residues.shape(1) < 1) {
      throw std::invalid_argument("residues of shape " + static_cast<std::string>(py::str(residues.attr("shape"))) +
                                  " for " + (transpose ? "the transpose of " : "") + "weights of shape (" +
                                  std::to_string(weights.rows()) + ", " + std::to_string(weights.cols()) +
                                  "): must be (" + std::to_string(depth) + ", columns)");
    }
    if (!py::isinstance<Words>(residues) || reinterpret_cast<std::uintptr_t>(residues.data()) % sizeof(std::uint64_t)) {
      throw std::invalid_argument("residues must be a C-contiguous, aligned array of uint64, not one of " +
                                  static_cast<std::string>(py::str(residues.dtype())) +
                                  "; numpy.require(residues, numpy.uint64, \"CA\") makes one");
    }
    const auto* words = static_cast<const std::uint64_t*>(residues.data());
    const auto columns = static_cast<std::size_t>(residues.shape(1));
    const py::gil_scoped_release release;
    require_reduced(words, depth, columns, modulus);
    packed_.assign(words, depth, columns, columns, math::active_isa(), q_.bits());
  }

  std::size_t rows() const { return operand_ == gemm::Operand::transpose ? weights_.cols() : weights_.rows(); }
  std::size_t columns() const { return packed_.columns(); }

  Words multiply(std::size_t begin, std::size_t count) const {
    if (begin > rows() || count > rows() - begin) {  // before memory for them is asked for
      throw std::invalid_argument(std::to_string(count) + " rows from " + std::to_string(begin) + ": there are " +
                                  std::to_string(rows()));
    }
    Words out({count, columns()});
    std::uint64_t* words = out.mutable_data();
    {
      const py::gil_scoped_release release;
      gemm::multiply(weights_, operand_, packed_, q_, begin, count, words, columns());
    }
    return out;
  }

 private:
  const gemm::Weights& weights_;
  gemm::Operand operand_;
  math::Modulus q_;
  gemm::PackedResidues<std::uint64_t> packed_;
};

// The constructor for one class that holds weights.
template <class Owner>
auto from() {
  return py::init([](const Owner& owner, bool transpose, const py::array& residues, std::uint64_t modulus) {
    return std::make_unique<ResidueProduct>(owner.weights(), transpose, residues, modulus);
  });
}

}  // namespace

void register_gemm(py::module_& module) {
  module.attr("MAX_DEPTH") = gemm::kMaxDepth;
  module.attr("ROW_STEP") = gemm::kRowStep;
  module.attr("MAX_WEIGHT_16") = gemm::kMaxWeight16;
  py::class_<ResidueProduct> product(module, "ResidueProduct");
  const auto add_constructor = [&](auto&& constructor) {
    product.def(std::move(constructor), py::arg("weights"), py::arg("transpose"), py::arg("residues").noconvert(),
                py::arg("modulus"), py::keep_alive<1, 2>());
  };
  add_constructor(from<linear::QuantisedWeight>());
  add_constructor(from<ckks::Matrix>());
  product.def_property_readonly("rows", &ResidueProduct::rows)
      .def_property_readonly("columns", &ResidueProduct::columns)
      .def("multiply", &ResidueProduct::multiply, py::arg("begin"), py::arg("count"));
}

}  // namespace privtuner::bindings
