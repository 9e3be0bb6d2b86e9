"""A judge's replies: asked for, kept raw, and brought to the form that a scorer reads."""

from string import Template

from benchmarks import BENCHMARKS
from benchmarks.common import HERE, plain, read
from support.chat import ask_in_order
from support.cli import UserError
from support.files import write_lines


def judge(args, folder):
    """judgements.jsonl in answer order, without thinking and Markdown. Raw replies are on disk
    (judge_replies.jsonl) before."""
    benchmark, answers = BENCHMARKS[args.benchmark], read(folder / "answers.jsonl")
    prompt = Template((HERE / args.benchmark / "judge.txt").read_text(encoding="utf-8"))
    asked = {}
    for number, row in enumerate(answers):
        try:
            messages = benchmark.judge_messages(prompt, row)
        except KeyError as error:
            raise UserError(f"{folder}/answers.jsonl: the judge needs the field {error}") from error
        if messages is not None:
            asked[number] = messages
    replies = ask_in_order(
        list(asked.items()),
        folder / "judge_replies.jsonl",
        base_url=args.judge_url,
        model=args.judge_model,
        desc="judging",
        check=lambda text: benchmark.check_reply(plain(text)),
        give_up=args.give_up,
        **{"temperature": 0, **args.request},
    )
    texts = dict(zip(asked, list(replies)))
    lines = []
    for number in range(len(answers)):
        text = plain(texts.get(number, "[]"))
        if text and args.protocol == "symmpo":
            text = benchmark.check_reply(text)
        lines.append({"text": text, "model": args.judge_model})
    write_lines(folder / "judgements.jsonl", lines)


def judge_text(reply):
    """The text of a judge's reply: itself, a line of judgements.jsonl, or a chat completion."""
    try:
        if isinstance(reply, dict):
            there = "text" in reply
            reply = reply["text"] if there else reply["choices"][0]["message"]["content"]
    except (LookupError, TypeError) as error:
        raise UserError(f"judgements are texts or chat completions: {error}") from error
    if not isinstance(reply, str | None):
        raise UserError(f"judgements are texts or chat completions, not {reply!r:.40}")
    return reply or ""
