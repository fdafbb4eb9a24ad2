// Products with sparse matrices that are stored as a mask and what is not zero, on CPUs. bitmask.py has the layout.
//
// A strip of 8 rows is computed by one thread, always in the same order: results do not depend on how many threads there are.
// For one or two tokens weights are expanded in registers; for more, a strip is expanded into a buffer that stays in the cache,
// and multiplied there, by matrix units where the CPU has them. Sums are float32. No Python and no torch is needed to build it.

#include "plain.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include "amx.h"
#include "avx2.h"
#define X86 1
#endif

namespace {

int best() {
    static int found = -1;
    if (found >= 0) return found;
    int level = PORTABLE;
#ifdef X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) level = AVX2;
    if (level == AVX2 && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512bf16"))
        level = AVX512;
    unsigned a = 7, b = 0, c = 0, d = 0;
    __asm__("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
    if (level == AVX512 && (d >> 22 & 1) && (d >> 24 & 1) && amx_allowed()) level = AMX;
#endif
    return found = level;
}

int level_of(const Task& t) { return t.level < 0 || t.level > best() ? best() : (int)t.level; }

bool tiled(const Task& t) { return level_of(t) == AMX && t.half && t.tokens > (t.kind == BF16 ? 2 : 1); }

void work(void* argument, bool expand) {
    Task& t = *(Task*)argument;
    const bool tiles = !expand && tiled(t), few = t.tokens <= MOST;
    const int64_t step = !tiles ? 1 : few ? 2 : SIDE;
#ifdef X86
    if (tiles) begin_tiles();
#endif
    for (;;) {
        int64_t first = __atomic_fetch_add(&t.next, t.block, __ATOMIC_RELAXED);
        if (first >= t.strips) break;
        int64_t last = first + t.block < t.strips ? first + t.block : t.strips;
        for (int64_t s = first; s < last; s += step) {
#ifdef X86
            if (tiles)
                few ? pair_amx(t, s) : block_amx(t, s);
            else if (t.level >= AVX512)
                expand ? expand_avx512(t, s) : strip_avx512(t, s);
            else if (t.level == AVX2)
                expand ? expand_avx2(t, s) : strip_avx2(t, s);
            else
#endif
                expand ? expand_plain(t, s) : strip_plain(t, s);
        }
    }
#ifdef X86
    if (tiles) end_tiles();
#endif
}

void multiply(void* t) { work(t, false); }
void expand(void* t) { work(t, true); }

// The tokens as the level reads them, columns padded with zeros to whole chunks.
void prepare(Task& t) {
    const int64_t wide = t.chunks * CHUNK;
    if (tiled(t)) {  // (blocks of 32 tokens, chunks, 2 halves, 1 or 2, 16 pairs of columns, 16 tokens, 2)
        const int64_t sixteens = t.tokens > 16 ? 2 : 1, blocks = (t.tokens + MOST - 1) / MOST,
                      size = blocks * sixteens * 16 * wide;
        uint32_t* out = (uint32_t*)scratch(1, size * 2);
        memset(out, 0, size * 2);
        for (int64_t k = 0; k < t.tokens; k += 16) {
            const int64_t count = t.tokens - k < 16 ? t.tokens - k : 16;
            uint32_t* own = out + k / MOST * t.chunks * 1024 + k / 16 % 2 * 256;
            const uint16_t* x = (const uint16_t*)t.x + k * t.columns;
            for (int64_t pair = 0; pair < (t.columns + 1) / 2; pair++) {
                uint32_t* place = own + (pair / 16) * 256 * sixteens + (pair % 16) * 16;
                for (int64_t i = 0; i < count; i++) {
                    const uint16_t* from = x + i * t.columns + 2 * pair;
                    place[i] = from[0] | (2 * pair + 1 < t.columns ? (uint32_t)from[1] << 16 : 0);
                }
            }
        }
        t.padded = out;
        return;
    }
    const bool halves = t.half && t.level >= AVX512 && !(t.kind == INT8 && t.tokens == 1);
    if (t.columns == wide && halves == (bool)t.half) {
        t.padded = t.x;
        return;
    }
    uint8_t* out = (uint8_t*)scratch(1, t.tokens * wide * (halves ? 2 : 4));
    memset(out, 0, t.tokens * wide * (halves ? 2 : 4));
    for (int64_t k = 0; k < t.tokens; k++) {
        if (halves || !t.half) {
            const int64_t size = halves ? 2 : 4;
            memcpy(out + k * wide * size, (const uint8_t*)t.x + k * t.columns * size, t.columns * size);
        } else {
            const uint16_t* x = (const uint16_t*)t.x + k * t.columns;
            for (int64_t i = 0; i < t.columns; i++) ((float*)out)[k * wide + i] = widen(x[i]);
        }
    }
    t.padded = out;
}

typedef void (*Parallel)(void (*)(void*), void*, unsigned, unsigned);

void run(Task& t, Parallel parallel, int64_t threads, bool expanding) {
    t.strips = (t.rows + STRIP - 1) / STRIP;
    t.chunks = (t.columns + CHUNK - 1) / CHUNK;
    t.itemsize = t.kind == BF16 ? 2 : t.kind == FP32 ? 4 : 1;
    t.groups = coded(t) ? t.columns / t.group : 1;
    t.each = coded(t) ? t.group / CHUNK : 1;
    t.level = level_of(t);
    t.next = 0;
    if (threads > t.strips) threads = t.strips;
    const int64_t step = tiled(t) && t.tokens > MOST ? SIDE : 2;  // what is computed together, whatever the threads
    t.block = (t.strips / step + 4 * threads - 1) / (4 * threads) * step;
    if (t.block < step) t.block = step;
    if (!expanding) prepare(t);
    void (*own)(void*) = expanding ? expand : multiply;
    if (parallel && threads > 1)
        parallel(own, &t, (unsigned)threads, 0);
    else
        own(&t);
}

}  // namespace

#define PUBLIC extern "C" __attribute__((visibility("default")))

// y = x W^T + bias. `parallel` is OpenMP's GOMP_parallel, or null for one thread; level: -1 for the best that the CPU has.
PUBLIC void llmprune_multiply(const void* mask, const void* values, const void* starts, const void* scale, const void* bias,
                              const void* x, void* y, int64_t rows, int64_t columns, int64_t group, int64_t tokens,
                              int64_t kind, int64_t half, int64_t level, void* parallel, int64_t threads) {
    Task t = {(const uint64_t*)mask,
              (const uint8_t*)values,
              (const int64_t*)starts,
              scale,
              bias,
              x,
              y,
              rows,
              columns,
              group,
              tokens,
              kind,
              half,
              level};
    const int64_t size = half ? 2 : 4;
    while (t.tokens > MOST && !tiled(t)) {  // as many at a time as there are sums
        Task few = t;
        few.tokens = MOST;
        run(few, (Parallel)parallel, threads, false);
        t.x = (const uint8_t*)t.x + MOST * columns * size;
        t.y = (uint8_t*)t.y + MOST * rows * size;
        t.tokens -= MOST;
    }
    run(t, (Parallel)parallel, threads, false);
}

// The matrix (rows, columns) itself.
PUBLIC void llmprune_expand(const void* mask, const void* values, const void* starts, const void* scale, void* y, int64_t rows,
                            int64_t columns, int64_t group, int64_t kind, int64_t half, int64_t level, void* parallel,
                            int64_t threads) {
    Task t = {(const uint64_t*)mask,
              (const uint8_t*)values,
              (const int64_t*)starts,
              scale,
              nullptr,
              nullptr,
              y,
              rows,
              columns,
              group,
              0,
              kind,
              half,
              level};
    run(t, (Parallel)parallel, threads, true);
}

// 0 portable, 1 AVX2, 2 AVX-512 with VBMI2 and bf16, 3 that with AMX.
PUBLIC int64_t llmprune_level() { return best(); }
