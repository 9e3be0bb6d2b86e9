# On the tiny world: each term of SymMPO alone beside DPO, and left out; Margin also at a hundred times its weight.
tiny_only=yes
. "$(dirname "$0")/rows.sh"
measure amber-captions amber-sampled
row base
row DPO --objective dpo
row DPO+Pair --objective symmpo --gamma 0 --eta 0
row DPO+Margin --objective symmpo --lam 0 --eta 0 --gamma 0.01
row DPO+AncPO --objective symmpo --lam 0 --gamma 0
row no-Pair --objective symmpo --lam 0
row no-Margin --objective symmpo --gamma 0
row no-AncPO --objective symmpo --eta 0
row SymMPO --objective symmpo
row SymMPO-strong-Margin --objective symmpo --gamma 0.01
finish
