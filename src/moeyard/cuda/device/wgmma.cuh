// Hopper's own instructions (sm_90a): mbarriers, the bulk copy engine, products of a warpgroup. Addresses of shared
// memory are 32 bits wide.

#pragma once

#include "rows.cuh"

// What cuTensorMapEncodeTiled makes, as a kernel parameter.
struct alignas(64) TensorMap {
  u8 bytes[128];
};

__device__ __forceinline__ u32 shared_address(const void* pointer) {
  return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

// A value that the compiler keeps, and does not make anew where it is used.
__device__ __forceinline__ u32 kept(u32 value) {
  asm volatile("" : "+r"(value));
  return value;
}

// mbarriers: a phase ends when as many have arrived as `count` says and all expected bytes have come.

__device__ __forceinline__ void open_barrier(u32 barrier, u32 count) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

// Barriers that were opened before this are seen by the copy engine, and after a barrier of the block by all threads.
__device__ __forceinline__ void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void arrive_and_expect(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// This thread arrives when all its cp.async up to here have written; `count` has this arrival in it.
__device__ __forceinline__ void arrive_after_copies(u32 barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
}

// Returns when the phase of this parity has ended. The phase before the first counts as ended, with parity 1.
__device__ __forceinline__ void await_phase(u32 barrier, u32 parity) {
  u32 done = 0;
  while (!done) {
    asm volatile(
        "{\n\t.reg .pred p;\n\t"
        "mbarrier.try_wait.parity.shared.b64 p, [%1], %2;\n\t"
        "selp.u32 %0, 1, 0, p;\n\t}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  }
}

// A barrier of the 128 threads of one of two warpgroups. The block's barriers are named by constants: of a number in a
// register the compiler would take all 16 for a block.
__device__ __forceinline__ void sync_warpgroup(u32 group) {
  if (group == 0) asm volatile("bar.sync 1, 128;" ::: "memory");
  else asm volatile("bar.sync 2, 128;" ::: "memory");
}

// A barrier of the 256 threads of two warpgroups that multiply.
__device__ __forceinline__ void sync_multipliers() { asm volatile("bar.sync 4, 256;" ::: "memory"); }

// A barrier of the 128 threads of the warpgroup that loads.
__device__ __forceinline__ void sync_loaders() { asm volatile("bar.sync 3, 128;" ::: "memory"); }

// Copies: boxes of a tensor by the copy engine, and 16 bytes by a thread (zeros for `bytes` of 0).

__device__ __forceinline__ void prefetch_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

__device__ __forceinline__ void copy_box(u32 to, const TensorMap& map, u32 barrier, u32 x, u32 y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          to),
      "l"(&map), "r"(barrier), "r"(x), "r"(y)
      : "memory");
}

__device__ __forceinline__ void copy_box(u32 to, const TensorMap& map, u32 barrier, u32 x, u32 y, u32 z, u32 v, u32 w) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(to),
      "l"(&map), "r"(barrier), "r"(x), "r"(y), "r"(z), "r"(v), "r"(w)
      : "memory");
}

// The same for what is soon read by nobody any more: it leaves the L2 cache first.
__device__ __forceinline__ void copy_box(u32 to, const TensorMap& map, u32 barrier, u32 x, u32 y, u32 z, u32 v, u32 w,
                                         u64 policy) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%3, %4, %5, %6, %7}], [%2], %8;" ::"r"(to),
      "l"(&map), "r"(barrier), "r"(x), "r"(y), "r"(z), "r"(v), "r"(w), "l"(policy)
      : "memory");
}

__device__ __forceinline__ u64 soon_forgotten() {
  u64 policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// Orders what ordinary writes left in global memory before what the copy engine reads next.
__device__ __forceinline__ void show_memory_to_copies() { asm volatile("fence.proxy.async;" ::: "memory"); }

__device__ __forceinline__ void copy_16_bytes(u32 to, const u8* from, u32 bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

__device__ __forceinline__ void copy_4_bytes(u32 to, const float* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
}

__device__ __forceinline__ void await_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Orders what ordinary writes (cp.async too) left in shared memory before what the tensor cores or the copy engine read
// next.
__device__ __forceinline__ void show_shared_writes() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// 8 x 8 values of 16 bits, held as products are (row lane / 4, columns 2 * (lane % 4) and the next), written
// transposed: lane l gives the address of column l.
__device__ __forceinline__ void store_transposed(u32 address, u32 values) {
  asm volatile("stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [%0], {%1};" ::"r"(address), "r"(values) : "memory");
}

// Four of those: lanes 8 i to 8 i + 7 give the addresses of the columns of number i.
__device__ __forceinline__ void store_transposed(u32 address, const uint4& values) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(values.x),
               "r"(values.y), "r"(values.z), "r"(values.w)
               : "memory");
}

// From shared to global memory by the copy engine; addresses and `bytes` are multiples of 16. Copies of a thread count
// from one commit to the next.
__device__ __forceinline__ void copy_out(u16* to, u32 from, u32 bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(from), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void commit_copies_out() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Returns when what this thread's committed copies read has been read.
__device__ __forceinline__ void await_copies_out() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

__device__ __forceinline__ uint4 load_shared(u32 address) {
  uint4 word;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(word.x), "=r"(word.y), "=r"(word.z), "=r"(word.w)
               : "r"(address)
               : "memory");
  return word;
}

__device__ __forceinline__ u32 load_shared_word(u32 address) {
  u32 word;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(address) : "memory");
  return word;
}

__device__ __forceinline__ u32 load_shared_half(u32 address) {
  u32 half;
  asm volatile("ld.shared.u16 %0, [%1];" : "=r"(half) : "r"(address) : "memory");
  return half;
}

__device__ __forceinline__ float2 load_shared_pair(u32 address) {
  float2 pair;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(pair.x), "=f"(pair.y) : "r"(address) : "memory");
  return pair;
}

__device__ __forceinline__ void store_shared(u32 address, float value) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
}

// Brings the line of this address to the L1 cache.
__device__ __forceinline__ void prefetch_line(const float* address) {
  asm volatile("prefetch.global.L1 [%0];" ::"l"(address) : "memory");
}

// Products of a warpgroup: d[64, N] += a[64, 16] b[N, 16]^T with a and b in shared memory, rows of 128 bytes (64
// values) in groups of 8, in the 128-byte swizzle: the 16-byte piece p of row r lies at p ^ r % 8. Of d, lane l of warp
// w holds rows 16 w + l / 4 (values 4 j, 4 j + 1) and 8 more (4 j + 2, 4 j + 3), columns 8 j + 2 (l % 4) and the next.

// Where a tile begins (a multiple of 1024 bytes; 32 bytes more are 16 values along), 1024 bytes from group to group,
// swizzle of 128 bytes. With TURNED a lies as a[16, 64] in rows of 128 bytes, which are values of all its rows: 2048
// bytes more are 16 values along.
__device__ __forceinline__ u64 tile_descriptor(u32 address) {
  return u64(1) << 62 | u64(1024 >> 4) << 32 | u64(1) << 16 | (address & 0x3ffff) >> 4;
}

// The same of an operand that lies transposed, in blocks of 64 of its rows, 8192 bytes from block to block.
__device__ __forceinline__ u64 blocks_descriptor(u32 address) {
  return u64(1) << 62 | u64(1024 >> 4) << 32 | u64(8192 >> 4) << 16 | (address & 0x3ffff) >> 4;
}

__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Returns when all but the last PENDING groups of products have ended.
template <int PENDING>
__device__ __forceinline__ void await_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Codes of 8 bits: a product spans 32 of them, which are as many bytes. Sums of integers are integers.
#if VALUE_BYTES == 1 && INTEGERS
typedef int Sum;
#define SHAPE_AND_SUM "k32.s32."
#define SIGNS ""
#define SUM_REGISTER "+r"
#else
typedef float Sum;
#define SUM_REGISTER "+f"
#if VALUE_BYTES == 1
#define SHAPE_AND_SUM "k32.f32."
#define SIGNS ", 1, 1"
#else
#define SHAPE_AND_SUM "k16.f32."
#if OUTER
#define SIGNS ", 1, 1, 1, 1"  // both lie transposed
#elif TURNED
#define SIGNS ", 1, 1, 1, 0"  // a does
#else
#define SIGNS ", 1, 1, 0, 0"
#endif
#endif
#endif

__device__ __forceinline__ float float_of(float sum) { return sum; }
__device__ __forceinline__ float float_of(int sum) { return __int2float_rn(sum); }

// Nothing reads a sum before this: the compiler does not see that products end later than they are written.
__device__ __forceinline__ void settle(Sum& sum) { asm volatile("" : SUM_REGISTER(sum)::"memory"); }

#define TEXT_OF(x) #x
#define TEXT(x) TEXT_OF(x)
#define VALUE(i) SUM_REGISTER(d[i])
#define VALUES_OF(i) VALUE(4 * (i)), VALUE(4 * (i) + 1), VALUE(4 * (i) + 2), VALUE(4 * (i) + 3)
#define VALUES_2(i) VALUES_OF(i), VALUES_OF(i + 1)
#define VALUES_4(i) VALUES_2(i), VALUES_2(i + 2)
#define VALUES_8(i) VALUES_4(i), VALUES_4(i + 4)
#define VALUES_16(i) VALUES_8(i), VALUES_8(i + 8)
#define NUMBERS_1 "%0, %1, %2, %3"
#define NUMBERS_2 NUMBERS_1 ", %4, %5, %6, %7"
#define NUMBERS_4 NUMBERS_2 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define NUMBERS_6 NUMBERS_4 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define NUMBERS_8 NUMBERS_6 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define NUMBERS_10 NUMBERS_8 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define NUMBERS_12 NUMBERS_10 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define NUMBERS_14 NUMBERS_12 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define NUMBERS_16 NUMBERS_14 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define NUMBERS_18 NUMBERS_16 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define NUMBERS_20 NUMBERS_18 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define NUMBERS_22 NUMBERS_20 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define NUMBERS_24 NUMBERS_22 ", %88, %89, %90, %91, %92, %93, %94, %95"
// N, the numbers of its N / 2 values, of the operands that follow, and the values.
#define PRODUCT(N, NUMBERS, A, B, ADDS, ...)                                                                      \
  asm volatile("{\n\t.reg .pred adds;\n\tsetp.ne.b32 adds, " ADDS ", 0;\n\t"                                       \
               "wgmma.mma_async.sync.aligned.m64n" #N SHAPE_AND_SUM TEXT(ELEMENT) "." TEXT(ELEMENT) " {" NUMBERS   \
               "}, " A ", " B ", adds" SIGNS ";\n\t}"                                                             \
               : __VA_ARGS__                                                                                       \
               : "l"(a), "l"(b), "r"(adds))

// d = a b^T, or d += a b^T where `adds` is not 0.
template <int N, int COUNT>
__device__ __forceinline__ void multiply(Sum (&d)[COUNT], u64 a, u64 b, u32 adds) {
  static_assert(N <= 2 * COUNT && N % 8 == 0, "a lane holds N / 2 values");
  if constexpr (N == 8) PRODUCT(8, NUMBERS_1, "%4", "%5", "%6", VALUES_OF(0));
  if constexpr (N == 16) PRODUCT(16, NUMBERS_2, "%8", "%9", "%10", VALUES_2(0));
  if constexpr (N == 32) PRODUCT(32, NUMBERS_4, "%16", "%17", "%18", VALUES_4(0));
  if constexpr (N == 48) PRODUCT(48, NUMBERS_6, "%24", "%25", "%26", VALUES_4(0), VALUES_2(4));
  if constexpr (N == 64) PRODUCT(64, NUMBERS_8, "%32", "%33", "%34", VALUES_8(0));
  if constexpr (N == 80) PRODUCT(80, NUMBERS_10, "%40", "%41", "%42", VALUES_8(0), VALUES_2(8));
  if constexpr (N == 96) PRODUCT(96, NUMBERS_12, "%48", "%49", "%50", VALUES_8(0), VALUES_4(8));
  if constexpr (N == 112) PRODUCT(112, NUMBERS_14, "%56", "%57", "%58", VALUES_8(0), VALUES_4(8), VALUES_2(12));
  if constexpr (N == 128) PRODUCT(128, NUMBERS_16, "%64", "%65", "%66", VALUES_16(0));
  if constexpr (N == 144) PRODUCT(144, NUMBERS_18, "%72", "%73", "%74", VALUES_16(0), VALUES_2(16));
  if constexpr (N == 160) PRODUCT(160, NUMBERS_20, "%80", "%81", "%82", VALUES_16(0), VALUES_4(16));
  if constexpr (N == 176) PRODUCT(176, NUMBERS_22, "%88", "%89", "%90", VALUES_16(0), VALUES_4(16), VALUES_2(20));
  if constexpr (N == 192) PRODUCT(192, NUMBERS_24, "%96", "%97", "%98", VALUES_16(0), VALUES_8(16));
}

#if TILED
#define PRODUCT_OF(N, NUMBERS, A, B, ADDS, ...)                                                                     \
  asm volatile("{\n\t.reg .pred adds;\n\tsetp.ne.b32 adds, " ADDS ", 0;\n\t"                                       \
               "wgmma.mma_async.sync.aligned.m64n" #N SHAPE_AND_SUM TEXT(ELEMENT) "." TEXT(ELEMENT) " {" NUMBERS   \
               "}, {" A "}, " B ", adds, 1, 1, 0;\n\t}"                                                            \
               : __VA_ARGS__                                                                                       \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(adds))

// The same with a in registers: lane l of warp w holds of rows 16 w + l / 4 (a[0] and a[2]) and 8 more (a[1] and a[3])
// the values 2 (l % 4) and the next, and those 8 further. Nobody may write them before the product has ended.
template <int N, int COUNT>
__device__ __forceinline__ void multiply_held(Sum (&d)[COUNT], const u32 (&a)[4], u64 b, u32 adds) {
  static_assert(N <= 2 * COUNT && N % 16 == 0, "a lane holds N / 2 values");
  if constexpr (N == 16) PRODUCT_OF(16, NUMBERS_2, "%8, %9, %10, %11", "%12", "%13", VALUES_2(0));
  if constexpr (N == 32) PRODUCT_OF(32, NUMBERS_4, "%16, %17, %18, %19", "%20", "%21", VALUES_4(0));
  if constexpr (N == 48) PRODUCT_OF(48, NUMBERS_6, "%24, %25, %26, %27", "%28", "%29", VALUES_4(0), VALUES_2(4));
  if constexpr (N == 64) PRODUCT_OF(64, NUMBERS_8, "%32, %33, %34, %35", "%36", "%37", VALUES_8(0));
  if constexpr (N == 80) PRODUCT_OF(80, NUMBERS_10, "%40, %41, %42, %43", "%44", "%45", VALUES_8(0), VALUES_2(8));
  if constexpr (N == 96) PRODUCT_OF(96, NUMBERS_12, "%48, %49, %50, %51", "%52", "%53", VALUES_8(0), VALUES_4(8));
  if constexpr (N == 112)
    PRODUCT_OF(112, NUMBERS_14, "%56, %57, %58, %59", "%60", "%61", VALUES_8(0), VALUES_4(8), VALUES_2(12));
  if constexpr (N == 128) PRODUCT_OF(128, NUMBERS_16, "%64, %65, %66, %67", "%68", "%69", VALUES_16(0));
  if constexpr (N == 144)
    PRODUCT_OF(144, NUMBERS_18, "%72, %73, %74, %75", "%76", "%77", VALUES_16(0), VALUES_2(16));
  if constexpr (N == 160)
    PRODUCT_OF(160, NUMBERS_20, "%80, %81, %82, %83", "%84", "%85", VALUES_16(0), VALUES_4(16));
}
#endif

// Registers of this warpgroup's threads, taken from or given to the block's other warpgroups.
template <int COUNT>
__device__ __forceinline__ void keep_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}
