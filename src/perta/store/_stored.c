/* The edit's arithmetic on stored values: one pass each, conversions included.

   bfloat16 is the upper half of a float32. It is rounded up or down at random, up with the share of
   the way that the value lies above the lower neighbour; `arithmetic` says from what numbers. */

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

/* A random number in [0, 65536) for an element of a tensor. */
INLINED uint32_t threshold(uint32_t first_key, uint32_t second_key, uint32_t element)
{
    uint32_t x = element + first_key;
    x = (x ^ (x >> 16)) * 0x7feb352du ^ second_key;
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    return (x ^ (x >> 16)) >> 16;
}

INLINED uint16_t to_bfloat16(float value, uint32_t above)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (uint16_t)((bits + above) >> 16);
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

enum { SQUARES, ERROR_ALONG, ERROR_SQUARES, CHANGED, SUM_COUNT };

INLINED void subtract_from(double *sums, void *stored, int is_bfloat16, const float *delta,
                           Py_ssize_t count, uint32_t first_key, uint32_t second_key,
                           uint32_t start)
{
    for (Py_ssize_t low = 0; low < count; low += BLOCK) {
        const Py_ssize_t high = count - low < BLOCK ? count : low + BLOCK;
        float squares = 0, along = 0, error_squares = 0, changed = 0;
#pragma omp simd reduction(+ : squares, along, error_squares, changed)
        for (Py_ssize_t i = low; i < high; i++) {
            const float before = load(stored, is_bfloat16, i);
            const float result = before - delta[i];
            squares += result * result;
            if (is_bfloat16) {
                const uint32_t above = threshold(first_key, second_key, start + (uint32_t)i);
                ((uint16_t *)stored)[i] = to_bfloat16(result, above);
            } else {
                ((float *)stored)[i] = result;
            }
            const float after = load(stored, is_bfloat16, i);
            const float error = (before - after) - delta[i];
            along += error * delta[i];
            error_squares += error * error;
            changed += after != before ? 1.0f : 0.0f;
        }
        sums[SQUARES] += squares;
        sums[ERROR_ALONG] += along;
        sums[ERROR_SQUARES] += error_squares;
        sums[CHANGED] += changed;
    }
}

FOR_EACH_PROCESSOR static void subtract(double *sums, void *stored, int is_bfloat16,
                                        const float *delta, Py_ssize_t count, uint32_t first_key,
                                        uint32_t second_key, uint32_t start)
{
    if (is_bfloat16)
        subtract_from(sums, stored, 1, delta, count, first_key, second_key, start);
    else
        subtract_from(sums, stored, 0, delta, count, first_key, second_key, start);
}

FOR_EACH_PROCESSOR static void round_all(uint16_t *out, const float *values, Py_ssize_t count,
                                         uint32_t first_key, uint32_t second_key, uint32_t start)
{
    for (Py_ssize_t i = 0; i < count; i++)
        out[i] = to_bfloat16(values[i], threshold(first_key, second_key, start + (uint32_t)i));
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
             "subtract(stored, is_bfloat16, delta, count, first_key, second_key, start)\n\n"
             "stored -= delta, computed in float32 and rounded once. Arrays are addresses; delta\n"
             "is float32; the keys and the first element's number decide the rounding.\n\n"
             "Returns sums over the elements, with error = what was stored of delta - delta:\n"
             "squares of the results before they were rounded, error * delta, error^2, and the\n"
             "number of elements that changed.");

static PyObject *py_subtract(PyObject *Py_UNUSED(module), PyObject *arguments)
{
    unsigned long long stored, delta;
    unsigned int first_key, second_key, start;
    int is_bfloat16;
    Py_ssize_t count;
    double sums[SUM_COUNT] = {0};
    if (!PyArg_ParseTuple(arguments, "KpKnIII", &stored, &is_bfloat16, &delta, &count, &first_key,
                          &second_key, &start))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    subtract(sums, (void *)(uintptr_t)stored, is_bfloat16, (const float *)(uintptr_t)delta, count,
             first_key, second_key, start);
    Py_END_ALLOW_THREADS
    return Py_BuildValue("dddd", sums[SQUARES], sums[ERROR_ALONG], sums[ERROR_SQUARES],
                         sums[CHANGED]);
}

PyDoc_STRVAR(round_doc,
             "round(out, values, count, first_key, second_key, start)\n\n"
             "Rounds float32 to bfloat16 as `subtract` does. Arrays are addresses.");

static PyObject *py_round(PyObject *Py_UNUSED(module), PyObject *arguments)
{
    unsigned long long out, values;
    unsigned int first_key, second_key, start;
    Py_ssize_t count;
    if (!PyArg_ParseTuple(arguments, "KKnIII", &out, &values, &count, &first_key, &second_key,
                          &start))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    round_all((uint16_t *)(uintptr_t)out, (const float *)(uintptr_t)values, count, first_key,
              second_key, start);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {{"difference", py_difference, METH_VARARGS, difference_doc},
                                {"subtract", py_subtract, METH_VARARGS, subtract_doc},
                                {"round", py_round, METH_VARARGS, round_doc},
                                {NULL, NULL, 0, NULL}};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_stored", NULL, 0, methods,
                                    NULL,                  NULL,      NULL, NULL};

PyMODINIT_FUNC PyInit__stored(void)
{
    return PyModule_Create(&module);
}
