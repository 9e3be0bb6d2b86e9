# What the tables share. A table says `measure BENCHMARKS`, then `row LABEL OPTIONS-OF-TRAIN.PY` for
# each row (without options: the base model), then `finish`. What is finished is not run again, so a
# killed table goes on; until then results.md says that it is unfinished. On the tiny world two tables
# that have a row in common train it once.
#
# "LABEL @ X" is a point of LABEL's line in the figure. Between rows a table may choose other records:
# `first N`, `contrast KIND`, `records FILE`, `tiny_records NAME OPTIONS`.
#
# On the tiny world each choice of options has the same three learning rates, tried on the bundled
# records with one seed and judged on validation scenes; other seeds see the test scenes. At full size a rate is --lr, the table's recipe, or train.py's own.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
name=$(basename "$0" .sh)
model="" data="" benchmarks="$root/tiny/built" seeds="" out="" lr="" paper="7b" judge=() dry=""
given=("$@")
while [ $# -gt 0 ]; do
    case $1 in
        --model | --data | --benchmarks | --seeds | --out | --lr | --paper)
            printf -v "${1#--}" %s "${2:?$1 needs a value}"
            shift 2
            ;;
        --judge-url | --judge-model) judge+=("$1" "${2:?$1 needs a value}") && shift 2 ;;
        --dry-run) dry=yes && shift ;;
        *)
            echo "error: $1: the options are --model --data --benchmarks --seeds --out --lr --paper" \
                "--judge-url --judge-model --dry-run" >&2
            exit 2
            ;;
    esac
done
stop() { echo "error: $*" >&2 && exit 2; }
if [ -n "$model" ] && { [ -z "$data${untrained:-}" ] || [ "$benchmarks" = "$root/tiny/built" ]; }; then
    stop "--model goes with --data FILE and --benchmarks DIR (a folder for each benchmark)"
fi
[ -z "$model" ] || [ -z "${tiny_only:-}" ] || stop "$name is about the tiny world; leave --model out"
seeds=${seeds:-3} out=${out:-runs/papers/$name} recipe=() trained=0 hours=0
mkdir -p "$out"

# The tiny world's records and options, which are those of tiny/options.json.
tiny=(--model "$root/tiny/built/model" --steps 60 --batch-size 8 --micro-batch 8 --lora-r 16)
tiny+=(--lora-alpha 32 --warmup 0.1)
bundled="$root/tiny/built/prefs.jsonl"
chosen=(--data "${data:-$bundled}")

first() { # N: the first records of the file
    local from=${data:-$bundled} to=$out/data/first-$1.jsonl
    [[ $from == *.jsonl && -f $from ]] || [ -n "$dry" ] || stop "$from: one file of JSON lines is needed"
    if [ -f "$from" ] && [ "$(wc -l <"$from")" = "$1" ]; then
        chosen=(--data "$from")
        return
    fi
    chosen=(--data "$to" --image-root "$(dirname "$from")")
    [ -z "$dry" ] || return 0
    mkdir -p "$out/data" && head -n "$1" "$from" >"$to"
    [ "$(wc -l <"$to")" = "$1" ] || stop "$from has fewer than $1 records"
}

contrast() { # KIND: with contrast images of another kind, made from the images themselves
    local to=$out/data/$1.jsonl
    run "$to" -m construct.contrast "${data:-$bundled}" --kind "$1" --out "$to" --allow-outside
    chosen=(--data "$to" --allow-outside)
}

records() { chosen=(--data "$1"); }

tiny_records() { # NAME OPTIONS-OF-TINY.RECORDS
    local folder=$out/data/$1 && shift
    run "$folder/prefs.jsonl" -m tiny.records --out "$folder" "$@"
    records "$folder/prefs.jsonl"
}

measure() { measured=("$@"); }

run() { # FILE COMMAND...: run the command unless it has made its file
    local file=$1 log=$out/log.txt words && shift
    [ -e "$file" ] && return
    printf -v words ' %q' "$@"
    echo "python$words" # in one piece: other tables print beside it
    [ -n "$dry" ] && return
    [ "$1" = -m ] || set -- "$root/$1" "${@:2}"
    PYTHONPATH=$root python "$@" >>"$log" 2>&1 && [ -e "$file" ] && return
    echo "error: it failed, the end of $log says why; the same command goes on from here" >&2
    exit 1
}

alone() { # FOLDER: waits while another table trains or evaluates the same row
    [ -z "$dry" ] && command -v flock >/dev/null || return 0
    mkdir -p "$1" && exec 9>"$1.lock" && flock 9
}

train() { # FOLDER OPTIONS...: sets adapter
    local folder=$1 again=() basis=("${tiny[@]}") && shift
    [ -z "$model" ] || basis=(--model "$model")
    [ -e "$folder/metrics.jsonl" ] && again=(--resume)
    run "$folder/curves.png" train.py "${basis[@]}" "${chosen[@]}" "$@" --out "$folder" "${again[@]}"
    adapter=(--adapter "$(ls -d "$folder"/checkpoint-* 2>/dev/null || echo "$folder/checkpoint-N")")
    trained=$((trained + 1))
}

evaluate() { # FOLDER BENCHMARK DATA OPTIONS...
    run "$1/metrics.json" evaluate.py run ${model:+--model "$model"} "${adapter[@]}" \
        --benchmark "$2" --data "$3" --out "$1" "${@:4}"
}

# On the bundled records a choice of options has the same folders for every table.
shared() { # RATE SEED OPTIONS...
    local rate=$1 seed=$2 options && shift 2
    options=${*//[ -]/}
    echo "$(dirname "$out")/rows/${options// /-}${rate:+-lr-$rate}-$seed"
}

best_rate() { # OPTIONS...: sets rate, on the validation scenes of the tiny world
    local folder best=-1 score chosen=(--data "$bundled")
    for try in 1e-4 3e-4 1e-3; do
        folder=$(shared "$try" 100 "$@")
        alone "$folder"
        train "$folder" "$@" --seed 100 --lr "$try"
        evaluate "$folder/amber" amber "$benchmarks/amber_val" --dimension g
        [ -n "$dry" ] && rate=BEST && continue
        # Fewest false objects, among those that keep four fifths of the base model's coverage (83.5).
        score=$(python -c "import json, sys
found = json.load(open(sys.argv[1]))['metrics']['generative']
print(round(1000 - 10 * found['CHAIR']) if found['Cover'] > 66.8 else 0)" "$folder/amber/metrics.json")
        if [ "$score" -gt "$best" ]; then
            best=$score rate=$try
        fi
    done
}

row() { # LABEL OPTIONS-OF-TRAIN.PY...: sets folder
    local label=$1 rate=$lr last=$seeds adapter=() && shift
    if [ $# = 0 ]; then
        last=1
    elif [ -n "$model" ]; then
        set -- "${recipe[@]}" "$@"
    else
        best_rate "$@"
    fi
    for seed in $(seq 0 $((last - 1))); do
        folder=$out/$label${rate:+-lr-$rate}-$seed
        folder=${folder// /}
        exec 9>&- # this one waits for nobody
        if [ -z "$model" ] && { [ $# = 0 ] || [ "${chosen[*]}" = "--data $bundled" ]; }; then
            folder=$(shared "$rate" "$seed" "${@:-base}")
            alone "$folder"
        fi
        [ $# = 0 ] || train "$folder" "$@" --seed "$seed" ${rate:+--lr "$rate"}
        for benchmark in "${measured[@]}"; do
            local title="$label${rate:+, lr $rate}" options=("${judge[@]}")
            case $benchmark in
                mmhal) [ ${#judge[@]} -gt 0 ] || continue ;; # it has no reading without a judge
                amber | mmstar) options=() ;;
                amber-captions) options=(--dimension g) ;;
                amber-sampled) options=(--dimension g --temperature 1) title="$title, sampled" ;;
            esac
            local data_of="$benchmarks/${benchmark%-*}"
            [ -d "$data_of" ] || continue # the table has no such columns
            evaluate "$folder/$benchmark" "${benchmark%-*}" "$data_of" "${options[@]}" --row "$title"
            printf '%s\t%s\n' "$title" "$folder/$benchmark/metrics.json" >>"$out/rows.part"
        done
    done
    show unfinished
}

show() { # STATE: results.json, results.md and the figure of the rows so far
    [ -n "$dry" ] || [ ! -e "$out/rows.part" ] ||
        PYTHONPATH=$root python -m papers.collect "$out" "$name" "$1" "$paper" "${given[*]}"
}

finish() {
    show finished
    [ -n "$dry" ] && [ -n "$model" ] && [ "$trained" -gt 0 ] || return 0
    # By FLOPs: a SymMPO record of 7B, 51 TFLOP with the reference cached, at 40 % of an H100's peak.
    python - "$trained" "${data:-}" "${recipe[*]}" <<'PYTHON'
import sys
trained, data, recipe = int(sys.argv[1]), sys.argv[2], sys.argv[3].split()
try:
    records = sum(1 for _ in open(data, "rb"))
except OSError:
    records = 20_000
epochs = float(recipe[recipe.index("--epochs") + 1]) if "--epochs" in recipe else 2
hours = trained * records * epochs * 51e12 / (0.4 * 989e12) / 3600
print(f"# about {hours:.0f} GPU hours at most for {trained} trainings of 7B on {records:,} records "
      f"x {epochs:g} epochs: computed, not measured, evaluation not counted")
PYTHON
}
rm -f "$out/rows.part"
