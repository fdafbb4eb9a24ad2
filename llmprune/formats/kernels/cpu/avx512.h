// AVX-512 with VBMI2, which expands words and bytes by a mask, and bf16.

#pragma once

#include <immintrin.h>

#include "task.h"

namespace {

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2,avx512bf16,avx2,fma,bmi,bmi2,popcnt")

// Values are read once, from memory: each row of a tile asks for as many bytes as it takes, far ahead; beyond the end is no
// fault.
template <int KIND>
inline void ahead(const uint8_t* p, const uint64_t* mask, int row) {
    if (row == 0) _mm_prefetch((const char*)mask + 4096, _MM_HINT_T1);
    if (KIND == INT8 && row % 2) return;
    if (KIND == INT4 && row % 4) return;
    _mm_prefetch((const char*)p + 8192, _MM_HINT_T1);
    if (KIND == FP32) _mm_prefetch((const char*)p + 8256, _MM_HINT_T1);
}

inline __m512i load_words(const uint8_t* p, int n, bool safe) {
    return safe ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi16(n < 32 ? (1u << n) - 1 : ~0u, p);
}

inline __m512i load_bytes(const uint8_t* p, int n, bool safe) {
    return safe ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi8(n < 64 ? (1ull << n) - 1 : ~0ull, p);
}

inline __m512 load_floats(const uint8_t* p, int n, bool safe) {
    return safe ? _mm512_loadu_ps(p) : _mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
}

// A tile's row of codes, as 64 bytes: of four bits the low halves of bytes, in two's complement.
template <bool SAFE, int KIND>
inline __m512i codes_512(uint64_t m, const uint8_t*& p) {
    int n = (int)_mm_popcnt_u64(m);
    if (KIND == INT8) {
        __m512i held = load_bytes(p, n, SAFE);
        p += n;
        return _mm512_maskz_expand_epi8(m, held);
    }
    int bytes = (n + 1) / 2;
    __m256i pairs = SAFE ? _mm256_loadu_si256((const __m256i*)p) : _mm256_maskz_loadu_epi8((__mmask32)((1ull << bytes) - 1), p);
    __m512i words = _mm512_cvtepu8_epi16(pairs);
    p += bytes;
    words = _mm512_or_si512(words, _mm512_slli_epi16(words, 4));
    return _mm512_maskz_expand_epi8(m, _mm512_ternarylogic_epi32(words, _mm512_set1_epi8(15), _mm512_set1_epi8(8), 0x6a));
}

// The sixteen values of four bits in two's complement, times the scale.
inline __m512 sixteen(float scale) {
    return _mm512_mul_ps(_mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1), _mm512_set1_ps(scale));
}

inline __m512i sixteen_halves(float scale) { return _mm512_zextsi256_si512((__m256i)_mm512_cvtneps_pbh(sixteen(scale))); }

template <int PART>
inline __m512i looked_up(__m512i codes, __m512i table) {
    return _mm512_permutexvar_epi16(_mm512_cvtepu8_epi16(_mm512_extracti64x4_epi64(codes, PART)), table);
}

template <int KIND, int PART>
inline __m512 quarter(__m512i codes) {
    __m128i own = _mm512_extracti32x4_epi32(codes, PART);
    if (KIND == INT8) return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(own));
    return _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(own), sixteen(1));
}

// A tile's row, expanded: 64 bfloat16 (HALF) or 64 floats; `table`: of four bits and HALF, the values.
template <bool SAFE, int KIND, bool HALF>
inline void decode_512(uint64_t m, const uint8_t*& p, float scale, __m512i table, void* out) {
    if (KIND == BF16) {
        int low = (int)_mm_popcnt_u32((uint32_t)m), high = (int)_mm_popcnt_u32((uint32_t)(m >> 32));
        __m512i a = _mm512_maskz_expand_epi16((__mmask32)m, load_words(p, low, SAFE));
        __m512i b = _mm512_maskz_expand_epi16((__mmask32)(m >> 32), load_words(p + 2 * low, high, SAFE));
        p += 2 * (low + high);
        _mm512_storeu_si512(out, a);
        _mm512_storeu_si512((uint8_t*)out + 64, b);
    } else if (KIND == FP32) {
        for (int i = 0; i < 4; i++) {
            __mmask16 own = (__mmask16)(m >> (16 * i));
            int n = (int)_mm_popcnt_u32(own);
            _mm512_storeu_ps((float*)out + 16 * i, _mm512_maskz_expand_ps(own, load_floats(p, n, SAFE)));
            p += 4 * n;
        }
    } else if (KIND == INT4 && HALF) {
        __m512i codes = codes_512<SAFE, KIND>(m, p);
        _mm512_storeu_si512(out, looked_up<0>(codes, table));
        _mm512_storeu_si512((uint8_t*)out + 64, looked_up<1>(codes, table));
    } else {
        __m512i codes = codes_512<SAFE, KIND>(m, p);
        __m512 s = _mm512_set1_ps(scale);
        __m512 a = _mm512_mul_ps(quarter<KIND, 0>(codes), s), b = _mm512_mul_ps(quarter<KIND, 1>(codes), s);
        __m512 c = _mm512_mul_ps(quarter<KIND, 2>(codes), s), d = _mm512_mul_ps(quarter<KIND, 3>(codes), s);
        if (HALF) {
            _mm512_storeu_si512(out, (__m512i)_mm512_cvtne2ps_pbh(b, a));
            _mm512_storeu_si512((uint8_t*)out + 64, (__m512i)_mm512_cvtne2ps_pbh(d, c));
        } else {
            _mm512_storeu_ps((float*)out, a);
            _mm512_storeu_ps((float*)out + 16, b);
            _mm512_storeu_ps((float*)out + 32, c);
            _mm512_storeu_ps((float*)out + 48, d);
        }
    }
}

// `count` chunks of a strip from `first` on, whose values begin at p, into (count, height, 64), rows from `row` on.
template <bool SAFE, int KIND, bool HALF>
const uint8_t* decode(const Task& t, int64_t strip, int64_t first, int64_t count, const uint8_t* p, uint8_t* out, int height,
                      int row) {
    const uint64_t* mask = t.mask + (strip * t.chunks + first) * STRIP;
    const int64_t size = CHUNK * (HALF ? 2 : 4);
    float scales[STRIP];
    __m512i tables[STRIP];
    int64_t group = -1;
    for (int64_t c = 0; c < count; c++) {
        uint8_t* tile = out + (c * height + row) * size;
        if (KIND >= INT8 && (first + c) / t.each != group) {
            group = (first + c) / t.each;
            for (int r = 0; r < STRIP; r++) {
                scales[r] = scale_of(t, strip * STRIP + r, group);
                tables[r] = sixteen_halves(scales[r]);
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < STRIP; r++) {
            ahead<KIND>(p, mask + c * STRIP, r);
            decode_512<SAFE, KIND, HALF>(mask[c * STRIP + r], p, scales[r], tables[r], tile + r * size);
        }
    }
    return p;
}

template <bool SAFE, bool HALF>
const uint8_t* decode(const Task& t, int64_t strip, int64_t first, int64_t count, const uint8_t* p, uint8_t* out, int height,
                      int row) {
    if (t.kind == INT8) return decode<SAFE, INT8, HALF>(t, strip, first, count, p, out, height, row);
    if (t.kind == INT4) return decode<SAFE, INT4, HALF>(t, strip, first, count, p, out, height, row);
    return decode<SAFE, HALF ? BF16 : FP32, HALF>(t, strip, first, count, p, out, height, row);
}

template <bool HALF>
const uint8_t* decode(const Task& t, int64_t strip, int64_t first, int64_t count, const uint8_t* p, uint8_t* out, int height,
                      int row) {
    return roomy(t, strip) ? decode<true, HALF>(t, strip, first, count, p, out, height, row)
                           : decode<false, HALF>(t, strip, first, count, p, out, height, row);
}

template <int M, bool SAFE>
void direct_half(const Task& t, int64_t strip) {
    const uint8_t* p = first_value(t, strip);
    const uint64_t* mask = t.mask + strip * t.chunks * STRIP;
    const uint16_t* x = (const uint16_t*)t.padded;
    __m512 sums[STRIP][M];
    for (int r = 0; r < STRIP; r++)
        for (int k = 0; k < M; k++) sums[r][k] = _mm512_setzero_ps();
    for (int64_t c = 0; c < t.chunks; c++) {
        __m512bh low[M], high[M];
        for (int k = 0; k < M; k++) {
            const uint16_t* own = x + (k * t.chunks + c) * CHUNK;
            low[k] = (__m512bh)_mm512_loadu_si512(own);
            high[k] = (__m512bh)_mm512_loadu_si512(own + 32);
        }
#pragma GCC unroll 8
        for (int r = 0; r < STRIP; r++) {
            ahead<BF16>(p, mask + c * STRIP, r);
            uint64_t m = mask[c * STRIP + r];
            int a = (int)_mm_popcnt_u32((uint32_t)m), b = (int)_mm_popcnt_u32((uint32_t)(m >> 32));
            __m512bh u = (__m512bh)_mm512_maskz_expand_epi16((__mmask32)m, load_words(p, a, SAFE));
            __m512bh v = (__m512bh)_mm512_maskz_expand_epi16((__mmask32)(m >> 32), load_words(p + 2 * a, b, SAFE));
            p += 2 * (a + b);
#pragma GCC unroll 2
            for (int k = 0; k < M; k++) {
                sums[r][k] = _mm512_dpbf16_ps(sums[r][k], u, low[k]);
                sums[r][k] = _mm512_dpbf16_ps(sums[r][k], v, high[k]);
            }
        }
    }
    for (int r = 0; r < STRIP && strip * STRIP + r < t.rows; r++)
        for (int k = 0; k < M; k++) put(t, k, strip * STRIP + r, _mm512_reduce_add_ps(sums[r][k]));
}

template <int M, bool SAFE>
void direct_floats(const Task& t, int64_t strip) {
    const uint8_t* p = first_value(t, strip);
    const uint64_t* mask = t.mask + strip * t.chunks * STRIP;
    const float* x = (const float*)t.padded;
    __m512 sums[STRIP][M];
    for (int r = 0; r < STRIP; r++)
        for (int k = 0; k < M; k++) sums[r][k] = _mm512_setzero_ps();
    for (int64_t c = 0; c < t.chunks; c++) {
#pragma GCC unroll 8
        for (int r = 0; r < STRIP; r++) {
            ahead<FP32>(p, mask + c * STRIP, r);
            uint64_t m = mask[c * STRIP + r];
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                __mmask16 own = (__mmask16)(m >> (16 * i));
                int n = (int)_mm_popcnt_u32(own);
                __m512 w = _mm512_maskz_expand_ps(own, load_floats(p, n, SAFE));
                p += 4 * n;
#pragma GCC unroll 2
                for (int k = 0; k < M; k++)
                    sums[r][k] = _mm512_fmadd_ps(w, _mm512_loadu_ps(x + (k * t.chunks + c) * CHUNK + 16 * i), sums[r][k]);
            }
        }
    }
    for (int r = 0; r < STRIP && strip * STRIP + r < t.rows; r++)
        for (int k = 0; k < M; k++) put(t, k, strip * STRIP + r, _mm512_reduce_add_ps(sums[r][k]));
}

// One token with codes of four bits in bfloat16.
template <bool SAFE>
void direct_nibbles(const Task& t, int64_t strip) {
    const uint8_t* p = first_value(t, strip);
    const uint64_t* mask = t.mask + strip * t.chunks * STRIP;
    const uint16_t* x = (const uint16_t*)t.padded;
    __m512 sums[STRIP];
    __m512i tables[STRIP];
    int64_t group = -1;
    for (int r = 0; r < STRIP; r++) sums[r] = _mm512_setzero_ps();
    for (int64_t c = 0; c < t.chunks; c++) {
        __m512bh low = (__m512bh)_mm512_loadu_si512(x + c * CHUNK), high = (__m512bh)_mm512_loadu_si512(x + c * CHUNK + 32);
        if (c / t.each != group) {
            group = c / t.each;
            for (int r = 0; r < STRIP; r++) tables[r] = sixteen_halves(scale_of(t, strip * STRIP + r, group));
        }
#pragma GCC unroll 8
        for (int r = 0; r < STRIP; r++) {
            ahead<INT4>(p, mask + c * STRIP, r);
            __m512i codes = codes_512<SAFE, INT4>(mask[c * STRIP + r], p);
            sums[r] = _mm512_dpbf16_ps(sums[r], (__m512bh)looked_up<0>(codes, tables[r]), low);
            sums[r] = _mm512_dpbf16_ps(sums[r], (__m512bh)looked_up<1>(codes, tables[r]), high);
        }
    }
    for (int r = 0; r < STRIP && strip * STRIP + r < t.rows; r++) put(t, 0, strip * STRIP + r, _mm512_reduce_add_ps(sums[r]));
}

// One token with codes, in float32: a group's sum is scaled once.
template <int KIND, bool SAFE>
void direct_codes(const Task& t, int64_t strip) {
    const uint8_t* p = first_value(t, strip);
    const uint64_t* mask = t.mask + strip * t.chunks * STRIP;
    const float* x = (const float*)t.padded;
    __m512 sums[STRIP], own[STRIP];
    for (int r = 0; r < STRIP; r++) sums[r] = own[r] = _mm512_setzero_ps();
    for (int64_t c = 0; c < t.chunks; c++) {
        __m512 a = _mm512_loadu_ps(x + c * CHUNK), b = _mm512_loadu_ps(x + c * CHUNK + 16);
        __m512 d = _mm512_loadu_ps(x + c * CHUNK + 32), e = _mm512_loadu_ps(x + c * CHUNK + 48);
#pragma GCC unroll 8
        for (int r = 0; r < STRIP; r++) {
            ahead<KIND>(p, mask + c * STRIP, r);
            __m512i codes = codes_512<SAFE, KIND>(mask[c * STRIP + r], p);
            own[r] = _mm512_fmadd_ps(quarter<KIND, 0>(codes), a, own[r]);
            own[r] = _mm512_fmadd_ps(quarter<KIND, 1>(codes), b, own[r]);
            own[r] = _mm512_fmadd_ps(quarter<KIND, 2>(codes), d, own[r]);
            own[r] = _mm512_fmadd_ps(quarter<KIND, 3>(codes), e, own[r]);
        }
        if ((c + 1) % t.each == 0)
#pragma GCC unroll 8
            for (int r = 0; r < STRIP; r++) {
                sums[r] = _mm512_fmadd_ps(own[r], _mm512_set1_ps(scale_of(t, strip * STRIP + r, c / t.each)), sums[r]);
                own[r] = _mm512_setzero_ps();
            }
    }
    for (int r = 0; r < STRIP && strip * STRIP + r < t.rows; r++) put(t, 0, strip * STRIP + r, _mm512_reduce_add_ps(sums[r]));
}

// An expanded strip (chunks, 8, 64) times M tokens from `token` on.
template <int M, bool HALF>
void dense_strip(const Task& t, int64_t strip, const uint8_t* w, int64_t token) {
    const int64_t size = HALF ? 2 : 4, lanes = HALF ? 32 : 16;
    const uint8_t* x = (const uint8_t*)t.padded + token * t.chunks * CHUNK * size;
    __m512 sums[STRIP][M];
    for (int r = 0; r < STRIP; r++)
        for (int k = 0; k < M; k++) sums[r][k] = _mm512_setzero_ps();
    for (int64_t c = 0; c < t.chunks; c++)
        for (int64_t i = 0; i < CHUNK; i += lanes) {
            __m512 own[M];
#pragma GCC unroll 3
            for (int k = 0; k < M; k++) own[k] = _mm512_loadu_ps(x + ((k * t.chunks + c) * CHUNK + i) * size);
#pragma GCC unroll 8
            for (int r = 0; r < STRIP; r++) {
                __m512 row = _mm512_loadu_ps(w + ((c * STRIP + r) * CHUNK + i) * size);
#pragma GCC unroll 3
                for (int k = 0; k < M; k++)
                    sums[r][k] = HALF ? _mm512_dpbf16_ps(sums[r][k], (__m512bh)row, (__m512bh)own[k])
                                      : _mm512_fmadd_ps(row, own[k], sums[r][k]);
            }
        }
    for (int r = 0; r < STRIP && strip * STRIP + r < t.rows; r++)
        for (int k = 0; k < M; k++) put(t, token + k, strip * STRIP + r, _mm512_reduce_add_ps(sums[r][k]));
}

template <bool HALF>
void many(const Task& t, int64_t strip) {
    uint8_t* w = (uint8_t*)scratch(0, t.chunks * STRIP * CHUNK * (HALF ? 2 : 4));
    decode<HALF>(t, strip, 0, t.chunks, first_value(t, strip), w, STRIP, 0);
    int64_t k = 0;
    for (; k + 3 <= t.tokens; k += 3) dense_strip<3, HALF>(t, strip, w, k);
    if (t.tokens - k == 2) dense_strip<2, HALF>(t, strip, w, k);
    if (t.tokens - k == 1) dense_strip<1, HALF>(t, strip, w, k);
}

template <bool SAFE>
void strip_512(const Task& t, int64_t strip) {
    bool one = t.tokens == 1, few = t.tokens <= 2;
    if (t.kind == BF16 && few) return one ? direct_half<1, SAFE>(t, strip) : direct_half<2, SAFE>(t, strip);
    if (t.kind == FP32 && few) return one ? direct_floats<1, SAFE>(t, strip) : direct_floats<2, SAFE>(t, strip);
    if (t.kind == INT8 && one) return direct_codes<INT8, SAFE>(t, strip);
    if (t.kind == INT4 && one) return t.half ? direct_nibbles<SAFE>(t, strip) : direct_codes<INT4, SAFE>(t, strip);
    t.half ? many<true>(t, strip) : many<false>(t, strip);
}

void strip_avx512(const Task& t, int64_t strip) { roomy(t, strip) ? strip_512<true>(t, strip) : strip_512<false>(t, strip); }

template <bool HALF>
void expand_512(const Task& t, int64_t strip) {
    const int64_t size = HALF ? 2 : 4;
    uint8_t* w = (uint8_t*)scratch(0, t.chunks * STRIP * CHUNK * size);
    decode<HALF>(t, strip, 0, t.chunks, first_value(t, strip), w, STRIP, 0);
    for (int r = 0; r < STRIP && strip * STRIP + r < t.rows; r++) {
        uint8_t* out = (uint8_t*)t.y + (strip * STRIP + r) * t.columns * size;
        for (int64_t c = 0; c < t.chunks; c++) {
            int64_t left = t.columns - c * CHUNK;
            memcpy(out + c * CHUNK * size, w + (c * STRIP + r) * CHUNK * size, (left < CHUNK ? left : CHUNK) * size);
        }
    }
}

void expand_avx512(const Task& t, int64_t strip) { t.half ? expand_512<true>(t, strip) : expand_512<false>(t, strip); }

#pragma GCC pop_options

}  // namespace
