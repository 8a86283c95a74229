// The step of a list of tensors on a CPU, and the masked weights, each in one pass over memory.
//
// The arithmetic is that of importances.py, simplex.py and sampling.py, and of the steps of torch.optim.SGD and AdamW;
// read it beside them. Tensors are runs of memory: element i of a tensor lies at place `start + i` of its group, which
// decides its random bits. Work is cut into chunks that no number of threads changes, and sums are taken chunk by chunk,
// so that results do not depend on that number.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int64_t ROW = 4096;     // elements that share the keys of their random bits
constexpr int64_t CHUNK = 16384;  // elements that one thread takes at a time
constexpr int BLOCK = 1024;       // elements whose temporaries stay in the first-level cache
constexpr float LOG_BOUND = 60.0f, CLIP = 10.0f;
constexpr double NEAR = 1.0 / 64, TOLERANCE = 1e-3;  // of the level, and of what is dropped or kept
constexpr int MOST_STEPS = 200, NORMALIZER_SAMPLE = 4096;

enum Dtype { FLOAT32, BFLOAT16, FLOAT64 };
enum Signal { NONE, SALIENCY, FISHER, MAGNITUDE, STEP_TIMES_GRADIENT };
enum Rule { IMPORTANCES, GRADIENT, SGD, ADAMW };

struct Bfloat16 {
    uint16_t bits;
};

}  // namespace

extern "C" {

// What holds for all tensors of a group. cpu.py has the same fields in the same order.
struct Group {
    int32_t dtype, signal, rule, threads;
    int32_t holds_zeros, maximize, drops_important, is_constant;  // constant: π is `level` everywhere
    float inverse_scale, rate, shrink;                  // of the mirror step
    float level, keep_floor, divisor;                   // of the masks
    uint64_t seed;
    uint32_t step, group, stream, nesterov;
    double lr, weight_decay, momentum, dampening, beta1, beta2, eps;
};

// One tensor. A pointer is null where there is nothing.
struct Tensor {
    void *weight, *grad, *out, *first_moment, *second_moment, *largest_moment, *last_step;
    float *log_importance, *steps;
    int64_t size, start;
    int32_t is_masked, is_first;
};
}

namespace {

// ---------------------------------------------------------------------------------------- scalars

inline float load(float v) { return v; }
inline double load(double v) { return v; }
inline float load(Bfloat16 v) {
    uint32_t bits = uint32_t(v.bits) << 16;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}

inline void store(float &to, float v) { to = v; }
inline void store(double &to, double v) { to = v; }
inline void store(Bfloat16 &to, float v) {
    uint32_t bits;
    std::memcpy(&bits, &v, 4);
    uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;  // to nearest, ties to even
    to.bits = uint16_t(v != v ? 0x7FC0 : rounded);
}

template <class T> struct Real { using type = float; };
template <> struct Real<double> { using type = double; };

// A factor as a tensor of the weights' dtype holds it.
inline float in_dtype(float v, float) { return v; }
inline double in_dtype(float v, double) { return v; }
inline float in_dtype(float v, Bfloat16) {
    Bfloat16 b;
    store(b, v);
    return load(b);
}

// exp for |v| <= 87: a power of two times 2^r, |r| <= 1/2, whose polynomial is right to a unit in the last place or two.
inline float exp32(float v) {
    constexpr float LOG2_E = 1.44269504f;
    const float n = std::rint(v * LOG2_E), r = v * LOG2_E - n;
    float p = 1.5403530e-4f;
    p = p * r + 1.3333558e-3f;
    p = p * r + 9.6181291e-3f;
    p = p * r + 5.5504109e-2f;
    p = p * r + 2.4022651e-1f;
    p = p * r + 6.9314718e-1f;
    p = p * r + 1.0f;
    int32_t bits;
    std::memcpy(&bits, &p, 4);
    bits += int32_t(n) << 23;
    std::memcpy(&p, &bits, 4);
    return p;
}

// ------------------------------------------------------------------------------------ random bits

struct Keys {
    uint32_t a, b, c;
};

Keys row_keys(const Group &group, int64_t row) {
    uint32_t c0 = uint32_t(row), c1 = group.group, c2 = group.step, c3 = group.stream;
    uint32_t k0 = uint32_t(group.seed), k1 = uint32_t(group.seed >> 32);
    for (int round = 0; round < 7; ++round) {
        uint64_t p0 = uint64_t(c0) * 0xD2511F53u, p1 = uint64_t(c2) * 0xCD9E8D57u;
        c0 = uint32_t(p1 >> 32) ^ c1 ^ k0;
        c1 = uint32_t(p1);
        c2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
        c3 = uint32_t(p0);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return {c0, c1, c2};
}

inline uint32_t random_bits(Keys keys, uint32_t position) {
    uint32_t h = position ^ keys.a;
    h ^= h >> 16;
    h *= 0x7FEB352Du;
    h ^= keys.b;
    h ^= h >> 15;
    h *= 0x846CA68Bu;
    return h ^ keys.c;
}

// ------------------------------------------------------------------------------------------ masks

// What the weights of a block are multiplied with: 0, or 1/π up to the cap.
struct Factors {
    Keys keys;
    uint32_t first;
    float level, scale, shift, divisor;
    const float *log_w;

    Factors(const Group &group, const Tensor &t, int64_t begin)
        : keys(row_keys(group, (t.start + begin) / ROW)), first(uint32_t((t.start + begin) % ROW)),
          level(group.level), scale(1.0f - group.keep_floor), shift(group.keep_floor), divisor(group.divisor),
          log_w(t.log_importance + begin) {
        static const float zeros[BLOCK] = {};
        if (group.is_constant) log_w = zeros, scale = 1.0f, shift = 0.0f;
        else if (group.drops_important) scale = -scale, shift = 1.0f;
    }

    float operator()(int i) const {
        const float keep = std::min(level * exp32(log_w[i]), 1.0f) * scale + shift;
        const int32_t bits = int32_t(random_bits(keys, first + uint32_t(i))) >> 1;
        const int32_t bound = int32_t(keep * 2147483648.0f - 1073741824.0f);
        const float factor = 1.0f / std::max(keep, divisor);
        return bits < bound ? factor : 0.0f;
    }
};

template <class T> void mask_block(const Group &group, const Tensor &t, int64_t begin, int n) {
    const T *x = static_cast<const T *>(t.weight) + begin;
    T *out = static_cast<T *>(t.out) + begin;
    const Factors factor(group, t, begin);
#pragma omp simd
    for (int i = 0; i < n; ++i) store(out[i], load(x[i]) * in_dtype(factor(i), T{}));
}

// ------------------------------------------------------------------------------------ importances

struct Sums {
    double size = 0, alive = 0;  // the sum of |h|, and how many weights live
    float normalizer = 0;
};

// The mirror step of a block, where `h` is the signal of a weight, its gradient and its last step; and into `f` the
// factors of the mask that was drawn from the importances before it.
template <bool IS_MASKED, class T, class H>
void mirror_block(const Group &group, const Tensor &t, int64_t begin, int n, float *f, Sums &sums, H h) {
    const Factors factor(group, t, begin);
    const T *x = static_cast<const T *>(t.weight) + begin, *g = static_cast<const T *>(t.grad) + begin;
    const T *last = t.last_step ? static_cast<const T *>(t.last_step) + begin : x;
    const bool holds = group.holds_zeros;
    const float inverse = group.inverse_scale, shrink = group.shrink, rate = group.rate;
    const float offset = sums.normalizer * shrink;
    float *log_w = t.log_importance + begin, size = 0, alive = 0;
#pragma omp simd reduction(+ : size, alive)
    for (int i = 0; i < n; ++i) {
        if (IS_MASKED) f[i] = factor(i);
        const float weight = float(load(x[i]));
        float value = h(weight, float(load(g[i])), float(load(last[i])));
        const bool is_dead = holds & (weight == 0);
        value = (std::abs(value) <= 3.402823466e38f) & !is_dead ? value : 0.0f;  // neither nan nor inf
        size += std::abs(value);
        alive += is_dead ? 0.0f : 1.0f;
        const float u = std::min(std::max(value * inverse, -CLIP), CLIP);
        const float moved = std::min(std::max(log_w[i] * shrink - offset - rate * u, -LOG_BOUND), LOG_BOUND);
        log_w[i] = is_dead ? 0.0f : moved;
    }
    sums.size += size;
    sums.alive += alive;
}

template <bool IS_MASKED, class T>
void mirror_block(const Group &group, const Tensor &t, int64_t begin, int n, float *f, Sums &sums) {
    const float sign = group.maximize ? 1.0f : -1.0f;
    auto with = [&](auto h) { mirror_block<IS_MASKED, T>(group, t, begin, n, f, sums, h); };
    switch (group.signal) {
        case SALIENCY: return with([](float x, float g, float) { return -std::abs(x * g); });
        case FISHER: return with([](float, float g, float) { return -g * g; });
        case MAGNITUDE: return with([](float x, float, float) { return -std::abs(x); });
        case STEP_TIMES_GRADIENT: return with([=](float, float g, float last) { return sign * last * g; });
    }
    if (!IS_MASKED) return;
    const Factors factor(group, t, begin);
#pragma omp simd
    for (int i = 0; i < n; ++i) f[i] = factor(i);
}

// ---------------------------------------------------------------------------------- base optimizers

// Calls update(i, x, d) for every weight of a block with its masked gradient, which returns the new weight.
template <class T, class Update>
void update_block(const Group &group, const Tensor &t, int64_t begin, int n, const float *f, Update update) {
    using R = typename Real<T>::type;
    T *x = static_cast<T *>(t.weight) + begin;
    const T *g = static_cast<const T *>(t.grad) + begin;
    T *last = t.last_step ? static_cast<T *>(t.last_step) + begin : nullptr;
    const bool holds = group.holds_zeros;
    const R sign = group.maximize ? R(-1) : R(1);
    R step[BLOCK];
#pragma omp simd
    for (int i = 0; i < n; ++i) {
        const R before = load(x[i]);
        const bool is_dead = holds & (before == 0);
        R now = update(i, before, sign * load(g[i]) * in_dtype(f[i], T{}), is_dead);
        // With few bits, a weight that lives may come to zero by chance.
        if (sizeof(T) == 2) now = holds & (in_dtype(float(now), T{}) == 0) ? R(1.17549435e-38f) : now;
        now = is_dead ? R(0) : now;
        store(x[i], now);
        step[i] = before - R(load(x[i]));
    }
    if (last)
        for (int i = 0; i < n; ++i) store(last[i], step[i]);
}

template <class T> void gradient_block(const Group &group, const Tensor &t, int64_t begin, int n, const float *f) {
    const T *x = static_cast<const T *>(t.weight) + begin, *g = static_cast<const T *>(t.grad) + begin;
    T *out = static_cast<T *>(t.out) + begin;
    const bool holds = group.holds_zeros;
#pragma omp simd
    for (int i = 0; i < n; ++i) {
        const bool is_dead = holds & (load(x[i]) == 0);
        store(out[i], is_dead ? 0 : load(g[i]) * in_dtype(f[i], T{}));
    }
}

template <class T> void sgd_block(const Group &group, const Tensor &t, int64_t begin, int n, const float *f) {
    using R = typename Real<T>::type;
    const R lr = R(group.lr), decay = R(group.weight_decay), momentum = R(group.momentum);
    if (group.momentum == 0) {
        update_block<T>(group, t, begin, n, f, [=](int, R x, R d, bool) { return x - lr * (d + decay * x); });
        return;
    }
    T *buffer = static_cast<T *>(t.first_moment) + begin;
    const R kept = t.is_first ? R(0) : momentum, share = t.is_first ? R(1) : R(1.0 - group.dampening);
    const R of_gradient = group.nesterov ? R(1) : R(0), of_buffer = group.nesterov ? momentum : R(1);
    update_block<T>(group, t, begin, n, f, [=](int i, R x, R d, bool is_dead) {
        d += decay * x;
        const R m = kept * load(buffer[i]) + share * d;
        store(buffer[i], is_dead ? R(0) : m);
        return x - lr * (of_gradient * d + of_buffer * m);
    });
}

template <class T> void adamw_block(const Group &group, const Tensor &t, int64_t begin, int n, const float *f) {
    using R = typename Real<T>::type;
    T *first = static_cast<T *>(t.first_moment) + begin, *second = static_cast<T *>(t.second_moment) + begin;
    T *largest = static_cast<T *>(t.largest_moment ? t.largest_moment : t.second_moment) + begin;
    const bool amsgrad = t.largest_moment != nullptr;
    const double steps = double(*t.steps) + 1.0;
    const R rest1 = R(1.0 - group.beta1), beta2 = R(group.beta2), rest2 = R(1.0 - group.beta2), eps = R(group.eps);
    const R size = R(group.lr / (1.0 - std::pow(group.beta1, steps)));
    const R root = R(1.0 / std::sqrt(1.0 - std::pow(group.beta2, steps)));
    const R shrink = R(1.0 - group.lr * group.weight_decay);
    update_block<T>(group, t, begin, n, f, [=](int i, R x, R d, bool is_dead) {
        R m = load(first[i]), v = load(second[i]);
        m = is_dead ? R(0) : m + rest1 * (d - m);
        v = is_dead ? R(0) : v * beta2 + rest2 * d * d;
        store(first[i], m);
        store(second[i], v);
        if (amsgrad) {
            v = std::max(v, R(load(largest[i])));
            store(largest[i], v);
        }
        return x * shrink - size * (m / (std::sqrt(v) * root + eps));
    });
}

template <class T> void step_block(const Group &group, const Tensor &t, int64_t begin, int n, Sums &sums) {
    float f[BLOCK];
    if (group.rule != IMPORTANCES && t.is_masked) {
        mirror_block<true, T>(group, t, begin, n, f, sums);
    } else {
        std::fill_n(f, n, 1.0f);
        mirror_block<false, T>(group, t, begin, n, f, sums);
    }
    switch (group.rule) {
        case GRADIENT: return gradient_block<T>(group, t, begin, n, f);
        case SGD: return sgd_block<T>(group, t, begin, n, f);
        case ADAMW: return adamw_block<T>(group, t, begin, n, f);
        default: return;
    }
}

// ------------------------------------------------------------------------------------------ level

struct Fill {
    double missing = 0, slope = 0, full = 0, near = 0, alive = 0;

    void add(const Fill &other) {
        missing += other.missing, slope += other.slope, full += other.full;
        near += other.near, alive += other.alive;
    }
};

// Of what lives: the sums of max(0, 1 - cw) and of cw below 1; how many are full, how many nearly, how many there are.
template <bool HOLDS_ZEROS, class T> void fill_block(const Tensor &t, int64_t begin, int n, float c, Fill &fill) {
    const float *log_w = t.log_importance + begin;
    const T *x = static_cast<const T *>(t.weight) + begin;
    float missing = 0, slope = 0, full = 0, near = 0, alive = 0;
#pragma omp simd reduction(+ : missing, slope, full, near, alive)
    for (int i = 0; i < n; ++i) {
        const bool is_dead = HOLDS_ZEROS && load(x[i]) == 0;
        const float w = is_dead ? 0.0f : exp32(log_w[i]), one = is_dead ? 0.0f : 1.0f;
        const float filled = c * w, gap = one - filled;
        missing += std::max(gap, 0.0f);
        slope += gap > 0.0f ? filled : 0.0f;
        full += gap > 0.0f ? 0.0f : one;
        near += std::abs(gap) <= NEAR ? one : 0.0f;
        alive += one;
    }
    fill.add({missing, slope, full, near, alive});
}

// `size` importances w spread evenly over the tensors, the same places at every call; 0 for a zero that is held.
template <class T>
std::vector<float> sample_of(const Tensor *tensors, int64_t count, int64_t size, bool holds_zeros) {
    int64_t total = 0;
    for (int64_t k = 0; k < count; ++k) total += tensors[k].size;
    std::vector<float> sample(std::min(size, total));
    const Tensor *t = tensors;
    const double golden = (std::sqrt(5.0) - 1.0) / 2.0, stride = double(total) / double(sample.size());
    for (int64_t i = 0, before = 0; i < int64_t(sample.size()); ++i) {
        const double spread = double(i) * golden;
        const int64_t place = size >= total ? i : int64_t((double(i) + (spread - std::floor(spread))) * stride);
        for (; place - before >= t->size; ++t) before += t->size;
        const bool is_dead = holds_zeros && load(static_cast<const T *>(t->weight)[place - before]) == 0;
        sample[i] = is_dead ? 0.0f : exp32(t->log_importance[place - before]);
    }
    return sample;
}

// The level of a sample: the root of a concave, piecewise linear function, to which Newton steps rise.
double sample_level(const std::vector<float> &w, double mean) {
    double mass = 0, alive = 0;
    for (float v : w) mass += v, alive += v > 0;
    double level = mass > 0 ? mean * alive / mass : 1.0;
    for (int k = 0; k < 1000; ++k) {
        const double edge = 1.0 / level;
        double tail = 0, full = 0;
        const int64_t n = int64_t(w.size());
        const float *values = w.data();
#pragma omp simd reduction(+ : tail, full)
        for (int64_t i = 0; i < n; ++i) {
            const double v = values[i];
            tail += v < edge ? v : 0.0;
            full += v < edge ? 0.0 : 1.0;
        }
        const double next = tail > 0 ? (mean * alive - full) / tail : level;
        if (!(next > level)) break;
        level = next;
    }
    return level;
}

// ------------------------------------------------------------------------------------ all threads

struct Piece {
    const Tensor *tensor;
    int64_t begin, end;
};

std::vector<Piece> pieces_of(const Tensor *tensors, int64_t count) {
    std::vector<Piece> pieces;
    for (int64_t k = 0; k < count; ++k) {
        const Tensor &t = tensors[k];
        for (int64_t begin = 0; begin < t.size;) {
            const int64_t end = std::min(t.size, begin + CHUNK - (t.start + begin) % CHUNK);
            pieces.push_back({&t, begin, end});
            begin = end;
        }
    }
    return pieces;
}

// Calls work(tensor, begin, n, number of the piece) for all blocks; none crosses a row.
template <class Work> void for_blocks(const Group &group, const std::vector<Piece> &pieces, Work work) {
    const int64_t count = int64_t(pieces.size());
    const int threads = int(std::min<int64_t>(group.threads, count));
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t k = 0; k < count; ++k) {
        const Piece &piece = pieces[k];
        for (int64_t begin = piece.begin; begin < piece.end;) {
            const int64_t n = std::min<int64_t>(piece.end - begin, BLOCK - (piece.tensor->start + begin) % BLOCK);
            work(*piece.tensor, begin, int(n), k);
            begin += n;
        }
    }
}

template <class T> Sums step_all(const Group &group, const Tensor *tensors, int64_t count) {
    const auto pieces = pieces_of(tensors, count);
    Sums sums;
    if (group.signal != NONE) {
        double mass = 0;
        const auto sample = sample_of<T>(tensors, count, NORMALIZER_SAMPLE, false);
        for (float w : sample) mass += w;
        sums.normalizer = float(std::log(mass / double(sample.size())));
    }
    std::vector<Sums> parts(pieces.size(), sums);
    for_blocks(group, pieces,
               [&](const Tensor &t, int64_t begin, int n, int64_t k) { step_block<T>(group, t, begin, n, parts[k]); });
    for (const Sums &part : parts) sums.size += part.size, sums.alive += part.alive;
    return sums;
}

template <class T> Fill fill_all(const Group &group, const std::vector<Piece> &pieces, double level) {
    std::vector<Fill> parts(pieces.size());
    const float c = float(level);
    for_blocks(group, pieces, [&](const Tensor &t, int64_t begin, int n, int64_t k) {
        if (group.holds_zeros)
            fill_block<true, T>(t, begin, n, c, parts[k]);
        else
            fill_block<false, T>(t, begin, n, c, parts[k]);
    });
    Fill all;
    for (const Fill &part : parts) all.add(part);
    return all;
}

template <class T>
double level_all(const Group &group, const Tensor *tensors, int64_t count, double mean, int64_t size) {
    const auto pieces = pieces_of(tensors, count);
    const auto sample = sample_of<T>(tensors, count, size, group.holds_zeros);
    double level = sample_level(sample, mean), closest = HUGE_VAL;
    if (int64_t(sample.size()) < size) return level;  // the sample is all there is
    Fill fill;
    for (int k = 0; k < MOST_STEPS; ++k) {
        fill = fill_all<T>(group, pieces, level);
        const double error = mean < 0.5 ? mean * fill.alive - fill.full - fill.slope
                                        : fill.missing - (1.0 - mean) * fill.alive;
        const double tolerance = TOLERANCE * std::min(mean, 1.0 - mean) * fill.alive;
        const double ratio = std::min(std::max(1.0 + error / std::max(fill.slope, 1e-30), 0.125), 8.0);
        const double change = std::abs(ratio - 1.0);
        if (error >= closest && error <= fill.slope) break;  // rounding
        if (error > 0) closest = error;
        const double before = level;
        level *= ratio;
        if ((change <= NEAR && fill.near * change <= tolerance) || float(level) == float(before)) break;
    }
    return level;
}

}  // namespace

#define FOR_DTYPE(call)                                       \
    switch (group->dtype) {                                   \
        case FLOAT32: { using T = float; call; break; }       \
        case BFLOAT16: { using T = Bfloat16; call; break; }   \
        default: { using T = double; call; break; }           \
    }

extern "C" {

// Writes the masked weights to `out`.
void impact_mask(const Group *group, const Tensor *tensors, int64_t count) {
    const auto pieces = pieces_of(tensors, count);
    FOR_DTYPE(for_blocks(*group, pieces, [&](const Tensor &t, int64_t begin, int n, int64_t) {
        mask_block<T>(*group, t, begin, n);
    }))
}

// Writes the factors of the weights to `out`, float32.
void impact_factors(const Group *group, const Tensor *tensors, int64_t count) {
    const auto pieces = pieces_of(tensors, count);
    for_blocks(*group, pieces, [&](const Tensor &t, int64_t begin, int n, int64_t) {
        const Factors factor(*group, t, begin);
        float *out = static_cast<float *>(t.out) + begin;
#pragma omp simd
        for (int i = 0; i < n; ++i) out[i] = factor(i);
    });
}

// The mirror step, then what `rule` says; `result` gets the sum of |h|, and how many weights live.
void impact_step(const Group *group, const Tensor *tensors, int64_t count, double *result) {
    Sums sums;
    FOR_DTYPE(sums = step_all<T>(*group, tensors, count))
    for (int64_t k = 0; k < count && group->rule == ADAMW; ++k) *tensors[k].steps += 1.0f;
    result[0] = sums.size, result[1] = sums.alive;
}

// The level at which min(1, c·w) has a mean over the weights that live, solved from that of a sample.
double impact_level(const Group *group, const Tensor *tensors, int64_t count, double mean, int64_t size) {
    double level = 0;
    FOR_DTYPE(level = level_all<T>(*group, tensors, count, mean, size))
    return level;
}
}
