// The linear scheme between floats and residues: token scales, embedding, shortened replies, revealing. The same IEEE
// steps in the same order as the loops of the processor's paths, so the same words and floats.
//
// Float arrays are [tokens][features], words are [features][tokens]: tiles of kTileRows features by kTileTokens tokens
// turn in shared memory, so that both sides are read and written along whole lines. n, the tokens of a group, is a
// multiple of kTileTokens: a tile lies in one group.
#include "platform.cuh"

namespace pt {

constexpr unsigned kTileRows = 32, kTileTokens = 128, kTileThreads = 256;
constexpr unsigned kTileStride = kTileRows + 1;        // floats of a token in shared memory: no two lanes share a bank
constexpr unsigned kNormLanes = 8;                     // partial sums of a token's norm
constexpr double kRoundingShift = 6755399441055744.0;  // 1.5 * 2^52
constexpr i64 kRoundingBits = 0x4338000000000000;      // of that double

PT_FN double square_root(double x) {
#if defined(__CUDACC__)
  return __dsqrt_rn(x);
#else
  return __builtin_sqrt(x);
#endif
}

// Exact; written out because CuPy compiles with -ftz=true, under which a cast takes a subnormal float for zero.
PT_FN double widened(float x) {
#if defined(__CUDACC__)
  double out;
  asm("cvt.f64.f32 %0, %1;" : "=d"(out) : "f"(x));
  return out;
#else
  return static_cast<double>(x);
#endif
}

// Rounded to nearest, subnormal where it is that small.
PT_FN float narrowed(double x) {
#if defined(__CUDACC__)
  float out;
  asm("cvt.rn.f32.f64 %0, %1;" : "=f"(out) : "d"(x));
  return out;
#else
  return static_cast<float>(x);
#endif
}

// The nearest integer, ties to even: the sum leaves it in the low bits. |v| < 2^51.
PT_FN i64 round_to_integer(double v) {
  const double shifted = v + kRoundingShift;
#if defined(__CUDACC__)
  return __double_as_longlong(shifted) - kRoundingBits;
#else
  i64 bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  return bits - kRoundingBits;
#endif
}

// x in [-q, q) to [0, q).
PT_FN i64 add_if_negative(i64 x, i64 q) { return x + (q & (x >> 63)); }

// Of every token: scale = room / |x o weight|_2, 0 for a token of zeros, and inverse_scale = |x o weight|_2 / room,
// which is not finite where a value is not. The eight sums and their order are part of the definition.
PT_FN void linear_scales(const Block& block, double* scale, double* inverse_scale, const float* x, const double* weight,
                         double room, u32 tokens, u32 width) {
  double* sums = reinterpret_cast<double*>(block.shared);
  block.each([&](unsigned thread) {
    const u64 t = (static_cast<u64>(block.x) * block.threads + thread) / kNormLanes;
    double sum = 0;
    if (t < tokens) {
      const float* row = x + t * width;
      for (u32 j = thread % kNormLanes; j < width; j += kNormLanes) {
        const double v = widened(row[j]) * weight[j];
        sum += v * v;
      }
    }
    sums[thread] = sum;
  });
  block.each([&](unsigned thread) {
    const u64 t = static_cast<u64>(block.x) * (block.threads / kNormLanes) + thread;
    if (thread >= block.threads / kNormLanes || t >= tokens) return;
    const double* s = sums + thread * kNormLanes;
    const double length = square_root(((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7])));
    scale[t] = length > 0 ? room / length : 0;
    inverse_scale[t] = length / room;
  });
}

// out[f] = values[f] mod q, of values in {-1, 0, 1}; no branch on them, they are secret.
template <class Word>
PT_FN void residues(const Block& block, Word* out, const i8* values, u64 q, u64 count) {
  block.own([&](unsigned thread) {
    const u64 i = static_cast<u64>(block.x) * block.threads + thread;
    if (i < count) out[i] = static_cast<Word>(add_if_negative(values[i], static_cast<i64>(q)));
  });
}

// out[f][t] = product + error + round(x[t][first + f] weight[first + f] scale[t]) mod q, for f < rows.
// product: [groups][rows][n], in [0, q). errors: [rows][groups][error_stride]. out: [rows][tokens], in [0, q).
// |x weight scale| < q / 2 and |error| is small: the sum is in (-q, 2q). Grid: token tiles, feature tiles.
template <class Word>
PT_FN void embed(const Block& block, Word* out, const Word* product, const i8* errors, const float* x,
                 const double* weight, const double* scale, u64 q, u32 n, u32 tokens, u32 width, u32 first, u32 rows,
                 u32 groups, u32 error_stride) {
  float* tile = reinterpret_cast<float*>(block.shared);
  const u32 t0 = block.x * kTileTokens, f0 = block.y * kTileRows;
  block.each([&](unsigned thread) {
    for (unsigned i = thread; i < kTileRows * kTileTokens; i += kTileThreads) {
      const u32 t = i / kTileRows, f = i % kTileRows;
      if (t0 + t < tokens && f0 + f < rows) {
        tile[t * kTileStride + f] = x[static_cast<u64>(t0 + t) * width + first + f0 + f];
      }
    }
  });
  block.own([&](unsigned thread) {
    const u32 group = t0 / n, in_group = t0 - group * n;
    const i64 modulus = static_cast<i64>(q);
    for (unsigned i = thread; i < kTileRows * kTileTokens; i += kTileThreads) {
      const u32 t = i % kTileTokens;
      const u64 f = f0 + i / kTileTokens;
      if (t0 + t >= tokens || f >= rows) continue;
      const double value = widened(tile[t * kTileStride + i / kTileTokens]);
      const i64 message = round_to_integer(value * weight[first + f] * scale[t0 + t]);
      const i64 masked = static_cast<i64>(product[(group * static_cast<u64>(rows) + f) * n + in_group + t]);
      i64 sum = masked + errors[(f * groups + group) * error_stride + in_group + t] + message;
      sum = add_if_negative(sum, modulus);
      sum = add_if_negative(sum - modulus, modulus);
      out[f * tokens + t0 + t] = static_cast<Word>(sum);
    }
  });
}

// Where a row of a reply of `tokens` outputs begins: 3 bytes an output are [tokens] u16 (high), [tokens] u8 (low),
// 4 bytes [tokens] u32.
PT_FN u64 row_start(u64 row, u32 tokens, u32 reply_bytes) { return row * reply_bytes * tokens; }

PT_FN void store_kept(u8* reply, u64 row, u64 t, u32 tokens, u32 reply_bytes, u32 kept) {
  u8* to = reply + row_start(row, tokens, reply_bytes);
  if (reply_bytes == 3) {  // bytes one by one: a row may start at an odd address
    to[2 * t] = static_cast<u8>(kept >> 8);
    to[2 * t + 1] = static_cast<u8>(kept >> 16);
    to[static_cast<u64>(2) * tokens + t] = static_cast<u8>(kept);
  } else {
    reinterpret_cast<u32*>(to)[t] = kept;
  }
}

PT_FN i64 load_kept(const u8* reply, u64 row, u64 t, u32 tokens, u32 reply_bytes) {
  const u8* from = reply + row_start(row, tokens, reply_bytes);
  if (reply_bytes != 3) return reinterpret_cast<const u32*>(from)[t];
  const u8 low = from[static_cast<u64>(2) * tokens + t];
  return from[2 * t] << 8 | from[2 * t + 1] << 16 | low;
}

// Of every row the kept bits of `tokens` words from `column` on. Words are in [0, q), and a preset leaves room for half
// of what is dropped. Blocks go along rows of words.
template <class Word>
PT_FN void shorten(const Block& block, u8* reply, const Word* product, u32 dropped_bits, u32 reply_bytes, u32 tokens,
                   u64 column, u64 columns, u32 blocks_a_row) {
  block.own([&](unsigned thread) {
    const u64 t = static_cast<u64>(block.x % blocks_a_row) * block.threads + thread, row = block.x / blocks_a_row;
    if (t >= tokens) return;
    const Word word = product[row * columns + column + t] + (static_cast<Word>(1) << (dropped_bits - 1));
    store_kept(reply, row, t, tokens, reply_bytes, static_cast<u32>(word >> dropped_bits));
  });
}

// y[t][first + r] = centred(reply 2^dropped_bits - product) weight[first + r] inverse_scale[t], for r < rows.
// reply: [rows] as `shorten` wrote it, any bits. product: [groups][rows][n], in [0, q). y: [tokens][outputs].
// Grid: token tiles, row tiles.
template <class Word>
PT_FN void reveal(const Block& block, float* y, const u8* reply, const Word* product, const double* weight,
                  const double* inverse_scale, u64 q, u32 dropped_bits, u32 reply_bytes, u32 n, u32 tokens, u32 outputs,
                  u32 first, u32 rows) {
  float* tile = reinterpret_cast<float*>(block.shared);
  const u32 t0 = block.x * kTileTokens, r0 = block.y * kTileRows;
  block.each([&](unsigned thread) {
    const u32 group = t0 / n, in_group = t0 - group * n;
    const i64 modulus = static_cast<i64>(q), half = modulus / 2;
    for (unsigned i = thread; i < kTileRows * kTileTokens; i += kTileThreads) {
      const u32 t = i % kTileTokens;
      const u64 r = r0 + i / kTileTokens;
      if (t0 + t >= tokens || r >= rows) continue;
      const i64 masked = static_cast<i64>(product[(group * static_cast<u64>(rows) + r) * n + in_group + t]);
      i64 difference = (load_kept(reply, r, t0 + t, tokens, reply_bytes) << dropped_bits) - masked;
      difference -= modulus & ((half - difference) >> 63);  // where it is above q / 2
      difference += modulus & ((difference + half) >> 63);  // where it is below -q / 2
      const double factor = weight[first + r] * inverse_scale[t0 + t];
      tile[t * kTileStride + i / kTileTokens] = narrowed(static_cast<double>(difference) * factor);
    }
  });
  block.own([&](unsigned thread) {
    for (unsigned i = thread; i < kTileRows * kTileTokens; i += kTileThreads) {
      const u32 t = i / kTileRows, r = i % kTileRows;
      if (t0 + t < tokens && r0 + r < rows) {
        y[static_cast<u64>(t0 + t) * outputs + first + r0 + r] = tile[t * kTileStride + r];
      }
    }
  });
}

PT_FN void linear_residues32(const Block& block, u32* out, const i8* values, u64 q, u64 count) {
  residues(block, out, values, q, count);
}
PT_FN void linear_residues64(const Block& block, u64* out, const i8* values, u64 q, u64 count) {
  residues(block, out, values, q, count);
}

PT_FN void linear_embed32(const Block& block, u32* out, const u32* product, const i8* errors, const float* x,
                          const double* weight, const double* scale, u64 q, u32 n, u32 tokens, u32 width, u32 first,
                          u32 rows, u32 groups, u32 error_stride) {
  embed(block, out, product, errors, x, weight, scale, q, n, tokens, width, first, rows, groups, error_stride);
}
PT_FN void linear_embed64(const Block& block, u64* out, const u64* product, const i8* errors, const float* x,
                          const double* weight, const double* scale, u64 q, u32 n, u32 tokens, u32 width, u32 first,
                          u32 rows, u32 groups, u32 error_stride) {
  embed(block, out, product, errors, x, weight, scale, q, n, tokens, width, first, rows, groups, error_stride);
}

PT_FN void linear_shorten32(const Block& block, u8* reply, const u32* product, u32 dropped_bits, u32 reply_bytes,
                            u32 tokens, u64 column, u64 columns, u32 blocks_a_row) {
  shorten(block, reply, product, dropped_bits, reply_bytes, tokens, column, columns, blocks_a_row);
}
PT_FN void linear_shorten64(const Block& block, u8* reply, const u64* product, u32 dropped_bits, u32 reply_bytes,
                            u32 tokens, u64 column, u64 columns, u32 blocks_a_row) {
  shorten(block, reply, product, dropped_bits, reply_bytes, tokens, column, columns, blocks_a_row);
}

PT_FN void linear_reveal32(const Block& block, float* y, const u8* reply, const u32* product, const double* weight,
                           const double* inverse_scale, u64 q, u32 dropped_bits, u32 reply_bytes, u32 n, u32 tokens,
                           u32 outputs, u32 first, u32 rows) {
  reveal(block, y, reply, product, weight, inverse_scale, q, dropped_bits, reply_bytes, n, tokens, outputs, first,
         rows);
}
PT_FN void linear_reveal64(const Block& block, float* y, const u8* reply, const u64* product, const double* weight,
                           const double* inverse_scale, u64 q, u32 dropped_bits, u32 reply_bytes, u32 n, u32 tokens,
                           u32 outputs, u32 first, u32 rows) {
  reveal(block, y, reply, product, weight, inverse_scale, q, dropped_bits, reply_bytes, n, tokens, outputs, first,
         rows);
}

}  // namespace pt

// clang-format off
PT_KERNEL(linear_scales, 256,
          (double* scale, double* inverse_scale, const float* x, const double* weight, double room, pt::u32 tokens,
           pt::u32 width),
          scale, inverse_scale, x, weight, room, tokens, width)

PT_KERNEL(linear_residues32, 256, (pt::u32* out, const pt::i8* values, pt::u64 q, pt::u64 count), out, values, q, count)
PT_KERNEL(linear_residues64, 256, (pt::u64* out, const pt::i8* values, pt::u64 q, pt::u64 count), out, values, q, count)

PT_KERNEL(linear_embed32, 256,
          (pt::u32* out, const pt::u32* product, const pt::i8* errors, const float* x, const double* weight,
           const double* scale, pt::u64 q, pt::u32 n, pt::u32 tokens, pt::u32 width, pt::u32 first, pt::u32 rows,
           pt::u32 groups, pt::u32 error_stride),
          out, product, errors, x, weight, scale, q, n, tokens, width, first, rows, groups, error_stride)
PT_KERNEL(linear_embed64, 256,
          (pt::u64* out, const pt::u64* product, const pt::i8* errors, const float* x, const double* weight,
           const double* scale, pt::u64 q, pt::u32 n, pt::u32 tokens, pt::u32 width, pt::u32 first, pt::u32 rows,
           pt::u32 groups, pt::u32 error_stride),
          out, product, errors, x, weight, scale, q, n, tokens, width, first, rows, groups, error_stride)

PT_KERNEL(linear_shorten32, 256,
          (pt::u8* reply, const pt::u32* product, pt::u32 dropped_bits, pt::u32 reply_bytes, pt::u32 tokens,
           pt::u64 column, pt::u64 columns, pt::u32 blocks_a_row),
          reply, product, dropped_bits, reply_bytes, tokens, column, columns, blocks_a_row)
PT_KERNEL(linear_shorten64, 256,
          (pt::u8* reply, const pt::u64* product, pt::u32 dropped_bits, pt::u32 reply_bytes, pt::u32 tokens,
           pt::u64 column, pt::u64 columns, pt::u32 blocks_a_row),
          reply, product, dropped_bits, reply_bytes, tokens, column, columns, blocks_a_row)

PT_KERNEL(linear_reveal32, 256,
          (float* y, const pt::u8* reply, const pt::u32* product, const double* weight, const double* inverse_scale,
           pt::u64 q, pt::u32 dropped_bits, pt::u32 reply_bytes, pt::u32 n, pt::u32 tokens, pt::u32 outputs,
           pt::u32 first, pt::u32 rows),
          y, reply, product, weight, inverse_scale, q, dropped_bits, reply_bytes, n, tokens, outputs, first, rows)
PT_KERNEL(linear_reveal64, 256,
          (float* y, const pt::u8* reply, const pt::u64* product, const double* weight, const double* inverse_scale,
           pt::u64 q, pt::u32 dropped_bits, pt::u32 reply_bytes, pt::u32 n, pt::u32 tokens, pt::u32 outputs,
           pt::u32 first, pt::u32 rows),
          y, reply, product, weight, inverse_scale, q, dropped_bits, reply_bytes, n, tokens, outputs, first, rows)
// clang-format on
