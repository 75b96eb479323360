// Parallel loops on the threads that torch itself uses, or on some of our own.
#pragma once
#include <cstdint>

namespace nearfold {

using Body = void (*)(void *context, int64_t item, int worker);

// body(context, item, worker) for every item; items are handed out in order, worker < threads.
// Each item runs once, on one thread; nothing is promised about which. Throws Stopped where `stops` said so.
void run_items(int threads, int64_t items, Body body, void *context);

// Whether to leave the work undone; null: never. Between items, about five times a second, the thread that called
// run_items asks, and no other.
extern bool (*stops)();
struct Stopped {};

// Where the threads come from: "torch's OpenMP" or "own threads".
const char *thread_source();

}  // namespace nearfold
