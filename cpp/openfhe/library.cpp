// What belongs to the process: the lock, the threads, the tables.
#include "engine.hpp"

#include <atomic>

namespace privtuner::openfhe {
namespace {

std::atomic<int> thread_count{0};

}  // namespace

std::string reason(const std::exception& error) {
  const std::string text = error.what();
  const auto start = text.find("(): ");
  std::string kept = start == std::string::npos ? text : text.substr(start + 4);
  for (char& c : kept) {  // texts about damaged bytes quote them
    if (static_cast<unsigned char>(c) >= 128) c = '?';
  }
  return kept;
}

std::shared_mutex& library_mutex() {
  static std::shared_mutex mutex;
  return mutex;
}

std::string library_version() { return GetOPENFHEVersion(); }

int threads() {
  const int count = thread_count.load();
  return count > 0 ? count : lbcrypto::OpenFHEParallelControls.GetMachineThreads();
}

void set_threads(int count) {
  if (count < 1 || count > kMaxThreads) {
    throw std::invalid_argument("num_threads is " + std::to_string(count) + "; give 1 to " +
                                std::to_string(kMaxThreads));
  }
  const Exclusive lock(library_mutex());
  thread_count = count;
  // OpenFHE asks for up to the number of threads that it saw when this object was made.
  omp_set_num_threads(count);
  lbcrypto::OpenFHEParallelControls = lbcrypto::ParallelControls();
}

void after_fork() {
  // No lock: who held it is not in this process. One thread needs no team, and the parent's would never answer.
  thread_count = 1;
  omp_set_num_threads(1);
  lbcrypto::OpenFHEParallelControls = lbcrypto::ParallelControls();
}

Counts counts() {
  const Exclusive lock(library_mutex());
  using Impl = lbcrypto::CryptoContextImpl<DCRTPoly>;
  return {static_cast<std::size_t>(lbcrypto::CryptoContextFactory<DCRTPoly>::GetContextCount()),
          Impl::GetAllEvalMultKeys().size(), Impl::GetAllEvalAutomorphismKeys().size()};
}

}  // namespace privtuner::openfhe
