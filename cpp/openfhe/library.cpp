// What belongs to the process: the lock, the threads, the tables.
#include <pthread.h>

#include <atomic>
#include <new>

#include "objects.hpp"

namespace privtuner::openfhe {
namespace {

std::atomic<int> thread_count{0};
std::atomic<bool> in_child{false}, torn{false};  // torn: another thread was changing OpenFHE's tables at the fork
thread_local bool idle = false;                  // of the thread that forks: nobody else was at work

std::shared_mutex& mutex() {
  static std::shared_mutex mutex;
  return mutex;
}

void before_fork() { idle = mutex().try_lock(); }

void after_fork_in_parent() {
  if (idle) mutex().unlock();
}

void after_fork_in_child() {
  // Whoever held the lock is not in this process, and its state names threads of the parent.
  new (&mutex()) std::shared_mutex;
  in_child = true;
  if (!idle) torn = true;
  // One thread needs no team, and the parent's would never answer.
  thread_count = 1;
  omp_set_num_threads(1);
  lbcrypto::OpenFHEParallelControls = lbcrypto::ParallelControls();
}

}  // namespace

void watch_forks() {
  if (pthread_atfork(&before_fork, &after_fork_in_parent, &after_fork_in_child) != 0) {
    throw std::runtime_error("no memory to watch for forks, after which OpenFHE would repeat its random numbers");
  }
}

bool forked() { return in_child; }

bool usable() { return !torn; }

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
  if (!usable()) {
    throw std::runtime_error(
        "this process was forked while another thread used OpenFHE, whose tables may be half changed: fork when no "
        "thread uses it, or start processes with multiprocessing's method 'spawn'");
  }
  return mutex();
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
  if (forked() && count > 1) {
    throw std::invalid_argument("num_threads is " + std::to_string(count) +
                                "; a child of fork computes on one thread, as the team it would wait for is the "
                                "parent's: start processes with multiprocessing's method 'spawn' for more");
  }
  const Exclusive lock(library_mutex());
  thread_count = count;
  // OpenFHE asks for up to the number of threads that it saw when this object was made.
  omp_set_num_threads(count);
  lbcrypto::OpenFHEParallelControls = lbcrypto::ParallelControls();
}

Counts counts() {
  const Exclusive lock(library_mutex());
  using Impl = lbcrypto::CryptoContextImpl<DCRTPoly>;
  return {static_cast<std::size_t>(lbcrypto::CryptoContextFactory<DCRTPoly>::GetContextCount()),
          Impl::GetAllEvalMultKeys().size(), Impl::GetAllEvalAutomorphismKeys().size()};
}

}  // namespace privtuner::openfhe
