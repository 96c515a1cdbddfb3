/* Products with frozen weights for a CPU: y = x W^T + bias, for one row or for thousands.
 *
 * Weights lie in panels of PANEL outputs, inputs in order within a panel, so that a thread reads its share of a matrix
 * from end to end and asks for what comes next while it computes: with few rows a product takes as long as reading.
 *   float32   [out / 32][in][32]
 *   bfloat16  [out / 32][in / 2][32][2]     pairs of inputs, as the processor's bfloat16 dot product reads them
 *   int8      [out / 32][in / 64]{[16][32][4] of weight + 128, [32] float16 scales}
 *   int4      [out / 32][in / 32]{[4][32][4] of inputs j and, in the high half, j + 4, [32] float16 scales, [32] float16 mins}
 * Rows meet integer weights as int8 with a scale for each group, and the sums of products are exact. All other sums are
 * in float32.
 */
#include "products.h"

#include <math.h>

#include "lanes.h"
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#if defined(__AVX512BF16__) && !defined(PORTABLE)
#define HAS_BF16
#endif
#if defined(__AVX512VNNI__) && !defined(PORTABLE)
#define HAS_VNNI
#endif
/* Rows that share each read of the weights: as many as there are registers for their sums. */
#ifdef __AVX512F__
#define MOST_ROWS 12
#define MOST_INTEGER_ROWS 6
#else
#define MOST_ROWS 2
#define MOST_INTEGER_ROWS 2
#endif
#define LINE 64
/* `count` is a constant wherever this is used: unrolled, the sums of all rows stay in registers. */
#define EACH_ROW _Pragma("GCC unroll 12") for (int r = 0; r < count; r++)

typedef int32_t I __attribute__((vector_size(64)));

int group_of(int kind) { return kind == INT8 ? INT8_GROUP : kind == INT4 ? INT4_GROUP : 1; }

size_t padded_inputs(int in, int kind)
{
    int to = kind == FLOAT32 ? 1 : kind == BFLOAT16 ? 2 : group_of(kind);
    return (size_t)(in + to - 1) / to * to;
}

size_t panel_bytes(int in, int kind)
{
    size_t inputs = padded_inputs(in, kind);
    if (kind == INT8) return inputs / INT8_GROUP * (INT8_GROUP * PANEL + PANEL * 2);
    if (kind == INT4) return inputs / INT4_GROUP * (INT4_GROUP * PANEL / 2 + PANEL * 4);
    return inputs * PANEL * (kind == FLOAT32 ? 4 : 2);
}

size_t packed_bytes(int in, int out, int kind) { return (size_t)(out + PANEL - 1) / PANEL * panel_bytes(in, kind); }

ALWAYS V bytes_at(const char *p)
{
    V v;
    memcpy(&v, p, sizeof v);
    return v;
}

/* At each step of a tile what will be read later is asked for: all of it, or half where two tiles share the work; a tile
 * whose weights are in the second cache already asks for its own, a little ahead. */
enum { ALL_OF_NEXT, HALF_OF_NEXT, OWN };
#define LEAD (4 * LINE)
#define FETCH                                                                                                         \
    {                                                                                                                 \
        if (fetch == OWN) __builtin_prefetch(w + LEAD, 0, 3), __builtin_prefetch(w + LEAD + LINE, 0, 3);              \
        else __builtin_prefetch(next, 0, 2), next += LINE;                                                            \
        if (fetch == ALL_OF_NEXT) __builtin_prefetch(next, 0, 2), next += LINE;                                       \
    }

ALWAYS void finish(V sums[][2], float *y, size_t y_stride, int count, int stored, int width, const float *bias)
{
    V more[2] = {0};
    if (bias) memcpy(more, bias, width * sizeof(float));
    EACH_ROW {
        V row[2] = {sums[r][0] + more[0], sums[r][1] + more[1]};
        if (r < stored) memcpy(y + r * y_stride, row, width == PANEL ? sizeof row : width * sizeof(float));
    }
}

#define TILE(name) \
    ALWAYS void name(const char *w, const void *rows, size_t stride, int in, float *y, size_t y_stride, int width, \
                     const float *bias, const char *next, int fetch, int count, int stored)

TILE(tile_f32)
{
    const float *x = rows;
    V sums[MOST_ROWS][2];
    EACH_ROW sums[r][0] = sums[r][1] = (V){0};
    for (int k = 0; k < in; k++, w += PANEL * 4) {
        FETCH
        V a = bytes_at(w), b = bytes_at(w + LINE);
        EACH_ROW {
            float v = x[r * stride + k];
            sums[r][0] += a * v;
            sums[r][1] += b * v;
        }
    }
    finish(sums, y, y_stride, count, stored, width, bias);
}

ALWAYS V pair_product(V sum, V w, const uint16_t *x)
{
#ifdef HAS_BF16
    int pair;
    memcpy(&pair, x, 4);
    return (V)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)_mm512_set1_epi32(pair));
#else
    W bits = (W)w;
    return sum + (V)(bits << 16) * wide(x[0]) + (V)(bits & 0xffff0000u) * wide(x[1]);
#endif
}

TILE(tile_bf16)
{
    const uint16_t *x = rows;
    V sums[MOST_ROWS][2];
    EACH_ROW sums[r][0] = sums[r][1] = (V){0};
    for (int k = 0; k < in; k += 2, w += PANEL * 4) {
        FETCH
        V a = bytes_at(w), b = bytes_at(w + LINE);
        EACH_ROW {
            sums[r][0] = pair_product(sums[r][0], a, x + r * stride + k);
            sums[r][1] = pair_product(sums[r][1], b, x + r * stride + k);
        }
    }
    finish(sums, y, y_stride, count, stored, width, bias);
}

/* Four weights, not negative, of each lane with four numbers of a row. */
ALWAYS I four_products(I sum, W w, const int8_t *x)
{
#ifdef HAS_VNNI
    int four;
    memcpy(&four, x, 4);
    return (I)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, _mm512_set1_epi32(four));
#else
    for (int j = 0; j < 4; j++) sum += (I)((w >> (8 * j)) & 255) * (int32_t)x[j];
    return sum;
#endif
}

/* Shared by int8 and int4: a group's sums of whole numbers, then its scale. */
ALWAYS void integer_tile(const char *w, const Rows *x, size_t first, float *y, size_t y_stride, int in, int width,
                         const float *bias, const char *next, int fetch, int count, int stored, int kind)
{
    int size = group_of(kind), offset = kind == INT8 ? 128 : 0;
    V sums[MOST_ROWS][2];
    EACH_ROW sums[r][0] = sums[r][1] = (V){0};
    const int8_t *rows = (const int8_t *)x->rows + first * x->stride;
    const float *scales = x->scales + first * x->groups;
    const int32_t *totals = x->sums + first * x->groups;
    for (int g = 0; g < in / size; g++) {
        I own[MOST_INTEGER_ROWS][2];
        EACH_ROW own[r][0] = own[r][1] = (I){0} - (int32_t)(offset * (uint32_t)totals[r * x->groups + g]);
        const int8_t *at = rows + g * size;
        for (int k = 0; k < size; k += kind == INT8 ? 4 : 8, w += PANEL * 4) {
            FETCH
            W a = (W)bytes_at(w), b = (W)bytes_at(w + LINE);
            if (kind == INT4) {
                W high_a = (a >> 4) & 0x0f0f0f0fu, high_b = (b >> 4) & 0x0f0f0f0fu;
                a &= 0x0f0f0f0fu, b &= 0x0f0f0f0fu;
                EACH_ROW {
                    own[r][0] = four_products(own[r][0], high_a, at + r * x->stride + k + 4);
                    own[r][1] = four_products(own[r][1], high_b, at + r * x->stride + k + 4);
                }
            }
            EACH_ROW {
                own[r][0] = four_products(own[r][0], a, at + r * x->stride + k);
                own[r][1] = four_products(own[r][1], b, at + r * x->stride + k);
            }
        }
        const _Float16 *factors = (const _Float16 *)w;
        V scale_a = many_f16(factors), scale_b = many_f16(factors + LANES);
        w += PANEL * (kind == INT4 ? 4 : 2);
        EACH_ROW {
            float scale = scales[r * x->groups + g];
            if (kind == INT4) {
                float sum = scale * totals[r * x->groups + g];
                sums[r][0] += many_f16(factors + PANEL) * sum;
                sums[r][1] += many_f16(factors + PANEL + LANES) * sum;
            }
            sums[r][0] += __builtin_convertvector(own[r][0], V) * (scale_a * scale);
            sums[r][1] += __builtin_convertvector(own[r][1], V) * (scale_b * scale);
        }
    }
    finish(sums, y, y_stride, count, stored, width, bias);
}

/* Of a tile, which is compiled for each number of rows that it can have. */
typedef struct {
    const char *panel, *next;
    const Rows *x;
    size_t first, y_stride;
    float *y;
    const float *bias;
    int in, width;
} Tile;

ALWAYS void tile(const Tile *t, int kind, int fetch, int count, int stored)
{
    const Rows *x = t->x;
    const char *rows = (const char *)x->rows + t->first * x->stride * (kind == FLOAT32 ? 4 : kind == BFLOAT16 ? 2 : 1);
    if (kind == FLOAT32) tile_f32(t->panel, rows, x->stride, t->in, t->y, t->y_stride, t->width, t->bias, t->next, fetch, count, stored);
    else if (kind == BFLOAT16) tile_bf16(t->panel, rows, x->stride, t->in, t->y, t->y_stride, t->width, t->bias, t->next, fetch, count, stored);
    else integer_tile(t->panel, x, t->first, t->y, t->y_stride, t->in, t->width, t->bias, t->next, fetch, count, stored, kind);
}

/* A tile of `rows` rows, a constant, of which `count` are stored. */
#define CASE(N) case N: tile(t, kind, fetch == OWN ? OWN : N <= 4 ? ALL_OF_NEXT : HALF_OF_NEXT, N, count); break;

ALWAYS void tile_of(const Tile *t, int kind, int fetch, int rows, int count)
{
    switch (rows) {
        CASE(1) CASE(2)
#ifdef __AVX512F__
        CASE(3) CASE(4) CASE(6)
#endif
    }
    if (kind == FLOAT32 || kind == BFLOAT16)
        switch (rows) {
#ifdef __AVX512F__
            CASE(8) CASE(12)
#endif
        }
}

static void compute_tile(const Tile *t, int kind, int own, int rows, int count)
{
    if (kind == FLOAT32) tile_of(t, FLOAT32, ALL_OF_NEXT, rows, count);
    else if (kind == INT8) tile_of(t, INT8, ALL_OF_NEXT, rows, count);
    else if (kind == INT4) tile_of(t, INT4, ALL_OF_NEXT, rows, count);
    else if (own) tile_of(t, BFLOAT16, OWN, rows, count);
    else tile_of(t, BFLOAT16, ALL_OF_NEXT, rows, count);
}

/* The least size of a tile that holds `count` rows. */
static int tile_rows(int count)
{
    static const int8_t sizes[] = {1, 1, 2, 3, 4, 6, 6, 8, 8, 12, 12, 12, 12};
    return sizes[count];
}

/* The outputs of one panel, the first `width` of them, for `count` rows; `next` is what will be read after it. Rows
 * are read, and not used, up to three beyond. */
void product_panel(const char *panel, int kind, const Rows *x, int count, int in, float *y, size_t y_stride, int width,
                   const float *bias, const char *next)
{
    if (!next) next = panel;
    int most = kind == INT8 || kind == INT4 ? MOST_INTEGER_ROWS : MOST_ROWS, tiles = (count + most - 1) / most;
    int inputs = (int)padded_inputs(in, kind), first = 0;
    for (int tile = 0; tile < tiles; tile++) {
        int end = (int)((int64_t)count * (tile + 1) / tiles);
        const char *later = tile == 0 ? next : next + panel_bytes(in, kind) / 2;
        Tile t = {panel, later, x, first, y_stride, y + first * y_stride, bias, inputs, width};
        compute_tile(&t, kind, tile > 1, tile_rows(end - first), end - first);
        first = end;
    }
}

/* Part `part` of `parts` of a product; y is (count, out) in rows of `y_stride`. `next`: what this part reads next. */
void product_part(const Product *p, const Rows *x, int count, float *y, size_t y_stride, const char *next, int part,
                  int parts)
{
    int panels = (p->out + PANEL - 1) / PANEL;
    int first = (int)((int64_t)panels * part / parts), end = (int)((int64_t)panels * (part + 1) / parts);
    size_t bytes = panel_bytes(p->in, p->kind);
    for (int i = first; i < end; i++) {
        int at = i * PANEL, width = p->out - at < PANEL ? p->out - at : PANEL;
        const char *panel = p->panels + i * bytes;
        product_panel(panel, p->kind, x, count, p->in, y + at, y_stride, width, p->bias ? p->bias + at : NULL,
                      i + 1 < end ? panel + bytes : next);
    }
}

/* The weights (in) of one output. */
void output_weights(const Product *p, int64_t output, float *to)
{
    const char *panel = p->panels + output / PANEL * panel_bytes(p->in, p->kind);
    int lane = output % PANEL;
    for (int i = 0; i < p->in; i++) {
        if (p->kind == FLOAT32) to[i] = ((const float *)panel)[(int64_t)i * PANEL + lane];
        else if (p->kind == BFLOAT16) to[i] = wide(((const uint16_t *)panel)[((int64_t)(i / 2) * PANEL + lane) * 2 + i % 2]);
        else if (p->kind == INT8) {
            int at = i % INT8_GROUP, size = INT8_GROUP * PANEL;
            const uint8_t *group = (const uint8_t *)panel + (int64_t)(i / INT8_GROUP) * (size + PANEL * 2);
            to[i] = (group[(at / 4 * PANEL + lane) * 4 + at % 4] - 128) * (float)((const _Float16 *)(group + size))[lane];
        } else {
            int at = i % INT4_GROUP, size = INT4_GROUP * PANEL / 2;
            const uint8_t *group = (const uint8_t *)panel + (int64_t)(i / INT4_GROUP) * (size + PANEL * 4);
            int both = group[(at / 8 * PANEL + lane) * 4 + at % 4], number = at % 8 < 4 ? both & 15 : both >> 4;
            const _Float16 *factors = (const _Float16 *)(group + size);
            to[i] = number * (float)factors[lane] + (float)factors[PANEL + lane];
        }
    }
}

/* The nearest whole numbers of x / scale, scale being the largest of a group over 127. */
void quantise_rows(const float *x, size_t x_stride, int count, int in, int group, int8_t *rows, size_t stride,
                   float *scales, int32_t *sums)
{
    int groups = (in + group - 1) / group;
    for (int r = 0; r < count; r++)
        for (int g = 0; g < groups; g++) {
            const float *from = x + r * x_stride + g * group;
            int8_t *to = rows + r * stride + g * group;
            int size = in - g * group < group ? in - g * group : group;
            V all[INT8_GROUP / LANES] = {0}, largest = {0};
            memcpy(all, from, size * sizeof(float));
            for (int j = 0; j < INT8_GROUP / LANES; j++) {
                V positive = (V)((W)all[j] & 0x7fffffff);
                largest = pick((W)(positive > largest), positive, largest);
            }
            float top = 0;
            for (int j = 0; j < LANES; j++) top = largest[j] > top ? largest[j] : top;
            float scale = top / 127, by = top > 0 ? 127 / top : 0;
            I sum = {0};
            for (int j = 0; j < group / LANES; j++) {
                V near = all[j] * by + 12582912.0f; /* the sum's last bits are the nearest whole number */
                I whole = (I)near - 0x4b400000;
                sum += whole;
                typedef int8_t B __attribute__((vector_size(16)));
                B bytes = __builtin_convertvector(whole, B);
                memcpy(to + j * LANES, &bytes, sizeof bytes);
            }
            int32_t plain = 0;
            for (int j = 0; j < LANES; j++) plain += sum[j];
            scales[r * groups + g] = scale;
            sums[r * groups + g] = plain;
        }
}
