// Runs experts.cu on a host, cluster after cluster. Copies arrive at once or in a random order, as late as somebody waits;
// products are computed at once or as late as somebody waits.

#include "experts.cu"

#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <cstdlib>
#include <deque>
#include <map>
#include <vector>

Index threadIdx, blockIdx, gridDim, blockDim;
constexpr u32 ROOM = 1 << 18;
alignas(4096) u8 memory[ROOM];  // shared memory of the block whose lane runs: one of `views`, shown here

namespace {

constexpr u32 OFFSET = 512;  // the address of the first byte of shared memory

struct Barrier {
  u32 count = 0, pending = 0, phase = 0;
  i64 bytes = 0;
};
struct Box {
  u32 blocks, to;
  const TensorMap* map;
  u32 barrier, corner[5];
};
struct Word {  // of a lane's queue: a copy, or the arrival that follows those before it
  bool arrival;
  u32 to;
  const u8* from;
  u32 bytes, barrier;
};
struct Product {
  int n;
  float* d;
  u64 a, b;
  u32 adds;
};
struct Meeting {
  u32 here = 0, held = 0;
};

constexpr u32 MOST = 1024;  // lanes of a cluster, block by block
u8* views[CLUSTER];
int files[CLUSTER];
ucontext_t scheduler, lanes[MOST];
char stacks[MOST][1 << 16];
bool ended[MOST];
Meeting of_cluster, of_block[CLUSTER], of_group[CLUSTER][3], of_warp[MOST / 32];
std::map<u32, Barrier> barriers[CLUSTER];
std::vector<Box> boxes;
std::deque<Word> words[MOST];
std::deque<std::vector<Product>> groups[MOST];  // committed
std::vector<Product> open_group[MOST];
u32 exchanged[MOST], addresses[MOST], random_bits, idle_turns, waited;
u32 gone;  // blocks that have ended, a bit each
bool at_once;
const char* failure;

u32 draw(u32 below) {
  random_bits = random_bits * 1664525u + 1013904223u;
  return (random_bits >> 8) % below;
}

u32 block() { return blockIdx.x % CLUSTER; }
u32 self() { return block() * blockDim.x + threadIdx.x; }
void give_way() { swapcontext(&lanes[self()], &scheduler); }

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

Barrier& barrier_at(u32 of, u32 address) {
  const auto found = barriers[of].find(address);
  if (found == barriers[of].end()) fail("no barrier is there");
  return found->second;
}

void change(u32 of, u32 address, u32 arrivals, i64 bytes) {
  Barrier& barrier = barrier_at(of, address);
  if (barrier.pending < arrivals) fail("more arrive than a phase has room for");
  barrier.pending -= arrivals;
  barrier.bytes += bytes;
  if (barrier.pending || barrier.bytes) return;
  barrier.pending = barrier.count;
  barrier.phase ^= 1;
  idle_turns = 0;
}

u8* place(u32 of, u32 address) { return views[of] + address - OFFSET; }
u8* place(u32 address) { return place(block(), address); }
u32 swizzled(u32 address) { return address ^ (address >> 7 & 7) << 4; }

void deliver(const Box& box) {
  const TensorMap& map = *box.map;
  u32 count = 1;
  for (u32 i = 0; i < map.rank; ++i) count *= map.box[i];
  for (u32 i = 0; i < count; ++i) {
    u64 from = map.address;
    bool inside = true;
    for (u32 d = 0, rest = i; d < map.rank; rest /= map.box[d++]) {
      const u32 at = box.corner[d] + rest % map.box[d];
      inside = inside && at < map.sizes[d];
      from += at * (d == 0 ? 2 : map.strides[d - 1]);
    }
    for (u32 of = 0; of < CLUSTER; ++of) {
      if (!(box.blocks >> of & 1)) continue;
      u8* to = place(of, swizzled(box.to + 2 * i));
      if (inside) std::memcpy(to, reinterpret_cast<const u8*>(from), 2);
      else std::memset(to, 0, 2);
    }
  }
  for (u32 of = 0; of < CLUSTER; ++of) {
    if (box.blocks >> of & 1) change(of, box.barrier, 0, -i64(2 * count));
  }
}

void deliver_word(u32 lane) {
  const Word word = words[lane].front();
  const u32 of = lane / blockDim.x;
  words[lane].pop_front();
  if (word.arrival) {
    change(of, word.barrier, 1, 0);
    return;
  }
  if (word.bytes) std::memcpy(place(of, word.to), word.from, 16);
  else std::memset(place(of, word.to), 0, 16);
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
    const u32 lane = (first + i) % MOST;
    if (words[lane].empty()) continue;
    for (u32 k = draw(8) + 1; k && !words[lane].empty(); --k) deliver_word(lane);
    if (draw(16) == 0) return;
  }
}

float value_at(u64 descriptor, u32 row, u32 k) {
  const u32 start = (descriptor & 0x3fff) << 4, group = (descriptor >> 32 & 0x3fff) << 4;
  u16 bits;
  std::memcpy(&bits, place(swizzled(start + row / 8 * group + row % 8 * 128 + k * 2)), 2);
  return widen<KIND>(bits);
}

void compute(const Product& product) {
  const u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5 & 3;
  for (int half = 0; half < 2; ++half) {
    float of_row[16];
    for (u32 k = 0; k < 16; ++k) of_row[k] = value_at(product.a, 16 * warp + lane / 4 + 8 * half, k);
    for (int column = 0; column < product.n / 4; ++column) {
      const int j = column / 2, odd = column % 2;
      float& sum = product.d[4 * j + 2 * half + odd];
      float total = product.adds ? sum : 0.0f;
      for (u32 k = 0; k < 16; ++k) total += of_row[k] * value_at(product.b, 8 * j + 2 * (lane % 4) + odd, k);
      sum = total;
    }
  }
}

void (*body)();
void run_lane() {
  body();
  ended[self()] = true;
  give_way();
}

void make_views() {
  for (u32 of = 0; of < CLUSTER && !views[of]; ++of) {
    files[of] = memfd_create("shared", 0);
    if (files[of] < 0 || ftruncate(files[of], ROOM)) std::abort();
    views[of] = static_cast<u8*>(mmap(nullptr, ROOM, PROT_READ | PROT_WRITE, MAP_SHARED, files[of], 0));
  }
}

void show_block(u32 of) {
  static u32 shown = ~0u;
  if (shown != of) mmap(memory, ROOM, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, files[of], 0);
  shown = of;
}

void run_cluster(u32 first_block) {
  const u32 count = CLUSTER * blockDim.x;
  make_views();
  boxes.clear();
  of_cluster = {};
  waited = 0;
  for (u32 of = 0; of < CLUSTER; ++of) {
    barriers[of].clear();
    of_block[of] = of_group[of][0] = of_group[of][1] = of_group[of][2] = {};
    std::memset(views[of], 0xff, ROOM);  // NaN of either kind
  }
  for (Meeting& meeting : of_warp) meeting = {};
  for (u32 i = 0; i < count; ++i) {
    ended[i] = false;
    words[i].clear();
    groups[i].clear();
    open_group[i].clear();
    getcontext(&lanes[i]);
    lanes[i].uc_stack.ss_sp = stacks[i];
    lanes[i].uc_stack.ss_size = sizeof stacks[i];
    lanes[i].uc_link = nullptr;
    makecontext(&lanes[i], run_lane, 0);
  }
  u32 left = count, left_of[CLUSTER], asleep = CLUSTER;  // one block may rest while the others run
  for (u32& of : left_of) of = blockDim.x;
  for (idle_turns = 0; left && !failure; ++idle_turns) {
    if (idle_turns > 2000) failure = "lanes wait for ever";
    progress();
    if (CLUSTER > 1 && draw(32) == 0) asleep = draw(CLUSTER + 1);
    for (u32 n = 0, of = draw(CLUSTER); n < CLUSTER; ++n, of = (of + 1) % CLUSTER) {
      if (of == asleep) continue;
      show_block(of);
      blockIdx.x = first_block + of;
      for (u32 k = 0, first = draw(blockDim.x); k < blockDim.x && !failure; ++k) {
        threadIdx.x = (first + k) % blockDim.x;
        if (ended[self()]) continue;
        swapcontext(&scheduler, &lanes[self()]);
        left -= ended[self()];
        left_of[of] -= ended[self()];
      }
      if (!left_of[of]) gone |= 1 << of;
    }
  }
  gone = 0;
  if (failure) return;
  if (!waited) failure = "nobody waited for the launch before";
  if (!boxes.empty()) failure = "a block ended before its copies";
  for (u32 i = 0; i < count; ++i) {
    if (!words[i].empty() || !groups[i].empty() || !open_group[i].empty()) failure = "a thread ended before its work";
  }
  for (const auto& of : barriers) {
    for (const auto& [address, barrier] : of) {
      if (barrier.pending != barrier.count || barrier.bytes) failure = "a block ended with a barrier still counting";
    }
  }
}

TensorMap maps[2];
void* pointers[8];
i64 sizes[8];

void run_kernel() {
  experts_kernel(maps[0], maps[1], static_cast<u8*>(pointers[0]), static_cast<u16*>(pointers[1]),
                 static_cast<float*>(pointers[2]), static_cast<int*>(pointers[3]), static_cast<i64*>(pointers[4]),
                 static_cast<int*>(pointers[5]), static_cast<u16*>(pointers[6]), static_cast<u32*>(pointers[7]),
                 sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6],
                 sizes[7]);
}

}  // namespace

u32 cluster_rank() { return block(); }
void sync_cluster() { meet(of_cluster, CLUSTER * blockDim.x); }
void __syncthreads() { meet(of_block[block()], blockDim.x); }
void __syncwarp() { meet(of_warp[self() >> 5], 32); }
void sync_warpgroup(u32 group) {
  if (threadIdx.x / 128 != 1 + group) fail("a barrier of another warpgroup");
  meet(of_group[block()][group], 128);
}
void sync_loaders() {
  if (threadIdx.x >= 128) fail("a barrier of another warpgroup");
  meet(of_group[block()][2], 128);
}
void wait_for_previous_launch() { ++waited; }

u32 scan_block(u32 value, u32* sums, u32& total) {
  for (u32 i = 0; i < 32; ++i) {
    if (sums[i] == 0xffffffffu) fail("sums are not cleared");
  }
  exchanged[self()] = value;
  __syncthreads();
  u32 below = total = 0;
  for (u32 i = 0; i < blockDim.x; ++i) {
    if (i == threadIdx.x) below = total;
    total += exchanged[block() * blockDim.x + i];
  }
  __syncthreads();
  return below;
}

u32 shared_address(const void* pointer) { return static_cast<const u8*>(pointer) - memory + OFFSET; }
void open_barrier(u32 barrier, u32 count) { barriers[block()][barrier] = {count, count, 0, 0}; }
void publish_barriers() {}
void arrive(u32 barrier) { change(block(), barrier, 1, 0); }
void arrive_at(u32 barrier, u32 of) {
  if (gone >> of & 1) fail("an arrival at a block that has ended");
  change(of, barrier, 1, 0);
}
void arrive_and_expect(u32 barrier, u32 bytes) { change(block(), barrier, 1, bytes); }
void arrive_after_copies(u32 barrier) {
  words[self()].push_back({true, 0, nullptr, 0, barrier});
  while (at_once && !words[self()].empty()) deliver_word(self());
}
void await_phase(u32 barrier, u32 parity) {
  while (barrier_at(block(), barrier).phase == parity) give_way();
}
void copy_box_to(u16 blocks, u32 to, const TensorMap& map, u32 barrier, u32 x, u32 y, u32 z, u32 v, u32 w) {
  if (to % 1024 || map.sizes[0] == 0) fail("a box that does not begin where the swizzle does");
  if (blocks & gone) fail("a copy to a block that has ended");
  boxes.push_back({blocks, to, &map, barrier, {x, y, z, v, w}});
  if (at_once) {
    deliver(boxes.back());
    boxes.pop_back();
  }
}
void copy_box(u32 to, const TensorMap& map, u32 barrier, u32 x, u32 y, u32 z, u32 v, u32 w) {
  copy_box_to(1 << block(), to, map, barrier, x, y, z, v, w);
}
void copy_16_bytes(u32 to, const u8* from, u32 bytes) {
  if (to % 16 || reinterpret_cast<u64>(from) % 16) fail("a copy that is not a whole word");
  words[self()].push_back({false, to, from, bytes, 0});
}
void await_copies() {
  while (!words[self()].empty()) give_way();
}

namespace {
void store_matrices(u32 address, u32 count, const u32* values) {
  addresses[self()] = address;
  __syncwarp();
  const u32 lane = threadIdx.x & 31, warp = self() - lane;
  for (u32 matrix = 0; matrix < count; ++matrix) {
    for (u32 odd = 0; odd < 2; ++odd) {
      const u16 half = values[matrix] >> 16 * odd;
      std::memcpy(place(addresses[warp + 8 * matrix + 2 * (lane % 4) + odd] + lane / 4 * 2), &half, 2);
    }
  }
  __syncwarp();
}
}  // namespace

void store_transposed(u32 address, u32 values) { store_matrices(address, 1, &values); }
void store_transposed(u32 address, u32 first, u32 second) {
  const u32 values[2] = {first, second};
  store_matrices(address, 2, values);
}
uint4 load_shared(u32 address) {
  uint4 word;
  std::memcpy(&word, place(address), 16);
  return word;
}
void queue_product(int n, float* d, u64 a, u64 b, u32 adds) {
  if (a >> 62 != 1 || b >> 62 != 1) fail("not the 128-byte swizzle");
  if (at_once) compute({n, d, a, b, adds});
  else open_group[self()].push_back({n, d, a, b, adds});
}
void commit_products() {
  groups[self()].push_back(open_group[self()]);
  open_group[self()].clear();
}
void await_products(int pending) {
  give_way();
  for (auto& mine = groups[self()]; int(mine.size()) > pending; mine.pop_front()) {
    for (const Product& product : mine.front()) compute(product);
  }
  __syncwarp();  // the lanes of a warp wait together
}

// Null, or what went wrong.
extern "C" const char* run(u32 blocks, int at_once_, u32 seed, const TensorMap* maps_, void** pointers_, i64* sizes_) {
  std::copy(maps_, maps_ + 2, maps);
  std::copy(pointers_, pointers_ + 8, pointers);
  std::copy(sizes_, sizes_ + 8, sizes);
  body = run_kernel;
  at_once = at_once_;
  random_bits = seed;
  failure = nullptr;
  gridDim.x = blocks;
  blockDim.x = THREADS;
  for (u32 first = 0; first < blocks && !failure; first += CLUSTER) run_cluster(first);
  return failure;
}
