# SymMPO, Figures 5 to 7: records, and answers before and after, as pages with what is wrong in red.
. "$(dirname "$0")/rows.sh"
seeds=1
measure mmhal objhal
[ -n "$model" ] || measure amber-captions
row base
before=$folder
row SymMPO --objective symmpo
run "$out/records.html" -m construct.review "${data:-$bundled}" --out "$out/records.html"
for benchmark in "${measured[@]}"; do
    folders=("$before/$benchmark" "$folder/$benchmark")
    [ -n "$dry" ] || [ -e "${folders[0]}" ] || continue
    run "$out/$benchmark.html" evaluate.py page "${folders[@]/%//answers.jsonl}" \
        --data "$benchmarks/${benchmark%-*}" --out "$out/$benchmark.html"
done
finish
