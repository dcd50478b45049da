// llama.cpp's memory breakdown, flat: the engine gives it as a std::map, which ctypes cannot read.
#include "ggml-backend.h"
#include "llama-context.h"
#include "llama-ext.h"
#include "llama.h"
#include "loadmaster_native.h"

#include <algorithm>
#include <cstdio>
#include <exception>

namespace {

// CPU_REPACK and the like are not "host" to ggml, and yet they are host memory.
bool in_host_memory(ggml_backend_buffer_type_t type) {
    if (ggml_backend_buft_is_host(type)) return true;
    ggml_backend_dev_t device = ggml_backend_buft_get_device(type);
    return device == nullptr || ggml_backend_dev_type(device) == GGML_BACKEND_DEVICE_TYPE_CPU;
}

template <size_t N> void copy_name(char (&to)[N], const char * from) { snprintf(to, N, "%s", from); }

void fill(lm_buffer_row & row, ggml_backend_buffer_type_t type, const llama_memory_breakdown_data & data) {
    const bool host = in_host_memory(type);
    copy_name(row.buffer_type, ggml_backend_buft_name(type));
    copy_name(row.device_name, host ? "" : ggml_backend_dev_name(ggml_backend_buft_get_device(type)));
    row.is_host = ggml_backend_buft_is_host(type);
    row.model   = data.model;
    row.context = data.context;
    row.compute = data.compute;
}

}  // namespace

extern "C" {

int lm_version(void) { return 1; }

void lm_struct_sizes(size_t * model_params, size_t * context_params, size_t * batch) {
    *model_params   = sizeof(llama_model_params);
    *context_params = sizeof(llama_context_params);
    *batch          = sizeof(llama_batch);
}

int lm_memory_breakdown(const llama_context * ctx, lm_buffer_row * rows, int capacity) {
    if (ctx == nullptr || capacity < 0 || (rows == nullptr && capacity > 0)) return LM_BAD_ARGUMENT;
    try {
        int count = 0;
        for (const auto & [type, data] : llama_get_memory_breakdown(ctx)) {
            if (count < capacity) fill(rows[count], type, data);
            count++;
        }
        return count;
    } catch (const std::exception &) {  // no exception may cross into C
        return LM_OUT_OF_MEMORY;
    }
}

int lm_reserve(llama_context * ctx, uint32_t n_outputs, lm_buffer_row * rows, int capacity) {
    if (ctx == nullptr || n_outputs == 0 || capacity < 0 || (rows == nullptr && capacity > 0)) return LM_BAD_ARGUMENT;
    try {
        const uint32_t n_seqs = llama_n_seq_max(ctx);
        const uint32_t n_tokens = std::min(llama_n_ctx(ctx), llama_n_ubatch(ctx));
        const bool reserved = llama_graph_reserve(ctx, n_tokens, n_seqs, std::min(n_tokens, n_outputs)) != nullptr &&
                              llama_graph_reserve(ctx, n_seqs, n_seqs, n_seqs) != nullptr;
        if (!reserved) return LM_OUT_OF_MEMORY;
        ggml_backend_sched_t sched = ctx->get_sched();
        const int count = ggml_backend_sched_get_n_backends(sched);
        for (int i = 0; i < std::min(count, capacity); i++) {
            ggml_backend_t backend = ggml_backend_sched_get_backend(sched, i);
            llama_memory_breakdown_data data;
            data.compute = ggml_backend_sched_get_buffer_size(sched, backend);
            fill(rows[i], ggml_backend_sched_get_buffer_type(sched, backend), data);
        }
        return count;
    } catch (const std::exception &) {
        return LM_OUT_OF_MEMORY;
    }
}

}  // extern "C"
