// floe_kernels._info: how this build was made, and which instruction set its kernels use.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <iterator>
#include <map>
#include <string>
#include <vector>

#include "cpu/isa.h"

namespace py = pybind11;

namespace floe {
namespace {

#if defined(__clang__)
constexpr const char* kCompiler = __VERSION__;  // says Clang itself
#else
constexpr const char* kCompiler = "GCC " __VERSION__;
#endif

std::map<std::string, std::string> build_info() {
  return {{"version", FLOE_VERSION},
          {"build", FLOE_BUILD},
          {"compiler", kCompiler},
          {"flags", FLOE_FLAGS},
          {"cxx_standard", std::to_string(__cplusplus)},
          {"torch_target_version", FLOE_TORCH_TARGET}};
}

// What _C uses; throws ImportError where _C did not load.
const cpu::IsaTable& table() {
  const void* found = PyCapsule_Import(cpu::kIsaCapsule, 0);
  if (!found) throw py::error_already_set();
  return *static_cast<const cpu::IsaTable*>(found);
}

std::string cpu_isa() { return cpu::kIsaNames[table().get()]; }

std::vector<std::string> cpu_isas() {
  return {std::begin(cpu::kIsaNames), std::begin(cpu::kIsaNames) + table().best() + 1};
}

void set_cpu_isa(const std::string& name) {
  const std::vector<std::string> names = cpu_isas();
  const auto wanted = std::find(names.begin(), names.end(), name);
  if (wanted == names.end()) {
    std::string available = names[0];
    for (std::size_t i = 1; i < names.size(); ++i) available += ", " + names[i];
    throw py::value_error("name must be one of those of this CPU (" + available + "), got '" +
                          name + "'");
  }
  table().set(static_cast<cpu::Isa>(wanted - names.begin()));
}

}  // namespace
}  // namespace floe

PYBIND11_MODULE(_info, m) {
  m.doc() = "How this build was made, and which instruction set its kernels use.";
  m.def("build_info", &floe::build_info, "Return version, build, compiler, flags and standard.");
  m.def("cpu_isa", &floe::cpu_isa, "Return the name of the instruction set in use.");
  m.def("cpu_isas", &floe::cpu_isas, "Return the names of this CPU's instruction sets.");
  m.def("set_cpu_isa", &floe::set_cpu_isa, py::arg("name"),
        "Use another instruction set of this CPU, in every operator call from now on.");
}
