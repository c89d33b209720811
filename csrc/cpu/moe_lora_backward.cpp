#include "cpu/moe_lora_backward.h"

#include <algorithm>
#include <utility>

namespace floe {
namespace {

template <typename scalar_t, typename elem>
struct Dense {
  using wide = cpu::wide_t<scalar_t>;

  const Experts& given;
  const BackwardInputs& in;
  const cpu::Kernels& kernels;
  const cpu::Layer<wide> layer;
  const Gradients& out;
  RowGradients& for_fisher;

  void run(bool base_share) const {
    const int64_t T = layer.T, pack = kernels.pack, mr = kernels.mr, Q = (T + pack - 1) / pack;
    const auto tiled = [&](bool wanted, int64_t columns) {
      return cpu::Scratch(wanted ? cpu::Tiled<elem>::size(columns, Q, mr, pack) * sizeof(elem) : 0);
    };
    const cpu::Scratch dz_tiled = tiled(in.needs_A, layer.C), h_tiled = tiled(in.needs_B, layer.R);
    const cpu::Scratch dl_tiled = tiled(in.needs_router, layer.E);

    Panels panels(kernels);
    const bool needs_u = in.needs_x || in.needs_A || in.needs_router || in.keeps_rows;
    const void* shrink = needs_u ? panels.columns(given.lora_B) : nullptr;
    const void* expand_A = in.needs_x ? panels.rows(given.lora_A) : nullptr;
    const void* expand_router = in.needs_x ? panels.rows(given.router_weight) : nullptr;
    Loops packing;
    panels.pack_in(packing);
    const cpu::Scratch keep = keep_bits(kernels, given.dropout, T, layer.I, packing);
    const uint8_t* kept = given.dropout.active ? keep.get<uint8_t>() : nullptr;
    packing.run();

    const auto aux = aux_losses(given, layer, in.experts);
    const int64_t step = rows_per_task(T), tasks = (T + step - 1) / step;
    torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
      const Rows rows(layer, step);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t t0 = task * step, M = std::min(step, T - t0);
        if (needs_u) {
          const auto* dy = static_cast<const scalar_t*>(in.grad_out.const_data_ptr());
          kernels.shrink({dy + t0 * layer.O, layer.O, M, layer.O, layer.R, nullptr, 0, shrink,
                          rows.u.get(), rows.ld});
        }
        token_rows(t0, M, rows, needs_u);
        if (needs_u) grad_logits(t0, M, rows, aux);
        const auto tile = [&](bool wanted, const cpu::Scratch& from, int64_t ld, int64_t N,
                              const cpu::Scratch& to) {
          if (wanted) kernels.tile_rows({from.get(), ld, M, N, to.get(), Q, t0 / pack});
        };
        tile(in.needs_A, rows.dz, rows.ld, layer.C, dz_tiled);
        tile(in.needs_B, rows.h, rows.ld, layer.R, h_tiled);
        tile(in.needs_router, rows.dl, rows.ld_dl, layer.E, dl_tiled);
        if (in.keeps_rows) keep_rows(t0, M, rows);
        if (!in.needs_x) continue;
        auto* dx = static_cast<scalar_t*>(std::get<0>(out).mutable_data_ptr()) + t0 * layer.I;
        const int64_t ld_keep = keep_stride(layer.I);
        kernels.expand({M,
                        layer.I,
                        {rows.dz.get(), rows.ld, layer.C, expand_A},
                        {rows.dl.get(), rows.ld_dl, layer.E, expand_router},
                        kept ? kept + t0 * ld_keep : nullptr,
                        ld_keep,
                        given.dropout.scale,
                        base_share ? dx : nullptr,
                        dx,
                        layer.I,
                        layer.I});
      }
    });

    const auto grad = [](const cpu::Scratch& tiled, const Tensor& to, bool keep, double scale) {
      return cpu::WeightGrad{to.size(0),   tiled.get(), keep, scale, to.mutable_data_ptr(),
                             dtype_of(to), to.size(1)};
    };
    std::vector<cpu::WeightGrad> of_x, of_dy;
    if (in.needs_A) {
      of_x.push_back(grad(dz_tiled, std::get<1>(out), kept != nullptr, given.dropout.scale));
    }
    if (in.needs_router) of_x.push_back(grad(dl_tiled, std::get<3>(out), false, 1));
    if (in.needs_B) of_dy.push_back(grad(h_tiled, std::get<2>(out), false, 1));
    Loops loops;
    weight_grads(kernels,
                 {given.x.const_data_ptr(), layer.I, layer.I, nullptr, T, layer.mask, kept,
                  keep_stride(layer.I)},
                 of_x, loops);
    weight_grads(
        kernels,
        {in.grad_out.const_data_ptr(), layer.O, layer.O, nullptr, T, layer.mask, nullptr, 0}, of_dy,
        loops);
    loops.run();
  }

  // One task's rows, from u to the coefficients of every gradient.
  struct Rows {
    Rows(const cpu::Layer<wide>& layer, int64_t rows)
        : ld((layer.R + 63) / 64 * 64),
          ld_dl((layer.E + 15) / 16 * 16),
          u(rows * ld * sizeof(wide)),
          grad_gates(rows * layer.K * sizeof(wide)),
          dz(rows * ld * sizeof(elem)),
          h(rows * ld * sizeof(elem)),
          dl(rows * ld_dl * sizeof(elem)),
          scratch(cpu::token_scratch(layer.R)) {}
    int64_t ld, ld_dl;
    cpu::Scratch u, grad_gates, dz, h, dl, scratch;
  };

  void token_rows(int64_t t0, int64_t M, const Rows& rows, bool needs_u) const {
    kernels.token_rows(
        {M, layer.R, layer.C, layer.K, layer.first.data(), layer.shared_A,
         layer.mask ? layer.mask + t0 : nullptr, layer.scaling.data(), row<scalar_t>(in.z, t0),
         row<int64_t>(in.experts, t0), row<wide>(in.gates, t0), needs_u ? rows.u.get() : nullptr,
         rows.ld, rows.h.get(), rows.dz.get(), rows.ld, rows.grad_gates.get(), rows.scratch.get()});
  }

  template <typename T>
  static const T* row(const Tensor& of, int64_t t) {
    return static_cast<const T*>(of.const_data_ptr()) + t * of.size(1);
  }

  void grad_logits(int64_t t0, int64_t M, const Rows& rows, const cpu::AuxLosses<wide>& aux) const {
    std::vector<wide> grad(layer.E);
    for (int64_t m = 0; m < M; ++m) {
      elem* to = rows.dl.template get<elem>() + m * rows.ld_dl;
      std::fill_n(to, rows.ld_dl, elem{});
      if (layer.masked(t0 + m)) continue;
      cpu::logit_gradient(layer, row<wide>(in.logits, t0 + m), row<wide>(in.gates, t0 + m),
                          row<int64_t>(in.experts, t0 + m),
                          rows.grad_gates.template get<wide>() + m * layer.K, aux, grad.data());
      for (int64_t e = 0; e < layer.E; ++e) to[e] = cpu::narrow<elem>(grad[e]);
    }
  }

  // The same rows for floe::segment_grad_square, which reads them in x's dtype.
  void keep_rows(int64_t t0, int64_t M, const Rows& from) const {
    const auto keep = [&](const Tensor& to, const cpu::Scratch& rows, int64_t ld) {
      const int64_t columns = to.size(1);
      for (int64_t m = 0; m < M; ++m) {
        const elem* values = rows.get<elem>() + m * ld;
        auto* row = static_cast<scalar_t*>(to.mutable_data_ptr()) + (t0 + m) * columns;
        for (int64_t c = 0; c < columns; ++c) {
          row[c] = cpu::narrow<scalar_t>(cpu::widen(values[c]));
        }
      }
    };
    keep(for_fisher.grad_z, from.dz, from.ld);
    keep(for_fisher.h, from.h, from.ld);
    keep(for_fisher.grad_logits, from.dl, from.ld_dl);
    for (int64_t m = 0; m < M; ++m) {
      if (layer.masked(t0 + m)) continue;
      double gate = 0;
      for (int64_t k = 0; k < layer.K; ++k) {
        gate += static_cast<double>(row<wide>(in.gates, t0 + m)[k]) *
                static_cast<double>(from.grad_gates.template get<wide>()[m * layer.K + k]);
      }
      for_fisher.gate.mutable_data_ptr<double>()[t0 + m] = gate;
    }
  }
};

}  // namespace

void weight_grads(const cpu::Kernels& kernels, const cpu::RowsOf& from,
                  std::vector<cpu::WeightGrad> grads, Loops& loops) {
  if (grads.empty()) return;
  int64_t N = 0;
  for (const cpu::WeightGrad& grad : grads) N += grad.N + kernels.mr;
  const int64_t panels = (from.cols + kernels.nr - 1) / kernels.nr;
  const int64_t together = cpu::grad_panels(kernels, N);
  loops.add(panels, [=, &kernels, grads = std::move(grads)](int64_t begin, int64_t end) {
    const int64_t most = std::min(together, end - begin);
    const cpu::Scratch scratch(cpu::grad_scratch(kernels, N, most, from.cols));
    for (int64_t p = begin; p < end; p += most) {
      kernels.weight_grad(from, p, std::min(end, p + most), grads.data(),
                          static_cast<int64_t>(grads.size()), scratch.get());
    }
  });
}

void backward_dense(const Experts& given, const BackwardInputs& in, bool base_share,
                    const Gradients& out, RowGradients& rows) {
  with_elements(given.x, [&](auto x, auto unit, const cpu::Kernels& kernels) {
    using scalar_t = decltype(x);
    const auto layer = given.layer<cpu::wide_t<scalar_t>>(in.experts.size(1));
    Dense<scalar_t, decltype(unit)>{given, in, kernels, layer, out, rows}.run(base_share);
  });
}

}  // namespace floe
