// What quant_compile/runtime/watch.py asks of many tensors at once, in one loop without Python objects for each.

#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/object_ptr.h>

namespace {

// tuple -> bytes: which objects these are; eight bytes each.
PyObject* identities(PyObject* module, PyObject* objects) {
  if (!PyTuple_CheckExact(objects)) {
    PyErr_SetString(PyExc_TypeError, "identities() takes a tuple");
    return nullptr;
  }
  const auto* items = reinterpret_cast<const char*>(PySequence_Fast_ITEMS(objects));
  return PyBytes_FromStringAndSize(items, PyTuple_GET_SIZE(objects) * static_cast<Py_ssize_t>(sizeof(PyObject*)));
}

// tuple of tensors -> bytes: version (-1 for none) and address of each; sixteen bytes each.
PyObject* states(PyObject* module, PyObject* tensors) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(PyTuple_CheckExact(tensors), "states() takes a tuple");
  const Py_ssize_t count = PyTuple_GET_SIZE(tensors);
  THPObjectPtr out(PyBytes_FromStringAndSize(nullptr, count * 2 * static_cast<Py_ssize_t>(sizeof(int64_t))));
  if (!out) throw python_error();
  auto* to = reinterpret_cast<int64_t*>(PyBytes_AS_STRING(out.get()));
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* item = PyTuple_GET_ITEM(tensors, i);
    TORCH_CHECK_TYPE(THPVariable_Check(item), "states() takes tensors");
    const auto* tensor = THPVariable_Unpack(item).unsafeGetTensorImpl();
    const auto& version = tensor->version_counter();
    *to++ = version.enabled() ? static_cast<int64_t>(version.current_version()) : -1;
    *to++ = tensor->has_storage() ? reinterpret_cast<int64_t>(tensor->data()) : 0;
  }
  return out.release();
  END_HANDLE_TH_ERRORS
}

PyMethodDef methods[] = {
    {"identities", identities, METH_O, nullptr},
    {"states", states, METH_O, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "sglquant_watch", nullptr, -1, methods};

}  // namespace

PyMODINIT_FUNC PyInit_sglquant_watch() { return PyModule_Create(&definition); }
