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
enum lm_error { LM_BAD_ARGUMENT = -1, LM_OUT_OF_MEMORY = -2, LM_NAME_TAKEN = -3 };

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

#ifdef __cplusplus
}
#endif
