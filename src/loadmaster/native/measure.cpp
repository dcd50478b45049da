// Times the engine's own kernels on one device: what a prediction of speed is made from.
//
// Everything goes through ggml_backend_dev_*, so that a CUDA card is measured with its own kernels.
// Weights lie where the engine would put them: on the CPU in repacked buffers where the type has them.
#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"
#include "loadmaster_native.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <memory>
#include <thread>
#include <vector>

namespace {

using clock_type = std::chrono::steady_clock;

double seconds_since(clock_type::time_point start) {
    return std::chrono::duration<double>(clock_type::now() - start).count();
}

template <auto release> struct releaser {
    template <typename T> void operator()(T * handle) const { release(handle); }
};
using context_ptr = std::unique_ptr<ggml_context, releaser<ggml_free>>;
using buffer_ptr  = std::unique_ptr<ggml_backend_buffer, releaser<ggml_backend_buffer_free>>;
using backend_ptr = std::unique_ptr<ggml_backend, releaser<ggml_backend_free>>;

struct failure { int code; };

template <typename T> T require(T value, int code) {
    if (!value) throw failure{code};
    return value;
}

context_ptr make_context(size_t n_tensors) {
    const size_t size = ggml_tensor_overhead() * n_tensors + ggml_graph_overhead_custom(n_tensors, false);
    return context_ptr(require(ggml_init({size, nullptr, true}), LM_OUT_OF_MEMORY));
}

// ---- the device

ggml_backend_dev_t find_device(const char * name) {
    if (name == nullptr || *name == 0) return ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    return require(ggml_backend_dev_by_name(name), LM_BAD_ARGUMENT);
}

bool is_cpu(ggml_backend_dev_t device) { return ggml_backend_dev_type(device) == GGML_BACKEND_DEVICE_TYPE_CPU; }

backend_ptr open_backend(ggml_backend_dev_t device, int n_threads) {
    backend_ptr backend(require(ggml_backend_dev_init(device, nullptr), LM_OUT_OF_MEMORY));
    auto set = reinterpret_cast<ggml_backend_set_n_threads_t>(
        ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(device), "ggml_backend_set_n_threads"));
    if (set != nullptr && n_threads > 0) set(backend.get(), n_threads);
    return backend;
}

bool takes(ggml_backend_dev_t device, ggml_backend_buffer_type_t type, ggml_tensor * weight, const ggml_tensor * op) {
    buffer_ptr empty(ggml_backend_buft_alloc_buffer(type, 0));
    if (!empty) return false;
    weight->buffer = empty.get();
    const bool taken = ggml_backend_dev_supports_op(device, op);
    weight->buffer = nullptr;
    return taken;
}

// The repacked buffer type that has a kernel for `op`; null when there is none (weight_buft_supported
// and make_cpu_buft_list of llama-model.cpp).
ggml_backend_buffer_type_t repacked_type(ggml_backend_dev_t device, ggml_tensor * weight, const ggml_tensor * op) {
    auto extras = reinterpret_cast<ggml_backend_dev_get_extra_bufts_t>(
        ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(device), "ggml_backend_dev_get_extra_bufts"));
    if (extras == nullptr) return nullptr;
    for (ggml_backend_buffer_type_t * type = extras(device); type != nullptr && *type != nullptr; type++) {
        if (takes(device, *type, weight, op)) return *type;
    }
    return nullptr;
}

// ---- tensors

// Finite, not zero, no denormals: what the kernels meet in a real model.
std::vector<uint8_t> weight_bytes(const ggml_tensor * tensor) {
    const int64_t n = tensor->ne[0];
    const size_t row = ggml_row_size(tensor->type, n);
    std::vector<uint8_t> bytes(ggml_nbytes(tensor), 0x2c);
    if (!ggml_quantize_requires_imatrix(tensor->type) && tensor->type != GGML_TYPE_I32) {
        std::vector<float> values(n);
        for (int64_t i = 0; i < n; i++) values[i] = float((i * 7919) % 61 - 30) / 1000.0f + 0.0005f;
        ggml_quantize_chunk(tensor->type, values.data(), bytes.data(), 0, 1, n, nullptr);
        for (size_t at = row; at < bytes.size(); at += row) memcpy(&bytes[at], bytes.data(), row);
    }
    return bytes;
}

void fill(ggml_context * context, float value) {
    for (ggml_tensor * t = ggml_get_first_tensor(context); t != nullptr; t = ggml_get_next_tensor(context, t)) {
        if (t->type != GGML_TYPE_F32 || t->op != GGML_OP_NONE || t->view_src != nullptr) continue;
        std::vector<float> values(ggml_nelements(t), value);
        ggml_backend_tensor_set(t, values.data(), 0, ggml_nbytes(t));
    }
}

buffer_ptr allocate(ggml_context * context, ggml_backend_buffer_type_t type) {
    return buffer_ptr(require(ggml_backend_alloc_ctx_tensors_from_buft(context, type), LM_OUT_OF_MEMORY));
}

// Times `runs` computations of a graph after one that warms up.
void time_graph(ggml_backend_t backend, ggml_cgraph * graph, int runs, double * seconds) {
    for (int run = -1; run < runs; run++) {
        const auto start = clock_type::now();
        if (ggml_backend_graph_compute(backend, graph) != GGML_STATUS_SUCCESS) throw failure{LM_UNSUPPORTED};
        ggml_backend_synchronize(backend);
        if (run >= 0) seconds[run] = seconds_since(start);
    }
}

void require_support(ggml_backend_dev_t device, ggml_cgraph * graph) {
    for (int i = 0; i < ggml_graph_n_nodes(graph); i++) {
        if (!ggml_backend_dev_supports_op(device, ggml_graph_node(graph, i))) throw failure{LM_UNSUPPORTED};
    }
}

// ---- matrix products

ggml_tensor * product(ggml_context * context, ggml_tensor * weight, const lm_product & spec, int n_tokens, ggml_tensor ** ids) {
    if (spec.n_expert == 0) {
        return ggml_mul_mat(context, weight, ggml_new_tensor_2d(context, GGML_TYPE_F32, spec.n_in, n_tokens));
    }
    if (*ids == nullptr) *ids = ggml_new_tensor_2d(context, GGML_TYPE_I32, spec.n_used, n_tokens);
    ggml_tensor * input = ggml_new_tensor_3d(context, GGML_TYPE_F32, spec.n_in, 1, n_tokens);
    return ggml_mul_mat_id(context, weight, input, *ids);
}

// Token t takes the experts t·n_used, t·n_used + 1, …: all of them equally often.
void spread_experts(ggml_tensor * ids, int n_expert) {
    std::vector<int32_t> chosen(ggml_nelements(ids));
    for (size_t i = 0; i < chosen.size(); i++) chosen[i] = int32_t(i % n_expert);
    ggml_backend_tensor_set(ids, chosen.data(), 0, ggml_nbytes(ids));
}

struct weights {
    context_ptr context;
    std::vector<ggml_tensor *> matrices;
    buffer_ptr buffer;
};

weights make_weights(ggml_backend_dev_t device, const lm_product & spec) {
    weights made;
    made.context = make_context(spec.n_matrices + 1);
    for (int i = 0; i < spec.n_matrices; i++) {
        made.matrices.push_back(ggml_new_tensor_3d(
            made.context.get(), ggml_type(spec.type), spec.n_in, spec.n_out, std::max(1, spec.n_expert)));
    }
    ggml_backend_buffer_type_t type = ggml_backend_dev_buffer_type(device);
    if (spec.repacked) {
        context_ptr scratch = make_context(8);
        ggml_tensor * ids = nullptr;
        const ggml_tensor * op = product(scratch.get(), made.matrices[0], spec, 1, &ids);
        type = require(is_cpu(device) ? repacked_type(device, made.matrices[0], op) : nullptr, LM_UNSUPPORTED);
    }
    made.buffer = allocate(made.context.get(), type);
    ggml_backend_buffer_set_usage(made.buffer.get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
    const std::vector<uint8_t> bytes = weight_bytes(made.matrices[0]);
    for (ggml_tensor * matrix : made.matrices) ggml_backend_tensor_set(matrix, bytes.data(), 0, bytes.size());
    return made;
}

void time_product(ggml_backend_dev_t device, ggml_backend_t backend, const weights & from, const lm_product & spec,
                  int n_tokens, int n_matrices, int runs, double * seconds) {
    context_ptr context = make_context(4 * size_t(n_matrices) + 8);
    ggml_cgraph * graph = ggml_new_graph_custom(context.get(), 4 * n_matrices + 8, false);
    ggml_tensor * ids = nullptr;
    for (int i = 0; i < n_matrices; i++) {
        ggml_build_forward_expand(graph, product(context.get(), from.matrices[i], spec, n_tokens, &ids));
    }
    require_support(device, graph);
    buffer_ptr buffer = allocate(context.get(), ggml_backend_dev_buffer_type(device));
    fill(context.get(), 0.01f);
    if (ids != nullptr) spread_experts(ids, spec.n_expert);
    time_graph(backend, graph, runs, seconds);
}

// ---- attention

ggml_tensor * attention(ggml_context * context, const lm_attention & spec, ggml_tensor * mask) {
    const auto type = ggml_type(spec.type);
    ggml_tensor * q = ggml_new_tensor_3d(context, GGML_TYPE_F32, spec.head_dim, spec.n_tokens, spec.n_head);
    // As the cache lies in memory: all heads of a cell side by side.
    ggml_tensor * k = ggml_new_tensor_3d(context, type, spec.head_dim, spec.n_head_kv, spec.n_cells);
    ggml_tensor * v = ggml_new_tensor_3d(context, type, spec.head_dim, spec.n_head_kv, spec.n_cells);
    ggml_tensor * out = ggml_flash_attn_ext(
        context, q, ggml_permute(context, k, 0, 2, 1, 3), ggml_permute(context, v, 0, 2, 1, 3), mask, 0.1f, 0.0f, 0.0f);
    ggml_prec_set_acc(out, GGML_PREC_F32);
    return out;
}

// Each token sees `n_visible` cells of its own; the others are masked, as those of other sequences.
void set_mask(ggml_tensor * mask, const lm_attention & spec) {
    const ggml_fp16_t seen = ggml_fp32_to_fp16(0.0f), hidden = ggml_fp32_to_fp16(-INFINITY);
    std::vector<ggml_fp16_t> values(ggml_nelements(mask), hidden);
    for (int token = 0; token < spec.n_tokens; token++) {
        for (int i = 0; i < spec.n_visible; i++) {
            const size_t cell = (size_t(token) * spec.n_visible + i) % spec.n_cells;
            values[size_t(token) * spec.n_cells + cell] = seen;
        }
    }
    ggml_backend_tensor_set(mask, values.data(), 0, ggml_nbytes(mask));
}

void time_attention(ggml_backend_dev_t device, ggml_backend_t backend, const lm_attention & spec, int runs, double * seconds) {
    context_ptr context = make_context(8 * size_t(spec.n_layers) + 8);
    ggml_cgraph * graph = ggml_new_graph_custom(context.get(), 8 * spec.n_layers + 8, false);
    ggml_tensor * mask = ggml_new_tensor_2d(context.get(), GGML_TYPE_F16, spec.n_cells, spec.n_tokens);
    for (int i = 0; i < spec.n_layers; i++) ggml_build_forward_expand(graph, attention(context.get(), spec, mask));
    require_support(device, graph);
    buffer_ptr buffer = allocate(context.get(), ggml_backend_dev_buffer_type(device));
    ggml_backend_buffer_clear(buffer.get(), 0x22);  // small and finite in every type
    fill(context.get(), 0.01f);
    set_mask(mask, spec);
    time_graph(backend, graph, runs, seconds);
}

// ---- what is neither

ggml_tensor * small_op(ggml_context * context, int kind, ggml_tensor * x, ggml_tensor * other, ggml_tensor * positions) {
    switch (kind) {
        case LM_NORM: return ggml_add(context, x, ggml_mul(context, ggml_rms_norm(context, x, 1e-5f), other));
        case LM_GATE: return ggml_swiglu_split(context, x, other);
        case LM_ROPE: return ggml_rope_ext(context, x, positions, nullptr, 128, 0, 4096, 1e4f, 1.0f, 0.0f, 1.0f, 32.0f, 1.0f);
        case LM_COPY: return ggml_cpy(context, x, other);
        default: throw failure{LM_BAD_ARGUMENT};
    }
}

void time_small(ggml_backend_dev_t device, ggml_backend_t backend, int kind, int64_t width, int n_tokens, int n_ops,
                int runs, double * seconds) {
    const size_t size = 5 * size_t(n_ops) + 16;
    context_ptr context = make_context(size);
    ggml_cgraph * graph = ggml_new_graph_custom(context.get(), size, false);
    ggml_tensor * positions = ggml_new_tensor_1d(context.get(), GGML_TYPE_I32, n_tokens);
    const bool rope = kind == LM_ROPE;
    ggml_tensor * x = rope ? ggml_new_tensor_3d(context.get(), GGML_TYPE_F32, 128, std::max<int64_t>(1, width / 128), n_tokens)
                           : ggml_new_tensor_2d(context.get(), GGML_TYPE_F32, width, n_tokens);
    ggml_tensor * other = ggml_new_tensor_2d(context.get(), GGML_TYPE_F32, width, kind == LM_NORM ? 1 : n_tokens);
    ggml_tensor * next = x;
    for (int i = 0; i < n_ops; i++) {
        next = small_op(context.get(), kind, kind == LM_COPY ? x : next, other, positions);
        ggml_build_forward_expand(graph, next);
    }
    require_support(device, graph);
    buffer_ptr buffer = allocate(context.get(), ggml_backend_dev_buffer_type(device));
    fill(context.get(), 0.5f);
    const std::vector<int32_t> zeros(n_tokens, 1);
    ggml_backend_tensor_set(positions, zeros.data(), 0, ggml_nbytes(positions));
    time_graph(backend, graph, runs, seconds);
}

// ---- memory and link

uint64_t sum(const uint64_t * from, size_t n) {
    uint64_t parts[8] = {};
    for (size_t i = 0; i + 8 <= n; i += 8) {
        for (int j = 0; j < 8; j++) parts[j] += from[i + j];
    }
    uint64_t total = 0;
    for (uint64_t part : parts) total += part;
    return total;
}

double read_once(const std::vector<uint64_t> & memory, int n_threads, uint64_t * sink) {
    const size_t share = memory.size() / n_threads;
    std::vector<uint64_t> sums(n_threads);
    std::vector<std::thread> threads;
    const auto start = clock_type::now();
    for (int i = 1; i < n_threads; i++) {
        threads.emplace_back([&, i] { sums[i] = sum(memory.data() + i * share, share); });
    }
    sums[0] = sum(memory.data(), share);
    for (std::thread & thread : threads) thread.join();
    const double seconds = seconds_since(start);
    for (uint64_t part : sums) *sink += part;
    return seconds;
}

void time_link(ggml_backend_dev_t device, size_t size, bool pinned, int runs, double * seconds) {
    ggml_backend_buffer_type_t host = pinned ? require(ggml_backend_dev_host_buffer_type(device), LM_UNSUPPORTED)
                                             : ggml_backend_cpu_buffer_type();
    context_ptr context = make_context(2);
    ggml_tensor * target = ggml_new_tensor_1d(context.get(), GGML_TYPE_I8, int64_t(size));
    buffer_ptr there = allocate(context.get(), ggml_backend_dev_buffer_type(device));
    buffer_ptr here(require(ggml_backend_buft_alloc_buffer(host, size), LM_OUT_OF_MEMORY));
    ggml_backend_buffer_clear(here.get(), 1);
    const void * from = ggml_backend_buffer_get_base(here.get());
    for (int run = -1; run < runs; run++) {
        const auto start = clock_type::now();
        ggml_backend_tensor_set(target, from, 0, size);
        if (run >= 0) seconds[run] = seconds_since(start);
    }
}

template <typename F> int guarded(F && call) {
    try {
        call();
        return 0;
    } catch (const failure & failed) {
        return failed.code;
    } catch (const std::exception &) {  // no exception may cross into C
        return LM_OUT_OF_MEMORY;
    }
}

bool valid(const lm_product & spec) {
    return spec.type >= 0 && spec.type < GGML_TYPE_COUNT && spec.n_in > 0 && spec.n_out > 0 && spec.n_matrices > 0 &&
           spec.n_expert >= 0 && spec.n_used <= spec.n_expert && ggml_blck_size(ggml_type(spec.type)) > 0 &&
           spec.n_in % ggml_blck_size(ggml_type(spec.type)) == 0;
}

}  // namespace

extern "C" {

int lm_time_products(const char * device_name, int n_threads, const struct lm_product * spec, const struct lm_point * points,
                     int n_points, int runs, double * seconds) {
    if (!spec || !points || !seconds || !valid(*spec) || n_points < 1 || runs < 1) return LM_BAD_ARGUMENT;
    return guarded([&] {
        ggml_backend_dev_t device = find_device(device_name);
        backend_ptr backend = open_backend(device, n_threads);
        const weights from = make_weights(device, *spec);
        for (int i = 0; i < n_points; i++) {
            const int n_matrices = std::clamp(int(points[i].n_matrices), 1, int(spec->n_matrices));
            time_product(device, backend.get(), from, *spec, points[i].n_tokens, n_matrices, runs, seconds + i * runs);
        }
    });
}

int lm_time_attention(const char * device_name, int n_threads, const struct lm_attention * spec, int runs, double * seconds) {
    if (!spec || !seconds || spec->n_cells < 1 || spec->n_tokens < 1 || spec->n_layers < 1 || runs < 1) return LM_BAD_ARGUMENT;
    return guarded([&] {
        ggml_backend_dev_t device = find_device(device_name);
        backend_ptr backend = open_backend(device, n_threads);
        time_attention(device, backend.get(), *spec, runs, seconds);
    });
}

int lm_time_small(const char * device_name, int n_threads, int kind, int64_t width, int n_tokens, int n_ops, int runs,
                  double * seconds) {
    if (!seconds || width < 1 || n_tokens < 1 || n_ops < 1 || runs < 1) return LM_BAD_ARGUMENT;
    return guarded([&] {
        ggml_backend_dev_t device = find_device(device_name);
        backend_ptr backend = open_backend(device, n_threads);
        time_small(device, backend.get(), kind, width, n_tokens, n_ops, runs, seconds);
    });
}

int lm_time_link(const char * device_name, size_t size, int pinned, int runs, double * seconds) {
    if (!device_name || !seconds || size == 0 || runs < 1) return LM_BAD_ARGUMENT;
    return guarded([&] { time_link(find_device(device_name), size, pinned != 0, runs, seconds); });
}

int lm_time_read(int n_threads, size_t size, int runs, double * seconds) {
    if (!seconds || n_threads < 1 || size < 4096 || runs < 1) return LM_BAD_ARGUMENT;
    return guarded([&] {
        std::vector<uint64_t> memory(size / sizeof(uint64_t), 1);
        uint64_t sink = 0;
        for (int run = 0; run < runs; run++) seconds[run] = read_once(memory, n_threads, &sink);
        if (sink == 0) throw failure{LM_UNSUPPORTED};  // keeps the sums from being optimised away
    });
}

}  // extern "C"
