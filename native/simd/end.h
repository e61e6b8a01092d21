// Closes the region opened by simd/{avx512,avx2,neon,scalar}_begin.h.
}  // namespace <isa>
}  // namespace heddle
#undef HEDDLE_REGION_ISA
#if defined(__clang__)
#pragma clang attribute pop
#elif defined(__GNUC__)
#pragma GCC pop_options
#endif
