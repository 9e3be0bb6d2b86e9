"""A judge's replies: asked for, kept raw, and brought to the form that a scorer reads."""

from pathlib import Path
from string import Template

from benchmarks import BENCHMARKS, well_formed
from benchmarks.common import HERE, plain, read
from support.chat import ask_in_order
from support.files import write_lines


def judge(args):
    """judgements.jsonl of --out in answer order, without thinking and Markdown. Raw replies are on
    disk (judge_replies.jsonl) before."""
    benchmark = BENCHMARKS[args.benchmark]
    folder = Path(args.out)
    answers = read(folder / "answers.jsonl")
    prompt = Template((HERE / args.benchmark / "judge.txt").read_text(encoding="utf-8"))
    is_unasked = getattr(benchmark, "is_unasked", lambda row: False)
    requests = []
    with well_formed(args.benchmark, folder):
        for number, row in enumerate(answers):
            if not is_unasked(row):
                requests.append((number, prompt.substitute(row), None))
    texts = ask_in_order(
        requests,
        folder / "judge_replies.jsonl",
        base_url=args.judge_url,
        model=args.judge_model,
        desc="judging",
        check=lambda text: benchmark.check_reply(plain(text)),
        give_up=args.give_up,
        **{"temperature": 0, **args.request},
    )
    lines = []
    for number in range(len(answers)):
        text = plain(texts.get(number, "[]"))
        if text and args.protocol == "symmpo":
            text = benchmark.check_reply(text)
        lines.append({"text": text, "model": args.judge_model})
    write_lines(folder / "judgements.jsonl", lines)
