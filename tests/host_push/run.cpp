// Runs programs of several ranks on a host: kernels of push.cu and push_back.cu and steps of the test between them. Lanes
// are fibers of one thread. Ranks, blocks and lanes take turns at random; some ranks are much slower than others.

#include "push.cuh"

namespace push {
#include "push.cu"
}
namespace push_back {
#include "push_back.cu"
}

#include <ucontext.h>

#include <memory>
#include <vector>

Index threadIdx, blockIdx, gridDim;

namespace {

constexpr u32 THREADS = BLOCK;

struct Store {
  u8* to;
  u8 bytes[16];
  u32 size;
};
struct Lane {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[1 << 15]};
  bool ended = false;
};
struct Block {
  u32 number = 0, here = 0, held = 0, left = 0;  // lanes that meet, meetings so far, lanes that have not ended
  u64 shared[512];
  std::vector<Store> on_their_way;
  Lane lanes[THREADS];
};
struct Step {
  i64 kind, blocks, resident;  // 0: push, 1: push back, 2: the test; blocks that are at work at the same time
  void** pointers;
  i64* numbers;
};
struct Rank {
  u32 steps = 0, next = 0, begun = 0;
  const Step* program = nullptr;
  const Step* launch = nullptr;
  std::vector<Block*> at_work;
};

ucontext_t scheduler;
std::vector<std::unique_ptr<Block>> spare;
Rank ranks[8];
Rank* rank;
Block* block;
u32 random_bits;
u64 now;
const char* failure;

u32 draw(u32 below) {
  random_bits = random_bits * 1664525u + 1013904223u;
  return (random_bits >> 8) % below;
}

void give_way() { swapcontext(&block->lanes[threadIdx.x].context, &scheduler); }

void arrive(Block& of, u32 i) {
  const Store store = of.on_their_way[i];
  of.on_their_way[i] = of.on_their_way.back();
  of.on_their_way.pop_back();
  std::memcpy(store.to, store.bytes, store.size);
}

void arrive_all(Block& of) {
  while (!of.on_their_way.empty()) arrive(of, draw(of.on_their_way.size()));
}

template <typename T>
T* pointer(u32 i) {
  return static_cast<T*>(rank->launch->pointers[i]);
}

void body() {
  const i64* n = rank->launch->numbers;
  if (rank->launch->kind == 0) {
    push::push_kernel(pointer<u64>(0), pointer<u8>(1), pointer<u8>(2), pointer<u32>(3), pointer<push::Id>(4),
                      pointer<u32>(5), pointer<u32>(6), pointer<int>(7), pointer<u64>(8), n[0], n[1], n[2], n[3], n[4],
                      n[5], n[6], n[7], n[8], n[9], n[10], n[11], n[12], n[13], n[14], n[15], n[16], n[17], n[18], n[19],
                      n[20]);
  } else {
    push_back::push_back_kernel(pointer<u64>(0), pointer<u8>(1), pointer<u8>(2), pointer<int>(3), pointer<u8>(4),
                                pointer<u64>(5), n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], n[9], n[10],
                                n[11], n[12], n[13], n[14], n[15], n[16], n[17]);
  }
}

void run_lane() {
  body();
  block->lanes[threadIdx.x].ended = true;
  --block->left;
  give_way();
}

void begin_block(Rank& of) {
  if (spare.empty()) spare.emplace_back(new Block);
  Block* made = spare.back().release();
  spare.pop_back();
  made->number = of.begun++;
  made->here = made->held = 0;
  made->left = THREADS;
  std::memset(made->shared, 0xa5, sizeof made->shared);
  for (Lane& lane : made->lanes) {
    lane.ended = false;
    getcontext(&lane.context);
    lane.context.uc_stack.ss_sp = lane.stack.get();
    lane.context.uc_stack.ss_size = 1 << 15;
    lane.context.uc_link = nullptr;
    makecontext(&lane.context, run_lane, 0);
  }
  of.at_work.push_back(made);
}

// One turn of a block: each of its lanes once.
void run_block(Block* of) {
  block = of;
  for (u32 k = 0, first = draw(THREADS); k < THREADS && !failure; ++k) {
    threadIdx.x = (first + k) % THREADS;
    blockIdx.x = of->number;
    gridDim.x = rank->launch->blocks;
    if (!of->lanes[threadIdx.x].ended) swapcontext(&scheduler, &of->lanes[threadIdx.x].context);
  }
  if (!of->on_their_way.empty() && draw(2)) arrive(*of, draw(of->on_their_way.size()));
}

void run_turn(int (*test)(int, int)) {
  if (!rank->launch) {
    const Step& step = rank->program[rank->next];
    if (step.kind == 2) {
      if (test(rank - ranks, rank->next)) failure = "the test is not content";
      ++rank->next;
      return;
    }
    rank->launch = &step;
    rank->begun = 0;
  }
  while (rank->at_work.size() < rank->launch->resident && rank->begun < rank->launch->blocks) begin_block(*rank);
  const u32 i = draw(rank->at_work.size());
  Block* of = rank->at_work[i];
  run_block(of);
  if (of->left) return;
  arrive_all(*of);
  spare.emplace_back(of);
  rank->at_work.erase(rank->at_work.begin() + i);
  if (!rank->at_work.empty() || rank->begun < rank->launch->blocks) return;
  rank->launch = nullptr;
  ++rank->next;
}

void store(void* to, const void* from, u32 size) {
  Store made{static_cast<u8*>(to), {}, size};
  std::memcpy(made.bytes, from, size);
  block->on_their_way.push_back(made);
}

}  // namespace

u64* shared_words() { return block->shared; }
void store_there(uint4* to, uint4 word) { store(to, &word, 16); }
void store_there(u32* to, u32 word) { store(to, &word, 4); }

void release_there(u32* flag, u32 epoch) {
  arrive_all(*block);
  give_way();
  *flag = epoch;
}

u32 acquire_here(const u32* flag) {
  give_way();
  return *flag;
}

u32 arrive_last(u32* count) {
  give_way();
  return (*count)++;
}

u64 nanoseconds() { return now += 6400; }

void give_up(u64* trouble, u64 what) {
  *trouble = what;
  failure = "gave up";
  while (true) give_way();
}

void __syncthreads() {
  Block& here = *block;
  const u32 number = here.held;
  if (++here.here == THREADS) {
    here.here = 0;
    ++here.held;
  }
  while (here.held == number) give_way();
}

void __syncwarp() { __syncthreads(); }

// Null, or what went wrong. Rank `slow` gets a turn of `slowness` only, if there is one.
extern "C" const char* run(int count, u32 seed, int slow, u32 slowness, const Step** programs, const i64* steps,
                           int (*test)(int, int)) {
  random_bits = seed;
  failure = nullptr;
  now = 0;
  for (int i = 0; i < count; ++i) {
    for (Block* left : ranks[i].at_work) delete left;
    ranks[i] = Rank();
    ranks[i].program = programs[i];
    ranks[i].steps = steps[i];
  }
  for (u64 turns = 0; !failure; ++turns) {
    if (turns > 300000) return "ranks wait for ever";
    bool all = true;
    for (int i = 0; i < count; ++i) all &= ranks[i].next == ranks[i].steps;
    if (all) break;
    const int chosen = draw(count);
    rank = ranks + chosen;
    if (rank->next == rank->steps || (chosen == slow && draw(slowness))) continue;
    run_turn(test);
  }
  return failure;
}
