// What loadmaster adds to llama.cpp, as a C ABI for ctypes; compiled with the engine it belongs to.
//
// Virtual devices: ggml devices of any size that compute on the CPU, enforce a byte limit and count.
// They size a model for a card that is not here, and stand in for a card in tests. They are not CUDA:
// context, pools and workspaces stay outside, and the supported operations are the CPU's.
#pragma once

#include <stddef.h>
#include <stdint.h>

struct llama_context;

#ifdef __cplusplus
extern "C" {
#endif

#define LM_API __attribute__((visibility("default")))

// What a call may return where it returns an `int`; other values are 0 or a count.
enum lm_error { LM_BAD_ARGUMENT = -1, LM_OUT_OF_MEMORY = -2, LM_NAME_TAKEN = -3, LM_UNSUPPORTED = -4 };

// Raised when a signature or the meaning of a call changes.
LM_API int lm_version(void);

// Sizes of the engine's structs: ctypes mirrors of another size would corrupt memory.
LM_API void lm_struct_sizes(size_t * model_params, size_t * context_params, size_t * batch);

// Describes a device and returns its index. `alignment` is a power of two; `row_padding` is the
// number of elements to which quantized rows are padded (CUDA: 512, none: 0); operations with at
// least `offload_min_batch` tokens run here though their weights are in host memory (never: 0);
// `pinned_host` offers a host buffer type, as CUDA does: weights kept on the CPU lie in it instead
// of CPU_REPACK, and can be streamed. It is host memory and does not count against the device.
LM_API int lm_add_device(const char * name, size_t total, size_t alignment, size_t row_padding,
                         int offload_min_batch, int pinned_host);

// Makes the devices described so far known to the engine, in order. Before a model is loaded.
LM_API int lm_register(void);

// Bytes allocated now, the highest since the last reset, and the number of refused allocations.
LM_API int lm_device_usage(int device, size_t * used, size_t * peak, size_t * denied);
LM_API int lm_device_reset_peak(int device);

// Changes the limit; buffers that already exist stay.
LM_API int lm_device_set_total(int device, size_t total);

// Refuses the n-th allocation from now (1: the next), then goes on as before; 0 cancels.
LM_API int lm_device_deny_after(int device, int n);

// CUDA's matrix kernels for flash attention read K and V as f16: where the cache has another type,
// they copy one layer of it into the compute buffer. On: the device's compute buffer has that room.
LM_API int lm_device_set_f16_attention(int device, int enabled);

// One buffer type of a context. `device_name` is empty for host memory.
struct lm_buffer_row {
    char buffer_type[64];
    char device_name[64];
    int32_t is_host;
    size_t model, context, compute;
};

// Fills at most `capacity` rows and returns how many there are.
LM_API int lm_memory_breakdown(const struct llama_context * ctx, struct lm_buffer_row * rows, int capacity);

// The compute buffers of a context that was made without allocating, one row for each backend. The
// dry run forgets which device the engine wants for a layer's norms (ggml_backend_sched_reserve_size
// resets the scheduler after the graph was built) and is wrong where several GPUs hold all layers.
// This reserves them as a load does: as address space, that nothing touches. `n_outputs` is the
// context's n_outputs_max. LM_OUT_OF_MEMORY when a device is too small for them.
LM_API int lm_reserve(struct llama_context * ctx, uint32_t n_outputs, struct lm_buffer_row * rows, int capacity);

// Sets the logits of tokens to -inf whose bit in `allowed` is 0.
LM_API void lm_mask_logits(float * logits, int32_t n_vocab, const uint32_t * allowed);

// The `n_top` likeliest tokens, likeliest first; returns their number. A token's log-probability is
// its logit less `log_sum`.
#define LM_TOP_MAX 64
LM_API int lm_likeliest(const float * logits, int32_t n_vocab, int32_t n_top, int32_t * top, double * log_sum);

// ---- timing the engine's own kernels (measure.cpp)
//
// `device_name` is the engine's (`CUDA0`), empty for the CPU. Each call runs its graph once to warm up
// and then `runs` times, and writes the seconds of every run. What a device cannot do is
// LM_UNSUPPORTED.

// Matrices of weights, at least as many as overflow the caches. With `n_expert` each is a stack of
// experts, and a token takes `n_used` of them.
struct lm_product {
    int32_t type;      // ggml_type
    int32_t repacked;  // in the CPU's repacked layout; LM_UNSUPPORTED where the type has none
    int64_t n_in, n_out;
    int32_t n_matrices, n_expert, n_used;
};

// One timing: so many tokens, over the first `n_matrices` matrices.
struct lm_point {
    int32_t n_tokens, n_matrices;
};

LM_API int lm_time_products(const char * device_name, int n_threads, const struct lm_product * spec,
                            const struct lm_point * points, int n_points, int runs, double * seconds);

// Flash attention over `n_cells` cells in `n_layers` caches; each token sees `n_visible` of them.
struct lm_attention {
    int32_t type, head_dim, n_head, n_head_kv, n_cells, n_tokens, n_visible, n_layers;
};

LM_API int lm_time_attention(const char * device_name, int n_threads, const struct lm_attention * spec,
                             int runs, double * seconds);

// `n_ops` operations in a row on `width` × `n_tokens` elements.
enum lm_small { LM_NORM = 0, LM_GATE = 1, LM_ROPE = 2, LM_COPY = 3 };

LM_API int lm_time_small(const char * device_name, int n_threads, int kind, int64_t width, int n_tokens,
                         int n_ops, int runs, double * seconds);

// Copies host memory to a device: page-locked, or pageable.
LM_API int lm_time_link(const char * device_name, size_t size, int pinned, int runs, double * seconds);

// Reads host memory with so many threads.
LM_API int lm_time_read(int n_threads, size_t size, int runs, double * seconds);

#ifdef __cplusplus
}
#endif
