// Times OpenFHE's CKKS and prints one JSON object.
//
//   OMP_NUM_THREADS=1 openfhe_ckks [log2N:limbs:scale_bits[:digits]]...
//
// limbs is the number of primes in Q: the multiplicative depth plus one. digits is the number of digits of hybrid key
// switching, OpenFHE's default if left out. Times are in milliseconds with all limbs present and all N / 2 slots in
// use; null where the limbs do not suffice. If OpenFHE refuses a setting at 128 bits, the object says why and the times
// are without that check.

#include <omp.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <iostream>
#include <map>
#include <memory>
#include <random>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "openfhe.h"

namespace {

using lbcrypto::Ciphertext;
using lbcrypto::CryptoContext;
using lbcrypto::DCRTPoly;
using lbcrypto::Plaintext;

constexpr std::uint32_t kDegree = 27, kChebyshevLevels = 5;  // levels of degrees 14 to 27 on [-1, 1]
constexpr double kScalar = 0.37;

struct Setting {
  std::uint32_t log2_n = 0, limbs = 0, scale_bits = 0, digits = 0;
};

constexpr const char* kOperations[] = {"encode_encrypt",
                                       "decrypt_decode",
                                       "decrypt_decode_one_limb",
                                       "multiply_relinearise",
                                       "rescale",
                                       "multiply_relinearise_rescale",
                                       "rotate",
                                       "chebyshev_27",
                                       "scalar_multiply_add",
                                       "ntt_one_limb"};

using Figures = std::map<std::string, double>;  // by operation

struct Times {
  Figures median, fastest;
};

std::string quoted(const std::string& text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    out += static_cast<unsigned char>(c) < ' ' ? ' ' : c;
  }
  return out + '"';
}

std::string object(const Figures& figures, bool nulls) {
  std::ostringstream out;
  out.precision(4);
  const char* separator = "{";
  for (const char* name : kOperations) {
    const auto found = figures.find(name);
    if (found == figures.end() && !nulls) continue;
    out << separator << quoted(name) << ": ";
    found == figures.end() ? out << "null" : out << found->second;
    separator = ", ";
  }
  out << "}";
  return out.str();
}

// At least 5 runs and at most 101, for about half a second; `prepare` is not timed.
template <class Prepare, class Run>
void time(Times& times, const char* name, Prepare prepare, Run run) {
  using Clock = std::chrono::steady_clock;
  std::vector<double> all;
  double total = 0;
  for (int i = -2; i < 101 && (i < 5 || total < 500); ++i) {  // two runs to warm up
    prepare();
    const auto start = Clock::now();
    run();
    const double elapsed = std::chrono::duration<double, std::milli>(Clock::now() - start).count();
    if (i < 0) continue;
    all.push_back(elapsed);
    total += elapsed;
  }
  std::sort(all.begin(), all.end());
  times.median[name] = (all[(all.size() - 1) / 2] + all[all.size() / 2]) / 2;
  times.fastest[name] = all.front();
}

template <class Run>
void time(Times& times, const char* name, Run run) {
  time(times, name, [] {}, run);
}

CryptoContext<DCRTPoly> make_context(const Setting& setting, lbcrypto::SecurityLevel security) {
  lbcrypto::CCParams<lbcrypto::CryptoContextCKKSRNS> parameters;
  parameters.SetSecurityLevel(security);
  parameters.SetRingDim(std::uint32_t{1} << setting.log2_n);
  parameters.SetMultiplicativeDepth(setting.limbs - 1);
  parameters.SetScalingModSize(setting.scale_bits);
  parameters.SetScalingTechnique(lbcrypto::FIXEDMANUAL);
  parameters.SetKeySwitchTechnique(lbcrypto::HYBRID);
  if (setting.digits != 0) parameters.SetNumLargeDigits(setting.digits);
  auto context = lbcrypto::GenCryptoContext(parameters);
  for (const auto feature : {lbcrypto::PKE, lbcrypto::KEYSWITCH, lbcrypto::LEVELEDSHE, lbcrypto::ADVANCEDSHE}) {
    context->Enable(feature);
  }
  return context;
}

// OpenFHE's message without the source line it starts with.
std::string reason(const std::exception& error) {
  const std::string text = error.what();
  const auto start = text.find("(): ");
  return start == std::string::npos ? text : text.substr(start + 4);
}

// Clenshaw; OpenFHE's convention halves the first coefficient.
double chebyshev(const std::vector<double>& coefficients, double x) {
  double b1 = 0, b2 = 0;
  for (std::size_t k = coefficients.size(); k-- > 1;) b2 = std::exchange(b1, coefficients[k] + 2 * x * b1 - b2);
  return coefficients[0] / 2 + x * b1 - b2;
}

// Times and largest errors, as members of a JSON object.
std::string measured(const CryptoContext<DCRTPoly>& context, std::uint32_t limbs) {
  const auto keys = context->KeyGen();
  context->EvalMultKeyGen(keys.secretKey);
  context->EvalRotateKeyGen(keys.secretKey, {1});

  const std::size_t slots = context->GetRingDimension() / 2;
  std::mt19937_64 generator(1);
  std::uniform_real_distribution<double> uniform(-1, 1);
  std::vector<double> x(slots), y(slots);
  for (auto* values : {&x, &y}) std::generate(values->begin(), values->end(), [&] { return uniform(generator); });

  Times times;
  Figures errors;
  Plaintext plain;
  const auto check = [&](const char* name, const Ciphertext<DCRTPoly>& result, auto expected) {
    context->Decrypt(keys.secretKey, result, &plain);
    const auto values = plain->GetRealPackedValue();
    double error = 0;
    for (std::size_t i = 0; i < slots; ++i) error = std::max(error, std::abs(values.at(i) - expected(i)));
    errors[name] = error;
  };

  Ciphertext<DCRTPoly> a, result;
  const auto b = context->Encrypt(keys.publicKey, context->MakeCKKSPackedPlaintext(y));
  time(times, "encode_encrypt", [&] { a = context->Encrypt(keys.publicKey, context->MakeCKKSPackedPlaintext(x)); });
  time(times, "decrypt_decode", [&] { context->Decrypt(keys.secretKey, a, &plain); });
  check("encode_encrypt", a, [&](std::size_t i) { return x[i]; });
  const auto last = limbs > 1 ? context->LevelReduce(a, nullptr, limbs - 1) : a;
  time(times, "decrypt_decode_one_limb", [&] { context->Decrypt(keys.secretKey, last, &plain); });

  if (limbs > 1) {
    const auto product = context->EvalMult(a, b);
    time(times, "multiply_relinearise", [&] { result = context->EvalMult(a, b); });
    time(times, "rescale", [&] { result = product->Clone(); }, [&] { context->RescaleInPlace(result); });
    time(times, "multiply_relinearise_rescale", [&] {
      result = context->EvalMult(a, b);
      context->RescaleInPlace(result);
    });
    check("multiply_relinearise_rescale", result, [&](std::size_t i) { return x[i] * y[i]; });
  }

  time(times, "rotate", [&] { result = context->EvalRotate(a, 1); });
  check("rotate", result, [&](std::size_t i) { return x[(i + 1) % slots]; });

  if (limbs > kChebyshevLevels) {
    std::vector<double> series;  // without zeros, which OpenFHE skips
    for (std::uint32_t k = 0; k <= kDegree; ++k) series.push_back(1.0 / (k + 1));
    time(times, "chebyshev_27", [&] { result = context->EvalChebyshevSeries(a, series, -1, 1); });
    check("chebyshev_27", result, [&](std::size_t i) { return chebyshev(series, x[i]); });
  }

  auto sum = context->EvalMult(a, kScalar);
  time(times, "scalar_multiply_add", [&] { context->EvalAddInPlace(sum, context->EvalMult(a, kScalar)); });

  auto coefficients = a->GetElements()[0].GetElementAtIndex(limbs - 1);
  coefficients.SetFormat(COEFFICIENT);
  auto limb = coefficients;
  time(times, "ntt_one_limb", [&] { limb = coefficients; }, [&] { limb.SetFormat(EVALUATION); });

  return "\"median_ms\": " + object(times.median, true) + ", \"fastest_ms\": " + object(times.fastest, true) +
         ", \"largest_error\": " + object(errors, false);
}

std::string measure(const Setting& setting) {
  std::ostringstream out;
  out << "{\"log2_n\": " << setting.log2_n << ", \"limbs\": " << setting.limbs
      << ", \"scale_bits\": " << setting.scale_bits;
  try {
    CryptoContext<DCRTPoly> context;
    std::string refused;
    try {
      context = make_context(setting, lbcrypto::HEStd_128_classic);
    } catch (const std::exception& error) {
      refused = quoted(reason(error));
      context = make_context(setting, lbcrypto::HEStd_NotSet);
    }
    const auto rns = std::dynamic_pointer_cast<lbcrypto::CryptoParametersRNS>(context->GetCryptoParameters());
    out << ", \"security\": \"" << (refused.empty() ? "HEStd_128_classic" : "HEStd_NotSet")
        << "\", \"refused_at_128_bits\": " << (refused.empty() ? "null" : refused)
        << ", \"digits\": " << rns->GetNumPartQ() << ", \"special_primes\": " << rns->GetParamsP()->GetParams().size()
        << ", \"log2_q\": " << rns->GetElementParams()->GetModulus().GetMSB()
        << ", \"log2_qp\": " << rns->GetParamsQP()->GetModulus().GetMSB() << ", " << measured(context, setting.limbs);
  } catch (const std::exception& error) {
    out << ", \"failed\": " << quoted(reason(error));
  }
  lbcrypto::CryptoContextImpl<DCRTPoly>::ClearEvalMultKeys();
  lbcrypto::CryptoContextImpl<DCRTPoly>::ClearEvalAutomorphismKeys();
  lbcrypto::CryptoContextFactory<DCRTPoly>::ReleaseAllContexts();
  out << "}";
  return out.str();
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<std::string> arguments(argv + 1, argv + argc);
  if (arguments.empty()) arguments = {"12:2:40", "13:4:40", "14:8:40", "15:16:40"};
  std::vector<Setting> settings;
  for (const auto& argument : arguments) {
    Setting s;
    char rest = 0;
    const int fields =
        std::sscanf(argument.c_str(), "%u:%u:%u:%u%c", &s.log2_n, &s.limbs, &s.scale_bits, &s.digits, &rest);
    if (fields < 3 || fields > 4 || s.log2_n < 10 || s.log2_n > 17 || s.limbs < 1 || s.limbs > 64) {
      std::cerr << "not a setting log2N:limbs:scale_bits[:digits]: " << argument << "\n";
      return 2;
    }
    settings.push_back(s);
  }

#ifdef WITH_NATIVEOPT
  constexpr bool kNative = true;
#else
  constexpr bool kNative = false;
#endif
  std::cout << "{\"library\": \"OpenFHE\", \"version\": " << quoted(GetOPENFHEVersion())
            << ", \"compiler\": " << quoted(__VERSION__) << ", \"native_size\": " << NATIVEINT
            << ", \"native_optimisation\": " << (kNative ? "true" : "false")
            << ", \"threads\": " << omp_get_max_threads() << ",\n \"settings\": [";
  const char* separator = "\n  ";
  for (const auto& setting : settings) {
    std::cout << separator << measure(setting) << std::flush;
    separator = ",\n  ";
  }
  std::cout << "\n ]}\n";
  return 0;
}
