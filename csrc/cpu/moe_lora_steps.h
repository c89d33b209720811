// The steps of moe_lora_kernels.h for one Machine and one dtype of x. No torch here.
#pragma once

#include "cpu/moe_lora_kernels.h"
#include "cpu/moe_lora_token_steps.h"
#include "cpu/tile.h"

namespace floe::cpu {
namespace {

// Parameters have the dtype of x, or float32.
template <typename scalar_t, typename F>
FLOE_INLINE void with_dtype(Dtype dtype, const F& f) {
  if (dtype == Dtype::kFloat32) return f(float{});
  f(scalar_t{});
}

// out = base + sums, one row of N columns; no base is zero.
template <typename V, typename scalar_t>
FLOE_INLINE void add_row(const typename V::acc* sums, int64_t N, const scalar_t* base,
                         scalar_t* out) {
  int64_t n = 0;
  if (!base) {
    for (; n + V::kLanes <= N; n += V::kLanes) V::store_narrow(out + n, V::load(sums + n));
    for (; n < N; ++n) out[n] = narrow<scalar_t>(sums[n]);
  }
  for (; n + V::kLanes <= N; n += V::kLanes) {
    V::store_narrow(out + n, V::add(V::load_wide(base + n), V::load(sums + n)));
  }
  for (; n < N; ++n) out[n] = narrow<scalar_t>(widen(base[n]) + sums[n]);
}

template <typename V, typename scalar_t>
struct Steps {
  using elem = typename V::elem;
  using unit = typename V::unit;
  using acc = typename V::acc;
  static constexpr int64_t NR = kNR<V>, MR = V::kMR;
  using Tokens = TokenSteps<V, scalar_t>;

  static void pack_columns(const Matrix& w, int64_t panel, void* out) {
    with_dtype<scalar_t>(w.dtype, [&](auto zero) __attribute__((always_inline)) {
      auto* to = static_cast<unit*>(out) + panel * NR * units<V>(w.cols);
      floe::cpu::pack_columns<V>(static_cast<const decltype(zero)*>(w.data), w.ld, w.rows, w.cols,
                                 panel, to);
    });
  }

  static void pack_rows(const Matrix& w, int64_t panel, void* out) {
    with_dtype<scalar_t>(w.dtype, [&](auto zero) __attribute__((always_inline)) {
      using w_t = decltype(zero);
      const Rows<w_t> rows{static_cast<const w_t*>(w.data), w.ld};
      const int64_t n0 = panel * NR;
      floe::cpu::pack_rows<V>(rows, 0, w.rows, n0, least(NR, w.cols - n0),
                              panel_width<V>(w.cols, panel),
                              static_cast<unit*>(out) + n0 * units<V>(w.rows));
    });
  }

  static void keep_bits(const Dropout& dropout, int64_t first_row, int64_t rows, int64_t cols,
                        uint8_t* out, int64_t ld) {
    uint8_t tail[V::kKeepBytes];
    for (int64_t m = 0; m < rows; ++m) {
      const uint64_t counter = static_cast<uint64_t>((first_row + m) * cols);
      for (int64_t b = 0; b * 8 < cols; b += V::kKeepBytes) {
        const int64_t count = least(V::kKeepBytes, ld - b);
        V::keep_bytes(dropout, counter + b * 8, tail);
        std::memcpy(out + m * ld + b, tail, count);
      }
    }
  }

  static void shrink(const Shrink& s) {
    // 2 KiB of 8 rows is a third of L1, and three panels' share of it a third of L2
    constexpr int64_t kBlock = 2048 / sizeof(elem);
    const auto* x = static_cast<const scalar_t*>(s.x);
    alignas(64) elem staged[MR * kBlock];
    int64_t k0 = 0;
    do {  // once where K is 0, for the sums are then zero
      const int64_t K = least(kBlock, s.K - k0);
      const bool direct = std::is_same_v<scalar_t, elem> && !s.keep && K % V::kPack == 0;
      for (int64_t m = 0; m < s.M; m += MR) {
        const int64_t M = least(MR, s.M - m);
        const elem* a = reinterpret_cast<const elem*>(x + m * s.ld + k0);
        if (!direct) {
          a = staged;
          for (int64_t i = 0; i < M; ++i) {
            stage_row<V>(x + (m + i) * s.ld + k0, K,
                         s.keep ? s.keep + (m + i) * s.keep_ld : nullptr, k0, staged + i * kBlock);
          }
        }
        for (int64_t p = 0; p * NR < s.N; ++p) {
          const int64_t width = panel_width<V>(s.N, p);
          const unit* panel = static_cast<const unit*>(s.panels) + p * NR * units<V>(s.K);
          any_tile<V>(M, units<V>(K), a, direct ? s.ld : kBlock, V::kPack,
                      panel + k0 / V::kPack * width, width,
                      static_cast<acc*>(s.sums) + m * s.ld_sums + p * NR, s.ld_sums, k0 > 0);
        }
      }
      k0 += kBlock;
    } while (k0 < s.K);
  }

  static void narrow_rows(const void* sums, int64_t ld, int64_t M, int64_t N, double scale,
                          void* out, int64_t ld_out) {
    const acc factor = static_cast<acc>(scale);
    for (int64_t m = 0; m < M; ++m) {
      const acc* from = static_cast<const acc*>(sums) + m * ld;
      scalar_t* to = static_cast<scalar_t*>(out) + m * ld_out;
      int64_t n = 0;
      for (; n + V::kLanes <= N; n += V::kLanes) {
        V::store_narrow(to + n, V::scale(V::load(from + n), factor));
      }
      for (; n < N; ++n) to[n] = narrow<scalar_t>(from[n] * factor);
    }
  }

  // sums *= scale, and zero where keep has no bit; the first of `width` columns is n0.
  static void drop(acc* sums, int64_t width, acc scale, const uint8_t* keep, int64_t n0) {
    for (int64_t n = 0; n < width; n += V::kLanes) {
      V::store(sums + n, V::select(keep, n0 + n, V::scale(V::load(sums + n), scale)));
    }
  }

  static void expand(const Expand& e) {
    const auto* base = static_cast<const scalar_t*>(e.base);
    auto* out = static_cast<scalar_t*>(e.out);
    const int64_t Q = units<V>(e.first.K) + units<V>(e.second.K);
    // as many panels at a time as stay in a quarter of L2 while all rows pass
    const int64_t group = 262144 / (NR * (Q + 1) * sizeof(unit)) + 1;
    const int64_t panels = ceil_div(e.O, NR);
    alignas(64) acc sums[MR * NR];
    for (int64_t p0 = 0; p0 < panels; p0 += group) {
      for (int64_t m = 0; m < e.M; m += MR) {
        const int64_t M = least(MR, e.M - m);
        for (int64_t p = p0; p < least(p0 + group, panels); ++p) {
          const int64_t n0 = p * NR, width = panel_width<V>(e.O, p);
          const scalar_t* from = base ? base + m * e.ld_base + n0 : nullptr;
          scalar_t* to = out + m * e.ld_out + n0;
          if constexpr (MR <= 8) {  // more rows are tile registers, which any_tile fills
            if (M == MR && NR <= e.O - n0 && !e.keep && Q <= kUnits) {
              expand_tile<V>(product(e.first, m, n0), product(e.second, m, n0), from, e.ld_base, to,
                             e.ld_out);
              continue;
            }
          }
          multiply(e.first, m, M, n0, width, sums, false);
          if (e.keep) {
            for (int64_t i = 0; i < M; ++i) {
              drop(sums + i * NR, width, static_cast<acc>(e.scale), e.keep + (m + i) * e.keep_ld,
                   n0);
            }
          }
          if (e.second.rows) multiply(e.second, m, M, n0, width, sums, true);
          for (int64_t i = 0; i < M; ++i) {
            add_row<V>(sums + i * NR, least(NR, e.O - n0), from ? from + i * e.ld_base : nullptr,
                       to + i * e.ld_out);
          }
        }
      }
    }
  }

  static constexpr int64_t kUnits = 256;  // longer chains of float32 sums lose digits

  static FLOE_INLINE Product<V> product(const Term& term, int64_t m, int64_t n0) {
    const int64_t Q = units<V>(term.K);
    return {static_cast<const elem*>(term.rows) + m * term.ld, term.ld, Q,
            static_cast<const unit*>(term.panels) + n0 * Q};
  }

  static FLOE_INLINE void multiply(const Term& term, int64_t m, int64_t M, int64_t n0,
                                   int64_t width, acc* sums, bool add) {
    const int64_t Q = units<V>(term.K);
    const auto* rows = static_cast<const elem*>(term.rows) + m * term.ld;
    const auto* panel = static_cast<const unit*>(term.panels) + n0 * Q;
    int64_t q = 0;
    do {
      any_tile<V>(M, least(kUnits, Q - q), rows + q * V::kPack, term.ld, V::kPack,
                  panel + q * width, width, sums, NR, add || q > 0);
      q += kUnits;
    } while (q < Q);
  }

  static void weight_grad(const RowsOf& rows, int64_t first, int64_t last, const WeightGrad* grads,
                          int64_t count, void* scratch) {
    int64_t size = 0;  // of one panel's sums
    for (int64_t i = 0; i < count; ++i) size += ceil_div(grads[i].N, MR) * MR * NR;
    const int64_t Q = units<V>(rows.T), step = grad_units(NR, size / NR, rows.cols);
    const int64_t panel_size = step * NR;
    auto* packed = static_cast<unit*>(scratch);
    auto* sums = reinterpret_cast<acc*>(packed + (last - first) * panel_size);
    for (int64_t q0 = 0; q0 < Q; q0 += step) {
      const int64_t k0 = q0 * V::kPack, K = least(step * V::kPack, rows.T - k0);
      int64_t at = 0;
      for (int64_t i = 0; i < count; ++i) {
        const WeightGrad& grad = grads[i];
        if (i == 0 || grad.keep != grads[i - 1].keep) {
          floe::cpu::pack_panels<V>(
              Rows<scalar_t>{static_cast<const scalar_t*>(rows.data), rows.ld, rows.rows, rows.mask,
                             grad.keep ? rows.keep : nullptr, rows.keep_ld},
              k0, K, rows.cols, first, last, panel_size, 0, packed);
        }
        for (int64_t p = first; p < last; ++p) {
          const int64_t width = panel_width<V>(rows.cols, p);
          acc* to = sums + (p - first) * size + at;
          for (int64_t m = 0; m < grad.N; m += MR, to += MR * NR) {
            const auto* a =
                static_cast<const elem*>(grad.coefficients) + (m * Q + q0 * MR) * V::kPack;
            any_tile<V>(least(MR, grad.N - m), units<V>(K), a, V::kPack, MR * V::kPack,
                        packed + (p - first) * panel_size, width, to, NR, q0 > 0);
          }
        }
        at += ceil_div(grad.N, MR) * MR * NR;
      }
    }
    for (int64_t p = first; p < last; ++p) {
      const acc* from = sums + (p - first) * size;
      for (int64_t i = 0; i < count; ++i) {
        with_dtype<scalar_t>(grads[i].dtype, [&](auto zero) __attribute__((always_inline)) {
          write_grad<decltype(zero)>(grads[i], Q ? from : nullptr, p * NR,
                                     least(NR, rows.cols - p * NR));
        });
        from += ceil_div(grads[i].N, MR) * MR * NR;
      }
    }
  }

  template <typename grad_t>
  static void write_grad(const WeightGrad& grad, const acc* sums, int64_t n0, int64_t N) {
    for (int64_t m = 0; m < grad.N; ++m) {
      grad_t* out = static_cast<grad_t*>(grad.out) + m * grad.ld_out + n0;
      const acc* from = sums + m * NR;
      int64_t n = 0;
      if (!sums) {
        for (; n < N; ++n) out[n] = grad_t{};
      }
      for (; n + V::kLanes <= N; n += V::kLanes) {
        V::store_narrow(out + n, V::scale(V::load(from + n), static_cast<acc>(grad.scale)));
      }
      for (; n < N; ++n) out[n] = narrow<grad_t>(from[n] * static_cast<acc>(grad.scale));
    }
  }

  // A block of this many elements of a few dozen rows of w stays in L1 while all rows of x pass.
  static constexpr int64_t kDotBlock = V::kPack == 1 ? 1 << 30 : 1024;

  static void gather_dots(const GatherDots& g) {
    if (g.keep || g.K <= kDotBlock || g.w_dtype == Dtype::kFloat32) return dot_block(g, 0, g.K);
    for (int64_t k = 0; k < g.K; k += kDotBlock) dot_block(g, k, least(kDotBlock, g.K - k));
  }

  // The share of elements k0..k0 + K in the sums.
  static void dot_block(const GatherDots& g, int64_t k0, int64_t K) {
    const auto* x = static_cast<const scalar_t*>(g.x);
    auto* staged = static_cast<elem*>(g.scratch);
    for (int64_t m = 0; m < g.M; m += V::kDotM) {
      const int64_t M = least(V::kDotM, g.M - m);
      acc* sums = static_cast<acc*>(g.sums) + m * g.ld_sums;
      for (int64_t i = m + V::kDotM; g.rows && i < least(m + 2 * V::kDotM, g.M); ++i) {
        const auto* row = reinterpret_cast<const char*>(x + g.rows[i] * g.ld + k0);
        for (int64_t at = 0; at < K * static_cast<int64_t>(sizeof *x); at += 64) {
          __builtin_prefetch(row + at, 0, 2);
        }
      }
      const scalar_t* rows[V::kDotM];
      const elem* dropped[V::kDotM];
      for (int64_t i = 0; i < M; ++i) {
        const int64_t t = g.rows ? g.rows[m + i] : g.first + m + i;
        rows[i] = x + t * g.ld + k0;
        if (g.keep) {
          stage_row<V>(rows[i], g.K, g.keep + t * g.keep_ld, 0, staged + i * (g.K + 1));
          dropped[i] = staged + i * (g.K + 1);
        }
      }
      if (g.keep) {
        dots<V>(M, dropped, g.N, static_cast<const scalar_t*>(g.w), g.ld_w, g.K, sums, g.ld_sums);
      } else if (std::is_same_v<scalar_t, float> || g.w_dtype != Dtype::kFloat32) {
        dots<V>(M, rows, g.N, static_cast<const scalar_t*>(g.w) + k0, g.ld_w, K, sums, g.ld_sums,
                k0 > 0);
      } else {  // float32 weights: neither side is rounded
        dots<typename V::Wide>(M, rows, g.N, static_cast<const float*>(g.w), g.ld_w, g.K, sums,
                               g.ld_sums);
      }
    }
  }

  // A few tokens use a weight once, on arrival: ask for all of it at a time.
  static constexpr int64_t kFewTokens = 32;

  static void prefetch_columns(const Matrix& w, int64_t begin, int64_t end) {
    const int64_t size = w.dtype == Dtype::kFloat32 ? 4 : sizeof(scalar_t);
    for (int64_t r = 0; r < w.rows; ++r) {
      const char* row = static_cast<const char*>(w.data) + r * w.ld * size;
      for (int64_t at = begin * size; at < end * size; at += 64) __builtin_prefetch(row + at);
    }
  }

  static void gather_expand(const GatherExpand& g, int64_t first, int64_t last, void* scratch) {
    const int64_t M = g.end - g.begin;
    int64_t longest = 0;
    for (int64_t s = 0; s < g.num_segments; ++s) {
      longest = g.segments[s].weight.rows > longest ? g.segments[s].weight.rows : longest;
    }
    const int64_t size = units<V>(longest) * NR;  // of one panel of an expert's weights
    auto* all = static_cast<acc*>(scratch);
    auto* packed = reinterpret_cast<unit*>(all + (last - first) * M * NR);
    alignas(64) acc product[MR * NR];
    std::memset(all, 0, (last - first) * M * NR * sizeof(acc));
    for (const Segment* s = g.segments; s != g.segments + g.num_segments; ++s) {
      if (s->begin == s->end) continue;
      const Matrix& w = s->weight;
      if (M <= kFewTokens) prefetch_columns(w, first * NR, least(last * NR, g.O));
      with_dtype<scalar_t>(w.dtype, [&](auto zero) __attribute__((always_inline)) {
        using w_t = decltype(zero);
        const Rows<w_t> rows{static_cast<const w_t*>(w.data), w.ld};
        floe::cpu::pack_panels<V>(rows, 0, w.rows, g.O, first, last, size, 0, packed);
      });
      for (int64_t p = first; p < last; ++p) {
        const int64_t width = panel_width<V>(g.O, p);
        acc* sums = all + (p - first) * M * NR;
        for (int64_t i = s->begin; i < s->end; i += MR) {
          const int64_t count = least(MR, s->end - i);
          multiply(
              {static_cast<const elem*>(g.slots), g.ld_slots, w.rows, packed + (p - first) * size},
              i, count, 0, width, product, false);
          for (int64_t j = 0; j < count; ++j) {
            acc* to = sums + (g.tokens[i + j] - g.begin) * NR;
            for (int64_t n = 0; n < width; n += V::kLanes) {
              V::store(to + n, V::add(V::load(to + n), V::load(product + j * NR + n)));
            }
          }
        }
      }
    }
    for (int64_t p = first; p < last && (g.keep || g.second.rows); ++p) {
      const int64_t n0 = p * NR, width = panel_width<V>(g.O, p);
      acc* sums = all + (p - first) * M * NR;
      for (int64_t m = 0; m < M && g.keep; ++m) {
        drop(sums + m * NR, width, static_cast<acc>(g.scale), g.keep + (g.begin + m) * g.keep_ld,
             n0);
      }
      for (int64_t m = 0; m < M && g.second.rows; m += MR) {
        multiply(g.second, g.begin + m, least(MR, M - m), n0, width, sums + m * NR, true);
      }
    }
    const auto* base = static_cast<const scalar_t*>(g.base);
    for (int64_t m = 0; m < M; ++m) {
      const int64_t t = g.begin + m;
      for (int64_t p = first; p < last; ++p) {
        const int64_t n0 = p * NR;
        add_row<V>(all + ((p - first) * M + m) * NR, least(NR, g.O - n0),
                   base ? base + t * g.ld_base + n0 : nullptr,
                   static_cast<scalar_t*>(g.out) + t * g.ld_out + n0);
      }
    }
  }

  static constexpr Kernels table(Dtype elem_dtype) {
    return {elem_dtype,
            V::kPack,
            MR,
            NR,
            V::kLanes,
            &pack_columns,
            &pack_rows,
            &keep_bits,
            &shrink,
            &narrow_rows,
            &expand,
            &weight_grad,
            &gather_dots,
            &Tokens::token_rows,
            &Tokens::tile_rows,
            &Tokens::slot_grads,
            &gather_expand};
  }
};

}  // namespace
}  // namespace floe::cpu
