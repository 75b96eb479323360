#include "pool.h"

#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>

#include <csignal>
#endif

namespace nearfold {
namespace {

// A call that others may join. It lies on its caller's stack, who waits for those inside.
struct Open {
    void (*call)(void *);
    void *context;
    int wanted;      // threads that may still come
    int inside = 0;  // that came, and have not left
    Open *next = nullptr;
};

// Signals go to the threads that were there before, as if there were no others: Ctrl-C has to wake the one that waits.
class WithoutSignals {
#if defined(__unix__) || defined(__APPLE__)
   public:
    WithoutSignals() {
        sigset_t all;
        sigfillset(&all);
        for (int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL}) sigdelset(&all, fault);  // are for the thread that made them
        pthread_sigmask(SIG_SETMASK, &all, &before_);
    }
    ~WithoutSignals() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

   private:
    sigset_t before_;
#endif
};

// Never deleted: its threads wait in it until the process ends.
class Pool {
   public:
    void call(Open &open) {
        const int wanted = open.wanted;
        std::unique_lock<std::mutex> lock(mutex_);
        open.next = first_;
        first_ = &open;
        wanted_ += wanted;
        while (idle_ < wanted_ && start()) ++idle_;
        lock.unlock();
        for (int i = 0; i < wanted; ++i) work_.notify_one();
        open.call(open.context);
        lock.lock();
        wanted_ -= open.wanted;
        open.wanted = 0;
        close(open);
        left_.wait(lock, [&] { return open.inside == 0; });
    }

   private:
    bool start() {
        [[maybe_unused]] const WithoutSignals here;
        try {
            std::thread([this] { serve(); }).detach();
        } catch (const std::exception &) {
            return false;  // the system gives no more: those there are do the work
        }
        return true;
    }

    void serve() {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            work_.wait(lock, [&] { return first_ != nullptr; });
            Open &open = *first_;
            --idle_, --wanted_, ++open.inside;
            if (--open.wanted == 0) close(open);
            lock.unlock();
            open.call(open.context);
            lock.lock();
            ++idle_;
            if (--open.inside == 0) left_.notify_all();  // its caller goes on, and `open` with it, when we let go of the lock
        }
    }

    void close(const Open &open) {
        for (Open **at = &first_; *at != nullptr; at = &(*at)->next)
            if (*at == &open) return void(*at = open.next);
    }

    std::mutex mutex_;
    std::condition_variable work_, left_;
    Open *first_ = nullptr;     // those that want more threads
    int idle_ = 0, wanted_ = 0;  // threads in no call; threads that the open calls want
};

std::atomic<Pool *> pool{nullptr};

}  // namespace

void call_on_own_threads(void (*call)(void *), void *context, int threads) {
    Pool *ours = pool.load();
    if (ours == nullptr) {
        Pool *made = new Pool;
        if (pool.compare_exchange_strong(ours, made))
            ours = made;
        else
            delete made;  // another thread was first
    }
    Open open{call, context, threads - 1};
    ours->call(open);
}

void forget_own_threads() { pool.store(nullptr); }

}  // namespace nearfold
