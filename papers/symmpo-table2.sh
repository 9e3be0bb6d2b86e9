# SymMPO, Table 2: each term helps; but w/o Pair has the lower Resp., w/o Margin the higher aAcc, w/o AncPO the higher MMStar.
. "$(dirname "$0")/rows.sh"
measure hallusionbench objhal mmhal amber mmstar
row SymMPO --objective symmpo
row no-Pair --objective symmpo --lam 0
row no-Margin --objective symmpo --gamma 0
row no-AncPO --objective symmpo --eta 0
finish
