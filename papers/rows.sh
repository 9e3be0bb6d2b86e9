# What the tables share. A table says `measure BENCHMARKS`, then `row LABEL OPTIONS-OF-TRAIN.PY` for
# each row (without options: the base model), then `finish`. What is finished is not run again, so a
# killed table goes on. On the tiny world each row has the same four learning rates, tried with one
# seed and judged on validation scenes by the mean of coverage and 100 - CHAIR; other seeds see the
# test scenes. At full size a row's rate is --lr, the table's recipe, or train.py's own.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
name=$(basename "$0" .sh)
model="" data="" benchmarks="$root/tiny/built" seeds="" out="" lr="" paper="7b" judge=() dry=""
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
if [ -n "$model" ] && { [ -z "$data${untrained:-}" ] || [ "$benchmarks" = "$root/tiny/built" ]; }; then
    echo "error: --model goes with --data FILE and --benchmarks DIR (a folder for each benchmark)" >&2
    exit 2
fi
seeds=${seeds:-3} out=${out:-runs/papers/$name} metrics=() recipe=()
mkdir -p "$out"

measure() { measured=("$@"); }

run() { # FILE COMMAND...: run the command unless it has made its file
    local file=$1 log=$out/log.txt && shift
    [ -e "$file" ] && return
    printf 'python' && printf ' %q' "$@" && echo
    [ -n "$dry" ] && return
    python "$root/$1" "${@:2}" >>"$log" 2>&1 && [ -e "$file" ] && return
    echo "error: it failed, the end of $log says why; the same command goes on from here" >&2
    exit 1
}

train() { # FOLDER OPTIONS...: sets adapter
    local folder=$1 again=() && shift
    [ -e "$folder/metrics.jsonl" ] && again=(--resume)
    run "$folder/curves.png" train.py ${model:+--model "$model" --data "$data"} "$@" --out "$folder" "${again[@]}"
    adapter=(--adapter "$(ls -d "$folder"/checkpoint-* 2>/dev/null || echo "$folder/checkpoint-N")")
}

evaluate() { # FOLDER BENCHMARK DATA OPTIONS...
    run "$1/metrics.json" evaluate.py run ${model:+--model "$model"} "${adapter[@]}" \
        --benchmark "$2" --data "$3" --out "$1" "${@:4}"
}

best_rate() { # LABEL OPTIONS...: sets rate, on the validation scenes of the tiny world
    local label=$1 best=-1 score && shift
    for try in 1e-4 2e-4 5e-4 1e-3; do
        train "$out/tuning/$label-$try" "$@" --seed 100 --lr "$try"
        evaluate "$out/tuning/$label-$try/amber" amber "$benchmarks/amber_val" --dimension g
        [ -n "$dry" ] && rate=BEST && continue
        score=$(python -c "import json, sys
found = json.load(open(sys.argv[1]))['metrics']['generative']
print(round(500 + 5 * found['Cover'] - 5 * found['CHAIR']))" "$out/tuning/$label-$try/amber/metrics.json")
        if [ "$score" -gt "$best" ]; then
            best=$score rate=$try
        fi
    done
}

row() {
    local label=$1 rate=$lr last=$seeds adapter=() folder && shift
    if [ $# = 0 ]; then
        last=1
    elif [ -n "$model" ]; then
        set -- "${recipe[@]}" "$@"
    else
        best_rate "$label" "$@"
    fi
    for seed in $(seq 0 $((last - 1))); do
        folder=$out/$label-$seed
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
            metrics+=("$folder/$benchmark/metrics.json")
        done
    done
}

finish() {
    [ -n "$dry" ] || python "$root/evaluate.py" report "${metrics[@]}" --out "$out" --paper "$paper" ${untrained:+--differences}
}
