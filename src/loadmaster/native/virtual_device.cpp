// A ggml device of any size that computes on the CPU, enforces a byte limit and counts.
#include "ggml-backend-impl.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "loadmaster_native.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <exception>
#include <new>
#include <string>

namespace {

struct virtual_device {
    std::string name, host_name;
    size_t alignment, row_padding;
    int offload_min_batch;
    bool pinned_host;
    // The engine allocates from one thread, a meter reads from another.
    std::atomic<size_t> total, used{0}, peak{0}, denied{0};
    std::atomic<int> deny_after{0};
    std::atomic<bool> f16_attention{false};
    ggml_backend_buffer_type buffer_type, host_buffer_type;
    ggml_backend_device device;
};

// Never destroyed: the engine's registry points into it until the process ends. A deque, so that
// adding a device does not move the others.
std::deque<virtual_device> & devices() {
    static auto & all = *new std::deque<virtual_device>;
    return all;
}

virtual_device * find(int index) {
    return index >= 0 && size_t(index) < devices().size() ? &devices()[index] : nullptr;
}

virtual_device & of(ggml_backend_buffer_type_t type) { return *static_cast<virtual_device *>(type->context); }
virtual_device & of(ggml_backend_dev_t device) { return *static_cast<virtual_device *>(device->context); }

// ---- the account

bool denied_on_purpose(virtual_device & device) {
    int n = device.deny_after.load();
    while (n > 0 && !device.deny_after.compare_exchange_weak(n, n - 1)) {}
    return n == 1;
}

bool take(virtual_device & device, size_t size) {
    size_t used = device.used.load();
    do {
        if (size > device.total || used > device.total - size) return false;
    } while (!device.used.compare_exchange_weak(used, used + size));
    size_t peak = device.peak.load();
    while (peak < used + size && !device.peak.compare_exchange_weak(peak, used + size)) {}
    return true;
}

// ---- buffers: host memory that the engine must not read directly

void buffer_free(ggml_backend_buffer_t buffer) {
    of(buffer->buft).used -= buffer->size;
    free(buffer->context);
}
void * buffer_base(ggml_backend_buffer_t buffer) { return buffer->context; }
char * at(const ggml_tensor * tensor, size_t offset) { return static_cast<char *>(tensor->data) + offset; }
void buffer_memset(ggml_backend_buffer_t, ggml_tensor * t, uint8_t v, size_t o, size_t n) { memset(at(t, o), v, n); }
void buffer_set(ggml_backend_buffer_t, ggml_tensor * t, const void * from, size_t o, size_t n) { memcpy(at(t, o), from, n); }
void buffer_get(ggml_backend_buffer_t, const ggml_tensor * t, void * to, size_t o, size_t n) { memcpy(to, at(t, o), n); }
void buffer_clear(ggml_backend_buffer_t buffer, uint8_t value) { memset(buffer->context, value, buffer->size); }

ggml_backend_buffer_t wrap(ggml_backend_buffer_type_t type, void * memory, size_t size) {
    ggml_backend_buffer_i calls = {};
    calls.free_buffer   = buffer_free;
    calls.get_base      = buffer_base;
    calls.memset_tensor = buffer_memset;
    calls.set_tensor    = buffer_set;
    calls.get_tensor    = buffer_get;
    calls.clear         = buffer_clear;
    return ggml_backend_buffer_init(type, calls, memory, size);
}

ggml_backend_buffer_t type_alloc(ggml_backend_buffer_type_t type, size_t size) {
    virtual_device & device = of(type);
    if (denied_on_purpose(device) || !take(device, size)) {
        device.denied++;
        return nullptr;
    }
    // A page at least, so that an empty buffer has an address too.
    const size_t alignment = std::max<size_t>(device.alignment, 4096);
    void * memory = nullptr;
    if (posix_memalign(&memory, alignment, std::max(size, alignment)) != 0) {
        device.used -= size;
        return nullptr;
    }
    return wrap(type, memory, size);
}

const char * type_name(ggml_backend_buffer_type_t type) { return of(type).name.c_str(); }
size_t type_alignment(ggml_backend_buffer_type_t type) { return of(type).alignment; }

size_t f16_copy(const ggml_tensor * cache, size_t size) {
    if (cache->type == GGML_TYPE_F16) return size;
    return GGML_PAD(size, 128) + ggml_nelements(cache) * ggml_type_size(GGML_TYPE_F16);
}

// As ggml_cuda_flash_attn_ext_get_f16_extra_data in the engine's ggml-cuda/fattn-common.cuh.
size_t attention_size(const ggml_tensor * tensor) {
    const ggml_tensor * k = tensor->src[1];
    const ggml_tensor * v = tensor->src[2];
    const bool shared = v->view_src && (v->view_src == k || (v->view_src == k->view_src && v->view_offs == k->view_offs));
    const size_t size = f16_copy(k, ggml_nbytes(tensor));
    return shared ? size : f16_copy(v, size);
}

size_t type_alloc_size(ggml_backend_buffer_type_t type, const ggml_tensor * tensor) {
    const virtual_device & device = of(type);
    const bool attention = tensor->op == GGML_OP_FLASH_ATTN_EXT && device.f16_attention;
    size_t size = attention ? attention_size(tensor) : ggml_nbytes(tensor);
    const size_t over = device.row_padding ? tensor->ne[0] % device.row_padding : 0;
    if (over != 0 && ggml_is_quantized(tensor->type)) size += ggml_row_size(tensor->type, device.row_padding - over);
    return size;
}

// ---- the pinned host buffer type: CPU memory under another name

const char * host_name(ggml_backend_buffer_type_t type) { return of(type).host_name.c_str(); }
size_t host_alignment(ggml_backend_buffer_type_t) { return ggml_backend_buft_get_alignment(ggml_backend_cpu_buffer_type()); }
bool host_is_host(ggml_backend_buffer_type_t) { return true; }
ggml_backend_buffer_t host_alloc(ggml_backend_buffer_type_t type, size_t size) {
    ggml_backend_buffer_t buffer = ggml_backend_buft_alloc_buffer(ggml_backend_cpu_buffer_type(), size);
    if (buffer) buffer->buft = type;
    return buffer;
}

// ---- the backend: a CPU backend of its own does the work

ggml_backend_t cpu_of(ggml_backend_t backend) { return static_cast<ggml_backend_t>(backend->context); }
const char * backend_name(ggml_backend_t backend) { return of(backend->device).name.c_str(); }
void backend_free(ggml_backend_t backend) {
    ggml_backend_free(cpu_of(backend));
    delete backend;
}
ggml_status backend_compute(ggml_backend_t backend, ggml_cgraph * graph) {
    return ggml_backend_graph_compute(cpu_of(backend), graph);
}
void backend_set_n_threads(ggml_backend_t backend, int n) { ggml_backend_cpu_set_n_threads(cpu_of(backend), n); }
void backend_set_abort_callback(ggml_backend_t backend, ggml_abort_callback callback, void * context) {
    ggml_backend_cpu_set_abort_callback(cpu_of(backend), callback, context);
}

ggml_backend_t device_init(ggml_backend_dev_t device, const char *) {
    static ggml_guid guid = {'l', 'o', 'a', 'd', 'm', 'a', 's', 't', 'e', 'r', '-', 'v', 'd', 'e', 'v', 1};
    ggml_backend_i calls = {};
    calls.get_name      = backend_name;
    calls.free          = backend_free;
    calls.graph_compute = backend_compute;
    ggml_backend_t cpu  = ggml_backend_cpu_init();
    return cpu ? new ggml_backend{&guid, calls, device, cpu} : nullptr;
}

// ---- the device

const char * device_name(ggml_backend_dev_t device) { return of(device).name.c_str(); }
const char * device_description(ggml_backend_dev_t) { return "virtual device (computes on the CPU)"; }
enum ggml_backend_dev_type device_type(ggml_backend_dev_t) { return GGML_BACKEND_DEVICE_TYPE_GPU; }
void device_memory(ggml_backend_dev_t device, size_t * free, size_t * total) {
    const size_t used = of(device).used;
    *total = of(device).total;
    *free  = *total > used ? *total - used : 0;  // the limit may have been lowered below what is used
}
void device_props(ggml_backend_dev_t device, ggml_backend_dev_props * props) {
    props->name        = device_name(device);
    props->description = device_description(device);
    props->type        = device_type(device);
    device_memory(device, &props->memory_free, &props->memory_total);
    props->caps               = {};
    props->caps.host_buffer   = of(device).pinned_host;
    props->caps.mmap_support  = true;
}
ggml_backend_buffer_type_t device_buffer_type(ggml_backend_dev_t device) { return &of(device).buffer_type; }
ggml_backend_buffer_type_t device_host_buffer_type(ggml_backend_dev_t device) {
    return of(device).pinned_host ? &of(device).host_buffer_type : nullptr;
}
bool device_supports_op(ggml_backend_dev_t, const ggml_tensor * op) {
    static ggml_backend_dev_t cpu = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    return ggml_backend_dev_supports_op(cpu, op);
}
bool device_supports_buffer_type(ggml_backend_dev_t device, ggml_backend_buffer_type_t type) {
    return type == &of(device).buffer_type;
}

// As get_op_batch_size in the engine's ggml-cuda/ggml-cuda.cu.
int64_t batch_of(const ggml_tensor * op) {
    switch (op->op) {
        case GGML_OP_GET_ROWS: return 0;
        case GGML_OP_MUL_MAT: return op->ne[1];
        case GGML_OP_MUL_MAT_ID:
        case GGML_OP_ROPE:
        case GGML_OP_ROPE_BACK: return op->ne[2];
        default: return ggml_nrows(op);
    }
}
bool device_offload_op(ggml_backend_dev_t device, const ggml_tensor * op) {
    const int least = of(device).offload_min_batch;
    return least > 0 && batch_of(op) >= least;
}

// ---- the registry entry

const char * registry_name(ggml_backend_reg_t) { return "LoadmasterVirtual"; }
size_t registry_count(ggml_backend_reg_t) { return devices().size(); }
ggml_backend_dev_t registry_device(ggml_backend_reg_t, size_t index) { return &devices()[index].device; }

// Asked by llama_context for each backend; without an answer a device would compute with ggml's
// default number of threads, whatever the user set.
void * registry_call(ggml_backend_reg_t, const char * name) {
    if (strcmp(name, "ggml_backend_set_n_threads") == 0) return reinterpret_cast<void *>(backend_set_n_threads);
    if (strcmp(name, "ggml_backend_set_abort_callback") == 0) return reinterpret_cast<void *>(backend_set_abort_callback);
    return nullptr;
}

ggml_backend_reg registry = {
    GGML_BACKEND_API_VERSION, {registry_name, registry_count, registry_device, registry_call}, nullptr};

void connect(virtual_device & device) {
    device.buffer_type = {{}, &device.device, &device};
    device.buffer_type.iface.get_name       = type_name;
    device.buffer_type.iface.alloc_buffer   = type_alloc;
    device.buffer_type.iface.get_alignment  = type_alignment;
    device.buffer_type.iface.get_alloc_size = type_alloc_size;

    device.host_buffer_type = {{}, &device.device, &device};
    device.host_buffer_type.iface.get_name      = host_name;
    device.host_buffer_type.iface.alloc_buffer  = host_alloc;
    device.host_buffer_type.iface.get_alignment = host_alignment;
    device.host_buffer_type.iface.is_host       = host_is_host;

    device.device = {{}, &registry, &device};
    device.device.iface.get_name             = device_name;
    device.device.iface.get_description      = device_description;
    device.device.iface.get_memory           = device_memory;
    device.device.iface.get_type             = device_type;
    device.device.iface.get_props            = device_props;
    device.device.iface.init_backend         = device_init;
    device.device.iface.get_buffer_type      = device_buffer_type;
    device.device.iface.get_host_buffer_type = device_host_buffer_type;
    device.device.iface.supports_op          = device_supports_op;
    device.device.iface.supports_buft        = device_supports_buffer_type;
    device.device.iface.offload_op           = device_offload_op;
}

bool name_taken(const char * name) {
    for (const virtual_device & device : devices()) {
        if (device.name == name) return true;
    }
    return ggml_backend_dev_by_name(name) != nullptr;
}

}  // namespace

extern "C" {

int lm_add_device(const char * name, size_t total, size_t alignment, size_t row_padding,
                  int offload_min_batch, int pinned_host) {
    const bool power_of_two = alignment != 0 && (alignment & (alignment - 1)) == 0;
    if (name == nullptr || *name == 0 || !power_of_two || offload_min_batch < 0) return LM_BAD_ARGUMENT;
    try {
        if (name_taken(name)) return LM_NAME_TAKEN;
        virtual_device & device  = devices().emplace_back();
        device.name              = name;
        device.host_name         = device.name + "_Host";
        device.total             = total;
        device.alignment         = alignment;
        device.row_padding       = row_padding;
        device.offload_min_batch = offload_min_batch;
        device.pinned_host       = pinned_host != 0;
        connect(device);
        return int(devices().size()) - 1;
    } catch (const std::exception &) {  // no exception may cross into C
        return LM_OUT_OF_MEMORY;
    }
}

int lm_register(void) {
    try {
        ggml_backend_register(&registry);  // the second time does nothing: devices are then added one by one
        for (virtual_device & device : devices()) ggml_backend_device_register(&device.device);
        return int(devices().size());
    } catch (const std::exception &) {
        return LM_OUT_OF_MEMORY;
    }
}

int lm_device_usage(int index, size_t * used, size_t * peak, size_t * denied) {
    const virtual_device * device = find(index);
    if (device == nullptr || !used || !peak || !denied) return LM_BAD_ARGUMENT;
    *used   = device->used;
    *peak   = device->peak;
    *denied = device->denied;
    return 0;
}

int lm_device_reset_peak(int index) {
    virtual_device * device = find(index);
    if (device == nullptr) return LM_BAD_ARGUMENT;
    device->peak = device->used.load();
    return 0;
}

int lm_device_set_total(int index, size_t total) {
    virtual_device * device = find(index);
    if (device == nullptr) return LM_BAD_ARGUMENT;
    device->total = total;
    return 0;
}

int lm_device_deny_after(int index, int n) {
    virtual_device * device = find(index);
    if (device == nullptr || n < 0) return LM_BAD_ARGUMENT;
    device->deny_after = n;
    return 0;
}

int lm_device_set_f16_attention(int index, int enabled) {
    virtual_device * device = find(index);
    if (device == nullptr) return LM_BAD_ARGUMENT;
    device->f16_attention = enabled != 0;
    return 0;
}

}  // extern "C"
