// The loops themselves, for the compiler to vectorise. Included by one file a path; internal linkage and no library
// templates, so that no path's code is linked into another.
#pragma once

#include <cstring>

#include "elements.hpp"
#include "privtuner/math/simd.hpp"

namespace privtuner::linear {
namespace {

using simd::kRoundingShift;  // added, it leaves a double's integer part, rounded to nearest even, in the low bits

// |v| < 2^51.
inline std::int64_t round_to_integer(double v) {
  const double shifted = v + kRoundingShift;
  std::int64_t bits, zero;
  std::memcpy(&bits, &shifted, sizeof(bits));
  const double shift = kRoundingShift;
  std::memcpy(&zero, &shift, sizeof(zero));
  return bits - zero;
}

// Exact for |i| < 2^51; in steps that every instruction set has in vectors.
inline double integer_to_double(std::int64_t i) {
  std::int64_t bits;
  const double shift = kRoundingShift;
  std::memcpy(&bits, &shift, sizeof(bits));
  bits += i;
  double shifted;
  std::memcpy(&shifted, &bits, sizeof(shifted));
  return shifted - shift;
}

constexpr std::size_t kTokensAhead = 24;  // rows are far apart: the hardware does not foresee the next

void gather(const float* x, std::size_t stride, std::size_t tokens, std::size_t width, float* columns,
            std::size_t column_stride) {
  for (std::size_t t = 0; t < tokens; t += 16) {
    float tile[16][kFeatureBlock];
    const std::size_t rows = tokens - t < 16 ? tokens - t : 16;
    for (std::size_t r = 0; r < rows; ++r) {
      if (t + r + kTokensAhead < tokens) __builtin_prefetch(x + (t + r + kTokensAhead) * stride);
      if (width == kFeatureBlock) {
        std::memcpy(tile[r], x + (t + r) * stride, sizeof(tile[r]));
      } else {
        for (std::size_t i = 0; i < width; ++i) tile[r][i] = x[(t + r) * stride + i];
      }
    }
    for (std::size_t i = 0; i < width; ++i) {
      for (std::size_t r = 0; r < rows; ++r) columns[i * column_stride + t + r] = tile[r][i];
    }
  }
}

void scatter(const float* columns, std::size_t column_stride, std::size_t tokens, std::size_t width, float* y,
             std::size_t stride) {
  for (std::size_t t = 0; t < tokens; t += 16) {
    float tile[16][kFeatureBlock];
    const std::size_t rows = tokens - t < 16 ? tokens - t : 16;
    for (std::size_t i = 0; i < width; ++i) {
      for (std::size_t r = 0; r < rows; ++r) tile[r][i] = columns[i * column_stride + t + r];
    }
    for (std::size_t r = 0; r < rows; ++r) {
      if (t + r + kTokensAhead < tokens) __builtin_prefetch(y + (t + r + kTokensAhead) * stride, 1);
      if (width == kFeatureBlock) {
        std::memcpy(y + (t + r) * stride, tile[r], sizeof(tile[r]));
      } else {
        for (std::size_t i = 0; i < width; ++i) y[(t + r) * stride + i] = tile[r][i];
      }
    }
  }
}

double row_norm2(const float* x, const double* weight, std::size_t width) {
  double sums[8] = {};
  std::size_t j = 0;
  for (; j + 8 <= width; j += 8) {
    for (std::size_t i = 0; i < 8; ++i) {
      const double v =
          weight == nullptr ? static_cast<double>(x[j + i]) : static_cast<double>(x[j + i]) * weight[j + i];
      sums[i] += v * v;
    }
  }
  for (; j < width; ++j) {
    const double v = weight == nullptr ? static_cast<double>(x[j]) : static_cast<double>(x[j]) * weight[j];
    sums[j % 8] += v * v;
  }
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

// modulus if v < 0, else 0. In bits, as compilers make branches of comparisons.
inline std::int64_t if_negative(std::int64_t v, std::int64_t modulus) {
  return modulus & -static_cast<std::int64_t>(static_cast<std::uint64_t>(v) >> 63);
}

template <class Word>
void embed(const Preset& preset, const Word* mask, const std::int8_t* error, const float* x, double weight,
           const double* scale, std::size_t tokens, Word* out) {
  const auto modulus = static_cast<std::int64_t>(preset.q);
  for (std::size_t t = 0; t < tokens; ++t) {
    const std::int64_t message = round_to_integer(static_cast<double>(x[t]) * weight * scale[t]);
    // (-q, 2q) before the corrections.
    std::int64_t sum = static_cast<std::int64_t>(mask[t]) + error[t] + message;
    sum += if_negative(sum, modulus) - modulus;
    sum += if_negative(sum, modulus);
    out[t] = static_cast<Word>(sum);
  }
}

// How a row of a reply holds what was kept of its outputs. Messages may stand at any address.
struct ThreeBytes {  // [tokens] u16, [tokens] u8 (low)
  static void store(std::uint8_t* row, std::size_t tokens, std::size_t t, std::uint32_t kept) {
    const auto high = static_cast<std::uint16_t>(kept >> 8);
    std::memcpy(row + 2 * t, &high, 2);
    row[2 * tokens + t] = static_cast<std::uint8_t>(kept);
  }
  static std::int64_t load(const std::uint8_t* row, std::size_t tokens, std::size_t t) {
    std::uint16_t high;
    std::memcpy(&high, row + 2 * t, 2);
    return std::int64_t{high} << 8 | row[2 * tokens + t];
  }
};

struct FourBytes {  // [tokens] u32
  static void store(std::uint8_t* row, std::size_t, std::size_t t, std::uint32_t kept) {
    std::memcpy(row + 4 * t, &kept, 4);
  }
  static std::int64_t load(const std::uint8_t* row, std::size_t, std::size_t t) {
    std::uint32_t kept;
    std::memcpy(&kept, row + 4 * t, 4);
    return kept;
  }
};

template <class Kept, class Word>
PRIVTUNER_INLINE void shorten_as(const Preset& preset, const Word* products, std::size_t tokens, std::uint8_t* row) {
  const int dropped_bits = preset.dropped_bits;
  const Word half = Word{1} << (dropped_bits - 1);
  for (std::size_t t = 0; t < tokens; ++t) {
    // No carry out: a preset leaves the room.
    Kept::store(row, tokens, t, static_cast<std::uint32_t>((products[t] + half) >> dropped_bits));
  }
}

template <class Word>
void shorten(const Preset& preset, const Word* products, std::size_t tokens, std::uint8_t* row) {
  if (preset.reply_bytes == 3) {
    shorten_as<ThreeBytes>(preset, products, tokens, row);
  } else {
    shorten_as<FourBytes>(preset, products, tokens, row);
  }
}

template <class Kept, class Word>
PRIVTUNER_INLINE void reveal_as(const Preset& preset, const std::uint8_t* row, std::size_t tokens, std::size_t first,
                                std::size_t count, const Word* mask, double weight, const double* inverse_scale,
                                float* y) {
  const auto modulus = static_cast<std::int64_t>(preset.q);
  const int dropped_bits = preset.dropped_bits;
  for (std::size_t t = 0; t < count; ++t) {
    const std::int64_t kept = Kept::load(row, tokens, first + t);
    std::int64_t difference = (kept << dropped_bits) - static_cast<std::int64_t>(mask[t]);
    difference += if_negative(difference + modulus / 2, modulus) - if_negative(modulus / 2 - difference, modulus);
    y[t] = static_cast<float>(integer_to_double(difference) * (weight * inverse_scale[t]));
  }
}

template <class Word>
void reveal(const Preset& preset, const std::uint8_t* row, std::size_t tokens, std::size_t first, std::size_t count,
            const Word* mask, double weight, const double* inverse_scale, float* y) {
  if (preset.reply_bytes == 3) {
    reveal_as<ThreeBytes>(preset, row, tokens, first, count, mask, weight, inverse_scale, y);
  } else {
    reveal_as<FourBytes>(preset, row, tokens, first, count, mask, weight, inverse_scale, y);
  }
}

template <class Word>
constexpr Elements<Word> kLoops = {&gather, &scatter, &row_norm2, &embed<Word>, &shorten<Word>, &reveal<Word>};

constexpr PathElements kElements = {kLoops<std::uint32_t>, kLoops<std::uint64_t>};

}  // namespace
}  // namespace privtuner::linear
