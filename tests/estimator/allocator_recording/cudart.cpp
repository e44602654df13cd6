// A CUDA runtime and driver without a device: addresses are handed out in increasing order and never touched, the capacity comes from the
// environment (CAPACITY [bytes]). With it torch's own libc10_cuda.so, and thus its caching allocator, runs on any machine.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string_view>

#include <cuda.h>
#include <cuda_runtime_api.h>

namespace {
constexpr uint64_t kPage = 2ull << 20;
uint64_t capacity() {
  static const uint64_t value = std::getenv("CAPACITY") ? std::strtoull(std::getenv("CAPACITY"), nullptr, 10) : 1ull << 40;
  return value;
}
uint64_t used = 0;
uint64_t next_address = 0x700000000000ull;
uint64_t next_handle = 1;
std::map<uint64_t, uint64_t> segments, handles;

uint64_t take_addresses(uint64_t size) {
  const uint64_t address = next_address;
  next_address += (size + kPage - 1) / kPage * kPage;
  return address;
}

CUresult address_reserve(CUdeviceptr* ptr, size_t size, size_t, CUdeviceptr, unsigned long long) {
  *ptr = take_addresses(size);
  return CUDA_SUCCESS;
}
CUresult mem_create(CUmemGenericAllocationHandle* handle, size_t size, const CUmemAllocationProp*, unsigned long long) {
  if (used + size > capacity()) return CUDA_ERROR_OUT_OF_MEMORY;
  used += size;
  *handle = next_handle++;
  handles[*handle] = size;
  return CUDA_SUCCESS;
}
CUresult mem_release(CUmemGenericAllocationHandle handle) {
  used -= handles.at(handle);
  handles.erase(handle);
  return CUDA_SUCCESS;
}
CUresult nothing() { return CUDA_SUCCESS; }
CUresult device_get(CUdevice* device, int) { *device = 0; return CUDA_SUCCESS; }
CUresult attribute(int* value, CUdevice_attribute, CUdevice) { *value = 0; return CUDA_SUCCESS; }
CUresult error_string(CUresult, const char** text) { *text = "driver error"; return CUDA_SUCCESS; }
}  // namespace

extern "C" {
cudaError_t cudaMalloc(void** ptr, size_t size) {
  if (used + size > capacity()) return cudaErrorMemoryAllocation;
  used += size;
  const uint64_t address = take_addresses(size);
  segments[address] = size;
  *ptr = reinterpret_cast<void*>(address);
  return cudaSuccess;
}
cudaError_t cudaFree(void* ptr) {
  const auto address = reinterpret_cast<uint64_t>(ptr);
  used -= segments.at(address);
  segments.erase(address);
  return cudaSuccess;
}
cudaError_t cudaMemGetInfo(size_t* free, size_t* total) { *free = capacity() - used; *total = capacity(); return cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { *device = 0; return cudaSuccess; }
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaGetDeviceCount(int* count) { *count = 1; return cudaSuccess; }
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* prop, int) {
  std::memset(prop, 0, sizeof(*prop));
  prop->totalGlobalMem = capacity();
  prop->major = 8;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) { *version = 13000; return cudaSuccess; }
cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned int, unsigned long long,
                                             cudaDriverEntryPointQueryResult* status) {
  const std::map<std::string_view, void*> known = {
      {"cuMemAddressReserve", reinterpret_cast<void*>(address_reserve)}, {"cuMemCreate", reinterpret_cast<void*>(mem_create)},
      {"cuMemRelease", reinterpret_cast<void*>(mem_release)}, {"cuDeviceGet", reinterpret_cast<void*>(device_get)},
      {"cuDeviceGetAttribute", reinterpret_cast<void*>(attribute)}, {"cuGetErrorString", reinterpret_cast<void*>(error_string)}};
  const auto found = known.find(symbol);
  *function = found == known.end() ? reinterpret_cast<void*>(nothing) : found->second;
  if (status) *status = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
const char* cudaGetErrorName(cudaError_t) { return "error"; }
const char* cudaGetErrorString(cudaError_t) { return "error"; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) { *status = cudaStreamCaptureStatusNone; return cudaSuccess; }
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaDeviceGetStreamPriorityRange(int* a, int* b) { *a = 0; *b = 0; return cudaSuccess; }

[[noreturn]] void never_called() { std::abort(); }
}

#define UNUSED(name) __asm__(".globl " #name "\n.set " #name ", never_called");
UNUSED(cudaDeviceCanAccessPeer) UNUSED(cudaDeviceEnablePeerAccess) UNUSED(cudaDeviceGetDefaultMemPool) UNUSED(cudaEventCreateWithFlags)
UNUSED(cudaEventDestroy) UNUSED(cudaEventElapsedTime) UNUSED(cudaEventQuery) UNUSED(cudaEventRecord) UNUSED(cudaEventSynchronize)
UNUSED(cudaFreeAsync) UNUSED(cudaGraphNodeGetDependencies) UNUSED(cudaIpcCloseMemHandle) UNUSED(cudaIpcGetMemHandle)
UNUSED(cudaIpcOpenMemHandle) UNUSED(cudaMallocAsync) UNUSED(cudaMemPoolGetAttribute) UNUSED(cudaMemPoolSetAccess)
UNUSED(cudaMemPoolSetAttribute) UNUSED(cudaMemPoolTrimTo) UNUSED(cudaMemcpy) UNUSED(cudaMemcpyAsync) UNUSED(cudaMemcpyPeerAsync)
UNUSED(cudaStreamCreateWithPriority) UNUSED(cudaStreamGetCaptureInfo) UNUSED(cudaStreamQuery) UNUSED(cudaStreamWaitEvent)
UNUSED(cudaThreadExchangeStreamCaptureMode)
