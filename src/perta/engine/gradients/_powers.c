/* Means of powers of per-example gradients, formed and raised in registers.

   For examples with rows left_b (R_b, height) and right_b (R_b, width),

       first  += weight * sum_b |left_b^T right_b|,
       second += weight * sum_b (left_b^T right_b)^2,

   elementwise. A matrix product spends most of its time on R_b multiplications for every element
   that it writes; here the element is raised and added to a sum in the first-level cache before it
   would be written, so a gradient never exists in memory and the powers cost a few percent.

   Both factors are copied once into panels that a tile reads from end to end: as many rows and
   columns of the gradient as registers hold. There are tiles for AVX2 and AVX-512; on any other
   processor the import fails, and PyTorch's operations do the work. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <omp.h>
#include <stdlib.h>
#include <string.h>

enum {
    CACHE_LINE = 16, /* floats */
    UNIT = 96,       /* rows of the gradient that one thread works on at a time */
    GROUP = 1024,    /* rows of the factors that are packed at a time, where examples allow */
    STRIP = 16       /* rows packed together: whole cache lines on both sides */
};

typedef struct {
    Py_ssize_t start, stop;
} Segment;

/* What is the same for all blocks of a group of examples. */
typedef struct {
    const Segment *segments;
    Py_ssize_t examples;
    Py_ssize_t stride; /* from one row of the means to the next */
    float weight;
} Group;

/* Add a group's powers to a block of the means: `tall` rows of `wide` elements, at most a tile.
   `first` or `second` may be NULL. */
typedef void (*AddBlock)(const Group *group, const float *left, const float *right, float *first,
                         float *second, Py_ssize_t tall, Py_ssize_t wide);

/* The means come from main memory while the products are computed. */
static inline void fetch(const float *mean, Py_ssize_t stride, Py_ssize_t tall, int across)
{
    for (Py_ssize_t i = 0; i < tall; i++)
        for (int j = 0; j < across; j += CACHE_LINE)
            __builtin_prefetch(mean + i * stride + j, 1);
}

#define NAME add_block_avx2
#define TARGET __attribute__((target("avx2,fma")))
#define LANES 8
#define ROWS 6
#define VECTORS 2
#include "_powers_block.h"

#define NAME add_block_avx512
#define TARGET __attribute__((target("avx512f")))
#define LANES 16
#define ROWS 12
#define VECTORS 2
#include "_powers_block.h"

static AddBlock add_block;
static int tile_rows, tile_columns;

/* Whether this processor has registers that a block was written for. */
static int choose_block(void)
{
    if (__builtin_cpu_supports("avx512f")) {
        add_block = add_block_avx512;
        tile_rows = 12;
        tile_columns = 32;
    } else if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        add_block = add_block_avx2;
        tile_rows = 6;
        tile_columns = 16;
    }
    return add_block != NULL;
}

static inline Py_ssize_t smaller(Py_ssize_t one, Py_ssize_t other)
{
    return one < other ? one : other;
}

static inline void pack_panel(float *to, const float *from, Py_ssize_t stride, Py_ssize_t count,
                              Py_ssize_t used, int across)
{
    for (Py_ssize_t t = 0; t < count; t++, to += across, from += stride) {
        memcpy(to, from, used * sizeof(float));
        if (used < across)
            memset(to + used, 0, (across - used) * sizeof(float));
    }
}

/* Copy rows [start, stop) of columns [low, high) of a matrix into panels of `across` columns,
   panel after panel, each from its first row to its last; the last panel is filled with zeros. */
static void pack(float *panels, Py_ssize_t count, const float *matrix, Py_ssize_t stride,
                 Py_ssize_t start, Py_ssize_t stop, Py_ssize_t low, Py_ssize_t high, int across)
{
    for (Py_ssize_t column = low; column < high; column += across) {
        float *to = panels + (column - low) * count + start * across;
        const float *from = matrix + start * stride + column;
        const Py_ssize_t used = smaller(high - column, across);
        /* Known sizes become a few moves instead of a call for every row. */
        switch (used == across ? across : 0) {
        case 6:
            pack_panel(to, from, stride, stop - start, 6, 6);
            break;
        case 12:
            pack_panel(to, from, stride, stop - start, 12, 12);
            break;
        case 16:
            pack_panel(to, from, stride, stop - start, 16, 16);
            break;
        case 32:
            pack_panel(to, from, stride, stop - start, 32, 32);
            break;
        default:
            pack_panel(to, from, stride, stop - start, used, across);
        }
    }
}

/* Add a group of examples, whose segments count from the first row of `left` and `right`. */
static void add_group(const Group *group, const float *left, const float *right, Py_ssize_t count,
                      Py_ssize_t height, Py_ssize_t width, float *first, float *second,
                      float *work, int threads)
{
    const int rows = tile_rows, across = tile_columns;
    const Py_ssize_t panels = (width + across - 1) / across;
    float *const packed_right = work, *const packed_lefts = work + panels * across * count;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (Py_ssize_t t = 0; t < count; t += STRIP)
            pack(packed_right, count, right, width, t, smaller(t + STRIP, count), 0, width,
                 across);
        float *const packed_left = packed_lefts + omp_get_thread_num() * UNIT * count;
#pragma omp for schedule(dynamic)
        for (Py_ssize_t top = 0; top < height; top += UNIT) {
            const Py_ssize_t bottom = smaller(top + UNIT, height);
            for (Py_ssize_t t = 0; t < count; t += STRIP)
                pack(packed_left, count, left, height, t, smaller(t + STRIP, count), top, bottom,
                     rows);
            for (Py_ssize_t column = 0; column < width; column += across)
                for (Py_ssize_t row = top; row < bottom; row += rows) {
                    const Py_ssize_t place = row * width + column;
                    add_block(group, packed_left + (row - top) * count,
                              packed_right + column * count, first ? first + place : NULL,
                              second ? second + place : NULL, smaller(bottom - row, rows),
                              smaller(width - column, across));
                }
        }
    }
}

/* Add all examples, in groups whose packed factors stay small. Returns -1 without memory. */
static int add_all(const float *left, const float *right, Segment *segments, Py_ssize_t examples,
                   Py_ssize_t height, Py_ssize_t width, float *first, float *second, float weight,
                   int threads)
{
    float *work = NULL;
    size_t held = 0;
    for (Py_ssize_t low = 0, high; low < examples; low = high) {
        const Py_ssize_t start = segments[low].start;
        for (high = low + 1; high < examples && segments[high].stop - start <= GROUP;)
            high++;
        const Py_ssize_t count = segments[high - 1].stop - start;
        const int across = tile_columns;
        const size_t wanted =
            (size_t)count * ((width + across - 1) / across * across + threads * UNIT);
        if (wanted > held) {
            free(work);
            held = wanted;
            if (posix_memalign((void **)&work, 64, held * sizeof(float)))
                return -1;
        }
        for (Py_ssize_t b = low; b < high; b++) {
            segments[b].start -= start;
            segments[b].stop -= start;
        }
        const Group group = {segments + low, high - low, width, weight};
        add_group(&group, left + start * height, right + start * width, count, height, width,
                  first, second, work, threads);
    }
    free(work);
    return 0;
}

PyDoc_STRVAR(add_powers_doc,
             "add_powers(left, right, rows, segments, height, width, first, second, weight, "
             "threads)\n\n"
             "Add weight * |g| to `first` and weight * g^2 to `second` for every example's\n"
             "g = left[start:stop].T @ right[start:stop].\n\n"
             "All arrays are addresses of float32 in rows without gaps: left (rows, height), right\n"
             "(rows, width), first and second (height, width) or 0 for none. Segments, a tuple of\n"
             "(start, stop), ascend.");

static PyObject *add_powers(PyObject *Py_UNUSED(module), PyObject *arguments)
{
    unsigned long long left, right, first, second;
    PyObject *pairs;
    Py_ssize_t rows, height, width, last = 0;
    float weight;
    int threads;
    if (!PyArg_ParseTuple(arguments, "KKnO!nnKKfi", &left, &right, &rows, &PyTuple_Type, &pairs,
                          &height, &width, &first, &second, &weight, &threads))
        return NULL;
    const Py_ssize_t examples = PyTuple_GET_SIZE(pairs);
    Segment *segments = malloc((examples + 1) * sizeof(Segment));
    if (!segments)
        return PyErr_NoMemory();
    for (Py_ssize_t b = 0; b < examples; b++) {
        Segment *segment = segments + b;
        int read = PyArg_ParseTuple(PyTuple_GET_ITEM(pairs, b), "nn", &segment->start,
                                    &segment->stop);
        if (read && (segment->start < last || segment->stop < segment->start ||
                     segment->stop > rows)) {
            PyErr_SetString(PyExc_ValueError, "segments must ascend and lie within the rows");
            read = 0;
        }
        if (!read) {
            free(segments);
            return NULL;
        }
        last = segment->stop;
    }
    int failed;
    Py_BEGIN_ALLOW_THREADS
    failed = add_all((const float *)(uintptr_t)left, (const float *)(uintptr_t)right, segments,
                     examples, height, width, (float *)(uintptr_t)first,
                     (float *)(uintptr_t)second, weight, threads);
    Py_END_ALLOW_THREADS
    free(segments);
    if (failed)
        return PyErr_NoMemory();
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {{"add_powers", add_powers, METH_VARARGS, add_powers_doc},
                                {NULL, NULL, 0, NULL}};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_powers", NULL, 0, methods,
                                    NULL,                  NULL,      NULL, NULL};

PyMODINIT_FUNC PyInit__powers(void)
{
    if (!choose_block()) {
        PyErr_SetString(PyExc_ImportError, "perta._powers needs a processor with AVX2 and FMA");
        return NULL;
    }
    return PyModule_Create(&module);
}
