/* The vector operations the kernels are written in, for one instruction set chosen at compile time.
 *
 * Every file here is compiled once per instruction set; NAME(f) gives each copy its own symbol. `vf` is VL floats.
 * Results may differ between instruction sets in the last bits, never between runs, threads or batches on one.
 */
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#define PASTE_(a, b) a##_##b
#define PASTE(a, b) PASTE_(a, b)
#define NAME(f) PASTE(f, ISA)
#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

enum { F32 = 0, F16 = 1, BF16 = 2, I8 = 3 }; /* how a tensor is stored */

INLINE float half_to_float(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, magnitude = h & 0x7fff, bits;
    float f;
    if (magnitude >= 0x7c00) {
        bits = sign | 0x7f800000 | (magnitude & 0x3ff) << 13;
    } else if (magnitude >= 0x400) {
        bits = sign | ((magnitude << 13) + 0x38000000);
    } else { /* subnormal: a multiple of 2^-24 */
        f = (float)magnitude * 5.9604644775390625e-8f;
        return sign ? -f : f;
    }
    memcpy(&f, &bits, 4);
    return f;
}

INLINE uint16_t float_to_half(float f) { /* round to nearest even; too large becomes infinity */
    uint32_t bits, magnitude, sign;
    memcpy(&bits, &f, 4);
    sign = bits >> 16 & 0x8000;
    magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return (uint16_t)(sign | 0x7e00);
    if (magnitude >= 0x477ff000) return (uint16_t)(sign | 0x7c00);
    if (magnitude < 0x38800000) { /* subnormal: let the float adder round */
        float scaled;
        uint32_t magic = 0x3f000000, out;
        float base, sum;
        memcpy(&scaled, &magnitude, 4);
        memcpy(&base, &magic, 4);
        sum = scaled + base;
        memcpy(&out, &sum, 4);
        return (uint16_t)(sign | (out - magic));
    }
    return (uint16_t)(sign | ((magnitude + 0xfff + (magnitude >> 13 & 1) - 0x38000000) >> 13));
}

INLINE float bf16_to_float(uint16_t h) {
    uint32_t bits = (uint32_t)h << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

INLINE uint16_t float_to_bf16(float f) { /* round to nearest even */
    uint32_t bits;
    memcpy(&bits, &f, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>
#define VL 16
typedef __m512 vf;
INLINE vf load(const float *p) { return _mm512_loadu_ps(p); }
INLINE void store(float *p, vf a) { _mm512_storeu_ps(p, a); }
INLINE vf splat(float a) { return _mm512_set1_ps(a); }
INLINE vf fma_(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
INLINE vf mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
INLINE vf add(vf a, vf b) { return _mm512_add_ps(a, b); }
INLINE vf sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
INLINE vf div_(vf a, vf b) { return _mm512_div_ps(a, b); }
INLINE vf max_(vf a, vf b) { return _mm512_max_ps(a, b); }
INLINE vf min_(vf a, vf b) { return _mm512_min_ps(a, b); }
INLINE vf abs_(vf a) { return _mm512_abs_ps(a); }
INLINE float sum(vf a) { return _mm512_reduce_add_ps(a); }
INLINE float largest(vf a) { return _mm512_reduce_max_ps(a); }
INLINE vf round_(vf a) { return _mm512_roundscale_ps(a, 8); }
INLINE vf power_of_two(vf n) { return _mm512_scalef_ps(splat(1.0f), n); }
INLINE vf zero_below(vf x, float bound, vf y) { /* y, but 0 where x < bound */
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, splat(bound), _CMP_GE_OQ), y);
}
INLINE vf load_f16(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
INLINE vf load_bf16(const uint16_t *p) {
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
}
INLINE vf load_i8(const int8_t *p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
}
INLINE void transpose(vf a[VL]) {
    vf b[VL];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) { /* a[i + 2 j], a[i + 2 j + 1]: numbers 2 j, 2 j + 1 of rows i to i + 3, by lanes */
            const __m512d low = _mm512_castps_pd(b[i + j]), high = _mm512_castps_pd(b[i + j + 2]);
            a[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
            a[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
        }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        b[i] = _mm512_shuffle_f32x4(a[i], a[i + 4], 0x88);
        b[i + 4] = _mm512_shuffle_f32x4(a[i], a[i + 4], 0xdd);
        b[i + 8] = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0x88);
        b[i + 12] = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0xdd);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        a[i] = _mm512_shuffle_f32x4(b[i], b[i + 8], 0x88);
        a[i + 8] = _mm512_shuffle_f32x4(b[i], b[i + 8], 0xdd);
    }
}
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>
#define VL 8
typedef __m256 vf;
INLINE vf load(const float *p) { return _mm256_loadu_ps(p); }
INLINE void store(float *p, vf a) { _mm256_storeu_ps(p, a); }
INLINE vf splat(float a) { return _mm256_set1_ps(a); }
INLINE vf fma_(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
INLINE vf mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
INLINE vf add(vf a, vf b) { return _mm256_add_ps(a, b); }
INLINE vf sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
INLINE vf div_(vf a, vf b) { return _mm256_div_ps(a, b); }
INLINE vf max_(vf a, vf b) { return _mm256_max_ps(a, b); }
INLINE vf min_(vf a, vf b) { return _mm256_min_ps(a, b); }
INLINE vf abs_(vf a) { return _mm256_andnot_ps(splat(-0.0f), a); }
INLINE float sum(vf a) {
    __m128 h = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    h = _mm_add_ps(h, _mm_movehl_ps(h, h));
    return _mm_cvtss_f32(_mm_add_ss(h, _mm_movehdup_ps(h)));
}
INLINE float largest(vf a) {
    __m128 h = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    h = _mm_max_ps(h, _mm_movehl_ps(h, h));
    return _mm_cvtss_f32(_mm_max_ss(h, _mm_movehdup_ps(h)));
}
INLINE vf round_(vf a) { return _mm256_round_ps(a, 8); }
INLINE vf power_of_two(vf n) {
    __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23));
}
INLINE vf zero_below(vf x, float bound, vf y) { return _mm256_and_ps(_mm256_cmp_ps(x, splat(bound), _CMP_GE_OQ), y); }
INLINE vf load_f16(const uint16_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
INLINE vf load_bf16(const uint16_t *p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16));
}
INLINE vf load_i8(const int8_t *p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
}
INLINE void transpose(vf a[VL]) {
    vf b[VL];
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
        b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4)
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) {
            const __m256d low = _mm256_castps_pd(b[i + j]), high = _mm256_castps_pd(b[i + j + 2]);
            a[i + 2 * j] = _mm256_castpd_ps(_mm256_unpacklo_pd(low, high));
            a[i + 2 * j + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(low, high));
        }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        b[i] = _mm256_permute2f128_ps(a[i], a[i + 4], 0x20);
        b[i + 4] = _mm256_permute2f128_ps(a[i], a[i + 4], 0x31);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) a[i] = b[i];
}
#else
#define VL 4 /* plain C in vectors of four, which any compiler maps to what it has */
typedef struct { float at[VL]; } vf;
#define EACH for (int i = 0; i < VL; i++)
INLINE vf load(const float *p) { vf r; memcpy(&r, p, sizeof r); return r; }
INLINE void store(float *p, vf a) { memcpy(p, &a, sizeof a); }
INLINE vf splat(float a) { vf r; EACH r.at[i] = a; return r; }
INLINE vf fma_(vf a, vf b, vf c) { EACH c.at[i] += a.at[i] * b.at[i]; return c; }
INLINE vf mul(vf a, vf b) { EACH a.at[i] *= b.at[i]; return a; }
INLINE vf add(vf a, vf b) { EACH a.at[i] += b.at[i]; return a; }
INLINE vf sub(vf a, vf b) { EACH a.at[i] -= b.at[i]; return a; }
INLINE vf div_(vf a, vf b) { EACH a.at[i] /= b.at[i]; return a; }
INLINE vf max_(vf a, vf b) { EACH a.at[i] = a.at[i] > b.at[i] ? a.at[i] : b.at[i]; return a; }
INLINE vf min_(vf a, vf b) { EACH a.at[i] = a.at[i] < b.at[i] ? a.at[i] : b.at[i]; return a; }
INLINE vf abs_(vf a) { EACH a.at[i] = fabsf(a.at[i]); return a; }
INLINE float sum(vf a) { return (a.at[0] + a.at[2]) + (a.at[1] + a.at[3]); }
INLINE float largest(vf a) { return fmaxf(fmaxf(a.at[0], a.at[1]), fmaxf(a.at[2], a.at[3])); }
INLINE vf round_(vf a) { EACH a.at[i] = rintf(a.at[i]); return a; }
INLINE vf power_of_two(vf n) {
    EACH {
        int32_t bits = ((int32_t)n.at[i] + 127) << 23;
        memcpy(&n.at[i], &bits, 4);
    }
    return n;
}
INLINE vf zero_below(vf x, float bound, vf y) { EACH y.at[i] = x.at[i] >= bound ? y.at[i] : 0.0f; return y; }
INLINE vf load_f16(const uint16_t *p) { vf r; EACH r.at[i] = half_to_float(p[i]); return r; }
INLINE vf load_bf16(const uint16_t *p) { vf r; EACH r.at[i] = bf16_to_float(p[i]); return r; }
INLINE vf load_i8(const int8_t *p) { vf r; EACH r.at[i] = p[i]; return r; }
INLINE void transpose(vf a[VL]) {
    vf b[VL];
    for (int j = 0; j < VL; j++) EACH b[j].at[i] = a[i].at[j];
    memcpy(a, b, sizeof b);
}
#endif

/* e^x within 2 units in the last place; exactly 0 below -87. Cephes' polynomial on [-ln 2 / 2, ln 2 / 2]. */
INLINE vf exp_(vf x) {
    vf y = min_(max_(x, splat(-87.0f)), splat(88.0f));
    vf n = round_(mul(y, splat(1.44269504088896341f)));
    vf r = fma_(n, splat(-0.693359375f), y);
    r = fma_(n, splat(2.12194440e-4f), r);
    vf p = splat(1.9875691500e-4f);
    p = fma_(p, r, splat(1.3981999507e-3f));
    p = fma_(p, r, splat(8.3334519073e-3f));
    p = fma_(p, r, splat(4.1665795894e-2f));
    p = fma_(p, r, splat(1.6666665459e-1f));
    p = fma_(p, r, splat(5.0000001201e-1f));
    p = add(fma_(mul(p, r), r, r), splat(1.0f));
    return zero_below(x, -87.0f, mul(p, power_of_two(n)));
}

/* to[i][r] = factor * row[r][i], for at most VL rows of k numbers: as a tile of a product reads them. */
static void interleave(const float *const *row, int rows, int64_t k, float factor, float *to) {
    int64_t i = 0;
    for (; i + VL <= k; i += VL) {
        vf square[VL];
        for (int r = 0; r < rows; r++) square[r] = mul(load(row[r] + i), splat(factor));
        for (int r = rows; r < VL; r++) square[r] = splat(0.0f);
        transpose(square);
        for (int j = 0; j < VL; j++) {
            float *at = to + (i + j) * rows;
            if ((i + j) * rows + VL <= k * rows) { /* what it writes past its own is written again by the next */
                store(at, square[j]);
            } else {
                float last[VL];
                store(last, square[j]);
                memcpy(at, last, rows * sizeof(float));
            }
        }
    }
    for (; i < k; i++)
        for (int r = 0; r < rows; r++) to[i * rows + r] = row[r][i] * factor;
}

/* VL stored values as floats; `type` is a constant wherever this is inlined. */
INLINE vf load_as(int type, const void *base, int64_t i) {
    switch (type) {
    case F16: return load_f16((const uint16_t *)base + i);
    case BF16: return load_bf16((const uint16_t *)base + i);
    case I8: return load_i8((const int8_t *)base + i);
    default: return load((const float *)base + i);
    }
}

INLINE float value_as(int type, const void *base, int64_t i) {
    switch (type) {
    case F16: return half_to_float(((const uint16_t *)base)[i]);
    case BF16: return bf16_to_float(((const uint16_t *)base)[i]);
    case I8: return ((const int8_t *)base)[i];
    default: return ((const float *)base)[i];
    }
}
