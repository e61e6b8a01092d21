// One function per instruction set behind one name.
//   HEDDLE_DECLARE_OP(route_top_k, RouteTopKArgs)   in the op's header
//   HEDDLE_DEFINE_OP(route_top_k, RouteTopKArgs)    once, in <family>/dispatch.cpp
// Each isa_<isa>.cpp defines heddle::<isa>::route_top_k by including the op's -inl.h in a region.
#pragma once
#include "core/status.h"
#include "core/thread_pool.h"

#if defined(__x86_64__) || defined(_M_X64)
#define HEDDLE_FOR_X86(x) x
#else
#define HEDDLE_FOR_X86(x)
#endif
#if defined(__aarch64__) || defined(_M_ARM64)
#define HEDDLE_FOR_NEON(x) x
#else
#define HEDDLE_FOR_NEON(x)
#endif

#define HEDDLE_DECLARE_OP(op, Args)                                          \
  Status op(const Args& args, const Exec& exec);                             \
  HEDDLE_FOR_X86(namespace avx512 { Status op(const Args&, const Exec&); })  \
  HEDDLE_FOR_X86(namespace avx2 { Status op(const Args&, const Exec&); })    \
  HEDDLE_FOR_NEON(namespace neon { Status op(const Args&, const Exec&); })   \
  namespace scalar {                                                         \
  Status op(const Args&, const Exec&);                                       \
  }

#define HEDDLE_DEFINE_OP(op, Args)                                           \
  Status op(const Args& args, const Exec& exec) {                            \
    switch (exec.isa) {                                                      \
      HEDDLE_FOR_X86(case Isa::kAvx512 : return avx512::op(args, exec);)     \
      HEDDLE_FOR_X86(case Isa::kAvx2 : return avx2::op(args, exec);)         \
      HEDDLE_FOR_NEON(case Isa::kNeon : return neon::op(args, exec);)        \
      case Isa::kScalar: return scalar::op(args, exec);                      \
      default: return kUnsupported;                                          \
    }                                                                        \
  }
