/* Each token's own LoRA delta, from the adapters' weights where they lie. */
#include <stddef.h>
#include <stdint.h>

typedef struct { /* one family of one adapter: a (layers, rank, in), b (layers, rank, out), scale (layers) */
    const void *a, *b;
    const float *scale;
    const int32_t *layer_at; /* where a layer stands in a and b, -1 for nowhere; NULL when all are there in order */
    int32_t rank, in, out, column, kind;
    float factor;
} Entry;

typedef struct { /* up to TOKENS neighbouring tokens of one row, and its entries, those of one column together */
    int32_t token, count, entry, entries;
} Block;

void add_row_products_part(const Entry *entries, const Block *blocks, int count, int layer, const void *x, size_t x_stride,
                           void *y, size_t y_stride, int kind, int in, int out, int widest, int part, int parts);
