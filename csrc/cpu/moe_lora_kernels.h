// The steps of a mixture of LoRA experts that are compiled once per instruction set. No torch here.
//
// Dims: T tokens, I inputs, O outputs, E experts, R packed columns. A step works on a block of
// rows or a panel of columns, so that the caller can share the work out among threads; a result
// does not depend on how. tile.h says what a panel is; operands of tiles are `elem`, sums `acc`.
#pragma once

#include <cstdint>

#include "cpu/element.h"
#include "cpu/isa.h"
#include "cpu/philox.h"

namespace floe::cpu {

struct Matrix {  // (rows, cols), a row every ld elements
  const void* data;
  Dtype dtype;
  int64_t rows, cols, ld;
};

struct Shrink {  // sums (M, N) = x (M, K) times packed columns
  const void* x;
  int64_t ld, M, K, N;
  const uint8_t* keep;  // bits of x, or null
  int64_t keep_ld;
  const void* panels;
  void* sums;
  int64_t ld_sums;  // >= N rounded up to whole vectors
};

struct Term {  // (M, K) elements times packed rows (K, O)
  const void* rows = nullptr;
  int64_t ld = 0, K = 0;
  const void* panels = nullptr;
};

// out (M, O) = base, null for zero, + scale * keep * first + second
struct Expand {
  int64_t M, O;
  Term first, second;
  const uint8_t* keep;
  int64_t keep_ld;
  double scale;
  const void* base;
  void* out;
  int64_t ld_base, ld_out;
};

// out (N, columns) = scale * coefficients^T rows, for one panel of columns
struct WeightGrad {
  int64_t N;
  const void* coefficients;  // tiled: (N / mr, units of T, mr, pack)
  bool keep;                 // whether dropout applies to the rows
  double scale;
  void* out;
  Dtype dtype;
  int64_t ld_out;
};

struct RowsOf {  // the rows a WeightGrad sums over
  const void* data;
  int64_t ld, cols;
  const int64_t* rows;  // which, or null for all, in order
  int64_t T;
  const bool* mask;  // of data's rows
  const uint8_t* keep;
  int64_t keep_ld;
};

struct GatherDots {  // sums (M, N) = rows[0..M] of x times rows of w
  const void* x;
  int64_t ld, K;
  const int64_t* rows;  // or null: rows first, first + 1, ...
  int64_t first, M;
  const uint8_t* keep;
  int64_t keep_ld;
  const void* w;
  Dtype w_dtype;  // that of x, or float32
  int64_t ld_w, N;
  void* sums;
  int64_t ld_sums;
  void* scratch;  // kDotScratchRows rows of K + 1 elements, where keep is given
};

inline constexpr int64_t kDotScratchRows = 8;

// What M tokens multiply in the dense regime, zero in the columns of experts that a token does not
// keep: h = scaling * gate * z and, from u = dy lora_B^T, dz = scaling * gate * u, summed over the
// experts where they share one A.
struct TokenRows {
  int64_t M, R, C, K;
  const int64_t* first;  // (experts + 1,) columns
  bool shared_A;
  const bool* mask;        // (M,) or null
  const void* scaling;     // (R,) sums' type, readable in whole vectors
  const void* z;           // (M, C) in x's dtype
  const int64_t* experts;  // (M, K)
  const void* gates;       // (M, K) sums' type
  const void* u;           // (M, ld_u >= R in whole vectors), or null: h alone
  int64_t ld_u;
  void *h, *dz;  // (M, ld) elements, zero from R and C to the next unit
  int64_t ld;
  void* grad_gates;  // (M, K) sums of scaling * z * u
  void* scratch;     // token_scratch(R) bytes
};

inline int64_t token_scratch(int64_t R) { return (R + 128) * 33; }  // three sums, x, a bit

// Rows (M, N), readable in whole vectors, as coefficients of weight_grad from unit q on.
struct TileRows {
  const void* rows;
  int64_t ld, M, N;
  void* tiled;
  int64_t Q, q;
};

// M slots of one expert, from u = dy lora_B^T to what multiplies x and dy in every gradient.
struct SlotGrads {
  int64_t M, rank;
  const void* scaling;  // (rank,) sums' type
  const void* u;        // (M, rank)
  int64_t ld_u;
  const void* z;  // (tokens, C) from the expert's first column on, in x's dtype
  int64_t C;
  const void* gates;      // (tokens, K)
  const int64_t* tokens;  // of every slot
  const int64_t* choices;
  int64_t K;
  void* grad_gates;  // (tokens, K) sums of scaling * z * u
  void* dz;          // (M, ld_dz) elements, scaling * gate * u, then zeros to the end of a unit
  int64_t ld_dz;
  // (rank / mr, Q, mr) units of dz and of h = scaling * gate * z; the first slot's is unit q
  void *dz_tiled, *h_tiled;
  int64_t Q, q;
};

struct Segment {  // an expert's slots: rows of `first`, and their tokens
  int64_t begin, end;
  Matrix weight;  // its (r, O) rows
};

// As Expand for tokens begin..end and some panels of columns; `first` runs over slots.
struct GatherExpand {
  int64_t begin, end, O;
  const Segment* segments;
  int64_t num_segments;
  const int64_t* tokens;  // of every slot
  const void* slots;      // elements, a row every ld_slots
  int64_t ld_slots;
  Term second;
  const uint8_t* keep;
  int64_t keep_ld;
  double scale;
  const void* base;
  void* out;
  int64_t ld_base, ld_out;
};

struct Kernels {
  Dtype elem;
  int64_t pack, mr, nr, lanes;  // elements in a unit; register tile; columns in a vector
  void (*pack_columns)(const Matrix&, int64_t panel, void* out);
  void (*pack_rows)(const Matrix&, int64_t panel, void* out);
  void (*keep_bits)(const Dropout&, int64_t first_row, int64_t rows, int64_t cols, uint8_t* out,
                    int64_t ld);
  void (*shrink)(const Shrink&);
  void (*narrow_rows)(const void* sums, int64_t ld, int64_t M, int64_t N, double scale, void* out,
                      int64_t ld_out);
  void (*expand)(const Expand&);
  // Columns of panels first..last, whose rows are read together; see grad_panels and grad_scratch.
  void (*weight_grad)(const RowsOf&, int64_t first, int64_t last, const WeightGrad*, int64_t count,
                      void* scratch);
  void (*gather_dots)(const GatherDots&);
  void (*token_rows)(const TokenRows&);
  void (*tile_rows)(const TileRows&);
  void (*slot_grads)(const SlotGrads&);
  // Columns of panels first..last; see expand_panels and expand_scratch.
  void (*gather_expand)(const GatherExpand&, int64_t first, int64_t last, void* scratch);
};

// Rows of sums up to which weight_grad packs whole rows of a few thousand columns.
inline constexpr int64_t kFewSums = 32;
inline constexpr int64_t kGradUnits = 128;

// Rows of a panel that weight_grad packs at a time, in units, for N rows of sums. A function of
// shapes alone: the order of the sums follows from it, whoever computes which panels.
inline int64_t grad_units(int64_t nr, int64_t N, int64_t columns) {
  const int64_t panels = (columns + nr - 1) / nr;
  if (N > kFewSums || panels <= 16) return kGradUnits;
  const int64_t fit = (384 << 10) / ((panels < 48 ? panels : 48) * nr * 4) / 4 * 4;
  return fit < kGradUnits ? fit : kGradUnits;
}

// Panels that weight_grad should work on together where its gradients have N rows, each rounded up
// to mr: as many as leave their sums in L2, since the longer the runs in which rows are read, the
// less it waits for memory.
inline int64_t grad_panels(const Kernels& kernels, int64_t N) {
  const int64_t fit = (768 << 10) / ((N + 1) * kernels.nr * 4), most = N > kFewSums ? 16 : 48;
  return fit < 1 ? 1 : fit < most ? fit : most;
}

// Bytes of weight_grad's scratch for so many panels of a matrix.
inline int64_t grad_scratch(const Kernels& kernels, int64_t N, int64_t panels, int64_t columns) {
  return panels * (N + grad_units(kernels.nr, N, columns)) * kernels.nr * 8;
}

// Panels that gather_expand should work on together for M tokens and slots `ld` long: as with
// weight_grad, the sums and one expert's weights stay in L2 while rows are read and written in
// runs.
inline int64_t expand_panels(const Kernels& kernels, int64_t M, int64_t ld) {
  const int64_t fit = (384 << 10) / ((M + ld + 8) * kernels.nr * 4);
  return fit < 1 ? 1 : fit < 16 ? fit : 16;
}

// Bytes of gather_expand's scratch for so many panels.
inline int64_t expand_scratch(const Kernels& kernels, int64_t M, int64_t ld, int64_t panels) {
  return panels * (M + ld + 8) * kernels.nr * 8;
}

// For x of this dtype; an instruction set without its own uses the next lower one's.
const Kernels& moe_lora_kernels(Dtype x, Isa isa);

namespace tables {
const Kernels* default_isa(Dtype x);
const Kernels* avx2(Dtype x);
const Kernels* avx512(Dtype x);
const Kernels* avx512_bf16(Dtype x);
const Kernels* amx(Dtype x);
}  // namespace tables

}  // namespace floe::cpu
