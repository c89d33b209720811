#include <Python.h>

#include "cpu/isa.h"

namespace {

floe::cpu::IsaTable isa_table = {floe::cpu::best_isa, floe::cpu::isa, floe::cpu::set_isa};

PyModuleDef module_def = {
    PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};

}  // namespace

// Importing the module loads this library, and loading runs the STABLE_TORCH_LIBRARY_IMPL blocks,
// which is all that an import has to do. The one attribute is for _info; see cpu/isa.h.
extern "C" PyObject* PyInit__C(void) {
  PyObject* module = PyModule_Create(&module_def);
  if (!module) return nullptr;
  PyObject* capsule = PyCapsule_New(&isa_table, floe::cpu::kIsaCapsule, nullptr);
  const int failed = PyModule_AddObjectRef(module, "_isa", capsule);
  Py_XDECREF(capsule);
  if (failed) Py_CLEAR(module);
  return module;
}
