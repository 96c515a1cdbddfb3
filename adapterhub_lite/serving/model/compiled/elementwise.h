/* What a layer computes between its products, for one token: norms with residuals, heads turned and stored, the gate.
 *
 * All in float32, the states of the tokens too; keys and values are rounded once, to what the cache is in.
 */
#include <math.h>

#include "lanes.h"

/* 1 / sqrt(mean(x^2) + epsilon) */
static inline float inverse_rms(const float *x, int width, float epsilon)
{
    V sums[2] = {0};
    int d = 0;
    for (; d + 2 * LANES <= width; d += 2 * LANES)
        for (int j = 0; j < 2; j++) {
            V v = many_f32(x + d + j * LANES);
            sums[j] += v * v;
        }
    float sum = total(sums[0] + sums[1]);
    for (; d < width; d++) sum += x[d] * x[d];
    return 1 / sqrtf(sum / width + epsilon);
}

/* out = x / rms(x) * weight, or x itself where there is no weight. */
static inline void norm_row(const float *x, float *out, const float *weight, float epsilon, int width)
{
    if (!weight) {
        memcpy(out, x, width * sizeof(float));
        return;
    }
    float by = inverse_rms(x, width, epsilon);
    int d = 0;
    for (; d + LANES <= width; d += LANES) put_f32(out + d, many_f32(x + d) * by * many_f32(weight + d));
    for (; d < width; d++) out[d] = x[d] * by * weight[d];
}

/* x += factor * delta, which is normed with `after` where that is given. */
static inline void add_row(float *x, const float *delta, const float *after, float epsilon, float factor, int width)
{
    float by = after ? factor * inverse_rms(delta, width, epsilon) : factor;
    int d = 0;
    for (; d + LANES <= width; d += LANES) {
        V more = many_f32(delta + d) * by;
        if (after) more *= many_f32(after + d);
        put_f32(x + d, many_f32(x + d) + more);
    }
    for (; d < width; d++) x[d] += delta[d] * by * (after ? after[d] : 1);
}

/* Turns a head from `from` into `to`, multiplied by `by` and `weight` and then rotated by halves. */
ALWAYS void turn_head(const float *from, char *to, const float *weight, float by, const float *cos, const float *sin,
                      int rotary, int dim, int kind)
{
    float head[dim];
    int64_t size = size_of(kind);
    int d = 0;
    for (; d + LANES <= dim; d += LANES) {
        V v = many_f32(from + d);
        if (weight) v *= many_f32(weight + d) * by;
        put_f32(head + d, v);
    }
    for (; d < dim; d++) head[d] = from[d] * (weight ? weight[d] * by : 1);
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
ALWAYS void turn_heads(const float *from, char *to, const float *weight, int together, float epsilon, const float *cos,
                       const float *sin, int rotary, int count, int dim, int kind)
{
    float by = 1;
    for (int h = 0; h < count; h++) {
        int first = together ? h % together : 0;
        if (together && first == 0) by = inverse_rms(from + h * dim, together * dim, epsilon);
        turn_head(from + h * dim, to + (int64_t)h * dim * size_of(kind), together ? weight + first * dim : NULL, by, cos, sin,
                  rotary, dim, kind);
    }
}

/* x * sigmoid(factor * (x + cubic * x^3)) */
static inline V by_sigmoid(V x, float factor, float cubic)
{
    V z = (x + x * x * x * cubic) * factor;
    V below = pick((W)(z < 0.0f), z, -z); /* e to it is at most 1 */
    V e = exponential(below), sigmoid = 1.0f / (1.0f + e);
    return x * pick((W)(z < 0.0f), e * sigmoid, sigmoid);
}

/* out (width) = activation(gate) * up, from both side by side. */
static inline void gate_row(const float *gate_up, float *out, float factor, float cubic, int width)
{
    const float *up = gate_up + width;
    int d = 0;
    for (; d + LANES <= width; d += LANES) put_f32(out + d, by_sigmoid(many_f32(gate_up + d), factor, cubic) * many_f32(up + d));
    for (; d < width; d++) out[d] = by_sigmoid((V){0} + gate_up[d], factor, cubic)[0] * up[d];
}
