#include "cpu/moe_lora_forward.h"

#include <algorithm>

namespace floe {
namespace {

template <typename scalar_t, typename elem>
struct Dense {
  using wide = cpu::wide_t<scalar_t>;

  const Experts& given;
  const cpu::Kernels& kernels;
  const cpu::Layer<wide> layer;
  const ForwardOutputs& to;

  void run() const {
    Panels panels(kernels);
    const void* shrink = panels.columns(given.lora_A);
    const void* expand = panels.rows(given.lora_B);
    Loops packing;
    panels.pack_in(packing);
    packing.run();
    const int64_t step = rows_per_task(layer.T), tasks = (layer.T + step - 1) / step;
    torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
      const int64_t ld_z = (layer.C + 63) / 64 * 64, ld_h = (layer.R + 63) / 64 * 64;
      const cpu::Scratch z(step * ld_z * sizeof(wide)), h(step * ld_h * sizeof(elem));
      const cpu::Scratch rows(cpu::token_scratch(layer.R));
      const int64_t ld_keep = keep_stride(layer.I);
      const cpu::Scratch keep(given.dropout.active ? step * ld_keep : 0);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t t0 = task * step, M = std::min(step, layer.T - t0);
        const auto* x = static_cast<const scalar_t*>(given.x.const_data_ptr()) + t0 * layer.I;
        if (given.dropout.active) {
          kernels.keep_bits(given.dropout, t0, M, layer.I, keep.get<uint8_t>(), ld_keep);
        }
        kernels.shrink({x, layer.I, M, layer.I, layer.C,
                        given.dropout.active ? keep.get<uint8_t>() : nullptr, ld_keep, shrink,
                        z.get(), ld_z});
        auto* saved_z = static_cast<scalar_t*>(to.z.mutable_data_ptr()) + t0 * layer.C;
        kernels.narrow_rows(z.get(), ld_z, M, layer.C, given.dropout.scale, saved_z, layer.C);
        route_tokens(given, kernels, layer, to, t0, M);
        for (int64_t m = 0; m < M; ++m) {
          if (layer.masked(t0 + m)) std::fill_n(saved_z + m * layer.C, layer.C, scalar_t{});
        }
        kernels.token_rows({M, layer.R, layer.C, layer.K, layer.first.data(), layer.shared_A,
                            layer.mask ? layer.mask + t0 : nullptr, layer.scaling.data(), saved_z,
                            to.experts.const_data_ptr<int64_t>() + t0 * layer.K,
                            static_cast<const wide*>(to.gates.const_data_ptr()) + t0 * layer.K,
                            nullptr, 0, h.get(), nullptr, ld_h, nullptr, rows.get()});
        expand_rows(t0, M, h.get(), ld_h, expand);
      }
    });
  }

  void expand_rows(int64_t t0, int64_t M, const void* h, int64_t ld_h, const void* panels) const {
    const auto* base = static_cast<const scalar_t*>(to.base);
    auto* out = static_cast<scalar_t*>(to.out.mutable_data_ptr()) + t0 * layer.O;
    kernels.expand({M,
                    layer.O,
                    {h, ld_h, layer.R, panels},
                    {},
                    nullptr,
                    0,
                    1,
                    base ? base + t0 * layer.O : nullptr,
                    out,
                    layer.O,
                    layer.O});
  }
};

}  // namespace

void forward_dense(const Experts& given, const ForwardOutputs& to) {
  with_elements(given.x, [&](auto x, auto unit, const cpu::Kernels& kernels) {
    using scalar_t = decltype(x);
    const auto layer = given.layer<cpu::wide_t<scalar_t>>(to.experts.size(1));
    Dense<scalar_t, decltype(unit)>{given, kernels, layer, to}.run();
  });
}

}  // namespace floe
