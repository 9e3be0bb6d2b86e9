# Does this evaluation give the published numbers of a published model? (--data: any file, nothing is trained)
. "$(dirname "$0")/rows.sh"
measure hallusionbench objhal mmhal amber mmstar
row base
finish
