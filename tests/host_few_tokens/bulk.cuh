// On a host: bulk copies and their barriers. Copies arrive at once, or as late as somebody waits for them.

#pragma once

#include "rows.cuh"

void allow_next_launch();
void await_previous_launch();
void open_barriers(u64* barriers, u32 count);
void expect_bytes(u32 barrier, u32 bytes);
void await_bytes(u32 barrier, u32 parity);
void copy_in(u32 to, const u8* from, u32 bytes, u32 barrier);

inline void see_earlier_writes() {}
inline u64 weight_policy() { return 0; }
inline u32 shared_address(const void* place) { return static_cast<const u8*>(place) - shared; }
inline void copy_weights_in(u32 to, const u8* from, u32 bytes, u32 barrier, u64) { copy_in(to, from, bytes, barrier); }
