// The operations of RNS-CKKS on rows of residues, but for the transforms and the matrix product.
//
// Every word in and out is in [0, q) of its row's prime unless a kernel says otherwise; sums of products are taken in
// 128 bits and reduced once. A grid is (features * N / (threads * words a thread), limbs or targets, components).
// Tables: moduli [prime][4] as load_modulus takes it; pairs are a factor in [0, q) and its Shoup companion.
#include "residues.cuh"

namespace pt {

constexpr unsigned kWords = 4;     // of a thread, where memory is the limit
constexpr unsigned kSumWords = 2;  // of a thread, where sums fill the registers
constexpr unsigned kTargets = 8;   // rows that a thread of a base conversion makes at once
constexpr unsigned kTerms = 4;     // rows that one linear combination adds up

// out = x + y, or x - y if minus. x_step, y_step: see Operand.
PT_FN void residues_add(const Block& block, u64* out, const u64* x, const u64* y, const u64* moduli, u32 n,
                        u32 features, u32 limbs, u32 x_step, u32 y_step, u32 minus) {
  const Place place(block, features, kWords);
  const u32 limb = block.y, component = block.z;
  const Modulus m = load_modulus(moduli, limb);
  const u64* const a = Operand{x, x_step, limbs}.row(place.feature, component, limb, n) + place.word;
  const u64* const b = Operand{y, y_step, limbs}.row(place.feature, component, limb, n) + place.word;
  u64* const to = out + ((u64{place.feature} * 2 + component) * limbs + limb) * n + place.word;
  block.own([&](unsigned t) {
    u64 u[kWords], v[kWords];
    PT_UNROLL
    for (unsigned k = 0; k < kWords; ++k) {
      u[k] = a[k * block.threads + t];
      v[k] = b[k * block.threads + t];
    }
    PT_UNROLL
    for (unsigned k = 0; k < kWords; ++k) {
      to[k * block.threads + t] = minus != 0 ? m.sub(u[k], v[k]) : m.add(u[k], v[k]);
    }
  });
}

// out = sum over t < terms of weights[limb][t][feature] x_t, to component 0 + constants[limb][feature] if constant;
// added to what out holds if accumulate. weights and constants in [0, q). terms <= kTerms.
PT_FN void residues_combine(const Block& block, u64* kept, u64* divided, const u64* x0, const u64* x1, const u64* x2,
                            const u64* x3, const u64* weights, const u64* constants, const u64* moduli, u32 n,
                            u32 features, u32 kept_limbs, u32 kept_stride, u32 divided_limbs, u32 terms, u32 step0,
                            u32 step1, u32 step2, u32 step3, u32 limbs0, u32 limbs1, u32 limbs2, u32 limbs3,
                            u32 constant, u32 accumulate) {
  const Place place(block, features, kSumWords);
  const u32 limb = block.y, component = block.z;
  const Modulus m = load_modulus(moduli, limb);
  const Operand operands[kTerms] = {{x0, step0, limbs0}, {x1, step1, limbs1}, {x2, step2, limbs2}, {x3, step3, limbs3}};
  const u64* const weight = weights + u64{limb} * terms * features + place.feature;
  const u64 shift = constant != 0 && component == 0 ? constants[u64{limb} * features + place.feature] : 0;
  u64* const to =
      SplitRows{kept, divided, kept_limbs, kept_stride, divided_limbs}.row(place.feature, component, limb, n) +
      place.word;
  block.own([&](unsigned t) {
    Wide sums[kSumWords];
    PT_UNROLL
    for (unsigned k = 0; k < kSumWords; ++k) sums[k] = Wide{accumulate != 0 ? to[k * block.threads + t] : 0, 0};
    PT_UNROLL
    for (unsigned i = 0; i < kTerms; ++i) {
      if (i >= terms) continue;
      const u64* const x = operands[i].row(place.feature, component, limb, n) + place.word;
      const u64 w = weight[u64{i} * features];
      PT_UNROLL
      for (unsigned k = 0; k < kSumWords; ++k) sums[k] = add_product(sums[k], x[k * block.threads + t], w);
    }
    PT_UNROLL
    for (unsigned k = 0; k < kSumWords; ++k) to[k * block.threads + t] = m.add(m.reduce_wide(sums[k]), shift);
  });
}

// out[0] = sum over the features of x.
PT_FN void residues_sum(const Block& block, u64* out, const u64* x, const u64* moduli, u32 n, u32 features, u32 limbs) {
  const Place place(block, 1, 1);
  const u32 limb = block.y, component = block.z;
  const Modulus m = load_modulus(moduli, limb);
  const u64 row = u64{component} * limbs + limb;
  block.own([&](unsigned t) {
    const u64* const from = x + row * n + place.word + t;
    Wide sum{0, 0};
    for (u32 f = 0; f < features; ++f) sum = add_product(sum, from[u64{f} * 2 * limbs * n], 1);
    out[row * n + place.word + t] = m.reduce_wide(sum);
  });
}

// The three components of a product of ciphertexts, degree[feature][3][limb], the last one in scaled[feature][limb]
// too. Of one feature the sum over `terms` features of x and y if summed, else of x and y of that feature (terms = 1).
// All three times multipliers[limb][feature], in [0, q), if multiplied.
PT_FN void residues_tensor(const Block& block, u64* degree, u64* scaled, const u64* x, const u64* y,
                           const u64* multipliers, const u64* moduli, u32 n, u32 features, u32 terms, u32 limbs,
                           u32 x_step, u32 y_step, u32 x_limbs, u32 y_limbs, u32 multiplied) {
  const Place place(block, features, kSumWords);
  const u32 limb = block.y;
  const Modulus m = load_modulus(moduli, limb);
  const Operand left{x, x_step, x_limbs}, right{y, y_step, y_limbs};
  const u64 w = multiplied != 0 ? multipliers[u64{limb} * features + place.feature] : 1;
  u64* const to = degree + (u64{place.feature} * 3 * limbs + limb) * n + place.word;
  u64* const copy = scaled + (u64{place.feature} * limbs + limb) * n + place.word;
  const u64 component = u64{limbs} * n;
  block.own([&](unsigned t) {
    Wide sums[3][kSumWords];
    PT_UNROLL
    for (unsigned k = 0; k < kSumWords; ++k) sums[0][k] = sums[1][k] = sums[2][k] = Wide{0, 0};
    PT_ROLLED
    for (u32 i = 0; i < terms; ++i) {
      const u32 f = place.feature + i;  // one of the two is 0
      const u64 *const a0 = left.row(f, 0, limb, n) + place.word, *const a1 = left.row(f, 1, limb, n) + place.word;
      const u64 *const b0 = right.row(f, 0, limb, n) + place.word, *const b1 = right.row(f, 1, limb, n) + place.word;
      PT_UNROLL
      for (unsigned k = 0; k < kSumWords; ++k) {
        const unsigned at = k * block.threads + t;
        const u64 u0 = a0[at], u1 = a1[at], v0 = b0[at], v1 = b1[at];
        sums[0][k] = add_product(sums[0][k], u0, v0);
        sums[1][k] = add_product(add_product(sums[1][k], u0, v1), u1, v0);
        sums[2][k] = add_product(sums[2][k], u1, v1);
      }
    }
    PT_UNROLL
    for (unsigned k = 0; k < kSumWords; ++k) {
      const unsigned at = k * block.threads + t;
      u64 d[3];
      PT_UNROLL
      for (unsigned c = 0; c < 3; ++c) {
        d[c] = m.reduce_wide(sums[c][k]);
        if (multiplied != 0) d[c] = m.mul(d[c], w);
        to[c * component + at] = d[c];
      }
      copy[at] = d[2];
    }
  });
}

// Base conversion (Halevi, Polyakov, Shoup, "An Improved RNS Variant of the BFV Homomorphic Encryption Scheme", 2018,
// section 2.3) of words y_s that are multiplied by the inverse cofactors already: with u = floor(1/2 + sum of y_s
// inverses[s], in doubles, in order), out[target] = sum of weights[target][s] y_s + weights[target][count] u modulo the
// target's prime.
//
// y [vector][rows_in][N], out [vector][rows_out][N], row = target. A block makes the targets of group block.y: groups
// [group][4] are its first source, the number of its sources, its first target and the number of its targets, at most
// kTargets. sources: rows of y; targets: primes. weights [target][width], in [0, q) of the target's prime. y_s below
// 2^53. Shared memory: kTargets (width + 1) words.
PT_FN void residues_convert(const Block& block, u64* out, const u64* y, const u32* groups, const u32* sources,
                            const double* inverses, const u32* targets, const u64* weights, const u64* moduli, u32 n,
                            u32 vectors, u32 rows_in, u32 rows_out, u32 width) {
  const Place place(block, vectors, 1);
  const u32* const group = groups + u64{4} * block.y;
  const u32 first = group[0], count = group[1], target = group[2], made = group[3];
  u64* const table = reinterpret_cast<u64*>(block.shared);  // [source, then quotient][target]
  block.each([&](unsigned t) {
    for (unsigned i = t; i < (count + 1) * kTargets; i += block.threads) {
      const u32 s = i / kTargets, r = i % kTargets;
      table[i] = r < made ? weights[u64{target + r} * width + s] : 0;
    }
  });
  block.own([&](unsigned t) {
    Wide sums[kTargets];
    PT_UNROLL
    for (unsigned r = 0; r < kTargets; ++r) sums[r] = Wide{0, 0};
    double quotient = 0;
    PT_UNROLL_TWICE
    for (u32 s = 0; s < count; ++s) {
      const u64 word = y[(u64{place.feature} * rows_in + sources[first + s]) * n + place.word + t];
      quotient += static_cast<double>(word) * inverses[first + s];
      PT_UNROLL
      for (unsigned r = 0; r < kTargets; ++r) sums[r] = add_product(sums[r], word, table[s * kTargets + r]);
    }
    const u64 u = rounded(quotient);
    PT_UNROLL
    for (unsigned r = 0; r < kTargets; ++r) {
      if (r >= made) continue;
      const Modulus m = load_modulus(moduli, targets[target + r]);
      out[(u64{place.feature} * rows_out + target + r) * n + place.word + t] =
          m.reduce_wide(add_product(sums[r], u, table[count * kTargets + r]));
    }
  });
}

// The inner products of a component's digits with the two components of a switching key, plus what was there before
// times the special primes' product: limb by limb what divides into a switched ciphertext.
//
// x [feature][components][limb][N]: the last component is the one that is switched, its rows being the digits' own
// residues; the components before (one or two) are added times raise[limb] (in [0, q)). extended [feature][row][N]:
// digit after digit the rows of the targets that are not its own, in order. key [digit][2][prime][N].
PT_FN void residues_switch(const Block& block, u64* kept, u64* divided, const u64* x, const u64* extended,
                           const u64* key, const u64* raise, const u64* moduli, u32 n, u32 features, u32 components,
                           u32 limbs, u32 specials, u32 max_limbs, u32 digits, u32 digit_limbs, u32 kept_limbs) {
  const Place place(block, features, kSumWords);
  const u32 target = block.y, all = limbs + specials, primes = max_limbs + specials;
  const u32 prime = target < limbs ? target : max_limbs + (target - limbs);
  const Modulus m = load_modulus(moduli, prime);
  const u64* const own = x + (u64{place.feature} * components + components - 1) * limbs * n + place.word;
  const u64* const before = x + u64{place.feature} * components * limbs * n + place.word;
  const u64* const others = extended + u64{place.feature} * (digits * all - limbs) * n + place.word;
  const SplitRows out{kept, divided, kept_limbs, 2 * kept_limbs, all - kept_limbs};
  u64* const to0 = out.row(place.feature, 0, target, n) + place.word;
  u64* const to1 = out.row(place.feature, 1, target, n) + place.word;
  block.own([&](unsigned t) {
    Wide sums[2][kSumWords];
    PT_UNROLL
    for (unsigned k = 0; k < kSumWords; ++k) sums[0][k] = sums[1][k] = Wide{0, 0};
    if (target < limbs) {
      const u64 w = raise[target];
      PT_UNROLL
      for (unsigned c = 0; c < 2; ++c) {
        if (c + 1 >= components) continue;
        PT_UNROLL
        for (unsigned k = 0; k < kSumWords; ++k) {
          sums[c][k] = add_product(sums[c][k], before[(u64{c} * limbs + target) * n + k * block.threads + t], w);
        }
      }
    }
    PT_UNROLL_TWICE
    for (u32 d = 0; d < digits; ++d) {
      const u32 begin = d * digit_limbs, end = begin + digit_limbs < limbs ? begin + digit_limbs : limbs;
      const bool is_own = target >= begin && target < end;
      const u32 skipped = target >= end ? end : begin;  // own rows are left out
      const u64* const words = is_own ? own + u64{target} * n : others + u64{d * all + target - skipped} * n;
      const u64* const key0 = key + (u64{d} * 2 * primes + prime) * n + place.word;
      const u64* const key1 = key0 + u64{primes} * n;
      PT_UNROLL
      for (unsigned k = 0; k < kSumWords; ++k) {
        const unsigned at = k * block.threads + t;
        const u64 word = words[at];
        sums[0][k] = add_product(sums[0][k], word, key0[at]);
        sums[1][k] = add_product(sums[1][k], word, key1[at]);
      }
    }
    PT_UNROLL
    for (unsigned k = 0; k < kSumWords; ++k) {
      to0[k * block.threads + t] = m.reduce_wide(sums[0][k]);
      to1[k * block.threads + t] = m.reduce_wide(sums[1][k]);
    }
  });
}

// out = (kept - rest) factors[limb], all [feature][2][limb][N]; out may be kept.
PT_FN void residues_divide(const Block& block, u64* out, const u64* kept, const u64* rest, const u64* factors,
                           const u64* moduli, u32 n, u32 features, u32 limbs) {
  const Place place(block, features, kWords);
  const u32 limb = block.y;
  const Modulus m = load_modulus(moduli, limb);
  const u64 w = factors[2 * limb], w_shoup = factors[2 * limb + 1];
  const u64 first = ((u64{place.feature} * 2 + block.z) * limbs + limb) * n + place.word;
  block.own([&](unsigned t) {
    u64 a[kWords], b[kWords];
    PT_UNROLL
    for (unsigned k = 0; k < kWords; ++k) {
      a[k] = kept[first + k * block.threads + t];
      b[k] = rest[first + k * block.threads + t];
    }
    PT_UNROLL
    for (unsigned k = 0; k < kWords; ++k) {
      out[first + k * block.threads + t] = subtract_multiply(m, a[k], b[k], w, w_shoup);
    }
  });
}

// The same, word i taken from place index[i] of the row; out is another array. index is public.
PT_FN void residues_divide_permuted(const Block& block, u64* out, const u64* kept, const u64* rest, const u64* factors,
                                    const u32* index, const u64* moduli, u32 n, u32 features, u32 limbs) {
  const Place place(block, features, kWords);
  const u32 limb = block.y;
  const Modulus m = load_modulus(moduli, limb);
  const u64 w = factors[2 * limb], w_shoup = factors[2 * limb + 1];
  const u64 row = ((u64{place.feature} * 2 + block.z) * limbs + limb) * n;
  block.own([&](unsigned t) {
    u64 a[kWords], b[kWords];
    PT_UNROLL
    for (unsigned k = 0; k < kWords; ++k) {
      const u64 from = row + index[place.word + k * block.threads + t];
      a[k] = kept[from];
      b[k] = rest[from];
    }
    PT_UNROLL
    for (unsigned k = 0; k < kWords; ++k) {
      out[row + place.word + k * block.threads + t] = subtract_multiply(m, a[k], b[k], w, w_shoup);
    }
  });
}

// x times plain [feature][limb][N], one feature of it for all if plain_step is 0 (else limbs).
PT_FN void residues_multiply(const Block& block, u64* kept, u64* divided, const u64* x, const u64* plain,
                             const u64* moduli, u32 n, u32 features, u32 limbs, u32 kept_limbs, u32 plain_step) {
  const Place place(block, features, kWords);
  const u32 limb = block.y, component = block.z;
  const Modulus m = load_modulus(moduli, limb);
  const u64* const a = Operand{x, 2 * limbs, limbs}.row(place.feature, component, limb, n) + place.word;
  const u64* const b = plain + (u64{place.feature} * plain_step + limb) * n + place.word;
  u64* const to =
      SplitRows{kept, divided, kept_limbs, 2 * kept_limbs, limbs - kept_limbs}.row(place.feature, component, limb, n) +
      place.word;
  block.own([&](unsigned t) {
    u64 u[kWords], v[kWords];
    PT_UNROLL
    for (unsigned k = 0; k < kWords; ++k) {
      u[k] = a[k * block.threads + t];
      v[k] = b[k * block.threads + t];
    }
    PT_UNROLL
    for (unsigned k = 0; k < kWords; ++k) to[k * block.threads + t] = m.mul(u[k], v[k]);
  });
}

// out[feature][limb] = coefficients[feature], any signed words, modulo prime `limb`.
PT_FN void residues_reduce(const Block& block, u64* out, const i64* coefficients, const u64* moduli, u32 n,
                           u32 features, u32 limbs) {
  const Place place(block, features, kWords);
  const u32 limb = block.y;
  const Modulus m = load_modulus(moduli, limb);
  const i64* const from = coefficients + u64{place.feature} * n + place.word;
  u64* const to = out + (u64{place.feature} * limbs + limb) * n + place.word;
  block.own([&](unsigned t) {
    PT_UNROLL
    for (unsigned k = 0; k < kWords; ++k) to[k * block.threads + t] = m.reduce_signed(from[k * block.threads + t]);
  });
}

}  // namespace pt

// clang-format off
PT_KERNEL(residues_add, 256,
          (pt::u64* out, const pt::u64* x, const pt::u64* y, const pt::u64* moduli, pt::u32 n, pt::u32 features,
           pt::u32 limbs, pt::u32 x_step, pt::u32 y_step, pt::u32 minus),
          out, x, y, moduli, n, features, limbs, x_step, y_step, minus)
PT_KERNEL(residues_combine, 256,
          (pt::u64* kept, pt::u64* divided, const pt::u64* x0, const pt::u64* x1, const pt::u64* x2, const pt::u64* x3,
           const pt::u64* weights, const pt::u64* constants, const pt::u64* moduli, pt::u32 n, pt::u32 features,
           pt::u32 kept_limbs, pt::u32 kept_stride, pt::u32 divided_limbs, pt::u32 terms, pt::u32 step0, pt::u32 step1,
           pt::u32 step2, pt::u32 step3, pt::u32 limbs0, pt::u32 limbs1, pt::u32 limbs2, pt::u32 limbs3,
           pt::u32 constant, pt::u32 accumulate),
          kept, divided, x0, x1, x2, x3, weights, constants, moduli, n, features, kept_limbs, kept_stride,
          divided_limbs, terms, step0, step1, step2, step3, limbs0, limbs1, limbs2, limbs3, constant, accumulate)
PT_KERNEL(residues_sum, 256,
          (pt::u64* out, const pt::u64* x, const pt::u64* moduli, pt::u32 n, pt::u32 features, pt::u32 limbs), out, x,
          moduli, n, features, limbs)
PT_KERNEL(residues_tensor, 256,
          (pt::u64* degree, pt::u64* scaled, const pt::u64* x, const pt::u64* y, const pt::u64* multipliers,
           const pt::u64* moduli, pt::u32 n, pt::u32 features, pt::u32 terms, pt::u32 limbs, pt::u32 x_step,
           pt::u32 y_step, pt::u32 x_limbs, pt::u32 y_limbs, pt::u32 multiplied),
          degree, scaled, x, y, multipliers, moduli, n, features, terms, limbs, x_step, y_step, x_limbs, y_limbs,
          multiplied)
PT_KERNEL(residues_convert, 256,
          (pt::u64* out, const pt::u64* y, const pt::u32* groups, const pt::u32* sources, const double* inverses,
           const pt::u32* targets, const pt::u64* weights, const pt::u64* moduli, pt::u32 n, pt::u32 vectors,
           pt::u32 rows_in, pt::u32 rows_out, pt::u32 width),
          out, y, groups, sources, inverses, targets, weights, moduli, n, vectors, rows_in, rows_out, width)
PT_KERNEL(residues_switch, 256,
          (pt::u64* kept, pt::u64* divided, const pt::u64* x, const pt::u64* extended, const pt::u64* key,
           const pt::u64* raise, const pt::u64* moduli, pt::u32 n, pt::u32 features, pt::u32 components, pt::u32 limbs,
           pt::u32 specials, pt::u32 max_limbs, pt::u32 digits, pt::u32 digit_limbs, pt::u32 kept_limbs),
          kept, divided, x, extended, key, raise, moduli, n, features, components, limbs, specials, max_limbs, digits,
          digit_limbs, kept_limbs)
PT_KERNEL(residues_divide, 256,
          (pt::u64* out, const pt::u64* kept, const pt::u64* rest, const pt::u64* factors, const pt::u64* moduli,
           pt::u32 n, pt::u32 features, pt::u32 limbs),
          out, kept, rest, factors, moduli, n, features, limbs)
PT_KERNEL(residues_divide_permuted, 256,
          (pt::u64* out, const pt::u64* kept, const pt::u64* rest, const pt::u64* factors, const pt::u32* index,
           const pt::u64* moduli, pt::u32 n, pt::u32 features, pt::u32 limbs),
          out, kept, rest, factors, index, moduli, n, features, limbs)
PT_KERNEL(residues_multiply, 256,
          (pt::u64* kept, pt::u64* divided, const pt::u64* x, const pt::u64* plain, const pt::u64* moduli, pt::u32 n,
           pt::u32 features, pt::u32 limbs, pt::u32 kept_limbs, pt::u32 plain_step),
          kept, divided, x, plain, moduli, n, features, limbs, kept_limbs, plain_step)
PT_KERNEL(residues_reduce, 256,
          (pt::u64* out, const pt::i64* coefficients, const pt::u64* moduli, pt::u32 n, pt::u32 features,
           pt::u32 limbs),
          out, coefficients, moduli, n, features, limbs)
