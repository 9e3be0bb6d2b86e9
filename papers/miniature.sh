# Tables 1 and 2 of SymMPO on the tiny world, with SFT, DPO with an anchor, and captions at temperature 1.
. "$(dirname "$0")/rows.sh"
measure hallusionbench objhal amber amber-sampled mmstar
row base
row SFT --objective sft
row DPO --objective dpo
row DPO+AncPO --objective dpo --eta 1
row mDPO --objective mdpo
row SymMPO --objective symmpo
row no-Pair --objective symmpo --lam 0
row no-Margin --objective symmpo --gamma 0
row no-AncPO --objective symmpo --eta 0
finish
