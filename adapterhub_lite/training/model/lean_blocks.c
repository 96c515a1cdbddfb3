/* The elementwise parts of a layer's step, each in one pass: RMSNorm, gate, and what attention needs around its products.
 *
 * Numbers are read as bfloat16 or float32, computed in float32 and rounded once; the formulas are those of lean_modules.py
 * and segments.py, which the tests compare with. Rows are shared out among threads.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

static inline float wide(uint16_t bits)
{
    uint32_t word = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &word, 4);
    return value;
}

/* Rounded to bfloat16, still as 32 bits; not a number stays one. */
static inline uint32_t rounded(float value)
{
    uint32_t word;
    memcpy(&word, &value, 4);
    uint32_t near = word + 0x7fff + ((word >> 16) & 1);
    return (word & 0x7fffffff) > 0x7f800000 ? 0x7fc00000 : near & 0xffff0000;
}

static inline float as_bfloat16(float value)
{
    uint32_t word = rounded(value);
    memcpy(&value, &word, 4);
    return value;
}

static inline uint16_t narrow(float value)
{
    return (uint16_t)(rounded(value) >> 16);
}

/* e^x to 1e-7 of itself: 2^n times a polynomial of what is left, without branches, so that it runs in vectors. */
static inline float exponential(float x)
{
    /* Beyond these the result is 0 or infinite anyway, and n would leave the exponent's bits. */
    float t = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    /* Adding 1.5 * 2^23 rounds to a whole number. */
    float whole = (t * 1.44269504f + 12582912.0f) - 12582912.0f;
    /* ln 2 in two parts, so that nothing of the difference is lost. */
    float rest = (t - whole * 0.693359375f) + whole * 2.12194440e-4f;
    float p = 1.0f + rest * (1.0f + rest * (0.5f + rest * (0.16666667f + rest * (0.041666667f + rest * (0.0083333333f + rest * 0.0013888889f)))));
    uint32_t bits = ((uint32_t)(int32_t)whole + 127u) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return p * power;
}

#define READ(p, i, half) ((half) ? wide(((const uint16_t *)(p))[i]) : ((const float *)(p))[i])
#define WRITE(p, i, half, value)                                                                   \
    do {                                                                                           \
        if (half) ((uint16_t *)(p))[i] = narrow(value);                                            \
        else ((float *)(p))[i] = (value);                                                          \
    } while (0)
#define ROW(p, row, stride, half) ((const char *)(p) + (size_t)(row) * (size_t)(stride) * ((half) ? 2 : 4))
/* `half` and `gelu` are constants where a row's loop is: OpenMP takes a parallel region out of its function before anything
 * is inlined into it, so the loops over rows below choose, and those over numbers have no branch. */
#define INLINE static inline __attribute__((always_inline)) void

/* factor * (x / rms(x)): rounded before the factor too, unless `once`. */
INLINE norm_row(const void *in, const float *factor, void *out, float *scale, long width, float epsilon, int once,
                const int half)
{
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (long i = 0; i < width; i++) sum += READ(in, i, half) * READ(in, i, half);
    float s = *scale = 1.0f / sqrtf(sum / (float)width + epsilon);
#pragma omp simd
    for (long i = 0; i < width; i++) {
        float normed = READ(in, i, half) * s;
        if (half && !once) normed = as_bfloat16(normed);
        WRITE(out, i, half, normed * factor[i]);
    }
}

void norm_forward(const void *x, const float *factor, void *out, float *scale, long rows, long width, float epsilon,
                  int once, int half, int threads)
{
#pragma omp parallel for num_threads(threads)
    for (long r = 0; r < rows; r++) {
        const void *in = ROW(x, r, width, half);
        void *made = (void *)ROW(out, r, width, half);
        if (half) norm_row(in, factor, made, scale + r, width, epsilon, once, 1);
        else norm_row(in, factor, made, scale + r, width, epsilon, once, 0);
    }
}

/* With n = x * scale and h = grad * factor: scale * (h - n * mean(h * n)). */
INLINE norm_row_back(const void *g, const void *in, const float *factor, float s, void *out, long width, const int half)
{
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (long i = 0; i < width; i++) sum += READ(g, i, half) * factor[i] * READ(in, i, half);
    float mean = sum * s * s / (float)width;
#pragma omp simd
    for (long i = 0; i < width; i++)
        WRITE(out, i, half, s * (READ(g, i, half) * factor[i]) - s * mean * READ(in, i, half));
}

void norm_backward(const void *grad, const void *x, const float *factor, const float *scale, void *out, long rows,
                   long width, int half, int threads)
{
#pragma omp parallel for num_threads(threads)
    for (long r = 0; r < rows; r++) {
        const void *in = ROW(x, r, width, half), *g = ROW(grad, r, width, half);
        void *made = (void *)ROW(out, r, width, half);
        if (half) norm_row_back(g, in, factor, scale[r], made, width, 1);
        else norm_row_back(g, in, factor, scale[r], made, width, 0);
    }
}

/* Both activations are x * sigmoid(z): z = x for SiLU, z = 2 sqrt(2/pi) (x + 0.044715 x^3) for GELU by tanh. */
#define GELU_SCALE 1.5957691216f
#define GELU_CUBE 0.044715f

static inline __attribute__((always_inline)) float inner(float x, const int gelu)
{
    return gelu ? GELU_SCALE * x * (1.0f + GELU_CUBE * x * x) : x;
}

INLINE gate_row(const void *gate, const void *up, void *out, long width, const int gelu, const int half)
{
#pragma omp simd
    for (long i = 0; i < width; i++) {
        float x = READ(gate, i, half);
        WRITE(out, i, half, x / (1.0f + exponential(-inner(x, gelu))) * READ(up, i, half));
    }
}

void gate_forward(const void *gate, const void *up, void *out, long rows, long width, long stride, int gelu, int half,
                  int threads)
{
#pragma omp parallel for num_threads(threads)
    for (long r = 0; r < rows; r++) {
        const void *a = ROW(gate, r, stride, half), *b = ROW(up, r, stride, half);
        void *made = (void *)ROW(out, r, width, half);
        if (half && gelu) gate_row(a, b, made, width, 1, 1);
        else if (half) gate_row(a, b, made, width, 0, 1);
        else if (gelu) gate_row(a, b, made, width, 1, 0);
        else gate_row(a, b, made, width, 0, 0);
    }
}

INLINE gate_row_back(const void *grad, const void *gate, const void *up, void *to_gate, void *to_up, long width,
                     const int gelu, const int half)
{
#pragma omp simd
    for (long i = 0; i < width; i++) {
        float x = READ(gate, i, half), y = READ(grad, i, half);
        float s = 1.0f / (1.0f + exponential(-inner(x, gelu)));
        float slope = gelu ? GELU_SCALE * (1.0f + 3.0f * GELU_CUBE * x * x) : 1.0f;
        float to_a = y * READ(up, i, half) * s * (1.0f + x * (1.0f - s) * slope);
        WRITE(to_up, i, half, y * x * s);
        WRITE(to_gate, i, half, to_a);
    }
}

void gate_backward(const void *grad, const void *gate, const void *up, void *to_gate, void *to_up, long rows, long width,
                   long stride, int gelu, int half, int threads)
{
#pragma omp parallel for num_threads(threads)
    for (long r = 0; r < rows; r++) {
        const void *g = ROW(grad, r, width, half), *a = ROW(gate, r, stride, half), *b = ROW(up, r, stride, half);
        void *da = (void *)ROW(to_gate, r, stride, half), *db = (void *)ROW(to_up, r, stride, half);
        if (half && gelu) gate_row_back(g, a, b, da, db, width, 1, 1);
        else if (half) gate_row_back(g, a, b, da, db, width, 0, 1);
        else if (gelu) gate_row_back(g, a, b, da, db, width, 1, 0);
        else gate_row_back(g, a, b, da, db, width, 0, 0);
    }
}

/* How heads lie in a row of tokens, and how they are laid out for products: (segments, kv heads, heads of each, length, d).
 * `places` (segments * length) names the token at each place, -1 where a segment is shorter. */
typedef struct {
    long segments, length, heads, kv_heads, head_width, rotated, stride;
} Layout;

static inline long place_of(const Layout *is, long segment, long head, long at)
{
    long group = is->heads / is->kv_heads;
    return (((segment * is->kv_heads + head / group) * group + head % group) * is->length + at) * is->head_width;
}

/* Turned by its position: y1 = x1 cos1 - x2 sin1, y2 = x2 cos2 + x1 sin2 over the halves of the first `2 h` numbers. */
INLINE turn(const void *row, long first, const float *c, const float *n, float *y, long h, long d, const int half)
{
#pragma omp simd
    for (long i = 0; i < h; i++) {
        float a = READ(row, first + i, half), b = READ(row, first + h + i, half);
        y[i] = a * c[i] - b * n[i];
        y[h + i] = b * c[h + i] + a * n[h + i];
    }
    for (long i = 2 * h; i < d; i++) y[i] = READ(row, first + i, half);
}

void fold(const void *from, const float *cosine, const float *sine, const long *places, float *to, const Layout *is,
          int half, int threads)
{
    long d = is->head_width, h = is->rotated / 2;
#pragma omp parallel for num_threads(threads) collapse(2)
    for (long s = 0; s < is->segments; s++)
        for (long head = 0; head < is->heads; head++)
            for (long at = 0; at < is->length; at++) {
                long token = places[s * is->length + at];
                float *y = to + place_of(is, s, head, at);
                if (token < 0) {
                    memset(y, 0, (size_t)d * 4);
                    continue;
                }
                const void *row = ROW(from, token, is->stride, half);
                const float *c = cosine + token * is->rotated, *n = sine + token * is->rotated;
                if (half) turn(row, head * d, c, n, y, h, d, 1);
                else turn(row, head * d, c, n, y, h, d, 0);
            }
}

/* The transpose of `turn`. */
INLINE turn_back(const float *y, const float *c, const float *n, void *row, long first, long h, long d, const int half)
{
#pragma omp simd
    for (long i = 0; i < h; i++) {
        float a = y[i], b = y[h + i];
        WRITE(row, first + i, half, a * c[i] + b * n[h + i]);
        WRITE(row, first + h + i, half, b * c[h + i] - a * n[i]);
    }
    for (long i = 2 * h; i < d; i++) WRITE(row, first + i, half, y[i]);
}

void unfold(const float *from, const float *cosine, const float *sine, const long *places, void *to, const Layout *is,
            int half, int threads)
{
    long d = is->head_width, h = is->rotated / 2;
#pragma omp parallel for num_threads(threads) collapse(2)
    for (long s = 0; s < is->segments; s++)
        for (long head = 0; head < is->heads; head++)
            for (long at = 0; at < is->length; at++) {
                long token = places[s * is->length + at];
                if (token < 0) continue;
                const float *y = from + place_of(is, s, head, at);
                void *row = (void *)ROW(to, token, is->stride, half);
                const float *c = cosine + token * is->rotated, *n = sine + token * is->rotated;
                if (half) turn_back(y, c, n, row, head * d, h, d, 1);
                else turn_back(y, c, n, row, head * d, h, d, 0);
            }
}

/* Softmax of scaled scores (rows, length) in place; row r stands at r % length and sees the last `window` up to itself. */
void causal_softmax(float *scores, long rows, long length, long window, float scaling, int threads)
{
#pragma omp parallel for num_threads(threads)
    for (long r = 0; r < rows; r++) {
        float *s = scores + r * length, most = -INFINITY, sum = 0;
        long last = r % length, first = last - window + 1 > 0 ? last - window + 1 : 0;
#pragma omp simd reduction(max : most)
        for (long i = first; i <= last; i++) most = s[i] > most ? s[i] : most;
#pragma omp simd reduction(+ : sum)
        for (long i = first; i <= last; i++) sum += s[i] = exponential((s[i] - most) * scaling);
        float share = 1.0f / sum;
        for (long i = 0; i < first; i++) s[i] = 0;
#pragma omp simd
        for (long i = first; i <= last; i++) s[i] *= share;
        for (long i = last + 1; i < length; i++) s[i] = 0;
    }
}

/* The gradient of the scores in the place of that of the weights: p * (g - sum(p * g)) * scaling. */
void softmax_backward(const float *weights, float *grad, long rows, long length, float scaling, int threads)
{
#pragma omp parallel for num_threads(threads)
    for (long r = 0; r < rows; r++) {
        const float *p = weights + r * length;
        float *g = grad + r * length, sum = 0;
#pragma omp simd reduction(+ : sum)
        for (long i = 0; i < length; i++) sum += p[i] * g[i];
#pragma omp simd
        for (long i = 0; i < length; i++) g[i] = p[i] * (g[i] - sum) * scaling;
    }
}
