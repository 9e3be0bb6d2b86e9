# Every table and figure on the tiny world, two at a time, in runs/papers; rows in common are trained once.
case " $* " in
    *" --model "* | *" --out "*)
        echo "error: --model, --out: a table at a time takes them; this is all of them, on the tiny world" >&2
        exit 2
        ;;
esac
export OMP_NUM_THREADS=1
cd "$(dirname "$0")/.."
printf '%s\n' mdpo-figure5 tiny-terms tiny-errors symmpo-figure4 miniature mdpo-table3 mdpo-table4 \
    symmpo-table2 mdpo-table2 mdpo-figure1 mdpo-table1 mdpo-table5 symmpo-table1 symmpo-figures5-7 |
    xargs -P 2 -I{} bash papers/{}.sh "$@"
