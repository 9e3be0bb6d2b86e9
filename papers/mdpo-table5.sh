# mDPO, Table 5 (on Bunny): MMHal by question type; mDPO gains most on questions with a false premise. Needs --judge-url.
. "$(dirname "$0")/rows.sh"
paper=bunny-types recipe=(--epochs 3 --batch-size 32 --lr 1e-5 --warmup 0.1 --lora-r 64 --lora-alpha 128)
measure mmhal
[ -n "$model" ] || measure amber # the tiny world has no judge
row base
row DPO --objective dpo
row mDPO --objective mdpo
finish
