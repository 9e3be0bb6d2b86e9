# mDPO, Figure 1 (on Bunny): DPO without the images scores about as well on MMHal as DPO with them.
. "$(dirname "$0")/rows.sh"
recipe=(--epochs 3 --batch-size 32 --lr 1e-5 --warmup 0.1 --lora-r 64 --lora-alpha 128)
measure objhal mmhal amber-captions
row base
row DPO --objective dpo
row DPO-no-image --objective dpo-no-image
finish
