// What the engine's own threads must do, for tests/test_engine_pool.py: ./own_threads CASE. Says how often threads were made.
#include <dlfcn.h>
#include <pthread.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <csignal>
#include <thread>
#include <vector>

#include "threads.h"

static std::atomic<int> made{0};
static std::atomic<bool> refuse{false};

#if !defined(__SANITIZE_THREAD__)
// Instead of the C library's, of which it makes threads unless `refuse` is set.
extern "C" int pthread_create(pthread_t *id, const pthread_attr_t *how, void *(*start)(void *), void *with) {
    using Create = int (*)(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *);
    static const Create create = reinterpret_cast<Create>(dlsym(RTLD_NEXT, "pthread_create"));
    if (refuse) return EAGAIN;
    ++made;
    return create(id, how, start, with);
}
#endif

static void require(bool holds, const char *what) {
    if (holds) return;
    std::fprintf(stderr, "not so: %s\n", what);
    std::_Exit(1);
}

template <class F>
void run(int threads, int64_t items, const F &body) {
    nearfold::run_items(
        threads, items, [](void *f, int64_t item, int worker) { (*static_cast<const F *>(f))(item, worker); },
        const_cast<void *>(static_cast<const void *>(&body)));
}

// Every item once; no two at a time with the same worker (plain counters: the sanitizer sees it); `inner` more within each.
static void loop(int threads, int64_t items, int inner = 0) {
    std::vector<int> times(items), of_worker(threads);
    run(threads, items, [&](int64_t item, int worker) {
        require(worker >= 0 && worker < threads, "worker < threads");
        ++times[item], ++of_worker[worker];
        if (inner > 0) loop(threads, 5, inner - 1);
    });
    int sum = 0;
    for (int n : times) require(n == 1, "every item once");
    for (int n : of_worker) sum += n;
    require(sum == items, "every item by one worker");
}

static void loops(int count) {
    for (int i = 0; i < count; ++i) loop(2 + i % 3, 1 + i % 40, i % 16 == 0 ? 2 : 0);
}

static void callers(int count) {
    std::vector<std::thread> all;
    for (int i = 0; i < 6; ++i) all.emplace_back(loops, count);
    for (std::thread &each : all) each.join();
}

static int child(int depth) {
    const pid_t id = fork();
    if (id == 0) {
        alarm(20);  // one that waits for threads that are not there
        loops(40);
        std::_Exit(depth > 0 ? child(depth - 1) : 0);
    }
    int status = 0;
    require(waitpid(id, &status, 0) == id, "the child is there");
    return status;
}

int main(int, char **argv) {
    const auto is = [&](const char *name) { return !std::strcmp(argv[1], name); };
    require(!std::strcmp(nearfold::thread_source(), "own threads"), "there is no OpenMP here");
    if (is("alone")) {
        for (int i = 0; i < 300; ++i) loop(4, 30);
    } else if (is("callers")) {
        callers(200);
    } else if (is("fork")) {  // while others are in it
        std::atomic<bool> enough{false};
        std::thread other([&] {
            while (!enough) loop(3, 20);
        });
        for (int i = 0; i < 20; ++i) require(child(i % 2) == 0, "a child of fork does the same");
        enough = true;
        other.join();
        loops(40);
    } else if (is("refused")) {
        refuse = true;
        loops(40);
        refuse = false;
        loops(40);
        refuse = true;
        loop(8, 50, 1);  // some are there
    } else if (is("stopped")) {
        static std::atomic<bool> stop{true};
        nearfold::stops = [] { return stop.load(); };
        for (int i = 0; i < 3; ++i) {
            std::atomic<int> seen{0};
            bool stopped = false;
            try {
                run(3, 100000, [&](int64_t, int) { ++seen, usleep(1000); });
            } catch (const nearfold::Stopped &) {
                stopped = true;
            }
            require(stopped && seen < 10000, "stopped between items");
        }
        stop = false;
        loops(40);
    } else if (is("signals")) {  // reach the threads that were there before
        static std::atomic<bool> arrived{false};
        static pthread_t self = pthread_self();
        std::signal(SIGUSR1, [](int) { arrived = pthread_equal(self, pthread_self()); });
        loop(4, 100);
        sigset_t usual, before;
        sigemptyset(&usual), sigaddset(&usual, SIGUSR1);
        pthread_sigmask(SIG_BLOCK, &usual, &before);
        kill(getpid(), SIGUSR1);
        usleep(100000);
        require(!arrived, "no thread of ours took it");
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
        require(arrived, "it waited for us");
    } else if (is("race")) {  // for the sanitizer to find
        int count = 0;
        std::thread other([&] { ++count; });
        ++count;
        other.join();
    } else {
        require(false, "a known case");
    }
    std::printf("%d threads made\n", made.load());
}
