// AMX: matrix units, for several tokens in bfloat16.

#pragma once

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "avx512.h"

namespace {

#pragma GCC push_options
#pragma GCC target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")

struct alignas(64) Tiles {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
};
// not local: GCC's intrinsics do not tell it that they read memory
const Tiles TILES = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

inline void written() { __asm__ volatile("" ::: "memory"); }

// Two strips times up to 32 tokens, in bfloat16: some chunks at a time are expanded, as (chunks, 16, 64), into the first cache.
void pair_amx(const Task& t, int64_t strip) {
    const int64_t some = 8, size = 2 * STRIP * CHUNK * 2;
    alignas(64) uint8_t buffer[some * size];
    alignas(64) float sums[4][256];  // (rows, 16 tokens), of the four
    const bool both = t.tokens > 16, second = strip + 1 < t.strips;
    const uint8_t* x = (const uint8_t*)t.padded;  // (chunks, 2 halves, 1 or 2 blocks, 16 pairs of columns, 16 tokens, 2)
    const uint8_t *p = first_value(t, strip), *q = second ? first_value(t, strip + 1) : nullptr;
    if (!second) memset(buffer, 0, sizeof buffer);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t c = 0; c < t.chunks; c += some) {
        int64_t count = t.chunks - c < some ? t.chunks - c : some;
        p = decode<true>(t, strip, c, count, p, buffer, 2 * STRIP, 0);
        if (second) q = decode<true>(t, strip + 1, c, count, q, buffer, 2 * STRIP, STRIP);
        written();
        const uint8_t* w = buffer;
        if (both) {
            for (int64_t i = 0; i < count; i++, w += size, x += 4096) {
                _tile_loadd(4, w, 128);
                _tile_loadd(5, w + 64, 128);
                _tile_loadd(6, x, 64);
                _tile_dpbf16ps(0, 4, 6);
                _tile_loadd(7, x + 1024, 64);
                _tile_dpbf16ps(1, 4, 7);
                _tile_loadd(6, x + 2048, 64);
                _tile_dpbf16ps(2, 5, 6);
                _tile_loadd(7, x + 3072, 64);
                _tile_dpbf16ps(3, 5, 7);
            }
            continue;
        }
        int64_t i = 0;
        for (; i + 2 <= count; i += 2, w += 2 * size, x += 4096) {
            _tile_loadd(4, w, 128);
            _tile_loadd(6, x, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(5, w + 64, 128);
            _tile_loadd(7, x + 1024, 64);
            _tile_dpbf16ps(1, 5, 7);
            _tile_loadd(4, w + size, 128);
            _tile_loadd(6, x + 2048, 64);
            _tile_dpbf16ps(2, 4, 6);
            _tile_loadd(5, w + size + 64, 128);
            _tile_loadd(7, x + 3072, 64);
            _tile_dpbf16ps(3, 5, 7);
        }
        if (i < count) {
            _tile_loadd(4, w, 128);
            _tile_loadd(6, x, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(5, w + 64, 128);
            _tile_loadd(7, x + 1024, 64);
            _tile_dpbf16ps(1, 5, 7);
        }
    }
    _tile_stored(0, sums[0], 64);
    _tile_stored(1, sums[1], 64);
    _tile_stored(2, sums[2], 64);
    _tile_stored(3, sums[3], 64);
    for (int i = 0; i < 256; i++) {
        sums[0][i] += sums[2][i];
        sums[1][i] += sums[3][i];
        if (!both) sums[0][i] += sums[1][i];
    }
    for (int r = 0; r < 2 * STRIP && strip * STRIP + r < t.rows; r++)
        for (int64_t k = 0; k < t.tokens; k++) put(t, k, strip * STRIP + r, sums[k / 16][r * 16 + k % 16]);
}

// Sixteen strips times any number of tokens, in bfloat16: 64 chunks at a time are expanded, as (chunks, 128, 64), into the
// second cache, and all tokens meet them there, 32 at a time.
void block_amx(const Task& t, int64_t strip) {
    const int64_t tile = TALL * CHUNK * 2, blocks = (t.tokens + MOST - 1) / MOST,
                  strips = t.strips - strip < SIDE ? t.strips - strip : SIDE;
    uint8_t* w = (uint8_t*)scratch(0, DEEP * tile + blocks * MOST * TALL * 4);
    float* sums = (float*)(w + DEEP * tile);  // (blocks, 4 of 32 rows, 4 tiles, 16 rows, 16 tokens)
    const uint8_t* values[SIDE];
    for (int64_t i = 0; i < strips; i++) values[i] = first_value(t, strip + i);
    if (strips < SIDE) memset(w, 0, DEEP * tile);
    for (int64_t c = 0; c < t.chunks; c += DEEP) {
        const int64_t count = t.chunks - c < DEEP ? t.chunks - c : DEEP;
        for (int64_t i = 0; i < strips; i++)
            values[i] = decode<true>(t, strip + i, c, count, values[i], w, TALL, (int)i * STRIP);
        written();
        for (int64_t b = 0; b < blocks; b++)
            for (int64_t part = 0; part < TALL / 32; part++) {
                float* own = sums + (b * (TALL / 32) + part) * 1024;
                const uint8_t* x = (const uint8_t*)t.padded + (b * t.chunks + c) * 4096;
                const uint8_t* a = w + part * 32 * CHUNK * 2;
                if (c) {
                    _tile_loadd(0, own, 64);
                    _tile_loadd(1, own + 256, 64);
                    _tile_loadd(2, own + 512, 64);
                    _tile_loadd(3, own + 768, 64);
                } else {
                    _tile_zero(0);
                    _tile_zero(1);
                    _tile_zero(2);
                    _tile_zero(3);
                }
                for (int64_t i = 0; i < count; i++, a += tile, x += 4096)
                    for (int half = 0; half < 2; half++) {
                        _tile_loadd(4, a + half * 64, 128);
                        _tile_loadd(6, x + half * 2048, 64);
                        _tile_dpbf16ps(0, 4, 6);
                        _tile_loadd(7, x + half * 2048 + 1024, 64);
                        _tile_dpbf16ps(1, 4, 7);
                        _tile_loadd(5, a + half * 64 + 16 * 128, 128);
                        _tile_dpbf16ps(2, 5, 6);
                        _tile_dpbf16ps(3, 5, 7);
                    }
                _tile_stored(0, own, 64);
                _tile_stored(1, own + 256, 64);
                _tile_stored(2, own + 512, 64);
                _tile_stored(3, own + 768, 64);
            }
    }
    const __m512i step =
        _mm512_mullo_epi32(_mm512_set1_epi32(16), _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    for (int64_t r = 0; r < TALL && strip * STRIP + r < t.rows; r += 16) {
        const int64_t row = strip * STRIP + r, left = t.rows - row;
        const __mmask16 there = left < 16 ? (__mmask16)((1u << left) - 1) : (__mmask16)0xffff;
        __m512 bias = _mm512_setzero_ps();
        if (t.bias)
            bias = _mm512_castsi512_ps(
                _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, (const uint16_t*)t.bias + row)), 16));
        for (int64_t k = 0; k < t.tokens; k++) {
            const float* own =
                sums + (k / MOST * (TALL / 32) + r / 32) * 1024 + (r / 16 % 2) * 512 + (k / 16 % 2) * 256 + k % 16;
            __m512 sum = _mm512_add_ps(_mm512_i32gather_ps(step, own, 4), bias);
            _mm256_mask_storeu_epi16((uint16_t*)t.y + k * t.rows + row, there, (__m256i)_mm512_cvtneps_pbh(sum));
        }
    }
}

void begin_tiles() { _tile_loadconfig(&TILES); }

void end_tiles() { _tile_release(); }

#pragma GCC pop_options

bool amx_allowed() {  // Linux gives a process the registers when it asks
    return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
}

}  // namespace
