// For any CPU: a row of a tile at a time as 64 floats.

#pragma once

#include "task.h"

namespace {

// A tile's row as 64 floats; returns where the next begins.
inline const uint8_t* decode_plain(const Task& t, uint64_t m, const uint8_t* p, float scale, float* out) {
    memset(out, 0, CHUNK * sizeof(float));
    const uint8_t* next = p + taken(t, m);
    for (int i = 0; m; m &= m - 1, i++) {
        float value;
        if (t.kind == BF16) {
            uint16_t h;
            memcpy(&h, p + 2 * i, 2);
            value = widen(h);
        } else if (t.kind == FP32) {
            memcpy(&value, p + 4 * i, 4);
        } else if (t.kind == INT8) {
            value = scale * (float)(int8_t)p[i];
        } else {
            value = scale * (float)((p[i / 2] >> (4 * (i & 1)) & 15) - 8);
        }
        out[__builtin_ctzll(m)] = value;
    }
    return next;
}

void strip_plain(const Task& t, int64_t strip) {
    float w[CHUNK];
    auto sums = (float (*)[MOST][8])scratch(0, sizeof(float) * STRIP * MOST * 8);
    memset(sums, 0, sizeof(float) * STRIP * MOST * 8);
    const uint8_t* p = first_value(t, strip);
    const float* x = (const float*)t.padded;
    for (int64_t c = 0; c < t.chunks; c++)
        for (int r = 0; r < STRIP; r++) {
            uint64_t m = t.mask[(strip * t.chunks + c) * STRIP + r];
            p = decode_plain(t, m, p, coded(t) ? scale_of(t, strip * STRIP + r, c / t.each) : 1, w);
            for (int64_t k = 0; k < t.tokens; k++) {
                const float* own = x + (k * t.chunks + c) * CHUNK;
                float* sum = sums[r][k];
                for (int i = 0; i < CHUNK; i += 8)
                    for (int j = 0; j < 8; j++) sum[j] += w[i + j] * own[i + j];
            }
        }
    for (int r = 0; r < STRIP && strip * STRIP + r < t.rows; r++)
        for (int64_t k = 0; k < t.tokens; k++) {
            float sum = 0;
            for (int j = 0; j < 8; j++) sum += sums[r][k][j];
            put(t, k, strip * STRIP + r, sum);
        }
}

inline void store_row(const Task& t, int64_t row, int64_t chunk, const float* w) {
    int64_t left = t.columns - chunk * CHUNK, n = left < CHUNK ? left : CHUNK, at = row * t.columns + chunk * CHUNK;
    for (int64_t i = 0; i < n; i++)
        if (t.half)
            ((uint16_t*)t.y)[at + i] = narrow(w[i]);
        else
            ((float*)t.y)[at + i] = w[i];
}

void expand_plain(const Task& t, int64_t strip) {
    float w[CHUNK];
    const uint8_t* p = first_value(t, strip);
    for (int64_t c = 0; c < t.chunks; c++)
        for (int r = 0; r < STRIP; r++) {
            int64_t row = strip * STRIP + r;
            p = decode_plain(t, t.mask[(strip * t.chunks + c) * STRIP + r], p, coded(t) ? scale_of(t, row, c / t.each) : 1, w);
            if (row < t.rows) store_row(t, row, c, w);
        }
}

}  // namespace
