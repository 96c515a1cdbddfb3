/* The three products of a low-rank adapter with what a layer is given, each in one pass over it.
 *
 * x (tokens, n) is bfloat16; m (rank, n) and t (tokens, rank) are float32, and so is every sum.
 *
 *     reduce:    t  = scale * x m^T
 *     update:    x += scale * t m      rounded once
 *     gradient:  m  = scale * t^T x
 */
#include <stdint.h>
#include <string.h>

#define LANES 16
#define RANKS 8
typedef float Floats __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));
#define INLINE static inline __attribute__((always_inline))

INLINE float wide(uint16_t bits)
{
    uint32_t word = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &word, 4);
    return value;
}

INLINE uint16_t narrow(float value)
{
    uint32_t word;
    memcpy(&word, &value, 4);
    return value != value ? 0x7fc0 : (uint16_t)((word + 0x7fff + ((word >> 16) & 1)) >> 16);
}

INLINE Floats wide_lanes(const uint16_t *from)
{
    Halves halves;
    memcpy(&halves, from, sizeof halves);
    return (Floats)(__builtin_convertvector(halves, Words) << 16);
}

INLINE void narrow_lanes(uint16_t *to, Floats values)
{
    Words words = (Words)values, wrong = (Words)(values != values);
    words = (words + 0x7fff + ((words >> 16) & 1)) >> 16;
    Halves halves = __builtin_convertvector((words & ~wrong) | (0x7fc0 & wrong), Halves);
    memcpy(to, &halves, sizeof halves);
}

INLINE Floats lanes(const float *from)
{
    Floats values;
    memcpy(&values, from, sizeof values);
    return values;
}

/* `count` rows at a time share what is read of m, for `ranks` of its rows: constants where this is called, so that sums stay
 * in registers. */
INLINE void reduce_part(const uint16_t *x, const float *m, float *t, long n, long rank, float scale, const int count,
                        const int ranks)
{
    Floats sums[2][RANKS] = {{{0}}};
    long i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int k = 0; k < ranks; k++)
            for (int r = 0; r < count; r++) sums[r][k] += wide_lanes(x + r * n + i) * lanes(m + k * n + i);
    for (int r = 0; r < count; r++)
        for (int k = 0; k < ranks; k++) {
            float sum = 0;
            for (int lane = 0; lane < LANES; lane++) sum += sums[r][k][lane];
            for (long j = i; j < n; j++) sum += wide(x[r * n + j]) * m[k * n + j];
            t[r * rank + k] = scale * sum;
        }
}

INLINE void reduce_rows(const uint16_t *x, const float *m, float *t, long n, long rank, float scale, const int count)
{
    long k = 0;
    for (; k + RANKS <= rank; k += RANKS) reduce_part(x, m + k * n, t + k, n, rank, scale, count, RANKS);
    for (; k < rank; k++) reduce_part(x, m + k * n, t + k, n, rank, scale, count, 1);
}

void reduce(const uint16_t *x, const float *m, float *t, long tokens, long n, long rank, float scale, int threads)
{
#pragma omp parallel for num_threads(threads)
    for (long pair = 0; pair < (tokens + 1) / 2; pair++) {
        const uint16_t *row = x + 2 * pair * n;
        float *made = t + 2 * pair * rank;
        if (2 * pair + 1 < tokens) reduce_rows(row, m, made, n, rank, scale, 2);
        else reduce_rows(row, m, made, n, rank, scale, 1);
    }
}

INLINE void update_rows(uint16_t *x, const float *m, const float *t, long n, long rank, float scale, const int count)
{
    long i = 0;
    for (; i + LANES <= n; i += LANES) {
        Floats sums[4] = {{0}};
        for (long k = 0; k < rank; k++)
            for (int r = 0; r < count; r++) sums[r] += t[r * rank + k] * lanes(m + k * n + i);
        for (int r = 0; r < count; r++) narrow_lanes(x + r * n + i, wide_lanes(x + r * n + i) + scale * sums[r]);
    }
    for (; i < n; i++)
        for (int r = 0; r < count; r++) {
            float sum = 0;
            for (long k = 0; k < rank; k++) sum += t[r * rank + k] * m[k * n + i];
            x[r * n + i] = narrow(wide(x[r * n + i]) + scale * sum);
        }
}

void update(uint16_t *x, const float *m, const float *t, long tokens, long n, long rank, float scale, int threads)
{
#pragma omp parallel for num_threads(threads)
    for (long four = 0; four < (tokens + 3) / 4; four++) {
        uint16_t *row = x + 4 * four * n;
        const float *given = t + 4 * four * rank;
        if (4 * four + 3 < tokens) update_rows(row, m, given, n, rank, scale, 4);
        else
            for (long r = 0; r < tokens - 4 * four; r++)
                update_rows(row + r * n, m, given + r * rank, n, rank, scale, 1);
    }
}

/* Two vectors of columns, for `ranks` rows of m. */
INLINE void gradient_part(const uint16_t *x, const float *t, float *m, long tokens, long n, long rank, float scale,
                          const int ranks)
{
    Floats sums[RANKS][2] = {{{0}}};
    for (long row = 0; row < tokens; row++) {
        Floats left = wide_lanes(x + row * n), right = wide_lanes(x + row * n + LANES);
        for (int k = 0; k < ranks; k++) {
            sums[k][0] += t[row * rank + k] * left;
            sums[k][1] += t[row * rank + k] * right;
        }
    }
    for (int k = 0; k < ranks; k++)
        for (int part = 0; part < 2; part++) {
            Floats scaled = scale * sums[k][part];
            memcpy(m + k * n + part * LANES, &scaled, sizeof scaled);
        }
}

void gradient(const uint16_t *x, const float *t, float *m, long tokens, long n, long rank, float scale, int threads)
{
    long width = 2 * LANES, whole = n / width, left = n % width;
#pragma omp parallel for num_threads(threads)
    for (long block = 0; block < whole + left; block++) {
        if (block < whole) {
            long i = block * width, k = 0;
            for (; k + RANKS <= rank; k += RANKS)
                gradient_part(x + i, t + k, m + k * n + i, tokens, n, rank, scale, RANKS);
            for (; k < rank; k++) gradient_part(x + i, t + k, m + k * n + i, tokens, n, rank, scale, 1);
            continue;
        }
        long column = n - left + (block - whole);
        for (long k = 0; k < rank; k++) {
            float sum = 0;
            for (long row = 0; row < tokens; row++) sum += t[row * rank + k] * wide(x[row * n + column]);
            m[k * n + column] = scale * sum;
        }
    }
}
