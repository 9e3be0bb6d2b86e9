# mDPO, Table 1: mDPO hallucinates less than DPO on all three benchmarks.
. "$(dirname "$0")/rows.sh"
recipe=(--epochs 3 --batch-size 32 --lr 1e-5 --warmup 0.1 --lora-r 64 --lora-alpha 128)
measure objhal mmhal amber-captions
row base
row DPO --objective dpo
row mDPO --objective mdpo
finish
