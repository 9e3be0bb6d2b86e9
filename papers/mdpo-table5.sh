# mDPO, Table 5: MMHal by question type; mDPO gains most on adversarial objects. At full size, with --judge-url.
. "$(dirname "$0")/rows.sh"
recipe=(--epochs 3 --batch-size 32 --lr 1e-5 --warmup 0.1 --lora-r 64 --lora-alpha 128)
measure mmhal-types
[ -n "$model" ] || measure amber-captions
row base
row DPO --objective dpo
row mDPO --objective mdpo
finish
