// Products of clear matrices with residues that come from elsewhere.
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

// op(W) C mod q, the residues packed once. The weights outlive it: its Python object keeps theirs.
class ResidueProduct {
 public:
  ResidueProduct(const gemm::Weights& weights, bool transpose, const Words& residues, std::uint64_t modulus)
      : weights_(weights), operand_(transpose ? gemm::Operand::transpose : gemm::Operand::plain), q_(modulus) {
    if (modulus >> gemm::kMaxBits<std::uint64_t> != 0) {
      throw std::invalid_argument("modulus " + std::to_string(modulus) + " is not below 2^" +
                                  std::to_string(gemm::kMaxBits<std::uint64_t>));
    }
    const std::size_t depth = transpose ? weights.rows() : weights.cols();
    if (residues.ndim() != 2 || static_cast<std::size_t>(residues.shape(0)) != depth || residues.shape(1) == 0) {
      throw std::invalid_argument("residues must be (" + std::to_string(depth) + ", columns), as the matrix is (" +
                                  std::to_string(weights.rows()) + ", " + std::to_string(weights.cols()) + ")");
    }
    const std::uint64_t* data = residues.data();
    const auto columns = static_cast<std::size_t>(residues.shape(1));
    const py::gil_scoped_release release;
    require_reduced(data, depth, columns);
    int bits = 1;
    while (modulus >> bits != 0) ++bits;
    packed_.assign(data, depth, columns, columns, math::active_isa(), bits);
  }

  std::size_t rows() const { return operand_ == gemm::Operand::transpose ? weights_.cols() : weights_.rows(); }
  std::size_t columns() const { return packed_.columns(); }

  Words multiply(std::size_t begin, std::size_t count) const {
    if (begin > rows() || count > rows() - begin) {
      throw std::invalid_argument("rows [" + std::to_string(begin) + ", " + std::to_string(begin + count) + ") of " +
                                  std::to_string(rows()));
    }
    Words out({count, columns()});
    std::uint64_t* data = out.mutable_data();
    const py::gil_scoped_release release;
    gemm::multiply(weights_, operand_, packed_, q_, begin, count, data, columns());
    return out;
  }

 private:
  // The kernels take words below q for granted.
  void require_reduced(const std::uint64_t* data, std::size_t depth, std::size_t columns) const {
    std::atomic<std::size_t> bad{depth};
    math::parallel_for(depth, 4, [&](std::size_t begin, std::size_t end) {
      for (std::size_t r = begin; r < end; ++r) {
        std::uint64_t any = 0;  // the sign bit of q - 1 - word, or of the word
        for (std::size_t c = 0; c < columns; ++c) any |= (q_.q - 1 - data[r * columns + c]) | data[r * columns + c];
        if (any >> 63 != 0) bad = r;
      }
    });
    if (bad == depth) return;
    for (std::size_t c = 0; c < columns; ++c) {
      const std::uint64_t word = data[bad * columns + c];
      if (word < q_.q) continue;
      throw std::invalid_argument("residue " + std::to_string(word) + " at (" + std::to_string(bad) + ", " +
                                  std::to_string(c) + ") is not below the modulus " + std::to_string(q_.q));
    }
  }

  const gemm::Weights& weights_;
  gemm::Operand operand_;
  math::Modulus q_;
  gemm::PackedResidues<std::uint64_t> packed_;
};

}  // namespace

void register_gemm(py::module_& module) {
  py::class_<ResidueProduct>(module, "ResidueProduct")
      .def(py::init([](const linear::Prepared& prepared, bool transpose, const Words& residues, std::uint64_t modulus) {
             return std::make_unique<ResidueProduct>(prepared.weights(), transpose, residues, modulus);
           }),
           py::arg("weights"), py::arg("transpose"), py::arg("residues").noconvert(), py::arg("modulus"),
           py::keep_alive<1, 2>())
      .def(py::init([](const ckks::Matrix& matrix, bool transpose, const Words& residues, std::uint64_t modulus) {
             return std::make_unique<ResidueProduct>(matrix.weights(), transpose, residues, modulus);
           }),
           py::arg("weights"), py::arg("transpose"), py::arg("residues").noconvert(), py::arg("modulus"),
           py::keep_alive<1, 2>())
      .def_property_readonly("rows", &ResidueProduct::rows)
      .def_property_readonly("columns", &ResidueProduct::columns)
      .def("multiply", &ResidueProduct::multiply, py::arg("begin"), py::arg("count"));
}

}  // namespace privtuner::bindings
