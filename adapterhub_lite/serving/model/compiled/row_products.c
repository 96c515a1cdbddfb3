/* Each token's own LoRA delta, from the adapters' weights where they lie: y += factor * scale * (x A^T) B.
 *
 * Compiled by native.py where there is a C compiler; bank.py computes the same without. Sums are in float32 whatever
 * the weights are in, and y is rounded once, after all adapters of a token. Which rows there are and what they are
 * routed to is laid out once a step (direct.py) and shared by all layers.
 */
#include "row_products.h"

#include "lanes.h"

#define TOKENS 4 /* neighbouring tokens of one row share each read of its weights */

/* What a thread reads next, all its blocks over, asked for a little ahead of its use: else it waits as long again. */
#define LINE 64
#define LEAD 256 /* lines */
typedef struct {
    const Entry *entries;
    const Block *block, *end;
    int layer, part; /* of a block first every a, then every b */
    const char *at, *stop;
} Ahead;

static size_t at_layer(const Entry *e, int layer) { return e->layer_at ? (size_t)e->layer_at[layer] : (size_t)layer; }

static int is_there(const Entry *e, int layer) { return !e->layer_at || e->layer_at[layer] >= 0; }

static void next_part(Ahead *ahead)
{
    ahead->at = ahead->stop = NULL;
    while (ahead->block < ahead->end) {
        const Block *b = ahead->block;
        int part = ahead->part++, half = part >= b->entries;
        if (part >= 2 * b->entries) {
            ahead->block++, ahead->part = 0;
            continue;
        }
        const Entry *e = ahead->entries + b->entry + part - half * b->entries;
        if (!is_there(e, ahead->layer)) continue;
        size_t bytes = (size_t)e->rank * (half ? e->out : e->in) * (e->kind == FLOAT32 ? 4 : 2);
        ahead->at = (const char *)(half ? e->b : e->a) + at_layer(e, ahead->layer) * bytes;
        ahead->stop = ahead->at + bytes;
        return;
    }
}

static inline void fetch(Ahead *ahead, int lines)
{
    for (int i = 0; i < lines; i++, ahead->at += LINE) __builtin_prefetch(ahead->at);
    if (ahead->at >= ahead->stop) next_part(ahead);
}

/* u[k][t] = x[t] . a[k] for RANKS rows of a and TOKENS or one token at once, so that each load is used several times. */
#define DOWN_SOME(name, type, RANKS, COUNT, STEPS)                                                                    \
    static inline void down_##name##_##COUNT##_##RANKS(const float *x, const type *a, int in, float *u, Ahead *ahead)\
    {                                                                                                                 \
        V s[RANKS][COUNT][STEPS] = {0};                                                                               \
        int i = 0;                                                                                                    \
        for (; i + STEPS * LANES <= in; i += STEPS * LANES) {                                                         \
            if (COUNT == 1) fetch(ahead, RANKS * STEPS * LANES * sizeof(type) / LINE);                                \
            for (int j = 0; j < STEPS; j++)                                                                           \
                for (int k = 0; k < RANKS; k++) {                                                                     \
                    const type *at = a + (size_t)k * in + i + j * LANES;                                              \
                    V v = many_##name(at);                                                                            \
                    for (int t = 0; t < COUNT; t++) s[k][t][j] += v * many_f32(x + (size_t)t * in + i + j * LANES);   \
                }                                                                                                     \
        }                                                                                                             \
        for (int k = 0; k < RANKS; k++)                                                                               \
            for (int t = 0; t < COUNT; t++) {                                                                         \
                float sum = 0;                                                                                        \
                for (int j = 0; j < STEPS; j++) sum += total(s[k][t][j]);                                             \
                for (int r = i; r < in; r++) sum += x[(size_t)t * in + r] * one_##name(a[(size_t)k * in + r]);        \
                u[k * TOKENS + t] = sum;                                                                              \
            }                                                                                                         \
    }

#define DOWN(name, type)                                                                                              \
    DOWN_SOME(name, type, 4, 1, 2)                                                                                    \
    DOWN_SOME(name, type, 1, 1, 2)                                                                                    \
    DOWN_SOME(name, type, 2, 4, 2)                                                                                    \
    DOWN_SOME(name, type, 1, 4, 2)                                                                                    \
    static void down_##name(const float *x, int count, const type *a, int rank, int in, float *u, Ahead *ahead)       \
    {                                                                                                                 \
        int k = 0;                                                                                                    \
        if (count == 1) {                                                                                             \
            for (; k + 4 <= rank; k += 4) down_##name##_1_4(x, a + (size_t)k * in, in, u + k * TOKENS, ahead);               \
            for (; k < rank; k++) down_##name##_1_1(x, a + (size_t)k * in, in, u + k * TOKENS, ahead);                       \
        } else {                                                                                                      \
            for (; k + 2 <= rank; k += 2) down_##name##_4_2(x, a + (size_t)k * in, in, u + k * TOKENS, ahead);               \
            for (; k < rank; k++) down_##name##_4_1(x, a + (size_t)k * in, in, u + k * TOKENS, ahead);                       \
        }                                                                                                             \
    }
DOWN(f32, float)
DOWN(bf16, uint16_t)
DOWN(f16, _Float16)

/* sum[t][o] += u[k][t] * b[k][o] for RANKS rows of b, each read from end to end: the processor fetches ahead of that. */
#define UP_SOME(name, type, RANKS, COUNT)                                                                             \
    static inline void up_##name##_##COUNT##_##RANKS(const float *u, const type *b, size_t out, float *sum, Ahead *ahead)\
    {                                                                                                                 \
        size_t o = 0;                                                                                                 \
        for (; o + LANES <= out; o += LANES) {                                                                        \
            if (COUNT == 1) fetch(ahead, RANKS * LANES * sizeof(type) / LINE);                                        \
            V s[COUNT];                                                                                               \
            for (int t = 0; t < COUNT; t++) s[t] = many_f32(sum + t * out + o);                                       \
            for (int k = 0; k < RANKS; k++) {                                                                         \
                V v = many_##name(b + k * out + o);                                                                   \
                for (int t = 0; t < COUNT; t++) s[t] += v * u[k * TOKENS + t];                                        \
            }                                                                                                         \
            for (int t = 0; t < COUNT; t++) memcpy(sum + t * out + o, s + t, sizeof(V));                              \
        }                                                                                                             \
        for (; o < out; o++)                                                                                          \
            for (int k = 0; k < RANKS; k++)                                                                           \
                for (int t = 0; t < COUNT; t++) sum[t * out + o] += u[k * TOKENS + t] * one_##name(b[k * out + o]);   \
    }

#define UP(name, type)                                                                                                \
    UP_SOME(name, type, 4, 1)                                                                                         \
    UP_SOME(name, type, 1, 1)                                                                                         \
    UP_SOME(name, type, 4, 4)                                                                                         \
    UP_SOME(name, type, 1, 4)                                                                                         \
    static void up_##name(const float *u, int count, const type *b, int rank, size_t out, float *sum, Ahead *ahead)   \
    {                                                                                                                 \
        int k = 0;                                                                                                    \
        if (count == 1) {                                                                                             \
            for (; k + 4 <= rank; k += 4) up_##name##_1_4(u + k * TOKENS, b + k * out, out, sum, ahead);                     \
            for (; k < rank; k++) up_##name##_1_1(u + k * TOKENS, b + k * out, out, sum, ahead);                             \
        } else {                                                                                                      \
            for (; k + 4 <= rank; k += 4) up_##name##_4_4(u + k * TOKENS, b + k * out, out, sum, ahead);                     \
            for (; k < rank; k++) up_##name##_4_1(u + k * TOKENS, b + k * out, out, sum, ahead);                             \
        }                                                                                                             \
    }
UP(f32, float)
UP(bf16, uint16_t)
UP(f16, _Float16)

static void project(const Entry *e, int layer, const float *x, int count, float *u, Ahead *ahead)
{
    size_t at = at_layer(e, layer), skip = at * e->rank * e->in;
    float scale = e->scale[at] * e->factor;
    if (e->kind == FLOAT32) down_f32(x, count, (const float *)e->a + skip, e->rank, e->in, u, ahead);
    else if (e->kind == BFLOAT16) down_bf16(x, count, (const uint16_t *)e->a + skip, e->rank, e->in, u, ahead);
    else down_f16(x, count, (const _Float16 *)e->a + skip, e->rank, e->in, u, ahead);
    for (int k = 0; k < e->rank; k++)
        for (int t = 0; t < count; t++) u[k * TOKENS + t] *= scale;
}

static void expand(const Entry *e, int layer, const float *u, int count, float *sum, Ahead *ahead)
{
    size_t skip = at_layer(e, layer) * e->rank * e->out, out = e->out;
    if (e->kind == FLOAT32) up_f32(u, count, (const float *)e->b + skip, e->rank, out, sum, ahead);
    else if (e->kind == BFLOAT16) up_bf16(u, count, (const uint16_t *)e->b + skip, e->rank, out, sum, ahead);
    else up_f16(u, count, (const _Float16 *)e->b + skip, e->rank, out, sum, ahead);
}

static void store(void *y, int kind, size_t at, int width, const float *sum)
{
    if (kind == FLOAT32) {
        float *to = (float *)y + at;
        for (int o = 0; o < width; o++) to[o] += sum[o];
    } else {
        uint16_t *to = (uint16_t *)y + at;
        for (int o = 0; o < width; o++) to[o] = narrow(wide(to[o]) + sum[o]);
    }
}

static void block(const Entry *entries, const Block *b, int layer, const void *x, size_t x_stride, void *y,
                  size_t y_stride, int kind, int in, int out, int widest, Ahead *ahead)
{
    float xs[TOKENS * in], sum[TOKENS * out], us[b->entries * widest * TOKENS];
    const Entry *e = entries + b->entry, *end = e + b->entries;
    int tokens = b->count == 1 ? 1 : TOKENS; /* two or three are computed as four, of which the others are zero */
    if (b->count < tokens) memset(xs + (size_t)b->count * in, 0, sizeof(float) * (tokens - b->count) * in);
    for (int t = 0; t < b->count; t++) {
        size_t at = (b->token + t) * x_stride;
        if (kind == FLOAT32) memcpy(xs + (size_t)t * in, (const float *)x + at, sizeof(float) * in);
        else
            for (int i = 0; i < in; i++) xs[(size_t)t * in + i] = wide(((const uint16_t *)x)[at + i]);
    }
    for (int i = 0; i < b->entries; i++)
        if (is_there(e + i, layer)) project(e + i, layer, xs, tokens, us + (size_t)i * widest * TOKENS, ahead);
    for (const Entry *next, *first = e; e < end; e = next) {
        for (next = e; next < end && next->column == e->column; next++) {}
        memset(sum, 0, sizeof(float) * tokens * e->out);
        for (const Entry *one = e; one < next; one++)
            if (is_there(one, layer)) expand(one, layer, us + (size_t)(one - first) * widest * TOKENS, tokens, sum, ahead);
        for (int t = 0; t < b->count; t++)
            store(y, kind, (b->token + t) * y_stride + e->column, e->out, sum + (size_t)t * e->out);
    }
}

/* x (tokens, in) and y (tokens, outs side by side) are of `kind`; no entry has more outs than `out`, nor a rank above
 * `widest`. Part `part` of `parts` of the blocks. */
void add_row_products_part(const Entry *entries, const Block *blocks, int count, int layer, const void *x, size_t x_stride,
                           void *y, size_t y_stride, int kind, int in, int out, int widest, int part, int parts)
{
    const Block *b = blocks + (size_t)count * part / parts, *end = blocks + (size_t)count * (part + 1) / parts;
    Ahead ahead = {entries, b, end, layer, 0, NULL, NULL};
    for (int i = 0; i < LEAD; i++) fetch(&ahead, 1);
    for (; b < end; b++) block(entries, b, layer, x, x_stride, y, y_stride, kind, in, out, widest, &ahead);
}

void add_row_products(const Entry *entries, const Block *blocks, int count, int layer, const void *x, size_t x_stride,
                      void *y, size_t y_stride, int kind, int in, int out, int widest, int threads)
{
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int part = 0; part < threads; part++)
        add_row_products_part(entries, blocks, count, layer, x, x_stride, y, y_stride, kind, in, out, widest, part, threads);
}
