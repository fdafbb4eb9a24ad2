// A dense product of the same make as llmprune's sparse ones, for scripts/bench_cpu.py: one token, bfloat16, 8 rows at a time.

#include <immintrin.h>
#include <stdint.h>

namespace {

struct Task {
    const uint16_t *w, *x;
    float* y;
    int64_t rows, columns, next;
};

void work(void* argument) {
    Task& t = *(Task*)argument;
    for (;;) {
        int64_t first = __atomic_fetch_add(&t.next, 64, __ATOMIC_RELAXED);
        if (first >= t.rows) return;
        for (int64_t r = first; r < first + 64; r += 8) {  // tiles of 8 rows by 64 columns, as the sparse layout has them
            const uint16_t* p = t.w + r * t.columns;
            __m512 sums[8];
            for (auto& sum : sums) sum = _mm512_setzero_ps();
            for (int64_t c = 0; c < t.columns; c += 64) {
                __m512bh low = (__m512bh)_mm512_loadu_si512(t.x + c), high = (__m512bh)_mm512_loadu_si512(t.x + c + 32);
#pragma GCC unroll 8
                for (int i = 0; i < 8; i++, p += 64) {
                    _mm_prefetch((const char*)p + 8192, _MM_HINT_T1);
                    _mm_prefetch((const char*)p + 8256, _MM_HINT_T1);
                    sums[i] = _mm512_dpbf16_ps(sums[i], (__m512bh)_mm512_loadu_si512(p), low);
                    sums[i] = _mm512_dpbf16_ps(sums[i], (__m512bh)_mm512_loadu_si512(p + 32), high);
                }
            }
            for (int i = 0; i < 8; i++) t.y[r + i] = _mm512_reduce_add_ps(sums[i]);
        }
    }
}

}  // namespace

extern "C" void multiply(const void* w, const void* x, void* y, int64_t rows, int64_t columns, void* parallel, int64_t threads) {
    Task t = {(const uint16_t*)w, (const uint16_t*)x, (float*)y, rows, columns, 0};
    if (threads > 1)
        ((void (*)(void (*)(void*), void*, unsigned, unsigned))parallel)(work, &t, (unsigned)threads, 0);
    else
        work(&t);
}
