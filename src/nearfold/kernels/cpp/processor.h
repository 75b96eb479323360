// Which instruction sets the processor has and the system lets us use. `__builtin_cpu_supports` says so, too, but it is in a
// library that clang-cl does not link.
#pragma once
#include <cpuid.h>

#include <cstdint>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace nearfold {

struct Processor {
    bool avx2 = false, avx512 = false, amx = false;

    Processor() {
        unsigned a, b, c, d;
        if (!__get_cpuid(1, &a, &b, &c, &d)) return;
        constexpr unsigned fma = 1u << 12, xgetbv = 1u << 27, avx = 1u << 28;
        if (!all(c, fma | xgetbv | avx) || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
        constexpr unsigned has_avx2 = 1u << 5, bmi2 = 1u << 8, f = 1u << 16, dq = 1u << 17, bw = 1u << 30, vl = 1u << 31;
        avx2 = all(b, has_avx2 | bmi2) && saves(0x6);
#if defined(__APPLE__)
        const bool saved = avx2;  // macOS begins to save the wider registers when they are used first
#else
        const bool saved = saves(0xe6);
#endif
        avx512 = avx2 && all(b, f | dq | bw | vl) && saved;
#if defined(__linux__)
        constexpr unsigned bfloat16 = 1u << 22, tile = 1u << 24, request_permission = 0x1023, tile_data = 18;
        amx = avx512 && all(d, bfloat16 | tile) && syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#endif
    }

   private:
    static bool all(unsigned has, unsigned bits) { return (has & bits) == bits; }
    // Whether the system saves these registers when it changes threads.
    static bool saves(unsigned state) {
        unsigned low, high;
        __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
        return all(low, state);
    }
};

}  // namespace nearfold
