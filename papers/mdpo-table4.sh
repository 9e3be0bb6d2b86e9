# mDPO, Table 4 (on Bunny): an anchor on y_w alone is enough; more anchors do not clearly help.
. "$(dirname "$0")/rows.sh"
paper=bunny recipe=(--epochs 3 --batch-size 32 --lr 1e-5 --warmup 0.1 --lora-r 64 --lora-alpha 128)
measure objhal mmhal amber-captions
row y_w --objective mdpo
row y_w,y_l --objective mdpo --anchors yw,yl
row y_w,y_l,m_l --objective mdpo --anchors yw,yl,ml
finish
