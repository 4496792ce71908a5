#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif
#if defined(MOEI_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace moei {
namespace {

#if defined(MOEI_AMX)
// Whether there is AMX and the kernel lets this process, all its threads, use the tiles' registers: it must be asked (Linux
// 5.16), because they make the frames of signals larger, and refuses if a thread's stack for signals is too small.
bool amx_granted() {
    constexpr unsigned kTiles = 1u << 24, kInt8 = 1u << 25;
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kTiles) && (d & kInt8) &&
           syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

const Kernels& amx_table() {
    static const Kernels table = [] {
        Kernels made = kAvx512;
        made.isa = "amx_int8";
        for (int i = 0; i < 3; ++i) made.groups[i] = kAmxGroups[i];
        return made;
    }();
    return table;
}
#endif

// Best first.
std::vector<const Kernels*> runnable() {
    std::vector<const Kernels*> tables;
#if defined(__x86_64__) || defined(_M_X64)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni")) {
#if defined(MOEI_AMX)
        if (amx_granted()) tables.push_back(&amx_table());
#endif
        tables.push_back(&kAvx512);
    }
    if (avx2) tables.push_back(&kAvx2);
#elif defined(__aarch64__)
#if defined(__linux__)
    if (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) tables.push_back(&kNeonDotprod);
#elif defined(__APPLE__)
    tables.push_back(&kNeonDotprod);
#endif
    tables.push_back(&kNeon);
#endif
    tables.push_back(&kPortable);
    return tables;
}

const Kernels& choose() {
    const std::vector<const Kernels*> tables = runnable();
    const char* wanted = std::getenv("MOEI_NATIVE_ISA");
    if (!wanted || !*wanted) return *tables.front();
    std::string names;
    for (const Kernels* table : tables) {
        if (std::string(wanted) == table->isa) return *table;
        names += names.empty() ? table->isa : std::string(", ") + table->isa;
    }
    throw std::runtime_error("MOEI_NATIVE_ISA=" + std::string(wanted) + " cannot run here; this processor runs: " + names);
}

}  // namespace

const Kernels& kernels() {
    static const Kernels& chosen = choose();
    return chosen;
}

}  // namespace moei
