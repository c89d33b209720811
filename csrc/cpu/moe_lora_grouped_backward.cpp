#include "cpu/moe_lora_backward.h"
#include "cpu/moe_lora_grouped.h"

namespace floe {
namespace {

template <typename scalar_t, typename elem>
struct Grouped {
  using wide = cpu::wide_t<scalar_t>;

  const Experts& given;
  const BackwardInputs& in;
  const cpu::Kernels& kernels;
  const cpu::Layer<wide> layer;
  const Gradients& out;
  RowGradients& rows;

  void run(bool base_share) const {
    const int64_t T = layer.T, E = layer.E, pack = kernels.pack, mr = kernels.mr;
    const cpu::Slots slots =
        cpu::sort_by_expert(in.experts.const_data_ptr<int64_t>(), T, layer.K, E, layer.mask);
    const int64_t ld = slot_stride(layer);
    // every expert's coefficients tiled for itself, one after the other
    std::vector<int64_t> offset(1, 0);
    for (int64_t e = 0; e < E; ++e) {
      const int64_t Q = (slots.count(e) + pack - 1) / pack;
      offset.push_back(offset.back() + cpu::Tiled<elem>::size(layer.rank(e), Q, mr, pack));
    }
    const cpu::Scratch dz(slots.size() * ld * sizeof(elem));
    const cpu::Scratch dz_tiled(offset.back() * sizeof(elem));
    const cpu::Scratch h_tiled(offset.back() * sizeof(elem));
    const cpu::Scratch grad_gates(T * layer.K * sizeof(wide));
    std::memset(dz_tiled.get(), 0, offset.back() * sizeof(elem));
    std::memset(h_tiled.get(), 0, offset.back() * sizeof(elem));
    const auto tiles_of = [&](const cpu::Scratch& all, int64_t e) {
      return cpu::Tiled<elem>{all.get<elem>() + offset[e], (slots.count(e) + pack - 1) / pack};
    };
    const Tensor lora_B = as_dtype(given.lora_B, given.x.scalar_type());
    const std::vector<cpu::Run> runs = cpu::cut(slots, E, kSlotsPerTask);
    const auto count = static_cast<int64_t>(runs.size());
    Panels panels(kernels);
    const void* router = in.needs_x ? panels.rows(given.router_weight) : nullptr;
    Loops first;
    panels.pack_in(first);
    const cpu::Scratch keep = keep_bits(kernels, given.dropout, T, layer.I, first);
    const uint8_t* kept = given.dropout.active ? keep.get<uint8_t>() : nullptr;
    first.add(count, [&](int64_t begin, int64_t end) {
      const cpu::Scratch u(kSlotsPerTask * ld * sizeof(wide));
      for (int64_t i = begin; i < end; ++i) {
        const cpu::Run& run = runs[i];
        kernels.gather_dots(gathered(slots, run, in.grad_out.const_data_ptr(), layer.O, lora_B,
                                     layer.first[run.expert], layer.rank(run.expert), u.get(), ld));
        slot_grads(slots, run, u.get(), dz.get<elem>() + run.begin * ld, ld,
                   tiles_of(dz_tiled, run.expert), tiles_of(h_tiled, run.expert),
                   grad_gates.get<wide>());
      }
    });
    first.run();

    const int64_t ld_dl = (E + 15) / 16 * 16, Q = (T + pack - 1) / pack;
    const cpu::Scratch dl(T * ld_dl * sizeof(elem));
    const cpu::Scratch dl_tiled(cpu::Tiled<elem>::size(E, Q, mr, pack) * sizeof(elem));
    const cpu::Tiled<elem> tiles{dl_tiled.get<elem>(), Q};
    grad_logits(grad_gates.get<wide>(), dl.get<elem>(), ld_dl, tiles);

    Loops last;
    if (in.needs_x) {
      void* dx = std::get<0>(out).mutable_data_ptr();
      cpu::GatherExpand expand{};
      expand.O = layer.I, expand.slots = dz.get(), expand.ld_slots = ld;
      expand.second = {dl.get(), ld_dl, E, router};
      expand.keep = kept, expand.keep_ld = keep_stride(layer.I);
      expand.scale = given.dropout.scale;
      expand.base = base_share ? dx : nullptr, expand.out = dx;
      expand.ld_base = expand.ld_out = layer.I;
      expand_slots(kernels, layer, slots, given.lora_A, expand, last);
    }

    const auto grads = [&](const Tensor& to, const Tensor& x, const cpu::Scratch& tiled,
                           const uint8_t* bits, double scale) {
      const int64_t columns = x.size(1), panels = (columns + kernels.nr - 1) / kernels.nr;
      const int64_t rows = ld + mr,
                    tasks = 4 * static_cast<int64_t>(torch::stable::get_num_threads());
      // few enough panels together that there is a task for every thread
      const int64_t most =
          std::clamp<int64_t>(E * panels / tasks, 1, cpu::grad_panels(kernels, rows));
      const int64_t groups = (panels + most - 1) / most;
      last.add(E * groups, [=, this, &slots, &tiled, &tiles_of](int64_t begin, int64_t end) {
        const cpu::Scratch scratch(cpu::grad_scratch(kernels, rows, most, columns));
        for (int64_t i = begin; i < end; ++i) {
          const int64_t e = i / groups, row = layer.first[e] * columns, p = i % groups * most;
          auto* data = static_cast<char*>(to.mutable_data_ptr()) +
                       row * static_cast<int64_t>(to.element_size());
          if (slots.count(e) == 0) {
            clear_columns(data, to, layer.rank(e), p * kernels.nr, (p + most) * kernels.nr);
            continue;
          }
          const cpu::WeightGrad grad{
              layer.rank(e), tiles_of(tiled, e).data, true, scale, data, dtype_of(to), columns};
          kernels.weight_grad(
              {x.const_data_ptr(), columns, columns, slots.token.data() + slots.first[e],
               slots.count(e), nullptr, bits, keep_stride(columns)},
              p, std::min(panels, p + most), &grad, 1, scratch.get());
        }
      });
    };
    if (in.needs_A) grads(std::get<1>(out), given.x, dz_tiled, kept, given.dropout.scale);
    if (in.needs_B) grads(std::get<2>(out), in.grad_out, h_tiled, nullptr, 1);
    if (in.needs_router) {
      const Tensor& to = std::get<3>(out);
      weight_grads(
          kernels, {given.x.const_data_ptr(), layer.I, layer.I, nullptr, T, layer.mask, nullptr, 0},
          {{E, dl_tiled.get(), false, 1, to.mutable_data_ptr(), dtype_of(to), layer.I}}, last);
    }
    last.run();
  }

  // Columns begin..end of so many rows of a gradient become zero.
  static void clear_columns(char* data, const Tensor& of, int64_t rows, int64_t begin,
                            int64_t end) {
    const int64_t columns = of.size(1), size = static_cast<int64_t>(of.element_size());
    end = std::min(end, columns);
    for (int64_t r = 0; r < rows; ++r) {
      std::memset(data + (r * columns + begin) * size, 0, (end - begin) * size);
    }
  }

  // From u of one run: its tokens' gradients of their gates, and its share of every other gradient.
  void slot_grads(const cpu::Slots& slots, const cpu::Run& run, const void* u, elem* dz, int64_t ld,
                  const cpu::Tiled<elem>& dz_tiled, const cpu::Tiled<elem>& h_tiled,
                  wide* grad_gates) const {
    const int64_t e = run.expert, first = layer.first[e], rank = layer.rank(e);
    const auto* z = static_cast<const scalar_t*>(in.z.const_data_ptr());
    const int64_t begin = run.begin - slots.first[e];  // a multiple of kSlotsPerTask
    kernels.slot_grads({run.end - run.begin, rank, layer.scaling.data() + first, u, ld, z + first,
                        layer.C, in.gates.const_data_ptr(), slots.token.data() + run.begin,
                        slots.choice.data() + run.begin, layer.K, grad_gates, dz, ld, dz_tiled.data,
                        h_tiled.data, dz_tiled.Q, begin / kernels.pack});
    for (int64_t s = run.begin; s < run.end && in.keeps_rows; ++s) {
      const int64_t t = slots.token[s], i = t * layer.K + slots.choice[s];
      const auto row = [&](const Tensor& to, int64_t columns) {
        return static_cast<scalar_t*>(to.mutable_data_ptr()) + t * columns + first;
      };
      const wide gate = static_cast<const wide*>(in.gates.const_data_ptr())[i];
      cpu::mix(layer, e, gate, z + t * layer.C + first, row(rows.h, layer.R));
      for (int64_t c = 0; c < rank; ++c) {
        row(rows.grad_z, layer.C)[c] =
            cpu::narrow<scalar_t>(cpu::widen(dz[(s - run.begin) * ld + c]));
      }
    }
  }

  // What the router learns, from the gradients of the kept gates.
  void grad_logits(const wide* grad_gates, elem* dl, int64_t ld,
                   const cpu::Tiled<elem>& tiled) const {
    const int64_t E = layer.E, K = layer.K;
    const auto aux = aux_losses(given, layer, in.experts);
    const auto* logits = static_cast<const wide*>(in.logits.const_data_ptr());
    const auto* gates = static_cast<const wide*>(in.gates.const_data_ptr());
    const auto* experts = in.experts.const_data_ptr<int64_t>();
    const int64_t step = rows_per_task(layer.T), tasks = (layer.T + step - 1) / step;
    torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
      const int64_t last = std::min(layer.T, end * step);
      std::vector<wide> grad(E);
      std::fill_n(dl + begin * step * ld, (last - begin * step) * ld, elem{});
      for (int64_t t = begin * step; t < last; ++t) {
        if (layer.masked(t)) continue;
        cpu::logit_gradient(layer, logits + t * E, gates + t * K, experts + t * K,
                            grad_gates + t * K, aux, grad.data());
        for (int64_t e = 0; e < E; ++e) dl[t * ld + e] = cpu::narrow<elem>(grad[e]);
        if (in.keeps_rows) keep_row(t, gates + t * K, grad_gates + t * K, grad);
      }
      kernels.tile_rows({dl + begin * step * ld, ld, last - begin * step, E, tiled.data, tiled.Q,
                         begin * step / kernels.pack});
    });
  }

  void keep_row(int64_t t, const wide* gates, const wide* grad_gates,
                const std::vector<wide>& grad) const {
    auto* to = static_cast<scalar_t*>(rows.grad_logits.mutable_data_ptr()) + t * layer.E;
    for (int64_t e = 0; e < layer.E; ++e) to[e] = cpu::narrow<scalar_t>(grad[e]);
    double gate = 0;
    for (int64_t k = 0; k < layer.K; ++k) {
      gate += static_cast<double>(gates[k]) * static_cast<double>(grad_gates[k]);
    }
    rows.gate.mutable_data_ptr<double>()[t] = gate;
  }
};

}  // namespace

void backward_grouped(const Experts& given, const BackwardInputs& in, bool base_share,
                      const Gradients& out, RowGradients& rows) {
  with_elements(given.x, [&](auto x, auto unit, const cpu::Kernels& kernels) {
    using scalar_t = decltype(x);
    const auto layer = given.layer<cpu::wide_t<scalar_t>>(in.experts.size(1));
    Grouped<scalar_t, decltype(unit)>{given, in, kernels, layer, out, rows}.run(base_share);
  });
}

}  // namespace floe
