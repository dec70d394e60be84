// Contexts: making them, and taking them out of OpenFHE's table.
#include <algorithm>
#include <atomic>
#include <mutex>

#include "objects.hpp"

namespace privtuner::openfhe {
namespace {

using Factory = lbcrypto::CryptoContextFactory<DCRTPoly>;

// How many Context objects hold a context that they brought into OpenFHE's table. Under the exclusive lock.
std::map<const lbcrypto::CryptoContextImpl<DCRTPoly>*, std::size_t>& holders() {
  static std::map<const lbcrypto::CryptoContextImpl<DCRTPoly>*, std::size_t> held;
  return held;
}

// OpenFHE empties its table only as a whole, together with all keys and transforms, of other users too. The table is no
// constant, only the view of it that OpenFHE offers is.
std::vector<CryptoContext>& table() { return const_cast<std::vector<CryptoContext>&>(Factory::GetAllContexts()); }

void forget(const lbcrypto::CryptoContextImpl<DCRTPoly>* context) {
  auto& all = table();
  all.erase(std::remove_if(all.begin(), all.end(), [&](const auto& entry) { return entry.get() == context; }),
            all.end());
}

// Rings of the contexts that live, for each prime; and whether a prime has two. Changed under the exclusive lock.
std::map<std::uint64_t, std::map<std::uint32_t, std::size_t>>& rings() {
  static std::map<std::uint64_t, std::map<std::uint32_t, std::size_t>> all;
  return all;
}

std::atomic<bool> mixed{false};

void count_rings(const Context& context, bool enter) {
  auto primes = context.moduli();
  const auto special = context.special_moduli();
  primes.insert(primes.end(), special.begin(), special.end());
  for (const std::uint64_t prime : primes) {
    auto& of = rings()[prime];
    if (enter) {
      ++of[context.ring_dimension()];
    } else if (--of[context.ring_dimension()] == 0) {
      of.erase(context.ring_dimension());
      if (of.empty()) rings().erase(prime);
    }
  }
  mixed = std::any_of(rings().begin(), rings().end(), [](const auto& entry) { return entry.second.size() > 1; });
}

std::map<const lbcrypto::CryptoContextImpl<DCRTPoly>*, std::vector<std::uint32_t>>& budgets() {
  static std::map<const lbcrypto::CryptoContextImpl<DCRTPoly>*, std::vector<std::uint32_t>> all;
  return all;
}

lbcrypto::ScalingTechnique scaling_of(const std::string& name) {
  if (name == "FIXEDMANUAL") return lbcrypto::FIXEDMANUAL;
  if (name == "FIXEDAUTO") return lbcrypto::FIXEDAUTO;
  if (name == "FLEXIBLEAUTO") return lbcrypto::FLEXIBLEAUTO;
  if (name == "FLEXIBLEAUTOEXT") return lbcrypto::FLEXIBLEAUTOEXT;
  throw std::invalid_argument("scaling_technique '" + name +
                              "': choose FIXEDMANUAL, FIXEDAUTO, FLEXIBLEAUTO or FLEXIBLEAUTOEXT");
}

lbcrypto::KeySwitchTechnique switching_of(const std::string& name) {
  if (name == "HYBRID") return lbcrypto::HYBRID;
  if (name == "BV") return lbcrypto::BV;
  throw std::invalid_argument("key_switch_technique '" + name + "': choose HYBRID or BV");
}

// OpenFHE tells its own error only from the stream it prints to.
template <class T>
std::string name_of(const T& value) {
  std::ostringstream text;
  text << value;
  return text.str();
}

lbcrypto::CCParams<lbcrypto::CryptoContextCKKSRNS> parameters_of(const Settings& s) {
  lbcrypto::CCParams<lbcrypto::CryptoContextCKKSRNS> p;
  p.SetSecurityLevel(s.secure ? lbcrypto::HEStd_128_classic : lbcrypto::HEStd_NotSet);
  p.SetMultiplicativeDepth(s.depth);
  if (s.scaling_bits != 0) p.SetScalingModSize(s.scaling_bits);
  if (s.first_bits != 0) p.SetFirstModSize(s.first_bits);
  if (s.ring_dimension != 0) p.SetRingDim(s.ring_dimension);
  if (s.batch_size != 0) p.SetBatchSize(s.batch_size);
  if (s.digits != 0) p.SetNumLargeDigits(s.digits);
  if (s.digit_bits != 0) p.SetDigitSize(s.digit_bits);
  if (!s.scaling_technique.empty()) p.SetScalingTechnique(scaling_of(s.scaling_technique));
  if (!s.key_switching.empty()) p.SetKeySwitchTechnique(switching_of(s.key_switching));
  // A sparse secret is below the 128 bits that the table of OpenFHE's check states for ternary ones.
  p.SetSecretKeyDist(lbcrypto::UNIFORM_TERNARY);
  if (s.complex_data) {
#ifdef PRIVTUNER_OPENFHE_COMPLEX
    p.SetCKKSDataType(lbcrypto::COMPLEX);
#else
    throw std::invalid_argument("complex values need OpenFHE 1.3 or newer, this module was built with " +
                                library_version());
#endif
  }
  return p;
}

}  // namespace

std::shared_ptr<Context> Context::make(const Settings& settings) {
  const Exclusive lock(library_mutex());
  TableGuard guard;
  try {
    const CryptoContext context = lbcrypto::GenCryptoContext(parameters_of(settings));
    for (const auto feature : {lbcrypto::PKE, lbcrypto::KEYSWITCH, lbcrypto::LEVELEDSHE, lbcrypto::ADVANCEDSHE}) {
      context->Enable(feature);
    }
    auto made = std::make_shared<Context>(context, guard.grown());
    guard.keep();
    return made;
  } catch (const std::invalid_argument&) {
    throw;
  } catch (const std::exception& error) {
    const std::string why = reason(error);
    // A refusal leaves OpenFHE's estimate of the special primes behind, which the next context without a security check
    // would be measured by (seen in 1.5.1). One that succeeds resets it.
    lbcrypto::GenCryptoContext(parameters_of(Settings{}));
    throw std::invalid_argument("OpenFHE refuses these settings: " + why);
  }
}

Context::Context(CryptoContext context, bool fresh)
    : context_(std::move(context)),
      parameters_(std::dynamic_pointer_cast<lbcrypto::CryptoParametersRNS>(context_->GetCryptoParameters())) {
  const auto scheme = std::dynamic_pointer_cast<lbcrypto::CryptoParametersCKKSRNS>(context_->GetCryptoParameters());
  if (!scheme) throw FormatError("a context of another scheme than CKKS");
  const std::string technique = scaling_technique();
  if (technique != "FIXEDMANUAL" && technique != "FIXEDAUTO" && technique != "FLEXIBLEAUTO" &&
      technique != "FLEXIBLEAUTOEXT") {
    throw FormatError("a context of scaling technique " + technique + ", which this engine does not know");
  }
  const auto extra = technique == "FLEXIBLEAUTOEXT" ? 1u : 0u;
  depth_ = static_cast<std::uint32_t>(moduli().size()) - 1 - extra;
  // Tables that OpenFHE would fill at first use, without a lock.
  context_->MakeCKKSPackedPlaintext(std::vector<double>{1.0});
  auto& held = holders();
  const auto found = held.find(context_.get());
  if (found != held.end()) {
    ++found->second;
  } else if (fresh) {
    held.emplace(context_.get(), 1);
  }  // else somebody else's, to whom it is left
  count_rings(*this, true);
}

Context::~Context() {
  if (!usable()) return;
  const Exclusive lock(library_mutex());
  count_rings(*this, false);
  auto& held = holders();
  const auto found = held.find(context_.get());
  if (found == held.end() || --found->second > 0) return;
  held.erase(found);
  budgets().erase(context_.get());
  forget(context_.get());
}

std::uint32_t Context::slots() const {
  const std::uint32_t batch = context_->GetEncodingParams()->GetBatchSize();
  return batch != 0 ? batch : ring_dimension() / 2;
}

std::uint32_t Context::scaling_bits() const {
  return static_cast<std::uint32_t>(context_->GetEncodingParams()->GetPlaintextModulus());
}

bool Context::manual() const { return parameters_->GetScalingTechnique() == lbcrypto::FIXEDMANUAL; }

bool Context::flexible() const {
  const auto technique = parameters_->GetScalingTechnique();
  return technique == lbcrypto::FLEXIBLEAUTO || technique == lbcrypto::FLEXIBLEAUTOEXT;
}

bool Context::complex() const {
#ifdef PRIVTUNER_OPENFHE_COMPLEX
  return context_->GetCKKSDataType() == lbcrypto::COMPLEX;
#else
  return false;
#endif
}

bool Context::secure() const {
  // OpenFHE's table is for ternary secrets that are not sparse.
  return parameters_->GetStdLevel() != lbcrypto::HEStd_NotSet &&
         parameters_->GetSecretKeyDist() == lbcrypto::UNIFORM_TERNARY;
}

std::vector<std::uint64_t> Context::moduli() const {
  std::vector<std::uint64_t> out;
  for (const auto& tower : parameters_->GetElementParams()->GetParams()) {
    out.push_back(tower->GetModulus().ConvertToInt());
  }
  return out;
}

std::vector<std::uint64_t> Context::special_moduli() const {
  std::vector<std::uint64_t> out;
  if (const auto& special = parameters_->GetParamsP()) {
    for (const auto& tower : special->GetParams()) out.push_back(tower->GetModulus().ConvertToInt());
  }
  return out;
}

std::uint32_t Context::digits() const { return parameters_->GetNumPartQ(); }

std::uint32_t Context::digit_bits() const { return parameters_->GetDigitSize(); }

std::string Context::scaling_technique() const { return name_of(parameters_->GetScalingTechnique()); }

std::string Context::key_switching() const { return name_of(parameters_->GetKeySwitchTechnique()); }

void Context::enable_bootstrapping(const std::vector<std::uint32_t>& budget) {
  const Exclusive lock(library_mutex());
  if (budget.size() != 2 || budget[0] < 1 || budget[1] < 1) {
    throw std::invalid_argument("level_budget: give two numbers of levels, each at least 1");
  }
  // OpenFHE takes it for granted.
  const auto needed = lbcrypto::FHECKKSRNS::GetBootstrapDepth(budget, lbcrypto::UNIFORM_TERNARY);
  if (depth() <= needed) {
    throw std::invalid_argument("bootstrapping takes " + std::to_string(needed) + " levels and this context has " +
                                std::to_string(depth()) + "; choose a larger multiplicative_depth");
  }
  const auto before = budgets().find(context_.get());
  if (before != budgets().end() && before->second != budget) {
    throw std::invalid_argument("bootstrapping was enabled with another level_budget, for which keys may exist");
  }
  take_tables(*this);
  try {
    context_->Enable(lbcrypto::FHE);
    context_->EvalBootstrapSetup(budget, {0, 0}, slots());
    budgets()[context_.get()] = budget;
  } catch (const std::exception& error) {
    throw std::invalid_argument("OpenFHE cannot bootstrap with these parameters: " + reason(error));
  }
}

ContextInUse::ContextInUse(const Context& context) : shared_(library_mutex()) {
  if (!mixed) return;
  shared_.unlock();
  exclusive_ = Exclusive(library_mutex());
  take_tables(context);
}

void take_tables(const Context& context) {
  if (!mixed) return;
  const auto fill = [&](const auto& parameters) {
    for (const auto& tower : parameters->GetParams()) {
      ChineseRemainderTransformFTT<lbcrypto::NativeVector>().PreCompute(
          tower->GetRootOfUnity(), 2 * context.ring_dimension(), tower->GetModulus());
    }
  };
  fill(context.parameters()->GetElementParams());
  if (context.parameters()->GetParamsP()) fill(context.parameters()->GetParamsP());
}

TableGuard::TableGuard() : before_(Factory::GetAllContexts().size()) {}

TableGuard::~TableGuard() {
  if (!keep_ && grown()) table().resize(before_);
}

bool TableGuard::grown() const { return Factory::GetAllContexts().size() > before_; }

}  // namespace privtuner::openfhe
