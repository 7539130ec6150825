// Stands in for CUDA's header where a test compiles csrc/cuda/ as C++: the threads of a launch run one after another,
// which they may, as long as no kernel shares memory or waits for another thread.
#pragma once

#include <algorithm>
#include <cstdint>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(threads)
#define __grid_constant__

using cudaStream_t = void*;
using std::max;
using std::min;

struct Index {
  unsigned x;
};
inline Index blockIdx, threadIdx;

extern "C" inline int64_t wgan_fast_launches = 0;

template <typename Kernel>
void in_turn(int64_t blocks, int threads, const Kernel& kernel) {
  ++wgan_fast_launches;
  for (int64_t block = 0; block < blocks; ++block)
    for (int thread = 0; thread < threads; ++thread) {
      // Last thread first, every other time: what a result may not depend on.
      blockIdx.x = static_cast<unsigned>(block);
      threadIdx.x = static_cast<unsigned>(block % 2 ? threads - 1 - thread : thread);
      kernel();
    }
}
