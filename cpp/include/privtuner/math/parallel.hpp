// Threads: a count for the process and a loop over independent tasks.
#pragma once

#include <cstddef>
#include <functional>

namespace privtuner::math {

// Default: PRIVTUNER_NUM_THREADS, else the processors this process may run on. Throws std::runtime_error when
// PRIVTUNER_NUM_THREADS is not a whole number from 1 to 1024.
int num_threads();
// Throws std::invalid_argument unless 1 <= n <= 1024.
void set_num_threads(int n);

// The most threads that a parallel_for made here would use: num_threads(), or 1 inside a body of another.
int threads_here();

// Calls body(begin, end) on disjoint chunks of at most `grain` consecutive indices that cover [0, count), on at most
// num_threads() threads; the caller's thread takes part. The first exception is rethrown after every thread has
// stopped. Threads live for one call: nothing survives a fork. A call made inside a body runs on that body's thread.
// Throws std::invalid_argument for grain = 0.
void parallel_for(std::size_t count, std::size_t grain, const std::function<void(std::size_t, std::size_t)>& body);

}  // namespace privtuner::math
