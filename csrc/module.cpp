// neulig_fast._C: an importable module that only exists to be loaded. Loading it runs the static
// registrations of the other files (STABLE_TORCH_LIBRARY_IMPL), which hand their kernels to torch's
// dispatcher. Built against the limited API, so one binary serves every Python from 3.10 on.
#include <Python.h>

#include <exception>

#include "common/cpu_level.h"

namespace {

// cpu_level() -> int: the x86-64 level (0, 3 or 4) the CPU kernels run at; RuntimeError when
// NEULIG_FAST_CPU asks for one this CPU lacks.
PyObject* cpu_level(PyObject*, PyObject*) {
  try {
    return PyLong_FromLong(static_cast<long>(neulig_fast::cpu_level()));
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

PyMethodDef methods[] = {
    {"cpu_level", cpu_level, METH_NOARGS, "x86-64 level of the CPU kernels: 0, 3 or 4"},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr,
};

}  // namespace

PyMODINIT_FUNC PyInit__C() {
  return PyModule_Create(&module);
}
