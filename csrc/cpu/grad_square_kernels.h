// The step of segment_grad_square that is compiled once per instruction set. No torch here.
//
// Dims: N rows, R rows of the weight, D its columns, S samples, P pieces.
#pragma once

#include <cstdint>

#include "cpu/element.h"
#include "cpu/isa.h"

namespace floe::cpu {

// Rows begin..begin + length belong to one sample, or, with sample < 0, to none: such rows count in
// the gradient alone. Pieces cover 0..N in order.
struct Piece {
  int64_t begin, length, sample;
};

struct SegmentGradSquare {
  int64_t N, R, D;
  const void* g;  // (N, R), a row every ld_g elements
  const void* x;  // (N, D), a row every ld_x elements
  int64_t ld_g, ld_x;
  const Piece* pieces;
  int64_t num_pieces;
  const float* scale;  // one, or one a sample, or null
  bool scale_each;
  const void* tiles;    // g, as tile_rows left it
  void* grad;           // (R, D) of x's dtype
  void* fisher;         // (R, D) sums, or null
  double* fisher_rows;  // (panels, R) sums, or null
  double* norms;        // (panels, S) sums
  int64_t S;
};

struct GradSquareKernels {
  int64_t columns;  // of a panel
  // Elements that tiles takes up, and filling it with pieces first..last; any two may run at once.
  int64_t (*tiles_size)(const SegmentGradSquare&);
  int64_t element_size;
  void (*tile_rows)(const SegmentGradSquare&, int64_t first, int64_t last, void* tiles);
  // Columns of panels first..last. What a panel writes does not depend on the others. The scratch
  // is one thread's, of scratch_size bytes, aligned to 64.
  int64_t (*scratch_size)(const SegmentGradSquare&);
  void (*panels)(const SegmentGradSquare&, int64_t first, int64_t last, void* scratch);
};

// For g and x of this dtype; an instruction set without its own uses the next lower one's.
const GradSquareKernels& grad_square_kernels(Dtype dtype, Isa isa);

namespace grad_square_tables {
const GradSquareKernels* default_isa(Dtype dtype);
const GradSquareKernels* avx2(Dtype dtype);
const GradSquareKernels* avx512(Dtype dtype);
const GradSquareKernels* avx512_bf16(Dtype dtype);
const GradSquareKernels* amx(Dtype dtype);
}  // namespace grad_square_tables

}  // namespace floe::cpu
