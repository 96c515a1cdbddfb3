/* Attention over keys and values where they lie in the cache: of few queries a row, and of many. */
#include <stddef.h>
#include <stdint.h>

#define GROUP 4 /* of the heads that share keys, so many are computed together at most */

typedef struct { /* a query token, where its row begins in the cache, and the places of it that it sees: from, up to `to` */
    int32_t token, begin, from, to;
} Look;

typedef struct { /* strides in bytes: of q by token and head, of out by token, of the cache by place */
    const char *q, *keys, *values;
    char *out;
    int64_t q_token, q_head, out_token, key_place, value_place;
    int32_t kind, io_kind, heads, kv_heads, key_dim, value_dim; /* of the cache; of q and out */
    float scaling, softcap;                                    /* a score s becomes softcap * tanh(s / softcap); 0 for none */
} Tensors;

void attend_for(const Tensors *t, const Look *look, int kv_head, float *scores, int room);
float exponentials(float *scores, int count);

/* For rows that compute many tokens: keys and values of a head are laid out as weights of products, once a step. */
#define QUERIES 24 /* of one head, computed together */

typedef struct { /* `count` tokens of a row that begins at `begin`: from `token` of the step and place `start` of the row on */
    int32_t token, count, begin, start;
} Span;

size_t packed_head_bytes(int places, int dim, int kind);
size_t query_scratch_bytes(int places, int dim, int kind);
int first_place(const Span *s, int window);
void pack_head(const Tensors *t, const Span *s, int window, int kv_head, char *packed);
void attend_queries(const Tensors *t, const Span *s, int window, int head, int first, const char *packed, char *scratch);
