/* Attention of a few new tokens over the keys and values of their own rows, where they lie in the cache.
 *
 * For steps that write, where each row has one query or so: PyTorch's kernel for a CPU is made for many queries, and
 * waits for every key. Scores, softmax and sums are in float32; the result is rounded once. cache.py computes the same
 * without.
 */
#include "attention.h"

#include <math.h>

#include "lanes.h"

#define AHEAD 16 /* places that are asked for before they are used: the processor does not foresee such strides */
#define LINE 64

/* The last scores where they fill no vector, and then the least there is. */
static inline V last_scores(const float *scores, int left)
{
    V v = (V){0} - INFINITY;
    memcpy(&v, scores, left * sizeof(float));
    return v;
}

/* In place of the scores their exponentials, the largest being 1; returns their sum. */
float exponentials(float *scores, int count)
{
    V largest = (V){0} - INFINITY, sum = {0};
    int whole = count / LANES * LANES;
    for (int i = 0; i < whole; i += LANES) {
        V s = many_f32(scores + i);
        largest = pick((W)(s > largest), s, largest);
    }
    V last = last_scores(scores + whole, count - whole);
    largest = pick((W)(last > largest), last, largest);
    float top = largest[0];
    for (int j = 1; j < LANES; j++) top = largest[j] > top ? largest[j] : top;
    for (int i = 0; i < whole; i += LANES) {
        V e = exponential(many_f32(scores + i) - top);
        put_f32(scores + i, e);
        sum += e;
    }
    if (count > whole) { /* what stands for no score adds nothing */
        V e = exponential(last - top);
        memcpy(scores + whole, &e, (count - whole) * sizeof(float));
        sum += e;
    }
    return total(sum);
}

/* `kind`, and below `count` and `blocks`, are constants wherever these are called: sums stay in registers. */
static void fetch(const char *place, int64_t bytes)
{
    for (int64_t at = 0; at < bytes; at += LINE) __builtin_prefetch(place + at);
}

/* scores[g][p] = q[g] . key[p]; where `value` is given, all heads' keys and values are asked for on the way. */
ALWAYS void dots(const float *q, const char *key, const char *value, int64_t place, int places, int dim, int kind,
                 int count, float *scores, int room)
{
    for (int p = 0; p < places; p++, key += place, value += place) {
        if (value) fetch(key + AHEAD * place, place), fetch(value, place);
        V sums[GROUP] = {0};
        int d = 0;
        for (; d + LANES <= dim; d += LANES) {
            V k = some(key + d * size_of(kind), kind);
            for (int g = 0; g < count; g++) sums[g] += k * many_f32(q + g * dim + d);
        }
        for (int g = 0; g < count; g++) {
            float sum = total(sums[g]);
            for (int r = d; r < dim; r++) sum += q[g * dim + r] * one(key + r * size_of(kind), kind);
            scores[(size_t)g * room + p] = sum;
        }
    }
}

/* sums[g][d] = sum over p of weights[g][p] * value[p][d], from d = `at` on in whole blocks; returns the first d left. */
ALWAYS int weigh(const float *weights, int room, const char *value, int64_t place, int places, int at, int dim,
                 int kind, int count, int blocks, float *sums)
{
    for (; at + blocks * LANES <= dim; at += blocks * LANES) {
        V s[GROUP][2] = {0};
        const char *v = value + at * size_of(kind);
        for (int p = 0; p < places; p++, v += place)
            for (int j = 0; j < blocks; j++) {
                V v16 = some(v + j * LANES * size_of(kind), kind);
                for (int g = 0; g < count; g++) s[g][j] += v16 * weights[(size_t)g * room + p];
            }
        for (int g = 0; g < count; g++) memcpy(sums + g * dim + at, s[g], blocks * sizeof(V));
    }
    return at;
}

/* Heads first .. first + count of one token, which share the keys and values of `kv_head`. */
ALWAYS void attend(const Tensors *t, const Look *look, int kv_head, int first, int kind, int count, float *scores,
                   int room)
{
    int places = look->to - look->from, key_dim = t->key_dim, value_dim = t->value_dim;
    int64_t size = size_of(kind), io = size_of(t->io_kind);
    float q[count * key_dim], sums[count * value_dim];
    const char *from = t->q + look->token * t->q_token + first * t->q_head;
    for (int g = 0; g < count; g++)
        for (int d = 0; d < key_dim; d++) q[g * key_dim + d] = one(from + g * t->q_head + d * io, t->io_kind) * t->scaling;
    const char *key = t->keys + ((int64_t)look->begin + look->from) * t->key_place + kv_head * key_dim * size;
    const char *value = t->values + ((int64_t)look->begin + look->from) * t->value_place + kv_head * value_dim * size;
    int fresh = kv_head == 0 && first == 0 && t->key_place == t->value_place;
    dots(q, key, fresh ? value : NULL, t->key_place, places, key_dim, kind, count, scores, room);
    for (int g = 0; g < count; g++) {
        float *own = scores + (size_t)g * room;
        if (t->softcap > 0)
            for (int p = 0; p < places; p++) own[p] = t->softcap * tanhf(own[p] / t->softcap);
        float share = 1 / exponentials(own, places);
        for (int p = 0; p < places; p++) own[p] *= share;
    }
    int d = weigh(scores, room, value, t->value_place, places, 0, value_dim, kind, count, 2, sums);
    d = weigh(scores, room, value, t->value_place, places, d, value_dim, kind, count, 1, sums);
    for (; d < value_dim; d++)
        for (int g = 0; g < count; g++) {
            float sum = 0;
            for (int p = 0; p < places; p++)
                sum += scores[(size_t)g * room + p] * one(value + p * t->value_place + d * size, kind);
            sums[g * value_dim + d] = sum;
        }
    char *to = t->out + look->token * t->out_token + first * value_dim * io;
    for (int i = 0; i < count * value_dim; i++) put(to + i * io, sums[i], t->io_kind);
}

ALWAYS void some_heads(const Tensors *t, const Look *look, int kv_head, int first, int count, int kind, float *scores,
                       int room)
{
    if (count == 4) attend(t, look, kv_head, first, kind, 4, scores, room);
    else if (count == 3) attend(t, look, kv_head, first, kind, 3, scores, room);
    else if (count == 2) attend(t, look, kv_head, first, kind, 2, scores, room);
    else attend(t, look, kv_head, first, kind, 1, scores, room);
}

/* All heads of a token that share the keys of `kv_head`; `scores` has room for GROUP * room numbers. */
void attend_for(const Tensors *t, const Look *look, int kv_head, float *scores, int room)
{
    int group = t->heads / t->kv_heads, end = (kv_head + 1) * group;
    for (int first = kv_head * group; first < end; first += GROUP) {
        int count = end - first < GROUP ? end - first : GROUP;
        if (t->kind == FLOAT32) some_heads(t, look, kv_head, first, count, FLOAT32, scores, room);
        else some_heads(t, look, kv_head, first, count, BFLOAT16, scores, room);
    }
}

/* No look sees more places than `room`; `scores` has room for GROUP * room numbers for each thread. */
void attend_rows(const Tensors *t, const Look *looks, int count, float *scores, int room, int threads)
{
    int tasks = count * t->kv_heads;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int part = 0; part < threads; part++)
        for (int task = (int)((int64_t)tasks * part / threads); task < (int64_t)tasks * (part + 1) / threads; task++)
            attend_for(t, looks + task / t->kv_heads, task % t->kv_heads, scores + (size_t)part * GROUP * room, room);
}
