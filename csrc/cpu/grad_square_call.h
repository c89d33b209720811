// floe::segment_grad_square, for kernels that call it without the dispatcher.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>

namespace floe {

// The gradient (R, D) of all rows, the samples' squares summed as `reduce` says ("element", "rank",
// "matrix"), and the samples' norms (S).
std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor> segment_grad_square(
    const torch::stable::Tensor& g, const torch::stable::Tensor& x,
    const torch::stable::Tensor& offsets, const std::optional<torch::stable::Tensor>& scale,
    const std::string& reduce);

}  // namespace floe
