"""The C of a program without a runtime: its header, its entry point, and a main program.

``NAME_run`` never traps on a core that lacks an instruction: it asks the kernel first, and is itself compiled
for any aarch64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from netlathe.backends.tvm import runtime
from netlathe.backends.tvm.arm.plan import Place, Program

MAGIC = b"netlathe"
HEADER = 64  # bytes before the first weight: MAGIC, the SHA-256 of what follows, zeros

_C_TYPES: Mapping[str, str] = {
    "float32": "float",
    "float64": "double",
    "float16": "uint16_t",
    "bool": "uint8_t",
    **{f"{sign}int{bits}": f"{sign}int{bits}_t" for sign in ("", "u") for bits in (8, 16, 32, 64)},
}


@dataclass(frozen=True)
class Tensor:
    """An input or output: its name in C, its name in the model, dtype in memory, sizes."""

    c_name: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int

    @property
    def c_type(self) -> str:
        """Of an element."""
        return _C_TYPES[self.dtype]

    @property
    def comment(self) -> str:
        """What a reader of the header wants to know."""
        sizes = ", ".join(map(str, self.shape))
        return f"/* {self.name}: {self.dtype}[{sizes}], {self.bytes} bytes */"


def tensors(records: Sequence[Mapping[str, Any]]) -> tuple[Tensor, ...]:
    """Records of ``meta.json``, whose shapes are numbers, with names that C takes."""
    made: list[Tensor] = []
    for record in records:
        stem = "".join(c if c.isalnum() and c.isascii() else "_" for c in record["name"])
        stem = f"t_{stem}" if not stem[:1].isalpha() or stem in _KEYWORDS else stem
        taken, name = {tensor.c_name for tensor in made}, stem
        while name in taken:
            name += "_"
        bytes_ = 1 if record["stored"] == "bool" else int(record["stored"].lstrip("uintfloa")) // 8
        for dim in record["shape"]:
            bytes_ *= dim
        shape = tuple(record["shape"])
        made.append(Tensor(name, record["name"], record["stored"], shape, bytes_))
    return tuple(made)


_KEYWORDS = frozenset(
    "auto break case char const continue default do double else enum extern float for goto if inline"
    " int long register restrict return short signed sizeof static struct switch typedef union"
    " unsigned void volatile while".split()
)


@dataclass(frozen=True)
class Source:
    """What the texts are made of. ``offsets`` says where each weight begins in the weights file."""

    name: str
    core: str
    features: tuple[str, ...]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    program: Program
    offsets: tuple[int, ...]
    weight_bytes: int
    digest: bytes

    def header(self) -> str:
        """``NAME.h``."""
        upper = self.name.upper()

        def fields(found: Sequence[Tensor], const: str) -> str:
            return "\n".join(f"  {const}{t.c_type} *{t.c_name}; {t.comment}" for t in found)

        return f"""\
/* {self.name} for {self.core}: call {self.name}_run. Link lib{self.name}.a and the C library (-lm). */
#ifndef {upper}_H
#define {upper}_H
#include <stddef.h>
#include <stdint.h>
#ifdef __cplusplus
extern "C" {{
#endif

#define {upper}_WEIGHT_BYTES {self.weight_bytes}
#define {upper}_ARENA_BYTES {max(self.program.arena, 1)}

typedef struct {{
{fields(self.inputs, "const ")}
}} {self.name}_inputs;

typedef struct {{
{fields(self.outputs, "")}
}} {self.name}_outputs;

/* The model once. NULL, or why it did not run: the CPU lacks features (they are named), or the weights
 * are not those of this library.
 *
 * weights: {self.name}.weights, mapped or read, at a multiple of 64 bytes; it is only read.
 * arena:   {upper}_ARENA_BYTES bytes at a multiple of 64, for what comes in between.
 *
 * Calls with different arenas may run at the same time. Nothing is allocated. */
const char *{self.name}_run(const void *weights, void *arena, const {self.name}_inputs *in,
                     const {self.name}_outputs *out);

#ifdef __cplusplus
}}
#endif
#endif
"""

    def entry(self) -> str:
        """``NAME.c``, which is compiled for any aarch64."""
        arities = {s.kernel: len(s.places) for s in self.program.steps if s.kernel}
        declared = "\n".join(
            f"extern int {kernel}({', '.join(['void *'] * count)});"
            for kernel, count in sorted(arities.items())
        )
        calls = "\n".join(
            self._call(step.kernel, step.places, step.size) for step in self.program.steps
        )
        magic = ", ".join(f"0x{byte:02x}" for byte in MAGIC + self.digest)
        tests = "\n".join(
            f'  {{{entry}, 1ul << {bit}, "{name}"}},'
            for name, (entry, bit) in ((f, runtime.HWCAPS[f]) for f in self.features)
        )
        return f"""\
#include "{self.name}.h"

#include <string.h>
#include <sys/auxv.h>

{declared}

static const unsigned char identity[] = {{{magic}}};

/* What the kernels use, as Linux tells it: entry of the auxiliary vector, bit, name. */
static const struct {{
  unsigned long entry, bit;
  const char *name;
}} features[] = {{
{tests}
}};

static const char *missing(void) {{
  static char message[256];
  char made[sizeof message] = "this CPU lacks";
  int lacks = 0;
  for (size_t i = 0; i < sizeof features / sizeof *features; ++i)
    if (!(getauxval(features[i].entry) & features[i].bit)) {{
      strcat(strcat(made, " "), features[i].name);
      lacks = 1;
    }}
  strcat(made, ", which {self.name} was built to use ({self.core})");
  return lacks ? memcpy(message, made, sizeof message) : NULL;
}}

const char *{self.name}_run(const void *weights, void *arena, const {self.name}_inputs *in,
                     const {self.name}_outputs *out) {{
  const char *lack = missing();
  if (lack) return lack;
  if ((uintptr_t)weights % 64 || (uintptr_t)arena % 64)
    return "weights and arena must lie at multiples of 64 bytes";
  if (memcmp(weights, identity, sizeof identity))
    return "these are not the weights that {self.name} was built with";
  char *w = (char *)weights, *a = (char *)arena;
  (void)w, (void)a, (void)in;
{calls}
  return NULL;
}}
"""

    def _call(self, kernel: str, places: Sequence[Place], size: int) -> str:
        arguments = ", ".join(map(self._place, places))
        if not kernel:
            return f"  memcpy({arguments}, {size});"
        return f"  {kernel}({arguments});"

    def _place(self, place: Place) -> str:
        match place.kind:
            case "input":
                return f"(void *)in->{self.inputs[place.index].c_name}"
            case "output":
                return f"out->{self.outputs[place.index].c_name}"
            case "weight":
                return f"w + {self.offsets[place.index]}"
        return f"a + {place.index}"

    def main(self) -> str:
        """``main.c``: the model as a program, files in and files out."""
        upper = self.name.upper()
        files = [*(t.c_name for t in self.inputs), *(t.c_name for t in self.outputs)]
        reads = "\n".join(
            f"  in.{t.c_name} = file(argv[{2 + i}], {t.bytes}, 0);"
            for i, t in enumerate(self.inputs)
        )
        first = 2 + len(self.inputs)
        maps = "\n".join(
            f"  out.{t.c_name} = file(argv[{first + i}], {t.bytes}, 1);"
            for i, t in enumerate(self.outputs)
        )
        return f"""\
/* Runs {self.name} once: {self.name} WEIGHTS {" ".join(files)}
 * Files hold nothing but the elements of a tensor; those of outputs are made. Exit code 2: it did not run.
 *
 *   aarch64-linux-gnu-gcc -static main.c lib{self.name}.a -lm -o {self.name}
 */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "{self.name}.h"

static _Alignas(64) char arena[{upper}_ARENA_BYTES];

/* A file of so many bytes in memory; what is written there is in the file. */
static void *file(const char *path, size_t bytes, int make) {{
  int handle = open(path, make ? O_RDWR | O_CREAT | O_TRUNC : O_RDONLY, 0644);
  struct stat found;
  if (handle < 0 || (make && ftruncate(handle, (off_t)bytes)) || fstat(handle, &found)) {{
    perror(path);
    exit(2);
  }}
  if ((size_t)found.st_size != bytes) {{
    fprintf(stderr, "%s has %lld bytes, not %zu\\n", path, (long long)found.st_size, bytes);
    exit(2);
  }}
  if (!bytes) return arena;
  int access = make ? PROT_READ | PROT_WRITE : PROT_READ;
  void *start = mmap(NULL, bytes, access, MAP_SHARED, handle, 0);
  close(handle);
  if (start == MAP_FAILED) {{
    perror(path);
    exit(2);
  }}
  return start;
}}

int main(int argc, char **argv) {{
  if (argc != {2 + len(files)}) {{
    fprintf(stderr, "usage: %s WEIGHTS {" ".join(files)}\\n", argv[0]);
    return 2;
  }}
  {self.name}_inputs in;
  {self.name}_outputs out;
  const void *weights = file(argv[1], {upper}_WEIGHT_BYTES, 0);
{reads}
{maps}
  const char *error = {self.name}_run(weights, arena, &in, &out);
  if (error) fprintf(stderr, "%s\\n", error);
  return error ? 2 : 0;
}}
"""
