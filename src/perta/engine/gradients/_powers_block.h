/* One block of means, for one set of registers. Included with

     NAME      of the function
     TARGET    attribute that lets the compiler use the registers
     LANES     floats in a register
     ROWS      rows of the tile,
     VECTORS   registers of each: ROWS * VECTORS + VECTORS + 1 registers are in use */

#define JOIN_(one, other) one##_##other
#define JOIN(one, other) JOIN_(one, other)
#define OWN(name) JOIN(NAME, name)
#define ACROSS (VECTORS * LANES)

typedef float OWN(Vector) __attribute__((vector_size(4 * LANES)));
typedef int OWN(Bits) __attribute__((vector_size(4 * LANES)));

TARGET static inline void OWN(add_tile)(const float *left, const float *right, Py_ssize_t count,
                                        OWN(Vector) * firsts, OWN(Vector) * seconds)
{
    OWN(Vector) products[ROWS][VECTORS];
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 2
        for (int j = 0; j < VECTORS; j++)
            products[i][j] = (OWN(Vector)){0};
    for (Py_ssize_t t = 0; t < count; t++) {
        const OWN(Vector) *row = (const OWN(Vector) *)(right + t * ACROSS);
#pragma GCC unroll 12
        for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 2
            for (int j = 0; j < VECTORS; j++)
                products[i][j] += left[t * ROWS + i] * row[j];
    }
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 2
        for (int j = 0; j < VECTORS; j++) {
            const OWN(Vector) product = products[i][j];
            if (firsts)
                firsts[i * VECTORS + j] += (OWN(Vector))((OWN(Bits))product & 0x7fffffff);
            if (seconds)
                seconds[i * VECTORS + j] += product * product;
        }
}

TARGET static inline void OWN(flush)(float *mean, const Group *group, const OWN(Vector) * sums,
                                     Py_ssize_t tall, Py_ssize_t wide)
{
    for (Py_ssize_t i = 0; i < tall; i++) {
        float *restrict to = mean + i * group->stride;
        const float *restrict from = (const float *)(sums + i * VECTORS);
        for (Py_ssize_t j = 0; j < wide; j++)
            to[j] += group->weight * from[j];
    }
}

TARGET static void NAME(const Group *group, const float *left, const float *right, float *first,
                        float *second, Py_ssize_t tall, Py_ssize_t wide)
{
    OWN(Vector) firsts[ROWS * VECTORS] = {0}, seconds[ROWS * VECTORS] = {0};
    if (first)
        fetch(first, group->stride, tall, ACROSS);
    if (second)
        fetch(second, group->stride, tall, ACROSS);
    for (Py_ssize_t b = 0; b < group->examples; b++) {
        const Py_ssize_t start = group->segments[b].start;
        OWN(add_tile)(left + start * ROWS, right + start * ACROSS, group->segments[b].stop - start,
                      first ? firsts : NULL, second ? seconds : NULL);
    }
    if (first)
        OWN(flush)(first, group, firsts, tall, wide);
    if (second)
        OWN(flush)(second, group, seconds, tall, wide);
}

#undef NAME
#undef TARGET
#undef LANES
#undef ROWS
#undef VECTORS
#undef ACROSS
#undef OWN
#undef JOIN
#undef JOIN_
