// Instruction-set paths: what was compiled, what this processor and kernel allow, what is in force.
#pragma once

#include <string>
#include <vector>

namespace privtuner::math {

enum class Isa {
  portable,    // C++17, no intrinsics: the oracle
  avx2,        // AVX2 and FMA
  avx512,      // AVX-512 F, BW, DQ, VL and VNNI (Cascade Lake and later)
  avx512ifma,  // avx512 with IFMA, products of 52-bit words (Ice Lake, Zen 4 and later)
  amx,         // avx512ifma with AMX tiles on int8 (Sapphire Rapids and later)
};

// A path holds the instructions of its base and some more. Of two usable paths the later in the list is the better.
struct IsaPath {
  Isa isa;
  const char* name;
  Isa base;
};
inline constexpr IsaPath kIsaPaths[] = {
    {Isa::portable, "portable", Isa::portable}, {Isa::avx2, "avx2", Isa::portable},
    {Isa::avx512, "avx512", Isa::avx2},         {Isa::avx512ifma, "avx512ifma", Isa::avx512},
    {Isa::amx, "amx", Isa::avx512ifma},
};

const char* isa_name(Isa isa);

// Throws std::invalid_argument naming the accepted names.
Isa isa_from_name(const std::string& name);

// Whether this build contains the path.
bool isa_compiled(Isa isa);

// Whether the build, the processor and the operating system together allow the path. For AMX this asks the Linux
// kernel for the tile-data permission (arch_prctl ARCH_REQ_XCOMP_PERM), once for the process.
bool isa_usable(Isa isa);

// The usable paths, in order.
std::vector<Isa> usable_isas();

// Why isa_usable is false; empty if it is true.
std::string isa_obstacle(Isa isa);

// The path in force: the one set last, else PRIVTUNER_ISA, else the best usable one. Throws std::runtime_error when
// PRIVTUNER_ISA names an unknown or unusable path, and so does set_active_isa for an unusable one: a forced path never
// falls back silently.
Isa active_isa();
void set_active_isa(Isa isa);

}  // namespace privtuner::math
