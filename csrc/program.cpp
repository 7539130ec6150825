// Runs programs: a whole flat graph in one call, with products, what follows them element by element, and
// memory that is kept from call to call.

#include "program.h"

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <thread>

#include "penalty.h"
#include "samples.h"

namespace wgan_fast {
namespace {

// Depth below which a product is not cut to have its right side stay in the cache; and the depth that is
// added up one by one: rounding gathers with it.
constexpr int64_t kLeastDepth = 256, kSummedDepth = 512;
// Rows up to which the right side is read where it lies; as in wgan_fast/four_pass/program.py.
constexpr int64_t kFewRows = 128;
// Depth of the right side that a thread lays out at a time, at most.
constexpr int64_t kPackedDepth = 32;
constexpr int64_t kBlockElements = 8192;
constexpr int64_t kSumRows = 256, kSumColumns = 128;
// Operations below which waking a thread costs more than it saves; tasks of a product for each thread.
constexpr double kAlone = 500000;
constexpr int64_t kTasks = 16;
// Outputs of at least so many bytes come from the memory that is kept.
constexpr int64_t kKept = 65536;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Of a product's right side, what stays in a core's second-level cache while the tiles of the left side pass:
// half of it, or of a usual one.
int64_t right_bytes() {
  static const int64_t bytes = [] {
#ifdef _SC_LEVEL2_CACHE_SIZE
    const int64_t cache = sysconf(_SC_LEVEL2_CACHE_SIZE);
    if (cache > 0) return cache / 2;
#endif
    return int64_t{512 * 1024};
  }();
  return bytes;
}

// Memory by size. A fresh allocation of megabytes is faulted in page by page at first use, which costs as
// much as the arithmetic of a small step: what a step frees is kept for the next.
class Memory {
 public:
  static Memory& get() {
    static auto* const memory = new Memory;  // outlives the tensors that return to it
    return *memory;
  }

  float* take(int64_t bytes) {
    const std::lock_guard lock(mutex_);
    const auto found = free_.find(bytes);
    if (found == free_.end()) {
      // In huge pages where there is enough for some: their addresses are found without a walk.
      const int64_t alignment = bytes < kHugePage ? kPage : kHugePage;
      void* const fresh = std::aligned_alloc(alignment, ceil_div(bytes, alignment) * alignment);
      STD_TORCH_CHECK(fresh != nullptr, "out of memory: no ", bytes, " bytes for a step");
#ifdef __linux__
      if (alignment == kHugePage) madvise(fresh, bytes, MADV_HUGEPAGE);
#endif
      return static_cast<float*>(fresh);
    }
    float* const data = found->second;
    free_.erase(found);
    kept_ -= bytes;
    return data;
  }

  void give_back(float* data, int64_t bytes) {
    const std::lock_guard lock(mutex_);
    free_.emplace(bytes, data);
    kept_ += bytes;
    while (kept_ > kMost) {
      const auto largest = std::prev(free_.end());
      kept_ -= largest->first;
      std::free(largest->second);
      free_.erase(largest);
    }
  }

 private:
  static constexpr int64_t kPage = 4096, kHugePage = 2 << 20, kMost = 256 << 20;

  std::mutex mutex_;
  std::multimap<int64_t, float*> free_;
  int64_t kept_ = 0;
};

class Scratch {
 public:
  explicit Scratch(int64_t floats) : bytes_(4 * floats), data_(Memory::get().take(bytes_)) {}
  ~Scratch() { Memory::get().give_back(data_, bytes_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  float* data() const { return data_; }

 private:
  const int64_t bytes_;
  float* const data_;
};

// One of the threads that run a program together. They all go through the same phases, and share out the
// tasks of each; a thread goes on when all are done. So the threads are woken once, and meet without the
// system's help.
//
// Each begins with its own share of the tasks, so that it finds in its cache what it made of the same rows a
// phase ago, and then helps the others: a thread that comes late, or never, is not waited for.
class Worker {
 public:
  struct alignas(64) Counter {
    std::atomic<int64_t> value{0};
  };

  // How many counters phases take.
  static int64_t counters(int64_t phases, int64_t threads) { return phases * (threads + 1); }

  // With no counters: the only one.
  Worker(Counter* counters, int64_t threads, int64_t number)
      : counters_(counters), threads_(counters == nullptr ? 1 : threads), number_(number) {}

  int64_t threads() const { return threads_; }
  int64_t number() const { return number_; }

  // Calls `run(task)` for every task.
  template <typename Run>
  void share(int64_t tasks, const Run& run) {
    if (threads_ == 1) {
      for (int64_t task = 0; task < tasks; ++task) run(task);
      return;
    }
    int64_t mine = 0;
    for (int64_t i = 0; i < threads_; ++i) {
      const int64_t owner = (number_ + i) % threads_, end = tasks * (owner + 1) / threads_;
      std::atomic<int64_t>& taken = counters_[owner].value;
      const auto next = [&] {
        return tasks * owner / threads_ + taken.fetch_add(1, std::memory_order_relaxed);
      };
      for (int64_t task; (task = next()) < end; ++mine) run(task);
    }
    std::atomic<int64_t>& done = counters_[threads_].value;
    counters_ += threads_ + 1;
    if (mine > 0) done.fetch_add(mine, std::memory_order_acq_rel);
    for (int64_t spins = 0; done.load(std::memory_order_acquire) < tasks; ++spins)
      spins < kSpins ? pause() : std::this_thread::yield();
  }

 private:
  static constexpr int64_t kSpins = 2000;

  static void pause() {
#ifdef __x86_64__
    __builtin_ia32_pause();
#endif
  }

  Counter* counters_;
  const int64_t threads_, number_;
};

// A product cut into tiles; how they are laid out depends on its shape alone.
class Product {
 public:
  Product(const Kernel& kernel, const Tiles& t)
      : kernel_(kernel),
        t_(t),
        panels_(ceil_div(kernel.columns, t.columns)),
        tiles_(ceil_div(kernel.rows, t.rows)) {
    const Segment& first = segment(0);
    while (applied_ < kernel.statements && applies(kernel.first_statement()[applied_])) ++applied_;
    dots_ = kernel.segments == 1 && kernel.columns == 1 && first.a.column == 1 && first.b.row == 1;
    unit_ = kernel.bf16 != 0 && !dots_ ? 2 : 1;
    for (int64_t s = 0; s < kernel.segments; ++s) depth_ += units(segment(s));
    const auto all = [&](const auto& condition) {
      for (int64_t s = 0; s < kernel.segments; ++s)
        if (!condition(segment(s))) return false;
      return true;
    };
    const bool in_place = unit_ == 1 && !dots_ && kernel.kept == 0 && kernel.columns > 1;
    turned_ = in_place && kernel.rows <= kFewRows && depth_ > 1 && kernel.segments == 1 && first.b.row == 1 &&
              kernel.to.column == 1;
    direct_ = in_place && !turned_ && (kernel.rows <= kFewRows || depth_ == 1) &&
              all([](const Segment& s) { return s.b.column == 1; });
    if (turned_) few_ = few_of(kernel.rows);
    const bool along_depth = all([](const Segment& s) { return s.a.column == 1; });
    packs_rows_ =
        unit_ == 2 || (kernel.segments > 1 && !direct_) || (!along_depth && kernel.rows > 1 && depth_ > 1);
    along_depth_ = unit_ == 2 && along_depth;
    packed_from_ = direct_ ? kernel.columns / t.columns : 0;
    const int64_t most = std::max(right_bytes() / (4 * t.columns * panels_), kLeastDepth);
    blocks_ = kernel.kept != 0 ? 1 : ceil_div(depth_, most);
    longest_ = ceil_div(depth_, blocks_);
  }

  // Floats that `run` needs.
  int64_t scratch(int64_t threads) const {
    if (dots_) return 0;
    if (turned_) return depth_ * in_panels(kernel_.rows - few_) + ceil_div(depth_, 4) * 4 * t_.few;
    return right_size() + (packs_rows_ ? threads * tile_size() : 0);
  }

  double operations() const { return 2.0 * kernel_.rows * kernel_.columns * depth_ * unit_; }
  // Phases that `run` goes through.
  int64_t phases() const { return dots_ ? 1 : 2 * blocks_; }

  void run(float* const* memory, float* scratch, Worker& worker) const {
    if (dots_) return run_dots(memory, worker);
    if (turned_) return run_turned(memory, scratch, worker);
    float* const right = kernel_.kept != 0 ? kernel_.right.at(memory, 0, 0) : scratch;
    float* const left = scratch + right_size() + worker.number() * tile_size();
    for (int64_t block = 0; block < blocks_; ++block) {
      const int64_t begin = depth_ * block / blocks_, end = depth_ * (block + 1) / blocks_;
      pack(memory, begin, end, right, worker);
      multiply(memory, begin, end, right, left, worker);
    }
  }

 private:
  const Segment& segment(int64_t s) const { return kernel_.first_segment()[s]; }
  int64_t units(const Segment& s) const { return ceil_div(s.depth, unit_); }
  int64_t row(int64_t tile) const { return kernel_.rows * tile / tiles_; }
  int64_t width(int64_t panel) const { return std::min(t_.columns, kernel_.columns - panel * t_.columns); }
  int64_t right_size() const {
    return kernel_.kept != 0 ? 0 : longest_ * (panels_ - packed_from_) * t_.columns;
  }
  int64_t tile_size() const { return ceil_div(longest_ * t_.rows, 16) * 16; }
  int64_t in_panels(int64_t columns) const { return ceil_div(columns, t_.columns) * t_.columns; }
  // Of the rows that take the place of columns, those beyond the last panel, or half of one, where so few
  // are.
  int64_t few_of(int64_t rows) const {
    const int64_t beyond = rows % t_.columns, half = t_.columns / 2;
    return beyond <= t_.few ? beyond : beyond > half && beyond <= half + t_.few ? beyond - half : 0;
  }
  bool packed(int64_t panel) const { return panel >= packed_from_; }

  // Whether a statement makes the product, in place, what can be made of a tile in registers.
  bool applies(const Statement& s) const {
    const View& to = kernel_.to;
    const auto is_product = [&](const View& view) { return std::memcmp(&view, &to, sizeof to) == 0; };
    const View& other = s.from[1];
    switch (static_cast<Code>(s.code)) {
      case Code::kAdd:
      case Code::kAddRelu:
      case Code::kAddLeakyRelu:
        // A row for all: of a product of one row that may be itself, which is not written yet.
        if (other.row != 0 || other.column != 1 || (other.base == to.base && other.offset == to.offset))
          return false;
        break;
      case Code::kSigns:
        return t_.applies != 0 && is_product(s.from[0]);
      default:
        break;
    }
    return (t_.applies >> s.code & 1) != 0 && is_product(s.from[0]) && is_product(s.to);
  }

  void finish(float* const* memory, int64_t r0, int64_t r1, int64_t c0, int64_t c1, int64_t first = 0) const {
    for (int64_t s = first; s < kernel_.statements; ++s)
      t_.run(kernel_.first_statement()[s], memory, r0, r1, c0, c1);
  }

  // Has what a tile is written to, and what `finish` will touch, brought near while it is computed.
  void fetch(float* const* memory, int64_t r0, int64_t r1, int64_t c0, int64_t c1) const {
    const auto each = [&](const View& view, const auto& prefetch) {
      if (view.column != 1 || view.row == 0) return;
      for (int64_t r = r0; r < r1; ++r)
        for (int64_t c = c0; c < c1; c += 16) prefetch(view.at(memory, r, c));
    };
    each(kernel_.to, [](const float* at) { __builtin_prefetch(at, 1); });
    for (int64_t s = 0; s < kernel_.statements; ++s)
      for (const View& view : kernel_.first_statement()[s].from)
        if (view.offset != kernel_.to.offset || view.base != kernel_.to.base)
          each(view, [](const float* at) { __builtin_prefetch(at); });
  }

  void run_dots(float* const* memory, Worker& worker) const {
    constexpr int64_t kRows = 32;
    worker.share(ceil_div(kernel_.rows, kRows), [&](int64_t task) {
      const int64_t begin = task * kRows, end = std::min(begin + kRows, kernel_.rows);
      for (int64_t r = begin; r < end; ++r)
        *kernel_.to.at(memory, r, 0) =
            static_cast<float>(t_.dot(depth_, segment(0).a.at(memory, r, 0), segment(0).b.at(memory, 0, 0)));
      finish(memory, begin, end, 0, 1);
    });
  }

  // As Tiles::multiply, some depth at a time.
  void add_up(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t a_row, int64_t a_depth,
              const float* b, int64_t b_depth, float* c, int64_t c_row, bool add,
              const Applied* applied) const {
    const int64_t parts = ceil_div(depth, kSummedDepth);
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t k0 = depth * part / parts, k1 = depth * (part + 1) / parts;
      (unit_ == 2 ? t_.multiply16 : t_.multiply)(rows, columns, k1 - k0, a + k0 * a_depth, a_row, a_depth,
                                                 b + k0 * b_depth, b_depth, c, c_row, add || part > 0,
                                                 part + 1 == parts ? applied : nullptr);
    }
  }

  // As Tiles::multiply_few, some depth at a time.
  void add_up_few(int64_t rows, const float* a, int64_t a_row, const float* b, float* c) const {
    constexpr int64_t kDepth = 4 * kSummedDepth;
    for (int64_t k = 0; k < depth_; k += kDepth)
      t_.multiply_few(rows, std::min(kDepth, depth_ - k), a + k, a_row, b + k * t_.few, c, t_.columns, k > 0);
  }

  void pack_few(int64_t depth, const float* from, const View& strides, float* to) const {
    for (int64_t k = 0; k < depth; k += 4)
      for (int64_t r = 0; r < t_.few; ++r)
        for (int64_t i = k; i < k + 4; ++i)
          *to++ = r < few_ && i < depth ? from[r * strides.row + i * strides.column] : 0;
  }

  // The few rows take the place of the columns: they are laid out, and the right side is read where it lies.
  void run_turned(float* const* memory, float* scratch, Worker& worker) const {
    const Segment& s = segment(0);
    const int64_t many = kernel_.rows - few_;
    float* const few = scratch + depth_ * in_panels(many);
    constexpr int64_t kDepthOfParts = 64;
    worker.share(ceil_div(depth_, kDepthOfParts), [&](int64_t task) {
      const int64_t k = task * kDepthOfParts, depth = std::min(kDepthOfParts, depth_ - k);
      t_.pack(depth, many, s.a.at(memory, 0, k), s.a.column, s.a.row, scratch + k * t_.columns,
              depth_ * t_.columns);
      if (few_ > 0) pack_few(depth, s.a.at(memory, many, k), s.a, few + k * t_.few);
    });
    worker.share(panels_, [&](int64_t panel) {
      float block[32 * 32];
      const int64_t c0 = panel * t_.columns, columns = width(panel), parts = ceil_div(columns, t_.rows);
      for (int64_t r0 = 0, rows; r0 < kernel_.rows; r0 += rows) {
        rows = r0 < many ? std::min(t_.columns, many - r0) : few_;
        for (int64_t part = 0; part < parts; ++part) {
          const int64_t begin = columns * part / parts, end = columns * (part + 1) / parts;
          const float* const left = s.b.at(memory, 0, c0 + begin);
          float* const to = block + begin * t_.columns;
          if (r0 < many)
            add_up(end - begin, rows, depth_, left, s.b.column, s.b.row, scratch + r0 * depth_, t_.columns,
                   to, t_.columns, false, nullptr);
          else
            add_up_few(end - begin, left, s.b.column, few, to);
        }
        t_.turn(rows, columns, block, t_.columns, kernel_.to.at(memory, r0, c0), kernel_.to.row);
        finish(memory, r0, r0 + rows, c0, c0 + columns);
      }
    });
  }

  // Calls `run(segment, from, count, at)` for the parts of the segments between two depths, which like `at`
  // are in units, `from` and `count` in elements.
  template <typename Run>
  void in_segments(int64_t begin, int64_t end, const Run& run) const {
    int64_t start = 0;
    for (int64_t s = 0; s < kernel_.segments; start += units(segment(s++))) {
      const int64_t from = std::max(begin, start), to = std::min(end, start + units(segment(s)));
      if (from >= to) continue;
      const int64_t first = (from - start) * unit_;
      run(segment(s), first, std::min((to - start) * unit_, segment(s).depth) - first, from - begin);
    }
  }

  void pack(float* const* memory, int64_t begin, int64_t end, float* right, Worker& worker) const {
    const int64_t first = packed_from_;
    const bool in_depth = segment(0).b.column == 1;
    // Parts of the right side: some depth, or some panels where memory runs along the depth.
    const int64_t extent = kernel_.kept == 2 || first == panels_ ? 0
                           : in_depth                            ? end - begin
                                                                 : panels_ - first;
    const int64_t share = ceil_div(extent, 4 * worker.threads());
    const int64_t size = in_depth ? std::clamp<int64_t>(share, 1, kPackedDepth) : 1;
    const int64_t parts = ceil_div(extent, size);
    worker.share(parts, [&](int64_t task) {
      const int64_t k0 = in_depth ? begin + task * size : begin,
                    k1 = in_depth ? std::min(k0 + size, end) : end;
      const int64_t p0 = in_depth ? first : first + task, p1 = in_depth ? panels_ : p0 + 1;
      in_segments(k0, k1, [&](const Segment& s, int64_t from, int64_t depth, int64_t at) {
        (unit_ == 2 ? t_.pack16 : t_.pack)(
            depth, std::min(kernel_.columns, p1 * t_.columns) - p0 * t_.columns,
            s.b.at(memory, from, p0 * t_.columns), s.b.row, s.b.column,
            right + ((p0 - first) * longest_ + k0 - begin + at) * t_.columns, longest_ * t_.columns);
      });
    });
  }

  void pack_tile(float* const* memory, int64_t begin, int64_t end, int64_t tile, float* left) const {
    const int64_t r0 = row(tile), rows = row(tile + 1) - r0;
    in_segments(begin, end, [&](const Segment& s, int64_t from, int64_t depth, int64_t at) {
      const float* const a = s.a.at(memory, r0, from);
      float* const to = left + at * (along_depth_ ? 1 : rows);
      if (unit_ == 2)
        t_.pack_rows16(depth, rows, a, s.a.row, s.a.column, to, longest_);
      else
        t_.pack_rows(depth, rows, a, s.a.row, s.a.column, to);
    });
  }

  void multiply(float* const* memory, int64_t begin, int64_t end, const float* right, float* left,
                Worker& worker) const {
    const int64_t depth = end - begin;
    // Groups of panels that stay in the cache, and blocks of tiles: enough tasks for the threads. Of
    // what is read where it lies each thread takes panels of its own.
    const int64_t enough = worker.threads() == 1 ? 1 : kTasks * worker.threads();
    const int64_t bytes = 4 * t_.columns * depth * panels_;
    const int64_t least =
        direct_ && depth > 1 ? enough : std::max(ceil_div(bytes, right_bytes()), ceil_div(enough, tiles_));
    const int64_t groups = std::min(panels_, least), blocks = std::min(tiles_, ceil_div(enough, groups));
    worker.share(blocks * groups, [&](int64_t task) {
      const int64_t block = task / groups, group = task % groups;
      for (int64_t i = tiles_ * block / blocks; i < tiles_ * (block + 1) / blocks; ++i) {
        if (packs_rows_) pack_tile(memory, begin, end, i, left);
        for (int64_t panel = panels_ * group / groups; panel < panels_ * (group + 1) / groups; ++panel)
          tile(memory, i, panel, begin, depth, right, left, end == depth_);
      }
    });
  }

  void tile(float* const* memory, int64_t number, int64_t panel, int64_t begin, int64_t depth,
            const float* right, const float* left, bool last) const {
    const int64_t r0 = row(number), r1 = row(number + 1), c0 = panel * t_.columns, c1 = c0 + width(panel);
    const bool whole = c1 - c0 == t_.columns, straight = kernel_.to.column == 1;
    const bool in_place = straight && (whole || 2 * (c1 - c0) == t_.columns);
    const Applied applied{kernel_.first_statement(), applied_, memory, r0, c0};
    float edge[16 * 32];
    float* const c = in_place ? kernel_.to.at(memory, r0, c0) : edge;
    const int64_t c_row = in_place ? kernel_.to.row : t_.columns;
    const auto part = [&](const float* a, int64_t a_row, int64_t a_depth, const float* b, int64_t b_depth,
                          int64_t from, int64_t count) {
      const bool add = from > 0 || (in_place && begin > 0), ends = last && from + count == depth;
      add_up(r1 - r0, c1 - c0, count, a, a_row, a_depth, b, b_depth, c, c_row, add,
             ends && in_place && whole ? &applied : nullptr);
    };
    if (in_place) fetch(memory, r0, r1, c0, c1);
    // A left side that is laid out: row by row, or a tile's rows side by side.
    const int64_t left_row = along_depth_ ? longest_ : 1, left_depth = along_depth_ ? 1 : r1 - r0;
    const auto right_at = [&](int64_t at) {
      return right + ((panel - packed_from_) * longest_ + at) * t_.columns;
    };
    if (packs_rows_ && packed(panel))
      part(left, left_row, left_depth, right_at(0), t_.columns, 0, depth);
    else
      in_segments(begin, begin + depth, [&](const Segment& s, int64_t from, int64_t count, int64_t at) {
        const float* const b = packed(panel) ? right_at(at) : s.b.at(memory, from, c0);
        const int64_t b_depth = packed(panel) ? t_.columns : s.b.row;
        if (packs_rows_)
          part(left + at * left_depth, left_row, left_depth, b, b_depth, at, count);
        else
          part(s.a.at(memory, r0, from), s.a.row, count == 1 ? 1 : s.a.column, b, b_depth, at, count);
      });
    if (!in_place)
      for (int64_t i = 0; i < r1 - r0; ++i)
        for (int64_t j = 0; j < c1 - c0; ++j) {
          float& to = *kernel_.to.at(memory, r0 + i, c0 + j);
          to = edge[i * t_.columns + j] + (begin > 0 ? to : 0);
        }
    if (last) finish(memory, r0, r1, c0, c1, in_place && whole ? applied_ : 0);
  }

  const Kernel& kernel_;
  const Tiles& t_;
  const int64_t panels_, tiles_;
  int64_t depth_ = 0, blocks_ = 1, longest_ = 0;  // in units
  int64_t packed_from_ = 0;                       // panels before it are read where they lie
  int64_t applied_ = 0;                           // statements that are applied to tiles
  int64_t unit_ = 1;                              // elements of depth that a word holds
  int64_t few_ = 0;                               // rows that `multiply_few` takes
  bool dots_ = false, turned_ = false, direct_ = false, packs_rows_ = false, along_depth_ = false;
};

void run_statements(const Kernel& kernel, const Tiles& t, float* const* memory, Worker& worker) {
  const int64_t width = std::min(kernel.columns, kBlockColumns);
  const int64_t height = std::max<int64_t>(1, kBlockElements / width);
  const int64_t across = ceil_div(kernel.columns, width);
  worker.share(ceil_div(kernel.rows, height) * across, [&](int64_t task) {
    const int64_t r0 = task / across * height, c0 = task % across * width;
    for (int64_t s = 0; s < kernel.statements; ++s)
      t.run(kernel.first_statement()[s], memory, r0, std::min(r0 + height, kernel.rows), c0,
            std::min(c0 + width, kernel.columns));
  });
}

int64_t parts_of(const Sum& sum) { return ceil_div(sum.rows, kSumRows); }
int64_t scratch_of(const Sum& sum) { return sum.columns * (parts_of(sum) + 1); }

// In parts of so many rows, whatever the number of threads: it adds up in one order.
void run(const Sum& sum, const Tiles& t, float* const* memory, float* scratch, Worker& worker) {
  const int64_t parts = parts_of(sum), across = ceil_div(sum.columns, kSumColumns);
  float* const partial = scratch;
  float* const total = scratch + parts * sum.columns;
  worker.share(parts * across, [&](int64_t task) {
    const int64_t part = task / across, c0 = task % across * kSumColumns;
    t.sum(sum.from, memory, part * kSumRows, std::min((part + 1) * kSumRows, sum.rows), c0,
          std::min(c0 + kSumColumns, sum.columns), partial + part * sum.columns);
  });
  worker.share(1, [&](int64_t) {
    float* const of_parts[] = {partial};
    if (parts > 1) t.sum(View{0, 0, sum.columns, 1}, of_parts, 0, parts, 0, sum.columns, total);
    const auto scale = static_cast<float>(sum.scale.value());
    for (int64_t c = 0; c < sum.columns; ++c)
      *sum.to.at(memory, 0, c) = scale * (parts > 1 ? total : partial)[c];
  });
}

void run(const NormPenalty& of, const Tiles& t, float* const* memory, const std::array<double, 2>& numbers,
         Worker& worker) {
  const Penalty penalty{of.share.value() * numbers[0], numbers[1], of.one_sided != 0, of.groups};
  const float* const gradient = of.gradient.at(memory, 0, 0);
  float *const norms = of.norms.at(memory, 0, 0), *const seed = of.seed.at(memory, 0, 0);
  const int64_t height = std::max<int64_t>(1, kBlockElements / of.size);
  worker.share(ceil_div(of.groups, height), [&](int64_t task) {
    for (int64_t row = task * height; row < std::min((task + 1) * height, of.groups); ++row) {
      const float* const g = gradient + row * of.size;
      double squares = 0;
      for (int64_t i = 0; i < of.size; i += kBufferSize) {
        const int64_t count = std::min(kBufferSize, of.size - i);
        squares += t.dot(count, g + i, g + i);
      }
      norms[row] = static_cast<float>(std::sqrt(squares));
      const auto slope = static_cast<float>(penalty.slope(norms[row]));
      for (int64_t i = 0; i < of.size; ++i) seed[row * of.size + i] = slope * g[i];
    }
  });
  worker.share(1, [&](int64_t) {
    const auto [value, mean_norm] = penalty.of(norms);
    *of.value.at(memory, 0, 0) = static_cast<float>(value);
    *of.mean_norm.at(memory, 0, 0) = static_cast<float>(mean_norm);
  });
}

void run(const Draw& draw, const Tiles& t, float* const* memory, uint64_t seed, Worker& worker) {
  constexpr int64_t kWords = 256;
  auto* const to = reinterpret_cast<uint32_t*>(draw.to.at(memory, 0, 0));
  worker.share(ceil_div(draw.words, kWords), [&](int64_t task) {
    const int64_t first = task * kWords;
    t.draw(seed + static_cast<uint64_t>(draw.stream) * 0xD1342543DE82EF95, first,
           std::min(kWords, draw.words - first), static_cast<uint32_t>(draw.keep), to + first);
  });
}

// The words of a program before its first instruction: floats of planned memory; the number of inputs, and of
// elements in each; the number of outputs, and of dimensions of each, and their sizes.
class Header {
 public:
  explicit Header(const int64_t* words) : at_(words) {}

  int64_t next() { return *at_++; }
  const int64_t* rest() const { return at_; }

 private:
  const int64_t* at_;
};

std::vector<Tensor> run_program(const Tensor& program, const std::vector<Tensor>& inputs, double weight,
                                double target, int64_t seed) {
  STD_TORCH_CHECK(program.scalar_type() == ScalarType::Long && program.is_contiguous() && program.is_cpu(),
                  "expected a program: int64 words on the CPU");
  const auto* const words = static_cast<const int64_t*>(program.const_data_ptr());
  Header header(words);
  const int64_t planned = header.next();
  std::vector<float*> memory{nullptr};
  STD_TORCH_CHECK(header.next() == static_cast<int64_t>(inputs.size()), "expected as many inputs as planned");
  for (const auto& input : inputs) {
    STD_TORCH_CHECK(input.is_cpu() && input.scalar_type() == ScalarType::Float,
                    "expected float32 tensors on the CPU");
    STD_TORCH_CHECK(header.next() == input.numel(), "expected inputs of the sizes that were planned for");
    memory.push_back(static_cast<float*>(const_cast<void*>(input.const_data_ptr())));
  }
  std::vector<Tensor> outputs;
  for (int64_t count = header.next(); count > 0; --count) {
    std::vector<int64_t> sizes(header.next());
    for (auto& size : sizes) size = header.next();
    std::vector<int64_t> strides(sizes.size());
    int64_t numel = 1;
    for (size_t d = sizes.size(); d-- > 0; numel *= sizes[d]) strides[d] = numel;
    const int64_t bytes = 4 * numel;
    if (bytes < kKept) {
      outputs.push_back(empty(program, sizes, strides, ScalarType::Float));
    } else {
      const auto give_back = [bytes](void* data) {
        Memory::get().give_back(static_cast<float*>(data), bytes);
      };
      outputs.push_back(torch::stable::from_blob(Memory::get().take(bytes), sizes, strides,
                                                 torch::stable::Device(torch::headeronly::DeviceType::CPU),
                                                 ScalarType::Float, give_back));
    }
    memory.push_back(static_cast<float*>(outputs.back().mutable_data_ptr()));
  }
  const Tiles& t = tiles();
  const auto* const first = reinterpret_cast<const Instruction*>(header.rest());
  const auto* const end = reinterpret_cast<const Instruction*>(words + program.numel());
  const auto all_threads = static_cast<int64_t>(torch::stable::get_num_threads());
  int64_t spare = 0, phases = 0;
  double operations = 0;
  for (const auto* i = first; i < end; i = i->next()) {
    phases += 2;
    if (i->kind == Kind::kKernel) {
      const auto& kernel = i->body<Kernel>();
      operations += static_cast<double>(kernel.rows) * kernel.columns * kernel.statements;
      if (kernel.segments == 0) continue;
      STD_TORCH_CHECK(kernel.bf16 == 0 || t.multiply16 != nullptr,
                      "this processor has no products of bfloat16");
      const Product product(kernel, t);
      spare = std::max(spare, product.scratch(all_threads));
      phases += product.phases();
      operations += product.operations();
    }
    if (i->kind == Kind::kSum) spare = std::max(spare, scratch_of(i->body<Sum>()));
  }
  const Scratch scratch(planned + spare);
  memory[0] = scratch.data();
  float* const unplanned = scratch.data() + planned;
  const auto run_all = [&](Worker worker) {
    for (const auto* i = first; i < end; i = i->next()) {
      switch (i->kind) {
        case Kind::kKernel:
          if (i->body<Kernel>().segments > 0)
            Product(i->body<Kernel>(), t).run(memory.data(), unplanned, worker);
          else
            run_statements(i->body<Kernel>(), t, memory.data(), worker);
          break;
        case Kind::kSum:
          run(i->body<Sum>(), t, memory.data(), unplanned, worker);
          break;
        case Kind::kNormPenalty:
          run(i->body<NormPenalty>(), t, memory.data(), {weight, target}, worker);
          break;
        case Kind::kDraw:
          run(i->body<Draw>(), t, memory.data(), static_cast<uint64_t>(seed), worker);
          break;
      }
    }
  };
  const int64_t threads = operations < kAlone ? 1 : all_threads;
  if (threads == 1) {
    run_all(Worker(nullptr, 1, 0));
  } else {
    const std::unique_ptr<Worker::Counter[]> shared(new Worker::Counter[Worker::counters(phases, threads)]);
    torch::stable::parallel_for(
        0, threads, 1, [&](int64_t number, int64_t) { run_all(Worker(shared.get(), threads, number)); });
  }
  return outputs;
}

}  // namespace
}  // namespace wgan_fast

STABLE_TORCH_LIBRARY_IMPL(wgan_fast, CPU, m) { m.impl("run_program", TORCH_BOX(&wgan_fast::run_program)); }
