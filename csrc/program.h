// A program: what a flat graph computes, as instructions over matrices of float32 in planned memory.
//
// It arrives as one array of 64-bit words, written by wgan_fast/four_pass/program.py, and is run from where
// it lies: every struct here is made of such words alone, in the order in which they are written there.
#pragma once

#include <cstdint>
#include <cstring>

namespace wgan_fast {

// A matrix in memory number `base`; strides in elements.
struct View {
  int64_t base, offset, row, column;

  float* at(float* const* memory, int64_t i, int64_t j) const {
    return memory[base] + offset + i * row + j * column;
  }
};

// A word that holds a double.
struct Number {
  int64_t bits;

  double value() const {
    double value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }
};

// What a statement computes, in the order of wgan_fast/four_pass/program.py.
enum class Code : int64_t {
  kCopy,
  kAdd,
  kMultiply,
  kDivide,
  kScale,
  kLeakyRelu,
  kRelu,
  kLeakyReluBackward,
  kThresholdBackward,
  kMask,
  kLerp,
  kAddRelu,
  kAddLeakyRelu,
  kSigns,
  kGate,
  kGateLeaky,
};

// `to = f(from...)`, element by element.
struct Statement {
  int64_t code;
  View to;
  View from[3];
  Number numbers[2];
};

// A share of a product: the sum over `depth` of a (rows × depth) times b (depth × columns).
struct Segment {
  View a, b;
  int64_t depth;
};

// A matrix of `rows × columns`: the sum of its segments, if there are any, written to `to`; then statements.
// The right side as it is laid out for products is kept where several have the same: `kept` says whether this
// one has no place for it (0), is the first (1) or a later one (2).
struct Kernel {
  int64_t rows, columns;
  View to;
  int64_t bf16;  // whether what is multiplied is rounded to bfloat16
  int64_t kept;
  View right;
  int64_t segments, statements;

  const Segment* first_segment() const { return reinterpret_cast<const Segment*>(this + 1); }
  const Statement* first_statement() const {
    return reinterpret_cast<const Statement*>(first_segment() + segments);
  }
};

// `to[j] = scale · Σ_i from[i, j]`.
struct Sum {
  int64_t rows, columns;
  View from, to;
  Number scale;
};

// The operator gradient_norm_penalty on dense memory, with `share` times the call's weight.
struct NormPenalty {
  int64_t groups, size, one_sided;
  Number share;
  View gradient, value, mean_norm, norms, seed;
};

// Bits that are 1 with a probability of `keep` / 2^32, 32 to a word, each row from a word of its own.
struct Draw {
  int64_t words, keep, stream;
  View to;
};

enum class Kind : int64_t { kKernel, kSum, kNormPenalty, kDraw };

struct Instruction {
  Kind kind;
  int64_t words;  // of the body that follows

  template <typename Body>
  const Body& body() const {
    return *reinterpret_cast<const Body*>(this + 1);
  }
  const Instruction* next() const {
    return reinterpret_cast<const Instruction*>(reinterpret_cast<const int64_t*>(this + 1) + words);
  }
};

// Statements that a product applies to a tile, whose first row and column these are, before it is written.
struct Applied {
  const Statement* first;
  int64_t count;
  float* const* memory;
  int64_t row, column;
};

// The inner loops, compiled for one instruction set.
struct Tiles {
  const char* name;
  int64_t rows;     // of a tile, at most
  int64_t columns;  // of a tile: those of a panel, two vectors
  int64_t few;      // columns for which `multiply_few` is there

  // Codes of the statements that `multiply` can apply, as bits.
  uint64_t applies;

  // c (rows × columns, `c_row` apart) = or += a b, where half a panel or a whole one is written; a and b with
  // elements `a_depth` and `b_depth` apart in depth, b's columns side by side. To a whole one, statements may
  // be applied that overwrite c with what they make of it.
  void (*multiply)(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t a_row,
                   int64_t a_depth, const float* b, int64_t b_depth, float* c, int64_t c_row, bool add,
                   const Applied* applied);
  // As `multiply` for at most `few` columns of b, which lie by four elements of depth, those of a column side
  // by side: where tiles would be empty but for these. The elements of a row of a lie side by side.
  void (*multiply_few)(int64_t rows, int64_t depth, const float* a, int64_t a_row, const float* b, float* c,
                       int64_t c_row, bool add);
  // Lays columns of b out for multiply in panels, `to_panel` apart; with zeros up to a whole one.
  void (*pack)(int64_t depth, int64_t columns, const float* b, int64_t b_depth, int64_t b_column, float* to,
               int64_t to_panel);
  // Lays `rows` rows of a out for multiply: those of a tile side by side, one depth after the other.
  void (*pack_rows)(int64_t depth, int64_t rows, const float* a, int64_t a_row, int64_t a_depth, float* to);
  // The same with values rounded to bfloat16, two in depth to a word, and depths counted in such words; null
  // where the processor has none. A left side whose rows run along the depth is laid out row by row.
  void (*multiply16)(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t a_row,
                     int64_t a_depth, const float* b, int64_t b_depth, float* c, int64_t c_row, bool add,
                     const Applied* applied);
  void (*pack16)(int64_t depth, int64_t columns, const float* b, int64_t b_depth, int64_t b_column, float* to,
                 int64_t to_panel);
  void (*pack_rows16)(int64_t depth, int64_t rows, const float* a, int64_t a_row, int64_t a_depth, float* to,
                      int64_t to_row);
  // Writes what `from` has in columns, `from_row` apart, in rows.
  void (*turn)(int64_t rows, int64_t columns, const float* from, int64_t from_row, float* to, int64_t to_row);
  double (*dot)(int64_t count, const float* a, const float* b);
  // Runs a statement on rows r0 to r1 and columns c0 to c1.
  void (*run)(const Statement& statement, float* const* memory, int64_t r0, int64_t r1, int64_t c0,
              int64_t c1);
  // Adds rows r0 to r1 of columns c0 to c1 up into to[c0..c1].
  void (*sum)(const View& from, float* const* memory, int64_t r0, int64_t r1, int64_t c0, int64_t c1,
              float* to);
  // Random bits; see Draw.
  void (*draw)(uint64_t seed, int64_t first, int64_t count, uint32_t keep, uint32_t* to);
};

// Of the best instruction set that this processor has.
const Tiles& tiles();

// Columns of the blocks in which statements without a product run.
constexpr int64_t kBlockColumns = 512;

}  // namespace wgan_fast
