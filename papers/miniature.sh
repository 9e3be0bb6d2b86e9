# SymMPO's Table 1 on the tiny world, with SFT, and captions at temperature 1.
. "$(dirname "$0")/rows.sh"
measure hallusionbench objhal amber amber-sampled mmstar
row base
row SFT --objective sft
row DPO --objective dpo
row mDPO --objective mdpo
row SymMPO --objective symmpo
finish
