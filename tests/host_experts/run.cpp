// Runs experts.cu, or outer.cu where OF_OUTER is defined, on a host, block after block. Copies arrive at once or in a random order, as late as somebody waits;
// products are computed at once or as late as somebody waits.

#ifdef OF_OUTER
#include "outer.cu"
#define TURNED true
#else
#include "experts.cu"
#define OUTER false
#endif
#ifndef TILED
#define TILED false
#endif

#include <ucontext.h>

#include <deque>
#include <map>
#include <vector>

Index threadIdx, blockIdx, gridDim, blockDim;
alignas(1024) u8 memory[1 << 18];

namespace {

constexpr u32 OFFSET = 1024;  // the address of the first byte of shared memory

struct Barrier {
  u32 count = 0, pending = 0, phase = 0;
  i64 bytes = 0;
};
struct Box {
  u32 to;
  const TensorMap* map;
  u32 barrier, corner[5];
};
struct Word {  // of a thread's queue: a copy, or the arrival that follows those before it
  bool arrival;
  u32 to;
  const u8* from;
  u32 bytes, barrier;
};
struct Out {  // from shared memory
  u16* to;
  u32 from, bytes;
  bool committed;
};
struct Product {
  int n;
  float* d;
  u64 a, b;
  u32 adds;
  const u32* held;  // the first factor where registers hold it
};
struct Meeting {
  u32 here = 0, held = 0;
};

constexpr u32 MOST = 512;
ucontext_t scheduler, lanes[MOST];
char stacks[MOST][1 << 16];
bool ended[MOST];
Meeting of_block, of_group[3], of_warp[MOST / 32];
std::map<u32, Barrier> barriers;
std::vector<Box> boxes;
std::deque<Word> words[MOST];
std::deque<Out> outs[MOST];
bool unshown[MOST];  // wrote to shared memory what only ordinary reads see,
bool hidden;         // and let others have it
std::deque<std::vector<Product>> groups[MOST];  // committed
std::vector<Product> open_group[MOST];
u32 scanned[MOST], addresses[MOST], random_bits, idle_turns, waited;
u32 exchanged[MOST];
const u32* held_by[MOST];  // registers of the product that a warp computes
u32 begun;  // tiles whose first weights were asked for
bool at_once;
const char* failure;

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

Barrier& barrier_at(u32 address) {
  const auto found = barriers.find(address);
  if (found == barriers.end()) fail("no barrier is there");
  return found->second;
}

void change(u32 address, u32 arrivals, i64 bytes) {
  Barrier& barrier = barrier_at(address);
  if (barrier.pending < arrivals) fail("more arrive than a phase has room for");
  barrier.pending -= arrivals;
  barrier.bytes += bytes;
  if (barrier.pending || barrier.bytes) return;
  barrier.pending = barrier.count;
  barrier.phase ^= 1;
  idle_turns = 0;
}

u8* place(u32 address) { return memory + address - OFFSET; }
u32 swizzled(u32 address) { return address ^ (address >> 7 & 7) << 4; }

void deliver(const Box& box) {
  const TensorMap& map = *box.map;
  const u32 item = map.item ? map.item : 2;
  u32 count = 1;
  for (u32 i = 0; i < map.rank; ++i) count *= map.box[i];
  for (u32 i = 0; i < count; ++i) {
    u64 from = map.address;
    bool inside = true;
    for (u32 d = 0, rest = i; d < map.rank; rest /= map.box[d++]) {
      const u32 at = box.corner[d] + rest % map.box[d];
      inside = inside && at < map.sizes[d];
      from += at * (d == 0 ? item : map.strides[d - 1]);
    }
    const u32 there = box.to + item * i;
    u8* to = place(map.item ? there : swizzled(there));
    if (inside) std::memcpy(to, reinterpret_cast<const u8*>(from), item);
    else std::memset(to, 0, item);
  }
  change(box.barrier, 0, -i64(item * count));
}

void deliver_word(u32 thread) {
  const Word word = words[thread].front();
  words[thread].pop_front();
  if (word.arrival) {
    change(word.barrier, 1, 0);
    return;
  }
  if (word.bytes) std::memcpy(place(word.to), word.from, 16);
  else std::memset(place(word.to), 0, 16);
}

// Something that is on its way arrives.
void progress() {
  if (!boxes.empty() && draw(3) == 0) {
    const u32 i = draw(boxes.size());
    const Box box = boxes[i];
    boxes.erase(boxes.begin() + i);
    deliver(box);
  }
  for (u32 i = 0, first = draw(MOST); i < MOST; ++i) {
    const u32 thread = (first + i) % MOST;
    if (words[thread].empty()) continue;
    for (u32 k = draw(8) + 1; k && !words[thread].empty(); --k) deliver_word(thread);
    if (draw(16) == 0) return;
  }
}

float value_at(u64 descriptor, u32 row, u32 k) {
  const u32 start = (descriptor & 0x3fff) << 4, group = (descriptor >> 32 & 0x3fff) << 4;
  u16 bits;
  std::memcpy(&bits, place(swizzled(start + row / 8 * group + row % 8 * 128 + k * 2)), 2);
  return widen<KIND>(bits);
}

// Of an operand that lies transposed: blocks of 16 rows of 64 values, which are of 64 of its rows.
float turned_value_at(u64 descriptor, u32 row, u32 k) {
  const u32 start = (descriptor & 0x3fff) << 4, group = (descriptor >> 32 & 0x3fff) << 4;
  const u32 block = row / 64 * ((descriptor >> 16 & 0x3fff) << 4);
  u16 bits;
  std::memcpy(&bits, place(swizzled(start + block + k / 8 * group + k % 8 * 128 + row % 64 * 2)), 2);
  return widen<KIND>(bits);
}

// Value k of a row of a first factor that registers hold, of a lane's row in eight or of that 8 below.
float held_value(u32 half, u32 k) {
  const u32 lane = (threadIdx.x & ~3u) + k % 8 / 2, pair = held_by[lane][half + k / 8 * 2];
  return widen<KIND>(pair >> 16 * (k % 2) & 0xffff);
}

void compute(const Product& product) {
  const u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5 & 3;
  for (int half = 0; half < 2; ++half) {
    float of_row[16];
    for (u32 k = 0; k < 16; ++k) {
      if (product.held) of_row[k] = held_value(half, k);
      else of_row[k] = (TURNED ? turned_value_at : value_at)(product.a, 16 * warp + lane / 4 + 8 * half, k);
    }
    for (int column = 0; column < product.n / 4; ++column) {
      const int j = column / 2, odd = column % 2;
      float& sum = product.d[4 * j + 2 * half + odd];
      float total = product.adds ? sum : 0.0f;
      for (u32 k = 0; k < 16; ++k) {
        total += of_row[k] * (OUTER ? turned_value_at : value_at)(product.b, 8 * j + 2 * (lane % 4) + odd, k);
      }
      sum = total;
    }
  }
}

void (*body)();
void run_lane() {
  body();
  ended[threadIdx.x] = true;
  give_way();
}

void run_block() {
  barriers.clear();
  boxes.clear();
  of_block = of_group[0] = of_group[1] = of_group[2] = {};
  for (Meeting& meeting : of_warp) meeting = {};
  waited = 0;
  std::memset(memory, 0xff, sizeof memory);  // NaN of either kind
  for (u32 i = 0; i < blockDim.x; ++i) {
    ended[i] = false;
    words[i].clear();
    outs[i].clear();
    unshown[i] = false;
    groups[i].clear();
    open_group[i].clear();
    getcontext(&lanes[i]);
    lanes[i].uc_stack.ss_sp = stacks[i];
    lanes[i].uc_stack.ss_size = sizeof stacks[i];
    lanes[i].uc_link = nullptr;
    makecontext(&lanes[i], run_lane, 0);
  }
  u32 left = blockDim.x;
  for (idle_turns = 0; left && !failure; ++idle_turns) {
    if (idle_turns > 2000) failure = "lanes wait for ever";
    progress();
    for (u32 k = 0, first = draw(blockDim.x); k < blockDim.x && !failure; ++k) {
      threadIdx.x = (first + k) % blockDim.x;
      if (ended[threadIdx.x]) continue;
      swapcontext(&scheduler, &lanes[threadIdx.x]);
      left -= ended[threadIdx.x];
    }
  }
  if (failure) return;
  if (!waited) failure = "nobody waited for the launch before";
  if (!boxes.empty()) failure = "a block ended before its copies";
  for (u32 i = 0; i < blockDim.x; ++i) {
    if (!outs[i].empty()) failure = "a thread ended before its results were read";
    if (!words[i].empty() || !groups[i].empty() || !open_group[i].empty()) failure = "a thread ended before its work";
  }
  for (const auto& [address, barrier] : barriers) {
    if (barrier.pending != barrier.count || barrier.bytes) failure = "a block ended with a barrier still counting";
  }
}

TensorMap maps[4];
void* pointers[9];
i64 sizes[8];

void run_kernel() {
#ifdef OF_OUTER
  outer_kernel(static_cast<u8*>(pointers[0]), static_cast<u8*>(pointers[1]), static_cast<int*>(pointers[2]),
               static_cast<i64*>(pointers[3]), static_cast<int*>(pointers[4]), static_cast<u8*>(pointers[5]), sizes[0],
               sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6]);
#else
  experts_kernel(maps[0], maps[1],
#if TILED
                 maps[2], maps[3],
#endif
                 static_cast<u8*>(pointers[0]), static_cast<u16*>(pointers[1]),
                 static_cast<float*>(pointers[2]), static_cast<int*>(pointers[3]), static_cast<i64*>(pointers[4]),
                 static_cast<int*>(pointers[5]), static_cast<u16*>(pointers[6]), static_cast<u32*>(pointers[7]),
#if TILED
                 static_cast<float*>(pointers[8]),
#endif
                 sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6], sizes[7]);
#endif
}

}  // namespace

void __syncthreads() { meet(of_block, blockDim.x); }
void sync_warpgroup(u32 group) {
  if (threadIdx.x / 128 != 1 + group) fail("a barrier of another warpgroup");
  hidden = hidden || unshown[threadIdx.x];
  meet(of_group[group], 128);
}
void __syncwarp() { meet(of_warp[threadIdx.x >> 5], 32); }
void sync_loaders() {
  if (threadIdx.x >= 128) fail("a barrier of another warpgroup");
  meet(of_group[2], 128);
}
void wait_for_previous_launch() { ++waited; }

u32 __shfl_xor_sync(u32, u32 value, u32 mask) {
  exchanged[threadIdx.x] = value;
  meet(of_warp[threadIdx.x >> 5], 32);
  const u32 other = exchanged[threadIdx.x ^ mask];
  meet(of_warp[threadIdx.x >> 5], 32);
  return other;
}
u32 __reduce_max_sync(u32, u32 value) {
  exchanged[threadIdx.x] = value;
  meet(of_warp[threadIdx.x >> 5], 32);
  const u32* first = exchanged + (threadIdx.x & ~31u);
  const u32 most = *std::max_element(first, first + 32);
  meet(of_warp[threadIdx.x >> 5], 32);
  return most;
}
bool __any_sync(u32, u32 value) { return __reduce_max_sync(ALL, value != 0); }
u32 scan_block(u32 value, u32* sums, u32& total) {
  for (u32 i = 0; i < 32; ++i) {
    if (sums[i] == 0xffffffffu) fail("sums are not cleared");
  }
  scanned[threadIdx.x] = value;
  __syncthreads();
  u32 below = total = 0;
  for (u32 i = 0; i < blockDim.x; ++i) {
    if (i == threadIdx.x) below = total;
    total += scanned[i];
  }
  __syncthreads();
  return below;
}

u32 shared_address(const void* pointer) { return static_cast<const u8*>(pointer) - memory + OFFSET; }
void open_barrier(u32 barrier, u32 count) { barriers[barrier] = {count, count, 0, 0}; }
void publish_barriers() {}
void arrive(u32 barrier) { change(barrier, 1, 0); }
void arrive_and_expect(u32 barrier, u32 bytes) { change(barrier, 1, bytes); }
void arrive_after_copies(u32 barrier) {
  words[threadIdx.x].push_back({true, 0, nullptr, 0, barrier});
  while (at_once && !words[threadIdx.x].empty()) deliver_word(threadIdx.x);
}
void await_phase(u32 barrier, u32 parity) {
  while (barrier_at(barrier).phase == parity) give_way();
}
void copy_box(u32 to, const TensorMap& map, u32 barrier, u32 x, u32 y, u32 z, u32 v, u32 w, u64) {
  if (map.rank == 5) begun += (TURNED ? y : x) == 0 && map.item != 1;  // of weights
  else if (!waited) fail("rows are read before the launch before has ended");
  if (to % (map.item ? 128 : 1024) || map.sizes[0] == 0) fail("a box that does not begin where the swizzle does");
  boxes.push_back({to, &map, barrier, {x, y, z, v, w}});
  if (at_once) {
    deliver(boxes.back());
    boxes.pop_back();
  }
}
void copy_16_bytes(u32 to, const u8* from, u32 bytes) {
  if (to % 16 || reinterpret_cast<u64>(from) % 16) fail("a copy that is not a whole word");
  words[threadIdx.x].push_back({false, to, from, bytes, 0});
}
void await_copies() {
  while (!words[threadIdx.x].empty()) give_way();
}

namespace {
void store_all_transposed(u32 address, const u32* values, u32 count) {
  addresses[threadIdx.x] = address;
  meet(of_warp[threadIdx.x >> 5], 32);
  const u32 lane = threadIdx.x & 31, warp = threadIdx.x - lane;
  for (u32 i = 0; i < 2 * count; ++i) {
    const u16 half = values[i / 2] >> 16 * (i % 2);
    const u32 row = addresses[warp + i / 2 * 8 + 2 * (lane % 4) + i % 2];
    if (row % 16) fail("a row that does not begin where it must");
    std::memcpy(place(row + lane / 4 * 2), &half, 2);
  }
  unshown[threadIdx.x] = true;
  meet(of_warp[threadIdx.x >> 5], 32);
}
}  // namespace

void store_transposed(u32 address, u32 values) { store_all_transposed(address, &values, 1); }
void store_transposed(u32 address, const uint4& values) { store_all_transposed(address, &values.x, 4); }
void show_shared_writes() { unshown[threadIdx.x] = false; }
void copy_out(u16* to, u32 from, u32 bytes) {
  if (from % 16 || bytes % 16 || reinterpret_cast<u64>(to) % 16) fail("a copy that is not of whole words");
  if (hidden) fail("the copy engine does not see what a lane wrote");
  if (at_once) std::memcpy(to, place(from), bytes);
  else outs[threadIdx.x].push_back({to, from, bytes, false});
}
void commit_copies_out() {
  for (Out& out : outs[threadIdx.x]) out.committed = true;
}
void await_copies_out() {
  give_way();
  for (auto& mine = outs[threadIdx.x]; !mine.empty() && mine.front().committed; mine.pop_front()) {
    std::memcpy(mine.front().to, place(mine.front().from), mine.front().bytes);
  }
}
uint4 load_shared(u32 address) {
  uint4 word;
  std::memcpy(&word, place(address), 16);
  return word;
}
u32 load_shared_word(u32 address) {
  u32 word;
  std::memcpy(&word, place(address), 4);
  return word;
}
u32 load_shared_half(u32 address) {
  u16 half;
  std::memcpy(&half, place(address), 2);
  return half;
}
float2 load_shared_pair(u32 address) {
  float2 pair;
  std::memcpy(&pair, place(address), 8);
  return pair;
}
void queue_product(int n, float* d, u64 a, u64 b, u32 adds) {
  if (a >> 62 != 1 || b >> 62 != 1) fail("not the 128-byte swizzle");
  if (at_once) compute({n, d, a, b, adds, nullptr});
  else open_group[threadIdx.x].push_back({n, d, a, b, adds, nullptr});
}
// The registers of a warp's lanes are read while all of them stand still.
void compute_held(const Product& product) {
  held_by[threadIdx.x] = product.held;
  meet(of_warp[threadIdx.x >> 5], 32);
  compute(product);
  meet(of_warp[threadIdx.x >> 5], 32);
}
void queue_held_product(int n, float* d, const u32* a, u64 b, u32 adds) {
  if (b >> 62 != 1) fail("not the 128-byte swizzle");
  if (at_once) compute_held({n, d, 0, b, adds, a});
  else open_group[threadIdx.x].push_back({n, d, 0, b, adds, a});
}
void commit_products() {
  groups[threadIdx.x].push_back(open_group[threadIdx.x]);
  open_group[threadIdx.x].clear();
}
void await_products(int pending) {
  give_way();
  for (auto& mine = groups[threadIdx.x]; int(mine.size()) > pending; mine.pop_front()) {
    for (const Product& product : mine.front()) product.held ? compute_held(product) : compute(product);
  }
  meet(of_warp[threadIdx.x >> 5], 32);  // the lanes of a warp wait together
}

u32 atomicAdd(u32* word, u32 value) {
  if (!waited) fail("a turn is asked for before the launch before has ended");
  *word += value;
  return *word - value;
}

// How many tiles were begun in the last run.
extern "C" u32 tiles_begun() { return begun; }

// Null, or what went wrong.
extern "C" const char* run(u32 blocks, int at_once_, u32 seed, const TensorMap* maps_, void** pointers_, i64* sizes_) {
  std::copy(maps_, maps_ + (TILED ? 4 : 2), maps);
  std::copy(pointers_, pointers_ + (TILED ? 9 : 8), pointers);
  std::copy(sizes_, sizes_ + 8, sizes);
  body = run_kernel;
  at_once = at_once_;
  random_bits = seed;
  failure = nullptr;
  gridDim.x = blocks;
  blockDim.x = THREADS;
  begun = 0;
  hidden = false;
  std::vector<u32> order(blocks);  // in which blocks run, one after the other
  for (u32 i = 0; i < blocks; ++i) {
    order[i] = i;
    std::swap(order[i], order[draw(i + 1)]);
  }
  for (u32 i = 0; i < blocks && !failure; ++i) {
    blockIdx.x = order[i];
    run_block();
  }
  return failure;
}
