#include "privtuner/math/cpu.hpp"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <iterator>
#include <stdexcept>

#include "privtuner/math/compiled_paths.hpp"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace privtuner::math {
namespace {

constexpr int kUnset = -1;
std::atomic<int> chosen_isa{kUnset};

#define PRIVTUNER_PATH(path, unused) Isa::path,
constexpr Isa kCompiled[] = {PRIVTUNER_COMPILED_PATHS(PRIVTUNER_PATH, )};
#undef PRIVTUNER_PATH

const IsaPath& path_of(Isa isa) {
  for (const IsaPath& path : kIsaPaths) {
    if (path.isa == isa) return path;
  }
  throw std::invalid_argument("unknown instruction-set path " + std::to_string(static_cast<int>(isa)));
}

// Whether a path is another one or extends it.
bool includes(Isa isa, Isa part) {
  for (; isa != part; isa = path_of(isa).base) {
    if (isa == Isa::portable) return false;
  }
  return true;
}

#if defined(__x86_64__)

bool bit(std::uint32_t word, int place) { return (word >> place & 1) != 0; }

struct Cpu {
  std::uint32_t ecx1 = 0, ebx7 = 0, ecx7 = 0, edx7 = 0;
  std::uint64_t xcr0 = 0;

  Cpu() {
    std::uint32_t a = 0, b = 0, c = 0, d = 0;
    if (__get_cpuid(1, &a, &b, &c, &d)) ecx1 = c;
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) {
      ebx7 = b;
      ecx7 = c;
      edx7 = d;
    }
    if (bit(ecx1, 27)) {  // OSXSAVE: xgetbv may be executed
      std::uint32_t low = 0, high = 0;
      __asm__ __volatile__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
      xcr0 = static_cast<std::uint64_t>(high) << 32 | low;
    }
  }
};

// Register state that the operating system must save: XCR0 bits (Intel SDM volume 1, section 13.1).
constexpr std::uint64_t kAvxState = 0x6, kAvx512State = 0xe6, kTileState = 0x60000;

bool tile_permission() {
#if defined(__linux__)
  constexpr long kReqXcompPerm = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool granted = syscall(SYS_arch_prctl, kReqXcompPerm, kTileData) == 0;
  return granted;
#else
  return false;
#endif
}

std::string x86_obstacle(Isa isa) {
  static const Cpu cpu;
  struct Need {
    Isa isa;  // needed by this path and all that extend it
    bool present;
    const char* lacking;
  };
  const Need needs[] = {
      {Isa::avx2, bit(cpu.ecx1, 28) && bit(cpu.ebx7, 5), "the processor lacks AVX2"},
      {Isa::avx2, bit(cpu.ecx1, 12), "the processor lacks FMA"},
      {Isa::avx2, (cpu.xcr0 & kAvxState) == kAvxState, "the operating system does not save AVX registers"},
      {Isa::avx512, bit(cpu.ebx7, 16), "the processor lacks AVX-512 F"},
      {Isa::avx512, bit(cpu.ebx7, 30), "the processor lacks AVX-512 BW"},
      {Isa::avx512, bit(cpu.ebx7, 17), "the processor lacks AVX-512 DQ"},
      {Isa::avx512, bit(cpu.ebx7, 31), "the processor lacks AVX-512 VL"},
      {Isa::avx512, bit(cpu.ecx7, 11), "the processor lacks AVX-512 VNNI"},
      {Isa::avx512, (cpu.xcr0 & kAvx512State) == kAvx512State, "the operating system does not save AVX-512 registers"},
      {Isa::avx512ifma, bit(cpu.ebx7, 21), "the processor lacks AVX-512 IFMA"},
      {Isa::amx, bit(cpu.edx7, 24), "the processor lacks AMX tiles"},
      {Isa::amx, bit(cpu.edx7, 25), "the processor lacks AMX int8"},
      {Isa::amx, (cpu.xcr0 & kTileState) == kTileState, "the operating system does not save AMX tiles"},
  };
  for (const Need& need : needs) {
    if (includes(isa, need.isa) && !need.present) return need.lacking;
  }
  if (isa == Isa::amx && !tile_permission()) {
    return "the kernel refused the AMX tile permission (arch_prctl ARCH_REQ_XCOMP_PERM)";
  }
  return {};
}

#endif

Isa default_isa() {
  const char* text = std::getenv("PRIVTUNER_ISA");
  if (text != nullptr && *text != '\0') {
    try {
      const Isa isa = isa_from_name(text);
      if (isa_usable(isa)) return isa;
      throw std::runtime_error("PRIVTUNER_ISA=" + std::string(text) + " cannot be used: " + isa_obstacle(isa) +
                               "; unset it or name another path");
    } catch (const std::invalid_argument& error) {
      throw std::runtime_error(std::string("PRIVTUNER_ISA: ") + error.what());
    }
  }
  return usable_isas().back();
}

}  // namespace

const char* isa_name(Isa isa) { return path_of(isa).name; }

Isa isa_from_name(const std::string& name) {
  std::string choices;
  for (const IsaPath& path : kIsaPaths) {
    if (name == path.name) return path.isa;
    if (!choices.empty()) choices += &path == std::end(kIsaPaths) - 1 ? " or " : ", ";
    choices += path.name;
  }
  throw std::invalid_argument("unknown instruction-set path \"" + name + "\"; choose " + choices);
}

bool isa_compiled(Isa isa) { return std::find(std::begin(kCompiled), std::end(kCompiled), isa) != std::end(kCompiled); }

std::string isa_obstacle(Isa isa) {
  if (!isa_compiled(isa)) return "this build does not hold its kernels";
#if defined(__x86_64__)
  return x86_obstacle(isa);
#else
  return {};
#endif
}

bool isa_usable(Isa isa) { return isa_obstacle(isa).empty(); }

std::vector<Isa> usable_isas() {
  std::vector<Isa> isas;
  for (const IsaPath& path : kIsaPaths) {
    if (isa_usable(path.isa)) isas.push_back(path.isa);
  }
  return isas;
}

Isa active_isa() {
  const int chosen = chosen_isa.load();
  if (chosen != kUnset) return static_cast<Isa>(chosen);
  static const Isa fallback = default_isa();  // a throw leaves it unset: the next call looks again
  return fallback;
}

void set_active_isa(Isa isa) {
  const std::string obstacle = isa_obstacle(isa);
  if (!obstacle.empty()) {
    throw std::runtime_error(std::string("the ") + isa_name(isa) + " path cannot be used: " + obstacle);
  }
  chosen_isa.store(static_cast<int>(isa));
}

}  // namespace privtuner::math
