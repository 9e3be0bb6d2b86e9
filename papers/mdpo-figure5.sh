# mDPO, Figure 5 (on Bunny): with more records mDPO improves and DPO does not.
. "$(dirname "$0")/rows.sh"
recipe=(--epochs 3 --batch-size 32 --lr 1e-5 --warmup 0.1 --lora-r 64 --lora-alpha 128)
measure mmhal objhal amber-captions amber-sampled
[ -n "$model" ] || measure amber-captions amber-sampled
sizes=(25 75 250 777)
[ -z "$model" ] || sizes=(1000 2500 5000 10000)
row base
for size in "${sizes[@]}"; do
    first "$size"
    row "SFT @ $size" --objective sft
    row "DPO @ $size" --objective dpo
    row "mDPO @ $size" --objective mdpo
    row "SymMPO @ $size" --objective symmpo
done
finish
