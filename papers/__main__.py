"""Tables of the papers by their names: each is a short shell script of the commands to type.

    python -m papers                                   lists them
    python -m papers symmpo-table2                     on the tiny world, three seeds
    python -m papers symmpo-table2 --model llava-hf/llava-1.5-7b-hf --data prefs.jsonl \\
        --benchmarks DIR                               at full size; DIR has a folder a benchmark
    ... --dry-run                                      prints the commands alone

Other options: --seeds, --lr, --out, --paper, --judge-url, --judge-model; see rows.sh.
"""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
TABLES = {path.stem: path for path in sorted(HERE.glob("*.sh")) if path.stem != "rows"}


def main(argv=None):
    name, *options = (sys.argv[1:] if argv is None else argv) or [""]
    if name not in TABLES:
        print(__doc__)
        for table, path in TABLES.items():
            print(f"{table:20}{path.read_text(encoding='utf-8').splitlines()[0][1:]}")
        sys.exit(0 if name in ("", "--help") else 2)
    sys.exit(subprocess.run(["bash", TABLES[name], *options]).returncode)


if __name__ == "__main__":
    main()
