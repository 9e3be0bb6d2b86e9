# mDPO, Table 2 (on Bunny): the conditional term (CoPO) and the anchor both help, the conditional term more.
. "$(dirname "$0")/rows.sh"
paper=bunny recipe=(--epochs 3 --batch-size 32 --lr 1e-5 --warmup 0.1 --lora-r 64 --lora-alpha 128)
measure objhal mmhal amber-captions
row mDPO --objective mdpo
row no-conditional --objective mdpo --lam 0
row no-anchor --objective mdpo --eta 0
row neither --objective dpo
finish
