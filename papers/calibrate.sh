# Does this evaluation give the published numbers of a published model? With the differences.
untrained=yes
. "$(dirname "$0")/rows.sh"
measure hallusionbench objhal mmhal amber mmstar pope
row base
finish
