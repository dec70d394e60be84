// The linear scheme: arrays are checked here, the GIL is released around all arithmetic.
#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include <pybind11/stl.h>

#include "bindings.hpp"
#include "privtuner/gemm/gemm.hpp"
#include "privtuner/linear/owner.hpp"
#include "privtuner/linear/server.hpp"
#include "privtuner/math/parallel.hpp"

namespace privtuner::bindings {
namespace {

using linear::Direction;

template <class T>
using Array = py::array_t<T, py::array::c_style>;

Direction direction_of(const std::string& name) {
  if (name == "forward") return Direction::forward;
  if (name == "backward") return Direction::backward;
  throw std::invalid_argument("direction '" + name + "': choose 'forward' or 'backward'");
}

linear::LayerId layer_id(const py::bytes& id) { return fixed<16>(id, "a layer id"); }

template <class T>
std::unique_ptr<linear::QuantisedWeight> make_prepared(const linear::Preset& preset, const linear::LayerId& id,
                                                       const py::array& weights, const double* delta) {
  const auto w = py::cast<Array<T>>(weights);
  const auto rows = static_cast<std::size_t>(w.shape(0)), cols = static_cast<std::size_t>(w.shape(1));
  if (rows > gemm::kMaxDepth || cols > gemm::kMaxDepth) {
    throw std::invalid_argument("weight of shape (" + std::to_string(rows) + ", " + std::to_string(cols) +
                                "): both dimensions must be at most " + std::to_string(gemm::kMaxDepth));
  }
  const py::gil_scoped_release release;
  return std::make_unique<linear::QuantisedWeight>(preset, id, gemm::Weights(w.data(), rows, cols), delta);
}

std::unique_ptr<linear::QuantisedWeight> prepare(const std::string& preset_name, const py::bytes& id,
                                                 const py::array& weights, const Array<double>& delta) {
  if (weights.ndim() != 2 || delta.ndim() != 1 || delta.shape(0) != weights.shape(0)) {
    throw std::invalid_argument("weights must be (d_out, d_in) and delta (d_out,)");
  }
  const linear::Preset& preset = linear::preset(preset_name);
  if (py::isinstance<Array<std::int8_t>>(weights)) {
    return make_prepared<std::int8_t>(preset, layer_id(id), weights, delta.data());
  }
  if (py::isinstance<Array<std::int16_t>>(weights)) {
    return make_prepared<std::int16_t>(preset, layer_id(id), weights, delta.data());
  }
  throw std::invalid_argument("weights must be a contiguous array of int8 or int16");
}

py::array quantised(const linear::QuantisedWeight& prepared) {
  const gemm::Weights& w = prepared.weights();
  const auto fill = [&](auto zero) {
    using T = decltype(zero);
    py::array_t<T> out({w.rows(), w.cols()});
    T* data = out.mutable_data();
    for (std::size_t r = 0; r < w.rows(); ++r) {
      for (std::size_t c = 0; c < w.cols(); ++c) data[r * w.cols() + c] = static_cast<T>(w.at(r, c));
    }
    return py::array(out);
  };
  return w.bytes_per_weight() == 1 ? fill(std::int8_t{0}) : fill(std::int16_t{0});
}

// Keeps the secret and the output alive while blocks arrive.
class PyDecryption {
 public:
  explicit PyDecryption(py::object secret)
      : secret_(std::move(secret)), decryption_(make(py::cast<linear::OneTimeKey&>(secret_), out_)) {}

  void feed(const py::buffer& block) {
    const Bytes bytes(block);
    const py::gil_scoped_release release;
    decryption_->feed(bytes.data(), bytes.size());
  }
  py::array_t<float> finish() {
    decryption_->finish();
    return out_;
  }

 private:
  static std::unique_ptr<linear::Decryption> make(linear::OneTimeKey& secret, py::array_t<float>& out) {
    const linear::Reply& reply = secret.reply();
    out = py::array_t<float>({std::size_t{reply.tokens()}, std::size_t{reply.features_out()}});
    return std::make_unique<linear::Decryption>(secret, out.mutable_data());
  }
  py::object secret_;
  py::array_t<float> out_;
  std::unique_ptr<linear::Decryption> decryption_;
};

void require_range(const char* what, std::uint32_t value, std::uint32_t low, std::uint32_t high) {
  if (value >= low && value <= high) return;
  throw std::invalid_argument(std::to_string(value) + " " + what + ": choose " + std::to_string(low) + " to " +
                              std::to_string(high));
}

void require_size(const char* what, std::size_t size, std::size_t expected) {
  if (size == expected) return;
  throw std::invalid_argument("a buffer of " + std::to_string(size) + " bytes for a " + what + " of " +
                              std::to_string(expected));
}

constexpr auto kMaxFeatures = static_cast<std::uint32_t>(gemm::kMaxDepth);

std::size_t request_bytes(const std::string& preset, std::uint32_t features, std::uint32_t tokens) {
  require_range("features", features, 1, kMaxFeatures);
  require_range("tokens", tokens, 1, linear::kMaxTokens);
  return linear::request_bytes(linear::preset(preset), features, tokens);
}

std::size_t block_bytes(const std::string& preset, std::uint32_t rows, std::uint32_t tokens, bool mask) {
  require_range("rows", rows, 1, kMaxFeatures);
  require_range("tokens", tokens, 1, linear::kMaxTokens);
  return linear::block_bytes(linear::preset(preset), rows, tokens, mask);
}

py::tuple encrypt(const std::shared_ptr<const linear::LayerSpec>& layer, const std::string& direction_text,
                  const Array<float>& x, std::shared_ptr<linear::MaskCache> masks) {
  const Direction direction = direction_of(direction_text);
  const std::uint32_t features = layer->features_in(direction);
  if (x.ndim() != 2 || x.shape(1) != static_cast<py::ssize_t>(features) ||
      x.shape(0) > static_cast<py::ssize_t>(linear::kMaxTokens)) {
    throw std::invalid_argument("x is no batch of up to " + std::to_string(linear::kMaxTokens) + " tokens, (tokens, " +
                                std::to_string(features) + ")");
  }
  const auto tokens = static_cast<std::uint32_t>(x.shape(0));
  const std::size_t size = request_bytes(layer->preset->name, features, tokens);
  std::uint8_t* message = nullptr;
  py::bytes request = new_bytes(size, message);
  std::unique_ptr<linear::OneTimeKey> secret;
  {
    const py::gil_scoped_release release;
    std::array<std::uint8_t, 32> mask_seed;
    linear::RequestId id;
    ring::os_random(mask_seed.data(), mask_seed.size());
    ring::os_random(id.data(), id.size());
    secret = std::make_unique<linear::OneTimeKey>(linear::encrypt(layer, direction, x.data(), tokens, std::move(masks),
                                                                  ring::Seed::from_os(), mask_seed, id, message, size));
  }
  return py::make_tuple(request, std::move(secret));
}

// Where a message is copied on the way of its checks: nowhere, or a buffer that is long enough.
class Copy {
 public:
  Copy(const std::optional<py::buffer>& buffer, std::size_t size) {
    if (!buffer.has_value()) return;
    bytes_.emplace(*buffer);
    if (bytes_->size() < size) require_size("message", bytes_->size(), size);
  }
  std::uint8_t* data() const { return bytes_.has_value() ? bytes_->data() : nullptr; }

 private:
  std::optional<WritableBytes> bytes_;
};

py::dict open_request(const std::string& preset, const py::buffer& data, const std::optional<py::buffer>& copy) {
  const Bytes bytes(data);
  const Copy target(copy, bytes.size());
  const linear::RequestHeader header = [&] {
    const py::gil_scoped_release release;
    return linear::open_request(linear::preset(preset), bytes.data(), bytes.size(), target.data());
  }();
  py::dict fields;
  fields["direction"] = linear::direction_name(header.direction);
  fields["layer"] = bytes_of(header.layer);
  fields["request"] = bytes_of(header.request);
  fields["seed"] = bytes_of(header.seed);
  fields["tokens"] = header.tokens;
  fields["features"] = header.features;
  fields["mask_wanted"] = header.mask_wanted;
  return fields;
}

py::dict open_block(const std::string& preset, const py::buffer& data, const std::optional<py::buffer>& copy) {
  const Bytes bytes(data);
  const Copy target(copy, bytes.size());
  std::size_t size = 0;
  const linear::BlockHeader header = [&] {
    const py::gil_scoped_release release;
    return linear::open_block(linear::preset(preset), bytes.data(), bytes.size(), size, target.data());
  }();
  py::dict fields;
  fields["direction"] = linear::direction_name(header.direction);
  fields["layer"] = bytes_of(header.layer);
  fields["request"] = bytes_of(header.request);
  fields["tokens"] = header.tokens;
  fields["features"] = header.features;
  fields["row_begin"] = header.row_begin;
  fields["row_count"] = header.row_count;
  fields["mask_present"] = header.mask_present;
  fields["size"] = size;
  return fields;
}

void seal_request(const std::string& preset, const py::buffer& buffer, const std::string& direction,
                  const py::bytes& layer, const py::bytes& request, const py::bytes& seed, std::uint32_t tokens,
                  std::uint32_t features, bool mask_wanted) {
  const linear::RequestHeader header{direction_of(direction),
                                     layer_id(layer),
                                     fixed<16>(request, "a request id"),
                                     fixed<32>(seed, "a mask seed"),
                                     tokens,
                                     features,
                                     mask_wanted};
  const WritableBytes message(buffer);
  require_size("request", message.size(), request_bytes(preset, features, tokens));
  const py::gil_scoped_release release;
  linear::seal_request(linear::preset(preset), header, message.data(), message.size());
}

// Blocks of the replies to requests of one direction to one layer, each (buffer, request, tokens, row_begin, row_count,
// mask_present): on several threads where there is enough of them.
void seal_blocks(const std::string& preset_name, const std::string& direction, const py::bytes& layer,
                 std::uint32_t features, const py::list& blocks) {
  using Block = std::tuple<py::buffer, py::bytes, std::uint32_t, std::uint32_t, std::uint32_t, bool>;
  const linear::Preset& preset = linear::preset(preset_name);
  require_range("features", features, 1, kMaxFeatures);
  std::vector<std::pair<linear::BlockHeader, WritableBytes>> checked;
  std::size_t total = 0;
  for (const py::handle& entry : blocks) {
    const auto [buffer, request, tokens, row_begin, row_count, mask_present] = py::cast<Block>(entry);
    const linear::BlockHeader header{direction_of(direction),
                                     layer_id(layer),
                                     fixed<16>(request, "a request id"),
                                     tokens,
                                     features,
                                     row_begin,
                                     row_count,
                                     mask_present};
    if (row_begin > features || row_count > features - row_begin) {
      throw std::invalid_argument(std::to_string(row_count) + " rows from " + std::to_string(row_begin) +
                                  ": there are " + std::to_string(features));
    }
    checked.emplace_back(header, WritableBytes(buffer));
    const std::size_t size = checked.back().second.size();
    require_size("reply block", size, block_bytes(preset_name, row_count, tokens, mask_present));
    total += size;
  }
  constexpr std::size_t kTaskBytes = std::size_t{1} << 20;  // what is worth a thread
  const std::size_t grain = std::max<std::size_t>(1, checked.size() * kTaskBytes / std::max(total, kTaskBytes));
  const py::gil_scoped_release release;
  const auto seal = [&](std::size_t begin, std::size_t end) {
    for (std::size_t i = begin; i < end; ++i) {
      const auto& [header, message] = checked[i];
      linear::seal_block(preset, header, message.data(), message.size());
    }
  };
  if (checked.size() == 1) return seal(0, 1);  // whose checksum may take all threads
  math::parallel_for(checked.size(), grain, seal);
}

// Messages whose bodies another scheme or device reads and writes.
void register_messages(py::module_& module) {
  module.attr("LINEAR_REQUEST_PREFIX") = linear::kRequestPrefix;
  module.attr("LINEAR_BLOCK_PREFIX") = linear::kBlockPrefix;
  module.def("linear_request_bytes", &request_bytes, py::arg("preset"), py::arg("features"), py::arg("tokens"));
  module.def("linear_block_bytes", &block_bytes, py::arg("preset"), py::arg("rows"), py::arg("tokens"),
             py::arg("mask"));
  module.def("linear_open_request", &open_request, py::arg("preset"), py::arg("data"), py::arg("copy") = py::none());
  module.def("linear_open_block", &open_block, py::arg("preset"), py::arg("data"), py::arg("copy") = py::none());
  module.def("linear_seal_request", &seal_request, py::arg("preset"), py::arg("buffer"), py::arg("direction"),
             py::arg("layer"), py::arg("request"), py::arg("seed"), py::arg("tokens"), py::arg("features"),
             py::arg("mask_wanted"));
  module.def("linear_seal_blocks", &seal_blocks, py::arg("preset"), py::arg("direction"), py::arg("layer"),
             py::arg("features"), py::arg("blocks"));
}

// An array of a device as the cache keeps it. The cache may let go of it in a thread that does not hold the GIL.
linear::MaskCache::Product hold(py::object array) {
  return {new py::object(std::move(array)), [](const py::object* held) {
            const py::gil_scoped_acquire acquire;
            delete held;
          }};
}

const std::string& device_place(const std::string& place) {
  if (place != linear::MaskCache::kProcessor) return place;
  throw std::invalid_argument("products on the processor are found and kept by encrypt and Decryption alone");
}

void register_masks(py::module_& module) {
  using linear::MaskCache, linear::LayerSpec;
  py::class_<MaskCache, std::shared_ptr<MaskCache>>(module, "MaskCache")
      .def(py::init<std::size_t>(), py::arg("max_bytes"))
      .def_property_readonly("bytes", &MaskCache::bytes)
      .def_property_readonly("max_bytes", &MaskCache::max_bytes)
      .def_property_readonly("seed", [](const MaskCache& masks) { return bytes_of(masks.seed()); })
      .def(
          "find",
          [](const MaskCache& masks, const LayerSpec& layer, const std::string& direction,
             const std::string& place) -> py::object {
            const MaskCache::Product found = masks.find(layer, direction_of(direction), device_place(place));
            return found == nullptr ? py::none() : *static_cast<const py::object*>(found.get());
          },
          py::arg("public"), py::arg("direction"), py::arg("place"))
      .def(
          "fits",
          [](const MaskCache& masks, const LayerSpec& layer, const std::string& direction) {
            return masks.fits(layer, direction_of(direction));
          },
          py::arg("public"), py::arg("direction"))
      .def(
          "insert",
          [](MaskCache& masks, const LayerSpec& layer, const std::string& direction, const std::string& place,
             py::object product) {
            masks.insert(layer, direction_of(direction), device_place(place), hold(std::move(product)));
          },
          py::arg("public"), py::arg("direction"), py::arg("place"), py::arg("product"));
}

[[noreturn]] void refuse_copy() {
  throw linear::SecretError("a secret is never copied or pickled: it serves one decryption in this process");
}

py::slice slice_of(std::size_t begin, std::size_t length) {
  return {static_cast<py::ssize_t>(begin), static_cast<py::ssize_t>(begin + length), 1};
}

// For devices, whose secrets hold one.
void register_reply(py::module_& module) {
  using linear::Reply;
  py::class_<Reply> reply(module, "Reply");
  py::class_<Reply::Rows>(reply, "Rows")
      .def_readonly("first", &Reply::Rows::first)
      .def_readonly("count", &Reply::Rows::count)
      .def_readonly("size", &Reply::Rows::size)
      .def_property_readonly("data", [](const Reply::Rows& rows) { return slice_of(rows.data, rows.data_bytes); })
      .def_property_readonly("mask", [](const Reply::Rows& rows) { return slice_of(rows.mask, rows.mask_bytes); });
  reply
      .def(py::init([](std::shared_ptr<const linear::LayerSpec> layer, const std::string& direction,
                       std::uint32_t tokens, const py::bytes& request, bool mask_known) {
             return Reply(std::move(layer), direction_of(direction), tokens, fixed<16>(request, "a request id"),
                          mask_known);
           }),
           py::arg("public"), py::arg("direction"), py::arg("tokens"), py::arg("request"), py::arg("mask_known"))
      .def_property_readonly("direction", [](const Reply& r) { return linear::direction_name(r.direction()); })
      .def_property_readonly("tokens", &Reply::tokens)
      .def_property_readonly("features_out", &Reply::features_out)
      .def_property_readonly("mask_known", &Reply::mask_known)
      .def_property_readonly("used", &Reply::used)
      .def_property_readonly("complete", &Reply::complete)
      .def("begin", &Reply::begin)
      .def("end", &Reply::end)
      .def(
          "next",
          [](const Reply& r, const py::buffer& block, const std::optional<py::buffer>& copy) {
            const Bytes bytes(block);
            const Copy target(copy, bytes.size());
            const py::gil_scoped_release release;
            return r.next(bytes.data(), bytes.size(), target.data());
          },
          py::arg("block"), py::arg("copy") = py::none())
      .def("taken", &Reply::taken, py::arg("rows"))
      .def("finish", &Reply::finish)
      .def("describe", &Reply::describe)
      .def("__reduce_ex__", [](const Reply&, int) { refuse_copy(); });
}

}  // namespace

void register_linear(py::module_& module) {
  py::class_<linear::LayerSpec, std::shared_ptr<linear::LayerSpec>>(module, "LayerSpec")
      .def_static(
          "from_bytes",
          [](const py::buffer& buffer) {
            const Bytes bytes(buffer);
            return std::make_shared<linear::LayerSpec>(linear::LayerSpec::from_bytes(bytes.data(), bytes.size()));
          },
          py::arg("data"))
      .def("to_bytes",
           [](const linear::LayerSpec& p) {
             const auto bytes = p.to_bytes();
             return py::bytes(reinterpret_cast<const char*>(bytes.data()), bytes.size());
           })
      .def_property_readonly("preset", [](const linear::LayerSpec& p) { return p.preset->name; })
      .def_property_readonly(
          "id",
          [](const linear::LayerSpec& p) { return py::bytes(reinterpret_cast<const char*>(p.id.data()), p.id.size()); })
      .def_readonly("d_out", &linear::LayerSpec::d_out)
      .def_readonly("d_in", &linear::LayerSpec::d_in)
      .def_readonly("norm_forward", &linear::LayerSpec::norm_forward)
      .def_readonly("norm_backward", &linear::LayerSpec::norm_backward)
      .def_property_readonly("scale", [](const linear::LayerSpec& p) {
        return py::array_t<double>(static_cast<py::ssize_t>(p.delta.size()), p.delta.data());
      });

  py::class_<linear::QuantisedWeight>(module, "QuantisedWeight")
      .def(py::init(&prepare), py::arg("preset"), py::arg("id"), py::arg("weights"), py::arg("delta"))
      .def("spec", [](const linear::QuantisedWeight& p) { return std::make_shared<linear::LayerSpec>(p.spec()); })
      .def("quantised", &quantised);

  py::class_<linear::Job>(module, "Job")
      .def(py::init([](const linear::QuantisedWeight& prepared, const py::buffer& request) {
             const Bytes bytes(request);
             const py::gil_scoped_release release;
             return std::make_unique<linear::Job>(prepared, bytes.data(), bytes.size());
           }),
           py::arg("prepared"), py::arg("request"), py::keep_alive<1, 2>())
      .def_property_readonly("tokens", [](const linear::Job& job) { return job.header().tokens; })
      .def_property_readonly("direction",
                             [](const linear::Job& job) { return linear::direction_name(job.header().direction); })
      .def_property_readonly("features_out", &linear::Job::features_out)
      .def(
          "rows",
          [](const linear::Job& job, std::uint32_t begin, std::uint32_t count) {
            std::uint8_t* out = nullptr;
            if (count > job.features_out()) throw std::invalid_argument("more rows than outputs");
            py::bytes block = new_bytes(job.block_size(count), out);
            {
              const py::gil_scoped_release release;
              job.rows(begin, count, out);
            }
            return block;
          },
          py::arg("begin"), py::arg("count"));

  register_masks(module);
  register_reply(module);

  py::class_<linear::OneTimeKey>(module, "OneTimeKey")
      .def("wipe", &linear::OneTimeKey::wipe)
      .def_property_readonly("used", [](const linear::OneTimeKey& s) { return s.reply().used(); })
      .def_property_readonly("tokens", [](const linear::OneTimeKey& s) { return s.reply().tokens(); })
      .def("__repr__",
           [](const linear::OneTimeKey& s) { return "<privtuner.linear.OneTimeKey of " + s.reply().describe() + ">"; })
      .def("__reduce_ex__", [](const linear::OneTimeKey&, int) { refuse_copy(); });

  py::class_<PyDecryption>(module, "Decryption")
      .def(py::init<py::object>(), py::arg("secret"))
      .def("feed", &PyDecryption::feed, py::arg("block"))
      .def("finish", &PyDecryption::finish);

  register_messages(module);
  module.def("encrypt", &encrypt, py::arg("public"), py::arg("direction"), py::arg("x"), py::arg("masks"));
  module.def(
      "token_room",
      [](const linear::LayerSpec& layer, const std::string& direction) {
        return linear::token_room(layer, direction_of(direction));
      },
      py::arg("public"), py::arg("direction"));
  module.def(
      "noise_bound",
      [](const std::string& preset, std::size_t depth, double norm) {
        return linear::noise_bound(linear::preset(preset), depth, norm);
      },
      py::arg("preset"), py::arg("depth"), py::arg("norm"));
  module.def(
      "preset_info",
      [](const std::string& name) {
        const linear::Preset& p = linear::preset(name);
        py::dict info;
        info["name"] = p.name;
        info["n"] = p.n;
        info["q"] = p.q;
        info["weight_bytes"] = p.weight_bytes;
        info["max_weight"] = p.max_weight;
        info["dropped_bits"] = p.dropped_bits;
        info["word_bytes"] = p.word_bytes;
        info["reply_bytes"] = p.reply_bytes;
        info["hash"] = p.hash;
        return info;
      },
      py::arg("name"));
  py::list names;
  for (const linear::Preset& preset : linear::presets()) names.append(preset.name);
  module.attr("PRESETS") = py::tuple(names);
  module.attr("MAX_TOKENS") = linear::kMaxTokens;
}

}  // namespace privtuner::bindings
