#include "cpu/moe_lora_forward.h"
#include "cpu/moe_lora_grouped.h"

namespace floe {
namespace {

template <typename scalar_t, typename elem>
struct Grouped {
  using wide = cpu::wide_t<scalar_t>;

  const Experts& given;
  const cpu::Kernels& kernels;
  const cpu::Layer<wide> layer;
  const ForwardOutputs& to;

  void run() const {
    const ScalarType dtype = given.x.scalar_type();
    const Tensor lora_A = as_dtype(given.lora_A, dtype);
    const int64_t step = rows_per_task(layer.T), tasks = (layer.T + step - 1) / step;
    auto* z = static_cast<scalar_t*>(to.z.mutable_data_ptr());
    Loops routing;
    const cpu::Scratch keep = keep_bits(kernels, given.dropout, layer.T, layer.I, routing);
    routing.add(tasks, [&](int64_t begin, int64_t end) {
      const int64_t t0 = begin * step, t1 = std::min(end * step, layer.T);
      route_tokens(given, kernels, layer, to, t0, t1 - t0);
      std::memset(static_cast<void*>(z + t0 * layer.C), 0, (t1 - t0) * layer.C * sizeof(scalar_t));
    });
    routing.run();
    const cpu::Slots slots = cpu::sort_by_expert(to.experts.const_data_ptr<int64_t>(), layer.T,
                                                 layer.K, layer.E, layer.mask);
    const int64_t ld = slot_stride(layer);
    const cpu::Scratch h(slots.size() * ld * sizeof(elem));
    shrink(lora_A, slots, keep.get<uint8_t>(), h.get<elem>(), ld);
    cpu::GatherExpand expand{};
    expand.O = layer.O, expand.slots = h.get(), expand.ld_slots = ld, expand.scale = 1;
    expand.base = to.base, expand.out = to.out.mutable_data_ptr();
    expand.ld_base = expand.ld_out = layer.O;
    Loops loops;
    expand_slots(kernels, layer, slots, given.lora_B, expand, loops);
    loops.run();
  }

  // z of the experts each token keeps, and h of every slot.
  void shrink(const Tensor& lora_A, const cpu::Slots& slots, const uint8_t* keep, elem* h,
              int64_t ld) const {
    const std::vector<cpu::Run> runs = cpu::cut(slots, layer.E, kSlotsPerTask);
    auto* z = static_cast<scalar_t*>(to.z.mutable_data_ptr());
    const auto* gates = static_cast<const wide*>(to.gates.const_data_ptr());
    const auto count = static_cast<int64_t>(runs.size());
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      const cpu::Scratch sums(kSlotsPerTask * ld * sizeof(wide));
      const cpu::Scratch staged(
          given.dropout.active ? cpu::kDotScratchRows * (layer.I + 1) * sizeof(elem) : 0);
      for (int64_t i = begin; i < end; ++i) {
        const cpu::Run& run = runs[i];
        const int64_t e = run.expert, rank = layer.rank(e), first = layer.first[e];
        cpu::GatherDots dots = gathered(slots, run, given.x.const_data_ptr(), layer.I, lora_A,
                                        first, rank, sums.get(), ld);
        if (given.dropout.active) {
          dots.keep = keep, dots.keep_ld = keep_stride(layer.I);
          dots.scratch = staged.get();
        }
        kernels.gather_dots(dots);
        for (int64_t s = run.begin; s < run.end; ++s) {
          const int64_t t = slots.token[s];
          scalar_t* z_e = z + t * layer.C + first;
          kernels.narrow_rows(sums.get<wide>() + (s - run.begin) * ld, ld, 1, rank,
                              given.dropout.scale, z_e, layer.C);
          std::fill_n(h + s * ld, ld, elem{});
          cpu::mix(layer, e, gates[t * layer.K + slots.choice[s]], z_e, h + s * ld);
        }
      }
    });
  }
};

}  // namespace

void forward_grouped(const Experts& given, const ForwardOutputs& to) {
  with_elements(given.x, [&](auto x, auto unit, const cpu::Kernels& kernels) {
    using scalar_t = decltype(x);
    const auto layer = given.layer<cpu::wide_t<scalar_t>>(to.experts.size(1));
    Grouped<scalar_t, decltype(unit)>{given, kernels, layer, to}.run();
  });
}

}  // namespace floe
