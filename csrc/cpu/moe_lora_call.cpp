#include "cpu/moe_lora_call.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace floe {
namespace {

// Parameters have the dtype of x, or float32: any other is changed to what holds both.
Tensor parameter(const Tensor& t, const Tensor& x) {
  if (t.scalar_type() == x.scalar_type()) return as_contiguous(t);
  return as_dtype(t,
                  x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float);
}

}  // namespace

Experts::Experts(const Tensor& x, const Tensor& lora_A, const Tensor& lora_B,
                 const Tensor& router_weight, const Tensor& scaling, std::vector<int64_t> ranks,
                 bool shared_A, bool renormalize, const Optional& token_mask, double dropout_p,
                 const Optional& dropout_seed, const Optional& aux_coefs)
    : x(as_contiguous(x)),
      lora_A(parameter(lora_A, x)),
      lora_B(parameter(lora_B, x)),
      router_weight(parameter(router_weight, x)),
      scaling(scaling),
      ranks(std::move(ranks)),
      shared_A(shared_A),
      renormalize(renormalize) {
  if (token_mask) this->token_mask = as_contiguous(*token_mask);
  if (aux_coefs) this->aux_coefs = as_dtype(*aux_coefs, ScalarType::Float);
  if (dropout_p != 0 && dropout_seed) {
    dropout.active = true;
    dropout.key = static_cast<uint64_t>(*dropout_seed->const_data_ptr<int64_t>());
    // reference/dropout.py rounds half to even, as nearbyint does
    dropout.threshold = static_cast<uint64_t>(std::nearbyint(dropout_p * 0x1p32));
    dropout.scale = 1 / (1 - dropout_p);
  }
}

bool runs_grouped(const Experts& given, int64_t K) {
  const int64_t R = given.lora_B.size(0), E = static_cast<int64_t>(given.ranks.size());
  if (given.shared_A || R == 0) return false;
  if (given.x.size(0) <= 32) return true;  // few tokens: reading weights is all there is to do
  // AMD EPYC with AVX512-BF16, T = 1024, 1024 x 1024, bf16, forward and backward, milliseconds:
  // dense 1.4 + 0.034 R, grouped 2.4 + 0.052 K R / E
  return 2 * E * R - 3 * K * R >= 64 * E;
}

int64_t rows_per_task(int64_t T) {
  const int64_t tasks = 2 * static_cast<int64_t>(torch::stable::get_num_threads());
  // 128 rows read the packed weights from L3 seldom enough to hide it
  return std::clamp<int64_t>(((T + tasks - 1) / tasks + 15) / 16 * 16, 16, 128);
}

void* Panels::columns(const Tensor& w) { return add(w, false); }

void* Panels::rows(const Tensor& w) { return add(w, true); }

void* Panels::add(const Tensor& w, bool rows) {
  const cpu::Matrix m = matrix(w);
  const int64_t N = rows ? m.cols : m.rows, K = rows ? m.rows : m.cols;
  const int64_t panels = (N + kernels_.nr - 1) / kernels_.nr;
  const int64_t units = (K + kernels_.pack - 1) / kernels_.pack;
  jobs_.push_back({m, rows, panels, cpu::Scratch(panels * kernels_.nr * units * 8)});
  return jobs_.back().memory.get();
}

void Loops::run() const {
  int64_t longest = 0;
  for (const Loop& loop : loops_) longest = std::max(longest, loop.count);
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), longest);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (const Loop& loop : loops_) {
      const int64_t from = loop.count * begin / threads, to = loop.count * end / threads;
      if (from < to) loop.body(from, to);
    }
  });
}

void Panels::pack_in(Loops& loops) const {
  int64_t total = 0;
  for (const Job& job : jobs_) total += job.panels;
  loops.add(total, [this](int64_t begin, int64_t end) {
    for (const Job& job : jobs_) {
      for (int64_t p = std::max<int64_t>(begin, 0); p < std::min(end, job.panels); ++p) {
        (job.rows ? kernels_.pack_rows : kernels_.pack_columns)(job.w, p, job.memory.get());
      }
      begin -= job.panels, end -= job.panels;
    }
  });
}

cpu::Scratch keep_bits(const cpu::Kernels& kernels, const cpu::Dropout& dropout, int64_t T,
                       int64_t I, Loops& loops) {
  if (!dropout.active) return {};
  const int64_t ld = keep_stride(I);
  cpu::Scratch bits(T * ld);
  loops.add(T, [&kernels, &dropout, I, ld, to = bits.get<uint8_t>()](int64_t begin, int64_t end) {
    kernels.keep_bits(dropout, begin, end - begin, I, to + begin * ld, ld);
  });
  return bits;
}

}  // namespace floe
