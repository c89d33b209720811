// Register tiles of a matrix product, and the panels they read. No torch here; see vec.h.
//
// Dims: M rows, N columns, K elements along the sum, Q = ceil(K / kPack) units.
// A panel holds up to kNR columns of the right operand, unit after unit: (Q, width), its width
// rounded up to whole vectors, zero beyond N and K. Panel p of a matrix starts at p * kNR * Q.
#pragma once

#include "cpu/vec.h"

namespace floe::cpu {
namespace {

FLOE_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
FLOE_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename V>
constexpr int64_t kNR = V::kNV * V::kLanes;

template <typename V>
FLOE_INLINE int64_t units(int64_t K) {
  return ceil_div(K, V::kPack);
}

template <typename V>
FLOE_INLINE int64_t panel_width(int64_t N, int64_t p) {
  return ceil_div(least(N - p * kNR<V>, kNR<V>), V::kLanes) * V::kLanes;
}

// sum += a times the panel b, a unit at a time: what every tile does with its registers.
template <typename V, int MR, int NV>
FLOE_INLINE void accumulate(typename V::reg (&sum)[MR][NV], int64_t Q, const typename V::elem* a,
                            int64_t a_m, int64_t a_q, const typename V::unit* b, int64_t width) {
  for (int64_t q = 0; q < Q; ++q) {
    typename V::ureg column[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) column[v] = V::load_units(b + v * V::kLanes);
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
      const typename V::ureg row =
          V::broadcast(reinterpret_cast<const typename V::unit*>(a + m * a_m));
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) sum[m][v] = V::multiply_add(sum[m][v], row, column[v]);
    }
    a += a_q;
    b += width;
  }
}

// sums (MR, NV * kLanes) of a (MR, Q) and a panel b. Element (m, q) of a is at m * a_m + q * a_q,
// in units of the element type: a may be rows of a wide matrix, or a packed tile. To add is the
// last step, not the first: a long sum cut into blocks then rounds like a tree, not like a chain.
template <typename V, int MR, int NV>
void tile(int64_t Q, const typename V::elem* a, int64_t a_m, int64_t a_q, const typename V::unit* b,
          int64_t width, typename V::acc* sums, int64_t ld, bool add) {
  using acc = typename V::acc;
  typename V::reg sum[MR][NV];
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      sum[m][v] = V::zero();
    }
  }
  accumulate<V>(sum, Q, a, a_m, a_q, b, width);
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      acc* to = sums + m * ld + v * V::kLanes;
      V::store(to, add ? V::add(V::load(to), sum[m][v]) : sum[m][v]);
    }
  }
}

template <typename V, int MR>
FLOE_INLINE void tile_rows(int vectors, int64_t Q, const typename V::elem* a, int64_t a_m,
                           int64_t a_q, const typename V::unit* b, int64_t width,
                           typename V::acc* sums, int64_t ld, bool add) {
  if constexpr (V::kNV >= 3) {
    if (vectors == 3) return tile<V, MR, 3>(Q, a, a_m, a_q, b, width, sums, ld, add);
  }
  if (vectors == 2) return tile<V, MR, 2>(Q, a, a_m, a_q, b, width, sums, ld, add);
  tile<V, MR, 1>(Q, a, a_m, a_q, b, width, sums, ld, add);
}

// The same with 1..kMR rows and 1..kNV vectors.
template <typename V>
void any_tile(int64_t M, int64_t Q, const typename V::elem* a, int64_t a_m, int64_t a_q,
              const typename V::unit* b, int64_t width, typename V::acc* sums, int64_t ld,
              bool add) {
  const int vectors = static_cast<int>(width / V::kLanes);
#define FLOE_ROWS(MR)                                                     \
  case MR:                                                                \
    if constexpr (MR <= V::kMR)                                           \
      tile_rows<V, MR>(vectors, Q, a, a_m, a_q, b, width, sums, ld, add); \
    break
  switch (M) {
    FLOE_ROWS(1);
    FLOE_ROWS(2);
    FLOE_ROWS(3);
    FLOE_ROWS(4);
    FLOE_ROWS(5);
    FLOE_ROWS(6);
    FLOE_ROWS(7);
    FLOE_ROWS(8);
  }
#undef FLOE_ROWS
}

template <typename V>
struct Product {  // Q units of rows `ld` elements apart, and of a panel
  const typename V::elem* rows;
  int64_t ld, Q;
  const typename V::unit* panel;
};

// out (kMR, kNR) = base, null for zero, + the sum of one or two products, whose rows are
// those of wide matrices: what tile() would store and read again stays in registers.
template <typename V, typename scalar_t>
void expand_tile(const Product<V>& first, const Product<V>& second, const scalar_t* base,
                 int64_t ld_base, scalar_t* out, int64_t ld_out) {
  typename V::reg sum[V::kMR][V::kNV];
#pragma GCC unroll 8
  for (int m = 0; m < V::kMR; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < V::kNV; ++v) sum[m][v] = V::zero();
  }
  accumulate<V>(sum, first.Q, first.rows, first.ld, V::kPack, first.panel, kNR<V>);
  accumulate<V>(sum, second.Q, second.rows, second.ld, V::kPack, second.panel, kNR<V>);
#pragma GCC unroll 8
  for (int m = 0; m < V::kMR; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < V::kNV; ++v) {
      if (base) sum[m][v] = V::add(V::load_wide(base + m * ld_base + v * V::kLanes), sum[m][v]);
      V::store_narrow(out + m * ld_out + v * V::kLanes, sum[m][v]);
    }
  }
}

// Copies K elements of a row into Q units. keep, where given, has one bit an element and is zero
// where the element is dropped; `first` is the bit of row[0], a multiple of 16.
template <typename V, typename scalar_t>
void stage_row(const scalar_t* row, int64_t K, const uint8_t* keep, int64_t first,
               typename V::elem* out) {
  using elem = typename V::elem;
  int64_t k = 0;
  if (std::is_same_v<scalar_t, elem> && !keep) {
    std::memcpy(static_cast<void*>(out), row, K * sizeof(elem));
    k = K;
  }
  for (; k + V::kLanes <= K; k += V::kLanes) {
    typename V::reg r = V::load_wide(row + k);
    if (keep) r = V::select(keep, first + k, r);
    V::store_narrow(out + k, r);
  }
  for (; k < K; ++k) {
    const bool kept = !keep || (keep[(first + k) / 8] >> (first + k) % 8 & 1);
    out[k] = kept ? narrow<elem>(widen(row[k])) : elem{};
  }
  for (; k % V::kPack; ++k) out[k] = elem{};
}

// Panel p of the transpose of w (N, K): its columns are rows of w.
template <typename V, typename scalar_t>
void pack_columns(const scalar_t* w, int64_t ld, int64_t N, int64_t K, int64_t p,
                  typename V::unit* out) {
  using unit = typename V::unit;
  constexpr int64_t kChunk = 256;  // a row's share: 1 KiB of units, read once and spread
  const int64_t n0 = p * kNR<V>, width = panel_width<V>(N, p);
  alignas(64) unit row[kChunk / V::kPack];
  for (int64_t k0 = 0; k0 < K; k0 += kChunk) {
    const int64_t length = least(kChunk, K - k0), Q = units<V>(length);
    unit* to = out + k0 / V::kPack * width;
    for (int64_t n = 0; n < width; ++n) {
      if (n0 + n < N) {
        stage_row<V>(w + (n0 + n) * ld + k0, length, nullptr, 0,
                     reinterpret_cast<typename V::elem*>(row));
        for (int64_t q = 0; q < Q; ++q) to[q * width + n] = row[q];
      } else {
        for (int64_t q = 0; q < Q; ++q) to[q * width + n] = unit{};
      }
    }
  }
}

// Some rows of a matrix: row k is data + (rows ? rows[k] : k) * ld. Rows that `mask` does not keep
// are read as zero, whatever they hold, and so are elements without their bit in `keep`.
template <typename scalar_t>
struct Rows {
  const scalar_t* data;
  int64_t ld;
  const int64_t* rows = nullptr;
  const bool* mask = nullptr;     // of data's rows
  const uint8_t* keep = nullptr;  // data's rows are keep_ld bytes apart
  int64_t keep_ld = 0;
};

// Unit q of a sum over K rows from k0 on: kPack rows, null where one is masked or beyond K.
template <typename V, typename scalar_t>
struct RowsOfUnit {
  const scalar_t* row[V::kPack] = {};
  const uint8_t* keep[V::kPack] = {};
  bool whole = true;  // none is null, and none drops elements

  RowsOfUnit() = default;
  FLOE_INLINE RowsOfUnit(const Rows<scalar_t>& from, int64_t k0, int64_t K, int64_t q) {
    for (int i = 0; i < V::kPack; ++i) {
      const int64_t k = q * V::kPack + i;
      const int64_t t = k >= K ? -1 : from.rows ? from.rows[k0 + k] : k0 + k;
      const bool absent = t < 0 || (from.mask && !from.mask[t]);
      row[i] = absent ? nullptr : from.data + t * from.ld;
      if (from.keep && !absent) keep[i] = from.keep + t * from.keep_ld;
      whole = whole && !absent && !from.keep;
    }
  }

  FLOE_INLINE void prefetch(int64_t n0, int64_t N) const {
    for (int i = 0; i < V::kPack; ++i) {
      if (!row[i]) continue;
      for (int64_t n = n0; n < n0 + N; n += 64 / sizeof(scalar_t)) __builtin_prefetch(row[i] + n);
    }
  }

  // Columns n0..n0 + N as `width` units.
  FLOE_INLINE void pack(int64_t n0, int64_t N, int64_t width, typename V::unit* out) const {
    using elem = typename V::elem;
    const elem* rows[V::kPack];
    if (std::is_same_v<scalar_t, elem> && whole && N == width) {
      for (int i = 0; i < V::kPack; ++i) rows[i] = reinterpret_cast<const elem*>(row[i]) + n0;
      for (int64_t n = 0; n < width; n += V::kLanes) V::interleave(rows, n, out + n);
      return;
    }
    alignas(64) elem staged[V::kPack][kNR<V>];
    for (int i = 0; i < V::kPack; ++i) {
      rows[i] = staged[i];
      if (row[i]) stage_row<V>(row[i] + n0, N, keep[i], n0, staged[i]);
      for (int64_t n = row[i] ? N : 0; n < width; ++n) staged[i][n] = elem{};
    }
    for (int64_t n = 0; n < width; n += V::kLanes) V::interleave(rows, n, out + n);
  }
};

// Columns n0..n0 + N of rows k0..k0 + K as one panel of `width`.
template <typename V, typename scalar_t>
void pack_rows(const Rows<scalar_t>& from, int64_t k0, int64_t K, int64_t n0, int64_t N,
               int64_t width, typename V::unit* out) {
  for (int64_t q = 0; q < units<V>(K); ++q, out += width) {
    RowsOfUnit<V, scalar_t>(from, k0, K, q).pack(n0, N, width, out);
  }
}

// Rows k0..k0 + K of panels first..last of `cols` columns, a panel every `size` units, from unit q0
// on. A few units of all panels come before the next units, so that reading runs along rows.
template <typename V, typename scalar_t>
void pack_panels(const Rows<scalar_t>& from, int64_t k0, int64_t K, int64_t cols, int64_t first,
                 int64_t last, int64_t size, int64_t q0, typename V::unit* out) {
  constexpr int64_t kTogether = 4;
  using Unit = RowsOfUnit<V, scalar_t>;
  for (int64_t q = 0; q < units<V>(K); q += kTogether) {
    Unit now[kTogether], next[kTogether];
    const int64_t count = least(kTogether, units<V>(K) - q);
    for (int64_t i = 0; i < count; ++i) {
      now[i] = Unit(from, k0, K, q + i), next[i] = Unit(from, k0, K, q + kTogether + i);
    }
    for (int64_t p = first; p < last; ++p) {
      const int64_t n0 = p * kNR<V>, width = panel_width<V>(cols, p);
      typename V::unit* to = out + (p - first) * size + (q0 + q) * width;
      for (int64_t i = 0; i < count; ++i, to += width) {
        if (from.rows) next[i].prefetch(n0, width);  // a prefetcher foresees only rows in order
        now[i].pack(n0, least(kNR<V>, cols - n0), width, to);
      }
    }
  }
}

// out (MT, NT) = dot products of rows of x with rows of w, K elements each; or += these.
template <typename V, int MT, int NT, typename x_t, typename w_t>
void dot_tile(int64_t K, const x_t* const* x, const w_t* const* w, typename V::acc* out, int64_t ld,
              bool add) {
  constexpr int64_t kStep = V::kLanes * V::kPack;
  typename V::reg sum[MT][NT];
#pragma GCC unroll 8
  for (int m = 0; m < MT; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < NT; ++n) sum[m][n] = V::zero();
  }
  const auto step = [&](const x_t* const* xs, const w_t* const* ws, int64_t k)
                        __attribute__((always_inline)) {
                          typename V::ureg left[MT];
#pragma GCC unroll 8
                          for (int m = 0; m < MT; ++m) left[m] = V::load_row(xs[m] + k);
#pragma GCC unroll 8
                          for (int n = 0; n < NT; ++n) {
                            const typename V::ureg right = V::load_row(ws[n] + k);
#pragma GCC unroll 8
                            for (int m = 0; m < MT; ++m)
                              sum[m][n] = V::multiply_add(sum[m][n], left[m], right);
                          }
                        };
  int64_t k = 0;
  for (; k + kStep <= K; k += kStep) step(x, w, k);
  if (k < K) {  // the last, partial vector of every row, from buffers padded with zeros
    alignas(64) x_t x_end[MT][kStep] = {};
    alignas(64) w_t w_end[NT][kStep] = {};
    const x_t* xs[MT];
    const w_t* ws[NT];
    for (int m = 0; m < MT; ++m) {
      std::memcpy(x_end[m], x[m] + k, (K - k) * sizeof(x_t));
      xs[m] = x_end[m];
    }
    for (int n = 0; n < NT; ++n) {
      std::memcpy(w_end[n], w[n] + k, (K - k) * sizeof(w_t));
      ws[n] = w_end[n];
    }
    step(xs, ws, 0);
  }
  for (int m = 0; m < MT; ++m) {
    for (int n = 0; n < NT; ++n) {
      const typename V::acc total = V::total(sum[m][n]);
      out[m * ld + n] = add ? out[m * ld + n] + total : total;
    }
  }
}

template <typename V, int MT, typename x_t, typename w_t>
FLOE_INLINE void dot_columns(int64_t N, int64_t K, const x_t* const* x, const w_t* const* w,
                             typename V::acc* out, int64_t ld, bool add) {
  switch (N) {
    case 1:
      return dot_tile<V, MT, 1>(K, x, w, out, ld, add);
    case 2:
      return dot_tile<V, MT, 2>(K, x, w, out, ld, add);
    case 3:
      return dot_tile<V, MT, 3>(K, x, w, out, ld, add);
    case 4:
      if constexpr (V::kDotN >= 4) return dot_tile<V, MT, 4>(K, x, w, out, ld, add);
    case 5:
      if constexpr (V::kDotN >= 5) return dot_tile<V, MT, 5>(K, x, w, out, ld, add);
    case 6:
      if constexpr (V::kDotN >= 6) return dot_tile<V, MT, 6>(K, x, w, out, ld, add);
  }
}

// The same for M <= kDotM rows x[m] and any number N of rows of w, ld_w elements apart.
template <typename V, typename x_t, typename w_t>
void dots(int64_t M, const x_t* const* x, int64_t N, const w_t* w, int64_t ld_w, int64_t K,
          typename V::acc* out, int64_t ld, bool add = false) {
  const int64_t tiles = ceil_div(N, V::kDotN), size = tiles ? ceil_div(N, tiles) : 0;
  for (int64_t n = 0; n < N; n += size) {
    const w_t* rows[V::kDotN];
    const int64_t count = least(size, N - n);
    for (int64_t i = 0; i < count; ++i) rows[i] = w + (n + i) * ld_w;
    switch (M) {
      case 1:
        dot_columns<V, 1>(count, K, x, rows, out + n, ld, add);
        break;
      case 2:
        dot_columns<V, 2>(count, K, x, rows, out + n, ld, add);
        break;
      case 3:
        if constexpr (V::kDotM >= 3) dot_columns<V, 3>(count, K, x, rows, out + n, ld, add);
        break;
      case 4:
        if constexpr (V::kDotM >= 4) dot_columns<V, 4>(count, K, x, rows, out + n, ld, add);
        break;
    }
  }
}

}  // namespace
}  // namespace floe::cpu
