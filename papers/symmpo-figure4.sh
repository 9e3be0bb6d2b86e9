# SymMPO, Figure 4: kinds of contrast image, for SymMPO and mDPO. At full size --data is a folder with KIND.jsonl.
. "$(dirname "$0")/rows.sh"
measure hallusionbench mmhal amber-captions amber-sampled amber
[ -n "$model" ] || measure amber-captions amber-sampled
kinds=(edit crop black neighbour noise)
[ -z "$model" ] || kinds=(similar synthetic crop noise black)
row base
for kind in "${kinds[@]}"; do
    if [ -n "$model" ]; then
        records "$data/$kind.jsonl"
    else
        tiny_records "$kind" --kinds "$kind" --captions --number 240
    fi
    row "mDPO @ $kind" --objective mdpo
    row "SymMPO @ $kind" --objective symmpo
done
finish
