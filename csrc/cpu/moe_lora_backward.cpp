#include "cpu/moe_lora_backward.h"

#include <algorithm>
#include <utility>

#include "cpu/moe_lora_token.h"

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
  RowGradients& rows;

  void run(bool base_share) const {
    const int64_t T = layer.T, pack = kernels.pack, mr = kernels.mr, Q = (T + pack - 1) / pack;
    const int64_t ld_dz = (layer.C + 7) / 8 * 8, ld_dl = (layer.E + 7) / 8 * 8;
    const auto tiled = [&](bool wanted, int64_t columns) {
      return cpu::Scratch(wanted ? cpu::Tiled<elem>::size(columns, Q, mr, pack) * sizeof(elem) : 0);
    };
    const cpu::Scratch dz_tiled = tiled(in.needs_A, layer.C), h_tiled = tiled(in.needs_B, layer.R);
    const cpu::Scratch dl_tiled = tiled(in.needs_router, layer.E);
    const bool needs_rows = in.needs_x || in.keeps_rows;
    const cpu::Scratch dz(needs_rows ? T * ld_dz * sizeof(elem) : 0);
    const cpu::Scratch dl(needs_rows ? T * ld_dl * sizeof(elem) : 0);

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
    TokenGradients<scalar_t, elem> token{layer, in, aux, rows};
    if (needs_rows) {
      token.dz = dz.template get<elem>(), token.ld_dz = ld_dz;
      token.dl = dl.template get<elem>(), token.ld_dl = ld_dl;
    }
    token.dz_tiled = {in.needs_A ? dz_tiled.template get<elem>() : nullptr, Q, mr, pack};
    token.h_tiled = {in.needs_B ? h_tiled.template get<elem>() : nullptr, Q, mr, pack};
    token.dl_tiled = {in.needs_router ? dl_tiled.template get<elem>() : nullptr, Q, mr, pack};

    const int64_t step = rows_per_task(T), tasks = (T + step - 1) / step;
    torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
      const int64_t ld_u = (layer.R + 63) / 64 * 64;
      const cpu::Scratch u(step * ld_u * sizeof(wide));
      typename TokenGradients<scalar_t, elem>::Memory memory(layer);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t t0 = task * step, M = std::min(step, T - t0);
        if (needs_u) {
          const auto* dy = static_cast<const scalar_t*>(in.grad_out.const_data_ptr());
          kernels.shrink(
              {dy + t0 * layer.O, layer.O, M, layer.O, layer.R, nullptr, 0, shrink, u.get(), ld_u});
        }
        token.clear(t0, t0 + M);
        for (int64_t m = 0; m < M; ++m) {
          token.run(t0 + m, needs_u ? u.get<wide>() + m * ld_u : nullptr, memory);
        }
        if (!in.needs_x) continue;
        auto* dx = static_cast<scalar_t*>(std::get<0>(out).mutable_data_ptr()) + t0 * layer.I;
        const int64_t ld_keep = keep_stride(layer.I);
        kernels.expand({M,
                        layer.I,
                        {token.dz + t0 * ld_dz, ld_dz, layer.C, expand_A},
                        {token.dl + t0 * ld_dl, ld_dl, layer.E, expand_router},
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
