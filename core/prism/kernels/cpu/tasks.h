// Tasks of unequal size on torch's threads.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace prism {

// Runs task(0) … task(count - 1), each once, on the threads that torch gives us.
template <typename MakeWorker>
void run_tasks(int64_t count, MakeWorker make_worker) {
  const int64_t threads = std::min<int64_t>(count, at::get_num_threads());
  std::atomic<int64_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    auto worker = make_worker();
    for (int64_t share = begin; share < end; share++)
      for (int64_t task; (task = next.fetch_add(1)) < count;) worker(task);
  });
}

}  // namespace prism
