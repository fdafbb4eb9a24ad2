// What all products share: the task, numbers, buffers.

#pragma once

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

namespace {

constexpr int STRIP = 8, CHUNK = 64, MOST = 32;               // rows, columns, tokens
constexpr int64_t SIDE = 16, TALL = SIDE * STRIP, DEEP = 64;  // of a block for matrix units: strips, rows, chunks
enum Kind { BF16, FP32, INT8, INT4 };                         // what is stored; INT4: two codes a byte, 8 added to each
enum Level { PORTABLE, AVX2, AVX512, AMX };

struct Task {
    const uint64_t* mask;   // (strips, chunks, 8)
    const uint8_t* values;  // itemsize bytes each
    const int64_t* starts;  // (strips + 1)
    const void* scale;      // (rows, groups), of codes
    const void* bias;       // (rows) or null
    const void* x;          // (tokens, columns)
    void* y;                // (tokens, rows), or the expanded matrix (rows, columns)
    int64_t rows, columns, group, tokens;
    int64_t kind, half, level;  // half: scale, bias, x and y are bfloat16, else float32
    // set below
    int64_t strips, chunks, itemsize, groups, each, block, next;  // each: chunks a group
    const void* padded;                                           // x as the level wants it
};

inline float widen(uint16_t h) {
    uint32_t bits = (uint32_t)h << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

inline uint16_t narrow(float f) {  // to the nearest, ties to even
    uint32_t bits;
    memcpy(&bits, &f, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float number(const void* of, int64_t i, bool half) {
    return half ? widen(((const uint16_t*)of)[i]) : ((const float*)of)[i];
}

inline void put(const Task& t, int64_t token, int64_t row, float sum) {
    if (t.bias) sum += number(t.bias, row, t.half);
    int64_t i = token * t.rows + row;
    if (t.half)
        ((uint16_t*)t.y)[i] = narrow(sum);
    else
        ((float*)t.y)[i] = sum;
}

inline float scale_of(const Task& t, int64_t row, int64_t group) {
    return row < t.rows ? number(t.scale, row * t.groups + group, t.half) : 0;
}

void* scratch(int which, size_t bytes) {  // of this thread, kept; which: two of them
    static thread_local void* buffers[2];
    static thread_local size_t sizes[2];
    if (sizes[which] < bytes) {
        free(buffers[which]);
        sizes[which] = (bytes + 4095) / 4096 * 4096;
        buffers[which] = aligned_alloc(64, sizes[which]);
        if (!buffers[which]) abort();
    }
    return buffers[which];
}

inline int count(uint64_t m) { return __builtin_popcountll(m); }

inline int64_t taken(const Task& t, uint64_t m) {  // bytes of a tile's row
    int n = count(m);
    return t.kind == INT4 ? (n + 1) / 2 : n * t.itemsize;
}

inline bool coded(const Task& t) { return t.kind == INT8 || t.kind == INT4; }

inline const uint8_t* first_value(const Task& t, int64_t strip) { return t.values + t.starts[strip] * t.itemsize; }

// Whether 64 bytes may be read anywhere in a strip's values.
inline bool roomy(const Task& t, int64_t strip) { return (t.starts[t.strips] - t.starts[strip + 1]) * t.itemsize >= 64; }

}  // namespace
