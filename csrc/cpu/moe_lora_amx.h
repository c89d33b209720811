// The steps of moe_lora_kernels.h for a Machine with tile registers. No torch here.
#pragma once

#include "cpu/moe_lora_steps.h"
#include "cpu/tile_amx.h"

namespace floe::cpu {
namespace {

template <typename V>
struct MoELoRAAmx {
  using Steps = floe::cpu::Steps<V, BFloat16>;
  static constexpr int64_t NR = kNR<V>, MR = V::kMR;

  static void shrink(const Shrink& s) {
    const TileScope scope;
    Steps::shrink(s);
  }

  static void expand(const Expand& e) {
    const TileScope scope;
    Steps::expand(e);
  }

  static void weight_grad(const RowsOf& rows, int64_t first, int64_t last, const WeightGrad* grads,
                          int64_t count, void* scratch) {
    const TileScope scope;
    Steps::weight_grad(rows, first, last, grads, count, scratch);
  }

  static void gather_expand(const GatherExpand& g, int64_t first, int64_t last, void* scratch) {
    const TileScope scope;
    Steps::gather_expand(g, first, last, scratch);
  }

  // Rows of w become a panel, so many elements of them at a time that it stays in L1 while the
  // gathered rows of x, a tile after the other, pass over it.
  static void gather_dots(const GatherDots& g) {
    if (g.M < kFewestRows || g.K == 0 || g.w_dtype != Dtype::kBFloat16) {
      return Steps::gather_dots(g);
    }
    constexpr int64_t kBlock = 256, kRows = 2 * MR;
    const TileScope scope;
    alignas(64) BFloat16 left[MR * kBlock];
    alignas(64) uint32_t panel[kBlock / 2 * NR];
    alignas(64) float product[kRows * NR];
    for (int64_t n0 = 0; n0 < g.N; n0 += NR) {
      const int64_t N = least(NR, g.N - n0), width = panel_width<V>(g.N, n0 / NR);
      const auto* w = static_cast<const BFloat16*>(g.w) + n0 * g.ld_w;
      for (int64_t first = 0; first < g.M; first += kRows) {
        const int64_t last = least(first + kRows, g.M);
        for (int64_t k0 = 0; k0 < g.K; k0 += kBlock) {
          const int64_t K = least(kBlock, g.K - k0);
          pack(w + k0, g.ld_w, N, K, width, panel);
          for (int64_t m = first; m < last; m += MR) {
            const int64_t M = least(MR, last - m);
            for (int64_t i = 0; i < M; ++i) stage(g, m + i, k0, K, left + i * kBlock);
            any_tile<V>(M, units<V>(K), left, kBlock, V::kPack, panel, width,
                        product + (m - first) * NR, NR, k0 > 0);
          }
        }
        for (int64_t m = first; m < last; ++m) {
          auto* sums = static_cast<float*>(g.sums) + m * g.ld_sums + n0;
          std::memcpy(sums, product + (m - first) * NR, N * sizeof(float));
        }
      }
    }
  }

  static constexpr Kernels table() {
    Kernels table = Steps::table(Dtype::kBFloat16);
    table.shrink = &shrink, table.expand = &expand, table.weight_grad = &weight_grad;
    table.gather_dots = &gather_dots, table.gather_expand = &gather_expand;
    return table;
  }

 private:
  // K elements of the row of x that is the m-th to be multiplied, from k0 on.
  static void stage(const GatherDots& g, int64_t m, int64_t k0, int64_t K, BFloat16* out) {
    const int64_t t = g.rows ? g.rows[m] : g.first + m;
    stage_row<V>(static_cast<const BFloat16*>(g.x) + t * g.ld + k0, K,
                 g.keep ? g.keep + t * g.keep_ld : nullptr, k0, out);
  }

  // K elements of N rows of w as a panel: (units, width), zero beyond K and N.
  static void pack(const BFloat16* w, int64_t ld, int64_t N, int64_t K, int64_t width,
                   uint32_t* panel) {
    alignas(64) uint32_t end[kTileRows * kTileUnits];
    for (int64_t k = 0; k < K; k += 2 * kTileUnits, panel += kTileUnits * width) {
      for (int64_t n = 0; n < width; n += kTileRows) {
        const int64_t rows = least(kTileRows, N - n);
        const BFloat16* from = w + n * ld + k;
        int64_t bytes = ld * 2;
        if (K - k < 2 * kTileUnits) {  // what follows a row's last element belongs to the next
          std::memset(end, 0, sizeof end);
          for (int64_t i = 0; i < rows; ++i) {
            std::memcpy(end + i * kTileUnits, from + i * ld, (K - k) * 2);
          }
          from = reinterpret_cast<const BFloat16*>(end), bytes = kTileBytes;
        }
        transpose<V>(rows, from, bytes, panel + n, width);
      }
    }
  }
};

}  // namespace
}  // namespace floe::cpu
