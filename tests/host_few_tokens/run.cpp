// Runs the kernels of few_tokens.cu, or of four_bits.cu, on a host, block after block: lanes, meetings, barriers, copies.

#if FOUR_BITS
#include "four_bits.cu"
#else
#include "few_tokens.cu"
#endif

#include <ucontext.h>

#include <map>
#include <vector>

Index threadIdx, blockIdx, gridDim;
alignas(128) u8 shared[1 << 18];
u32 words_of_lanes[32][32];
Fragments fragments[32][32];

namespace {

struct Barrier {
  u32 phase = 0;
  bool arrived = false;
  i64 bytes = 0;
};
struct Copy {
  u32 to;
  const u8* from;
  u32 bytes, barrier;
};
struct Meeting {
  u32 here = 0, held = 0;
};

ucontext_t scheduler, lanes[1024];
char stacks[1024][1 << 15];
bool ended[1024];
Meeting of_block, of_warp[32];
std::map<u32, Barrier> barriers;
std::vector<Copy> on_their_way;
u32 threads, waited, random_bits, idle_turns;
bool at_once;
const char* failure;
void (*body)();

u32 draw(u32 below) {
  random_bits = random_bits * 1664525u + 1013904223u;
  return (random_bits >> 8) % below;
}

void give_way() { swapcontext(&lanes[threadIdx.x], &scheduler); }

void fail(const char* what) {
  failure = what;
  while (true) give_way();
}

void meet(Meeting& meeting, u32 of) {
  const u32 number = meeting.held;
  if (++meeting.here == of) {
    meeting.here = idle_turns = 0;
    ++meeting.held;
  }
  while (meeting.held == number) give_way();
}

void settle(Barrier& barrier) {
  if (!barrier.arrived || barrier.bytes) return;
  barrier.phase ^= 1;
  barrier.arrived = false;
}

void deliver(const Copy& copy) {
  idle_turns = 0;
  std::memcpy(shared + copy.to, copy.from, copy.bytes);
  Barrier& barrier = barriers[copy.barrier];
  barrier.bytes -= copy.bytes;
  settle(barrier);
}

void run_lane() {
  body();
  ended[threadIdx.x] = true;
  give_way();
}

void run_block() {
  barriers.clear();
  on_their_way.clear();
  of_block = {};
  for (Meeting& meeting : of_warp) meeting = {};
  waited = 0;
  std::memset(shared, 0xff, sizeof shared);  // NaN of either kind
  for (u32 i = 0; i < threads; ++i) {
    ended[i] = false;
    getcontext(&lanes[i]);
    lanes[i].uc_stack.ss_sp = stacks[i];
    lanes[i].uc_stack.ss_size = sizeof stacks[i];
    lanes[i].uc_link = nullptr;
    makecontext(&lanes[i], run_lane, 0);
  }
  u32 left = threads;
  for (idle_turns = 0; left && !failure; ++idle_turns) {
    if (idle_turns > 2000) failure = "lanes wait for ever";
    for (u32 k = 0, first = draw(threads); k < threads && !failure; ++k) {
      threadIdx.x = (first + k) % threads;
      if (ended[threadIdx.x]) continue;
      swapcontext(&scheduler, &lanes[threadIdx.x]);
      left -= ended[threadIdx.x];
    }
  }
  if (failure) return;
  if (!on_their_way.empty()) failure = "a block ended before its copies";
  if (waited != threads) failure = "a lane ended that had not waited for the launch before";
  for (const auto& [address, barrier] : barriers) {
    if (barrier.arrived || barrier.bytes) failure = "a block ended with a barrier still counting";
  }
}

void* pointers[10];
i64 sizes[8];
#if FOUR_BITS
template <typename T>
T* pointer(int i) {
  return static_cast<T*>(pointers[i]);
}

void run_up() {
  four_bits_up_kernel(pointers[0], pointer<int>(1), pointer<float>(2), pointer<u8>(3), pointer<u8>(4), pointer<u16>(5),
                      pointer<u8>(6), pointer<u8>(7), pointer<float>(8), pointer<u16>(9), sizes[0], sizes[1], sizes[2],
                      sizes[3], sizes[4], sizes[5]);
}

void run_down() {
  four_bits_down_kernel(pointers[0], pointer<int>(1), pointer<u8>(2), pointer<u8>(3), pointer<u16>(4), pointer<u8>(5),
                        pointer<u8>(6), pointer<float>(7), pointer<float>(8), sizes[0], sizes[1]);
}

void run_sum() {
  four_bits_sum_kernel(pointers[0], pointer<int>(1), pointer<float>(2), pointer<float4>(3), pointer<uint2>(4), sizes[0],
                       sizes[1]);
}
#else
#if QUANTISED_WEIGHTS
#define GIVEN pointers[7], static_cast<float*>(pointers[8]),
#else
#define GIVEN
#endif
#if TOKENS_GIVEN
#define UP_TOKENS , sizes[7]
#define DOWN_TOKENS_GIVEN , sizes[3]
#else
#define UP_TOKENS
#define DOWN_TOKENS_GIVEN
#endif

void run_up() {
  few_tokens_up_kernel(pointers[0], static_cast<int*>(pointers[1]), static_cast<float*>(pointers[2]),
                       static_cast<u8*>(pointers[3]), static_cast<u8*>(pointers[4]), static_cast<u16*>(pointers[5]),
                       GIVEN static_cast<u16*>(pointers[6]), sizes[0], sizes[1], sizes[2], sizes[3], sizes[4],
                       sizes[5], sizes[6] UP_TOKENS);
}

void run_down() {
  few_tokens_down_kernel(pointers[0], static_cast<int*>(pointers[1]), static_cast<float*>(pointers[2]),
                         static_cast<u8*>(pointers[3]), static_cast<u8*>(pointers[4]), static_cast<u16*>(pointers[5]),
                         GIVEN static_cast<u16*>(pointers[6]), sizes[0], sizes[1], sizes[2] DOWN_TOKENS_GIVEN);
}

void run_sum() {}
#endif

}  // namespace

void __syncthreads() { meet(of_block, threads); }
void __syncwarp() { meet(of_warp[threadIdx.x >> 5], 32); }
void allow_next_launch() {
  if (!waited) fail("the next launch is let in before this one has waited");
}
void await_previous_launch() { ++waited; }

void open_barriers(u64* first, u32 count) {
  for (u32 i = threadIdx.x & 31; i < count; i += 32) barriers[shared_address(first + i)] = {};
  __syncwarp();
}

void expect_bytes(u32 address, u32 bytes) {
  if (!barriers.count(address)) fail("bytes expected of what is no barrier");
  Barrier& barrier = barriers[address];
  if (barrier.arrived) fail("bytes expected of a barrier that still counts");
  barrier.arrived = true;
  barrier.bytes += bytes;
  settle(barrier);
}

void copy_in(u32 to, const u8* from, u32 bytes, u32 barrier) {
  if (!barriers.count(barrier)) fail("a copy for what is no barrier");
  if (to % 16 || reinterpret_cast<u64>(from) % 16 || bytes % 16 || !bytes) fail("a copy that is not whole words");
  if (at_once) deliver({to, from, bytes, barrier});
  else on_their_way.push_back({to, from, bytes, barrier});
}

void await_bytes(u32 address, u32 parity) {
  if (!barriers.count(address)) fail("a wait for what is no barrier");
  while (barriers[address].phase == parity) {
    const u32 i = on_their_way.empty() ? 0 : draw(on_their_way.size());
    if (i < on_their_way.size() && on_their_way[i].barrier == address) {
      const Copy copy = on_their_way[i];
      on_their_way.erase(on_their_way.begin() + i);
      deliver(copy);
    }
    give_way();
  }
}

// Null, or what went wrong.
extern "C" const char* run(int number, u32 blocks, int at_once_, u32 seed, void** pointers_, i64* sizes_) {
  std::copy(pointers_, pointers_ + 10, pointers);
  std::copy(sizes_, sizes_ + 8, sizes);
  body = number == 0 ? run_up : number == 1 ? run_down : run_sum;
  threads = THREADS;
  at_once = at_once_;
  random_bits = seed;
  failure = nullptr;
  gridDim.x = blocks;
  for (blockIdx.x = 0; blockIdx.x < blocks && !failure; ++blockIdx.x) run_block();
  return failure;
}
