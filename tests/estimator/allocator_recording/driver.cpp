// Replays a program on torch's own caching allocator. Standard input, one event a line:
//   a ID BYTES STREAM   allocate        f ID   free; what failed to be allocated is passed over        e   empty the cache
// Standard output, a line for each event: allocated, requested, reserved, active and inactive split bytes, then the numbers of device
// allocations, device frees, retries and failures; `oom` in front where the allocation failed. Then a line for each segment: address, bytes,
// whether it is of the large pool, stream, and its blocks (a allocated, f free) with size and requested size.
#include <iostream>
#include <map>
#include <sstream>

#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/PeerToPeerAccess.h>

namespace allocator = c10::cuda::CUDACachingAllocator;

int main() {
  allocator::init(1);
  c10::cuda::detail::init_p2p_access_cache(1);
  // Asked for memory that other machines may map, the allocator would first look for NVLink.
  allocator::CUDAAllocatorConfig::set_expandable_segments_handle_type(allocator::Expandable_Segments_Handle_Type::POSIX_FD);
  std::map<long, void*> live;
  std::string line;
  while (std::getline(std::cin, line)) {
    std::istringstream words(line);
    char kind;
    long id = 0;
    words >> kind;
    bool failed = false;
    if (kind == 'a') {
      size_t bytes = 0, stream = 0;
      words >> id >> bytes >> stream;
      try {
        live[id] = allocator::raw_alloc_with_stream(bytes, reinterpret_cast<cudaStream_t>(stream));
      } catch (const c10::OutOfMemoryError&) {
        failed = true;
      }
    } else if (kind == 'f') {
      words >> id;
      const auto found = live.find(id);
      if (found != live.end()) {
        allocator::raw_delete(found->second);
        live.erase(found);
      }
    } else {
      allocator::emptyCache();
    }
    const auto stats = allocator::getDeviceStats(0);
    std::cout << (failed ? "oom " : "") << stats.allocated_bytes[0].current << ' ' << stats.requested_bytes[0].current << ' '
              << stats.reserved_bytes[0].current << ' ' << stats.active_bytes[0].current << ' ' << stats.inactive_split_bytes[0].current << ' '
              << stats.num_device_alloc << ' ' << stats.num_device_free << ' ' << stats.num_alloc_retries << ' ' << stats.num_ooms << '\n';
  }
  for (const auto& segment : allocator::snapshot().segments) {
    std::cout << "segment " << segment.address - 0x700000000000ull << ' ' << segment.total_size << ' ' << segment.is_large << ' '
              << reinterpret_cast<size_t>(segment.stream);
    for (const auto& block : segment.blocks) std::cout << ' ' << (block.allocated ? 'a' : 'f') << block.size << ':' << block.requested_size;
    std::cout << '\n';
  }
}
