/* Products of a few or many rows with frozen weights, which lie in panels in the order in which they are read. */
#include <stddef.h>
#include <stdint.h>

#define PANEL 32       /* outputs that lie together: two vectors of float32 */
#define INT8_GROUP 64  /* inputs that share a scale */
#define INT4_GROUP 32

/* How weights are kept, beside FLOAT32 and BFLOAT16 of lanes.h. */
enum { INT8 = 3, INT4 = 4 };

typedef struct { /* y = x W^T + bias */
    const char *panels;
    const float *bias; /* (out), or NULL */
    int32_t in, out, kind;
} Product;

typedef struct { /* rows as a product reads them, `stride` numbers apart; what is beyond `in` up to it is zero */
    const void *rows;     /* float32, bfloat16 or int8, as the weights are kept */
    const float *scales;  /* int8: of each group of each row */
    const int32_t *sums;  /* int8: the sum of each group of each row */
    size_t stride, groups;
} Rows;

size_t padded_inputs(int in, int kind);
size_t panel_bytes(int in, int kind);
size_t packed_bytes(int in, int out, int kind);
int group_of(int kind);
void quantise_rows(const float *x, size_t x_stride, int count, int in, int group, int8_t *rows, size_t stride,
                   float *scales, int32_t *sums);
void product_part(const Product *p, const Rows *x, int count, float *y, size_t y_stride, const char *next, int part,
                  int parts);
void product_panel(const char *panel, int kind, const Rows *x, int count, int in, float *y, size_t y_stride, int width,
                   const float *bias, const char *next);
void output_weights(const Product *p, int64_t output, float *to);
