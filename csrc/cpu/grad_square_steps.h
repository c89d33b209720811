// The step of grad_square_kernels.h for one Machine and one dtype. No torch here.
#pragma once

#include "cpu/grad_square_kernels.h"
#include "cpu/tile.h"

namespace floe::cpu {
namespace {

template <typename V, typename scalar_t>
struct GradSquareSteps {
  using elem = typename V::elem;
  using unit = typename V::unit;
  using acc = typename V::acc;
  using reg = typename V::reg;
  static constexpr int64_t NR = kNR<V>, MR = V::kMR;
  // A panel of so many rows of x is 24 KiB: it stays in L1 while every tile of g passes over it.
  static constexpr int64_t kDepth = 24576 / (NR * sizeof(unit)) * V::kPack;
  // What the panels that a thread works on at once may take of its cache: their sums, and their
  // rows of x. The more panels, the longer the runs in which x is read: that is what it waits for.
  static constexpr int64_t kSumsBytes = 768 << 10, kPackedBytes = 384 << 10, kMostPanels = 64;

  static int64_t group(const SegmentGradSquare& s) {
    const int64_t fit = kSumsBytes / (3 * (s.R + 1) * NR * int64_t{sizeof(acc)});
    return least(fit < 1 ? 1 : least(fit, kMostPanels), ceil_div(s.D + 1, NR));
  }

  // Rows of a chunk, in whole units.
  static int64_t depth(const SegmentGradSquare& s) {
    return least(kDepth, kPackedBytes / (group(s) * NR * int64_t{sizeof(unit)}) * V::kPack);
  }

  static_assert(kPackedBytes >= kMostPanels * NR * int64_t{sizeof(unit)} * 4, "depth is not 0");

  static int64_t tiles_of(const SegmentGradSquare& s) { return ceil_div(s.R, MR); }

  // Where piece p starts in the tiles: a piece may take up a unit more than its rows.
  static int64_t start(const SegmentGradSquare& s, int64_t p) {
    return (s.pieces[p].begin + p * (V::kPack - 1)) * tiles_of(s) * MR;
  }

  static int64_t tiles_size(const SegmentGradSquare& s) {
    return (s.N + s.num_pieces * (V::kPack - 1)) * tiles_of(s) * MR;
  }

  // Piece by piece (tiles, units, MR, pack): what any_tile reads front to back.
  static void tile_rows(const SegmentGradSquare& s, int64_t first, int64_t last, void* tiles) {
    const auto* g = static_cast<const scalar_t*>(s.g);
    for (int64_t p = first; p < last; ++p) {
      const Piece& piece = s.pieces[p];
      const int64_t Q = units<V>(piece.length);
      elem* out = static_cast<elem*>(tiles) + start(s, p);
      for (int64_t m0 = 0; m0 < s.R; m0 += MR) {
        for (int64_t q = 0; q < Q; ++q) {
          for (int64_t m = m0; m < m0 + MR; ++m) {
            for (int i = 0; i < V::kPack; ++i) {
              const int64_t t = q * V::kPack + i;
              const bool inside = m < s.R && t < piece.length;
              *out++ = inside ? narrow<elem>(widen(g[(piece.begin + t) * s.ld_g + m])) : elem{};
            }
          }
        }
      }
    }
  }

  // Consecutive pieces, or a part of one, whose rows fit a panel: rows begin..begin + K.
  struct Chunk {
    int64_t first, last, begin, K;
  };

  // The chunk of at most so many rows after `previous`. A piece takes whole units, so every piece
  // may cost one more row.
  static Chunk next(const SegmentGradSquare& s, int64_t most, const Chunk& previous) {
    const int64_t begin = previous.begin + previous.K;
    int64_t first = previous.last;
    if (first > 0) {
      const Piece& before = s.pieces[first - 1];
      if (before.begin + before.length > begin) {  // a long piece goes on
        return {first - 1, first, begin, least(most, before.begin + before.length - begin)};
      }
    }
    Chunk chunk{first, first, begin, 0};
    for (int64_t taken = 0; chunk.last < s.num_pieces; ++chunk.last) {
      const int64_t length = s.pieces[chunk.last].length;
      const int64_t rows = units<V>(length) * V::kPack;
      if (taken + rows > most) {
        if (chunk.last == first) {
          chunk.K = most;
          ++chunk.last;
        }
        break;
      }
      taken += rows;
      chunk.K += length;
    }
    return chunk;
  }

  // One register tile of rows m.. of one panel, piece after piece: what it adds to stays in L1.
  static void tile_pieces(const SegmentGradSquare& s, const Chunk& chunk, int64_t p, int64_t m,
                          const unit* panel, acc* sums, acc* grad, acc* fisher) {
    const int64_t M = least(MR, s.R - m), width = panel_width<V>(s.D, p);
    for (int64_t i = chunk.first; i < chunk.last; ++i) {
      const Piece& piece = s.pieces[i];
      const int64_t k0 = piece.begin < chunk.begin ? chunk.begin - piece.begin : 0;
      const int64_t K = least(piece.length - k0, chunk.K);
      if (K == 0) continue;
      const elem* a = static_cast<const elem*>(s.tiles) + start(s, i) +
                      m * units<V>(piece.length) * V::kPack + k0 * MR;
      any_tile<V>(M, units<V>(K), a, V::kPack, MR * V::kPack, panel, width, sums, NR, k0 > 0);
      panel += units<V>(K) * width;
      if (k0 + K < piece.length) continue;  // the rest of it is in the next chunk
      if (piece.sample < 0) {
        add(M, sums, grad);
        continue;
      }
      const acc scale = s.scale ? acc{s.scale[s.scale_each ? piece.sample : 0]} : acc{1};
      s.norms[p * s.S + piece.sample] += fisher ? add_scored<true>(M, sums, scale, grad, fisher)
                                                : add_scored<false>(M, sums, scale, grad, fisher);
    }
  }

  // The rows of a chunk in `count` panels from p0 on, each `size` units.
  static void pack(const SegmentGradSquare& s, const Chunk& chunk, int64_t p0, int64_t count,
                   int64_t size, unit* packed) {
    const Rows<scalar_t> x{static_cast<const scalar_t*>(s.x), s.ld_x};
    int64_t done = 0;  // units
    for (int64_t i = chunk.first; i < chunk.last; ++i) {
      const Piece& piece = s.pieces[i];
      const int64_t from = piece.begin < chunk.begin ? chunk.begin : piece.begin;
      const int64_t K = least(piece.begin + piece.length, chunk.begin + chunk.K) - from;
      pack_panels<V>(x, from, K, s.D, p0, p0 + count, size, done, packed);
      done += units<V>(K);
    }
  }

  // Adds M rows of one sample's gradient to the running sums; returns the sum of their squares.
  template <bool kElements>
  static acc add_scored(int64_t M, const acc* sums, acc scale, acc* grad, acc* fisher) {
    reg norm[V::kNV];  // as many chains of additions as a row has vectors
    for (int v = 0; v < V::kNV; ++v) norm[v] = V::zero();
    for (int64_t n = 0; n < M * NR; n += NR) {
#pragma GCC unroll 4
      for (int v = 0; v < V::kNV; ++v) {
        const int64_t at = n + v * V::kLanes;
        const reg value = V::load(sums + at);
        V::store(grad + at, V::add(V::load(grad + at), value));
        const reg scaled = V::scale(value, scale), square = multiply(scaled, scaled);
        norm[v] = V::add(norm[v], square);
        if constexpr (kElements) V::store(fisher + at, V::add(V::load(fisher + at), square));
      }
    }
    for (int v = 1; v < V::kNV; ++v) norm[0] = V::add(norm[0], norm[v]);
    return V::total(norm[0]);
  }

  static void add(int64_t M, const acc* sums, acc* grad) {
    for (int64_t n = 0; n < M * NR; n += V::kLanes) {
      V::store(grad + n, V::add(V::load(grad + n), V::load(sums + n)));
    }
  }

  static FLOE_INLINE reg multiply(reg a, reg b) { return a * b; }

  static int64_t scratch_size(const SegmentGradSquare& s) {
    return group(s) * NR * (s.R * 3 * sizeof(acc) + units<V>(depth(s)) * sizeof(unit));
  }

  static FLOE_INLINE void clear(acc* out, int64_t size) {
    for (int64_t i = 0; i < size; ++i) out[i] = 0;
  }

  static void panels(const SegmentGradSquare& s, int64_t first, int64_t last, void* scratch) {
    const bool elements = s.fisher || s.fisher_rows;
    const int64_t together = group(s), most = depth(s);
    const int64_t size = s.R * NR, packed_size = units<V>(most) * NR;  // of one panel
    acc* sums = static_cast<acc*>(scratch);
    acc *grad = sums + size * together, *fisher = grad + size * together;
    unit* packed = reinterpret_cast<unit*>(fisher + size * together);
    for (int64_t p0 = first; p0 < last; p0 += together) {
      const int64_t count = least(together, last - p0);
      clear(sums, 3 * size * together);  // a last, narrow panel leaves the rest of its rows zero
      for (Chunk c = next(s, most, Chunk{}); c.first < c.last; c = next(s, most, c)) {
        pack(s, c, p0, count, packed_size, packed);
        for (int64_t p = 0; p < count; ++p) {
          for (int64_t m = 0; m < s.R; m += MR) {
            const int64_t at = p * size + m * NR;
            tile_pieces(s, c, p0 + p, m, packed + p * packed_size, sums + at, grad + at,
                        elements ? fisher + at : nullptr);
          }
        }
      }
      for (int64_t p = 0; p < count; ++p) {
        write(s, p0 + p, grad + p * size, fisher + p * size);
      }
    }
  }

  static void write(const SegmentGradSquare& s, int64_t p, const acc* grad, const acc* fisher) {
    const int64_t n0 = p * NR, N = least(NR, s.D - n0);
    for (int64_t r = 0; r < s.R; ++r) {
      auto* out = static_cast<scalar_t*>(s.grad) + r * s.D + n0;
      for (int64_t n = 0; n < N; ++n) out[n] = narrow<scalar_t>(grad[r * NR + n]);
      const acc* row = fisher + r * NR;
      double total = 0;  // a long sum of float32 would lose digits that a pairwise one keeps
      for (int64_t n = 0; n < N; ++n) {
        if (s.fisher) static_cast<acc*>(s.fisher)[r * s.D + n0 + n] = row[n];
        total += row[n];
      }
      if (s.fisher_rows) s.fisher_rows[p * s.R + r] = total;
    }
  }

  static constexpr GradSquareKernels table() {
    return {NR, tiles_size, sizeof(elem), tile_rows, scratch_size, panels};
  }
};

}  // namespace
}  // namespace floe::cpu
