/* The edit's arithmetic on stored values: one pass each, conversions included.

   bfloat16 is the upper half of a float32; rounding is to the nearest, ties to even, as PyTorch's. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GLIBC__)
#define FOR_EACH_PROCESSOR __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FOR_EACH_PROCESSOR
#endif

#define INLINED static inline __attribute__((always_inline))

enum {
    BLOCK = 4096 /* sums of so many squares are kept in float32 before they are added up */
};

INLINED float load(const void *values, int is_bfloat16, Py_ssize_t i)
{
    if (!is_bfloat16)
        return ((const float *)values)[i];
    const uint32_t bits = (uint32_t)((const uint16_t *)values)[i] << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINED void store(void *values, int is_bfloat16, Py_ssize_t i, float value)
{
    if (!is_bfloat16) {
        ((float *)values)[i] = value;
        return;
    }
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    ((uint16_t *)values)[i] = (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (uint16_t)rounded;
}

INLINED void difference_of(float *out, const void *values, int is_values_bfloat16,
                           const void *base, int is_base_bfloat16, Py_ssize_t count)
{
    for (Py_ssize_t i = 0; i < count; i++)
        out[i] = load(values, is_values_bfloat16, i) - load(base, is_base_bfloat16, i);
}

FOR_EACH_PROCESSOR static void difference(float *out, const void *values, int is_values_bfloat16,
                                          const void *base, int is_base_bfloat16,
                                          Py_ssize_t count)
{
    if (is_values_bfloat16 && is_base_bfloat16)
        difference_of(out, values, 1, base, 1, count);
    else if (is_values_bfloat16)
        difference_of(out, values, 1, base, 0, count);
    else if (is_base_bfloat16)
        difference_of(out, values, 0, base, 1, count);
    else
        difference_of(out, values, 0, base, 0, count);
}

INLINED double subtract_from(void *stored, int is_bfloat16, const float *delta, Py_ssize_t count)
{
    double total = 0;
    for (Py_ssize_t low = 0; low < count; low += BLOCK) {
        const Py_ssize_t high = count - low < BLOCK ? count : low + BLOCK;
        float squares = 0;
#pragma omp simd reduction(+ : squares)
        for (Py_ssize_t i = low; i < high; i++) {
            const float result = load(stored, is_bfloat16, i) - delta[i];
            squares += result * result;
            store(stored, is_bfloat16, i, result);
        }
        total += squares;
    }
    return total;
}

FOR_EACH_PROCESSOR static double subtract(void *stored, int is_bfloat16, const float *delta,
                                          Py_ssize_t count)
{
    return is_bfloat16 ? subtract_from(stored, 1, delta, count)
                       : subtract_from(stored, 0, delta, count);
}

PyDoc_STRVAR(difference_doc,
             "difference(out, values, is_values_bfloat16, base, is_base_bfloat16, count)\n\n"
             "out = values - base, in float32. Arrays are addresses; out may be values.");

static PyObject *py_difference(PyObject *Py_UNUSED(module), PyObject *arguments)
{
    unsigned long long out, values, base;
    int is_values_bfloat16, is_base_bfloat16;
    Py_ssize_t count;
    if (!PyArg_ParseTuple(arguments, "KKpKpn", &out, &values, &is_values_bfloat16, &base,
                          &is_base_bfloat16, &count))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    difference((float *)(uintptr_t)out, (const void *)(uintptr_t)values, is_values_bfloat16,
               (const void *)(uintptr_t)base, is_base_bfloat16, count);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

PyDoc_STRVAR(subtract_doc,
             "subtract(stored, is_bfloat16, delta, count)\n\n"
             "stored -= delta, computed in float32 and rounded once. Arrays are addresses; delta\n"
             "is float32.\n\n"
             "Returns the sum of squares of the results before they were rounded.");

static PyObject *py_subtract(PyObject *Py_UNUSED(module), PyObject *arguments)
{
    unsigned long long stored, delta;
    int is_bfloat16;
    Py_ssize_t count;
    double squares;
    if (!PyArg_ParseTuple(arguments, "KpKn", &stored, &is_bfloat16, &delta, &count))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    squares = subtract((void *)(uintptr_t)stored, is_bfloat16, (const float *)(uintptr_t)delta,
                       count);
    Py_END_ALLOW_THREADS
    return PyFloat_FromDouble(squares);
}

static PyMethodDef methods[] = {{"difference", py_difference, METH_VARARGS, difference_doc},
                                {"subtract", py_subtract, METH_VARARGS, subtract_doc},
                                {NULL, NULL, 0, NULL}};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_stored", NULL, 0, methods,
                                    NULL,                  NULL,      NULL, NULL};

PyMODINIT_FUNC PyInit__stored(void)
{
    return PyModule_Create(&module);
}
