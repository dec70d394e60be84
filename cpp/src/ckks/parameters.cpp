#include "privtuner/ckks/parameters.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

namespace privtuner::ckks {
namespace {

// log2 of what P has beyond the largest digit: keeps the error of a key switch below that of rounding.
constexpr double kSpecialMargin = 5;

void require_range(const char* what, int value, int low, int high) {
  if (value < low || value > high) {
    throw std::invalid_argument(std::string(what) + " " + std::to_string(value) + " is outside [" +
                                std::to_string(low) + ", " + std::to_string(high) + "]");
  }
}

// How the modulus is laid out for one ring and one digit size.
struct Layout {
  std::size_t digit_limbs, specials;
  int special_bits;
  double log_qp;
  std::size_t transforms;  // of one relinearisation with rescale
};

Layout layout(std::size_t limbs, int first_bits, int scale_bits, std::size_t digit_limbs) {
  const double digit =
      std::max<double>(first_bits + scale_bits * (static_cast<double>(std::min(digit_limbs, limbs)) - 1),
                       scale_bits * static_cast<double>(std::min(digit_limbs, limbs - 1)));
  const double wanted = digit + kSpecialMargin;
  const auto specials = static_cast<std::size_t>(std::ceil(wanted / kMaxPrimeBits));
  const int bits = std::min(kMaxPrimeBits, static_cast<int>(std::ceil(wanted / static_cast<double>(specials))));
  const std::size_t digits = (limbs + digit_limbs - 1) / digit_limbs;
  return {digit_limbs, specials, bits,
          first_bits + scale_bits * static_cast<double>(limbs - 1) + bits * static_cast<double>(specials),
          limbs + digits * (limbs + specials) - limbs + 2 * (specials + 1) + 2 * limbs};
}

// The cheapest digit size whose modulus is within `bound`; false if none is.
bool best_layout(std::size_t limbs, int first_bits, int scale_bits, double bound, Layout& best) {
  bool found = false;
  for (std::size_t digit_limbs = 1; digit_limbs <= limbs; ++digit_limbs) {
    const Layout candidate = layout(limbs, first_bits, scale_bits, digit_limbs);
    if (candidate.log_qp > bound || (found && candidate.transforms >= best.transforms)) continue;
    best = candidate;
    found = true;
  }
  return found;
}

// Primes q = 1 mod 2N by distance from a wanted value, each given once.
class PrimeSource {
 public:
  explicit PrimeSource(std::uint64_t step) : step_(step) {}

  // The unused prime nearest to `wanted` in [2^17, below].
  std::uint64_t nearest(double wanted, std::uint64_t below) {
    const std::uint64_t middle = static_cast<std::uint64_t>(wanted) / step_ * step_ + 1;
    for (std::uint64_t distance = 0;; distance += step_) {
      const bool high = middle + distance < below;
      const bool low = distance + (1u << 17) < middle;
      if (high && take(middle + distance)) return middle + distance;
      if (low && distance != 0 && take(middle - distance)) return middle - distance;
      if (!high && !low) {
        throw std::invalid_argument("not enough primes below " + std::to_string(below) +
                                    " for this ring: take a larger"
                                    " scale_bits or a smaller depth");
      }
    }
  }

 private:
  bool take(std::uint64_t q) {
    if (std::find(used_.begin(), used_.end(), q) != used_.end() || !math::is_prime(q)) return false;
    used_.push_back(q);
    return true;
  }
  std::uint64_t step_;
  std::vector<std::uint64_t> used_;
};

std::uint64_t mix(std::uint64_t hash, std::uint64_t word) {
  hash = (hash ^ word) * 0xbf58476d1ce4e5b9u;
  return hash ^ (hash >> 29);
}

}  // namespace

double max_log_modulus(int log_n) {
  constexpr double kTable[] = {106, 214, 430, 868, 1747};  // N = 2^12 .. 2^16
  return log_n < 12 || log_n > 16 ? 0 : kTable[log_n - 12];
}

Parameters::Parameters(const Wish& wish) : wish_(wish) {
  require_range("depth", wish_.depth, 0, kMaxDepth);
  require_range("scale_bits", wish_.scale_bits, kMinScaleBits, kMaxScaleBits);
  first_bits_ = wish_.first_bits == 0 ? std::min(kMaxPrimeBits, wish_.scale_bits + 10) : wish_.first_bits;
  require_range("first_bits", first_bits_, wish_.scale_bits, kMaxPrimeBits);
  if (wish_.log_n != 0) require_range("log2 of the ring dimension", wish_.log_n, kMinLogN, kMaxLogN);
  // Few primes lie near a small scale, and those further off may be longer than it: then the next ring.
  for (int first = wish_.log_n == 0 ? kMinSecureLogN : wish_.log_n;; first = log_n_ + 1) {
    choose_ring(first);
    choose_primes();
    if (wish_.insecure || security_bits() != 0) break;
    if (wish_.log_n != 0 || log_n_ == kMaxLogN) {
      throw std::invalid_argument("no 128-bit secure set of depth " + std::to_string(wish_.depth) +
                                  " with scale_bits " + std::to_string(wish_.scale_bits) +
                                  " at N = " + std::to_string(n()) + ": its primes need " + std::to_string(log_qp_) +
                                  " bits where " + std::to_string(max_log_modulus(log_n_)) +
                                  " are allowed; take another scale_bits or a larger ring");
    }
  }
  make_conversions();
  encoder_ = std::make_unique<Encoder>(n());
}

void Parameters::choose_ring(int first) {
  const std::size_t limbs = static_cast<std::size_t>(wish_.depth) + 1;
  Layout chosen{};
  if (wish_.insecure) {
    log_n_ = wish_.log_n == 0 ? kMinLogN : wish_.log_n;
    best_layout(limbs, first_bits_, wish_.scale_bits, std::numeric_limits<double>::infinity(), chosen);
  } else {
    const int last = wish_.log_n == 0 ? kMaxLogN : wish_.log_n;
    bool found = false;
    for (log_n_ = first; log_n_ <= last && !found; ++log_n_) {
      found = best_layout(limbs, first_bits_, wish_.scale_bits, max_log_modulus(log_n_), chosen);
    }
    --log_n_;
    if (!found) {
      throw std::invalid_argument(
          "no 128-bit secure set of depth " + std::to_string(wish_.depth) + " with scale_bits " +
          std::to_string(wish_.scale_bits) +
          (wish_.log_n == 0 ? " up to N = 65536" : " at N = " + std::to_string(n())) + ": the modulus needs at least " +
          std::to_string(static_cast<int>(layout(limbs, first_bits_, wish_.scale_bits, 1).log_qp)) + " bits where " +
          std::to_string(static_cast<int>(max_log_modulus(last))) +
          " are allowed; lower depth or scale_bits, or take a larger ring");
    }
  }
  digit_limbs_ = chosen.digit_limbs;
  specials_ = chosen.specials;
  special_bits_ = chosen.special_bits;
}

void Parameters::choose_primes() {
  PrimeSource source(2 * n());
  primes_.clear();
  log_q_ = log_qp_ = 0;
  const auto power = [](int bits) { return std::uint64_t{1} << bits; };
  const std::size_t limbs = max_limbs();
  // Just below the power of two, so that the residues fit whole bytes; the scales stay near the centre because every
  // prime is chosen for the scale it divides.
  const double centre = static_cast<double>(power(wish_.scale_bits)) * (1 - 1.0 / 1024);
  std::vector<std::uint64_t> values(limbs);
  values[0] = source.nearest(static_cast<double>(power(first_bits_)), power(first_bits_));
  scales_.assign(limbs, centre);
  for (std::size_t level = limbs - 1; level > 0; --level) {
    values[level] = source.nearest(scales_[level] * scales_[level] / centre, power(wish_.scale_bits));
    scales_[level - 1] = scales_[level] * scales_[level] / static_cast<double>(values[level]);
  }
  for (std::size_t i = 0; i < specials_; ++i) {
    values.push_back(source.nearest(static_cast<double>(power(special_bits_)), power(special_bits_)));
  }
  primes_.reserve(values.size());
  hash_ = mix(mix(0x70766b6b63, n()), limbs);
  hash_ = mix(mix(hash_, digit_limbs_), static_cast<std::uint64_t>(wish_.scale_bits));
  for (std::size_t i = 0; i < values.size(); ++i) {
    primes_.emplace_back(n(), values[i]);
    hash_ = mix(hash_, values[i]);
    (i < limbs ? log_q_ : log_qp_) += std::log2(static_cast<double>(values[i]));
  }
  log_qp_ += log_q_;
}

BaseConversion Parameters::conversion(std::vector<std::size_t> from) const {
  BaseConversion result;
  const auto product_without = [&](std::size_t skipped, const math::Modulus& q) {
    std::uint64_t product = 1;
    for (const std::size_t j : from) {
      if (j != skipped) product = q.mul(product, q.reduce(primes_[j].q));
    }
    return product;
  };
  constexpr std::size_t kNone = ~std::size_t{0};
  for (const std::size_t j : from) {
    const math::Modulus& q = primes_[j].row.modulus();
    result.inverse_cofactor.push_back(q.inv(product_without(j, q)));
    result.inverse_prime.push_back(1.0 / static_cast<double>(q.q));
  }
  for (const Prime& prime : primes_) {
    const math::Modulus& q = prime.row.modulus();
    std::vector<std::uint64_t> row;
    for (const std::size_t j : from) row.push_back(product_without(j, q));
    const std::uint64_t whole = product_without(kNone, q);
    row.push_back(q.neg(whole));
    result.weights.push_back(std::move(row));
    result.inverse_product.push_back(whole == 0 ? 0 : q.inv(whole));
  }
  result.from = std::move(from);
  return result;
}

void Parameters::make_conversions() {
  const std::size_t limbs = max_limbs();
  std::vector<std::size_t> specials;
  for (std::size_t i = limbs; i < primes_.size(); ++i) specials.push_back(i);
  specials_alone_.push_back(conversion(specials));
  for (std::size_t count = 1; count <= limbs; ++count) {
    // Of the digits of `count` limbs only the last can be shorter than a whole one.
    const std::size_t first = (count - 1) / digit_limbs_ * digit_limbs_;
    std::vector<std::size_t> digit;
    for (std::size_t i = first; i < count; ++i) digit.push_back(i);
    digits_.push_back(conversion(digit));
    lasts_.push_back(conversion({count - 1}));
    std::vector<std::size_t> both = specials;
    both.push_back(count - 1);
    with_last_.push_back(conversion(both));
  }
  for (const Prime& prime : primes_) {
    const math::Modulus& q = prime.row.modulus();
    std::uint64_t product = 1;
    for (const std::size_t i : specials) product = q.mul(product, q.reduce(primes_[i].q));
    special_product_.push_back(product);
  }
}

const BaseConversion& Parameters::digit_conversion(std::size_t digit, std::size_t limb_count) const {
  return digits_[std::min((digit + 1) * digit_limbs_, limb_count) - 1];
}

const BaseConversion& Parameters::special_conversion(std::size_t limb_count, bool last) const {
  return last ? with_last_[limb_count - 1] : specials_alone_[0];
}

std::string Parameters::name() const {
  return std::string(security_bits() >= 128 ? "" : "INSECURE-") + "ckks-n" + std::to_string(n()) + "-depth" +
         std::to_string(depth()) + "-scale" + std::to_string(wish_.scale_bits);
}

}  // namespace privtuner::ckks
