// Runs the core: feeds instructions, answers as memory does, and notes what happens in which cycle.
// Usage: simulation IN OUT [WAVES.vcd]; both files hold 64-bit words (see netlathe/backends/fpga/simulate.py).
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "Vcore.h"
#include "verilated.h"
#if VM_TRACE
#include "verilated_vcd_c.h"
#endif

using Words = std::vector<uint64_t>;

static Words read_words(FILE* file) {
  uint64_t count = 0;
  if (fread(&count, 8, 1, file) != 1) exit(3);
  Words words(count);
  if (count && fread(words.data(), 8, count, file) != count) exit(3);
  return words;
}

static void write_words(FILE* file, const Words& words) {
  const uint64_t count = words.size();
  fwrite(&count, 8, 1, file);
  fwrite(words.data(), 8, count, file);
}

// Every beat slot of a cycle: n of d cycles, evenly spread; or, with a seed, at random.
struct Slots {
  uint64_t n, d, random;
  bool open(uint64_t cycle) {
    if (random) {
      random ^= random << 13, random ^= random >> 7, random ^= random << 17;
      return random & 1;
    }
    return (cycle + 1) * n / d > cycle * n / d;
  }
};

template <class Port>
static void put(Port& port, const uint64_t* words, int count) {
  for (int i = 0; i < 2 * count; ++i) port[i] = uint32_t(words[i / 2] >> (32 * (i % 2)));
}
static void put(QData& port, const uint64_t* words, int) { port = words[0]; }
template <class Port>
static void get(const Port& port, uint64_t* words, int count) {
  for (int i = 0; i < count; ++i) words[i] = port[2 * i] | uint64_t(port[2 * i + 1]) << 32;
}
static void get(const QData& port, uint64_t* words, int) { words[0] = port; }

int main(int argc, char** argv) {
  if (argc < 3) return 2;
  FILE* file = fopen(argv[1], "rb");
  if (!file) return 2;
  const Words setup = read_words(file), program = read_words(file);
  Words memory = read_words(file);
  fclose(file);
  const uint64_t latency = setup[0], limit = setup[5];
  Slots reads{setup[1], setup[2], setup[6]}, writes{setup[3], setup[4], setup[7]};
  const int beat = int(setup[8]);  // words

  auto core = std::make_unique<Vcore>();
#if VM_TRACE
  Verilated::traceEverOn(true);
  VerilatedVcdC waves;
  if (argc > 3) core->trace(&waves, 99), waves.open(argv[3]);
#endif
  core->clk = 0, core->rst = 1, core->eval();
  core->clk = 1, core->eval();
  core->clk = 0, core->rst = 0, core->eval();

  std::deque<std::pair<uint64_t, uint64_t>> coming;  // when, address
  Words dispatched, asked, sent;
  uint64_t cycle = 0, next = 0, quiet = 0;
  for (; cycle < limit && quiet < 2; ++cycle) {
    const bool offer = next < program.size() / 4;
    core->instruction_valid = offer;
    if (offer) put(core->instruction, &program[4 * next], 4);
    core->read_ready = reads.open(cycle);
    core->write_ready = writes.open(cycle);
    const bool here = !coming.empty() && coming.front().first <= cycle;
    core->beat_valid = here;
    if (here) put(core->beat, &memory.at(coming.front().second * beat), beat);
    core->eval();
    if (offer && core->instruction_ready) dispatched.push_back(cycle), ++next;
    if (core->read_valid && core->read_ready) {
      asked.push_back(cycle);
      coming.emplace_back(cycle + latency, core->read_address);
    }
    if (here && core->beat_ready) coming.pop_front();
    if (core->write_valid && core->write_ready) {
      sent.push_back(cycle);
      if ((uint64_t(core->write_address) + 1) * beat > memory.size()) return 4;
      get(core->write_beat, &memory[uint64_t(core->write_address) * beat], beat);
    }
    quiet = core->idle && coming.empty() ? quiet + 1 : 0;
#if VM_TRACE
    if (argc > 3) waves.dump(2 * cycle);
#endif
    core->clk = 1, core->eval();
#if VM_TRACE
    if (argc > 3) waves.dump(2 * cycle + 1);
#endif
    core->clk = 0, core->eval();
  }
#if VM_TRACE
  if (argc > 3) waves.close();
#endif
  file = fopen(argv[2], "wb");
  if (!file) return 2;
  for (const Words* words : {&memory, &dispatched, &asked, &sent}) write_words(file, *words);
  write_words(file, Words{cycle});
  fclose(file);
  return quiet < 2 ? 5 : 0;
}
