// Every product against a naive one, with buffers that end where their contents do: built with sanitizers and run by a test.

#include "../llmprune/formats/kernels/cpu/masked.cpp"

#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

namespace {

std::mt19937 generator(1);

double uniform() { return generator() / 4294967296.0; }

template <class T>
T* exact(const std::vector<T>& from) {  // a heap block of just that size
    T* out = (T*)malloc(from.size() * sizeof(T));
    if (!from.empty()) memcpy((void*)out, from.data(), from.size() * sizeof(T));
    return out;
}

bool check(int kind, bool half, int64_t rows, int64_t columns, int64_t group, double density, int64_t tokens, int level) {
    const int64_t strips = (rows + 7) / 8, chunks = (columns + 63) / 64;
    std::vector<double> w(rows * columns, 0);
    std::vector<uint64_t> mask(strips * chunks * 8, 0);
    std::vector<uint8_t> values;
    std::vector<int64_t> starts(1, 0);
    std::vector<uint8_t> scale;
    std::vector<float> scales(group ? rows * (columns / group) : 0);
    auto number = [](std::vector<uint8_t>& to, float f, bool narrowed) {
        uint16_t h = narrow(f);
        const uint8_t* from = narrowed ? (const uint8_t*)&h : (const uint8_t*)&f;
        to.insert(to.end(), from, from + (narrowed ? 2 : 4));
    };
    for (auto& one : scales) number(scale, one = widen(narrow(.5f + (float)uniform())), half);
    int64_t count = 0;
    for (int64_t s = 0; s < strips; s++) {
        for (int64_t c = 0; c < chunks; c++)
            for (int r = 0; r < 8; r++) {
                std::vector<int> codes;
                for (int b = 0; b < 64; b++) {
                    int64_t row = 8 * s + r, column = 64 * c + b;
                    if (row >= rows || column >= columns || uniform() >= density) continue;
                    mask[(s * chunks + c) * 8 + r] |= 1ull << b;
                    double& own = w[row * columns + column];
                    if (kind <= FP32) {
                        float f = widen(narrow((float)uniform() - .5f));
                        number(values, f, kind == BF16);
                        own = f;
                    } else {
                        int code = (int)(generator() % (kind == INT8 ? 256 : 16)) - (kind == INT8 ? 128 : 8);
                        codes.push_back(code);
                        own = code * (double)scales[row * (columns / group) + column / group];
                        if (half) own = widen(narrow((float)own));
                    }
                    count++;
                }
                for (size_t i = 0; i < codes.size(); i += kind == INT8 ? 1 : 2) {
                    int second = i + 1 < codes.size() ? codes[i + 1] : 0;
                    values.push_back(kind == INT8 ? (uint8_t)codes[i] : (uint8_t)((codes[i] + 8) | (second + 8) << 4));
                }
            }
        starts.push_back(kind <= FP32 ? count : (int64_t)values.size());
    }
    std::vector<uint8_t> x, bias;
    std::vector<double> numbers, biases;
    for (int64_t i = 0; i < tokens * columns; i++) numbers.push_back(widen(narrow((float)uniform() - .5f))), number(x, numbers[i], half);
    for (int64_t i = 0; i < rows; i++) biases.push_back(widen(narrow((float)uniform()))), number(bias, biases[i], half);
    const int64_t size = half ? 2 : 4;
    auto *m = exact(mask);
    auto *v = exact(values), *sc = exact(scale), *xs = exact(x), *bs = exact(bias);
    auto* st = exact(starts);
    uint8_t *y = (uint8_t*)malloc(tokens * rows * size), *e = (uint8_t*)malloc(rows * columns * size);
    llmprune_multiply(m, v, st, sc, bs, xs, y, rows, columns, group, tokens, kind, half, level, nullptr, 1);
    llmprune_expand(m, v, st, sc, e, rows, columns, group, kind, half, level, nullptr, 1);
    bool good = true;
    for (int64_t i = 0; i < rows * columns; i++) good &= ::number(e, i, half) == (half ? widen(narrow((float)w[i])) : (float)w[i]);
    for (int64_t k = 0; k < tokens; k++)
        for (int64_t r = 0; r < rows; r++) {
            double sum = biases[r], whole = fabs(sum);
            for (int64_t c = 0; c < columns; c++) {
                sum += numbers[k * columns + c] * w[r * columns + c];
                whole += fabs(numbers[k * columns + c] * w[r * columns + c]);
            }
            good &= fabs(::number(y, k * rows + r, half) - sum) <= (half ? 8e-3 : 1e-5) * whole;
        }
    for (void* one : {(void*)m, (void*)v, (void*)sc, (void*)xs, (void*)bs, (void*)st, (void*)y, (void*)e}) free(one);
    if (!good) printf("kind %d half %d %ldx%ld density %g tokens %ld level %d\n", kind, half, rows, columns, density, tokens, level);
    return good;
}

}  // namespace

int main() {
    bool good = true;
    int64_t shapes[][3] = {{1, 1, 0}, {9, 65, 0}, {16, 128, 64}, {24, 192, 64}, {33, 256, 128}, {130, 64, 64}};
    for (int level = 0; level <= llmprune_level(); level++)
        for (auto& shape : shapes)
            for (int kind = shape[2] ? 0 : BF16; kind <= (shape[2] ? INT4 : FP32); kind++)
                for (double density : {0., .1, .5, 1.})
                    for (int64_t tokens : {1, 2, 3, 16, 17, 40})
                        for (int half = kind == BF16; half <= (kind != FP32); half++)
                            good &= check(kind, half, shape[0], shape[1], shape[2], density, tokens, level);
    puts(good ? "good" : "bad");
    return !good;
}
