// Hot loops of the engine on a CPU: attention over the paged KV pool, linear layers, gated MLPs, RMS norm and rotary
// positions.
//
// Plain C ABI, no torch headers: native.py compiles this file in a second or two and binds it through ctypes.
// Written with the vector extensions that GCC (12 and later) and Clang share, so that one source serves AVX-512,
// AVX2 and NEON.
//
// Every row's result is computed in an order that depends on that row alone: never on how many other rows share
// the call or where the row stands among them. A sequence's fp32 logits are therefore the same bits in any batch.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 6;  // 6 x 4 accumulators, 4 weights and 1 input: 29 of 32 registers
#elif defined(__AVX2__)
constexpr int LANES = 8, ROWS = 2;  // 2 x 4 accumulators, 4 weights and 1 input: 13 of 16 registers
#else
constexpr int LANES = 4, ROWS = 4;
#endif
constexpr int COLUMNS = 4;

typedef float Vec __attribute__((vector_size(LANES * 4)));
typedef float LooseVec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef float Quad __attribute__((vector_size(16)));
typedef float LooseQuad __attribute__((vector_size(16), aligned(4), may_alias));
typedef int32_t IntVec __attribute__((vector_size(LANES * 4)));
using Lanes = std::make_integer_sequence<int, LANES>;

static inline Vec load(const float* from) { return *reinterpret_cast<const LooseVec*>(from); }
static inline void store(float* to, Vec value) { *reinterpret_cast<LooseVec*>(to) = value; }
static inline Vec splat(float value) { return value - Vec{}; }

// bfloat16 is the upper half of a float32.
static inline Vec load(const uint16_t* from) {
    uint16_t raw __attribute__((vector_size(LANES * 2)));
    std::memcpy(&raw, from, sizeof raw);
    return (Vec)(__builtin_convertvector(raw, IntVec) << 16);
}
static inline void store_element(float* to, float value) { *to = value; }
static inline void store_element(uint16_t* to, float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (value != value) { *to = 0x7fc0; return; }
    *to = static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);  // round to nearest even
}

// ---------------------------------------------------------------- shuffles

template <int... I>
static inline Vec interleave_low(Vec a, Vec b, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(a, b, (I / 2 + (I % 2) * LANES)...);
}
template <int... I>
static inline Vec interleave_high(Vec a, Vec b, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(a, b, (LANES / 2 + I / 2 + (I % 2) * LANES)...);
}
// Takes every run of WIDTH lanes of a then b, keeping the even runs (FROM = 0) or the odd ones (FROM = WIDTH).
template <int WIDTH, int FROM, int... I>
static inline Vec pick_runs(Vec a, Vec b, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(a, b, (I / WIDTH * 2 * WIDTH + FROM + I % WIDTH)...);
}
template <int DISTANCE, int... I>
static inline Vec swap_lanes(Vec a, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(a, a, (I ^ DISTANCE)...);
}
template <int N>
static inline Quad every_nth(Vec a) {
    return __builtin_shufflevector(a, a, 0, N, 2 * N, 3 * N);
}
template <int WIDTH>
static inline Vec fold(Vec a, Vec b) {
    return pick_runs<WIDTH, 0>(a, b, Lanes{}) + pick_runs<WIDTH, WIDTH>(a, b, Lanes{});
}
template <int DISTANCE>
static inline Vec add_neighbours(Vec value) {
    if constexpr (DISTANCE >= 1)
        return add_neighbours<DISTANCE / 2>(value + swap_lanes<DISTANCE>(value, Lanes{}));
    return value;
}
template <int DISTANCE>
static inline Vec max_neighbours(Vec value) {
    if constexpr (DISTANCE >= 1) {
        Vec other = swap_lanes<DISTANCE>(value, Lanes{});
        return max_neighbours<DISTANCE / 2>(value > other ? value : other);
    }
    return value;
}
static inline float sum(Vec value) { return add_neighbours<LANES / 2>(value)[0]; }
static inline float maximum(Vec value) { return max_neighbours<LANES / 2>(value)[0]; }

// Transposes LANES vectors in place: log2(LANES) perfect shuffles of the whole set.
static inline void transpose(Vec rows[LANES]) {
    for (int stage = 1; stage < LANES; stage *= 2) {
        Vec next[LANES];
        for (int i = 0; i < LANES / 2; i++) {
            next[2 * i] = interleave_low(rows[i], rows[i + LANES / 2], Lanes{});
            next[2 * i + 1] = interleave_high(rows[i], rows[i + LANES / 2], Lanes{});
        }
        for (int i = 0; i < LANES; i++) rows[i] = next[i];
    }
}

// exp for x <= 0, relative error below 2e-7: Cephes' expf (S. L. Moshier), polynomial on [-ln2/2, ln2/2] times 2^n.
static inline Vec exp_negative(Vec x) {
    const Vec floor_x = splat(-87.0f);
    const auto underflows = x < floor_x;
    x = underflows ? floor_x : x;
    const Vec shifter = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    Vec n = (x * 1.44269504088896341f + shifter) - shifter;
    x = x - n * 0.693359375f + n * 2.12194440e-4f;
    Vec p = splat(1.9875691500e-4f);
    p = p * x + 1.3981999507e-3f;
    p = p * x + 8.3334519073e-3f;
    p = p * x + 4.1665795894e-2f;
    p = p * x + 1.6666665459e-1f;
    p = p * x + 5.0000001201e-1f;
    p = p * (x * x) + x + 1.0f;
    IntVec exponent = (__builtin_convertvector(n, IntVec) + 127) << 23;
    p = p * (Vec)exponent;
    return underflows ? Vec{} : p;
}

// ---------------------------------------------------------------- linear

// out[m][n] (+)= x[m] . w[n] over `depth` elements (a multiple of LANES) for M rows and COLUMNS columns.
template <int M>
static inline void dot_tile(const float* x, int64_t x_stride, const float* w, int64_t w_stride, int64_t depth,
                            float* out, int64_t out_stride, bool accumulate, const float* ahead, int ahead_rows) {
    Vec sums[M][COLUMNS] = {};
    for (int64_t k = 0; k < depth; k += LANES) {
        const Vec w0 = load(w + k), w1 = load(w + w_stride + k);
        const Vec w2 = load(w + 2 * w_stride + k), w3 = load(w + 3 * w_stride + k);
        for (int row = 0; row < ahead_rows; row++) __builtin_prefetch(ahead + row * w_stride + k, 0, 2);
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
            const Vec input = load(x + m * x_stride + k);
            sums[m][0] += input * w0;
            sums[m][1] += input * w1;
            sums[m][2] += input * w2;
            sums[m][3] += input * w3;
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
        const Vec folded = fold<LANES / 4>(fold<LANES / 2>(sums[m][0], sums[m][1]), fold<LANES / 2>(sums[m][2], sums[m][3]));
        const Vec totals = add_neighbours<LANES / 8>(folded);
        LooseQuad* row = reinterpret_cast<LooseQuad*>(out + m * out_stride);
        const Quad value = every_nth<LANES / 4>(totals);
        *row = accumulate ? *row + value : value;
    }
}

static void dot_rows(int rows, const float* x, int64_t x_stride, const float* w, int64_t w_stride, int64_t depth,
                     float* out, int64_t out_stride, bool accumulate, const float* ahead, int ahead_rows) {
    switch (rows) {
        case 1: return dot_tile<1>(x, x_stride, w, w_stride, depth, out, out_stride, accumulate, ahead, ahead_rows);
        case 2: return dot_tile<2>(x, x_stride, w, w_stride, depth, out, out_stride, accumulate, ahead, ahead_rows);
        case 3: return dot_tile<3>(x, x_stride, w, w_stride, depth, out, out_stride, accumulate, ahead, ahead_rows);
        case 4: return dot_tile<4>(x, x_stride, w, w_stride, depth, out, out_stride, accumulate, ahead, ahead_rows);
        case 5: return dot_tile<5>(x, x_stride, w, w_stride, depth, out, out_stride, accumulate, ahead, ahead_rows);
        default: return dot_tile<6>(x, x_stride, w, w_stride, depth, out, out_stride, accumulate, ahead, ahead_rows);
    }
}

// Elements of a dot product taken at once: a tile's inputs and weights stay in the L1 cache. Fixes the order of sums.
constexpr int64_t DEPTH_BLOCK = 768;

// out[rows, columns] = x[rows, depth] @ weight[columns, depth]^T (+ bias). depth: a multiple of LANES;
// columns: of COLUMNS.
extern "C" void starmesh_linear(const float* x, const float* weight, const float* bias, float* out, int64_t rows,
                                int64_t depth, int64_t columns, int32_t threads) {
    const int64_t tiles = (rows + ROWS - 1) / ROWS;
    const int64_t depth_block = std::min(depth, DEPTH_BLOCK);
    // Weights kept in the L2 cache while all rows pass over them. Few rows: less, for the next block's must fit too.
    const int64_t column_block_bytes = rows > 64 ? 256 << 10 : 128 << 10;
    int64_t column_block = column_block_bytes / (depth_block * 4) / COLUMNS * COLUMNS;
    column_block = std::max<int64_t>(column_block, COLUMNS);
    const int64_t blocks = (columns + column_block - 1) / column_block;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t block = 0; block < blocks; block++) {
        const int64_t first = block * column_block, last = std::min(columns, first + column_block);
        for (int64_t k = 0; k < depth; k += depth_block) {
            const int64_t length = std::min(depth_block, depth - k);
            for (int64_t tile = 0; tile < tiles; tile++) {
                const int64_t top = rows * tile / tiles, bottom = rows * (tile + 1) / tiles;
                // Each pass fetches its share of the next block's rows, so that memory and arithmetic overlap.
                const int64_t from = std::min<int64_t>(COLUMNS, COLUMNS * tile / tiles);
                const int64_t upto = std::min<int64_t>(COLUMNS, COLUMNS * (tile + 1) / tiles);
                for (int64_t n = first; n < last; n += COLUMNS)
                    dot_rows(static_cast<int>(bottom - top), x + top * depth + k, depth, weight + n * depth + k, depth,
                             length, out + top * columns + n, columns, k > 0,
                             weight + (n + column_block + from) * depth + k, int(upto - from));
            }
        }
        if (bias)
            for (int64_t m = 0; m < rows; m++)
                for (int64_t n = first; n < last; n++) out[m * columns + n] += bias[n];
    }
}

// ---------------------------------------------------------------- gated MLP

// 1 / (1 + exp(-x)), without overflow on either side.
static inline Vec sigmoid(Vec x) {
    const auto negative = x < Vec{};
    const Vec tail = exp_negative(negative ? x : -x);
    return (negative ? tail : splat(1.0f)) / (tail + 1.0f);
}

// 0.5 x (1 + tanh(u)) = x sigmoid(2u) with u = sqrt(2 / pi) (x + 0.044715 x^3): Hendrycks and Gimpel, GELU, 2016.
static inline Vec gelu_tanh(Vec x) { return x * sigmoid((x + x * x * x * 0.044715f) * 1.5957691216057308f); }

// out = (activation(x gate^T) * (x up^T)) down^T, without biases. activation 0: SiLU, 1: tanh-approximated GELU.
// scratch: 2 * rows * inner floats. width and inner: multiples of LANES and COLUMNS.
extern "C" void starmesh_gated_mlp(const float* x, const float* gate, const float* up, const float* down,
                                   float* scratch, float* out, int64_t rows, int64_t width, int64_t inner,
                                   int32_t activation, int32_t threads) {
    float* gated = scratch;
    const float* raised = scratch + rows * inner;
    starmesh_linear(x, gate, nullptr, gated, rows, width, inner, threads);
    starmesh_linear(x, up, nullptr, scratch + rows * inner, rows, width, inner, threads);
    for (int64_t i = 0; i < rows * inner; i += LANES) {
        const Vec value = load(gated + i);
        store(gated + i, (activation == 0 ? value * sigmoid(value) : gelu_tanh(value)) * load(raised + i));
    }
    starmesh_linear(gated, down, nullptr, out, rows, inner, width, threads);
}

// ---------------------------------------------------------------- rotary positions

// Rotates, in place, the halves of each head of x by the token's angles: x * cos + (-x_high, x_low) * sin, with
// cos and sin [tokens, head_dim]. head_dim: a multiple of 2 * LANES. Strides as in attention.
extern "C" void starmesh_rotate(float* x, int64_t x_token, int64_t x_head, const float* cosines, const float* sines,
                                int64_t tokens, int64_t heads, int64_t head_dim) {
    const int64_t half = head_dim / 2;
    for (int64_t token = 0; token < tokens; token++, cosines += head_dim, sines += head_dim)
        for (int64_t head = 0; head < heads; head++) {
            float* low = x + token * x_token + head * x_head;
            for (int64_t d = 0; d < half; d += LANES) {
                const Vec a = load(low + d), b = load(low + half + d);
                store(low + d, a * load(cosines + d) - b * load(sines + d));
                store(low + half + d, b * load(cosines + half + d) + a * load(sines + half + d));
            }
        }
}

// ---------------------------------------------------------------- norm

// out = x / sqrt(mean(x^2) + epsilon) * gain, row by row; width: a multiple of LANES.
extern "C" void starmesh_rms_norm(const float* x, const float* gain, float* out, int64_t rows, int64_t width,
                                  float epsilon) {
    for (int64_t row = 0; row < rows; row++, x += width, out += width) {
        Vec squares = {};
        for (int64_t i = 0; i < width; i += LANES) {
            const Vec value = load(x + i);
            squares += value * value;
        }
        const float scale = 1.0f / std::sqrt(sum(squares) / static_cast<float>(width) + epsilon);
        for (int64_t i = 0; i < width; i += LANES) store(out + i, load(x + i) * scale * load(gain + i));
    }
}

// ---------------------------------------------------------------- attention

// One step's ragged batch over the block-major pool [blocks, layers, 2, kv_heads, block_tokens, head_dim].
// Item i owns queries query_starts[i] to query_starts[i + 1] - 1, of which the first stands at position positions[i];
// its block table is tables[table_starts[i]...]. slots[t] = block * block_tokens + offset of new token t.
// Mirrored field by field by native.Step.
struct Step {
    void* pool;
    const int64_t* query_starts;
    const int64_t* positions;
    const int64_t* table_starts;
    const int64_t* tables;
    const int64_t* slots;
    int64_t items, layers, kv_heads, query_heads, block_tokens, head_dim, threads;
};

constexpr int TILE_TOKENS = 64;  // keys and values taken at once; aligned to positions, so no row depends on another
constexpr int TILE_ROWS = 24;    // (query, head) rows that share one pass over the keys and values
constexpr int MAX_HEAD_DIM = 256;
constexpr int TILE_VECS = TILE_TOKENS / LANES;

struct Scratch {
    alignas(64) float keys[MAX_HEAD_DIM * TILE_TOKENS];    // transposed: [head_dim][TILE_TOKENS]
    alignas(64) float values[TILE_TOKENS * MAX_HEAD_DIM];  // only filled for bfloat16
    alignas(64) float queries[TILE_ROWS * MAX_HEAD_DIM];
    alignas(64) float sums[TILE_ROWS * MAX_HEAD_DIM];
    alignas(64) float weights[TILE_ROWS * TILE_TOKENS];
    float maxima[TILE_ROWS], totals[TILE_ROWS], corrections[TILE_ROWS];
};

template <typename Element>
struct Pool {
    Element* data;
    const Step& step;
    int64_t layer;

    Element* tile(int64_t block, int64_t which, int64_t head) const {
        return data + ((((block * step.layers + layer) * 2 + which) * step.kv_heads + head) * step.block_tokens) *
                          step.head_dim;
    }
};

// weights[row][token] = keys . queries[row] for ROWS_HERE rows and VECS vectors of tokens, from vector v on: enough
// sums at once to hide the latency of adding to one of them.
template <int ROWS_HERE, int VECS>
static inline void score_vecs(const float* keys, const float* queries, int64_t head_dim, int v, float* weights) {
    Vec sums[ROWS_HERE][VECS] = {};
    for (int64_t d = 0; d < head_dim; d++)
#pragma GCC unroll 4
        for (int i = 0; i < VECS; i++) {
            const Vec key = load(keys + d * TILE_TOKENS + (v + i) * LANES);
#pragma GCC unroll 8
            for (int r = 0; r < ROWS_HERE; r++) sums[r][i] += key * queries[r * head_dim + d];
        }
    for (int r = 0; r < ROWS_HERE; r++)
        for (int i = 0; i < VECS; i++) store(weights + r * TILE_TOKENS + (v + i) * LANES, sums[r][i]);
}

template <int ROWS_HERE>
static inline void score_rows(const float* keys, const float* queries, int64_t head_dim, int vecs, float* weights) {
    constexpr int TOGETHER = ROWS_HERE > 4 ? 1 : 4;
    int v = 0;
    for (; v + TOGETHER <= vecs; v += TOGETHER)
        score_vecs<ROWS_HERE, TOGETHER>(keys, queries, head_dim, v, weights);
    for (; v < vecs; v++) score_vecs<ROWS_HERE, 1>(keys, queries, head_dim, v, weights);
}

// sums[row] = sums[row] * correction + weights[row] . values for ROWS_HERE rows and VECS vectors of the head.
template <int ROWS_HERE, int VECS>
static inline void mix_rows(const float* const* values, const float* weights, int tokens, const float* corrections,
                            float* sums, int64_t head_dim, int64_t d) {
    Vec mixed[ROWS_HERE][VECS];
    for (int r = 0; r < ROWS_HERE; r++)
        for (int v = 0; v < VECS; v++) mixed[r][v] = load(sums + r * head_dim + d + v * LANES) * corrections[r];
    for (int t = 0; t < tokens; t++) {
        Vec value[VECS];
        for (int v = 0; v < VECS; v++) value[v] = load(values[t] + d + v * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS_HERE; r++)
            for (int v = 0; v < VECS; v++) mixed[r][v] += value[v] * weights[r * TILE_TOKENS + t];
    }
    for (int r = 0; r < ROWS_HERE; r++)
        for (int v = 0; v < VECS; v++) store(sums + r * head_dim + d + v * LANES, mixed[r][v]);
}

template <int ROWS_HERE>
static inline void mix(const float* const* values, const float* weights, int tokens, const float* corrections,
                       float* sums, int64_t head_dim) {
    int64_t d = 0;
    for (; d + 2 * LANES <= head_dim; d += 2 * LANES)
        mix_rows<ROWS_HERE, 2>(values, weights, tokens, corrections, sums, head_dim, d);
    for (; d < head_dim; d += LANES)
        mix_rows<ROWS_HERE, 1>(values, weights, tokens, corrections, sums, head_dim, d);
}

template <typename Element>
static void attend_tile(const Pool<Element>& pool, Scratch& scratch, int64_t item, int64_t head, int64_t row_first,
                        int64_t row_last, const Element* q, int64_t q_token, int64_t q_head, Element* out, float scale,
                        float softcap, int64_t window) {
    const Step& step = pool.step;
    const int64_t group = step.query_heads / step.kv_heads, head_dim = step.head_dim;
    const int64_t first_query = step.query_starts[item], start = step.positions[item];
    const int64_t* table = step.tables + step.table_starts[item];
    const int rows = static_cast<int>(row_last - row_first);
    auto position = [&](int r) { return start + (row_first + r) / group; };
    auto oldest = [&](int r) { return window > 0 ? std::max<int64_t>(0, position(r) - window + 1) : int64_t{0}; };

    for (int r = 0; r < rows; r++) {
        const int64_t query = first_query + (row_first + r) / group, query_head = head * group + (row_first + r) % group;
        const Element* from = q + query * q_token + query_head * q_head;
        for (int64_t d = 0; d < head_dim; d += LANES) {
            store(scratch.queries + r * head_dim + d, load(from + d) * scale);
            store(scratch.sums + r * head_dim + d, Vec{});
        }
        scratch.maxima[r] = -INFINITY;
        scratch.totals[r] = 0.0f;
    }

    const int64_t end = position(rows - 1) + 1;
    // Keys of a tile's tokens, the last one repeated past the end. Walks the table: one division, not one a token.
    auto key_rows_from = [&](int64_t base, const Element** rows_of_tile) {
        base = std::min(base, end - 1);
        int64_t index = base / step.block_tokens, offset = base % step.block_tokens;
        const Element* key = pool.tile(table[index], 0, head) + offset * head_dim;
        for (int t = 0; t < TILE_TOKENS; t++) {
            rows_of_tile[t] = key;
            if (base + t + 1 >= end) continue;
            key += head_dim;
            if (++offset == step.block_tokens) offset = 0, key = pool.tile(table[++index], 0, head);
        }
    };
    const int64_t value_after_key = step.kv_heads * step.block_tokens * head_dim;
    const Element *first_rows[TILE_TOKENS], *second_rows[TILE_TOKENS];
    const Element **key_rows = first_rows, **next_key_rows = second_rows;
    key_rows_from(oldest(0) / TILE_TOKENS * TILE_TOKENS, key_rows);
    for (int64_t base = oldest(0) / TILE_TOKENS * TILE_TOKENS; base < end; base += TILE_TOKENS) {
        const int tokens = static_cast<int>(std::min<int64_t>(TILE_TOKENS, end - base));
        const int vecs = (tokens + LANES - 1) / LANES;
        const float* value_rows[TILE_TOKENS];
        key_rows_from(base + TILE_TOKENS, next_key_rows);
        for (int v = 0; v < vecs; v++) {
            const int filled = std::min(LANES, tokens - v * LANES);
            for (int64_t d = 0; d < head_dim; d += LANES) {
                Vec square[LANES];
                for (int t = 0; t < LANES; t++) {
                    // Fetched now, so that memory and arithmetic overlap: blocks lie anywhere in the pool.
                    __builtin_prefetch(key_rows[v * LANES + t] + value_after_key + d, 0, 2);
                    __builtin_prefetch(next_key_rows[v * LANES + t] + d, 0, 2);
                    square[t] = t < filled ? load(key_rows[v * LANES + t] + d) : Vec{};
                }
                transpose(square);
                for (int i = 0; i < LANES; i++) store(scratch.keys + (d + i) * TILE_TOKENS + v * LANES, square[i]);
            }
        }
        for (int t = 0; t < tokens; t++) {
            const Element* value = key_rows[t] + value_after_key;
            if constexpr (std::is_same_v<Element, float>) {
                value_rows[t] = value;
            } else {
                value_rows[t] = scratch.values + t * head_dim;
                for (int64_t d = 0; d < head_dim; d += LANES)
                    store(scratch.values + t * head_dim + d, load(value + d));
            }
        }

        int r = 0;
        for (; r + 8 <= rows; r += 8)
            score_rows<8>(scratch.keys, scratch.queries + r * head_dim, head_dim, vecs, scratch.weights + r * TILE_TOKENS);
        for (; r + 3 <= rows; r += 3)
            score_rows<3>(scratch.keys, scratch.queries + r * head_dim, head_dim, vecs, scratch.weights + r * TILE_TOKENS);
        for (; r < rows; r++)
            score_rows<1>(scratch.keys, scratch.queries + r * head_dim, head_dim, vecs, scratch.weights + r * TILE_TOKENS);

        for (r = 0; r < rows; r++) {
            float* weights = scratch.weights + r * TILE_TOKENS;
            const int64_t from = oldest(r) - base, upto = position(r) + 1 - base;
            if (softcap > 0.0f)
                for (int t = 0; t < tokens; t++) weights[t] = softcap * std::tanh(weights[t] / softcap);
            if (from > 0)
                for (int t = 0; t < std::min<int64_t>(from, tokens); t++) weights[t] = -INFINITY;
            for (int t = static_cast<int>(std::max<int64_t>(upto, 0)); t < vecs * LANES; t++) weights[t] = -INFINITY;
            Vec highest = splat(scratch.maxima[r]);
            for (int v = 0; v < vecs; v++) {
                const Vec score = load(weights + v * LANES);
                highest = score > highest ? score : highest;
            }
            const float top = maximum(highest);
            if (top == -INFINITY) {  // nothing visible to this row yet
                for (int v = 0; v < vecs; v++) store(weights + v * LANES, Vec{});
                scratch.corrections[r] = 1.0f;
                continue;
            }
            Vec total = {};
            for (int v = 0; v < vecs; v++) {
                const Vec weight = exp_negative(load(weights + v * LANES) - top);
                store(weights + v * LANES, weight);
                total += weight;
            }
            const float correction = exp_negative(splat(scratch.maxima[r] - top))[0];
            scratch.corrections[r] = correction;
            scratch.totals[r] = scratch.totals[r] * correction + sum(total);
            scratch.maxima[r] = top;
        }

        r = 0;
        for (; r + 6 <= rows; r += 6)
            mix<6>(value_rows, scratch.weights + r * TILE_TOKENS, tokens, scratch.corrections + r,
                   scratch.sums + r * head_dim, head_dim);
        for (; r + 3 <= rows; r += 3)
            mix<3>(value_rows, scratch.weights + r * TILE_TOKENS, tokens, scratch.corrections + r,
                   scratch.sums + r * head_dim, head_dim);
        for (; r < rows; r++)
            mix<1>(value_rows, scratch.weights + r * TILE_TOKENS, tokens, scratch.corrections + r,
                   scratch.sums + r * head_dim, head_dim);
        std::swap(key_rows, next_key_rows);
    }

    for (int r = 0; r < rows; r++) {
        const int64_t query = first_query + (row_first + r) / group, query_head = head * group + (row_first + r) % group;
        Element* to = out + (query * step.query_heads + query_head) * head_dim;
        const float inverse = 1.0f / scratch.totals[r];
        for (int64_t d = 0; d < head_dim; d++) store_element(to + d, scratch.sums[r * head_dim + d] * inverse);
    }
}

template <typename Element>
static void attention(const Step& step, int64_t layer, const Element* q, int64_t q_token, int64_t q_head,
                      const Element* k, int64_t k_token, int64_t k_head, const Element* v, int64_t v_token,
                      int64_t v_head, Element* out, float scale, float softcap, int64_t window) {
    const Pool<Element> pool{static_cast<Element*>(step.pool), step, layer};
    const int64_t row_bytes = step.head_dim * static_cast<int64_t>(sizeof(Element));
    for (int64_t t = 0; t < step.query_starts[step.items]; t++) {
        const int64_t block = step.slots[t] / step.block_tokens, offset = step.slots[t] % step.block_tokens;
        for (int64_t head = 0; head < step.kv_heads; head++) {
            std::memcpy(pool.tile(block, 0, head) + offset * step.head_dim, k + t * k_token + head * k_head, row_bytes);
            std::memcpy(pool.tile(block, 1, head) + offset * step.head_dim, v + t * v_token + head * v_head, row_bytes);
        }
    }
    const int64_t group = step.query_heads / step.kv_heads;
#pragma omp parallel for num_threads(step.threads) if (step.threads > 1) schedule(dynamic)
    for (int64_t unit = 0; unit < step.items * step.kv_heads; unit++) {
        static thread_local Scratch scratch;
        const int64_t item = unit / step.kv_heads;
        const int64_t rows = (step.query_starts[item + 1] - step.query_starts[item]) * group;
        for (int64_t row = 0; row < rows; row += TILE_ROWS)
            attend_tile(pool, scratch, item, unit % step.kv_heads, row, std::min<int64_t>(rows, row + TILE_ROWS), q,
                        q_token, q_head, out, scale, softcap, window);
    }
}

// Stores the step's keys and values in the pool, then attends: out[tokens, query_heads, head_dim]. Strides are in
// elements, of tokens and heads; elements of a head are adjacent. softcap and window 0: none.
#define STARMESH_ATTENTION(NAME, ELEMENT)                                                                          \
    extern "C" void NAME(const Step* step, int64_t layer, const ELEMENT* q, int64_t q_token, int64_t q_head,       \
                         const ELEMENT* k, int64_t k_token, int64_t k_head, const ELEMENT* v, int64_t v_token,     \
                         int64_t v_head, ELEMENT* out, float scale, float softcap, int64_t window) {               \
        attention<ELEMENT>(*step, layer, q, q_token, q_head, k, k_token, k_head, v, v_token, v_head, out, scale,   \
                           softcap, window);                                                                       \
    }
STARMESH_ATTENTION(starmesh_attention_float32, float)
STARMESH_ATTENTION(starmesh_attention_bfloat16, uint16_t)

// What the caller must know to choose this library: lanes, columns and the largest head.
extern "C" int32_t starmesh_lanes() { return LANES; }
extern "C" int32_t starmesh_columns() { return COLUMNS; }
extern "C" int32_t starmesh_max_head_dim() { return MAX_HEAD_DIM; }
