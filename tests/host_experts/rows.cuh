// On a host: 16-bit floats and back.

#pragma once

#include "device.cuh"

constexpr int FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2;

template <int KIND>
float widen(u32 bits) {
  if (KIND == BFLOAT16) return __int_as_float(static_cast<u32>(bits << 16));
  if (KIND == FLOAT32) return __int_as_float(bits);
  const u16 half = bits;
  _Float16 value;
  std::memcpy(&value, &half, 2);
  return value;
}

template <int KIND>
u32 narrow(float value) {
  u32 bits;
  std::memcpy(&bits, &value, 4);
  if (KIND == BFLOAT16) return value != value ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const _Float16 rounded = static_cast<_Float16>(value);
  u16 half;
  std::memcpy(&half, &rounded, 2);
  return half;
}

template <int KIND>
u32 narrow_pair(float low, float high) {
  return narrow<KIND>(low) | narrow<KIND>(high) << 16;
}
