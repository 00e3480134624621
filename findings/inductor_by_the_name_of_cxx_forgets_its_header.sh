#!/usr/bin/env bash
# torch 2.13.0 on a CPU with GCC: CXX=c++, the name under which Debian and CMake's default call the same g++, makes torch.compile's kernels
# take a multiple of the time to compile. Inductor compiles its large C++ header in advance, and decides by the compiler's *name* whether to
# write that as GCC's .gch or clang's .pch; "c++" counts as neither gcc nor g++ (nor gnu-c++), so it is a .pch, which GCC
# never looks for. Nothing says so: results are right, and every kernel parses the header anew. Seen: 1.2 s a kernel with CXX=g++, 4.2 s
# with CXX=c++. Exits 1 if that changes. Needs g++, and c++ to be it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
unset TORCHINDUCTOR_CACHE_DIR
if c++ --version | head -1 | grep -q clang; then
  echo "c++ is clang here: nothing to see" >&2
  exit 2
fi
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy setuptools
cat > "$folder/check.py" <<'PY'
import statistics
import sys
import time

import torch


def seconds(number):
    torch._dynamo.reset()
    x = torch.randn(64, 64)
    started = time.perf_counter()
    torch.compile(lambda x: torch.sin(x + number) * number)(x)
    return time.perf_counter() - started


seconds(1.5)  # what happens once, the header among it
print(statistics.median(seconds(2.5 + i) for i in range(5)))
PY
for name in g++ c++; do
  mkdir "$folder/$name"
  spent=$(CXX=$name TMPDIR="$folder/$name" "$folder/venv/bin/python" "$folder/check.py")
  kinds=$(find "$folder/$name" -name '*.gch' -o -name '*.pch' | sed 's/.*\.//' | sort -u | tr '\n' ' ')
  echo "CXX=$name: header as $kinds, a kernel in $spent s"
  echo "$kinds $spent" > "$folder/$name.txt"
done
"$folder/venv/bin/python" - "$folder" <<'PY'
import sys

(one, fast), (other, slow) = (open(f"{sys.argv[1]}/{name}.txt").read().split() for name in ("g++", "c++"))
sys.exit(not (one == "gch" and other == "pch" and float(slow) > 1.5 * float(fast)))
PY
