# mDPO, Table 3 (on Bunny): of four kinds of rejected image, a crop that keeps less than a fifth is the best.
. "$(dirname "$0")/rows.sh"
paper=bunny recipe=(--epochs 3 --batch-size 32 --lr 1e-5 --warmup 0.1 --lora-r 64 --lora-alpha 128)
measure objhal mmhal amber-captions
row base
for kind in random crop crop-large moco; do
    contrast "$kind"
    row "$kind" --objective mdpo
done
finish
