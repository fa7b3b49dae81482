// Which instruction set this machine has. Asked once.
#include <cstring>

#include "kernel_table.h"

namespace prism {
namespace {

bool runs(const KernelTable* table) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (table == avx512_bf16_kernels()) return avx512 && __builtin_cpu_supports("avx512bf16");
  if (table == avx512_kernels()) return avx512;
  if (table == avx2_kernels())
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return table == portable_kernels();
}

const KernelTable* const* candidates() {  // from fastest to slowest
  static const KernelTable* const tables[] = {avx512_bf16_kernels(), avx512_kernels(),
                                              avx2_kernels(), portable_kernels(), nullptr};
  return tables;
}

}  // namespace

const KernelTable* kernels_by_name(const char* name) {
  for (int i = 0; i < 4; i++) {
    const KernelTable* table = candidates()[i];
    if (table != nullptr && runs(table) && std::strcmp(table->name, name) == 0) return table;
  }
  return nullptr;
}

const KernelTable& kernels() {
  static const KernelTable* best = [] {
    int i = 0;
    while (candidates()[i] == nullptr || !runs(candidates()[i])) i++;
    return candidates()[i];
  }();
  return *best;
}

}  // namespace prism
