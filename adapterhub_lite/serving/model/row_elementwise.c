/* What a layer computes between its products, one pass each: norms with residuals, heads turned and stored, the gate.
 *
 * Numbers are widened to float32, computed, and rounded once. elementwise.py computes the same without.
 */
#include <math.h>

#include "lanes.h"

#define ALWAYS static inline __attribute__((always_inline))
#define EACH_PART(count, threads)                                                                                     \
    _Pragma("omp parallel for schedule(static) num_threads(threads) if (threads > 1)")                                \
    for (int part = 0; part < threads; part++)                                                                        \
        for (int i = (int)((int64_t)(count) * part / threads), stop = (int)((int64_t)(count) * (part + 1) / threads); \
             i < stop; i++)

/* `kind` is a constant wherever these are called. */
ALWAYS V some(const char *at, int kind) { return kind == FLOAT32 ? many_f32((const float *)at) : many_bf16((const uint16_t *)at); }

ALWAYS void put_some(char *at, V v, int kind)
{
    if (kind == FLOAT32) memcpy(at, &v, sizeof v);
    else put_bf16((uint16_t *)at, v);
}

ALWAYS float one(const char *at, int kind) { return kind == FLOAT32 ? *(const float *)at : wide(*(const uint16_t *)at); }

ALWAYS void put(char *at, float v, int kind)
{
    if (kind == FLOAT32) *(float *)at = v;
    else *(uint16_t *)at = narrow(v);
}

ALWAYS int64_t size_of(int kind) { return kind == FLOAT32 ? 4 : 2; }

/* 1 / sqrt(mean(x^2) + epsilon) */
ALWAYS float inverse_rms(const char *x, int width, float epsilon, int kind)
{
    V sums[2] = {0};
    int64_t size = size_of(kind);
    int d = 0;
    for (; d + 2 * LANES <= width; d += 2 * LANES)
        for (int j = 0; j < 2; j++) {
            V v = some(x + (d + j * LANES) * size, kind);
            sums[j] += v * v;
        }
    float sum = total(sums[0] + sums[1]);
    for (; d < width; d++) sum += one(x + d * size, kind) * one(x + d * size, kind);
    return 1 / sqrtf(sum / width + epsilon);
}

/* x += factor * (delta, normed with `after` where that is given); out = x, normed with `weight`. */
ALWAYS void add_and_norm_row(char *x, const char *delta, char *out, const float *after, const float *weight,
                             float after_epsilon, float epsilon, float factor, int width, int kind)
{
    int64_t size = size_of(kind);
    if (delta) {
        float by = after ? factor * inverse_rms(delta, width, after_epsilon, kind) : factor;
        int d = 0;
        for (; d + LANES <= width; d += LANES) {
            V more = some(delta + d * size, kind) * by;
            if (after) more *= many_f32(after + d);
            put_some(x + d * size, some(x + d * size, kind) + more, kind);
        }
        for (; d < width; d++)
            put(x + d * size, one(x + d * size, kind) + one(delta + d * size, kind) * by * (after ? after[d] : 1), kind);
    }
    if (!out) return;
    float by = inverse_rms(x, width, epsilon, kind);
    int d = 0;
    for (; d + LANES <= width; d += LANES) put_some(out + d * size, some(x + d * size, kind) * by * many_f32(weight + d), kind);
    for (; d < width; d++) put(out + d * size, one(x + d * size, kind) * by * weight[d], kind);
}

/* x, delta and out are (rows, width); delta or out may be NULL. */
void add_and_norm(char *x, const char *delta, char *out, const float *after, const float *weight, float after_epsilon,
                  float epsilon, float factor, int rows, int width, int kind, int threads)
{
    EACH_PART(rows, threads)
    {
        int64_t at = (int64_t)i * width * size_of(kind);
        const char *more = delta ? delta + at : NULL;
        char *to = out ? out + at : NULL;
        if (kind == FLOAT32) add_and_norm_row(x + at, more, to, after, weight, after_epsilon, epsilon, factor, width, FLOAT32);
        else add_and_norm_row(x + at, more, to, after, weight, after_epsilon, epsilon, factor, width, BFLOAT16);
    }
}

/* Turns a head from `from` into `to`, which may be the same: multiplied by `by` and `weight`, then rotated by halves. */
ALWAYS void turn_head(const char *from, char *to, const float *weight, float by, const float *cos, const float *sin,
                      int rotary, int dim, int kind)
{
    float head[dim];
    int64_t size = size_of(kind);
    int d = 0;
    for (; d + LANES <= dim; d += LANES) {
        V v = some(from + d * size, kind);
        if (weight) v *= many_f32(weight + d) * by;
        memcpy(head + d, &v, sizeof v);
    }
    for (; d < dim; d++) head[d] = one(from + d * size, kind) * (weight ? weight[d] * by : 1);
    int half = rotary / 2;
    for (d = 0; d + LANES <= half; d += LANES) {
        V low = many_f32(head + d), high = many_f32(head + half + d);
        put_some(to + d * size, low * many_f32(cos + d) - high * many_f32(sin + d), kind);
        put_some(to + (half + d) * size, high * many_f32(cos + half + d) + low * many_f32(sin + half + d), kind);
    }
    for (; d < half; d++) {
        put(to + d * size, head[d] * cos[d] - head[half + d] * sin[d], kind);
        put(to + (half + d) * size, head[half + d] * cos[half + d] + head[d] * sin[half + d], kind);
    }
    for (d = rotary; d < dim; d++) put(to + d * size, head[d], kind);
}

/* `count` heads from `from` on; a norm is over `together` heads at a time, 0 for none. */
ALWAYS void turn_heads(const char *from, char *to, const float *weight, int together, float epsilon, const float *cos,
                       const float *sin, int rotary, int count, int dim, int kind)
{
    int64_t step = dim * size_of(kind);
    float by = 1;
    for (int h = 0; h < count; h++) {
        int first = together ? h % together : 0;
        if (together && first == 0) by = inverse_rms(from + h * step, together * dim, epsilon, kind);
        turn_head(from + h * step, to + h * step, together ? weight + first * dim : NULL, by, cos, sin, rotary, dim, kind);
    }
}

/* qkv is (tokens, heads + 2 kv_heads, dim). Queries stay in place; keys and values go to their places in a layer's
 * cache, counted in tokens. cos and sin are (tokens, rotary). */
void turn_and_store(char *qkv, char *keys, char *values, const int64_t *key_places, const int64_t *value_places,
                    const float *cos, const float *sin, const float *query_weight, const float *key_weight, float epsilon, int query_together,
                    int key_together, int heads, int kv_heads, int dim, int rotary, int tokens, int kind, int threads)
{
    EACH_PART(tokens, threads)
    {
        int64_t size = dim * size_of(kind), width = kv_heads * size;
        char *q = qkv + i * (heads + 2 * kv_heads) * size, *k = q + heads * size, *key = keys + key_places[i] * width;
        const float *c = cos + (int64_t)i * rotary, *s = sin + (int64_t)i * rotary;
        if (kind == FLOAT32) {
            turn_heads(q, q, query_weight, query_together, epsilon, c, s, rotary, heads, dim, FLOAT32);
            turn_heads(k, key, key_weight, key_together, epsilon, c, s, rotary, kv_heads, dim, FLOAT32);
        } else {
            turn_heads(q, q, query_weight, query_together, epsilon, c, s, rotary, heads, dim, BFLOAT16);
            turn_heads(k, key, key_weight, key_together, epsilon, c, s, rotary, kv_heads, dim, BFLOAT16);
        }
        memcpy(values + value_places[i] * width, k + width, width);
    }
}

/* x * sigmoid(factor * (x + cubic * x^3)) */
static inline V by_sigmoid(V x, float factor, float cubic)
{
    V z = (x + x * x * x * cubic) * factor;
    V below = select((W)(z < 0.0f), z, -z); /* e to it is at most 1 */
    V e = exponential(below), sigmoid = 1.0f / (1.0f + e);
    return x * select((W)(z < 0.0f), e * sigmoid, sigmoid);
}

ALWAYS void gate_row(const char *gate_up, char *out, float factor, float cubic, int width, int kind)
{
    int64_t size = size_of(kind);
    const char *up = gate_up + width * size;
    int d = 0;
    for (; d + LANES <= width; d += LANES)
        put_some(out + d * size, by_sigmoid(some(gate_up + d * size, kind), factor, cubic) * some(up + d * size, kind), kind);
    for (; d < width; d++) {
        V x = (V){0} + one(gate_up + d * size, kind);
        put(out + d * size, by_sigmoid(x, factor, cubic)[0] * one(up + d * size, kind), kind);
    }
}

/* gate_up is (rows, 2 width), out (rows, width). */
void gate(const char *gate_up, char *out, float factor, float cubic, int rows, int width, int kind, int threads)
{
    EACH_PART(rows, threads)
    {
        int64_t size = width * size_of(kind);
        if (kind == FLOAT32) gate_row(gate_up + 2 * i * size, out + i * size, factor, cubic, width, FLOAT32);
        else gate_row(gate_up + 2 * i * size, out + i * size, factor, cubic, width, BFLOAT16);
    }
}
