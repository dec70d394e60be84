// Exact products modulo q of small signed weights with residues, on the tensor cores.
//
// A residue is split into P unsigned bytes, a weight into one or two signed ones: each pair of byte planes is a product
// of bytes with exact 32-bit sums, which the warp's registers hold for all P planes of an element, so that the residue
// is put together without the sums ever going through memory. After Bae, Cheon, Hanrot, Park, Stehle, "Plaintext-
// Ciphertext Matrix Multiplication and FHE Bootstrapping: Fast and Fused", CRYPTO 2024, with byte digits.
//
// Both operands are first laid out in the order in which the main kernel's threads hold them, in chunks of kStep terms
// of the sum for one tile, which it copies as they are. Its fragments take the depth in another order than memory, the
// same one for both (a sum does not mind): thread t of a group of four holds terms 8 t to 8 t + 7 of every 32, where
// the instruction counts 4 t to 4 t + 3 and 16 + 4 t to 16 + 4 t + 3.
#include "gemm.cuh"

namespace pt {

constexpr u32 kTileRows = 128;  // of op(W), a block
constexpr u32 kStep = 64;       // depth of a chunk: two instructions' worth
constexpr u32 kStages = 4;      // chunks in shared memory
constexpr u32 kThreads = 256;   // 2 x 4 warps of 64 rows and 8 or 16 columns
constexpr u32 kWarpColumns = 4;
constexpr u32 kPieces = 4;  // of 16 rows, of a warp
constexpr u32 kBand = 16;   // row tiles that take turns: near to a square of tiles at once, for the L2 cache
constexpr u32 kLeftBytes = kTileRows * kStep;

// A block's tile of residues of one kind of word in P planes.
template <class Word, u32 P>
struct Tile {
  static constexpr u32 kGroups = sizeof(Word) == 4 ? 2 : 1;  // of 8 columns, of a warp
  static constexpr u32 kColumns = kWarpColumns * kGroups * 8;
  static constexpr u32 kProducts = P * kGroups;        // of 8 byte columns, of a warp
  static constexpr u32 kBytes = kColumns * P * kStep;  // of a chunk
  static constexpr u32 kStage = kLeftBytes + kBytes;
};

// Weights [bytes][rows][cols] as chunks [byte][row tile][step][32 terms][16 rows][lane][16 bytes] of rows row_begin to
// row_end of op(W); zeros outside it. Grid: steps, row tiles, bytes. Shared: kTileRows * kPitch bytes.
PT_FN void gemm_left(const Block& block, u8* out, const i8* weights, u32 rows, u32 cols, u32 transpose, u32 row_begin,
                     u32 row_end) {
  constexpr u32 kPitch = kStep + 4;  // 17 words: what a warp writes, down rows or along them, lies in different banks
  const u32 depth = transpose ? rows : cols, steps = (depth + kStep - 1) / kStep;
  const u32 tiles = (row_end - row_begin + kTileRows - 1) / kTileRows;
  const i8* plane = weights + static_cast<u64>(block.z) * rows * cols;
  u8* chunk = out + ((static_cast<u64>(block.z) * tiles + block.y) * steps + block.x) * kLeftBytes;
  block.each([&](unsigned thread) {
    PT_UNROLL for (u32 i = 0; i < kLeftBytes / kThreads; ++i) {
      // Neighbours in memory to neighbouring threads.
      const u32 at = i * kThreads + thread;
      const u32 r = transpose ? at % kTileRows : at / kStep, k = transpose ? at / kTileRows : at % kStep;
      const u32 row = row_begin + block.y * kTileRows + r, term = block.x * kStep + k;
      const u64 from = transpose ? static_cast<u64>(term) * cols + row : static_cast<u64>(row) * cols + term;
      block.shared[r * kPitch + k] = row < row_end && term < depth ? static_cast<u8>(plane[from]) : 0;
    }
  });
  block.own([&](unsigned thread) {
    PT_UNROLL for (u32 i = 0; i < kLeftBytes / 16 / kThreads; ++i) {
      const u32 at = i * kThreads + thread, lane = at % kWarp;
      const u32 row = at / kWarp % (kTileRows / 16) * 16 + lane / 4, half = at / (kTileRows / 16 * kWarp);
      const u32* upper = reinterpret_cast<const u32*>(block.shared + row * kPitch + half * 32 + lane % 4 * 8);
      const u32* lower = upper + 8 * kPitch / 4;
      reinterpret_cast<Quad*>(chunk)[at] = Quad{{upper[0], lower[0], upper[1], lower[1]}};
    }
  });
}

// The byte planes of four words of 4 bytes.
template <u32 P>
PT_FN void planes_of(const u32 (&word)[4], u32 (&plane)[P]) {
  static_assert(P == 4, "planes");
  split_bytes(word, plane);
}
// The P lowest byte planes of four words of 8 bytes.
template <u32 P>
PT_FN void planes_of(const u64 (&word)[4], u32 (&plane)[P]) {
  static_assert(4 < P && P <= 8, "planes");
  u32 low[4], high[4], low_planes[4], high_planes[4];
  PT_UNROLL for (u32 i = 0; i < 4; ++i) {
    low[i] = static_cast<u32>(word[i]);
    high[i] = static_cast<u32>(word[i] >> 32);
  }
  split_bytes(low, low_planes);
  split_bytes(high, high_planes);
  PT_UNROLL for (u32 p = 0; p < 4; ++p) plane[p] = low_planes[p];
  PT_UNROLL for (u32 p = 4; p < P; ++p) plane[p] = high_planes[p - 4];
}

// Residues [depth][batch][columns] as chunks [batch][column tile][step][32 terms][warp's columns][plane][column][32
// bytes]; zeros outside. Grid: column tiles, steps, batch; blocks of 4 threads a column of a tile.
template <class Word, u32 P>
PT_FN void pack_residues(const Block& block, u8* out, const Word* words, u32 depth, u32 batch, u32 columns) {
  using T = Tile<Word, P>;
  const u32 tiles = (columns + T::kColumns - 1) / T::kColumns, steps = (depth + kStep - 1) / kStep;
  u8* chunk = out + ((static_cast<u64>(block.z) * tiles + block.x) * steps + block.y) * T::kBytes;
  block.own([&](unsigned thread) {
    // Two threads a column, next to each other, write the 32 bytes of a plane; each reads 16 words.
    const u32 part = thread % 2, c = thread / 2 % T::kColumns, half = thread / 2 / T::kColumns;
    const u32 column = block.x * T::kColumns + c, first = block.y * kStep + half * 32 + part * 16;
    Quad bytes[P];
    PT_UNROLL for (u32 i = 0; i < 4; ++i) {
      Word word[4];
      PT_UNROLL for (u32 j = 0; j < 4; ++j) {
        const u32 k = first + 4 * i + j;
        const u64 from = (static_cast<u64>(k) * batch + block.z) * columns + column;
        word[j] = k < depth && column < columns ? words[from] : 0;
      }
      u32 plane[P];
      planes_of<P>(word, plane);
      PT_UNROLL for (u32 p = 0; p < P; ++p) bytes[p].word[i] = plane[p];
    }
    const u32 warp_column = c / (T::kGroups * 8), within = c % (T::kGroups * 8);
    u8* to = chunk + (half * kWarpColumns + warp_column) * T::kProducts * 256 + within * 32 + part * 16;
    PT_UNROLL for (u32 p = 0; p < P; ++p) *reinterpret_cast<Quad*>(to + p * T::kGroups * 256) = bytes[p];
  });
}

// out [rows][batch][columns] = left right + 256 out mod q, in [0, q), left being plane `byte` of the weights; without
// the last term when `add` is 0. Every sum stays in 32 bits: depth at most 65536, of terms at most 128 * 255.
// Grid: row tiles x column tiles, 1, batch. Shared: kStages * kStage.
template <class Word, u32 P>
PT_FN void multiply_planes(const Block& block, Word* out, const u8* left, const u8* right, const u64* moduli, u32 rows,
                           u32 columns, u32 batch, u32 steps, u32 byte, u32 add) {
  using T = Tile<Word, P>;
  struct Held {
    i32 sum[kPieces][T::kProducts][4];
    Quad a[2][kPieces];  // two sets: one is loaded while the other is multiplied
    Pair b[2][T::kProducts];
  };
  PerThread<Held> held(block);
  Copies copies(block);

  const u32 row_tiles = (rows + kTileRows - 1) / kTileRows;
  const u32 column_tiles = (columns + T::kColumns - 1) / T::kColumns;
  const u32 band = block.x / (kBand * column_tiles), inside = block.x % (kBand * column_tiles);
  const u32 height = row_tiles - band * kBand < kBand ? row_tiles - band * kBand : kBand;
  const u32 row_tile = band * kBand + inside % height, column_tile = inside / height;
  const u8* left_chunks = left + (static_cast<u64>(byte) * row_tiles + row_tile) * steps * kLeftBytes;
  const u8* right_chunks = right + (static_cast<u64>(block.z) * column_tiles + column_tile) * steps * T::kBytes;

  // Starts copying a step's chunks to its stage; past the last one an empty group, so that the count goes on.
  const auto fetch = [&](unsigned thread, u32 step) {
    if (step < steps) {
      u8* stage = block.shared + step % kStages * T::kStage + thread * 16;
      const u8* from = left_chunks + static_cast<u64>(step) * kLeftBytes + thread * 16;
      PT_UNROLL for (u32 at = 0; at < kLeftBytes; at += kThreads * 16) copies.start(thread, stage + at, from + at);
      from = right_chunks + static_cast<u64>(step) * T::kBytes + thread * 16;
      PT_UNROLL for (u32 at = 0; at < T::kBytes; at += kThreads * 16) {
        const bool whole = at + kThreads * 16 <= T::kBytes;  // known to the compiler
        if (whole || at + thread * 16 < T::kBytes) copies.start(thread, stage + kLeftBytes + at, from + at);
      }
    }
    copies.commit(thread);
  };
  // Fragments of 32 terms of a step from its stage to a set of registers.
  const auto load = [&](unsigned thread, u32 step, u32 half, u32 set) {
    const u8* stage = block.shared + step % kStages * T::kStage;
    const u32 warp = thread / kWarp, lane = thread % kWarp;
    const Quad* a = reinterpret_cast<const Quad*>(stage);
    const Pair* b = reinterpret_cast<const Pair*>(stage + kLeftBytes);
    PT_UNROLL for (u32 i = 0; i < kPieces; ++i) {
      held[thread].a[set][i] = a[((half * 2 + warp / kWarpColumns) * kPieces + i) * kWarp + lane];
    }
    PT_UNROLL for (u32 j = 0; j < T::kProducts; ++j) {
      held[thread].b[set][j] = b[((half * kWarpColumns + warp % kWarpColumns) * T::kProducts + j) * kWarp + lane];
    }
  };

  block.each([&](unsigned thread) {
    PT_UNROLL for (u32 step = 0; step < kStages - 1; ++step) fetch(thread, step);
    PT_UNROLL for (u32 i = 0; i < kPieces; ++i) {
      PT_UNROLL for (u32 j = 0; j < T::kProducts; ++j) {
        PT_UNROLL for (u32 e = 0; e < 4; ++e) held[thread].sum[i][j][e] = 0;
      }
    }
    copies.template wait<kStages - 2>(thread);
  });
  block.own([&](unsigned thread) { load(thread, 0, 0, 0); });
  for (u32 step = 0; step < steps; ++step) {
    PT_UNROLL for (u32 half = 0; half < 2; ++half) {
      if (half == 0) {
        block.own([&](unsigned thread) {
          load(thread, step, 1, 1);
          fetch(thread, step + kStages - 1);  // to the stage of step - 1, which all had read at the last barrier
        });
      } else {
        block.each([&](unsigned thread) { copies.template wait<kStages - 2>(thread); });  // step + 1 is there
        block.own([&](unsigned thread) { load(thread, step + 1, 0, 0); });  // past the last step: not used
      }
      block.warps([&](unsigned warp) {
        PT_UNROLL for (u32 i = 0; i < kPieces; ++i) {
          PT_UNROLL for (u32 j = 0; j < T::kProducts; ++j) {
            multiply_bytes(warp, [&](unsigned thread) {
              Held& mine = held[thread];
              return Fragments{mine.sum[i][j], mine.a[half][i].word, mine.b[half][j].word};
            });
          }
        }
      });
    }
  }

  block.own([&](unsigned thread) {
    const u64* constants = moduli + block.z * kModulusWords;
    const PlaneModulus m{constants[0], constants[1], constants[2], constants[3], constants[4]};
    const u32 warp = thread / kWarp, lane = thread % kWarp;
    const u32 row = row_tile * kTileRows + warp / kWarpColumns * kPieces * 16 + lane / 4;
    const u32 column = column_tile * T::kColumns + warp % kWarpColumns * T::kGroups * 8 + lane % 4 * 2;
    PT_UNROLL for (u32 i = 0; i < kPieces; ++i) {
      PT_UNROLL for (u32 g = 0; g < T::kGroups; ++g) {
        PT_UNROLL for (u32 e = 0; e < 4; ++e) {
          const u32 r = row + i * 16 + e / 2 * 8, c = column + g * 8 + e % 2;
          if (r < rows && c < columns) {
            Word* to = out + (static_cast<u64>(r) * batch + block.z) * columns + c;
            const u64 before = add ? *to : 0;
            // Sums are below 2^31 in size: |low|, |high| < 2^56, of which less than 2^41 from what was there before.
            i64 low = static_cast<i64>((before & 0xffffffffu) << 8), high = static_cast<i64>(before >> 32 << 8);
            PT_UNROLL for (u32 p = 0; p < P; ++p) {
              const i64 part = held[thread].sum[i][p * T::kGroups + g][e] * (1ll << p % 4 * 8);
              (p < 4 ? low : high) += part;
            }
            *to = residue(Word{0}, low, high, m);
          }
        }
      }
    }
  });
}

// The kinds there are: words of 4 bytes in 4 planes, of 8 bytes in 5 to 8.
template <class... Args>
PT_FN void gemm_pack_u32_4(const Block& block, Args... args) {
  pack_residues<u32, 4>(block, args...);
}
template <class... Args>
PT_FN void gemm_u32_4(const Block& block, Args... args) {
  multiply_planes<u32, 4>(block, args...);
}
template <class... Args>
PT_FN void gemm_pack_u64_5(const Block& block, Args... args) {
  pack_residues<u64, 5>(block, args...);
}
template <class... Args>
PT_FN void gemm_u64_5(const Block& block, Args... args) {
  multiply_planes<u64, 5>(block, args...);
}
template <class... Args>
PT_FN void gemm_pack_u64_6(const Block& block, Args... args) {
  pack_residues<u64, 6>(block, args...);
}
template <class... Args>
PT_FN void gemm_u64_6(const Block& block, Args... args) {
  multiply_planes<u64, 6>(block, args...);
}
template <class... Args>
PT_FN void gemm_pack_u64_7(const Block& block, Args... args) {
  pack_residues<u64, 7>(block, args...);
}
template <class... Args>
PT_FN void gemm_u64_7(const Block& block, Args... args) {
  multiply_planes<u64, 7>(block, args...);
}
template <class... Args>
PT_FN void gemm_pack_u64_8(const Block& block, Args... args) {
  pack_residues<u64, 8>(block, args...);
}
template <class... Args>
PT_FN void gemm_u64_8(const Block& block, Args... args) {
  multiply_planes<u64, 8>(block, args...);
}

}  // namespace pt

PT_KERNEL(gemm_left, 256, (pt::u8* out, const pt::i8* weights, pt::u32 rows, pt::u32 cols, pt::u32 transpose,
          pt::u32 row_begin, pt::u32 row_end), out, weights, rows, cols, transpose, row_begin, row_end)
PT_KERNEL(gemm_pack_u32_4, 256, (pt::u8* out, const pt::u32* words, pt::u32 depth, pt::u32 batch, pt::u32 columns),
          out, words, depth, batch, columns)
PT_KERNEL(gemm_u32_4, 256, (pt::u32* out, const pt::u8* left, const pt::u8* right, const pt::u64* moduli, pt::u32 rows,
          pt::u32 columns, pt::u32 batch, pt::u32 steps, pt::u32 byte, pt::u32 add),
          out, left, right, moduli, rows, columns, batch, steps, byte, add)
PT_KERNEL(gemm_pack_u64_5, 256, (pt::u8* out, const pt::u64* words, pt::u32 depth, pt::u32 batch, pt::u32 columns),
          out, words, depth, batch, columns)
PT_KERNEL(gemm_u64_5, 256, (pt::u64* out, const pt::u8* left, const pt::u8* right, const pt::u64* moduli, pt::u32 rows,
          pt::u32 columns, pt::u32 batch, pt::u32 steps, pt::u32 byte, pt::u32 add),
          out, left, right, moduli, rows, columns, batch, steps, byte, add)
PT_KERNEL(gemm_pack_u64_6, 256, (pt::u8* out, const pt::u64* words, pt::u32 depth, pt::u32 batch, pt::u32 columns),
          out, words, depth, batch, columns)
PT_KERNEL(gemm_u64_6, 256, (pt::u64* out, const pt::u8* left, const pt::u8* right, const pt::u64* moduli, pt::u32 rows,
          pt::u32 columns, pt::u32 batch, pt::u32 steps, pt::u32 byte, pt::u32 add),
          out, left, right, moduli, rows, columns, batch, steps, byte, add)
PT_KERNEL(gemm_pack_u64_7, 256, (pt::u8* out, const pt::u64* words, pt::u32 depth, pt::u32 batch, pt::u32 columns),
          out, words, depth, batch, columns)
PT_KERNEL(gemm_u64_7, 256, (pt::u64* out, const pt::u8* left, const pt::u8* right, const pt::u64* moduli, pt::u32 rows,
          pt::u32 columns, pt::u32 batch, pt::u32 steps, pt::u32 byte, pt::u32 add),
          out, left, right, moduli, rows, columns, batch, steps, byte, add)
PT_KERNEL(gemm_pack_u64_8, 256, (pt::u8* out, const pt::u64* words, pt::u32 depth, pt::u32 batch, pt::u32 columns),
          out, words, depth, batch, columns)
PT_KERNEL(gemm_u64_8, 256, (pt::u64* out, const pt::u8* left, const pt::u8* right, const pt::u64* moduli, pt::u32 rows,
          pt::u32 columns, pt::u32 batch, pt::u32 steps, pt::u32 byte, pt::u32 add),
          out, left, right, moduli, rows, columns, batch, steps, byte, add)
