# On the tiny world: where does preference beat imitation? Chosen responses with more and more wrong in them.
tiny_only=yes
. "$(dirname "$0")/rows.sh"
measure amber-captions amber-sampled
row base
for error in 0 0.1 0.4; do
    records "$bundled" # their captioner's is 0.1
    [ "$error" = 0.1 ] || tiny_records "error-$error" --error "$error" --number 600
    row "SFT @ $error" --objective sft
    row "DPO @ $error" --objective dpo
    row "mDPO @ $error" --objective mdpo
    row "SymMPO @ $error" --objective symmpo
done
finish
