/* Attention of the many tokens of a prompt: two products, with the row's keys and then its values as their weights.
 *
 * A block of queries of one head computes the scores of all places that it sees, their softmax, and the sum of values.
 * There is no mask: a query's weights beyond its own place, or before its window, are zero. Scores, softmax and sums are
 * in float32, the weights of the values in what the cache is in. kv_cache.py computes the same without.
 */
#include <math.h>

#include "attention.h"
#include "lanes.h"
#include "products.h"

static size_t panels_of(int outputs) { return (outputs + PANEL - 1) / PANEL; }

static size_t key_bytes(int places, int dim, int kind) { return panels_of(places) * panel_bytes(dim, kind); }

size_t packed_head_bytes(int places, int dim, int kind)
{
    return key_bytes(places, dim, kind) + panels_of(dim) * panel_bytes(places, kind);
}

static size_t stride_of(int places) { return panels_of(places) * PANEL; }

size_t query_scratch_bytes(int places, int dim, int kind)
{
    size_t rows = QUERIES + 3, size = size_of(kind); /* a product reads up to three rows beyond */
    return rows * (padded_inputs(dim, kind) * size + stride_of(places) * (size + sizeof(float)) + (dim + PANEL) * sizeof(float)) + 256;
}

/* The first place that any query of a span sees. */
int first_place(const Span *s, int window)
{
    int first = s->start + 1 - window;
    return window && first > 0 ? first : 0;
}

/* Panels of bfloat16 hold pairs of inputs, those of float32 single ones. */
ALWAYS void pack_rows(const char *rows, int64_t place, int places, int dim, char *keys, char *values, int kind, int together)
{
    int64_t size = size_of(kind), unit = size * together;
    size_t inputs = padded_inputs(dim, kind), value_panel = panel_bytes(places, kind);
    if (keys)
        for (size_t p = 0; p < panels_of(places) * PANEL; p++) {
            char *to = keys + p / PANEL * panel_bytes(dim, kind) + p % PANEL * unit;
            const char *from = rows + p * place;
            if (p >= (size_t)places || dim % together) /* what is beyond counts for nothing */
                for (size_t d = 0; d < inputs / together; d++) memset(to + d * PANEL * unit, 0, unit);
            if (p < (size_t)places) {
                int d = 0;
                for (; d + together <= dim; d += together) memcpy(to + (int64_t)(d / together) * PANEL * unit, from + d * size, unit);
                if (d < dim) memcpy(to + (int64_t)(d / together) * PANEL * unit, from + d * size, size);
            }
        }
    if (values) {
        memset(values, 0, panels_of(dim) * value_panel);
        for (int p = 0; p < places; p++) {
            const char *from = rows + (int64_t)p * place;
            char *to = values + (int64_t)(p / together) * PANEL * unit + p % together * size;
            int d = 0;
            if (together == 2 && p + 1 < places && p % 2 == 0) { /* two places at once */
                for (; d + LANES <= dim; d += LANES) {
                    H one, other;
                    memcpy(&one, from + d * size, sizeof one);
                    memcpy(&other, from + place + d * size, sizeof other);
                    W both = __builtin_convertvector(one, W) | __builtin_convertvector(other, W) << 16;
                    memcpy(to + d / PANEL * value_panel + d % PANEL * unit, &both, sizeof both);
                }
            } else if (together == 2 && p % 2)
                d = dim / LANES * LANES; /* these came with the place before */
            for (; d < dim; d++) memcpy(to + d / PANEL * value_panel + d % PANEL * unit, from + d * size, size);
        }
    }
}

/* Lays out what the queries of a span see of the keys and values of a head. */
void pack_head(const Tensors *t, const Span *s, int window, int kv_head, char *packed)
{
    int first = first_place(s, window), places = s->start + s->count - first;
    int64_t size = size_of(t->kind);
    const char *keys = t->keys + ((int64_t)s->begin + first) * t->key_place + kv_head * t->key_dim * size;
    const char *values = t->values + ((int64_t)s->begin + first) * t->value_place + kv_head * t->value_dim * size;
    char *to = packed + key_bytes(places, t->key_dim, t->kind);
    if (t->kind == FLOAT32) {
        pack_rows(keys, t->key_place, places, t->key_dim, packed, NULL, FLOAT32, 1);
        pack_rows(values, t->value_place, places, t->value_dim, NULL, to, FLOAT32, 1);
    } else {
        pack_rows(keys, t->key_place, places, t->key_dim, packed, NULL, BFLOAT16, 2);
        pack_rows(values, t->value_place, places, t->value_dim, NULL, to, BFLOAT16, 2);
    }
}

static char *aligned(char *at) { return (char *)(((uintptr_t)at + 63) & ~(uintptr_t)63); }

ALWAYS void round_row(const float *from, char *to, int count, int kind)
{
    int64_t size = size_of(kind);
    int i = 0;
    for (; i + LANES <= count; i += LANES) put_some(to + i * size, many_f32(from + i), kind);
    for (; i < count; i++) put(to + i * size, from[i], kind);
}

/* To `out` the exponentials of a query's scores from `from` up to `end`, the largest being 1; returns one over their sum.
 * Whole lanes of scores are read and written, so what lies around in them is changed: both have room up to a whole panel. */
ALWAYS float weights_of(float *scores, char *out, int from, int end, float scaling, float softcap, int kind)
{
    int64_t size = size_of(kind);
    if (softcap > 0 || scaling <= 0) {
        for (int i = from; i < end; i++) scores[i] *= scaling;
        if (softcap > 0)
            for (int i = from; i < end; i++) scores[i] = softcap * tanhf(scores[i] / softcap);
        scaling = 1;
    }
    int low = from / LANES * LANES, high = (end + LANES - 1) / LANES * LANES;
    for (int i = low; i < from; i++) scores[i] = -INFINITY;
    for (int i = end; i < high; i++) scores[i] = -INFINITY;
    V largest = (V){0} - INFINITY, sum = {0};
    for (int i = low; i < high; i += LANES) {
        V s = many_f32(scores + i);
        largest = pick((W)(s > largest), s, largest);
    }
    float top = largest[0];
    for (int j = 1; j < LANES; j++) top = largest[j] > top ? largest[j] : top;
    for (int i = low; i < high; i += LANES) { /* what stands for no score adds as good as nothing */
        V e = exponential((many_f32(scores + i) - top) * scaling);
        put_some(out + i * size, e, kind);
        sum += e;
    }
    return 1 / total(sum);
}

ALWAYS void attend_block(const Tensors *t, const Span *s, int window, int head, int first, const char *packed, char *scratch,
                         int kind)
{
    int base = first_place(s, window), places = s->start + s->count - base, dim = t->key_dim, value_dim = t->value_dim;
    int count = s->count - first < QUERIES ? s->count - first : QUERIES, at = s->start + first;
    int64_t size = size_of(kind);
    size_t inputs = padded_inputs(dim, kind), stride = stride_of(places);
    char *queries = aligned(scratch), *weights = queries + (QUERIES + 3) * inputs * size;
    float *scores = (float *)aligned(weights + (QUERIES + 3) * stride * size), *sums = scores + QUERIES * stride;
    for (int q = 0; q < count; q++) {
        const float *from = (const float *)(t->q + (int64_t)(s->token + first + q) * t->q_token + head * t->q_head);
        char *to = queries + q * inputs * size;
        memset(to + dim * size, 0, (inputs - dim) * size);
        round_row(from, to, dim, kind);
    }
    /* From a panel's first place on: the first that the block's first query sees, to its last query's own. */
    int low = window && at + 1 - window > base ? (at + 1 - window - base) / PANEL * PANEL : 0;
    int high = at + count - base, even = (int)padded_inputs(high - low, kind);
    Rows rows = {queries, NULL, NULL, inputs, 0};
    size_t key_panel = panel_bytes(dim, kind);
    for (int p = low; p < high; p += PANEL)
        product_panel(packed + p / PANEL * key_panel, kind, &rows, count, dim, scores + p - low, stride, PANEL, NULL, NULL);
    float shares[QUERIES];
    for (int q = 0; q < count; q++) {
        int to = at + q + 1 - base - low, from = window && to > window ? to - window : 0;
        float *own = scores + q * stride;
        char *row = weights + q * stride * size;
        shares[q] = weights_of(own, row, from, to, t->scaling, t->softcap, kind);
        memset(row, 0, from * size);
        memset(row + to * size, 0, (even - to) * size);
    }
    rows = (Rows){weights, NULL, NULL, stride, 0};
    const char *values = packed + key_bytes(places, dim, kind);
    size_t value_panel = panel_bytes(places, kind);
    for (int d = 0; d < value_dim; d += PANEL) {
        int width = value_dim - d < PANEL ? value_dim - d : PANEL;
        product_panel(values + d / PANEL * value_panel + (int64_t)low * PANEL * size, kind, &rows, count, high - low, sums + d,
                      value_dim, width, NULL, NULL);
    }
    for (int q = 0; q < count; q++) {
        float *to = (float *)(t->out + (int64_t)(s->token + first + q) * t->out_token) + head * value_dim;
        for (int d = 0; d < value_dim; d++) to[d] = sums[q * value_dim + d] * shares[q];
    }
}

/* QUERIES queries of a head of a span, or what is left from `first` on; q and out of `t` are float32. */
void attend_queries(const Tensors *t, const Span *s, int window, int head, int first, const char *packed, char *scratch)
{
    if (t->kind == FLOAT32) attend_block(t, s, window, head, first, packed, scratch, FLOAT32);
    else attend_block(t, s, window, head, first, packed, scratch, BFLOAT16);
}
