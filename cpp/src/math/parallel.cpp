#include "privtuner/math/parallel.hpp"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sched.h>
#endif

namespace privtuner::math {
namespace {

constexpr int kMaxThreads = 1024;

int available_processors() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return std::clamp(CPU_COUNT(&set), 1, kMaxThreads);
#endif
  return std::clamp(static_cast<int>(std::thread::hardware_concurrency()), 1, kMaxThreads);
}

int default_threads() {
  const char* text = std::getenv("PRIVTUNER_NUM_THREADS");
  if (text == nullptr || *text == '\0') return available_processors();
  char* end = nullptr;
  const long n = std::strtol(text, &end, 10);
  if (*end != '\0' || n < 1 || n > kMaxThreads) {
    throw std::runtime_error("PRIVTUNER_NUM_THREADS is \"" + std::string(text) + "\"; set a whole number from 1 to " +
                             std::to_string(kMaxThreads) + " or unset it");
  }
  return static_cast<int>(n);
}

std::atomic<int> chosen_threads{0};     // 0: not set
thread_local bool inside_loop = false;  // a nested loop runs on its own thread: threads would only multiply

struct InsideLoop {
  bool before = inside_loop;
  InsideLoop() { inside_loop = true; }
  ~InsideLoop() { inside_loop = before; }
};

}  // namespace

int num_threads() {
  const int chosen = chosen_threads.load();
  if (chosen != 0) return chosen;
  static const int fallback = default_threads();
  return fallback;
}

void set_num_threads(int n) {
  if (n < 1 || n > kMaxThreads) {
    throw std::invalid_argument("num_threads is " + std::to_string(n) + "; pass 1 to " + std::to_string(kMaxThreads));
  }
  chosen_threads.store(n);
}

int threads_here() { return inside_loop ? 1 : num_threads(); }

void parallel_for(std::size_t count, std::size_t grain, const std::function<void(std::size_t, std::size_t)>& body) {
  if (grain == 0) throw std::invalid_argument("grain is 0; pass at least 1");
  const std::size_t chunks = count / grain + (count % grain != 0);
  const std::size_t threads = std::min(chunks, static_cast<std::size_t>(threads_here()));

  std::atomic<std::size_t> next{0};
  std::exception_ptr error;
  std::mutex error_mutex;
  const auto work = [&] {
    const InsideLoop mark;
    for (std::size_t chunk; (chunk = next.fetch_add(1)) < chunks;) {
      try {
        body(chunk * grain, std::min(count, (chunk + 1) * grain));
      } catch (...) {
        const std::lock_guard<std::mutex> lock(error_mutex);
        if (!error) error = std::current_exception();
        next.store(chunks);  // nobody starts another chunk
      }
    }
  };

  std::vector<std::thread> workers;
  workers.reserve(threads);
  try {
    for (std::size_t i = 1; i < threads; ++i) workers.emplace_back(work);
  } catch (const std::system_error&) {  // the system gives no more threads: those that run share the chunks
  }
  work();
  for (std::thread& worker : workers) worker.join();
  if (error) std::rethrow_exception(error);
}

}  // namespace privtuner::math
