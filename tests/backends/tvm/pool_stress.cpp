// Many callers use the threads of kernels at once: every task is done once, in this job, before its launch returns.
// Built with backends/tvm/pool.c under ThreadSanitizer by test_tvm_pool.py. Arguments: threads, callers, jobs of
// each. Without them, how many threads there would be is printed.

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <iterator>
#include <sys/wait.h>
#include <thread>
#include <unistd.h>
#include <vector>

struct Environment {
  void* handle;
  int32_t tasks;
};
using Task = int (*)(int, Environment*, void*);
extern "C" {
extern int (*__TVMBackendParallelLaunch)(Task, void*, int);
void netlathe_set_threads(int threads);
int netlathe_threads(void);

// What tvm-ffi has: one error for each thread.
thread_local void* raised = nullptr;
std::atomic<int> dropped{0};
void TVMFFIErrorMoveFromRaised(void** error) { *error = raised, raised = nullptr; }
void TVMFFIErrorSetRaised(void* error) { raised = error; }
int TVMFFIObjectDecRef(void*) { return ++dropped, 0; }

// Where a thread has read what may be old by the time it acts on it: some wait there for others to go on.
void hesitate(void) {
  static thread_local unsigned seed = (unsigned)(uintptr_t)&seed;
  seed = seed * 1664525u + 1013904223u;
  if (seed >> 27 == 0) std::this_thread::sleep_for(std::chrono::microseconds(seed >> 20 & 127));
}
}

static void check(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "not so: %s\n", what);
  std::_Exit(1);
}

struct Work {
  std::vector<int> done;  // plain: the launch's return is what makes them visible
  int failing = -1;
};
static int error_object;

static int task(int number, Environment* environment, void* data) {
  Work& work = *static_cast<Work*>(data);
  // As TVM's code generator divides a loop.
  const int extent = (int)work.done.size(), each = (extent + environment->tasks - 1) / environment->tasks;
  for (int i = number * each; i < (number + 1) * each && i < extent; ++i) ++work.done[i];
  if (number != work.failing) return 0;
  raised = &error_object;
  return -1;
}

static void call(int jobs, unsigned seed) {
  for (int job = 0; job < jobs; ++job) {
    seed = seed * 1664525u + 1013904223u;
    Work work;
    work.done.assign(seed >> 16 & 511, 0);
    if (seed >> 28 == 0) work.failing = 0;
    const int given = seed >> 29 == 1 ? 7 : 0;  // a number of tasks that the kernel asks for
    const int status = __TVMBackendParallelLaunch(task, &work, given);
    check(status == (work.failing < 0 ? 0 : -1), "a launch fails when a task does");
    check((raised != nullptr) == (work.failing >= 0), "the caller has the error");
    raised = nullptr;
    for (int count : work.done) check(count == 1, "each step of the loop is done once");
    if (seed >> 24 == 5) std::this_thread::sleep_for(std::chrono::microseconds(400));  // workers fall asleep
  }
}

int main(int count, char** arguments) {
  if (count == 1) return std::printf("%d\n", netlathe_threads()) < 0;
  const int threads = std::atoi(arguments[1]), callers = std::atoi(arguments[2]), jobs = std::atoi(arguments[3]);
  netlathe_set_threads(threads);
  check(netlathe_threads() == threads, "as many threads as were asked for");
  std::vector<std::thread> all;
  for (int i = 0; i < callers; ++i) all.emplace_back(call, jobs, 17u + i);
  for (auto& one : all) one.join();
  netlathe_set_threads(threads + 2);  // more than there are
  call(50, 99);
  const pid_t child = fork();
  if (child == 0) {
    call(50, 101);
    const auto own = std::filesystem::directory_iterator("/proc/self/task");
    check(std::distance(begin(own), end(own)) >= threads + 2, "workers were started");
    std::_Exit(0);
  }
  int status = 0;
  check(waitpid(child, &status, 0) == child && status == 0, "a forked process has workers of its own");
  std::puts("all done");
}
