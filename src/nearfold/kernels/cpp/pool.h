// Threads of our own, for where no OpenMP of torch's is.
#pragma once

namespace nearfold {

// call(context) on the calling thread, and at the same time on up to threads - 1 others, threads >= 2; returns when all have.
// Any number of threads may ask at once, and a call may ask again. Where the system gives no more threads there are fewer.
void call_on_own_threads(void (*call)(void *), void *context, int threads);

// For a child of fork, which has none of its parent's threads: the next call starts its own.
void forget_own_threads();

}  // namespace nearfold
