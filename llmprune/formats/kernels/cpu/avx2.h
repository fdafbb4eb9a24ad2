// AVX2: eight values at a time, spread by a table.

#pragma once

#include <immintrin.h>

#include "plain.h"

namespace {

struct Spread {  // of each byte of a mask, where its eight lanes take their values from
    alignas(32) uint32_t lanes[256][8];
    Spread() {
        for (int m = 0; m < 256; m++)
            for (int b = 0, i = 0; b < 8; b++) lanes[m][b] = m >> b & 1 ? i++ : 0;
    }
};
const Spread SPREAD;

#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi,bmi2,popcnt,lzcnt")

// Eight values from the first that is left; `safe`: as many bytes as that takes may be read.
inline __m256 eight(const Task& t, const uint8_t* p, int at, int n, bool safe, __m256 scale) {
    uint8_t own[32];
    if (t.kind == BF16 || t.kind == FP32) {
        const uint8_t* q = p + at * t.itemsize;
        if (!safe) q = (const uint8_t*)memcpy(own, q, n * t.itemsize);
        if (t.kind == FP32) return _mm256_loadu_ps((const float*)q);
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)q)), 16));
    }
    uint64_t bytes = 0;
    if (t.kind == INT8) {
        memcpy(&bytes, p + at, safe ? 8 : n);
    } else if (n) {
        memcpy(&bytes, p + at / 2, safe ? 5 : (at % 2 + n + 1) / 2);
        bytes = _pdep_u64(bytes >> (4 * (at % 2)), 0x0f0f0f0f0f0f0f0full);
    }
    __m256i codes = _mm256_cvtepi8_epi32(_mm_cvtsi64_si128((long long)bytes));
    if (t.kind == INT4) codes = _mm256_sub_epi32(codes, _mm256_set1_epi32(8));
    return _mm256_mul_ps(_mm256_cvtepi32_ps(codes), scale);
}

inline const uint8_t* decode_avx2(const Task& t, uint64_t m, const uint8_t* p, bool safe, float scale, float* out) {
    const uint8_t* next = p + taken(t, m);
    __m256 s = _mm256_set1_ps(scale);
    for (int i = 0, at = 0; i < 8; i++, m >>= 8) {
        unsigned byte = m & 255;
        int n = _mm_popcnt_u32(byte);
        __m256 held = eight(t, p, at, n, safe, s);
        __m256 spread = _mm256_permutevar8x32_ps(held, _mm256_load_si256((const __m256i*)SPREAD.lanes[byte]));
        const __m256i bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
        __m256i lanes = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32((int)byte), bits), bits);
        _mm256_store_ps(out + 8 * i, _mm256_and_ps(spread, _mm256_castsi256_ps(lanes)));
        at += n;
    }
    return next;
}

void strip_avx2(const Task& t, int64_t strip) {
    alignas(32) float w[CHUNK];
    auto sums = (__m256(*)[MOST])scratch(0, sizeof(__m256) * STRIP * MOST);
    memset((void*)sums, 0, sizeof(__m256) * STRIP * MOST);
    const uint8_t* p = first_value(t, strip);
    const float* x = (const float*)t.padded;
    bool safe = roomy(t, strip);
    for (int64_t c = 0; c < t.chunks; c++)
        for (int r = 0; r < STRIP; r++) {
            uint64_t m = t.mask[(strip * t.chunks + c) * STRIP + r];
            p = decode_avx2(t, m, p, safe, coded(t) ? scale_of(t, strip * STRIP + r, c / t.each) : 1, w);
            for (int64_t k = 0; k < t.tokens; k++) {
                const float* own = x + (k * t.chunks + c) * CHUNK;
                __m256 a = sums[r][k], b = _mm256_setzero_ps();
                for (int i = 0; i < CHUNK; i += 16) {
                    a = _mm256_fmadd_ps(_mm256_load_ps(w + i), _mm256_loadu_ps(own + i), a);
                    b = _mm256_fmadd_ps(_mm256_load_ps(w + i + 8), _mm256_loadu_ps(own + i + 8), b);
                }
                sums[r][k] = _mm256_add_ps(a, b);
            }
        }
    for (int r = 0; r < STRIP && strip * STRIP + r < t.rows; r++)
        for (int64_t k = 0; k < t.tokens; k++) {
            alignas(32) float lanes[8];
            _mm256_store_ps(lanes, sums[r][k]);
            float sum = 0;
            for (int j = 0; j < 8; j++) sum += lanes[j];
            put(t, k, strip * STRIP + r, sum);
        }
}

void expand_avx2(const Task& t, int64_t strip) {
    alignas(32) float w[CHUNK];
    const uint8_t* p = first_value(t, strip);
    bool safe = roomy(t, strip);
    for (int64_t c = 0; c < t.chunks; c++)
        for (int r = 0; r < STRIP; r++) {
            int64_t row = strip * STRIP + r;
            uint64_t m = t.mask[(strip * t.chunks + c) * STRIP + r];
            p = decode_avx2(t, m, p, safe, coded(t) ? scale_of(t, row, c / t.each) : 1, w);
            if (row < t.rows) store_row(t, row, c, w);
        }
}

#pragma GCC pop_options

}  // namespace
