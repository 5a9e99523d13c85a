// Threads for tasks of microseconds, those of one token. They wait for them awake, and sleep when
// for 20 us there have been none: to wait 50 or 200 makes no token sooner, and takes what Python could
// have.
#pragma once
#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <unistd.h>

#include "vectors.h"

struct Pool {  // parallel(n, f): f(lo, hi) on parts of 0 to n, whoever is free takes the next
    std::atomic<I> posted{0}, next{0};
    std::atomic<int> inside{0}, sleepers{0};
    std::atomic<bool> open{false};
    std::mutex busy, door;
    std::condition_variable wake;
    int workers = 0;
    int wanted = 0;
    int pid = getpid();
    I n = 0, part = 1;
    void (*run)(void *, I, I) = nullptr;
    void *task = nullptr;

    void share() {
        for (I lo; (lo = next.fetch_add(part)) < n;)
            run(task, lo, std::min(n, lo + part));
    }

    static void pause() {
#ifdef __SSE__
        __builtin_ia32_pause();
#else
        std::atomic_signal_fence(std::memory_order_seq_cst);
#endif
    }

    void work(int number) {
        for (I seen = 0;;) {
            auto until = std::chrono::steady_clock::now() + std::chrono::microseconds(20);
            for (int i = 1; posted.load() == seen; i++) {
                pause();
                if (i % 64 || std::chrono::steady_clock::now() < until)
                    continue;
                std::unique_lock<std::mutex> lock(door);
                sleepers++;
                wake.wait(lock, [&] { return posted.load() != seen; });
                sleepers--;
            }
            seen = posted.load();
            inside++;  // before looking: whoever closes the door waits for those inside
            if (open.load() && number < wanted)
                share();
            inside--;
        }
    }

    void start(int threads) {
        for (; workers < threads - 1; workers++)
            std::thread(&Pool::work, this, workers).detach();
    }
};

// One for all tasks, or each would have threads of its own, who wait awake where the others' compute.
// Never deleted: threads may wait in it to the end
static Pool *pool = new Pool;

template <class F>
static void parallel(I threads, I n, F f) {
    if (threads > n)
        threads = n;
    if (threads < 2 || !pool->busy.try_lock())
        return f((I)0, n);
    if (pool->pid != getpid()) {
        pool = new Pool;  // threads do not come along into a child
        pool->busy.lock();
    }
    Pool &p = *pool;
    p.start(threads);
    p.run = [](void *g, I lo, I hi) { (*(F *)g)(lo, hi); };
    p.task = &f;
    p.n = n;
    p.part = std::max<I>(1, n / (4 * threads));
    p.wanted = threads - 1;
    p.next = 0;
    p.open = true;
    p.posted++;
    if (p.sleepers.load()) {
        std::lock_guard<std::mutex> lock(p.door);
        p.wake.notify_all();
    }
    p.share();
    p.open = false;
    for (int i = 0; p.inside.load(); i++) {
        if (i < 1000)
            Pool::pause();
        else
            std::this_thread::yield();  // its core may be this one
    }
    p.busy.unlock();
}
