// The backward of one token, from u = dy lora_B^T to the coefficients of every gradient.
#pragma once

#include "cpu/moe_lora_backward.h"

namespace floe {

template <typename wide>
cpu::AuxLosses<wide> aux_losses(const Experts& given, const cpu::Layer<wide>& layer,
                                const Tensor& experts) {
  if (!given.aux_coefs) return {};
  return {layer, experts.const_data_ptr<int64_t>(), given.aux_coefs->const_data_ptr<float>()};
}

template <typename scalar_t, typename elem>
struct [[gnu::visibility("hidden")]] TokenGradients {
  using wide = cpu::wide_t<scalar_t>;

  const cpu::Layer<wide>& layer;
  const BackwardInputs& in;
  const cpu::AuxLosses<wide>& aux;
  RowGradients& rows;
  elem* dz = nullptr;  // (T, ld_dz), for the gradient of x
  elem* dl = nullptr;  // (T, ld_dl)
  int64_t ld_dz = 0, ld_dl = 0;
  cpu::Tiled<elem> dz_tiled{}, h_tiled{}, dl_tiled{};  // for the weight gradients

  struct Memory {
    explicit Memory(const cpu::Layer<wide>& layer)
        : grad_gates(layer.K), grad_logits(layer.E), dz(layer.C) {}
    std::vector<wide> grad_gates, grad_logits, dz;
  };

  void clear(int64_t begin, int64_t end) const {
    if (dz_tiled.data) dz_tiled.clear(layer.C, begin, end);
    if (h_tiled.data) h_tiled.clear(layer.R, begin, end);
    if (dl_tiled.data) dl_tiled.clear(layer.E, begin, end);
    if (dz) std::fill_n(dz + begin * ld_dz, (end - begin) * ld_dz, elem{});
    if (dl) std::fill_n(dl + begin * ld_dl, (end - begin) * ld_dl, elem{});
  }

  // u (R,), or null where only lora_B wants a gradient. The rows were cleared before.
  void run(int64_t t, const wide* u, Memory& memory) const {
    if (layer.masked(t)) return;
    const int64_t E = layer.E, K = layer.K;
    const auto* z = static_cast<const scalar_t*>(in.z.const_data_ptr()) + t * layer.C;
    const auto* gates = static_cast<const wide*>(in.gates.const_data_ptr()) + t * K;
    const auto* logits = static_cast<const wide*>(in.logits.const_data_ptr()) + t * E;
    const auto* experts = in.experts.const_data_ptr<int64_t>() + t * K;
    if (layer.shared_A) std::fill(memory.dz.begin(), memory.dz.end(), wide{0});
    for (int64_t k = 0; k < K; ++k) {
      const int64_t e = experts[k], first = layer.first[e], rank = layer.rank(e);
      const auto* z_e = z + layer.column_of_z(e);
      if (u) memory.grad_gates[k] = cpu::gate_gradient(layer, e, z_e, u + first);
      const wide* scaling = layer.scaling.data() + first;
      if (h_tiled.data) {
        auto h = h_tiled.cursor(first, t);
        for (int64_t c = 0; c < rank; ++c) {
          h.put(cpu::narrow<elem>(scaling[c] * gates[k] * cpu::widen(z_e[c])));
        }
      }
      if (!u) continue;
      if (layer.shared_A) {
        for (int64_t c = 0; c < rank; ++c) memory.dz[c] += scaling[c] * gates[k] * u[first + c];
      } else {
        for (int64_t c = 0; c < rank; ++c) memory.dz[c] = scaling[c] * gates[k] * u[first + c];
        put_dz(first, rank, t, memory.dz.data());
      }
    }
    if (!u) return;
    if (layer.shared_A) {
      put_dz(0, layer.C, t, memory.dz.data());
    }
    cpu::logit_gradient(layer, logits, gates, experts, memory.grad_gates.data(), aux,
                        memory.grad_logits.data());
    if (dl) {
      for (int64_t e = 0; e < E; ++e) {
        dl[t * ld_dl + e] = cpu::narrow<elem>(memory.grad_logits[e]);
      }
    }
    if (dl_tiled.data) {
      auto to = dl_tiled.cursor(0, t);
      for (int64_t e = 0; e < E; ++e) to.put(cpu::narrow<elem>(memory.grad_logits[e]));
    }
    if (in.keeps_rows) keep_row(t, z, experts, gates, u, memory);
  }

  void put_dz(int64_t first, int64_t count, int64_t t, const wide* values) const {
    if (dz) {
      for (int64_t c = 0; c < count; ++c) dz[t * ld_dz + first + c] = cpu::narrow<elem>(values[c]);
    }
    if (dz_tiled.data) {
      auto to = dz_tiled.cursor(first, t);
      for (int64_t c = 0; c < count; ++c) to.put(cpu::narrow<elem>(values[c]));
    }
  }

  // The same in rows, which floe::segment_grad_square reads.
  void keep_row(int64_t t, const scalar_t* z, const int64_t* experts, const wide* gates,
                const wide* u, const Memory& memory) const {
    const auto row = [&](const Tensor& to, int64_t columns) {
      return static_cast<scalar_t*>(to.mutable_data_ptr()) + t * columns;
    };
    double gate = 0;
    for (int64_t k = 0; k < layer.K; ++k) {
      const int64_t e = experts[k];
      const auto* z_e = z + layer.column_of_z(e);
      cpu::mix(layer, e, gates[k], z_e, row(rows.h, layer.R) + layer.first[e]);
      gate += static_cast<double>(gates[k]) *
              static_cast<double>(cpu::gate_gradient(layer, e, z_e, u + layer.first[e]));
    }
    rows.gate.mutable_data_ptr<double>()[t] = gate;
    scalar_t* grad_z = row(rows.grad_z, layer.C);
    for (int64_t c = 0; c < layer.C; ++c) {
      grad_z[c] = cpu::narrow<scalar_t>(cpu::widen(dz[t * ld_dz + c]));
    }
    scalar_t* grad_logits = row(rows.grad_logits, layer.E);
    for (int64_t e = 0; e < layer.E; ++e) {
      grad_logits[e] = cpu::narrow<scalar_t>(memory.grad_logits[e]);
    }
  }
};

}  // namespace floe
