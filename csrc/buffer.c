// SPDX-License-Identifier: MIT
/*
 * kvmring._buffer: the buffer protocol for Python classes, on Python 3.11.
 *
 * From 3.12 on a class may define __buffer__ itself (PEP 688) and this module is
 * not imported.  Its one type, Buffer, does the same for 3.11: it asks the object
 * for a memoryview and passes that view's buffer on.
 */
#include <Python.h>

static int buffer_get(PyObject *self, Py_buffer *view, int flags)
{
	PyObject *inner = PyObject_CallMethod(self, "__buffer__", "i", flags);
	int ret;

	if (!inner)
		return -1;
	/* The new view belongs to the inner one, and keeps it alive. */
	ret = PyObject_GetBuffer(inner, view, flags);
	Py_DECREF(inner);
	return ret;
}

static PyType_Slot slots[] = {
	{ Py_bf_getbuffer, (void *)buffer_get },
	{ Py_tp_doc, (void *)"Base of classes that define __buffer__ (PEP 688 for Python 3.11)." },
	{ 0, NULL },
};

static PyType_Spec spec = {
	.name = "kvmring._buffer.Buffer",
	.flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
	.slots = slots,
};

static int exec_module(PyObject *module)
{
	PyObject *type = PyType_FromSpec(&spec);
	int ret;

	if (!type)
		return -1;
	ret = PyModule_AddObjectRef(module, "Buffer", type);
	Py_DECREF(type);
	return ret;
}

static PyModuleDef_Slot module_slots[] = {
	{ Py_mod_exec, (void *)exec_module },
	{ 0, NULL },
};

static struct PyModuleDef module = {
	PyModuleDef_HEAD_INIT,
	.m_name = "_buffer",
	.m_slots = module_slots,
};

PyMODINIT_FUNC PyInit__buffer(void)
{
	return PyModuleDef_Init(&module);
}
