/* Numbers as the compiled passes read and write them: bfloat16 and float16 widened to float32, sixteen at a time. */
#include <stdint.h>
#include <string.h>

enum { FLOAT32, BFLOAT16, FLOAT16 };

static inline float wide(uint16_t bits)
{
    uint32_t word = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &word, 4);
    return value;
}

static inline uint16_t narrow(float value)
{
    uint32_t word;
    memcpy(&word, &value, 4);
    if ((word & 0x7fffffff) > 0x7f800000) return 0x7fc0; /* not a number stays one */
    return (uint16_t)((word + 0x7fff + ((word >> 16) & 1)) >> 16);
}

/* Sixteen numbers at a time, in what the compiler makes of it on this processor. */
#define LANES 16
#define ALWAYS static inline __attribute__((always_inline))
typedef float V __attribute__((vector_size(64)));
typedef uint32_t W __attribute__((vector_size(64)));
typedef uint16_t H __attribute__((vector_size(32)));
typedef _Float16 F __attribute__((vector_size(32)));

static inline V many_f32(const float *p)
{
    V v;
    memcpy(&v, p, sizeof v);
    return v;
}

static inline V many_bf16(const uint16_t *p)
{
    H h;
    memcpy(&h, p, sizeof h);
    return (V)(__builtin_convertvector(h, W) << 16);
}

static inline V many_f16(const _Float16 *p)
{
    F h;
    memcpy(&h, p, sizeof h);
    return __builtin_convertvector(h, V);
}

static inline void put_f32(float *p, V v) { memcpy(p, &v, sizeof v); }

static inline float one_f32(float value) { return value; }
static inline float one_bf16(uint16_t bits) { return wide(bits); }
static inline float one_f16(_Float16 value) { return (float)value; }

#ifdef __has_builtin
#if __has_builtin(__builtin_shufflevector)
#define HAS_SHUFFLE
#endif
#endif

/* The sum of all lanes, by halves: one after another each addition would wait for the one before. */
static inline float total(V v)
{
#ifdef HAS_SHUFFLE
    typedef float V8 __attribute__((vector_size(32)));
    typedef float V4 __attribute__((vector_size(16)));
    V8 eight = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) + __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
    V4 four = __builtin_shufflevector(eight, eight, 0, 1, 2, 3) + __builtin_shufflevector(eight, eight, 4, 5, 6, 7);
    return (four[0] + four[1]) + (four[2] + four[3]);
#else
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += v[i];
    return sum;
#endif
}

static inline V pick(W where, V one, V other) { return (V)((where & (W)one) | (~where & (W)other)); }

/* Of numbers that are float32 or bfloat16; `kind` is a constant wherever these are called. */
ALWAYS int64_t size_of(int kind) { return kind == FLOAT32 ? 4 : 2; }

ALWAYS V some(const char *at, int kind)
{
    return kind == FLOAT32 ? many_f32((const float *)at) : many_bf16((const uint16_t *)at);
}

ALWAYS float one(const char *at, int kind)
{
    return kind == FLOAT32 ? *(const float *)at : wide(*(const uint16_t *)at);
}

ALWAYS void put(char *at, float value, int kind)
{
    if (kind == FLOAT32) *(float *)at = value;
    else *(uint16_t *)at = narrow(value);
}

/* e^x for x <= 0, within about a unit in the last place of float32: 2^n times a polynomial of the rest. */
static inline V exponential(V x)
{
    const V lowest = (V){0} - 87.0f;
    x = pick((W)(x < lowest), lowest, x);
    V shifted = x * 1.44269504f + 12582912.0f; /* 1.5 * 2^23: the sum's last bits are the nearest whole number */
    V n = shifted - 12582912.0f;
    V r = x - n * 0.693359375f + n * 2.12194440e-4f;
    V p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    W power = ((W)shifted - 0x4b400000u) << 23;
    return pick((W)(x == x), (V)((W)p + power), x); /* what is not a number stays so */
}

/* Rounded to nearest, ties to even, as `narrow`. */
static inline void put_bf16(uint16_t *p, V v)
{
    W w = (W)v, odd = (w >> 16) & 1, sum = (w + 0x7fff + odd) >> 16;
    W number = (W)((w & 0x7fffffff) <= 0x7f800000);
    H h = __builtin_convertvector((sum & number) | (0x7fc0 & ~number), H);
    memcpy(p, &h, sizeof h);
}

ALWAYS void put_some(char *at, V v, int kind)
{
    if (kind == FLOAT32) put_f32((float *)at, v);
    else put_bf16((uint16_t *)at, v);
}
