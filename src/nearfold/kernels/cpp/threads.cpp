#include "threads.h"

#include <atomic>
#include <chrono>
#include <cstring>
#include <thread>

#include "pool.h"

#if defined(__linux__)
#include <dlfcn.h>
#include <link.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace nearfold {

bool (*stops)() = nullptr;

namespace {

// libgomp's entry point for `#pragma omp parallel`. Two OpenMP runtimes in one process would each keep spinning
// threads and take the cores from one another, so we call the one torch has loaded, and link none.
using GompParallel = void (*)(void (*)(void *), void *, unsigned threads, unsigned flags);

std::atomic<bool> forked{false};  // an OpenMP pool does not survive fork

#if defined(__linux__)
int note_gomp(dl_phdr_info *info, size_t, void *found) {
    if (info->dlpi_name == nullptr || std::strstr(info->dlpi_name, "libgomp") == nullptr) return 0;
    *static_cast<const char **>(found) = info->dlpi_name;
    return std::strstr(info->dlpi_name, "torch") != nullptr;  // other packages bring one of their own: torch's ends the search
}
#endif

GompParallel find_gomp() {
#if defined(__linux__)
    const char *path = nullptr;
    dl_iterate_phdr(note_gomp, &path);
    if (path != nullptr) {
        if (void *library = dlopen(path, RTLD_NOW | RTLD_NOLOAD))
            return reinterpret_cast<GompParallel>(dlsym(library, "GOMP_parallel"));
    }
#endif
    return nullptr;
}

GompParallel gomp() {
    static const GompParallel entry = [] {
#if defined(__unix__) || defined(__APPLE__)
        pthread_atfork(nullptr, nullptr, [] {
            forked.store(true);
            forget_own_threads();
        });
#endif
        return find_gomp();
    }();
    return entry;
}

struct Loop {
    Body body;
    void *context;
    int64_t items;
    std::atomic<int64_t> next{0};
    std::atomic<int> workers{0};
    const std::thread::id caller = std::this_thread::get_id();
    bool stopped = false;  // the caller's own

    void work() {
        using Clock = std::chrono::steady_clock;
        constexpr std::chrono::milliseconds pause(200);
        const int worker = workers.fetch_add(1);
        const bool asks = stops != nullptr && std::this_thread::get_id() == caller;
        Clock::time_point due = asks ? Clock::now() + pause : Clock::time_point::max();
        for (int64_t item = next.fetch_add(1); item < items; item = next.fetch_add(1)) {
            body(context, item, worker);
            if (!asks || Clock::now() < due) continue;
            stopped = stops();
            if (stopped) return next.store(items);  // the others find nothing more to do
            due = Clock::now() + pause;
        }
    }
};

void enter(void *loop) { static_cast<Loop *>(loop)->work(); }

void work_through(Loop &loop, int threads) {
    if (threads <= 1) return loop.work();
    const GompParallel parallel = gomp();
    if (parallel != nullptr && !forked.load()) return parallel(enter, &loop, static_cast<unsigned>(threads), 0);
    call_on_own_threads(enter, &loop, threads);
}

}  // namespace

void run_items(int threads, int64_t items, Body body, void *context) {
    Loop loop;
    loop.body = body;
    loop.context = context;
    loop.items = items;
    work_through(loop, threads > items ? static_cast<int>(items) : threads);
    if (loop.stopped) throw Stopped();
}

const char *thread_source() { return gomp() != nullptr && !forked.load() ? "torch's OpenMP" : "own threads"; }

}  // namespace nearfold
