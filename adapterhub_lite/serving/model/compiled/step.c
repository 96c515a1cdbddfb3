/* A whole step of a base in compiled code: all layers, with each row's own adapter, from token ids to logits.
 *
 * What a layer is made of is in layer_parts.py; forward_native.py fills in these structures. All threads go through the
 * step together and wait for each other where one reads what another wrote. The states of the tokens are in float32
 * throughout; rows are rounded to what the weights of a product are met with, keys and values to what the cache is in.
 */
#ifdef _OPENMP
#include <omp.h>
#else
#define omp_get_thread_num() 0
#define omp_get_num_threads() 1
#endif
#include <sched.h>
#include <stdlib.h>

#include "attention.h"
#include "elementwise.h"
#include "products.h"
#include "row_products.h"

enum { QUERY_KEY_VALUE, ATTENTION_OUTPUT, GATE_UP, MLP_OUTPUT, ROLES };
enum { BEFORE_ATTENTION, AFTER_ATTENTION, BEFORE_MLP, AFTER_MLP, QUERY_NORM, KEY_NORM, NORMS };

typedef struct {
    Product linears[ROLES];
    const float *norms[NORMS]; /* NULL where a family has none */
    const float *cos, *sin;    /* (positions, rotary) */
    char *keys, *values;       /* (places, kv_heads, dim) */
    const int64_t *places;     /* where the tokens of the step belong */
    float epsilons[NORMS];
    float scaling, softcap;
    int32_t heads, kv_heads, dim, rotary, query_together, key_together, window;
} Layer;

typedef struct { /* of one role: how the step's tokens are routed to adapters */
    const Entry *entries;
    const Block *blocks;
    int32_t count, widest;
} Routing;

typedef struct {
    const Layer *layers;
    const Routing *routing; /* (ROLES) */
    const int64_t *token_ids, *positions;
    const char *embedding; /* (vocabulary, width) of `kind`; NULL where the head has the same weights */
    const Span *spans;     /* the rows of the step, in order */
    const int64_t *wanted;
    const float *norm;
    float *logits; /* (wanted, vocabulary) */
    char *scratch;
    Product head;
    int32_t layer_count, tokens, width, span_count, wanted_count, kind, threads, most_queries;
    float embedding_multiplier, residual, epsilon, gate_factor, gate_cubic;
} Step;

typedef struct { /* rows of a product: in float32 for the adapters, and as the base's weights are met with */
    float *plain;
    char *rounded;
    float *scales;
    int32_t *sums;
} Input;

/* Where threads wait for each other, some three hundred times a step. Not OpenMP's barrier: a thread that is not the process's first
 * has a pool of its own, and with more threads in its pools than processors GNU's OpenMP has them sleep at each barrier. */
typedef struct {
    int arrived;
    unsigned turn;
} Meeting;

/* Half a millisecond; then others may have the processor. It may be the very one that is waited for: where another process keeps
 * a processor busy, all of ours may be on one. Then it is given away almost at once, until so many meetings later. */
#define SPINS 20000
#define FEW_SPINS 50
#define SHARED_MEETINGS 1000

static void meet(Meeting *m, int parts)
{
    static __thread int shared;
    if (parts == 1) return;
    unsigned turn = __atomic_load_n(&m->turn, __ATOMIC_ACQUIRE);
    if (__atomic_add_fetch(&m->arrived, 1, __ATOMIC_ACQ_REL) == parts) {
        __atomic_store_n(&m->arrived, 0, __ATOMIC_RELAXED);
        __atomic_store_n(&m->turn, turn + 1, __ATOMIC_RELEASE);
        return;
    }
    int spins = 0, most = shared > 0 ? FEW_SPINS : SPINS;
    while (__atomic_load_n(&m->turn, __ATOMIC_ACQUIRE) == turn)
        if (spins < most) {
            spins++;
#if defined(__x86_64__) || defined(__i386__)
            __builtin_ia32_pause();
#elif defined(__aarch64__)
            __asm__ volatile("yield");
#endif
        } else
            sched_yield();
    if (shared > 0) shared--;
    else if (spins == most) shared = SHARED_MEETINGS;
}

typedef struct {
    float *states, *wide; /* (tokens, width); (tokens, the widest output) */
    Input input;
    char *packed;  /* keys and values of the rows that compute many tokens */
    char *attend;  /* for each thread */
    size_t attend_bytes;
    Meeting *meeting;
} Scratch;

static size_t larger(size_t a, size_t b) { return a > b ? a : b; }

static int many_tokens(const Step *s, const Span *span) { return span->count > s->most_queries; }

static size_t place_bytes(const Step *s, char *from, Scratch *to)
{
    size_t wide = s->width, in = s->width, packed = 0, attend = 0, rows = s->tokens + 3;
    for (int i = 0; i < s->layer_count; i++) {
        const Layer *l = s->layers + i;
        size_t own = 0;
        for (int role = 0; role < ROLES; role++)
            wide = larger(wide, l->linears[role].out), in = larger(in, l->linears[role].in);
        for (int j = 0; j < s->span_count; j++) {
            const Span *span = s->spans + j;
            int places = span->start + span->count - first_place(span, l->window);
            attend = larger(attend, sizeof(float) * GROUP * (places + LANES));
            if (!many_tokens(s, span)) continue;
            own += l->kv_heads * (packed_head_bytes(places, l->dim, s->kind) + 64);
            attend = larger(attend, query_scratch_bytes(places, l->dim, s->kind));
        }
        packed = larger(packed, own);
    }
    char *at = (char *)(((uintptr_t)from + 63) & ~(uintptr_t)63);
    size_t used = 64;
#define TAKE(pointer, bytes)                                   \
    {                                                          \
        size_t needed = ((size_t)(bytes) + 127) / 64 * 64;     \
        if (to) pointer = (void *)at;                          \
        at += needed, used += needed;                          \
    }
    TAKE(to->states, sizeof(float) * s->tokens * s->width)
    TAKE(to->wide, sizeof(float) * s->tokens * wide)
    TAKE(to->input.plain, sizeof(float) * rows * in)
    TAKE(to->input.rounded, rows * (in + INT8_GROUP) * (s->kind == FLOAT32 ? 4 : 2))
    TAKE(to->input.scales, sizeof(float) * rows * (in / INT4_GROUP + 2))
    TAKE(to->input.sums, sizeof(int32_t) * rows * (in / INT4_GROUP + 2))
    TAKE(to->packed, packed)
    attend = (attend + 127) / 64 * 64;
    if (to) to->attend_bytes = attend;
    TAKE(to->attend, attend * s->threads)
#undef TAKE
    return used;
}

/* How much memory a step needs for a while. */
size_t step_scratch_bytes(const Step *s) { return place_bytes(s, NULL, NULL); }

/* A row of `in.plain` as the weights of `p` are met with. */
static Rows rounded_rows(const Product *p, const Input *in)
{
    int group = group_of(p->kind);
    size_t stride = padded_inputs(p->in, p->kind);
    return (Rows){in->rounded, in->scales, in->sums, stride, stride / group};
}

static void round_input(const Product *p, const Input *in, int row)
{
    Rows rows = rounded_rows(p, in);
    const float *from = in->plain + (size_t)row * p->in;
    if (p->kind == FLOAT32) memcpy(in->rounded + row * rows.stride * 4, from, p->in * sizeof(float));
    else if (p->kind == BFLOAT16) {
        uint16_t *to = (uint16_t *)in->rounded + row * rows.stride;
        int i = 0;
        for (; i + LANES <= p->in; i += LANES) put_bf16(to + i, many_f32(from + i));
        for (; i < p->in; i++) to[i] = narrow(from[i]);
        if (p->in % 2) to[p->in] = 0;
    } else
        quantise_rows(from, p->in, 1, p->in, group_of(p->kind), (int8_t *)in->rounded + row * rows.stride, rows.stride,
                      in->scales + row * rows.groups, in->sums + row * rows.groups);
}

/* Where a part of a product begins to read. */
static const char *first_read(const Product *p, int part, int parts)
{
    size_t panels = (p->out + PANEL - 1) / PANEL;
    return p->panels + panels * part / parts * panel_bytes(p->in, p->kind);
}

#define EACH(i, count) for (int i = (int)((int64_t)(count) * part / parts); i < (int)((int64_t)(count) * (part + 1) / parts); i++)
#define WAIT meet(to->meeting, parts);

/* wide = a product of the input and the deltas of the adapters. */
static void linear(const Step *s, const Scratch *to, int layer, int role, int part, int parts)
{
    const Product *p = s->layers[layer].linears + role;
    const Product *next = role + 1 < ROLES ? p + 1 : layer + 1 < s->layer_count ? s->layers[layer + 1].linears : &s->head;
    const Routing *r = s->routing + role;
    Rows rows = rounded_rows(p, &to->input);
    product_part(p, &rows, s->tokens, to->wide, p->out, first_read(next, part, parts), part, parts);
    WAIT
    if (r->count) {
        add_row_products_part(r->entries, r->blocks, r->count, layer, to->input.plain, p->in, to->wide, p->out, FLOAT32, p->in,
                              p->out, r->widest, part, parts);
        WAIT
    }
}

static void attention(const Step *s, const Scratch *to, const Layer *l, int part, int parts)
{
    int64_t head = l->dim * sizeof(float), stride = l->linears[QUERY_KEY_VALUE].out * sizeof(float);
    int64_t place = (int64_t)l->kv_heads * l->dim * size_of(s->kind);
    Tensors t = {(const char *)to->wide, l->keys, l->values, (char *)to->input.plain, stride, head, l->heads * head,
                 place, place, s->kind, FLOAT32, l->heads, l->kv_heads, l->dim, l->dim,
                 l->scaling, l->softcap};
    int group = l->heads / l->kv_heads, task = 0;
    char *scratch = to->attend + part * to->attend_bytes, *packed = to->packed;
    /* Tasks are dealt to the threads in turn. */
    for (int i = 0; i < s->span_count; i++) {
        const Span *span = s->spans + i;
        if (many_tokens(s, span)) {
            size_t bytes = packed_head_bytes(span->start + span->count - first_place(span, l->window), l->dim, s->kind) + 64;
            for (int h = 0; h < l->kv_heads; h++, packed += bytes)
                if (task++ % parts == part) pack_head(&t, span, l->window, h, packed);
        } else {
            for (int token = 0; token < span->count; token++) {
                int end = span->start + token + 1, from = l->window && end > l->window ? end - l->window : 0;
                Look look = {span->token + token, span->begin, from, end};
                for (int h = 0; h < l->kv_heads; h++)
                    if (task++ % parts == part) attend_for(&t, &look, h, (float *)scratch, end - from + LANES);
            }
        }
    }
    WAIT
    if (packed == to->packed) return;
    packed = to->packed;
    for (int i = 0; i < s->span_count; i++) {
        const Span *span = s->spans + i;
        if (!many_tokens(s, span)) continue;
        size_t bytes = packed_head_bytes(span->start + span->count - first_place(span, l->window), l->dim, s->kind) + 64;
        for (int h = 0; h < l->heads; h++)
            for (int first = 0; first < span->count; first += QUERIES)
                if (task++ % parts == part)
                    attend_queries(&t, span, l->window, h, first, packed + h / group * bytes, scratch);
        packed += bytes * l->kv_heads;
    }
    WAIT
}

/* Queries are turned in place; keys and values go to the cache. */
ALWAYS void turn_and_store(float *qkv, const Layer *l, int token, int64_t position, int kind)
{
    int64_t size = size_of(kind), width = l->kv_heads * l->dim * size;
    const float *c = l->cos + position * l->rotary, *sine = l->sin + position * l->rotary;
    float *k = qkv + l->heads * l->dim, *v = k + l->kv_heads * l->dim;
    char *key = l->keys + l->places[token] * width, *value = l->values + l->places[token] * width;
    turn_heads(qkv, (char *)qkv, l->norms[QUERY_NORM], l->query_together, l->epsilons[QUERY_NORM], c, sine, l->rotary, l->heads,
               l->dim, FLOAT32);
    turn_heads(k, key, l->norms[KEY_NORM], l->key_together, l->epsilons[KEY_NORM], c, sine, l->rotary, l->kv_heads, l->dim, kind);
    int d = 0;
    for (; d + LANES <= l->kv_heads * l->dim; d += LANES) put_some(value + d * size, many_f32(v + d), kind);
    for (; d < l->kv_heads * l->dim; d++) put(value + d * size, v[d], kind);
}

static void embed(const Step *s, float *states, int token)
{
    const char *row = s->embedding + s->token_ids[token] * s->width * size_of(s->kind);
    if (!s->embedding) output_weights(&s->head, s->token_ids[token], states);
    else
        for (int i = 0; i < s->width; i++) states[i] = one(row + i * size_of(s->kind), s->kind);
    for (int i = 0; i < s->width; i++) states[i] *= s->embedding_multiplier;
}

static void run(const Step *s, const Scratch *to, int part, int parts)
{
    const Input *in = &to->input;
    size_t width = s->width;
    EACH(i, s->tokens)
    {
        const Layer *first = s->layers;
        embed(s, to->states + i * width, i);
        norm_row(to->states + i * width, in->plain + i * width, first->norms[BEFORE_ATTENTION], first->epsilons[BEFORE_ATTENTION], width);
        round_input(first->linears, in, i);
    }
    WAIT
    for (int layer = 0; layer < s->layer_count; layer++) {
        const Layer *l = s->layers + layer, *next = layer + 1 < s->layer_count ? l + 1 : NULL;
        linear(s, to, layer, QUERY_KEY_VALUE, part, parts);
        EACH(i, s->tokens)
        {
            float *qkv = to->wide + (size_t)i * l->linears[QUERY_KEY_VALUE].out;
            if (s->kind == FLOAT32) turn_and_store(qkv, l, i, s->positions[i], FLOAT32);
            else turn_and_store(qkv, l, i, s->positions[i], BFLOAT16);
        }
        WAIT
        attention(s, to, l, part, parts);
        EACH(i, s->tokens) round_input(l->linears + ATTENTION_OUTPUT, in, i);
        WAIT
        linear(s, to, layer, ATTENTION_OUTPUT, part, parts);
        EACH(i, s->tokens)
        {
            float *x = to->states + i * width;
            add_row(x, to->wide + i * width, l->norms[AFTER_ATTENTION], l->epsilons[AFTER_ATTENTION], s->residual, width);
            norm_row(x, in->plain + i * width, l->norms[BEFORE_MLP], l->epsilons[BEFORE_MLP], width);
            round_input(l->linears + GATE_UP, in, i);
        }
        WAIT
        linear(s, to, layer, GATE_UP, part, parts);
        int inner = l->linears[MLP_OUTPUT].in;
        EACH(i, s->tokens)
        {
            gate_row(to->wide + (size_t)i * 2 * inner, in->plain + (size_t)i * inner, s->gate_factor, s->gate_cubic, inner);
            round_input(l->linears + MLP_OUTPUT, in, i);
        }
        WAIT
        linear(s, to, layer, MLP_OUTPUT, part, parts);
        EACH(i, s->tokens)
        {
            float *x = to->states + i * width;
            add_row(x, to->wide + i * width, l->norms[AFTER_MLP], l->epsilons[AFTER_MLP], s->residual, width);
            if (!next) continue;
            norm_row(x, in->plain + i * width, next->norms[BEFORE_ATTENTION], next->epsilons[BEFORE_ATTENTION], width);
            round_input(next->linears, in, i);
        }
        WAIT
    }
    EACH(i, s->wanted_count)
    {
        norm_row(to->states + s->wanted[i] * width, in->plain + i * width, s->norm, s->epsilon, width);
        round_input(&s->head, in, i);
    }
    WAIT
    Rows rows = rounded_rows(&s->head, in);
    product_part(&s->head, &rows, s->wanted_count, s->logits, s->head.out, first_read(s->layers->linears, part, parts), part, parts);
}

/* Computes a step; `scratch` has the bytes that `step_scratch_bytes` says. */
void compute_step(const Step *s)
{
    Meeting meeting = {0};
    Scratch to = {.meeting = &meeting};
    place_bytes(s, s->scratch, &to);
#pragma omp parallel num_threads(s->threads)
    run(s, &to, omp_get_thread_num(), omp_get_num_threads());
}

/* For tests, and for modules of a model: one product of rows in float32, x (count, in), y (count, out). */
void multiply(const Product *p, const float *x, int count, float *y, char *scratch, int threads)
{
    size_t rows = count + 3;
    char *at = (char *)(((uintptr_t)scratch + 63) & ~(uintptr_t)63);
    size_t scales = rows * (p->in / INT4_GROUP + 2) * sizeof(float);
    Input in = {(float *)x, at + 2 * scales, (float *)at, (int32_t *)(at + scales)};
    Meeting meeting = {0};
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        int part = omp_get_thread_num(), parts = omp_get_num_threads();
        EACH(i, count) round_input(p, &in, i);
        meet(&meeting, parts);
        Rows own = rounded_rows(p, &in);
        product_part(p, &own, count, y, p->out, NULL, part, parts);
    }
}

size_t multiply_scratch_bytes(const Product *p, int count)
{
    size_t rows = count + 3;
    return 2 * rows * (p->in / INT4_GROUP + 2) * sizeof(float) + rows * (p->in + INT8_GROUP) * (p->kind == FLOAT32 ? 4 : 2) + 256;
}

/* For a test that forward_native.py describes them as they are here. */
const size_t structure_sizes[] = {sizeof(Layer), sizeof(Routing), sizeof(Span), sizeof(Step)};
