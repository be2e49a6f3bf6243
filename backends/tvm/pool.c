// The threads that kernels for a CPU share, in place of the pool in TVM's runtime. It is compiled into every library
// of kernels.
//
// A kernel's loop comes as tasks. TVM gives each thread one of them and waits for all: where other programs run too,
// a thread that the system does not run for a while holds up everyone. Here each thread has a share of many small
// tasks, in order, so that on a quiet machine it touches the same memory from kernel to kernel; who is done takes
// tasks from the shares of others. Whoever calls a kernel works too, and does everything if nobody else gets a
// processor. Threads that wait spin a little and then sleep.
//
// All libraries of a process have one pool. Several callers may run kernels at once: each has a job, and workers take
// tasks of any.

#define _GNU_SOURCE
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum {
  kJobs = 8,       // callers that may share the workers; others work alone
  kMost = 256,     // threads of one job
  kTasks = 16,     // of each thread
  kSpins = 50000   // nanoseconds before a thread that waits goes to sleep
};

// What TVM's code generator calls (c_backend_api.h), and how it hands over an error (tvm-ffi's c_api.h).
typedef struct { void* handle; int32_t tasks; } Environment;
typedef int (*Task)(int number, Environment* environment, void* data);
void TVMFFIErrorMoveFromRaised(void** error);
void TVMFFIErrorSetRaised(void* error);
int TVMFFIObjectDecRef(void* object);

typedef struct { _Alignas(64) uint64_t next; } Share;  // number of the job << 32 | its next task

typedef struct {
  _Alignas(64) int taken;  // by a caller
  uint32_t number;         // counts the jobs that were here
  Task task;
  void* data;
  int tasks, shares;
  _Alignas(64) uint32_t left;  // tasks that are not done
  int waiting;                 // its caller sleeps until there are none
  int failed;                  // tasks
  void* error;                 // of one of them
  Share share[kMost];
} Job;

typedef struct {
  Job jobs[kJobs];
  _Alignas(64) uint32_t news;  // counts the jobs of all callers
  uint32_t asleep;             // workers
  int threads;                 // of a job, its caller among them; 0: not said yet
  int workers, starting, forks;
} Pool;

// One for the process, although every library brings it along. The name changes with what it means.
Pool netlathe_pool_1 __attribute__((weak));
__asm__(".type netlathe_pool_1, %gnu_unique_object");
#define pool netlathe_pool_1

#ifndef HESITATE
#define HESITATE()  // where tests delay a thread
#endif
#ifndef SYSTEM
#define SYSTEM ""  // where tests keep other files of the system
#endif
#define load(at) __atomic_load_n(at, __ATOMIC_ACQUIRE)
#define store(at, value) __atomic_store_n(at, value, __ATOMIC_RELEASE)

static void futex(uint32_t* at, int operation, uint32_t value) {
  syscall(SYS_futex, at, operation | FUTEX_PRIVATE_FLAG, value, NULL, NULL, 0);
}

static int64_t now(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec * 1000000000ll + time.tv_nsec;
}

// Spin until *at is no longer `value`, or for some time; whether it is. A thread that only spins has used up its
// time when there is work, if other programs want the processor: so it offers it to them.
static int spin(uint32_t* at, uint32_t value) {
  const int64_t begin = now();
  do {
    for (int i = 0; i < 32; ++i) {
      if (load(at) != value) return 1;
#if defined(__x86_64__)
      __builtin_ia32_pause();
#elif defined(__aarch64__)
      __asm__ volatile("yield");
#endif
    }
    sched_yield();
  } while (now() - begin < kSpins);
  return load(at) != value;
}

// The next task of a share of that job, or -1.
static int take(Job* job, uint32_t number, int share, int end) {
  uint64_t* next = &job->share[share].next;
  uint64_t seen = load(next);
  HESITATE();
  while (seen >> 32 == number && (int)(uint32_t)seen < end)
    if (__atomic_compare_exchange_n(next, &seen, seen + 1, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE))
      return (int)(uint32_t)seen;
  return -1;
}

static int first(int share, int tasks, int shares) { return (int)((int64_t)share * tasks / shares); }

// Do tasks of a job, first those of the own share; how many. Nothing that is read of a job is of use before one of
// its tasks was taken: until that is done, its caller waits, and before, what was read may be of the next job. Then
// the shares, which are written first and read last, are the next job's too, and nothing is taken.
static int help(Job* job, int own) {
  const uint32_t number = load(&job->number);
  if (load(&job->left) == 0) return 0;
  const Task task = load(&job->task);
  void* data = load(&job->data);
  const int tasks = load(&job->tasks), shares = load(&job->shares);
  if (own >= shares) return 0;
  Environment environment = {NULL, tasks};
  int done = 0;
  HESITATE();
  for (int i = 0; i < shares; ++i) {
    const int share = (own + i) % shares, end = first(share + 1, tasks, shares);
    for (int taken; (taken = take(job, number, share, end)) >= 0; ++done)
      if (task(taken, &environment, data) != 0) {
        void* error = NULL;
        TVMFFIErrorMoveFromRaised(&error);
        error = __atomic_exchange_n(&job->error, error, __ATOMIC_ACQ_REL);
        if (error != NULL) TVMFFIObjectDecRef(error);
        store(&job->failed, 1);
      }
  }
  if (done > 0 && __atomic_sub_fetch(&job->left, done, __ATOMIC_SEQ_CST) == 0 &&
      __atomic_load_n(&job->waiting, __ATOMIC_SEQ_CST))
    futex(&job->left, FUTEX_WAKE, 1);
  return done;
}

static void* work(void* own) {
  for (;;) {
    const uint32_t news = load(&pool.news);
    int done = 0;
    for (int i = 0; i < kJobs; ++i) done += help(&pool.jobs[i], (int)(intptr_t)own);
    if (done > 0 || spin(&pool.news, news)) continue;
    __atomic_add_fetch(&pool.asleep, 1, __ATOMIC_SEQ_CST);
    futex(&pool.news, FUTEX_WAIT, news);
    __atomic_sub_fetch(&pool.asleep, 1, __ATOMIC_SEQ_CST);
  }
  return NULL;
}

// A child of fork() has none of the threads.
static void forked(void) {
  for (int i = 0; i < kJobs; ++i) pool.jobs[i].left = 0, pool.jobs[i].taken = 0;
  pool.asleep = pool.workers = pool.starting = 0;
}

// So many workers, or as many as the system allows.
static void start(int workers) {
  if (load(&pool.workers) >= workers || __atomic_exchange_n(&pool.starting, 1, __ATOMIC_ACQUIRE)) return;
  if (!pool.forks) pool.forks = pthread_atfork(NULL, NULL, forked) == 0;
  pthread_attr_t attributes;
  pthread_attr_init(&attributes);
  pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
  sigset_t all, before;  // signals are for the threads of the program
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  while (pool.workers < workers) {
    pthread_t thread;
    if (pthread_create(&thread, &attributes, work, (void*)(intptr_t)(pool.workers + 1)) != 0) break;
    store(&pool.workers, pool.workers + 1);
  }
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  pthread_attr_destroy(&attributes);
  store(&pool.starting, 0);
}

// From now on; it may be more than before.
__attribute__((visibility("default"))) void netlathe_set_threads(int threads) {
  store(&pool.threads, threads < 1 ? 1 : threads < kMost ? threads : kMost);
}

// The first number in a file, and the second if one is asked for; 0 for what is not there, or no number.
static void numbers(const char* folder, const char* path, const char* file, long* one, long* two) {
  char name[4200];
  FILE* opened = NULL;
  *one = 0;
  if (two != NULL) *two = 0;
  if ((size_t)snprintf(name, sizeof name, "%s%s/%s", folder, path, file) < sizeof name) opened = fopen(name, "re");
  if (opened == NULL) return;
  if (fscanf(opened, "%ld", one) == 1 && two != NULL && fscanf(opened, "%ld", two) != 1) *two = 0;
  fclose(opened);
}

// Processors that control groups leave a process, as in a container with a limit; kMost if they do not say. Of each
// group up to the root the quota is the time of all processors in a period: cpu.max has both (Linux, cgroup-v2,
// "CPU Interface Files"), in the first version they are files of their own (sched-bwc). Rounded up.
static int granted(void) {
  long least = kMost;
  char line[4200];
  FILE* groups = fopen(SYSTEM "/proc/self/cgroup", "re");
  if (groups == NULL) return kMost;
  while (fgets(line, sizeof line, groups) != NULL) {  // number:controllers:path, where version 2 has no controllers
    char *controllers = strchr(line, ':'), *path = controllers ? strchr(controllers + 1, ':') : NULL;
    if (path == NULL) continue;
    *path++ = *controllers++ = 0;
    path[strcspn(path, "\n")] = 0;
    char* rest = NULL;
    char* controller = strtok_r(controllers, ",", &rest);
    const int second = controller == NULL;
    while (controller != NULL && strcmp(controller, "cpu") != 0) controller = strtok_r(NULL, ",", &rest);
    if (!second && controller == NULL) continue;
    for (char* end = path + strlen(path); end != NULL; end = strrchr(path, '/')) {
      *end = 0;
      long quota, period;
      if (second) {
        numbers(SYSTEM "/sys/fs/cgroup", path, "cpu.max", &quota, &period);
      } else {
        numbers(SYSTEM "/sys/fs/cgroup/cpu", path, "cpu.cfs_quota_us", &quota, NULL);
        numbers(SYSTEM "/sys/fs/cgroup/cpu", path, "cpu.cfs_period_us", &period, NULL);
      }
      if (quota > 0 && period > 0 && (quota + period - 1) / period < least) least = (quota + period - 1) / period;
    }
  }
  fclose(groups);
  return (int)least;
}

// TVM_NUM_THREADS, else OMP_NUM_THREADS, else one for each processor that the process may use and is granted.
__attribute__((visibility("default"))) int netlathe_threads(void) {
  if (load(&pool.threads) == 0) {
    const char *tvm = getenv("TVM_NUM_THREADS"), *omp = getenv("OMP_NUM_THREADS");
    int threads = tvm ? atoi(tvm) : 0;
    if (threads < 1) threads = omp ? atoi(omp) : 0;
    cpu_set_t processors;
    if (threads < 1 && sched_getaffinity(0, sizeof processors, &processors) == 0) {
      const int most = granted();
      threads = CPU_COUNT(&processors) < most ? CPU_COUNT(&processors) : most;
    }
    netlathe_set_threads(threads);
  }
  return load(&pool.threads);
}

static int launch(Task task, void* data, int tasks) {
  const int shares = netlathe_threads();
  Job* job = NULL;
  for (int i = 0; shares > 1 && i < kJobs && job == NULL; ++i)
    if (!__atomic_exchange_n(&pool.jobs[i].taken, 1, __ATOMIC_ACQUIRE)) job = &pool.jobs[i];
  if (job == NULL) {
    Environment alone = {NULL, tasks > 0 ? tasks : 1};
    for (int i = 0; i < alone.tasks; ++i)
      if (task(i, &alone, data) != 0) return -1;
    return 0;
  }
  start(shares - 1);
  if (tasks <= 0) tasks = shares * kTasks;
  const uint32_t number = job->number + 1;
  for (int i = 0; i < shares; ++i)
    store(&job->share[i].next, (uint64_t)number << 32 | (uint32_t)first(i, tasks, shares));
  store(&job->task, task);
  store(&job->data, data);
  store(&job->tasks, tasks);
  store(&job->shares, shares);
  store(&job->waiting, 0);
  store(&job->failed, 0);
  store(&job->error, NULL);
  store(&job->left, (uint32_t)tasks);
  store(&job->number, number);
  __atomic_add_fetch(&pool.news, 1, __ATOMIC_SEQ_CST);
  if (__atomic_load_n(&pool.asleep, __ATOMIC_SEQ_CST) > 0) futex(&pool.news, FUTEX_WAKE, kMost);
  help(job, 0);
  for (uint32_t left; (left = load(&job->left)) != 0;)
    if (!spin(&job->left, left)) {
      __atomic_store_n(&job->waiting, 1, __ATOMIC_SEQ_CST);
      futex(&job->left, FUTEX_WAIT, left);
    }
  const int failed = load(&job->failed);
  void* error = load(&job->error);
  store(&job->taken, 0);
  if (error != NULL) {  // it was raised in the thread of the task
    TVMFFIErrorSetRaised(error);
    TVMFFIObjectDecRef(error);
  }
  return -failed;
}

// Kernels call what this holds. TVM's runtime, when it loads a library, would set it to its own pool if it found the
// name: so it is hidden.
__attribute__((visibility("hidden"))) int (*__TVMBackendParallelLaunch)(Task, void*, int) = launch;
