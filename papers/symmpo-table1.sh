# SymMPO, Table 1: SymMPO is best on most columns, and second to DPO on Object-HalBench.
. "$(dirname "$0")/rows.sh"
measure hallusionbench objhal mmhal amber mmstar
row base
row DPO --objective dpo
row mDPO --objective mdpo
row SymMPO --objective symmpo
finish
